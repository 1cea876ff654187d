"""Bags: sources that name them, shards that keep them whole, batches that take them whole, the same ones on any number of ranks."""

import dataclasses
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aecore.data.dataset import Dataset, open_dataset
from aecore.data.format.decode import Reading
from aecore.data.format.transform import Transform, TransformSpec
from aecore.data.manifest import DatasetManifest
from aecore.data.read.bags import BagLoader, Bags
from aecore.data.read.loader import InputSpec
from aecore.data.read.order import TrainingOrder
from aecore.data.read.rows import SplitRows
from aecore.data.sources.arrays import ArraysSource, ArraysSpec
from aecore.data.sources.folder import FolderSource, FolderSpec
from aecore.data.write.job import shard_dataset
from aecore.data.write.spec import ShardSpec
from aecore.data.write.splits import SplitSpec
from aecore.errors import DataError
from tests.aecore.data.bag_data import DIM, bag_dataset, bag_sizes, write_npz
from tests.aecore.data.before import grows_only
from tests.aecore.data.tiny import encoded, image

NUM_BAGS = 40
SIZES = bag_sizes(NUM_BAGS)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    return bag_dataset(tmp_path_factory.mktemp("bags"), NUM_BAGS)


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """Instance -> bag, by the row in the file."""
    with np.load(write_npz(tmp_path_factory.mktemp("truth") / "raw.npz", NUM_BAGS)) as arrays:
        return arrays["bags"]


def loader(dataset: Dataset, rank: int = 0, world_size: int = 1, **options) -> BagLoader:
    spec = options.pop("spec", InputSpec())
    order = TrainingOrder(**{"lanes": 4, "block": 4, "global_batch": 8, "seed": 5, "rank": rank, "world_size": world_size, **options})
    return BagLoader(dataset, "train", transform=TransformSpec(), order=order, spec=spec)


def instances(batch) -> torch.Tensor:
    """The rows of the file that a batch holds, bag by bag."""
    return (batch.x[batch.mask][:, 0] * 100).round().long()


def index_of(dataset: Dataset, split: str = "train"):
    for shard in dataset.manifest.split(split):
        yield shard, pq.read_table(f"{dataset.url}/{shard.index.name}")


# ---------------------------------------------------------------------------------------------------------------------- shards


def test_a_bag_is_one_piece_of_one_shard_and_the_manifest_counts_bags(dataset, truth):
    seen = Counter()
    assert len(dataset.manifest.split("train")) > 3
    for shard, index in index_of(dataset):
        groups = index["group"].to_pylist()
        runs = [name for at, name in enumerate(groups) if at == 0 or groups[at - 1] != name]
        assert len(runs) == len(set(runs)) == shard.groups
        seen.update(groups)
    assert seen == Counter(f"raw/{bag}" for bag in truth)
    assert dataset.manifest.num_groups("train") == NUM_BAGS
    assert DatasetManifest.from_json(dataset.manifest.to_json()) == dataset.manifest


def test_data_without_bags_has_none_and_its_manifest_does_not_speak_of_them(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((5, 3), np.float32))
    manifest = shard_dataset(ArraysSpec(url=str(tmp_path / "a.npy")), str(tmp_path / "data"))
    assert manifest.num_groups("train") == 0
    assert "groups" not in manifest.to_json()["shards"][0]


def test_bags_stay_whole_over_splits(tmp_path):
    made = bag_dataset(tmp_path, val=0.3).manifest
    homes = {
        split: {name for _, index in index_of(open_dataset(str(tmp_path / "data")), split) for name in index["group"].to_pylist()}
        for split in made.splits
    }
    assert homes["train"].isdisjoint(homes["val"])
    assert (made.num_groups("train"), made.num_groups("val")) == (len(homes["train"]), len(homes["val"]))
    assert len(homes["val"]) > 4


