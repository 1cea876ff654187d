"""Datasets that follow their source: after each run a dataset equals a fresh one of the source, and only what changed was read."""

import dataclasses
import io
import json
import logging
import os
import shutil
import signal
import tarfile
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar, Literal

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from aecore.artifact.fanout import serial
from aecore.data.dataset import Dataset, open_dataset
from aecore.data.format.record import encode_keys
from aecore.data.read.verify import verify_dataset
from aecore.data.removal import read_removed
from aecore.data.sources import Listing
from aecore.data.sources.arrays import ArraysSpec
from aecore.data.sources.folder import FolderSpec
from aecore.data.sources.webdataset import WebdatasetSpec
from aecore.data.write import reread
from aecore.data.write.job import adopt_shards, shard_dataset
from aecore.data.write.ledger import MOST_LISTINGS, read_ledger, read_listing
from aecore.data.write.plan import PlanSummary
from aecore.data.write.spec import ShardSpec
from aecore.data.write.splits import SplitSpec
from aecore.errors import ConfigError, DataError, RunFailed, StoreError
from aecore.registry import SOURCES, knob, spec
from aecore.store import _states
from tests.aecore.data.tiny import encoded, image

V1 = Path(__file__).parents[2] / "fixtures/v1"


def shard(source: Any, out: Path, splits: SplitSpec | None = None, **shards: Any) -> Any:
    return shard_dataset(source, str(out), splits, ShardSpec(**{"max_bad": 1.0, **shards}))


def put(root: Path, files: dict[str, bytes]) -> FolderSpec:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return FolderSpec(url=str(root))


def pictures(names: list[str], first: int = 0) -> dict[str, bytes]:
    return {name: encoded(image(number)) for number, name in enumerate(names, first)}


def committed(root: Path) -> dict[str, tuple[bytes, int]]:
    """Every committed file with its bytes and its inode."""
    files = [path for path in root.rglob("*") if path.is_file() and ".tmp" not in path.parts]
    return {path.relative_to(root).as_posix(): (path.read_bytes(), path.stat().st_ino) for path in files}


def facts(manifest: Any) -> dict[str, Any]:
    """What a dataset and a fresh one of the same samples have in common."""
    splits = {name: counts for name, counts in manifest.statistics.items() if counts.samples or counts.quarantined}
    return {
        "content": manifest.content_sha256,
        "splits": {name: (counts.samples, counts.quarantined, dict(counts.classes)) for name, counts in splits.items()},
        "extensions": {name: count for name, count in manifest.sample.extensions.items() if count},
        "shapes": {name: count for name, count in manifest.sample.shapes.items() if count},
        "reasons": {name: count for name, count in manifest.reasons.items() if count},
        "bags": sum(manifest.num_groups(name) for name in splits if name in manifest.splits),
    }


def rows_of(dataset: Dataset) -> dict[str, tuple[Any, ...]]:
    """What readers find of each key: split, label, bag, bytes; AssertionError if a key is there twice."""
    found: dict[str, tuple[Any, ...]] = {}
    for shard in dataset.manifest.shards:
        if shard.live:
            index, reader = dataset.index(shard), dataset.reader(shard)
            rows = np.flatnonzero(np.isin(reader.index["ordinal"].to_numpy(), index["ordinal"].to_numpy()))
            for row, data in zip(index.to_pylist(), reader.read_rows(rows), strict=True):
                assert row["key"] not in found
                found[row["key"]] = (shard.split, row["label_name"], row["group"], data)
            reader.close()
    return found


def reasons_of(dataset: Dataset) -> dict[str, str]:
    """The reason of each key that is removed."""
    tables = [read_removed(dataset.store, part) for part in dataset.manifest.parts]
    return {row["key"]: row["reason"] for table in tables if table is not None for row in table.to_pylist()}


def require_fresh(source: Any, out: Path, splits: SplitSpec | None = None, **shards: Any) -> Any:
    """Run, and compare the dataset with a fresh one of the same source, through its manifest and through its readers."""
    made = shard(source, out, splits, **shards)
    with tempfile.TemporaryDirectory() as folder:
        fresh = shard(source, Path(folder) / "out", splits, **{**shards, "checksum": False})
        assert facts(made) == facts(fresh)
        assert rows_of(open_dataset(str(out))) == rows_of(open_dataset(f"{folder}/out"))
    return made


def reasons(made: Any, out: Path) -> Counter[str]:
    return Counter(reasons_of(Dataset(open_dataset(str(out)).store, made)).values())


class Stated:
    """A source whose samples have the states that a test gives them, and which counts what is read."""

    files: ClassVar[dict[str, dict[str, tuple[str | None, bytes]]]] = {}
    read_names: ClassVar[list[str]] = []


@spec
class StatedSpec:
    """Samples of a test, in memory."""

    kind: Literal["stated"] = "stated"
    url: str = knob("", "name of the files", identity=False)
    name: str = knob("", "origin", identity=False, since=2)


