import contextlib
import dataclasses
import json

import numpy as np
import pytest

from aecore.artifact.commit import PartRecord, claim_generation, commit_manifest
from aecore.artifact.documents import sealed
from aecore.data.dataset import Dataset, open_dataset, read_listings
from aecore.data.format.sample_format import SampleFormat
from aecore.data.manifest import DatasetManifest, read_manifest
from aecore.data.write.manifest_build import next_manifest
from aecore.errors import DataError
from aecore.store import FileRef, canonical_json, open_store

LISTING = FileRef("listings/000001.parquet", 9, "f" * 64)


def record(stem, *, rows=3, bad=0, first=0, tar="a", content="c", split=None, classes=None, shapes=None, seconds=1.0):
    """A part as the shard writer records it."""
    files = [FileRef(f"shards/{stem}.tar", 10 * rows, tar * 64), FileRef(f"shards/{stem}.parquet", 5, "b" * 64)] if rows else []
    if bad:
        files.append(FileRef(f"quarantine/{stem}.parquet", 7, "e" * 64))
    detail = {
        "split": split or stem.split("-")[0],
        "samples": rows,
        "planned": rows + bad,
        "quarantined": bad,
        "first_ordinal": first,
        "reasons": {"truncated": bad} if bad else {},
    }
    if rows:
        shapes = shapes or {"28x28x1/L": rows}
        detail |= {"content_sha256": content, "bytes": 10 * rows, "extensions": {"png": rows}, "classes": classes or {}, "shapes": shapes}
    return PartRecord(stem, tuple(files), rows, bad, detail, {"pack_s": seconds})


def manifest(*records, parent=None, classes=("x", "y")):
    listing = LISTING if parent is None else dataclasses.replace(LISTING, name="listings/000002.parquet")
    return next_manifest(parent, {"splits": {"by": "none"}}, classes, records, listing, "0" * 64)


def opened(*records, **options):
    """The dataset of these records, as `open_dataset` would give it; no file is read."""
    return Dataset(open_store("./unused"), manifest(*records, **options))


def test_a_manifest_is_a_pure_function_of_the_records_without_their_timings():
    first = manifest(record("train-000000", seconds=1.0), record("val-000000"))
    second = manifest(record("train-000000", seconds=7.0), record("val-000000"))
    assert canonical_json(first.to_json()) == canonical_json(second.to_json())


def test_the_json_round_trip_keeps_everything():
    made = manifest(
        record("train-000000", bad=1, classes={"x": 2, "": 1}),
        record("zeta-000000"),
        record("test-000000"),
        record("val-000000", rows=0, bad=2),
    )
    assert DatasetManifest.from_json(json.loads(canonical_json(made.to_json()))) == made


def test_shards_stand_in_order_of_split_then_generation():
    first = manifest(record("zeta-000000"), record("test-000000"), record("train-000000"), record("train-000001", first=3))
    second = manifest(record("train-g000003-000000", first=6, split="train"), record("val-g000003-000000", split="val"), parent=first)
    assert [shard.stem for shard in second.shards] == [
        "train-000000",
        "train-000001",
        "train-g000003-000000",
        "val-g000003-000000",
        "test-000000",
        "zeta-000000",
    ]
    assert (second.number, second.parent, second.parent_sha256) == (2, 1, first.dataset_sha256)
    assert [listing.name for listing in second.listings] == ["listings/000001.parquet", "listings/000002.parquet"]


def test_counts_and_statistics_add_up_over_generations():
    first = manifest(record("train-000000", rows=3, bad=1, classes={"x": 2, "y": 1}))
    second = manifest(
        record("train-g000002-000000", split="train", rows=5, first=4, classes={"x": 4, "": 1}, shapes={"8x9x3/RGB": 5}), parent=first
    )
    assert (second.num_samples("train"), second.num_samples(), second.quarantined, second.num_planned("train")) == (8, 8, 1, 9)
    train = second.statistics["train"]
    assert (train.samples, train.quarantined, train.bytes, dict(train.classes)) == (8, 1, 80, {"x": 6, "y": 1})
    assert dict(second.sample.shapes) == {"28x28x1/L": 3, "8x9x3/RGB": 5}
    assert dict(second.sample.extensions) == {"png": 8}
    assert dict(second.reasons) == {"truncated": 1}


def test_a_part_without_one_good_sample_is_no_shard_but_keeps_its_ordinals():
    made = manifest(record("train-000000", rows=0, bad=4), record("train-000001", first=4))
    assert [shard.stem for shard in made.shards] == ["train-000001"]
    assert [part.stem for part in made.rejected] == ["train-000000"]
    assert (made.quarantined, made.num_planned("train"), made.num_planned("val")) == (4, 7, 0)


@pytest.mark.parametrize(
    "other",
    [
        manifest(record("train-000000", tar="0"), record("test-000000")),
        manifest(record("train-000000", content="0"), record("test-000000")),
        manifest(record("train-000000"), record("test-000000", content="0")),
        manifest(record("train-000000"), record("test-000000"), classes=("x",)),
        manifest(record("train-000000"), record("test-000001")),
    ],
)
def test_the_dataset_hash_sees_every_shard_and_the_classes(other):
    assert other.dataset_sha256 != manifest(record("train-000000"), record("test-000000")).dataset_sha256