def test_a_damaged_instance_leaves_a_smaller_bag(tmp_path):
    for number in range(6):
        path = tmp_path / "raw" / f"b{number // 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(image(number)) if number != 1 else b"damaged")
    source = FolderSpec(url=str(tmp_path / "raw"), group="parent")
    shard_dataset(source, str(tmp_path / "data"), SplitSpec(by="none"), ShardSpec(max_bad=0.5))
    bags = Bags(SplitRows(open_dataset(str(tmp_path / "data")), "train", Reading()))
    assert sorted(bags.sizes.tolist()) == [2, 3]


# --------------------------------------------------------------------------------------------------------------------- sources


def test_arrays_name_their_bags_with_the_file_before_them(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((3, 2)), slide=np.array(["s1", "s2", "s1"]))
    np.savez(tmp_path / "b.npz", x=np.zeros((2, 2)), slide=np.array(["s1", "s3"]))
    listing = ArraysSource(ArraysSpec(url=str(tmp_path), group="slide")).listing()
    assert listing.groups == ["a/s1", "a/s2", "a/s1", "b/s1", "b/s3"]
    assert ArraysSource(ArraysSpec(url=str(tmp_path), images="x")).listing().groups is None


def test_arrays_of_splits_have_bags_of_their_own(tmp_path):
    arrays = {"x_train": np.zeros((3, 2)), "x_test": np.zeros((2, 2)), "bag_train": np.array([0, 0, 1]), "bag_test": np.array([0, 1])}
    np.savez(tmp_path / "a.npz", **arrays)
    listing = ArraysSource(ArraysSpec(url=str(tmp_path / "a.npz"), images="x_train", group="bag_train")).listing()
    assert dict(zip(listing.groups, listing.splits, strict=True)) == {
        "a/x_train/0": "train",
        "a/x_train/1": "train",
        "a/x_test/0": "test",
        "a/x_test/1": "test",
    }


def test_wrong_arrays_of_bags_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((3, 2)), bags=np.zeros(2))
    with pytest.raises(DataError, match="a.npz has no array 'bag' .did you mean 'bags'.*set source.group to one of these"):
        ArraysSource(ArraysSpec(url=str(tmp_path / "a.npz"), images="x", group="bag")).listing()
    with pytest.raises(DataError, match="array 'bags'. has 2 rows, x has 3"):
        ArraysSource(ArraysSpec(url=str(tmp_path / "a.npz"), group="bags")).listing()
    np.save(tmp_path / "b.npy", np.zeros((3, 2)))
    np.savez(tmp_path / "a.npz", x=np.zeros((3, 2)), bags=np.zeros(3))
    with pytest.raises(DataError, match="source.group=bags names an array of an .npz, b.npy is none"):
        ArraysSource(ArraysSpec(url=str(tmp_path), group="bags")).listing()