@SOURCES.register(StatedSpec)
class StatedSource(Stated):
    """The samples of one name; their label is their folder."""

    def __init__(self, stated: StatedSpec) -> None:
        self._own, self._origin = self.files[stated.url.rpartition("/")[2]], stated.name or stated.url

    def listing(self) -> Listing:
        names = sorted(self._own)
        folders = [name.rpartition("/")[0] for name in names]
        sizes = np.array([len(self._own[name][1]) for name in names], np.int64)
        keys = encode_keys([name.rpartition(".")[0] for name in names])
        states = [self._own[name][0] for name in names]
        return Listing(keys, names, sizes, label_names=folders, splits=folders, states=states, origin=self._origin)

    def read(self, source: str) -> tuple[str, bytes]:
        self.read_names.append(source)
        return source.rpartition(".")[2], self._own[source][1]

    def read_states(self, sources: list[str]) -> list[str | None]:
        return [self._own[name][0] for name in sources]


@pytest.fixture
def stated():
    """A function that sets the files of a source and forgets what was read."""

    def put(files: dict[str, tuple[str | None, bytes]], name: str = "files") -> StatedSpec:
        Stated.files[name] = files
        Stated.read_names.clear()
        return StatedSpec(url=name)

    yield put
    Stated.files.clear()


class TestStates:
    def test_nothing_is_read_while_states_are_equal(self, tmp_path, stated):
        files = {name: ("1", data) for name, data in pictures(["a/0.png", "a/1.png", "b/2.png"]).items()}
        first = shard(stated(files), tmp_path / "out")
        assert shard(stated(files), tmp_path / "out") == first
        assert Stated.read_names == []

    def test_only_what_has_another_state_is_read_and_only_its_hash_decides(self, tmp_path, stated):
        pixels = pictures([f"a/{number}.png" for number in range(6)])
        source = stated({name: ("1", data) for name, data in pixels.items()})
        first = shard(source, tmp_path / "out")
        other = encoded(image(77))[: len(pixels["a/1.png"])].ljust(len(pixels["a/1.png"]), b"\0")
        touched = {**pixels, "a/1.png": other}
        source = stated({name: ("2" if name in ("a/1.png", "a/2.png") else "1", data) for name, data in touched.items()})
        made = shard(source, tmp_path / "out")
        assert sorted(Stated.read_names) == ["a/1.png", "a/1.png", "a/2.png"]  # compared, then written
        assert (made.number, made.num_samples()) == (first.number + 1, 6 if made.quarantined == 0 else 5)
        assert reasons(made, tmp_path / "out") == {"changed": 1}
        shard(stated(dict(Stated.files["files"])), tmp_path / "out")
        assert Stated.read_names == []  # the equal one has its new state

    def test_new_states_alone_are_a_generation_only_where_reading_again_costs_more(self, tmp_path, stated, monkeypatch):
        pixels = pictures([f"a/{number}.png" for number in range(4)])
        first = shard(stated({name: ("1", data) for name, data in pixels.items()}), tmp_path / "out")
        later = {name: ("2", data) for name, data in pixels.items()}
        assert shard(stated(later), tmp_path / "out") == first
        assert len(Stated.read_names) == 4
        assert "nothing new" in shard_dataset(stated(later), str(tmp_path / "out"), dry_run=True).notes
        monkeypatch.setattr(reread, "LITTLE_SAMPLES", 4)
        notes = shard_dataset(stated(later), str(tmp_path / "out"), dry_run=True).notes
        assert notes[-2:] == ("no new sample", "new times or addresses of 4 samples are recorded: their bytes are the same")
        made = shard(stated(later), tmp_path / "out")
        assert (made.number, made.dataset_sha256, made.content_sha256) == (2, first.dataset_sha256, first.content_sha256)
        assert made.shards == first.shards
        shard(stated(later), tmp_path / "out")
        assert Stated.read_names == []

    def test_unknown_states_are_read_by_each_run(self, tmp_path, stated):
        source = stated({name: (None, data) for name, data in pictures(["a/0.png", "a/1.png"]).items()})
        first = shard(source, tmp_path / "out")
        Stated.read_names.clear()
        assert shard(source, tmp_path / "out") == first
        assert Stated.read_names == ["a/0.png", "a/1.png"]

    def test_checksum_finds_what_no_state_shows(self, tmp_path, stated):
        pixels = {name: ("1", data) for name, data in pictures(["a/0.png", "a/1.png"]).items()}
        first = shard(stated(pixels), tmp_path / "out")
        pixels["a/1.png"] = ("1", encoded(image(1), "PNG")[:-1] + b"!")
        source = stated(pixels)
        assert shard(source, tmp_path / "out") == first
        made = shard(source, tmp_path / "out", checksum=True)
        assert (made.number, reasons(made, tmp_path / "out")) == (2, {"changed": 1})

    def test_a_bad_sample_is_tried_again_only_when_its_state_changed(self, tmp_path, stated):
        files = {name: ("1", data) for name, data in pictures(["a/0.png", "a/1.png"]).items()}
        good = files["a/1.png"][1]
        files["a/1.png"] = ("1", good[:20])
        first = shard(stated(files), tmp_path / "out")
        assert (first.num_samples(), first.quarantined) == (1, 1)
        assert open_dataset(str(tmp_path / "out")).quarantine()["key"].to_pylist() == ["a/1"]
        assert shard(stated(files), tmp_path / "out") == first
        assert Stated.read_names == []
        files["a/1.png"] = ("2", good[:20])  # touched, and as bad as before
        assert shard(stated(files), tmp_path / "out") == first
        files["a/1.png"] = ("3", good)
        made = shard(stated(files), tmp_path / "out")
        assert (made.num_samples(), made.quarantined, dict(made.reasons)) == (2, 0, dict.fromkeys(made.reasons, 0))
        assert reasons(made, tmp_path / "out") == {"retried": 1}
        assert len(open_dataset(str(tmp_path / "out")).quarantine()) == 0
        assert len(open_dataset(str(tmp_path / "out"), 1).quarantine()) == 1, "that generation had it"

    def test_many_listings_are_merged(self, tmp_path, stated):
        files: dict[str, tuple[str | None, bytes]] = {}
        for number in range(MOST_LISTINGS + 2):
            files[f"a/{number}.png"] = ("1", encoded(image(number)))
            if number == 5:
                del files["a/0.png"]
            made = shard(stated(files), tmp_path / "out")
            assert len(made.listings) == (number + 1 if number < MOST_LISTINGS else number - MOST_LISTINGS + 1)
        store = open_dataset(str(tmp_path / "out")).store
        assert len(read_listing(store, made.listings[0])) == MOST_LISTINGS
        ledger = read_ledger(store, made)
        assert sorted(ledger["source"].to_pylist()) == sorted(files)
        require_fresh(stated(files), tmp_path / "out")


