"""Splits that keep the share of every class, and groups that no split cuts."""

import dataclasses
import os
import re
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from aecore.data.dataset import open_dataset
from aecore.data.manifest import DatasetManifest, SplitStatistics
from aecore.data.read.verify import verify_dataset
from aecore.data.sources import Listing
from aecore.data.sources.arrays import ArraysSpec
from aecore.data.sources.folder import FolderSpec
from aecore.data.sources.webdataset import WebdatasetSpec
from aecore.data.write.job import adopt_shards, shard_dataset
from aecore.data.write.plan import plan_dataset
from aecore.data.write.spec import ShardSpec
from aecore.data.write.splits import SplitSpec, assign_splits
from aecore.errors import ConfigError, DataError
from tests.aecore.data.test_external_tars import write_tar
from tests.aecore.data.test_labels import pictures, stored, tar_of
from tests.aecore.data.tiny import encoded, image

SHARES = st.sampled_from([(0.1, 0.0), (0.2, 0.1), (0.0, 0.25), (1 / 3, 1 / 3), (0.5, 0.49), (0.07, 0.03)])
COUNTS = st.dictionaries(st.sampled_from(["", "a", "b", "c", "d", "é"]), st.integers(1, 60), min_size=1)


def listing_of(counts: Mapping[str, int], prefix: str = "", groups: Sequence[str] | None = None) -> Listing:
    keys = [f"{prefix}{name}{number}" for name, count in counts.items() for number in range(count)]
    names = [name for name, count in counts.items() for _ in range(count)]
    return Listing(keys, keys, np.ones(len(keys), np.int64), label_names=names, groups=None if groups is None else list(groups))


def stratified(val: float, test: float, seed: int = 0) -> SplitSpec:
    return SplitSpec(by="hash", val=val, test=test, seed=seed, stratify=True)


def split_of_key(listing: Listing, splits: SplitSpec, parent: DatasetManifest | None = None) -> dict[str, str]:
    found = assign_splits(listing, splits, listing.label_names, parent)
    assert sum(map(len, found.values())) == len(listing)
    return {listing.keys[row]: split for split, rows in found.items() for row in rows.tolist()}


def counts_of(listing: Listing, split: Mapping[str, str], name: str) -> Counter[str]:
    assert listing.label_names is not None
    return Counter(label for key, label in zip(listing.keys, listing.label_names, strict=True) if split[key] == name)


@given(counts=COUNTS, shares=SHARES, seed=st.integers(0, 3))
def test_every_class_has_its_share_to_less_than_a_sample_and_the_whole_split_too(
    counts: dict[str, int], shares: tuple[float, float], seed: int
) -> None:
    listing = listing_of(counts)
    split = split_of_key(listing, stratified(*shares, seed))
    for name, share, most in zip(("val", "test"), shares, (0.5, 1), strict=True):
        found = counts_of(listing, split, name)
        assert all(abs(found[label] - share * count) < 1 for label, count in counts.items())
        assert abs(found.total() - share * len(listing)) <= most + 1e-6


@given(counts=COUNTS, shares=SHARES, data=st.data())
def test_stratified_splits_do_not_depend_on_the_order_of_the_listing(
    counts: dict[str, int], shares: tuple[float, float], data: st.DataObject
) -> None:
    listing = listing_of(counts)
    rows = np.array(data.draw(st.permutations(range(len(listing)))), np.int64)
    assert split_of_key(listing.take(rows), stratified(*shares)) == split_of_key(listing, stratified(*shares))


@given(counts=COUNTS, shares=SHARES, stratify=st.booleans(), data=st.data())
def test_no_group_is_ever_cut(counts: dict[str, int], shares: tuple[float, float], stratify: bool, data: st.DataObject) -> None:
    size = sum(counts.values())
    groups = data.draw(st.lists(st.sampled_from("pqrstuvw"), min_size=size, max_size=size))
    listing = listing_of(counts, groups=groups)
    splits = SplitSpec(by="hash", val=shares[0], test=shares[1], stratify=stratify and set(counts) != {""})
    plan = plan_dataset(listing, splits, ShardSpec(max_samples=3), None, 1, FolderSpec())
    place: dict[str, set[str]] = {}
    for task in plan.tasks:
        assert task.groups is not None
        for group in task.groups:
            place.setdefault(group, set()).add(task.stem)
        assert len(Counter(task.groups)) == 1 + sum(a != b for a, b in zip(task.groups, task.groups[1:], strict=False))  # adjacent
    assert all(len(stems) == 1 for stems in place.values())


