import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aecore.data.manifest import DatasetManifest, SampleInfo, ShardRef, in_order
from aecore.data.sources import Listing
from aecore.data.write.plan import plan_dataset
from aecore.data.write.spec import ShardSpec
from aecore.data.write.splits import SplitSpec, assign_splits, resolve_splits, split_warnings
from aecore.errors import ConfigError, DataError
from aecore.store import FileRef

FILE = FileRef("f", 1, "0" * 64)


def listing_of(paths, sizes=None, groups=None, **columns):
    """A listing as source `folder` makes it, of paths without extension."""
    folders = [path.rpartition("/")[0] for path in paths]
    sizes = np.array([10] * len(paths) if sizes is None else sizes, dtype=np.int64)
    columns = {name: np.array(values) for name, values in columns.items()}
    return Listing(list(paths), [f"{path}.png" for path in paths], sizes, folders, [f.partition("/")[0] for f in folders], groups, columns)


def plain(num, **options):
    return listing_of([f"a/{number:05d}" for number in range(num)], **options)


def plan(listing, splits=None, parent=None, claim=1, **shards):
    return plan_dataset(listing, splits or SplitSpec(), ShardSpec(**shards), parent, claim, None)


def by_split(made):
    return {
        split: [key for task in made.tasks if task.split == split for key in task.keys] for split in {task.split for task in made.tasks}
    }


def parent_with(planned, classes=()):
    shards = [ShardRef(split, f"{split}-000000", num, num, 0, FILE, FILE, "c") for split, num in planned.items()]
    return DatasetManifest(1, 0, None, None, {}, classes, in_order(shards), (), (FILE,), SampleInfo({}, {}), {}, {}, "d")


samples = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 4)), min_size=1, max_size=80)  # size in bytes, group


@pytest.mark.parametrize("name", ["label", "sha256", "ordinal", "members", "group"])
def test_a_source_cannot_replace_a_column_that_every_index_has(name):
    with pytest.raises(DataError, match=f"'{name}' as further columns.*label_names"):
        plan(dataclasses.replace(plain(3), columns={name: np.array([1, 2, 3])}))
    assert len(plan(plain(3, factor_label=[1, 2, 3])).tasks) == 1


@given(samples, st.integers(1, 12), st.integers(1, 120), st.booleans(), st.booleans(), st.integers(0, 3), st.sampled_from([0.0, 0.3]))
def test_every_sample_is_planned_once_and_the_limits_hold(rows, max_samples, max_bytes, shuffle, grouped, seed, val):
    groups = [f"bag {group}" for _, group in rows] if grouped else None
    listing = plain(len(rows), sizes=[size for size, _ in rows], groups=groups)
    made = plan(listing, SplitSpec(val=val), max_samples=max_samples, max_bytes=max_bytes, shuffle=shuffle, seed=seed)
    assert sorted(key for task in made.tasks for key in task.keys) == listing.keys
    size_of = dict(zip(listing.keys, listing.sizes.tolist(), strict=True))
    for split in {task.split for task in made.tasks}:
        tasks = [task for task in made.tasks if task.split == split]
        np.testing.assert_array_equal(np.concatenate([task.ordinals for task in tasks]), np.arange(sum(map(len, tasks))))
        for task, following in zip(tasks, [*tasks[1:], None], strict=True):
            unit_limit = len(set(task.groups)) == 1 if grouped else len(task) == 1
            assert unit_limit or (len(task) <= max_samples and sum(size_of[key] for key in task.keys) <= max_bytes)
            if following is not None and not grouped:  # full: the next sample would not have fitted
                next_size = size_of[following.keys[0]]
                assert len(task) == max_samples or sum(size_of[key] for key in task.keys) + next_size > max_bytes
    if grouped:
        for group in set(groups):
            homes = [(number, row) for number, task in enumerate(made.tasks) for row, name in enumerate(task.groups) if name == group]
            assert len({number for number, _ in homes}) == 1
            assert [row for _, row in homes] == list(range(homes[0][1], homes[0][1] + len(homes)))