class TestLabels:
    def test_a_picture_in_another_class_folder_is_there_once(self, tmp_path):
        source = put(tmp_path / "in", pictures([f"{name}/{number}.png" for name in "ab" for number in range(4)]))
        shard(source, tmp_path / "out")
        os.rename(tmp_path / "in/a/1.png", tmp_path / "in/b/1a.png")
        made = require_fresh(source, tmp_path / "out")
        assert {key: row[1] for key, row in rows_of(open_dataset(str(tmp_path / "out"))).items()}["b/1a"] == "b"
        assert reasons(made, tmp_path / "out") == {"gone": 1}

    def test_rows_of_an_array_get_their_new_labels_and_columns_and_others_stay(self, tmp_path):
        pixels, labels = np.random.default_rng(0).integers(0, 256, (8, 4, 4), np.uint8), np.array([0, 1] * 4)
        source, factor = ArraysSpec(url=str(tmp_path / "x.npz")), np.linspace(0, 1, 8)
        np.savez(tmp_path / "x.npz", x=pixels, y=labels, factor_size=factor)
        first = shard(source, tmp_path / "out")
        labels[3], factor[5] = 0, 9
        pixels[6] += 1
        np.savez(tmp_path / "x.npz", x=pixels, y=labels, factor_size=factor)
        made = require_fresh(source, tmp_path / "out")
        assert reasons(made, tmp_path / "out") == {"changed": 1, "relabelled": 2}
        assert made.shards[0].tar == first.shards[0].tar

    def test_a_split_that_a_column_names_is_followed(self, tmp_path):
        pixels, part = np.random.default_rng(0).integers(0, 256, (6, 4, 4), np.uint8), np.array([0, 0, 0, 0, 1, 1])
        source, splits = ArraysSpec(url=str(tmp_path / "x.npz"), factors=("part",)), SplitSpec(by="column", column="factor_part")
        np.savez(tmp_path / "x.npz", x=pixels, factor_part=part)
        shard(ArraysSpec(url=str(tmp_path / "x.npz")), tmp_path / "out", splits)
        part[0] = 1
        np.savez(tmp_path / "x.npz", x=pixels, factor_part=part)
        made = require_fresh(ArraysSpec(url=str(tmp_path / "x.npz")), tmp_path / "out", splits)
        assert reasons(made, tmp_path / "out") == {"moved": 1}
        assert {name: made.num_samples(name) for name in made.splits} == {"0": 3, "1": 3}
        del source

    def test_a_file_of_the_same_stem_gives_a_known_one_another_key(self, tmp_path):
        source = put(tmp_path / "in", pictures(["a/0.png", "a/1.png"]))
        shard(source, tmp_path / "out")
        (tmp_path / "in/a/0.jpg").write_bytes(encoded(image(5), "JPEG"))
        made = require_fresh(source, tmp_path / "out")
        assert reasons(made, tmp_path / "out") == {"moved": 1}

    def test_stratified_samples_keep_their_split(self, tmp_path):
        splits = SplitSpec(val=0.25, stratify=True)
        source = put(tmp_path / "in", pictures([f"{name}/{number}.png" for name in "ab" for number in range(8)]))
        shard(source, tmp_path / "out", splits)
        before = {key: row[0] for key, row in rows_of(open_dataset(str(tmp_path / "out"))).items()}
        put(tmp_path / "in", pictures(["a/0.png", "b/9.png"], 100))
        shard(source, tmp_path / "out", splits)
        after = {key: row[0] for key, row in rows_of(open_dataset(str(tmp_path / "out"))).items()}
        assert before.items() <= after.items() and len(after) == 17


