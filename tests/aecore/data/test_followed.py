"""What `shard` writes when a source changes, seen by everything that reads: after each generation verify finds nothing, gc nothing to
remove, and each reader the samples of the source."""

import io
import json
import shutil
import tarfile
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aecore.data.dataset import open_dataset
from aecore.data.format.index import data_members
from aecore.data.read.loader import Loader
from aecore.data.read.verify import verify_dataset
from aecore.data.read.webdataset import as_webdataset
from aecore.data.sources.arrays import ArraysSpec
from aecore.data.sources.folder import FolderSpec
from aecore.data.sources.webdataset import WebdatasetSpec
from aecore.data.write.job import adopt_shards, shard_dataset
from aecore.data.write.ledger import MOST_LISTINGS, read_ledger
from aecore.data.write.report import report_state
from aecore.data.write.spec import ShardSpec
from aecore.data.write.splits import SplitSpec
from aecore.errors import DataError
from aecore.maintenance.gc import collect_garbage
from aecore.store import LocalStore, _states
from tests.aecore.data.before import grows_only
from tests.aecore.data.removals import live_content
from tests.aecore.data.test_removal import key_of, number_of, write_folder
from tests.aecore.data.tiny import encoded, image

NUM = 40


def run(source: Any, out: Path, by: Any = "folders", **shards: Any) -> None:  # any: every source kind has its own spec class
    shard_dataset(source, str(out), SplitSpec(by=by), ShardSpec(**{"max_samples": 4, "max_bad": 0.5, "max_removed": 1.0, **shards}))


def require_whole(out: Path, *, before: bool = True) -> None:
    dataset = open_dataset(str(out))
    assert verify_dataset(dataset, read_data=True).problems == ()
    for number in range(1, dataset.number) if before else ():
        assert verify_dataset(open_dataset(str(out), number)).problems == ()
    report = collect_garbage(str(out), older_than_s=0, unfinished=True)
    assert (report.garbage, report.waiting, report.not_ours) == ((), (), ())
    assert dataset.manifest.content_sha256 == live_content(dataset)


def numbers_of(out: Path, split: str) -> list[int]:
    """The numbers of a split's samples by their pixels; with each its key has to be read."""
    dataset = open_dataset(str(out))
    with Loader(dataset, split) as loader, closing(loader.range_batches(0, loader.num_samples, 7)) as batches:
        seen = [int(row[0, 0, 0]) for batch in batches for row in batch.x]
    keys = [sample["__key__"] for sample in as_webdataset(str(out), split)]
    assert len(keys) == len(seen) == dataset.num_samples(split)
    assert keys == [key for shard in dataset.manifest.split(split) for key in dataset.index(shard)["key"].to_pylist()]
    return seen


def path_of(root: Path, number: int) -> Path:
    return root / f"{key_of(number)}.png"


def delete(root: Path) -> None:
    for number in (0, 1, 2, 3, 19, 20, 24):
        path_of(root, number).unlink()


def change(root: Path) -> None:
    for number in (5, 6, 9, 30):
        path_of(root, number).write_bytes(encoded(image(number + 100)))


def relabel(root: Path) -> None:
    for number in (7, 8):
        path = path_of(root, number)
        path.rename(path.parent.parent / "b" / f"moved{path.name}")


def repair(root: Path) -> None:
    for number in (12, 13, 14, 15):
        path_of(root, number).write_bytes(encoded(image(number)))


def damage(root: Path) -> None:
    for number in (16, 17):
        path_of(root, number).write_bytes(b"broken")


def empty(root: Path) -> None:
    for path in (root / "test").rglob("*.png"):
        if number_of(path.stem) != 39:
            path.unlink()