@given(st.permutations(range(30)), st.integers(0, 5))
def test_the_shuffled_plan_does_not_depend_on_the_order_of_the_listing(order, seed):
    listing = plain(30)
    expected = plan(listing, SplitSpec(val=0.2, test=0.2, seed=seed), max_samples=7, seed=seed)
    made = plan(listing.take(np.array(order)), SplitSpec(val=0.2, test=0.2, seed=seed), max_samples=7, seed=seed)
    assert [(task.stem, task.keys, task.sources, task.labels.tolist()) for task in made.tasks] == [
        (task.stem, task.keys, task.sources, task.labels.tolist()) for task in expected.tasks
    ]


def test_shuffle_mixes_the_classes_and_the_seed_changes_it():
    listing = listing_of([f"{label}/{number:03d}" for label in "ab" for number in range(200)])
    first, other = plan(listing).tasks[0], plan(listing, seed=1).tasks[0]
    assert 60 < sum(key.startswith("a") for key in first.keys[:200]) < 140
    assert first.keys != other.keys
    assert plan(listing, shuffle=False).tasks[0].keys == listing.keys


def test_columns_labels_and_sources_stay_with_their_key():
    listing = listing_of([f"{number % 3}/{number}" for number in range(40)], factor=list(range(40)))
    made = plan(listing, max_samples=6)
    assert made.classes == ("0", "1", "2")
    for task in made.tasks:
        for row, key in enumerate(task.keys):
            number = int(key.split("/")[1])
            assert task.columns["factor"][row] == number
            assert task.sources[row] == f"{key}.png"
            assert (task.label_names[row], task.labels[row]) == (str(number % 3), number % 3)


def test_stems_carry_the_claim():
    assert [task.stem for task in plan(plain(3), max_samples=2).tasks] == ["train-000000", "train-000001"]
    assert [task.stem for task in plan(plain(3), max_samples=2, claim=12).tasks] == ["train-g000012-000000", "train-g000012-000001"]


def test_an_append_continues_ordinals_and_adds_classes_at_the_end():
    parent = parent_with({"train": 7, "test": 2}, classes=("m", "b"))
    made = plan(listing_of(["train/z/1", "train/a/2", "train/b/3", "test/b/4"]), parent=parent, claim=2)
    assert made.classes == ("m", "b", "a", "z")
    assert {task.split: task.ordinals.tolist() for task in made.tasks} == {"train": [7, 8, 9], "test": [2]}
    labels = {key: int(label) for task in made.tasks for key, label in zip(task.keys, task.labels, strict=True)}
    assert labels == {"train/z/1": 3, "train/a/2": 2, "train/b/3": 1, "test/b/4": 1}


def test_auto_takes_split_folders_and_labels_below_them():
    made = plan(listing_of(["train/Greek/c1/1", "train/x/2", "val/x/3", "test/x/4"]))
    assert made.splits.by == "folders"
    assert by_split(made) == {"train": made.tasks[0].keys, "val": ["val/x/3"], "test": ["test/x/4"]}
    assert [task.split for task in made.tasks] == ["train", "val", "test"]
    assert made.classes == ("Greek/c1", "x")
    assert made.notes[0] == "splits.by=folders: train 2, val 1, test 1"


@pytest.mark.parametrize(
    ("folder", "split"),
    [
        *((name, "train") for name in ("train", "training", "TRAIN", "Training")),
        *((name, "val") for name in ("val", "valid", "validation", "dev", "Valid", "VAL", "Dev")),
        *((name, "test") for name in ("test", "testing", "t10k", "Test", "T10K")),
    ],
)
def test_split_folders_by_any_usual_name_are_stored_under_one(folder, split):
    made = plan(listing_of([f"{folder}/cat/1", f"{folder}/dog/2"]))
    assert made.splits.by == "folders"
    assert {name: sorted(keys) for name, keys in by_split(made).items()} == {split: [f"{folder}/cat/1", f"{folder}/dog/2"]}
    assert made.classes == ("cat", "dog")