class TestGone:
    def source(self, tmp_path: Path, counts: dict[str, int]) -> FolderSpec:
        return put(tmp_path / "in", pictures([f"{name}/{number}.png" for name, count in counts.items() for number in range(count)]))

    def test_few_are_free_and_a_larger_share_is_refused_with_names_and_knob(self, tmp_path):
        source = self.source(tmp_path, {"a": 20, "b": 20})
        shard(source, tmp_path / "out")
        for number in range(10):
            (tmp_path / f"in/a/{number}.png").unlink()
        assert shard(source, tmp_path / "out").num_samples() == 30
        for number in range(4):
            (tmp_path / f"in/b/{number}.png").unlink()
        assert shard(source, tmp_path / "out").num_samples() == 26
        for number in range(4, 15):
            (tmp_path / f"in/b/{number}.png").unlink()
        before = committed(tmp_path / "out")
        put(tmp_path / "in", pictures(["a/new.png"]))
        with pytest.raises(
            DataError, match=r"(?s)11 of 26 samples, more than shards.max_removed=0.1.*for example 'b/.*max_removed=0.424, or"
        ) as raised:
            shard(source, tmp_path / "out")
        assert raised.value.exit_code == 3
        assert committed(tmp_path / "out") == before
        assert require_fresh(source, tmp_path / "out", max_removed=0.424).num_samples() == 16

    @pytest.mark.parametrize(
        ("lost", "named"),
        [
            ("train/b", r"class 'b' and all samples of the folder 'train/b/'"),
            ("val", r"split 'val' and all samples of the folder 'val/' and all samples of the folder 'val/a/'"),
        ],
    )
    def test_whole_classes_folders_and_splits_are_refused(self, tmp_path, lost, named):
        source = self.source(tmp_path, {"train/a": 40, "train/b": 3, "val/a": 3})
        shard(source, tmp_path / "out")
        before = committed(tmp_path / "out")
        shutil.rmtree(tmp_path / "in" / lost)
        if lost == "val":  # else folders are no splits any more
            put(tmp_path / "in", pictures(["test/a/0.png"]))
        with pytest.raises(DataError, match=named):
            shard(source, tmp_path / "out")
        assert committed(tmp_path / "out") == before
        made = require_fresh(source, tmp_path / "out", max_removed=1.0)
        assert made.classes == ("a", "b")

    def test_what_is_gone_is_kept_if_that_was_asked_for(self, tmp_path):
        source = self.source(tmp_path, {"a": 4, "b": 4})
        first = shard(source, tmp_path / "out", removed="keep")
        shutil.rmtree(tmp_path / "in/b")
        (tmp_path / "in/a/0.png").write_bytes(encoded(image(50)))
        made = shard(source, tmp_path / "out")  # the choice stands in the manifest
        assert (first.removal, made.removal, made.num_samples()) == ("keep", "keep", 8)
        assert reasons(made, tmp_path / "out") == {"changed": 1}
        dropped = require_fresh(source, tmp_path / "out", removed="drop", max_removed=1.0)
        assert (dropped.removal, dropped.num_samples()) == ("drop", 4)

    def test_a_choice_alone_is_a_generation(self, tmp_path):
        source = self.source(tmp_path, {"a": 2})
        shard(source, tmp_path / "out")
        made = shard(source, tmp_path / "out", removed="keep")
        assert (made.number, made.removal) == (2, "keep")
        assert shard(source, tmp_path / "out") == made

    def test_what_comes_back_is_a_new_sample(self, tmp_path):
        source = self.source(tmp_path, {"a": 3})
        shard(source, tmp_path / "out")
        data = (tmp_path / "in/a/1.png").read_bytes()
        (tmp_path / "in/a/1.png").unlink()
        require_fresh(source, tmp_path / "out")
        (tmp_path / "in/a/1.png").write_bytes(data)
        made = require_fresh(source, tmp_path / "out")
        assert made.shards[-1].first_ordinal == 3

    def test_a_source_that_cannot_be_listed_removes_nothing(self, tmp_path):
        source = self.source(tmp_path, {"a": 3, "b": 3})
        shard(source, tmp_path / "out")
        before = committed(tmp_path / "out")
        shutil.rmtree(tmp_path / "in")
        with pytest.raises(DataError, match="does not exist"):
            shard(source, tmp_path / "out", max_removed=1.0)
        assert committed(tmp_path / "out") == before


