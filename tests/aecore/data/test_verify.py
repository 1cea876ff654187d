import hashlib
import shutil

import pyarrow.parquet as pq
import pytest

from aecore.data.dataset import open_dataset
from aecore.data.format.index import table_bytes
from aecore.data.read.verify import verify_dataset
from aecore.data.sources.folder import FolderSpec
from aecore.data.write.job import shard_dataset
from aecore.data.write.spec import ShardSpec
from aecore.data.write.splits import SplitSpec
from aecore.errors import DataError
from tests.aecore.data.before import grows_only
from tests.aecore.data.tiny import encoded, image
from tests.documents import content, rewrite


@pytest.fixture
def dataset(tmp_path):
    """12 images in two generations, one of them quarantined."""
    source = tmp_path / "in"
    for number in range(12):
        path = source / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(image(number)))
        if number == 7:
            path.write_bytes(b"broken")
        if number in (8, 11):
            shard_dataset(FolderSpec(url=str(source)), str(tmp_path / "out"), SplitSpec(val=0.3), ShardSpec(max_samples=3, max_bad=0.5))
    return tmp_path / "out"


def problems(url, **options):
    return verify_dataset(open_dataset(str(url)), **options).problems


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_whole_data_set_has_no_problems(dataset):
    found = verify_dataset(open_dataset(str(dataset)), read_data=True)
    assert found.ok
    assert (found.samples, found.quarantined, found.data_read) == (11, 1, True)
    assert found.files == 2 * len(open_dataset(str(dataset)).manifest.shards) + 1 + 2


@pytest.mark.parametrize("pattern", ["shards/*.tar", "shards/*.parquet", "quarantine/*.parquet", "listings/000002.parquet"])
def test_a_missing_or_truncated_file_is_found_by_its_size(dataset, pattern):
    path = sorted(dataset.glob(pattern))[0]
    path.write_bytes(path.read_bytes()[:-1])
    (problem,) = problems(dataset)
    assert path.name in problem
    path.unlink()
    (problem,) = problems(dataset)
    assert "is missing" in problem


@pytest.mark.parametrize("pattern", ["shards/*.tar", "shards/*.parquet", "quarantine/*.parquet", "listings/000002.parquet"])
def test_a_flipped_bit_is_found_by_reading(dataset, pattern):
    path = sorted(dataset.glob(pattern))[0]
    flip(path, path.stat().st_size // 2)
    assert problems(dataset) == ()
    assert any(path.stem in problem for problem in problems(dataset, read_data=True))


def test_all_problems_are_listed_not_only_the_first(dataset):
    tars = sorted(dataset.glob("shards/*.tar"))
    for path in tars[:2]:
        flip(path, 600)
    assert len(problems(dataset, read_data=True)) == 2


def test_a_manifest_that_was_changed_by_hand_is_found(dataset):
    path = dataset / "dataset.000002.json"
    data = content(path)
    rewrite(path, classes=["b", "a"])
    assert "dataset_sha256" in problems(dataset)[0]
    rewrite(path, classes=data["classes"], parent_sha256="0" * 64)
    assert "another generation 1" in problems(dataset)[0]
    shards = [*data["shards"][:-1], {**data["shards"][-1], "planned": 99}]
    rewrite(path, shards=shards, parent_sha256=data["parent_sha256"])
    assert "99 planned" in problems(dataset)[0]


OF_BEFORE = "names 1 listings, expected one for each of 2 generations", "neither in a shard nor in quarantine"
FOLLOWING = "is of claim 2, the newest of the listings that it names is of claim 1", "are not listed, first"


@pytest.mark.parametrize(("grows", "refusal", "problem"), [(True, *OF_BEFORE), (False, *FOLLOWING)])
def test_keys_that_are_planned_but_nowhere_are_found(dataset, grows, refusal, problem):
    path, listing = dataset / "dataset.000002.json", dataset / "listings/000002.parquet"
    if grows:
        grows_only(dataset)
    listings = content(path)["listings"]
    rewrite(path, listings=listings[:1])
    with pytest.raises(DataError, match=refusal):
        open_dataset(str(dataset))
    listing.write_bytes(table_bytes(pq.read_table(listing).slice(1), {"claim": 2}))
    data = listing.read_bytes()
    rewrite(path, listings=[listings[0], {"name": listings[1]["name"], "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}])
    assert any(problem in found for found in problems(dataset, read_data=True))


def test_a_shard_named_twice_is_refused_and_a_copy_of_one_has_repeated_keys(dataset):
    path = dataset / "dataset.000002.json"
    shards = content(path)["shards"]
    rewrite(path, shards=[*shards, {**shards[0], "stem": "train-000009"}])
    with pytest.raises(DataError, match="names a file twice"):
        open_dataset(str(dataset))
    copies = {}
    for name in ("tar", "index"):
        ref = shards[0][name]
        copies[name] = {**ref, "name": ref["name"].replace(shards[0]["stem"], "train-000009")}
        shutil.copy(dataset / ref["name"], dataset / copies[name]["name"])
    copy = {**shards[0], **copies, "stem": "train-000009"}
    rewrite(path, shards=[*shards, copy])
    with pytest.raises(DataError, match="train-000009 begins at ordinal 0"):
        open_dataset(str(dataset))
    own = content(path)
    last = max((shard for shard in shards if shard["split"] == "train"), key=lambda shard: shard["first_ordinal"])
    known, more = own["statistics"]["train"], copy["samples"]
    own["statistics"]["train"] = {**known, "samples": known["samples"] + more, "bytes": known["bytes"] + copy["tar"]["bytes"]}
    sample = {name: {text: count + more for text, count in counts.items()} for name, counts in own["sample"].items()}
    copy["first_ordinal"] = last["first_ordinal"] + last["planned"]
    rewrite(path, shards=[*shards, copy], statistics=own["statistics"], sample=sample)
    assert any("train-000009: keys are not unique" in problem for problem in problems(dataset, read_data=True))
