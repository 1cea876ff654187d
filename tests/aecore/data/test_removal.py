"""Readers of a dataset from which samples were removed: each reads the live samples, each once, by whatever way it reads."""

import json
import random
from collections import Counter
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aecore.data.dataset import Dataset, open_dataset
from aecore.data.format.index import content_sha256, table_bytes
from aecore.data.format.transform import TransformSpec
from aecore.data.manifest import read_manifest
from aecore.data.read.bags import BagLoader
from aecore.data.read.loader import InputSpec, Loader
from aecore.data.read.order import TrainingOrder
from aecore.data.read.pairs import PairSpec
from aecore.data.read.webdataset import as_webdataset
from aecore.data.sources.folder import FolderSpec
from aecore.data.sources.sprites import SpritesSpec
from aecore.data.write.job import shard_dataset
from aecore.data.write.manifest_build import Living, next_manifest
from aecore.data.write.spec import ShardSpec
from aecore.data.write.splits import SplitSpec
from aecore.errors import DataError
from aecore.store import FileRef, canonical_json, sha256_file
from tests.aecore.data.bag_data import bag_dataset
from tests.aecore.data.removals import live_content, live_keys, remove
from tests.aecore.data.tiny import encoded, image
from tests.documents import content, rewrite

NUM = 40  # of images in the folder; every fifth is a test sample, numbers 12 to 15 are broken


def shard(source: Path, out: Path) -> Dataset:
    shard_dataset(FolderSpec(url=str(source)), str(out), SplitSpec(by="folders"), ShardSpec(max_samples=4, shuffle=False, max_bad=0.5))
    return open_dataset(str(out))


def write_folder(folder: Path, numbers: range) -> Path:
    for number in numbers:
        path = folder / ("test" if number % 5 == 4 else "train") / "abc"[number % 3] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"broken" if 12 <= number < 16 else encoded(image(number)))
    return folder


def made(folder: Path) -> Path:
    """Two generations: 3 broken samples of train, of which one part has no other, and one of test."""
    shard(write_folder(folder / "in", range(NUM)), folder / "data")
    shard(write_folder(folder / "in", range(NUM, NUM + 10)), folder / "data")
    return folder / "data"


@pytest.fixture
def url(tmp_path: Path) -> Path:
    return made(tmp_path)


def key_of(number: int) -> str:
    return f"{'test' if number % 5 == 4 else 'train'}/{'abc'[number % 3]}/{number:03d}"


def number_of(key: str) -> int:
    return int(key[-3:])


def some(dataset: Dataset, share: float, seed: int) -> list[str]:
    """Choose live keys of the split train, all of its second shard among them."""
    first, second = live_keys(dataset), dataset.index(dataset.manifest.split("train")[1])["key"].to_pylist()
    return [key for key in first if key in second or random.Random(f"{key}{seed}").random() < share]


def seen_in_order(dataset: Dataset, split: str = "train") -> list[int]:
    """Return the numbers of all samples, read by their pixels."""
    with Loader(dataset, split) as loader, closing(loader.range_batches(0, loader.num_samples, 7)) as batches:
        return [int(row[0, 0, 0]) for batch in batches for row in batch.x]