class TestFilters:
    def test_samples_outside_a_narrower_filter_stay_until_that_is_accepted(self, tmp_path, caplog):
        root = tmp_path / "in"
        source = put(root, pictures([f"{name}/{number}.png" for name in "ab" for number in range(20)]))
        shard(source, tmp_path / "out")
        narrow = FolderSpec(url=str(root), include="a/*")
        before = committed(tmp_path / "out")
        with caplog.at_level(logging.WARNING):
            made = shard(narrow, tmp_path / "out")
        assert (made.number, made.num_samples()) == (1, 40)
        assert "20 samples are there that the filter of the source leaves out" in caplog.text and "accept_filter" in caplog.text
        assert committed(tmp_path / "out") == before
        (root / "a/0.png").unlink()  # this one is gone, the others are outside
        made = shard(narrow, tmp_path / "out")
        assert (made.num_samples(), "include" in made.identity["source"]) == (39, False)
        made = require_fresh(narrow, tmp_path / "out", accept_filter=True)
        assert (made.num_samples(), made.identity["source"]["include"]) == (19, ["a/*"])
        made = require_fresh(source, tmp_path / "out")  # a wider one needs nothing
        assert made.num_samples() == 39

    @pytest.mark.parametrize("options", [{"min_size": 90}, {"exclude": "b"}, {"extensions": ("jpg",)}, {"limit": 2}])
    def test_each_filter_is_known(self, tmp_path, options):
        files = pictures(["a/0.png", "b/1.png"]) | {"a/2.jpg": encoded(image(2), "JPEG"), "b/3.jpg": encoded(image(3), "JPEG")}
        source = put(tmp_path / "in", files)
        shard(source, tmp_path / "out")
        narrow = dataclasses.replace(source, **options)
        before = committed(tmp_path / "out")
        assert shard(narrow, tmp_path / "out").num_samples() == 4
        assert committed(tmp_path / "out") == before
        require_fresh(narrow, tmp_path / "out", accept_filter=True)

    def test_a_link_to_nothing_has_no_size_that_a_filter_leaves_out(self, tmp_path):
        source = dataclasses.replace(put(tmp_path / "in", pictures(["a/0.png", "b/1.png"])), follow_links=True)
        (tmp_path / "in/a/link.png").symlink_to("nothing")
        assert shard(source, tmp_path / "out").reasons == {"broken_link": 1}
        narrow = dataclasses.replace(source, min_size=10)
        assert require_fresh(narrow, tmp_path / "out").number == 1
        (tmp_path / "in/a/link.png").unlink()
        made = require_fresh(narrow, tmp_path / "out")
        assert (made.number, made.quarantined) == (2, 0)
        assert reasons(made, tmp_path / "out") == {"gone": 1}

    def test_other_settings_are_still_refused(self, tmp_path):
        source = put(tmp_path / "in", pictures(["a/0.png"]))
        shard(source, tmp_path / "out")
        with pytest.raises(ConfigError, match=r"source.label: there 'path', asked 'leaf'"):
            shard(dataclasses.replace(source, label="leaf", include="a/*"), tmp_path / "out")


class TestBags:
    def bags(self, root: Path, bags: dict[str, list[int]]) -> FolderSpec:
        for bag, numbers in bags.items():
            put(root, {f"{bag}/{number}.png": encoded(image(number)) for number in numbers})
        return FolderSpec(url=str(root), group="parent")

    def test_one_that_loses_members_keeps_the_rest(self, tmp_path):
        source = self.bags(tmp_path / "in", {"x/b1": [1, 2, 3], "x/b2": [4, 5]})
        first = shard(source, tmp_path / "out")
        (tmp_path / "in/x/b1/2.png").unlink()
        made = require_fresh(source, tmp_path / "out")
        assert [part.stem for part in made.shards] == [part.stem for part in first.shards]
        assert (made.num_groups("train"), reasons(made, tmp_path / "out")) == (2, {"gone": 1})

    def test_one_that_gains_or_changes_a_member_is_written_whole(self, tmp_path):
        source = self.bags(tmp_path / "in", {"x/b1": [1, 2, 3], "x/b2": [4, 5], "x/b3": [6]})
        shard(source, tmp_path / "out")
        put(tmp_path / "in", {"x/b1/9.png": encoded(image(9)), "x/b3/6.png": encoded(image(7))})
        made = require_fresh(source, tmp_path / "out")
        assert made.shards[-1].samples == 5
        assert reasons(made, tmp_path / "out") == {"changed": 4}
        assert rows_of(open_dataset(str(tmp_path / "out")))["x/b1/1"][2] == "x/b1"

    def test_an_instance_that_moves_leaves_one_bag_and_makes_the_other_new(self, tmp_path):
        source = self.bags(tmp_path / "in", {"x/b1": [1, 2, 3], "x/b2": [4, 5]})
        shard(source, tmp_path / "out")
        os.rename(tmp_path / "in/x/b1/3.png", tmp_path / "in/x/b2/3.png")
        require_fresh(source, tmp_path / "out")
        shutil.rmtree(tmp_path / "in/x/b2")
        made = require_fresh(source, tmp_path / "out", max_removed=1.0)
        assert made.num_groups("train") == 1

    def test_one_whose_members_are_kept_without_their_files_cannot_grow(self, tmp_path):
        source = self.bags(tmp_path / "in", {"x/b1": [1, 2, 3]})
        shard(source, tmp_path / "out", removed="keep")
        (tmp_path / "in/x/b1/2.png").unlink()
        shard(source, tmp_path / "out")
        before = committed(tmp_path / "out")
        put(tmp_path / "in", {"x/b1/9.png": encoded(image(9))})
        with pytest.raises(DataError, match=r"1 bag of .* gained or changed samples .*'x/b1/2.png' of 'x/b1'"):
            shard(source, tmp_path / "out")
        assert committed(tmp_path / "out") == before