def test_a_folder_is_a_bag_and_the_folders_above_it_its_label(tmp_path):
    for path in ("train/tumour/slide1/a.png", "train/tumour/slide1/b.png", "train/normal/slide2/a.png", "test/tumour/slide3/a.png"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(encoded(image(len(path))))
    source = FolderSpec(url=str(tmp_path), group="parent")
    listing = FolderSource(source).listing()
    assert listing.groups == ["test/tumour/slide3", "train/normal/slide2", "train/tumour/slide1", "train/tumour/slide1"]
    manifest = shard_dataset(source, str(tmp_path / "out"))
    assert manifest.classes == ("normal", "tumour")
    assert {split: manifest.num_groups(split) for split in manifest.splits} == {"train": 2, "test": 1}


def test_a_file_that_lies_in_no_folder_has_no_bag(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(image(1)))
    with pytest.raises(DataError, match="a.png is in no folder, and source.group=parent takes the folder of a file as its bag"):
        FolderSource(FolderSpec(url=str(tmp_path), group="parent")).listing()


def test_new_bags_are_appended_and_a_bag_of_a_dataset_that_only_grows_does_not(tmp_path):
    raw, out = tmp_path / "raw", str(tmp_path / "data")

    def add(*paths: str) -> DatasetManifest:
        for path in paths:
            (raw / path).parent.mkdir(parents=True, exist_ok=True)
            (raw / path).write_bytes(encoded(image(len(list(raw.rglob("*.png"))))))
        return shard_dataset(FolderSpec(url=str(raw), group="parent"), out, SplitSpec(by="none"), ShardSpec())

    assert add("b1/1.png", "b1/2.png", "b2/1.png").num_groups("train") == 2
    appended = add("b3/1.png", "b3/2.png")
    assert (appended.number, appended.num_groups("train")) == (2, 3)
    shutil.rmtree(out)
    assert add("b3/3.png").number == 1
    grows_only(out)
    with pytest.raises(
        DataError, match="1 new sample belongs to bags that .* has already, for example 'b1/3.png' to 'b1'. A bag cannot grow"
    ):
        add("b1/3.png")  # it grows in a dataset that follows its source: see test_living


# --------------------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("spec", [InputSpec(), InputSpec(cache="none", prefetch=0)], ids=["ram", "disk"])
def test_an_epoch_has_every_instance_once_in_whole_bags(dataset, truth, spec):
    source, seen = loader(dataset, spec=spec), list[int]()
    assert source.steps_per_epoch == NUM_BAGS // 8
    for batch in source.batches(0, source.steps_per_epoch):
        assert batch.mask.shape == batch.x.shape[:2] == batch.label.shape
        assert len(batch) == 8
        assert batch.mask.any(0).all(), "no wider than the longest bag"
        for x, label, mask in zip(batch.x, batch.label, batch.mask, strict=True):
            rows = (x[mask][:, 0] * 100).round().long().numpy()
            (bag,) = set(truth[rows].tolist())
            assert len(rows) == SIZES[bag]
            assert (label[mask] == bag % 2).all()
            assert (label[~mask] == -1).all()
            assert not x[~mask].any()
            seen += rows.tolist()
        assert batch.num_global == len(batch.positions) == len(batch.ordinals) == int(batch.mask.sum())
        assert batch.positions.tolist() == list(range(batch.num_global))
    assert sorted(seen) == list(range(len(truth)))


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_together_see_the_batches_of_one_rank(dataset, world_size):
    whole = list(loader(dataset).batches(0, 8))
    parts = [list(loader(dataset, rank, world_size).batches(0, 8)) for rank in range(world_size)]
    for step, batch in enumerate(whole):
        ranks = [part[step] for part in parts]
        places = torch.cat([part.positions for part in ranks])
        assert sorted(places.tolist()) == list(range(batch.num_global))
        for of in (instances, lambda part: part.ordinals, lambda part: part.label[part.mask]):
            assert torch.equal(torch.cat([of(part) for part in ranks])[places.argsort()], of(batch))
        assert {part.num_global for part in ranks} == {batch.num_global}


def test_batches_continue_at_any_step_and_differ_between_epochs(dataset):
    ordinals = [batch.ordinals.tolist() for batch in loader(dataset).batches(0, 12)]
    for start in (0, 3, 5, 7, 12):
        assert [batch.ordinals.tolist() for batch in loader(dataset).batches(start, 12)] == ordinals[start:]
    assert ordinals[0] != ordinals[5]


def test_a_rank_without_a_bag_gets_one_instance_of_no_weight(tmp_path):
    dataset = bag_dataset(tmp_path, 5)
    ranks = [list(loader(dataset, rank, 4, global_batch=4).batches(0, 2)) for rank in range(4)]
    idle = [rank[1] for rank in ranks if not len(rank[1].positions)]
    assert len(idle) == 3
    for batch in idle:
        assert (batch.x.shape, batch.mask.tolist(), len(batch.ordinals)) == ((1, 1, DIM), [[True]], 0)
    assert {rank[1].num_global for rank in ranks} == {sum(len(rank[1].positions) for rank in ranks)}
    assert len(torch.cat([batch.ordinals for rank in ranks for batch in rank]).unique()) == bag_sizes(5).sum()


def test_black_and_white_pixels_are_drawn_by_instance_the_same_on_any_number_of_ranks(tmp_path):
    dataset, transform = bag_dataset(tmp_path, 9, images=True), Transform(TransformSpec(binarize="dynamic"))

    def drawn(rank: int, world_size: int):
        for step, batch in enumerate(loader(dataset, rank, world_size, global_batch=4).batches(0, 3)):
            found = transform.draw(batch, 3, step)
            assert found.x.dtype == torch.bool
            assert not found.x[~batch.mask].any()
            yield dict(zip(batch.ordinals.tolist(), found.x[batch.mask], strict=True)) if len(batch.positions) else {}

    whole, first, second = (list(drawn(*of)) for of in ((0, 1), (0, 2), (1, 2)))
    for step, expected in enumerate(whole):
        parts = first[step] | second[step]
        assert parts.keys() == expected.keys()
        assert all(torch.equal(parts[ordinal], pixels) for ordinal, pixels in expected.items())
    assert 0.3 < torch.cat([pixels.float().flatten() for pixels in whole[0].values()]).mean() < 0.7


def test_bags_of_images_are_channels_first(tmp_path):
    dataset = bag_dataset(tmp_path, 9, images=True)
    batch = next(loader(dataset, global_batch=8).batches())
    assert batch.x.dtype == torch.uint8
    assert batch.x.shape == (8, batch.mask.shape[1], 1, 4, 5)
    rows = batch.x[batch.mask][:, 0, 0, 0].long() + 256 * batch.x[batch.mask][:, 0, 0, 1]
    with np.load(tmp_path / "raw.npz") as arrays:
        assert np.array_equal(batch.x[batch.mask][:, 0].numpy(), arrays["x"][rows.numpy()])


@settings(max_examples=25)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.data())
def test_positions_of_all_ranks_number_the_instances_whatever_the_order(dataset, lanes, rows, block, data):
    world_size = data.draw(st.integers(1, lanes))
    options = {"lanes": lanes, "global_batch": lanes * rows, "block": block}
    parts = [list(loader(dataset, rank, world_size, **options).batches(0, 4)) for rank in range(world_size)]
    for step in range(4):
        positions = torch.cat([part[step].positions for part in parts])
        assert sorted(positions.tolist()) == list(range(parts[0][step].num_global))