def test_two_folders_of_one_split_are_one_split_and_keep_their_keys_apart():
    paths = ["train/a/1", "Train/a/1", "val/a/1", "valid/a/1", "test/a/1", "Test/a/1", "t10k/a/1"]
    assert {name: sorted(keys) for name, keys in by_split(plan(listing_of(paths))).items()} == {
        "train": ["Train/a/1", "train/a/1"],
        "val": ["val/a/1", "valid/a/1"],
        "test": ["Test/a/1", "t10k/a/1", "test/a/1"],
    }


@pytest.mark.parametrize("by", ["auto", "folders"])
def test_a_file_beside_the_split_folders_changes_nothing_and_goes_to_train_without_a_class(by):
    listing = listing_of(["train/a/1", "valid/a/2", "montage"])
    made = plan(listing, SplitSpec(by=by))
    assert {name: sorted(keys) for name, keys in by_split(made).items()} == {"train": ["montage", "train/a/1"], "val": ["valid/a/2"]}
    assert made.classes == ("a",)
    (warning,) = split_warnings(listing, made.splits)
    assert "1 sample is in no split folder and goes to train (montage.png)" in warning


@pytest.mark.parametrize(
    ("paths", "named"),
    [
        (["train/a/1", "extra/a/2"], "train"),
        (["data/train/a/1", "data/Valid/a/2"], "Valid, train"),
        (["cat/train/1", "cat/test/2"], "test, train"),
        (["train/a/1", "train2/a/2", "t10k/3"], "t10k, train"),
    ],
)
@pytest.mark.parametrize(("val", "by"), [(0.0, "none"), (0.2, "hash")])
def test_folders_named_like_splits_that_are_not_taken_for_splits_are_warned_of(paths, named, val, by):
    listing = listing_of(paths)
    chosen = resolve_splits(listing, SplitSpec(val=val))
    assert chosen.by == by
    (warning,) = split_warnings(listing, chosen)
    assert f"named like splits ({named}) and splits.by={by} was chosen" in warning


def test_classes_alone_are_not_warned_of():
    listing = listing_of(["cat/1", "dog/2", "3"])
    assert split_warnings(listing, resolve_splits(listing, SplitSpec())) == []


def test_a_dataset_keeps_the_choice_that_it_recorded():
    listing = listing_of(["train/a/1", "valid/a/2"])
    asked = SplitSpec()
    assert resolve_splits(listing, asked, {"by": "none"}).by == "none"
    assert resolve_splits(listing, asked, {"by": "folders"}).by == "folders"
    assert resolve_splits(listing, SplitSpec(val=0.1), {"by": "hash"}).by == "hash"
    assert resolve_splits(listing, SplitSpec(by="folders"), {"by": "none"}).by == "folders"  # asked for: the difference is shown
    grown = listing_of(["train/a/1", "owl/2"])
    assert resolve_splits(grown, asked, {"by": "folders"}).by == "none"  # an owl is no split: the difference is shown


def test_a_split_that_a_dataset_has_under_the_name_of_its_folder_keeps_that_name():
    parent = parent_with({"train": 1, "valid": 1})
    made = plan(listing_of(["train/a/1", "valid/a/2", "Dev/a/3"]), SplitSpec(by="folders"), parent=parent)
    assert by_split(made) == {"train": ["train/a/1"], "valid": ["valid/a/2"], "val": ["Dev/a/3"]}
    assert resolve_splits(listing_of(["train/a/1", "odd/a/2"]), SplitSpec(), {"by": "folders"}, ("train", "odd")).by == "folders"