def test_the_dataset_hash_does_not_see_parquet_bytes():
    made, other = record("train-000000"), record("train-000000")
    other = PartRecord(other.part, (other.files[0], FileRef(other.files[1].name, 99, "9" * 64)), other.rows, 0, other.detail)
    assert manifest(made).dataset_sha256 == manifest(other).dataset_sha256


def test_the_training_key_sees_its_own_split_only():
    made = opened(record("train-000000"), record("test-000000"))
    same = opened(record("train-000000"), record("test-000000", content="0"), classes=("x", "y", "z"))
    assert same.training_key("train") == made.training_key("train")
    assert opened(record("train-000000", content="0")).training_key("train") != made.training_key("train")
    assert made.training_key("test") != made.training_key("train")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("28x30x1/L", (1, 28, 30)),
        ("8x9x3/RGB", (3, 8, 9)),
        ("5x6x1/1", (1, 5, 6)),
        ("4x5x6/float32", (4, 5, 6)),
        ("7/uint8", (7,)),
        ("/bool", ()),
    ],
)
def test_images_are_channels_first_and_arrays_as_they_are(name, shape):
    assert SampleFormat.parse(name).tensor_shape == shape
    assert opened(record("train-000000", shapes={name: 3})).input_shape() == shape


def test_two_shapes_shard_but_refuse_to_train():
    made = opened(record("train-000000", shapes={"8x8x3/RGB": 2, "9x8x3/RGB": 1}))
    with pytest.raises(DataError, match=r"2 different shapes \(8x8x3/RGB \(2\), 9x8x3/RGB \(1\)\).*shards\.resize"):
        made.input_shape()
    assert opened(record("train-000000", shapes={"8x8x1/L": 2, "8x8x1/1": 1})).input_shape() == (1, 8, 8)
    with pytest.raises(DataError, match="no samples"):
        opened(record("train-000000", rows=0, bad=1)).input_shape()


def test_an_unknown_split_names_the_known_ones():
    with pytest.raises(DataError, match=r"no split 'valid' \(it has: train, test\)"):
        manifest(record("test-000000"), record("train-000000")).num_samples("valid")


def test_opening_takes_the_newest_generation_or_the_one_asked_for(tmp_path):
    store = open_store(tmp_path)
    first = manifest(record("train-000000"))
    second = manifest(record("train-g000002-000000", split="train", first=3), parent=first)
    for made in (first, second):
        commit_manifest(store, "dataset", made.parent, made.to_json())
    assert open_dataset(str(tmp_path)).manifest == second
    assert open_dataset(str(tmp_path), 1).manifest == first
    with pytest.raises(DataError, match=r"has no generation 3 \(the newest is 2\)"):
        open_dataset(str(tmp_path), 3)


def test_opening_without_a_manifest_says_whether_a_run_is_unfinished(tmp_path):
    with pytest.raises(DataError, match="holds no dataset: check the address, or write one with aecore.data.write.job.shard_dataset"):
        open_dataset(str(tmp_path / "new"))
    store = open_store(tmp_path)
    claim_generation(store, "dataset", {"a": 1}, {})
    store.put("records/train-000000.json", b"{}", role="record")
    with pytest.raises(DataError, match=r"unfinished run \(1 parts recorded, no manifest\): run the command that wrote it again"):
        open_dataset(str(tmp_path))


@pytest.mark.parametrize("content", ['{"format": 1}', '{"format": 1, "number": 1', '{"format": 99}', "[]"])
def test_a_damaged_manifest_is_a_data_error(tmp_path, content):
    (tmp_path / "dataset.000001.json").write_text(content)
    with pytest.raises(DataError, match=r"dataset\.000001\.json"):
        open_dataset(str(tmp_path))


def test_a_flipped_bit_is_found_or_changes_nothing(tmp_path):
    store, made = open_store(tmp_path), manifest(record("train-000000"), record("test-000000"))
    commit_manifest(store, "dataset", 0, made.to_json())
    path = tmp_path / "dataset.000001.json"
    data = path.read_bytes()
    path.chmod(0o644)
    random = np.random.default_rng(0)
    assert read_manifest(store, 1) == made
    for bit in random.choice(8 * len(data), 300, replace=False):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with contextlib.suppress(DataError):
            assert read_manifest(store, 1) == made


def test_a_changed_count_is_called_damage_and_a_manifest_without_a_hash_is_read(tmp_path):
    store, made = open_store(tmp_path), manifest(record("train-000000"))
    made = dataclasses.replace(made, claim_sha256=None)
    plain = {name: value for name, value in made.to_json().items() if name != "claim_sha256"}
    path = tmp_path / "dataset.000001.json"
    path.write_bytes(canonical_json({**plain, "format": 1}))
    assert read_manifest(store, 1) == made
    path.write_bytes(sealed(made.to_json()).replace(b'"number":1', b'"number":7'))
    with pytest.raises(DataError, match=r"dataset\.000001\.json is damaged"):
        read_manifest(store, 1)


def test_a_damaged_listing_is_found(tmp_path):
    store = open_store(tmp_path)
    ref = store.put("listings/000001.parquet", b"not parquet", role="listing")
    with pytest.raises(DataError, match="listings/000001.parquet"):
        read_listings(store, next_manifest(None, {}, (), [record("train-000000")], ref, "0" * 64))