class TestOrigins:
    def test_rows_of_another_origin_are_never_dropped(self, tmp_path):
        monday, tuesday = (put(tmp_path / day, pictures([f"{day}/{number}.png" for number in range(4)])) for day in ("monday", "tuesday"))
        shard(monday, tmp_path / "out")
        made = shard(tuesday, tmp_path / "out")
        assert (made.number, made.num_samples()) == (2, 8)
        (tmp_path / "monday/monday/0.png").unlink()
        assert shard(tuesday, tmp_path / "out") == made
        made = shard(monday, tmp_path / "out")
        assert (made.num_samples(), reasons(made, tmp_path / "out")) == (7, {"gone": 1})

    def test_keys_of_another_origin_are_refused_and_its_name_takes_them_over(self, tmp_path):
        files = pictures([f"a/{number}.png" for number in range(4)])
        here, there = put(tmp_path / "here", files), put(tmp_path / "there", files)
        shard(here, tmp_path / "out")
        before = committed(tmp_path / "out")
        with pytest.raises(DataError, match=rf"4 samples with the keys of this source .*set source.name={here.url}, which takes") as raised:
            shard(there, tmp_path / "out")
        assert raised.value.exit_code == 3
        assert committed(tmp_path / "out") == before
        (tmp_path / "there/a/0.png").unlink()
        made = require_fresh(dataclasses.replace(there, name=here.url), tmp_path / "out")
        assert made.num_samples() == 3


class TestVersion1:
    def copied(self, tmp_path: Path, name: str = "dataset") -> tuple[FolderSpec, Path]:
        for folder in (name, "images"):
            shutil.copytree(V1 / folder, tmp_path / folder)
        return FolderSpec(url=str(tmp_path / "images")), tmp_path / name

    def test_a_dataset_of_before_only_grows_until_a_run_says_otherwise(self, tmp_path):
        source, out = self.copied(tmp_path)
        spec = ShardSpec(**json.loads((out / "dataset.000002.json").read_text())["identity"]["shards"])
        path = next((tmp_path / "images").glob("train/cat/*.png"))
        path.write_bytes(encoded(image(3, side=9)))
        with pytest.raises(DataError, match="other sizes than when they were sharded"):
            shard_dataset(source, str(out), None, spec)
        before = committed(out)
        named = dataclasses.replace(source, name=recorded_url(out))
        made = shard_dataset(named, str(out), None, dataclasses.replace(spec, removed="drop", max_bad=1.0))
        assert made.removal == "drop" and reasons(made, out)["changed"] == 1
        assert {name: data for name, data in committed(out).items() if name in before} == before
        fresh = shard_dataset(named, str(tmp_path / "fresh"), None, dataclasses.replace(spec, max_bad=1.0))
        assert facts(made) == facts(fresh)
        assert verify_dataset(open_dataset(str(out)), read_data=True).problems == ()


def recorded_url(out: Path) -> str:
    return str(json.loads((out / "run.000001.json").read_text())["info"]["source"]["url"])


class TestAdopted:
    def tar(self, path: Path, members: dict[str, bytes]) -> None:
        path.parent.mkdir(exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))

    def adopt(self, root: Path, out: Path, **shards: Any) -> Any:
        return adopt_shards(WebdatasetSpec(url=str(root), keys="shard"), str(out), None, ShardSpec(max_bad=1.0, **shards))

    def require_fresh(self, tmp_path: Path, **shards: Any) -> Any:
        made, fresh = (self.adopt(tmp_path / "tars", tmp_path / out, **shards) for out in ("out", "fresh"))
        shutil.rmtree(tmp_path / "fresh")
        assert {**facts(made), "bytes": 0} == {**facts(fresh), "bytes": 0}
        return made

    def test_a_changed_tar_is_indexed_anew_as_a_whole_and_others_stay(self, tmp_path):
        for number in range(3):
            self.tar(tmp_path / f"tars/{number}.tar", pictures([f"{number}{each}.png" for each in "abc"], 10 * number))
        first = self.adopt(tmp_path / "tars", tmp_path / "out")
        self.tar(tmp_path / "tars/1.tar", pictures(["1a.png", "1c.png", "1d.png"], 40))
        made = self.require_fresh(tmp_path)
        assert [part.live for part in made.shards] == [3, 0, 3, 3]
        assert reasons(made, tmp_path / "out") == {"changed": 2, "gone": 1}
        assert made.shards[0] == first.shards[0]
        os.utime(tmp_path / "tars/0.tar")
        assert self.require_fresh(tmp_path) == made
        (tmp_path / "tars/2.tar").unlink()
        assert self.require_fresh(tmp_path).num_samples() == 6

    def test_a_tar_that_is_gone_cannot_be_kept(self, tmp_path):
        for number in range(3):
            self.tar(tmp_path / f"tars/{number}.tar", pictures([f"{number}{each}.png" for each in "abc"], 10 * number))
        self.adopt(tmp_path / "tars", tmp_path / "out", removed="keep")
        self.tar(tmp_path / "tars/0.tar", pictures(["0a.png"], 40))  # what is left of a tar can be kept
        made = self.adopt(tmp_path / "tars", tmp_path / "out")
        assert (made.removal, made.num_samples()) == ("keep", 7)
        (tmp_path / "tars/1.tar").unlink()
        before = committed(tmp_path / "out")
        with pytest.raises(DataError, match=r"1 tar that .* has adopted \('1.tar'\) is not there any more.*shards.removed=drop") as raised:
            self.adopt(tmp_path / "tars", tmp_path / "out")
        assert raised.value.exit_code == 3
        assert committed(tmp_path / "out") == before
        assert self.adopt(tmp_path / "tars", tmp_path / "out", removed="drop", max_removed=1.0).num_samples() == 4