@given(sizes=st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 6)), min_size=2, max_size=40), shares=SHARES)
def test_groups_of_one_class_give_it_its_share_to_half_a_group(sizes: list[tuple[str, int]], shares: tuple[float, float]) -> None:
    units = [(name, f"g{number}") for number, (name, size) in enumerate(sizes) for _ in range(size)]
    keys = [f"k{number}" for number in range(len(units))]
    groups = [group for _, group in units]
    listing = Listing(keys, keys, np.ones(len(keys), np.int64), label_names=[name for name, _ in units], groups=groups)
    split = split_of_key(listing, stratified(*shares))
    for name, share in zip(("val", "test"), shares, strict=True):
        for label, count in Counter(listing.label_names).items():
            assert abs(counts_of(listing, split, name)[label] - share * count) <= 1 + max(size for _, size in sizes)


@given(first=COUNTS, then=COUNTS, shares=SHARES)
def test_a_later_generation_completes_the_shares_of_the_classes(
    first: dict[str, int], then: dict[str, int], shares: tuple[float, float]
) -> None:
    spec, old, new = stratified(*shares), listing_of(first, "old"), listing_of(then, "new")
    before = split_of_key(old, spec)
    stored_counts = {name: counts_of(old, before, name) for name in ("train", "val", "test")}
    statistics = {
        name: SplitStatistics(found.total(), 0, 0, {k: v for k, v in found.items() if k}) for name, found in stored_counts.items()
    }
    parent = dataclasses.replace(EMPTY, statistics=statistics, splits=dict.fromkeys(statistics, ()))
    after = split_of_key(new, spec, parent)
    for name, share in zip(("val", "test"), shares, strict=True):
        found = counts_of(new, after, name)
        for label in then:
            total = first.get(label, 0) + then[label]
            wanted = min(max(share * total - stored_counts[name][label], 0), then[label])
            assert abs(found[label] - wanted) < 1.5  # test takes what val leaves


EMPTY = DatasetManifest(1, 0, None, None, {}, (), {}, (), (), None, {}, {}, "")  # type: ignore[arg-type]  # nothing of it is looked at


def shard(source: Any, out: Path, splits: SplitSpec) -> dict[str, str]:
    made = shard_dataset(source, str(out), splits)
    assert isinstance(made, DatasetManifest)
    return {key.partition("/")[2]: key.partition("/")[0] for key in stored(out)}


def test_a_dataset_keeps_its_shares_and_its_samples_their_split_when_it_grows(tmp_path: Path) -> None:
    """One in twenty of `rare` and of `common`: by the hash of the key alone, 5 rare ones seldom have any in val."""
    pictures(tmp_path / "in", *(f"{name}/{n}.png" for name, count in (("rare", 5), ("common", 40)) for n in range(count)))
    source, spec = FolderSpec(url=str(tmp_path / "in")), stratified(0.2, 0.0)
    first = shard(source, tmp_path / "out", spec)
    assert Counter(key.partition("/")[0] for key, split in first.items() if split == "val") == {"rare": 1, "common": 8}
    pictures(tmp_path / "in", *(f"{name}/more{n}.png" for name, count in (("rare", 5), ("common", 10), ("new", 10)) for n in range(count)))
    second = shard(source, tmp_path / "out", spec)
    assert {key: second[key] for key in first} == first
    assert Counter(key.partition("/")[0] for key, split in second.items() if split == "val") == {"rare": 2, "common": 10, "new": 2}
    assert open_dataset(str(tmp_path / "out")).manifest.identity["splits"]["stratify"] is True


def test_many_small_classes_have_the_share_of_the_whole(tmp_path: Path) -> None:
    listing = listing_of({f"class{number}": 2 for number in range(100)})
    assert counts_of(listing, split_of_key(listing, stratified(0.1, 0.1)), "val").total() == 20