@pytest.mark.parametrize("paths", [["train/a/1", "other/2"], ["cat/1", "dog/2"]])
def test_auto_is_none_if_any_top_folder_is_no_split(paths):
    made = plan(listing_of(paths))
    assert made.splits.by == "none"
    assert sorted(by_split(made)["train"]) == sorted(paths)
    assert made.classes == tuple(sorted({path.rpartition("/")[0] for path in paths} - {""}))


def test_auto_with_fractions_is_hash_without_split_folders():
    assert resolve_splits(plain(3), SplitSpec(val=0.5)).by == "hash"
    assert resolve_splits(listing_of(["train/1"]), SplitSpec(val=0.5)).by == "folders"


def test_samples_without_a_class_folder_have_label_minus_one_or_no_labels_at_all():
    mixed = plan(listing_of(["train/1", "train/x/2"]), shuffle=False).tasks[0]
    assert (mixed.labels.tolist(), mixed.label_names) == ([-1, 0], ["", "x"])
    plain_task = plan(listing_of(["train/1", "train/2"])).tasks[0]
    assert plain_task.labels is None
    assert plain_task.label_names is None


def test_a_validation_split_is_carved_out_of_the_train_folder_only():
    listing = listing_of([f"{split}/a/{number}" for split, num in (("train", 2000), ("test", 300)) for number in range(num)])
    rows = assign_splits(listing, resolve_splits(listing, SplitSpec(val=0.1)))
    assert list(rows) == ["train", "val", "test"]
    assert 150 < len(rows["val"]) < 250
    assert all(listing.splits[row] == "train" for row in rows["val"])
    assert all(listing.splits[row] == "test" for row in rows["test"])
    assert len(rows["test"]) == 300


def test_carving_a_test_split_leaves_the_own_val_folder_alone():
    listing = listing_of([f"{split}/{number}" for split in ("train", "val") for number in range(100)])
    rows = assign_splits(listing, SplitSpec(by="folders", test=0.3))
    assert len(rows["val"]) == 100
    assert 10 < len(rows["test"]) < 60


def test_a_split_that_the_source_has_is_not_carved_too():
    with pytest.raises(ConfigError, match=r"its own split 'val' \(1 samples\): set splits\.val=0"):
        plan(listing_of(["train/1", "val/2"]), SplitSpec(val=0.5))


def test_hash_shares_are_right_and_do_not_move_when_the_data_grows():
    small, large = plain(3000), plain(6000)
    spec = SplitSpec(by="hash", val=0.2, test=0.1)
    first, second = (
        {name: {listing.keys[row] for row in rows} for name, rows in assign_splits(listing, spec).items()} for listing in (small, large)
    )
    assert abs(len(first["val"]) / 3000 - 0.2) < 0.03
    assert abs(len(first["test"]) / 3000 - 0.1) < 0.03
    assert all(first[name] <= second[name] for name in first)
    other = assign_splits(small, dataclasses.replace(spec, seed=1))
    assert {small.keys[row] for row in other["val"]} != first["val"]


def test_hash_keeps_groups_together():
    listing = plain(300, groups=[f"g{number // 10}" for number in range(300)])
    rows = assign_splits(listing, SplitSpec(by="hash", val=0.5))
    assert not {listing.groups[row] for row in rows["train"]} & {listing.groups[row] for row in rows["val"]}
    assert len(rows["val"]) % 10 == 0
    assert 0 < len(rows["val"]) < 300


def test_splits_by_column():
    listing = plain(4, part=["train", "dev", "dev", "train"])
    assert {name: rows.tolist() for name, rows in assign_splits(listing, SplitSpec(by="column", column="part")).items()} == {
        "train": [0, 3],
        "dev": [1, 2],
    }
    with pytest.raises(ConfigError, match=r"'prt' is no column of the source \(did you mean 'part'"):
        plan(listing, SplitSpec(by="column", column="prt"))