@pytest.mark.parametrize("cache", ["none", "ram"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_the_loader_reads_live_samples_only_and_of_a_generation_before_all(url: Path, share: float, cache: str) -> None:
    before = open_dataset(str(url))
    gone = some(before, share, 1)
    after = remove(url, gone)
    assert seen_in_order(after) == [number_of(key) for key in live_keys(before) if key not in gone]
    assert seen_in_order(open_dataset(str(url), 2)) == [number_of(key) for key in live_keys(before)]
    assert seen_in_order(after, "test") == seen_in_order(before, "test")
    numbers = []
    for rank in range(3):
        order = TrainingOrder(lanes=4, block=3, global_batch=8, seed=2, rank=rank, world_size=3)
        with Loader(after, "train", order=order, spec=InputSpec(cache=cache)) as loader:
            for epoch in range(2):
                steps = epoch * loader.steps_per_epoch, (epoch + 1) * loader.steps_per_epoch
                for batch in loader.batches(*steps):
                    found = batch.x[:, 0, 0, 0].tolist()[: len(batch.ordinals)]
                    assert [number % 3 for number in found] == batch.label.tolist()[: len(found)]  # type: ignore[union-attr]
                    numbers += [(epoch, int(number)) for number in found]
    assert sorted(numbers) == sorted((epoch, number_of(key)) for epoch in range(2) for key in live_keys(after))


@pytest.mark.parametrize("again", [False, True])
def test_all_counts_of_the_manifest_are_of_live_samples(url: Path, again: bool) -> None:
    gone = some(open_dataset(str(url)), 0.4, 2)
    bad = [key_of(number) for number in (12, 14)]
    if again:  # by two generations: the second file holds what the first one held
        remove(url, [*gone[1::2], bad[0]])
        dataset = remove(url, [*gone[::2], bad[1]])
    else:
        dataset = remove(url, [*gone, *bad])
    manifest = dataset.manifest
    live = {split: live_keys(dataset, split) for split in ("train", "test")}
    assert manifest.num_samples() == sum(map(len, live.values())) == NUM + 10 - 4 - len(gone)
    assert manifest.quarantined == sum(manifest.reasons.values()) == 2
    assert {split: counts.quarantined for split, counts in manifest.statistics.items()} == {"train": 2, "test": 0}
    for split, keys in live.items():
        counts = manifest.statistics[split]
        assert (manifest.num_samples(split), dataset.num_samples(split), counts.samples) == (len(keys), len(keys), len(keys))
        assert dict(counts.classes) == dict(Counter(key.split("/")[1] for key in keys))
    assert dict(manifest.sample.shapes) == {"4x4x1/L": manifest.num_samples()}
    assert dict(manifest.sample.extensions) == {"png": manifest.num_samples()}
    assert manifest.num_planned("train") + manifest.num_planned("test") == NUM + 10, "ordinals are never used again"
    assert manifest.content_sha256 == live_content(dataset)


def test_training_keys_cover_what_is_removed_of_their_split_and_of_no_other(url: Path) -> None:
    before = open_dataset(str(url))
    keys = {split: before.training_key(split) for split in ("train", "test")}
    first = remove(url, [live_keys(before)[0]])
    assert first.training_key("train") != keys["train"]
    assert first.training_key("test") == keys["test"]
    assert open_dataset(str(url), 2).training_key("train") == keys["train"]
    second = remove(url, [live_keys(first)[0]])
    assert len({before.dataset_sha256, first.dataset_sha256, second.dataset_sha256}) == 3


def test_the_ways_around_the_loader_give_live_samples_only(url: Path) -> None:
    before = open_dataset(str(url))
    dataset = remove(url, some(before, 0.5, 3))
    assert [sample["__key__"] for sample in as_webdataset(str(url))] == live_keys(dataset)
    assert [int(sample["png"][0, 0, 0]) for sample in as_webdataset(str(url))] == [number_of(key) for key in live_keys(dataset)]
    assert [sample["__key__"] for sample in as_webdataset(str(url), number=2)] == live_keys(before)
    shards = dataset.manifest.split("train")
    assert [key for shard in shards for key in dataset.index(shard)["key"].to_pylist()] == live_keys(dataset)
    with Loader(dataset, "train") as loader:
        for shard in shards:
            keys = loader.index(shard)["key"].to_pylist()
            found = [(batch.batch.x[:, 0, 0, 0].tolist(), batch.rows.tolist(), batch.bad) for batch in loader.shard_batches(shard, 3)]
            assert [int(number) for numbers, _, _ in found for number in numbers] == [number_of(key) for key in keys]
            assert [row for _, rows, _ in found for row in rows] == list(range(shard.live))
            assert not any(bad for _, _, bad in found)


def test_partners_are_live(tmp_path: Path) -> None:
    shard_dataset(SpritesSpec(positions=2), str(tmp_path / "data"), SplitSpec(by="none"), ShardSpec(max_samples=20))
    before = open_dataset(str(tmp_path / "data"))
    rng = random.Random(4)
    dataset = remove(tmp_path / "data", rng.sample(live_keys(before), before.num_samples("train") // 2))
    order = TrainingOrder(lanes=4, block=8, global_batch=8, seed=1)
    with Loader(dataset, "train") as plain, closing(plain.range_batches(0, plain.num_samples, 16)) as batches:
        live = {row.numpy().tobytes() for batch in batches for row in batch.x}
    with Loader(dataset, "train", order=order, pairs=PairSpec()) as loader:
        seen = 0
        for batch in loader.batches(0, loader.steps_per_epoch):
            assert batch.x_pair is not None
            assert all(row.numpy().tobytes() in live for row in batch.x_pair)
            seen += len(batch.ordinals)
    assert seen == dataset.num_samples("train") == len(live_keys(dataset))


def test_bags_keep_their_live_instances_and_go_with_the_last_one(tmp_path: Path) -> None:
    before = bag_dataset(tmp_path, 24, max_samples=12)
    bags: dict[str, list[str]] = {}
    for shard in before.manifest.split("train"):
        for row in before.index(shard).to_pylist():
            bags.setdefault(row["group"], []).append(row["key"])
    names = sorted(bags)
    first = before.index(before.manifest.split("train")[0])["key"].to_pylist()  # a shard of which nothing is left
    gone = {*first, *(key for name in names[::5] for key in bags[name]), *(bags[name][len(bags[name]) // 2] for name in names[1::4])}
    dataset = remove(before.url, gone)
    left = {name: [key for key in keys if key not in gone] for name, keys in bags.items()}
    left = {name: keys for name, keys in left.items() if keys}
    assert dataset.num_groups("train") == len(left)
    order = TrainingOrder(lanes=4, block=4, global_batch=8, seed=5)
    sizes, rows = [], 0
    with closing(BagLoader(dataset, "train", transform=TransformSpec(), order=order, spec=InputSpec())) as loader:
        for batch in loader.batches(0, loader.steps_per_epoch):
            sizes += batch.mask.sum(1).tolist()
            rows += int(batch.mask.sum())
    assert sorted(sizes) == sorted(len(keys) for keys in left.values())
    assert rows == dataset.num_samples("train") == sum(map(len, left.values()))


def test_a_split_of_which_nothing_is_left_is_refused_by_name(url: Path) -> None:
    dataset = remove(url, live_keys(open_dataset(str(url)), "test"))
    assert dataset.num_samples("test") == 0
    with pytest.raises(DataError, match="split 'test' has no samples"):
        Loader(dataset, "test")


@pytest.mark.parametrize("number", [1, 2])
def test_a_manifest_of_before_is_written_again_as_it_was_and_so_is_what_follows_it(number: int) -> None:
    """Without removal no byte of a manifest is another one, whether its counts are added or made anew."""
    path = Path(__file__).parents[2] / "fixtures/v1/dataset"
    dataset = open_dataset(str(path), number)
    manifest, there = dataset.manifest, content(path / f"dataset.{number:06d}.json")
    assert {name: value for name, value in json.loads(canonical_json(manifest.to_json())).items() if name in there} == there
    assert manifest.to_json().keys() - there.keys() <= {"claim_sha256"}
    listing, arguments = FileRef("listings/000003.parquet", 1, "0" * 64), (manifest, manifest.identity, manifest.classes, [])
    plain = canonical_json(next_manifest(*arguments, listing, None).to_json())
    assert plain == canonical_json(next_manifest(*arguments, listing, None, Living(None, None)).to_json())
    details = [content(path / f"records/{part.stem}.json")["detail"] for part in manifest.parts]
    assert plain == canonical_json(next_manifest(*arguments, listing, None, Living(None, None, {}, details)).to_json())
    assert b"remov" not in plain


def forged(url: Path, change: object) -> None:
    """Change a removal file and make its hashes anew; `change` gets the table."""
    path = next((url / "removed").glob("train-000000-*.parquet"))
    table = pq.read_table(path)
    path.write_bytes(table_bytes(change(table).replace_schema_metadata(None), {"format": 1, "split": "train", "stem": "train-000000"}))  # type: ignore[operator]
    data = content(url / "dataset.000003.json")
    for part in data["shards"]:
        if part["stem"] == "train-000000":
            part["removed"] |= {"content_sha256": content_sha256(pq.read_table(path).replace_schema_metadata(None))}
            part["removed"]["file"] |= {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    rewrite(url / "dataset.000003.json", shards=data["shards"])


def with_ordinal(value: object) -> object:
    def change(table: pa.Table) -> pa.Table:
        values = [value, *table["ordinal"].to_pylist()[1:]]
        return table.set_column(0, "ordinal", pa.array(values, pa.int64()))

    return change


CHANGES = {
    "a sample that is not there": with_ordinal(10_000),
    "a null": with_ordinal(None),
    "one row twice": lambda table: table.take([1, 1]),
    "fewer rows": lambda table: table.slice(1),
    "more rows": lambda table: pa.concat_tables([table, table.slice(1)]),
    "another column": lambda table: table.append_column("more", pa.array([0] * len(table))),
    "a column less": lambda table: table.drop_columns(["reason"]),
    "another type": lambda table: table.set_column(0, "ordinal", table["ordinal"].cast(pa.string())),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_removal_file_that_was_changed_with_all_its_hashes_is_refused_by_readers(url: Path, change: str) -> None:
    keys = live_keys(open_dataset(str(url)))
    remove(url, keys[1:3])
    forged(url, CHANGES[change])
    dataset = open_dataset(str(url))
    shard = dataset.manifest.split("train")[0]
    for read in (
        lambda: dataset.index(shard),
        lambda: seen_in_order(dataset),
        lambda: list(as_webdataset(str(url))),
        lambda: Loader(dataset, "train").index(shard),
    ):
        with pytest.raises(DataError, match="restore it"):
            read()


def test_no_flipped_bit_and_no_cut_of_a_removal_file_is_believed(url: Path) -> None:
    keys = live_keys(open_dataset(str(url)))
    dataset = remove(url, keys[1:3])
    path, shard = next((url / "removed").glob("train-000000-*.parquet")), dataset.manifest.split("train")[0]
    whole, rng = path.read_bytes(), random.Random(7)
    damaged = [whole[:-1], whole[: len(whole) // 2], b"", whole + b"\0"]
    for bit in rng.sample(range(8 * len(whole)), 200):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        damaged.append(bytes(data))
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(DataError):
            dataset.index(shard)
    path.unlink()
    with pytest.raises(DataError, match="is missing"):
        dataset.index(shard)
    path.write_bytes(whole)
    assert len(dataset.index(shard)) == shard.live


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"samples": 99}, "99 samples"),
        ({"samples": 0, "quarantined": 0}, "0 samples, 0 quarantined"),
        ({"groups": 1}, "1 bags are removed"),
        ({"samples": -1}, "expected a number from 0"),
        ({"samples": "1"}, "expected int"),
        ({"samples": True}, "expected int"),
        ({"content_sha256": None}, "expected str"),
        (
            {"file": {"name": "removed/train-000001-g000003.parquet", "bytes": 1, "sha256": "0" * 64}},
            "expected removed/train-000000-gNNNNNN",
        ),
        ({"file": {"name": "../train-000000-g000003.parquet", "bytes": 1, "sha256": "0" * 64}}, "expected removed/train-000000-gNNNNNN"),
        ({"more": 1}, "more"),
    ],
)
def test_a_manifest_with_an_impossible_removal_is_refused(url: Path, change: dict[str, object], text: str) -> None:
    remove(url, [live_keys(open_dataset(str(url)))[0]])
    shards = content(url / "dataset.000003.json")["shards"]
    next(part for part in shards if part["stem"] == "train-000000")["removed"] |= change
    rewrite(url / "dataset.000003.json", shards=shards)
    with pytest.raises(DataError, match="is not a dataset manifest") as error:
        open_dataset(str(url))
    assert text in str(error.value)


def test_a_manifest_that_removes_and_does_not_say_why_or_counts_what_is_removed_is_refused(url: Path) -> None:
    remove(url, [live_keys(open_dataset(str(url)))[0]])
    path = url / "dataset.000003.json"
    whole = path.read_bytes()
    data = content(path)
    rewrite(path, removal="sometimes")
    with pytest.raises(DataError, match="removal is 'sometimes', expected drop or keep"):
        open_dataset(str(url))
    path.write_bytes(whole)
    data["statistics"]["train"]["samples"] += 1
    rewrite(path, statistics=data["statistics"])
    with pytest.raises(DataError, match="its statistics are not those of its parts"):
        open_dataset(str(url))
    path.write_bytes(whole)
    assert read_manifest(open_dataset(str(url)).store, 3).removal == "drop"


def test_pixels_of_ram_are_those_of_live_samples(url: Path) -> None:
    dataset = remove(url, some(open_dataset(str(url)), 0.5, 9))
    with Loader(dataset, "train", spec=InputSpec(cache="ram")) as loader:
        for _ in range(2):  # from the shards, then from RAM
            batch = loader.take(np.arange(loader.num_samples))
            assert [int(number) for number in batch.x[:, 0, 0, 0]] == [number_of(key) for key in live_keys(dataset)]
        assert loader.rows.in_ram
