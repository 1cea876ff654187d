"""Datasets as a source: other shard sizes, merged ones, and datasets that follow the ones they were made of."""

import dataclasses
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from aecore.data.dataset import Dataset, open_dataset
from aecore.data.format.index import INDEX_SCHEMA
from aecore.data.manifest import DatasetManifest
from aecore.data.read.verify import verify_dataset
from aecore.data.sources import Listing, _detect
from aecore.data.sources import dataset as dataset_source
from aecore.data.sources.dataset import DatasetSource, DatasetSpec
from aecore.data.sources.folder import FolderSpec
from aecore.data.write.compact import compact_dataset
from aecore.data.write.job import shard_dataset
from aecore.data.write.plan import PlanSummary
from aecore.data.write.spec import ShardSpec
from aecore.data.write.splits import SplitSpec
from aecore.errors import ConfigError, DataError
from aecore.maintenance.gc import DAY_S, collect_garbage
from aecore.store import _states
from tests.aecore.data.removals import live_keys, remove
from tests.aecore.data.rows_source import ROWS, RowsSpec
from tests.aecore.encoding import image_folder, tree


@pytest.fixture(autouse=True)
def nothing_is_young(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_states, "YOUNG_NS", 0)


def images(folder: Path, names: Mapping[str, int], size: int = 6) -> Path:
    """Write grey images `<folder>/<name>.png` of these values."""
    for name, value in names.items():
        (folder / f"{name}.png").parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (size, size), value).save(folder / f"{name}.png")
    return folder


def folder(source: Path, out: Path, splits: SplitSpec | None = None, **options: Any) -> DatasetManifest:
    shards = ShardSpec(**{"max_samples": 7, "max_bad": 0.5, **options})
    made = shard_dataset(FolderSpec(url=str(source)), str(out), splits or SplitSpec(), shards)
    assert isinstance(made, DatasetManifest)
    return made


def again(
    out: Path, *datasets: object, splits: SplitSpec | None = None, spec: Mapping[str, Any] | None = None, **options: Any
) -> DatasetManifest:
    """Write datasets as one, or bring the one that is there up to date."""
    source = DatasetSpec(url="::".join(map(str, datasets)), **(spec or {}))
    made = shard_dataset(source, str(out), splits or SplitSpec(), ShardSpec(**{"max_samples": 5, "max_bad": 0.5, **options}))
    assert isinstance(made, DatasetManifest)
    return made


def samples(dataset: Dataset) -> dict[str, tuple[Any, ...]]:
    """Return key -> all that a live sample is, but where it is: split, class name, bag, columns, bytes."""
    found = {}
    for shard in dataset.manifest.shards:
        index, reader = dataset.index(shard), dataset.reader(shard)
        rows = np.flatnonzero(np.isin(reader.index["ordinal"].to_numpy(), index["ordinal"].to_numpy()))
        further = [name for name in index.column_names if name not in (*INDEX_SCHEMA.names, "source_sha256")]
        for row, data in zip(index.to_pylist(), reader.read_rows(rows), strict=True):
            values = {name: row[name] for name in further if row[name] is not None}
            found[row["key"]] = (shard.split, row["label_name"], row["group"], row["sha256"], data, values)
        reader.close()
    return found


def write(
    out: Path, name: str, count: int, columns: Mapping[str, Any], groups: list[str] | None = None, by: SplitSpec | None = None
) -> None:
    """A dataset of `count` arrays named `<name>/<number>` with these columns, written by way of a source of its own."""
    ROWS[name] = Listing(
        [f"{name}/{number}" for number in range(count)],
        [f"{name}/{number}" for number in range(count)],
        np.full(count, 144, np.int64),
        groups=groups,
        columns=columns,
        states=["1"] * count,
    )
    shard_dataset(RowsSpec(rows=name), str(out), by or SplitSpec(by="none"), ShardSpec(max_samples=3))


def problems(url: object) -> tuple[str, ...]:
    return verify_dataset(open_dataset(str(url)), read_data=True).problems