class TestDryRun:
    def test_it_says_what_would_happen_with_examples_and_writes_nothing(self, tmp_path):
        names = [f"{name}/{number}.png" for name in "ab" for number in range(9)]
        source = put(tmp_path / "in", {**pictures(names), "a/bad.png": b"bad"})
        shard(source, tmp_path / "out")
        before = committed(tmp_path / "out")
        put(tmp_path / "in", {**pictures([f"b/new{number}.png" for number in range(7)], 40), "a/bad.png": encoded(image(60))})
        (tmp_path / "in/a/0.png").write_bytes(encoded(image(61)))
        (tmp_path / "in/a/1.png").unlink()
        summary = shard_dataset(source, str(tmp_path / "out"), None, ShardSpec(max_bad=1.0), dry_run=True)
        assert isinstance(summary, PlanSummary)
        assert {name: found["samples"] for name, found in summary.changes.items()} == {
            "added": 7,
            "changed": 1,
            "relabelled": 0,
            "removed": 1,
            "retried": 1,
        }
        assert summary.changes["added"]["examples"] == [f"b/new{number}.png" for number in range(5)]
        assert [summary.changes[name]["examples"] for name in ("changed", "removed", "retried")] == [
            ["a/0.png"],
            ["a/1.png"],
            ["a/bad.png"],
        ]
        assert (dict(summary.samples), summary.known) == ({"train": 9}, 16)
        assert committed(tmp_path / "out") == before


def changed_source(tmp_path: Path) -> FolderSpec:
    """A dataset of three shards and a quarantine at `first`, and a source in which something of each kind changed."""
    names = [f"{name}/{number}.png" for name in "ab" for number in range(5)]
    source = put(tmp_path / "in", {**pictures(names), "a/bad.png": b"bad", "b/bad.png": b"bad"})
    shard(source, tmp_path / "first", max_samples=5)
    put(tmp_path / "in", {"a/0.png": encoded(image(50)), "a/new.png": encoded(image(51)), "b/bad.png": encoded(image(52))})
    os.rename(tmp_path / "in/b/1.png", tmp_path / "in/a/moved.png")
    return source


@pytest.mark.usefixtures("settled")
class TestFaults:
    @pytest.fixture
    def settled(self, monkeypatch):
        monkeypatch.setattr("aecore.store._states.YOUNG_NS", 0)

    def test_killed_anywhere_the_same_command_ends_as_if_nothing_had_happened(self, tmp_path):
        source = changed_source(tmp_path)
        shutil.copytree(tmp_path / "first", tmp_path / "whole")
        expected = shard(source, tmp_path / "whole", max_samples=5)
        assert reasons(expected, tmp_path / "whole") == {"changed": 1, "gone": 1, "retried": 1}
        names = {name: data for name, (data, _) in committed(tmp_path / "whole").items() if not name.startswith(("records/", "report/"))}
        for fault in [
            f"{role}.{stage}" for role in ("run", "tar", "record", "removal", "listing", "manifest") for stage in ("synced", "linked")
        ]:
            out = tmp_path / fault
            shutil.copytree(tmp_path / "first", out)
            child = os.fork()
            if child == 0:
                os.environ["AECORE_FAULT"] = fault
                shard(source, out, max_samples=5)
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, fault
            assert open_dataset(str(out)).number == (2 if fault == "manifest.linked" else 1)
            assert shard(source, out, max_samples=5) == expected, fault
            assert {name: data for name, (data, _) in committed(out).items() if name in names} == names

    def test_of_two_commands_at_once_one_is_told_to_run_again(self, tmp_path):
        source = changed_source(tmp_path)

        def meanwhile(make_worker, tasks):
            (tmp_path / "in/a/2.png").unlink()  # it is not among the samples that are written
            shard(source, tmp_path / "first", max_samples=5)
            yield from serial(make_worker, tasks)

        with pytest.raises(RunFailed, match="another append was committed as dataset.000002.json"):
            shard_dataset(source, str(tmp_path / "first"), None, ShardSpec(max_bad=1.0, max_samples=5), fan_out=meanwhile)
        require_fresh(source, tmp_path / "first", max_samples=5)

    def test_a_file_that_changes_while_it_is_stored_is_read_by_the_next_run(self, tmp_path):
        source = put(tmp_path / "in", pictures(["a/0.png", "a/1.png"]))

        def writing(make_worker, tasks):
            put(tmp_path / "in", {"a/1.png": encoded(image(70))})
            yield from serial(make_worker, tasks)
            put(tmp_path / "in", {"a/0.png": encoded(image(71))})

        shard_dataset(source, str(tmp_path / "out"), fan_out=writing)
        require_fresh(source, tmp_path / "out")

    @pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
    def test_an_array_that_lost_rows_after_it_was_listed_is_an_error_of_its_storage_and_is_followed_by_the_next_run(self, tmp_path, save):
        source = ArraysSpec(url=str(tmp_path / "x.npz"))
        save(tmp_path / "x.npz", x=np.zeros((8, 4, 4), np.uint8))

        def shortening(make_worker, tasks):
            save(tmp_path / "x.npz", x=np.ones((5, 4, 4), np.uint8))
            yield from serial(make_worker, tasks)

        with pytest.raises(StoreError, match=r"x.npz.* has no row \d any more: .*run the same command again"):
            shard_dataset(source, str(tmp_path / "out"), fan_out=shortening)
        assert require_fresh(source, tmp_path / "out").num_samples() == 5


