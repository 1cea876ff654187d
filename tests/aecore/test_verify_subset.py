"""Slices of parts: n of them read everything once, and damage is found by the one that holds it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aecore.artifact.subset import VerifySubset, parse_subset
from aecore.data.dataset import open_dataset
from aecore.data.read.verify import verify_dataset
from aecore.errors import ConfigError, DataError
from aecore.table.table import open_table
from aecore.table.verify import verify_table
from tests.aecore.encoding import encode, folder_dataset, image_folder, saved_run


@given(st.lists(st.text(min_size=1), unique=True, max_size=50), st.integers(1, 9))
def test_every_stem_is_in_exactly_one_slice(stems, total):
    slices = [VerifySubset(number, total) for number in range(1, total + 1)]
    assert all(sum(one.takes(stem) for one in slices) == 1 for stem in stems)


def test_slices_are_of_similar_size():
    counts = [sum(VerifySubset(number, 7).takes(f"train-{stem:06d}") for stem in range(7000)) for number in range(1, 8)]
    assert min(counts) > 900
    assert max(counts) < 1100


@pytest.mark.parametrize("text", ["0/3", "4/3", "1/0", "3", "a/b", "1/2/3", "-1/2", ""])
def test_what_is_no_slice_is_refused_with_an_example(text):
    with pytest.raises(ConfigError, match=rf"--read-data-subset {text} is no slice.*for example --read-data-subset 1/7"):
        parse_subset(text)


@pytest.fixture
def places(tmp_path):
    data = folder_dataset(image_folder(tmp_path / "images", "train", range(30)), tmp_path / "dataset", max_samples=4)
    encode(saved_run(tmp_path / "run"), data, tmp_path / "table")
    return tmp_path


def test_all_slices_of_a_dataset_together_read_every_shard_once(places):
    dataset = open_dataset(str(places / "dataset"))
    reports = [verify_dataset(dataset, only=VerifySubset(number, 3)) for number in (1, 2, 3)]
    assert all(report.ok for report in reports)
    assert sum(report.parts_read for report in reports) == reports[0].parts == len(dataset.manifest.shards)
    listings = sum(ref.bytes for ref in dataset.manifest.listings) * sum(report.parts_read > 0 for report in reports)
    assert sum(report.bytes_read for report in reports) - listings == sum(s.tar.bytes + s.index.bytes for s in dataset.manifest.shards)


def test_a_flipped_bit_in_a_shard_is_found_by_the_slice_that_holds_it_and_a_lost_byte_by_all(places):
    dataset = open_dataset(str(places / "dataset"))
    shard = dataset.manifest.shards[2]
    path = places / "dataset" / shard.tar.name
    content = bytearray(path.read_bytes())
    content[700] ^= 1
    path.write_bytes(content)
    found = [verify_dataset(dataset, only=VerifySubset(number, 3)).ok for number in (1, 2, 3)]
    assert found == [not VerifySubset(number, 3).takes(shard.stem) for number in (1, 2, 3)]
    path.write_bytes(content[:-1])
    assert not any(verify_dataset(dataset, only=VerifySubset(number, 3)).ok for number in (1, 2, 3))


def test_a_flipped_bit_in_a_part_is_found_by_the_slice_that_holds_it(places):
    table = open_table(str(places / "table"))
    part = table.parts[1]
    path = places / "table" / part.file.name
    reports = [verify_table(table, only=VerifySubset(number, 3)) for number in (1, 2, 3)]
    assert sum(report.parts_read for report in reports) == len(table.parts)
    assert sum(report.bytes_read for report in reports) == sum(each.file.bytes for each in table.parts)
    content = bytearray(path.read_bytes())
    content[20] ^= 1
    path.write_bytes(content)
    for number in (1, 2, 3):
        if VerifySubset(number, 3).takes(part.stem):
            with pytest.raises(DataError, match=part.stem):
                verify_table(table, only=VerifySubset(number, 3))
        else:
            verify_table(table, only=VerifySubset(number, 3))