def test_a_bag_in_two_places_is_refused(dataset):
    split = SplitRows(dataset, "train", Reading("imagecodecs"))
    again = dataclasses.replace(dataset.manifest, splits={"train": (split.shards[0], *split.shards)})
    with pytest.raises(DataError, match=r"bag 'raw/\d+' of shard train-000000 is stored in two pieces"):
        Bags(SplitRows(Dataset(dataset.store, again), "train", Reading()))


def test_bags_of_sequences_of_different_lengths_are_refused(tmp_path):
    arrays = {"x": np.zeros((4, 5, 2), np.float32), "steps": np.array([5, 3, 2, 5]), "bags": np.array([0, 0, 1, 1])}
    np.savez(tmp_path / "a.npz", **arrays)
    source = ArraysSpec(url=str(tmp_path / "a.npz"), images="x", group="bags", lengths="steps")
    shard_dataset(source, str(tmp_path / "data"))
    with pytest.raises(DataError, match="the instances of bags are sequences of different lengths, expected one shape"):
        loader(open_dataset(str(tmp_path / "data")))


def test_the_notes_say_how_large_bags_are(dataset):
    assert loader(dataset).bags.notes == (f"a step takes whole bags: 40 bags of 1 to 7 instances, {SIZES.mean():.1f} on average",)


def test_nothing_is_read_before_the_first_batch(tmp_path):
    dataset = bag_dataset(tmp_path, 5)
    for path in Path(tmp_path, "data/shards").iterdir():
        path.unlink()
    assert loader(dataset, global_batch=4).steps_per_epoch == 2


def test_any_rank_reads_the_whole_batch_of_a_step_again(dataset: Dataset) -> None:
    (expected,) = loader(dataset).batches(2, 3)
    source = loader(dataset, 1, 3)
    batch, rows = source.reread(3)
    assert rows is source.rows
    assert torch.equal(batch.ordinals, expected.ordinals)
    assert torch.equal(batch.x, expected.x)