def test_every_kind_of_change_leaves_a_dataset_that_all_readers_agree_on(tmp_path: Path) -> None:
    root, out = write_folder(tmp_path / "in", range(NUM)), tmp_path / "out"
    run(FolderSpec(url=str(root)), out)
    require_whole(out)
    changes: list[Callable[[Path], object]] = [
        delete,
        change,
        relabel,
        repair,
        damage,
        lambda root: write_folder(root, range(40, 50)),
        empty,
    ]
    for number, work in enumerate(changes, 2):
        work(root)
        run(FolderSpec(url=str(root)), out)
        assert open_dataset(str(out)).number == number
        require_whole(out)
        for split in ("train", "test"):
            there = [path.read_bytes() for path in (root / split).rglob("*.png")]
            pictures = [data for data in there if data != b"broken"]
            expected = {encoded(image(each)): each for each in range(150)}
            assert sorted(numbers_of(out, split)) == sorted(expected[data] for data in pictures)


def test_a_changed_filter_is_no_other_identity(tmp_path: Path) -> None:
    root, out = write_folder(tmp_path / "in", range(NUM)), tmp_path / "out"
    run(FolderSpec(url=str(root)), out)
    for options in ({"include": "*/a/*"}, {}, {"exclude": "*/b/*"}):
        run(FolderSpec(url=str(root), **options), out, accept_filter=True)
        require_whole(out)
    assert open_dataset(str(out)).number == 4


def test_merged_listings_say_all_that_those_before_said(tmp_path: Path) -> None:
    root, out = write_folder(tmp_path / "in", range(8)), tmp_path / "out"
    for number in range(8, 8 + MOST_LISTINGS + 4):
        run(FolderSpec(url=str(write_folder(root, range(number, number + 1)))), out)
        path_of(root, number - 8).unlink()
    run(FolderSpec(url=str(root)), out)
    dataset = open_dataset(str(out))
    assert len(dataset.manifest.listings) < dataset.number > MOST_LISTINGS
    require_whole(out)


def test_bags_that_lose_gain_and_change_instances_are_whole(tmp_path: Path) -> None:
    rng, out = np.random.default_rng(0), tmp_path / "out"
    bags = np.repeat(np.arange(12), 3)
    x = rng.normal(size=(36, 4)).astype(np.float32)
    for keep in (slice(None), bags != 3, np.arange(36) % 5 != 0):
        np.savez(tmp_path / "raw.npz", x=x[keep], y=bags[keep] % 2, bags=bags[keep])
        run(ArraysSpec(url=str(tmp_path / "raw.npz"), group="bags"), out, "none", max_samples=9)
        require_whole(out)
        assert open_dataset(str(out)).num_groups("train") == len(set(bags[keep].tolist()))


@pytest.mark.parametrize("removed", ["drop", "keep"])
def test_a_dataset_of_version_1_follows_from_the_run_that_says_so(tmp_path: Path, removed: Any) -> None:
    v1 = Path(__file__).parents[2] / "fixtures/v1"
    for name in ("dataset", "images"):
        shutil.copytree(v1 / name, tmp_path / name)
    out, first = tmp_path / "dataset", json.loads((v1 / "dataset/dataset.000002.json").read_bytes())
    url = json.loads((out / "run.000001.json").read_bytes())["info"]["source"]["url"]
    spec = {**first["identity"]["shards"], "removed": removed, "max_bad": 1.0, "max_removed": 1.0}
    for path in sorted((tmp_path / "images").glob("train/*/*.png"))[:2]:
        path.write_bytes(encoded(image(7, side=9)))
        shard_dataset(FolderSpec(url=str(tmp_path / "images"), name=url), str(out), None, ShardSpec(**spec))
        require_whole(out)
    assert open_dataset(str(out)).manifest.removal == removed