def test_a_stratified_split_is_carved_out_of_the_train_folder(tmp_path: Path) -> None:
    pictures(tmp_path / "in", *(f"{split}/{name}/{n}.png" for split in ("train", "test") for name in "ab" for n in range(10)))
    found = shard(FolderSpec(url=str(tmp_path / "in")), tmp_path / "out", SplitSpec(val=0.3, stratify=True))
    assert Counter((split, key.split("/")[1]) for key, split in found.items() if split != "train") == {
        **{("val", name): 3 for name in "ab"},
        **{("test", name): 10 for name in "ab"},
    }


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"stratify": True}, ConfigError, "needs splits.val or splits.test above 0"),
        ({"by": "none", "stratify": True}, ConfigError, "needs splits.val or splits.test above 0"),
        ({"val": 0.5, "stratify": True}, ConfigError, "needs classes, and none of the 2 samples has a label"),
    ],
)
def test_what_cannot_be_stratified_is_refused(tmp_path: Path, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        shard(FolderSpec(url=str(pictures(tmp_path / "in", "1.png", "2.png"))), tmp_path / "out", SplitSpec(**options))
    assert not list((tmp_path / "out").glob("*.json"))


class TestGroupsByAnExpression:
    @settings(max_examples=15)
    @given(numbers=st.sets(st.tuples(st.integers(0, 9), st.integers(0, 3)), min_size=10), nested=st.booleans(), seed=st.integers(0, 5))
    def test_samples_with_one_prefix_stay_together(self, numbers: set[tuple[int, int]], nested: bool, seed: int) -> None:
        from aecore.data.sources._labels import by_rules

        keys = [f"{f'slides{tile % 2}/' if nested else ''}patient{patient}_tile{tile}.png" for patient, tile in sorted(numbers)]
        source = FolderSpec(group=r"regex:(patient\d+)_")
        listing = by_rules(source, Listing(keys, keys, np.ones(len(keys), np.int64)))
        assert listing.groups == [f"patient{patient}" for patient, _ in sorted(numbers)]
        split = split_of_key(listing, SplitSpec(by="hash", val=0.3, test=0.2, seed=seed))
        assert len({(key.rpartition("/")[2].partition("_")[0], name) for key, name in split.items()}) == len(set(listing.groups))

    def test_rows_of_arrays_are_grouped_by_their_keys(self, tmp_path: Path) -> None:
        (tmp_path / "in").mkdir()
        for name in ("p1_a", "p1_b", "p2_a", "p3_a", "p4_a"):
            np.save(tmp_path / f"in/{name}.npy", np.arange(48, dtype=np.uint8).reshape(3, 4, 4))
        found = shard(ArraysSpec(url=str(tmp_path / "in"), group=r"regex:^(p\d)"), tmp_path / "out", SplitSpec(by="hash", val=0.5))
        assert len({(key[:2], split) for key, split in found.items()}) == 4
        assert sum(open_dataset(str(tmp_path / "out")).manifest.num_groups(split) for split in set(found.values())) == 4

    @pytest.mark.parametrize("kind", ["folder", "webdataset"])
    def test_they_are_the_bags_of_a_dataset(self, tmp_path: Path, kind: str) -> None:
        names = [f"p{patient}_{tile}.png" for tile in range(3) for patient in range(20)]
        rule = r"regex:^(p\d+)_"
        if kind == "folder":
            source: Any = FolderSpec(url=str(pictures(tmp_path / "in", *names)), group=rule)
        else:
            source = WebdatasetSpec(url=str(tar_of(tmp_path / "a.tar", *names)), group=rule)
        found = shard(source, tmp_path / "out", SplitSpec(by="hash", val=0.3))
        assert len({(key.partition("_")[0], split) for key, split in found.items()}) == 20
        manifest = open_dataset(str(tmp_path / "out")).manifest
        assert manifest.num_groups("train") + manifest.num_groups("val") == 20

    def test_a_group_that_split_folders_would_cut_is_refused_by_its_name(self, tmp_path: Path) -> None:
        root = pictures(tmp_path / "in", "train/p1_0.png", "train/p2_0.png", "test/p2_1.png")
        with pytest.raises(DataError, match="group 'p2' are in the splits train and test, and splits.by=folders would cut it"):
            shard(FolderSpec(url=str(root), group=r"regex:(p\d)_"), tmp_path / "out", SplitSpec())
        assert not list((tmp_path / "out").glob("*.json"))

    def test_a_sample_without_a_group_is_quarantined_and_counts_as_a_bad_one(self, tmp_path: Path) -> None:
        root = pictures(tmp_path / "in", "p1_0.png", "x.png")
        with pytest.raises(DataError, match=r"no_group.*finds no group in 'x.png'"):
            shard(FolderSpec(url=str(root), group=r"regex:(p\d)_"), tmp_path / "out", SplitSpec())

    def test_adopted_tars_keep_their_order_so_groups_must_be_whole_in_it(self, tmp_path: Path) -> None:
        tar_of(tmp_path / "whole.tar", "p1_0.png", "p1_1.png", "p2_0.png")
        tar_of(tmp_path / "mixed.tar", "p1_0.png", "p2_0.png", "p1_1.png")
        rule = r"regex:^(p\d)_"
        made = adopt_shards(WebdatasetSpec(url=str(tmp_path / "whole.tar"), group=rule), str(tmp_path / "out"))
        assert isinstance(made, DatasetManifest) and made.num_groups("train") == 2
        tar_of(tmp_path / "two/a.tar", "p2_0.png", "p1_0.png")
        tar_of(tmp_path / "two/b.tar", "p1_1.png")
        for tars in ("mixed.tar", "two"):
            with pytest.raises(DataError, match="the group 'p1' are not next to each other in one tar"):
                adopt_shards(WebdatasetSpec(url=str(tmp_path / tars), group=rule), str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("folders", "warned"),
    [(("train_set", "val_set"), True), (("TRAIN", "eval"), True), (("test_tube", "cat"), False), (("cat", "dog"), False)],
)
def test_folders_that_only_sound_like_splits_are_classes_and_said_to_be(
    tmp_path: Path, folders: tuple[str, str], warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    found = shard(FolderSpec(url=str(pictures(tmp_path / "in", *(f"{name}/1.png" for name in folders)))), tmp_path / "out", SplitSpec())
    assert set(found.values()) == {"train"}
    assert ("are named like splits" in caplog.text) == warned


def test_a_column_that_is_named_is_what_auto_chooses() -> None:
    columns = {"part": np.array(["train", "val", "train"], dtype=object)}
    listing = Listing(["a", "b", "c"], ["a", "b", "c"], np.ones(3, np.int64), columns=columns)
    plan = plan_dataset(listing, SplitSpec(column="part"), ShardSpec(), None, 1, FolderSpec())
    assert plan.splits.by == "column" and plan.notes[0] == "splits.by=column: train 2, val 1"


def test_a_sample_whose_column_names_no_split_is_quarantined(tmp_path: Path) -> None:
    """One value refused the whole source, and what was missing became a split called None."""
    fields = [b'{"part":"train"}', b'{"part":"val"}', b'{"part":null}', b"{}", b'{"part":"a b"}', b'{"part":""}', '{"part":"é"}'.encode()]
    members = [
        (f"{number}.{ext}", data) for number, field in enumerate(fields) for ext, data in (("png", encoded(image(number))), ("json", field))
    ]
    write_tar(tmp_path / "in/a.tar", members)
    spec, splits = WebdatasetSpec(url=str(tmp_path / "in"), columns=("part",)), SplitSpec(by="column", column="part")
    made = shard_dataset(spec, str(tmp_path / "out"), splits, shards=ShardSpec(max_bad=0.8))
    assert isinstance(made, DatasetManifest)
    assert (list(made.splits), made.reasons) == (["train", "val"], {"no_split": 5})
    again = shard_dataset(spec, str(tmp_path / "out"), splits, shards=ShardSpec(max_bad=0.8))
    assert isinstance(again, DatasetManifest) and again.number == 1


def test_a_folder_that_can_name_no_split_is_quarantined_among_others(tmp_path: Path) -> None:
    root = pictures(tmp_path / "in", "train/a/1.png", "val/a/1.png", "my split/a/1.png", os.fsdecode(b"\xff/a/1.png"))
    made = shard_dataset(FolderSpec(url=str(root)), str(tmp_path / "out"), SplitSpec(by="folders"), shards=ShardSpec(max_bad=0.6))
    assert isinstance(made, DatasetManifest)
    assert (list(made.splits), made.num_samples(), made.quarantined) == (["train", "val"], 2, 2)


def test_a_bag_whose_folder_is_no_text_ends_without_a_traceback(tmp_path: Path) -> None:
    root = pictures(tmp_path / "in", "p1/1.png", "p1/2.png", os.fsdecode(b"p\xff/1.png"))
    spec = FolderSpec(url=str(root), group="parent", label="none")
    made = shard_dataset(spec, str(tmp_path / "out"), SplitSpec(by="none"), shards=ShardSpec(max_bad=0.6))
    assert isinstance(made, DatasetManifest)
    assert (made.num_samples(), made.num_groups("train")) == (3, 2)


def animations(root: Path, names: Sequence[str], frames: int = 4) -> None:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pages = [Image.fromarray(np.full((4, 4), 8 * number + page, np.uint8)) for page in range(frames)]
        pages[0].save(root / name, save_all=True, append_images=pages[1:])


def splits_of_files(url: str) -> dict[str, set[str]]:
    """Return the splits of the frames of each file, as the indexes say."""
    dataset, found = open_dataset(url), dict[str, set[str]]()
    assert not verify_dataset(dataset, read_data=True).problems
    for shard in dataset.manifest.shards:
        for source in pq.read_table(f"{url}/{shard.index.name}")["source"].to_pylist():
            found.setdefault(re.sub("#[0-9]{9}$", "", source), set()).add(shard.split)
    return found


@pytest.mark.parametrize("stratify", [False, True])
@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_pages_of_one_file_stay_in_one_split(tmp_path: Path, kind: str, stratify: bool) -> None:
    names = [f"{label}/{number:02}.tif" for label in "ab" for number in range(15)]
    animations(tmp_path / "in", names)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in names:
            tar.add(tmp_path / "in" / name, name)
    folder = FolderSpec(url=str(tmp_path / "in"), frames="all")
    source = folder if kind == "folder" else WebdatasetSpec(url=str(tmp_path / "a.tar"), frames="all", label="path")
    made = shard_dataset(source, str(tmp_path / "out"), SplitSpec(val=0.3, stratify=stratify))
    found = splits_of_files(str(tmp_path / "out"))
    assert len(found) == 30 and all(len(splits) == 1 for splits in found.values())
    assert {split for splits in found.values() for split in splits} == {"train", "val"}
    assert made.identity["splits"]["files"] == "whole"
    assert sum(statistics.samples for statistics in made.statistics.values()) == 120


def test_a_dataset_that_was_begun_without_the_rule_goes_on_as_it_began(tmp_path: Path) -> None:
    names = [f"{number:02}.tif" for number in range(12)]
    animations(tmp_path / "in", names)
    source, splits = FolderSpec(url=str(tmp_path / "in"), frames="all"), SplitSpec(val=0.3)
    made = shard_dataset(source, str(tmp_path / "out"), dataclasses.replace(splits, files="cut"))
    assert "files" not in made.identity["splits"], "as older versions wrote it"
    animations(tmp_path / "in", [*names, *(f"new{number:02}.tif" for number in range(12))])
    assert shard_dataset(source, str(tmp_path / "out"), splits).number == 2
    found = splits_of_files(str(tmp_path / "out"))
    assert any(len(splits) == 2 for name, splits in found.items() if name.startswith("new")), "each frame has its own hash"
    with pytest.raises(ConfigError, match=r"splits.files"):
        shard_dataset(source, str(tmp_path / "out"), dataclasses.replace(splits, files="whole"))


@pytest.mark.parametrize("frames", ["first", "all"])
def test_the_identity_of_a_dataset_without_frames_has_no_rule_for_them(tmp_path: Path, frames: str) -> None:
    animations(tmp_path / "in", [f"{number:02}.tif" for number in range(12)])
    made = shard_dataset(FolderSpec(url=str(tmp_path / "in"), frames=frames), str(tmp_path / "out"), SplitSpec(val=0.3))  # type: ignore[arg-type]
    assert ("files" in made.identity["splits"]) == (frames == "all")
    animations(tmp_path / "in", [f"{number:02}.tif" for number in range(12, 24)])
    assert shard_dataset(FolderSpec(url=str(tmp_path / "in"), frames=frames), str(tmp_path / "out"), SplitSpec(val=0.3)).number == 2  # type: ignore[arg-type]