CLASSES = ("a", "b", "c")
NUMBERS = st.integers(0, 255)


class Histories(RuleBasedStateMachine):
    """A folder that lives, and a dataset of it: after each run the dataset equals a fresh one, and old files are as they were."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="aecore-living-"))
        self.source = put(self.root / "in", pictures([f"{name}/{number}.png" for name in CLASSES for number in range(3)]))
        self.splits = SplitSpec(val=0.3)
        self.steps: Counter[str] = Counter()
        self.pending = True

    @initialize(by=st.sampled_from(["hash", "none"]), bags=st.booleans(), resize=st.sampled_from([None, 3]), young=st.booleans())
    def begin(self, by: Any, bags: bool, resize: int | None, young: bool) -> None:
        _states.YOUNG_NS = 2 * 10**9 if young else 0  # else unchanged files are not read
        self.splits = SplitSpec(val=0.3) if by == "hash" else SplitSpec()
        self.source = dataclasses.replace(self.source, group=r"regex:^(\w)/" if bags else None)
        self.options = {"max_samples": 4, "max_removed": 1.0, "resize": resize}

    @property
    def files(self) -> list[Path]:
        return sorted(path for path in (self.root / "in").rglob("*") if path.is_file())

    def chosen(self, number: int) -> Path:
        return self.files[number % len(self.files)]

    @rule(number=NUMBERS, name=st.sampled_from(CLASSES))
    def add(self, number: int, name: str) -> None:
        put(self.root / "in", {f"{name}/new{number}.png": encoded(image(number))})

    @rule(number=NUMBERS, pixel=NUMBERS)
    def change_to_the_same_size(self, number: int, pixel: int) -> None:
        path = self.chosen(number)
        size, times = path.stat().st_size, (path.stat().st_atime_ns, path.stat().st_mtime_ns)
        data = encoded(image(1000 + pixel))
        path.write_bytes(data if len(data) == size else data[:size].ljust(size, b"\0"))
        os.utime(path, ns=times)

    @rule(number=NUMBERS, name=st.sampled_from(CLASSES))
    def relabel(self, number: int, name: str) -> None:
        path = self.chosen(number)
        target = self.root / "in" / name / path.name
        target.parent.mkdir(exist_ok=True)
        os.replace(path, target)

    @rule(number=NUMBERS)
    def rename(self, number: int) -> None:
        path = self.chosen(number)
        os.replace(path, path.with_name(f"renamed{number}.png"))

    @rule(number=NUMBERS)
    def delete(self, number: int) -> None:
        if len(self.files) > 1:
            self.chosen(number).unlink()

    @rule(number=NUMBERS)
    def damage(self, number: int) -> None:
        path = self.chosen(number)
        path.write_bytes(path.read_bytes()[:30])

    @rule(number=NUMBERS)
    def repair(self, number: int) -> None:
        for path in self.files:
            if path.stat().st_size <= 30:
                path.write_bytes(encoded(image(number)))
                return

    @rule(number=NUMBERS)
    def duplicate(self, number: int) -> None:
        path = self.chosen(number)
        shutil.copy(path, path.with_name(f"copy{number}.png"))

    @rule(number=NUMBERS)
    def touch(self, number: int) -> None:
        os.utime(self.chosen(number))

    @invariant()
    def the_dataset_equals_a_fresh_one(self) -> None:
        if not hasattr(self, "options") or all(path.stat().st_size <= 30 for path in self.files):
            return
        out = self.root / "out"
        before = committed(out) if out.exists() else {}
        require_fresh(self.source, out, self.splits, **self.options)
        after = committed(out)
        assert {name: after[name] for name in before} == before

    def teardown(self) -> None:
        if (self.root / "out").exists():
            assert verify_dataset(open_dataset(str(self.root / "out")), read_data=True).problems == ()
        shutil.rmtree(self.root)
        _states.YOUNG_NS = 2 * 10**9


def test_after_each_run_the_dataset_equals_a_fresh_one_whatever_happened_to_its_source():
    run_state_machine_as_test(
        Histories,
        settings=settings(max_examples=4, stateful_step_count=8, deadline=None, suppress_health_check=list(HealthCheck)),
    )