def test_adopted_tars_that_their_owner_changed_or_removed_are_not_needed_any_more(tmp_path: Path) -> None:
    tars, out = tmp_path / "tars", tmp_path / "out"
    run(FolderSpec(url=str(write_folder(tmp_path / "in", range(NUM)))), tmp_path / "made")
    shutil.copytree(tmp_path / "made/shards", tars, ignore=shutil.ignore_patterns("*.parquet"))

    def adopt() -> None:
        shards = ShardSpec(max_bad=0.5, max_removed=1.0)
        adopt_shards(WebdatasetSpec(url=str(tars)), str(out), SplitSpec(by="auto"), shards)

    adopt()
    require_whole(out)
    before = {split: numbers_of(out, split) for split in ("train", "test")}
    gone, changed = tars / "train-000001.tar", tars / "train-000002.tar"
    lost = [number for shard in open_dataset(str(out)).manifest.split("train")[1:2] for number in _numbers(out, shard)]
    gone.unlink()
    data = changed.read_bytes()
    changed.unlink()
    changed.write_bytes(data)  # the same bytes, as a copy has them
    adopt()
    require_whole(out, before=False)
    assert sorted(numbers_of(out, "train")) == sorted(number for number in before["train"] if number not in lost)
    with tarfile.open(changed, "w") as tar:
        for number in (140, 141):
            member = tarfile.TarInfo(f"n{number}.png")
            member.size = len(data := encoded(image(number)))
            tar.addfile(member, io.BytesIO(data))
    adopt()
    assert report_state(open_dataset(str(out))) == "ok", "what went cannot be read any more"
    require_whole(out, before=False)
    assert {140, 141} <= set(numbers_of(out, "train"))
    newest = open_dataset(str(out)).number
    by_owner = f"was changed in place, or removed, by its owner since it was indexed: generation {newest} of {out} follows it"
    with pytest.raises(DataError, match=rf"{gone} {by_owner}"):
        list(as_webdataset(str(out), number=1))
    gone.write_bytes((tmp_path / "made/shards" / gone.name).read_bytes())
    with pytest.raises(DataError, match=rf"{changed} {by_owner}"):
        list(as_webdataset(str(out), number=1))
    whole = next(shard for shard in open_dataset(str(out)).manifest.split("train") if shard.live)
    with (tars / whole.tar.name).open("r+b") as tar:
        tar.seek(data_members(open_dataset(str(out)).index(whole))[1][0])
        tar.write(b"damage")
    with pytest.raises(DataError, match=f"{whole.tar.name} is damaged at sample"):
        list(as_webdataset(str(out)))


def _numbers(out: Path, shard: Any) -> list[int]:  # any: a ShardRef
    return [number_of(key) for key in open_dataset(str(out)).index(shard)["key"].to_pylist()]


def test_a_dataset_of_before_reads_its_indexes_once_to_follow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_states, "YOUNG_NS", 0)
    source, out = FolderSpec(url=str(write_folder(tmp_path / "in", range(NUM)))), tmp_path / "out"
    run(source, out)
    grows_only(out)
    run(source, out, removed="drop")
    assert len(open_dataset(str(out)).manifest.listings) == 1, "it says all that indexes and claims do"
    require_whole(out)
    read, reading = list[str](), LocalStore.read

    def seen(store: LocalStore, name: str, **options: Any) -> bytes:
        read.append(name)
        return reading(store, name, **options)

    monkeypatch.setattr(LocalStore, "read", seen)
    dataset = open_dataset(str(out))
    assert len(read_ledger(dataset.store, dataset.manifest)) == NUM
    assert [name for name in read if name.startswith(("shards/", "quarantine/", "run."))] == []
    monkeypatch.undo()
    next((tmp_path / "in").rglob("*.png")).unlink()
    run(source, out)
    require_whole(out)


def test_removal_files_are_read_some_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = FolderSpec(url=str(write_folder(tmp_path / "in", range(NUM)))), tmp_path / "out"
    run(source, out)
    for path in sorted((tmp_path / "in").rglob("*.png"))[::3]:
        path.unlink()
    run(source, out)
    dataset, reading = open_dataset(str(out)), LocalStore.read
    both = threading.Barrier(2, timeout=10)  # broken if nothing else is read meanwhile

    def met(store: LocalStore, name: str, **options: Any) -> bytes:
        if name in first:
            both.wait()
        return reading(store, name, **options)

    first = [part.removed.file.name for part in dataset.manifest.parts if part.removed is not None][:2]
    monkeypatch.setattr(LocalStore, "read", met)
    assert len(first) == 2 and len(read_ledger(dataset.store, dataset.manifest)) == NUM - len(range(0, NUM, 3))