def same(out: Path, data: object, *, extra: int = 0) -> None:
    """The one holds what the other does."""
    mine, theirs = open_dataset(str(out)), open_dataset(str(data))
    assert samples(mine) == samples(theirs) != {}
    assert mine.manifest.content_sha256 == theirs.manifest.content_sha256 is not None
    assert mine.manifest.sample == theirs.manifest.sample and mine.classes == theirs.classes
    assert mine.manifest.quarantined == theirs.manifest.quarantined and mine.manifest.reasons == theirs.manifest.reasons
    counts = [{name: dataclasses.replace(each, bytes=0) for name, each in one.manifest.statistics.items()} for one in (mine, theirs)]
    assert counts[0] == counts[1]
    assert problems(out) == ()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Splits, classes, a bad file; two generations, and one that removed, changed and relabelled samples."""
    source = image_folder(image_folder(tmp_path / "images", "train", range(30)), "test", range(30, 45))
    (source / "train/square/bad.png").write_bytes(b"no image")
    folder(source, tmp_path / "data")
    image_folder(source, "valid", range(50, 60))
    folder(source, tmp_path / "data")
    paths = sorted(source.glob("train/*/*.png"))
    paths[3].unlink()
    paths[5].write_bytes(paths[7].read_bytes())
    (source / "train/heart").mkdir(exist_ok=True)
    shutil.move(paths[9], source / f"train/heart/moved-{paths[9].name}")
    folder(source, tmp_path / "data")
    assert open_dataset(str(tmp_path / "data")).number == 3 and {*open_dataset(str(tmp_path / "data")).manifest.splits} == {
        "train",
        "val",
        "test",
    }
    return tmp_path / "data"


def test_another_size_of_shards_keeps_all_that_samples_are(data: Path, tmp_path: Path) -> None:
    made = again(tmp_path / "out", data)
    assert max(shard.samples for shard in made.shards) == 5 and made.identity["source"] == {
        "kind": "dataset",
        "keys": "same",
        "classes": [],
    }
    same(tmp_path / "out", data)
    again(tmp_path / "back", tmp_path / "out", max_samples=1000)
    same(tmp_path / "back", data)


def test_it_follows_the_dataset_that_it_was_made_of(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, source = tmp_path / "out", tmp_path / "images"
    again(out, data)
    with monkeypatch.context() as patched:
        patched.setattr(DatasetSource, "prefetch", lambda *_: pytest.fail("a sample was read"))
        assert again(out, data).number == 1, "nothing new, and nothing is read"
        compact_dataset(str(data), 0)
        assert again(out, data).number == 1, "the same samples in other shards"
    (source / "train/square/bad.png").write_bytes(next(source.glob("test/*/*.png")).read_bytes())  # repaired
    paths = sorted(source.glob("train/*/*.png"))
    paths[1].unlink()
    paths[4].write_bytes(paths[2].read_bytes())
    image_folder(source, "train", range(70, 75))
    folder(source, data)
    made = again(out, data)
    assert made.number == 2 and made.has_removed and made.quarantined == 0
    same(out, data)
    before = tree(out)
    dry = shard_dataset(DatasetSpec(url=str(data)), str(out), SplitSpec(), ShardSpec(max_samples=5, max_bad=0.5), dry_run=True)
    assert isinstance(dry, PlanSummary) and dry.changes["added"]["samples"] == 0 and tree(out) == before


def test_one_that_follows_reads_shards_that_were_retired_since_it_listed(data: Path, tmp_path: Path) -> None:
    source = DatasetSource(DatasetSpec(url=str(data)))
    listing = source.listing()
    usable = [name for name, bad in zip(listing.sources, listing.unusable or [], strict=True) if bad is None]
    known = [source.read(name) for name in usable]
    compact_dataset(str(data), 0)
    worker = DatasetSource(DatasetSpec(url=str(data)))
    read = worker.prefetch(usable[::-1])
    assert [read(name) for name in usable[::-1]] == known[::-1]
    assert worker.read_states(usable) == [
        state for state, bad in zip(listing.states or [], listing.unusable or [], strict=True) if bad is None
    ]
    collect_garbage(str(data), keep_generations=1, retention_s=0, older_than_s=0, now=time.time() + DAY_S)
    with pytest.raises(DataError):
        [DatasetSource(DatasetSpec(url=str(data))).read(name) for name in usable]


def test_splits_may_be_made_by_a_recipe(data: Path, tmp_path: Path) -> None:
    made = again(tmp_path / "out", data, splits=SplitSpec(by="hash", val=0.3))
    assert {*made.splits} == {"train", "val"} and 5 < made.num_samples("val") < 30
    assert samples(open_dataset(str(tmp_path / "out"))).keys() == samples(open_dataset(str(data))).keys()
    assert again(tmp_path / "whole", data, splits=SplitSpec(by="none")).splits.keys() == {"train"}
    with pytest.raises(ConfigError, match="its own split 'val'"):
        again(tmp_path / "both", data, splits=SplitSpec(val=0.3))
    for out in ("out", "whole"):
        assert problems(tmp_path / out) == ()


@pytest.mark.parametrize("split", ["validation", "Probe-2", "train"])
def test_a_split_of_any_name_stays(tmp_path: Path, split: str) -> None:
    write(tmp_path / "a", "a", 4, {"subset": np.array([split] * 4, object)}, by=SplitSpec(by="column", column="subset"))
    again(tmp_path / "out", tmp_path / "a")
    same(tmp_path / "out", tmp_path / "a")
    assert {*open_dataset(str(tmp_path / "out")).manifest.splits} == {split}


def test_datasets_are_merged_by_names_of_classes(tmp_path: Path) -> None:
    folder(images(tmp_path / "a-images", {"cat/1": 1, "dog/2": 2, "cat/3": 3}), tmp_path / "a")
    folder(images(tmp_path / "b-images", {"ant/4": 4, "cat/5": 5}), tmp_path / "b")
    made = again(tmp_path / "out", tmp_path / "a", tmp_path / "b")
    assert made.classes == ("cat", "dog", "ant") and made.statistics["train"].classes == {"ant": 1, "cat": 3, "dog": 1}
    together = samples(open_dataset(str(tmp_path / "out")))
    assert together == samples(open_dataset(str(tmp_path / "a"))) | samples(open_dataset(str(tmp_path / "b")))
    folder(images(tmp_path / "all-images", {"cat/1": 1, "dog/2": 2, "cat/3": 3, "ant/4": 4, "cat/5": 5}), tmp_path / "all")
    assert made.content_sha256 == open_dataset(str(tmp_path / "all")).manifest.content_sha256
    (tmp_path / "a-images/cat/1.png").unlink()
    images(tmp_path / "b-images", {"bee/6": 6})
    folder(tmp_path / "a-images", tmp_path / "a")
    folder(tmp_path / "b-images", tmp_path / "b")
    made = again(tmp_path / "out", tmp_path / "a", tmp_path / "b")
    assert made.classes == ("cat", "dog", "ant", "bee") and made.num_samples() == 5
    assert problems(tmp_path / "out") == ()
    made = again(tmp_path / "named", tmp_path / "a", tmp_path / "b", spec={"classes": ("bee", "ant", "dog", "cat", "cow")})
    assert made.classes == ("bee", "ant", "dog", "cat", "cow") and problems(tmp_path / "named") == ()


def test_keys_of_two_datasets_are_refused_by_name_or_prefixed(tmp_path: Path) -> None:
    folder(images(tmp_path / "x/images", {"cat/1": 1, "cat/2": 2}), tmp_path / "x/dataset")
    folder(images(tmp_path / "y/images", {"cat/2": 3, "cat/4": 4}), tmp_path / "y/dataset")
    both = tmp_path / "x/dataset", tmp_path / "y/dataset"
    with pytest.raises(DataError, match=f"{both[0]} and {both[1]} have a sample 'cat/2' both \\(1 in all\\): set source.keys=prefixed"):
        again(tmp_path / "out", *both)
    assert not (tmp_path / "out/dataset.000001.json").exists()
    made = again(tmp_path / "out", *both, spec={"keys": "prefixed"})
    found = samples(open_dataset(str(tmp_path / "out")))
    assert {*found} == {"x-dataset/cat/1", "x-dataset/cat/2", "y-dataset/cat/2", "y-dataset/cat/4"} and made.classes == ("cat",)
    assert problems(tmp_path / "out") == () and again(tmp_path / "out", *both, spec={"keys": "prefixed"}).number == 1
    with pytest.raises(ConfigError, match="names a dataset twice"):
        again(tmp_path / "twice", both[0], both[0])


def test_further_columns_are_united_and_missing_values_are_null(tmp_path: Path) -> None:
    made = []
    for name, values in (("a", {"size": [1, 2], "who": ["me", "you"]}), ("b", {"size": [1.5, 2.5]}), ("c", {})):
        made.append(tmp_path / name)
        write(made[-1], name, 2, {column: pa.array(each) for column, each in values.items()})
    again(tmp_path / "out", *made)
    found = samples(open_dataset(str(tmp_path / "out")))
    assert {key: row[-1] for key, row in found.items()} == {
        "a/0": {"size": 1, "who": "me"}, "a/1": {"size": 2, "who": "you"}, "b/0": {"size": 1.5}, "b/1": {"size": 2.5}, "c/0": {}, "c/1": {}
    }  # fmt: skip
    types = {
        tuple((field.name, str(field.type)) for field in open_dataset(str(tmp_path / "out")).index(shard).schema)[-2:]
        for shard in open_dataset(str(tmp_path / "out")).manifest.shards
    }
    assert types == {(("size", "double"), ("who", "string"))}, "every shard has every column in one type"
    assert problems(tmp_path / "out") == ()
    lines = [open_dataset(str(each)).manifest.content_sha256 for each in made]
    assert len({*lines}) == 3
    again(tmp_path / "back", tmp_path / "out", max_samples=1)
    same(tmp_path / "back", tmp_path / "out")
    write(tmp_path / "d", "d", 2, {"size": pa.array(["small", "large"])})
    with pytest.raises(DataError, match=f"the column 'size' has values of type .* in {tmp_path}/a and string in {tmp_path}/d"):
        again(tmp_path / "wrong", made[0], tmp_path / "d")


def test_bags_stay_whole_and_are_told_apart(tmp_path: Path) -> None:
    write(tmp_path / "a", "a", 6, {}, ["p", "q", "p", "q", "r", "r"])
    write(tmp_path / "b", "b", 4, {}, ["p", "p", "s", "s"])
    write(tmp_path / "c", "c", 2, {})
    again(tmp_path / "one", tmp_path / "a", max_samples=4)
    same(tmp_path / "one", tmp_path / "a")
    assert open_dataset(str(tmp_path / "one")).manifest.num_groups("train") == 3
    with pytest.raises(DataError, match="have a bag 'p' both .*source.keys=prefixed"):
        again(tmp_path / "two", tmp_path / "a", tmp_path / "b")
    made = again(tmp_path / "two", tmp_path / "a", tmp_path / "b", spec={"keys": "prefixed"}, max_samples=4)
    assert made.num_groups("train") == 5
    groups = {key: row[2] for key, row in samples(open_dataset(str(tmp_path / "two"))).items()}
    assert groups["a/a/0"] == "a/p" and groups["b/b/0"] == "b/p"
    assert problems(tmp_path / "two") == ()
    with pytest.raises(DataError, match="2 samples are in no bag .*datasets with bags and ones without are not merged"):
        again(tmp_path / "three", tmp_path / "a", tmp_path / "c")


def test_what_is_no_dataset_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no dataset"):
        again(tmp_path / "out", data, tmp_path / "images")
    with pytest.raises(ConfigError, match="would be written from itself"):
        again(data, data)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("dataset.*"))


def test_a_dataset_is_detected_by_what_is_there(data: Path, tmp_path: Path) -> None:
    assert _detect.detect_source(str(data)).kind == "dataset"
    assert _detect.detect_source(f"{data}::{data}").kind == "dataset"
    assert _detect.detect_source(str(tmp_path / "images")).kind == "folder"
    with pytest.raises(ConfigError, match=f"{tmp_path}/images holds no dataset: only datasets are merged"):
        _detect.detect_source(f"{data}::{tmp_path}/images")


def test_a_withdrawn_dataset_is_not_read(data: Path, tmp_path: Path) -> None:
    again(tmp_path / "out", data)
    (data / "withdrawn.000003.json").write_bytes(b"{}")
    with pytest.raises(DataError, match="was withdrawn"):
        again(tmp_path / "other", data)


def test_damage_in_a_dataset_stops_before_anything_is_named(data: Path, tmp_path: Path) -> None:
    shard = open_dataset(str(data)).manifest.split("train")[0]
    content = bytearray((data / shard.tar.name).read_bytes())
    place = open_dataset(str(data)).index(shard)["members"].to_pylist()[-1][-1]
    content[place["offset"] + 30] ^= 4
    (data / shard.tar.name).chmod(0o644)
    (data / shard.tar.name).write_bytes(content)
    with pytest.raises(DataError, match=f"{shard.tar.name} is damaged at sample"):
        again(tmp_path / "out", data)
    assert not list((tmp_path / "out").glob("dataset.*"))


def test_a_lost_dataset_removes_nothing(data: Path, tmp_path: Path) -> None:
    write(tmp_path / "a", "a", 6, {})
    write(tmp_path / "b", "b", 6, {})
    again(tmp_path / "out", tmp_path / "a", tmp_path / "b")
    remove(tmp_path / "b", live_keys(open_dataset(str(tmp_path / "b"))))
    with pytest.raises(DataError, match="all samples of the folder 'b/'"):
        again(tmp_path / "out", tmp_path / "a", tmp_path / "b")
    shutil.move(tmp_path / "b", tmp_path / "gone")
    with pytest.raises(DataError, match="holds no dataset"):
        again(tmp_path / "out", tmp_path / "a", tmp_path / "b")
    assert open_dataset(str(tmp_path / "out")).number == 1


@pytest.mark.parametrize("removed", ["keep", "drop"])
def test_a_dataset_that_was_made_anew_has_other_samples_at_the_same_places(tmp_path: Path, removed: str) -> None:
    folder(images(tmp_path / "one", {f"c/a{number}": number for number in range(20)}), tmp_path / "data")
    again(tmp_path / "out", tmp_path / "data", removed=removed)
    shutil.rmtree(tmp_path / "data")
    folder(images(tmp_path / "two", {f"c/b{number}": 100 + number for number in range(20)}), tmp_path / "data")
    if removed == "drop":
        with pytest.raises(DataError, match="would lose 20 of 20 samples"):
            again(tmp_path / "out", tmp_path / "data")
        assert again(tmp_path / "out", tmp_path / "data", max_removed=1).num_samples() == 20
        same(tmp_path / "out", tmp_path / "data")
    else:
        assert again(tmp_path / "out", tmp_path / "data").num_samples() == 40
        assert problems(tmp_path / "out") == ()


@pytest.mark.parametrize("name", ["state", "bytes", "reason", "message", "split"])
def test_a_further_column_may_have_any_name(tmp_path: Path, name: str) -> None:
    write(tmp_path / "a", "a", 6, {name: pa.array([f"v{number}" for number in range(6)])})
    write(tmp_path / "b", "b", 6, {name: pa.array([*"uvwxyz"])})
    again(tmp_path / "out", tmp_path / "a")
    same(tmp_path / "out", tmp_path / "a")
    assert again(tmp_path / "out", tmp_path / "a").number == 1
    merged = again(tmp_path / "both", tmp_path / "a", tmp_path / "b")
    assert (merged.num_samples(), merged.quarantined, [*merged.splits]) == (12, 0, ["train"])
    write(tmp_path / "c", "c", 6, {name: pa.array(range(6))})
    with pytest.raises(DataError, match=f"the column {name!r} has values of type string in .*/a and int64 in .*/c"):
        again(tmp_path / "other", tmp_path / "a", tmp_path / "c")


def test_no_further_column_is_named_as_the_hash_of_the_source(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gives 'source_sha256' as further columns"):
        write(tmp_path / "a", "a", 6, {"source_sha256": pa.array([*"abcdef"])})


def test_arrays_keep_the_layout_by_which_they_are_read(tmp_path: Path) -> None:
    for number in range(3):
        path = tmp_path / f"arrays/{number}.npy"
        path.parent.mkdir(exist_ok=True)
        np.save(path, np.full((8, 8, 3), number, np.uint8))
    spec = FolderSpec(url=str(tmp_path / "arrays"), extensions=("npy",))
    shard_dataset(spec, str(tmp_path / "data"), shards=ShardSpec(layout="chw"))
    with pytest.raises(ConfigError, match=f"the arrays of {tmp_path}/data were written with shards.layout=chw, .*set shards.layout=chw"):
        again(tmp_path / "out", tmp_path / "data")
    again(tmp_path / "out", tmp_path / "data", layout="chw")
    same(tmp_path / "out", tmp_path / "data")


def test_options_of_a_recipe_change_what_is_stored_as_of_any_source(data: Path, tmp_path: Path) -> None:
    made = again(tmp_path / "out", data, resize=4)
    assert {*made.sample.shapes} == {"4x4x1/L"} and problems(tmp_path / "out") == ()
    index = open_dataset(str(tmp_path / "out")).index(made.shards[0])
    known = {key: row[3] for key, row in samples(open_dataset(str(data))).items()}
    assert index["source_sha256"].to_pylist() == [known[key] for key in index["key"].to_pylist()]
    assert again(tmp_path / "out", data, resize=4).number == 1
    again(tmp_path / "back", tmp_path / "out")
    same(tmp_path / "back", tmp_path / "out")


def test_bytes_are_read_some_at_a_time(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = DatasetSource(DatasetSpec(url=str(data)))
    listing = source.listing()
    usable = [name for name, bad in zip(listing.sources, listing.unusable or [], strict=True) if bad is None][::3]
    known = [source.read(name) for name in usable]
    for bound in ("WINDOW_BYTES", "WINDOW_SAMPLES", "MOST_PLACES"):
        with monkeypatch.context() as patched:
            patched.setattr(f"aecore.data.sources.dataset.{bound}", 1 if bound != "MOST_PLACES" else 8)
            other = DatasetSource(DatasetSpec(url=str(data)))
            read = other.prefetch(usable)
            assert [read(name) for name in usable] == known
            assert bound != "MOST_PLACES" or sum(map(len, other._known.values())) <= 8


def test_a_dataset_that_version_1_wrote_is_a_source(tmp_path: Path) -> None:
    url = shutil.copytree(Path(__file__).parents[2] / "fixtures/v1/dataset", tmp_path / "v1")
    made = again(tmp_path / "out", url)
    theirs, mine = (samples(open_dataset(str(place))) for place in (url, tmp_path / "out"))
    assert mine == theirs != {} and problems(tmp_path / "out") == ()
    assert made.content_sha256 is not None and made.quarantined == open_dataset(str(url)).manifest.quarantined
    assert compact_dataset(str(url), 0).parts == (), "nothing was ever removed there"


def test_a_dataset_is_opened_once_whatever_number_of_shards_it_has(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, open_one = list[str](), dataset_source.open_dataset

    def counted(url: str) -> Dataset:
        opened.append(url)
        return open_one(url)

    monkeypatch.setattr(dataset_source, "open_dataset", counted)
    again(tmp_path / "again", data)
    assert len(open_dataset(str(data)).manifest.shards) > 2 >= len(opened), "once to list it, once by the worker"