def test_a_folder_that_cannot_name_a_split_is_a_data_error():
    with pytest.raises(DataError, match="the top folder 'my data' of 'my data/1.png' cannot name a split"):
        plan(listing_of(["my data/1"]), SplitSpec(by="folders"))
    with pytest.raises(DataError, match="the top folder ''"):
        plan(listing_of(["1"]), SplitSpec(by="folders"))
    with pytest.raises(ConfigError, match="no folders"):
        plan(dataclasses.replace(plain(2), splits=None), SplitSpec(by="folders"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val": 0.5, "test": 0.5}, "expected < 1"),
        ({"by": "hash"}, "needs splits.val or splits.test"),
        ({"by": "none", "val": 0.1}, "by=hash to use"),
        ({"by": "column"}, "both by=column and a column"),
        ({"by": "none", "column": "x"}, "both by=column and a column"),
        ({"by": "folder"}, "did you mean 'folders'"),
        ({"val": -0.1}, ">= 0"),
    ],
)
def test_impossible_splits_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        SplitSpec(**options)


def test_one_key_twice_names_both_sources_also_across_splits():
    listing = dataclasses.replace(listing_of(["train/a/1", "test/a/1"]), keys=["a/1", "a/1"])
    with pytest.raises(DataError, match=r"'train/a/1.png' and 'test/a/1.png' have one key 'a/1'"):
        plan(listing)


def test_the_summary_counts_what_will_be_written():
    summary = plan(listing_of(["train/a/1", "train/a/2", "test/b/3"]), max_samples=1).summary(known=4)
    assert summary.samples == {"train": 2, "test": 1}
    assert summary.shards == {"train": 2, "test": 1}
    assert (summary.bytes, summary.known, summary.classes) == (30, 4, ("a", "b"))


def test_a_large_plan_is_fast_enough():
    made = plan(plain(50_000), SplitSpec(val=0.1))
    assert sum(map(len, made.tasks)) == 50_000


@pytest.mark.parametrize(
    ("paths", "splits", "advised", "not_advised"),
    [
        (["data/train/a/1", "data/cat/2"], None, "files of their own that are named by it", "splits.by=folders"),
        (["data/train/a/1", "data/cat/2"], ["data", "data"], "give the folder that holds nothing but", "splits.by=folders into"),
        (["train_set/1", "val_set/2"], ["train_set", "val_set"], "rename them to train, val", "splits.by=folders"),
        (["train/a/1", "cat/2"], ["train", "cat"], "set splits.by=folders into a new dataset", "named by it"),
    ],
)
def test_advice_about_folders_named_like_splits_is_what_the_source_takes(paths, splits, advised, not_advised):
    listing = dataclasses.replace(listing_of(paths), splits=splits)
    (warning,) = split_warnings(listing, SplitSpec(by="none"))
    assert advised in warning and not_advised not in warning


def test_a_loose_sample_is_named_by_its_path_in_the_tar():
    paths = ["data/train/1.png", "data/x#1.png"]
    listing = dataclasses.replace(listing_of(["train/1", "x#1"]), sources=["a.tar#0", "a.tar#1"], paths=paths)
    (warning,) = split_warnings(listing, SplitSpec(by="folders"))
    assert "1 sample is in no split folder and goes to train (data/x#1.png): move them" in warning
    (warning,) = split_warnings(dataclasses.replace(listing, paths=None, sources=["train/1.png", "x#1.png"]), SplitSpec(by="folders"))
    assert "(x#1.png)" in warning


def test_thousands_of_folders_are_a_count_and_examples():
    listing = listing_of([f"{split}_{number}/1" for split in ("train", "val") for number in range(1500)])
    (warning,) = split_warnings(listing, SplitSpec(by="none"))
    assert "(train_0, train_1, train_10 and 2997 more)" in warning
    assert "and 2980 more" in plan(listing, SplitSpec(by="folders")).notes[0]
