"""Compaction: shards without what was removed from them, as a new generation; who reads or follows the dataset sees the same samples."""

import dataclasses
import os
import shutil
import tarfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from aecore.data.about import AboutSpec
from aecore.data.dataset import Dataset, open_dataset
from aecore.data.manifest import DatasetManifest
from aecore.data.read.verify import verify_dataset
from aecore.data.sources.folder import FolderSpec
from aecore.data.sources.webdataset import WebdatasetSpec
from aecore.data.write.compact import Compaction, compact_dataset
from aecore.data.write.job import adopt_shards, shard_dataset
from aecore.data.write.ledger import read_ledger
from aecore.data.write.spec import ShardSpec
from aecore.data.write.splits import SplitSpec
from aecore.errors import ConfigError, DataError
from aecore.maintenance.gc import DAY_S, Report, collect_garbage
from aecore.store import _states
from aecore.store._environment import FAULT_STAGES
from aecore.training.loop import fit
from tests.aecore.data.removals import live_keys, remove
from tests.aecore.encoding import image_folder, tree
from tests.aecore.test_gc import died
from tests.aecore.training import losses, small_job, sprites_dataset


@pytest.fixture(autouse=True)
def nothing_is_young(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_states, "YOUNG_NS", 0)


def shard(images: Path, out: Path, **options: Any) -> None:
    shard_dataset(
        FolderSpec(url=str(images), name="images"),
        str(out),
        SplitSpec(by="folders"),
        ShardSpec(max_samples=10, **{"max_bad": 0.5, **options}),
    )


@pytest.fixture(scope="module")
def removed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of ten samples, of which some lost most, one all, some a few; and bad files, of which one was repaired."""
    tmp_path = tmp_path_factory.mktemp("removed")
    images = image_folder(image_folder(tmp_path / "images", "train", range(40)), "test", range(40, 60))
    for number in range(3):
        (images / f"train/bad-{number}.png").write_bytes(b"no image")
    shard(images, tmp_path / "dataset")
    good = next(images.glob("test/*/*.png")).read_bytes()
    (images / "train/bad-0.png").write_bytes(good)
    shard(images, tmp_path / "dataset")
    dataset = open_dataset(str(tmp_path / "dataset"))
    train, test = ([dataset.index(each)["key"].to_pylist() for each in dataset.manifest.split(split)] for split in ("train", "test"))
    whole = next(keys for keys in train[1:] if len(keys) == 10)
    few = next(keys for keys in train[1:] if len(keys) > 5 and keys is not whole)
    bad = [keys[-1] for keys in train[1:5] if len(keys) < 10 and keys is not few]  # of shards with a quarantine
    names = [images / f"{key}.png" for lost in (train[0][:8], whole, few[:2], test[0][:6], bad) for key in lost]
    for path in names:
        path.unlink()
    shard(images, tmp_path / "dataset", max_removed=1.0)
    return tmp_path


@pytest.fixture
def out(removed: Path, tmp_path: Path) -> Path:
    """A copy of that; its images are where they were listed."""
    shutil.copytree(removed / "images", tmp_path / "images")
    return Path(shutil.copytree(removed / "dataset", tmp_path / "dataset"))


def samples(dataset: Dataset) -> list[tuple[Any, ...]]:
    """Return all that is known of live samples, in their order, with their bytes."""
    found = []
    for each in dataset.manifest.shards:
        index, reader = dataset.index(each), dataset.reader(each)
        at = np.flatnonzero(np.isin(reader.index["ordinal"].to_numpy(), index["ordinal"].to_numpy()))
        data = reader.read_rows(at)
        reader.close()
        rows = index.drop_columns(["members"]).to_pylist()
        found += [(each.split, tuple(row.items()), content) for row, content in zip(rows, data, strict=True)]
    return found


def problems(url: object, number: int | None = None) -> tuple[str, ...]:
    return verify_dataset(open_dataset(str(url), number), read_data=True).problems


def collected(url: object, **options: Any) -> Report:
    return collect_garbage(str(url), now=time.time() + 30 * DAY_S, **options)


def test_what_is_live_stays_as_it_is_in_its_order(out: Path) -> None:
    before, files = open_dataset(str(out)), tree(out, without=())
    known = samples(before)
    told = compact_dataset(str(out), 0.3)
    after = open_dataset(str(out))
    assert told.generation == after.number == before.number + 1
    by = {part.part: part.by for part in told.parts}
    assert {*by} == {part.part for part in told.parts if part.removed > 0.3 * (part.removed + part.live)} and None in by.values()
    assert samples(after) == known
    for name in ("content_sha256", "classes", "sample", "reasons", "removal", "identity", "quarantined"):
        assert getattr(after.manifest, name) == getattr(before.manifest, name), name
    assert after.manifest.num_samples() == before.manifest.num_samples()
    for split, counts in before.manifest.statistics.items():
        assert dataclasses.replace(after.manifest.statistics[split], bytes=0) == dataclasses.replace(counts, bytes=0)
        assert after.manifest.statistics[split].bytes < counts.bytes
        assert after.manifest.num_planned(split) == before.manifest.num_planned(split)
        assert after.training_key(split) != before.training_key(split)
    assert after.dataset_sha256 != before.dataset_sha256
    assert {name: data for name, data in tree(out, without=()).items() if name in files} == files, "nothing was changed or removed"
    assert [part.removed for part in after.manifest.parts if part.stem in by.values()] == [None] * sum(
        name is not None for name in by.values()
    )
    assert [part.stem for part in after.manifest.parts if part.removed is not None], "a part below the share keeps its removal file"
    assert {(part.stem, part.by, part.number) for part in after.manifest.retired} == {
        (stem, name, after.number) for stem, name in by.items()
    }
    keys = read_ledger(after.store, after.manifest)["key"].to_pylist()
    assert read_ledger(after.store, after.manifest).equals(read_ledger(before.store, before.manifest))
    assert keys == pq.read_table(out / after.manifest.listings[-1].name)["key"].to_pylist(), "no listing names what is gone"
    assert len(after.manifest.listings) == 1
    assert problems(out) == problems(out, before.number) == ()
    assert compact_dataset(str(out), 0.3).generation == after.number, "nothing to do"


def test_parts_without_a_good_sample_are_compacted_too(tmp_path: Path) -> None:
    images = image_folder(tmp_path / "images", "train", range(10))
    for number in range(10):
        (images / f"test/bad-{number}.png").parent.mkdir(exist_ok=True)
        (images / f"test/bad-{number}.png").write_bytes(b"no image %d" % number)
    shard(images, tmp_path / "dataset", max_bad=1.0)
    good = next(images.glob("train/*/*.png")).read_bytes()
    for number in range(6):
        (images / f"test/bad-{number}.png").write_bytes(good)
    shard(images, tmp_path / "dataset", max_bad=1.0)
    assert [part.live_quarantined for part in open_dataset(str(tmp_path / "dataset")).manifest.rejected] == [4]
    compact_dataset(str(tmp_path / "dataset"), 0.5)
    (part,) = open_dataset(str(tmp_path / "dataset")).manifest.rejected
    assert (part.quarantined, part.lost, part.planned, part.removed) == (4, 6, 10, None)
    assert problems(tmp_path / "dataset") == ()
    for number in range(6, 10):
        (images / f"test/bad-{number}.png").write_bytes(good)
    shard(images, tmp_path / "dataset", max_bad=1.0)
    compact_dataset(str(tmp_path / "dataset"), 0)
    manifest = open_dataset(str(tmp_path / "dataset")).manifest
    assert manifest.rejected == () and manifest.quarantined == 0 and manifest.num_samples("test") == 10
    assert problems(tmp_path / "dataset") == ()


def test_a_dataset_goes_on_following_its_source(out: Path) -> None:
    fresh, images = out.with_name("fresh"), out.with_name("images")
    compact_dataset(str(out), 0.3)
    before = open_dataset(str(out))
    shard(images, out)
    assert open_dataset(str(out)).number == before.number, "nothing new: nothing was read or written"
    paths = sorted(images.glob("t*/*/*.png"))
    gone = before.index(before.manifest.split("train")[0])["key"].to_pylist()
    (images / f"{gone[0]}.png").unlink()  # of a compacted shard
    paths = sorted(images.glob("t*/*/*.png"))
    paths[3].write_bytes(paths[-1].read_bytes())
    image_folder(images, "train", range(70, 85))
    shard(images, out)
    compact_dataset(str(out), 0)
    shard(images, fresh)
    mine, new = open_dataset(str(out)).manifest, open_dataset(str(fresh)).manifest
    assert mine.content_sha256 == new.content_sha256
    assert mine.statistics.keys() == new.statistics.keys() and not mine.has_removed
    heirs = mine.heirs()
    assert {by for by in heirs.values() if by is not None} <= {part.stem for part in mine.parts}
    assert len({part.number for part in mine.retired}) == 2
    assert all(problems(out, number) == () for number in range(1, mine.number + 1))


def test_a_split_and_a_dataset_may_lose_everything(out: Path) -> None:
    planned = open_dataset(str(out)).manifest.num_planned("test")
    for split in ("test", "train"):
        remove(out, live_keys(open_dataset(str(out)), split))
        compact_dataset(str(out), 0.5)
        assert split not in open_dataset(str(out)).manifest.splits
        assert problems(out) == ()
    images = image_folder(out.with_name("images"), "test", range(90, 95))
    shard(images, out, max_removed=1.0)
    added = open_dataset(str(out)).manifest
    assert min(part.first_ordinal for part in added.split("test")) == planned, "an ordinal never comes back"
    assert problems(out) == ()


@pytest.mark.parametrize("stage", FAULT_STAGES)
@pytest.mark.parametrize("role", ["run", "tar", "index", "quarantine", "record", "listing", "manifest"])
def test_killed_anywhere_it_goes_on_and_gives_the_same_files(out: Path, role: str, stage: str) -> None:
    whole = Path(shutil.copytree(out, out.with_name("whole")))
    compact_dataset(str(whole), 0)
    assert died(lambda: compact_dataset(str(out), 0), f"{role}.{stage}")
    assert problems(out) == ()
    claimed = any(item.what == "dataset claim 4" for item in collected(out).waiting)
    assert claimed or role in ("run", "manifest")
    compact_dataset(str(out), 0)
    assert problems(out) == ()
    theirs = {name: data for name, data in tree(whole).items() if not name.startswith(("records/", "report/"))}
    assert {name: data for name, data in tree(out).items() if not name.startswith(("records/", "report/"))} == theirs


def test_a_killed_one_that_is_overtaken_goes_and_so_do_retired_parts_when_they_are_old(out: Path) -> None:
    images = out.with_name("images")
    assert died(lambda: compact_dataset(str(out), 0.3), "listing.linked")
    image_folder(images, "train", range(70, 75))
    shard(images, out)
    assert [item.name for item in collected(out).garbage if "g000004" in item.name]
    before = open_dataset(str(out))
    told = compact_dataset(str(out), 0.3)
    retired = {part.part for part in told.parts}
    assert collect_garbage(str(out)).garbage == (), "nobody waits a week for this test"
    assert collected(out, keep_generations=2).garbage == (), "the generation before may be read"
    kept = collect_garbage(str(out), keep_generations=1, retention_s=DAY_S, now=time.time() + DAY_S / 2)
    assert kept.garbage == () and [item.what for item in kept.waiting] == ["replaced parts"]
    assert problems(out, before.number) == ()
    freed = {item.name for item in collected(out, keep_generations=1, dry_run=True).garbage}
    assert {name[len("shards/") :].partition(".")[0] for name in freed if name.startswith("shards/")} == retired
    assert any(name.startswith("removed/") for name in freed)
    assert {item.name for item in collected(out, keep_generations=1).garbage} == freed
    assert not any((out / name).exists() for name in freed)
    assert problems(out) == () and samples(open_dataset(str(out))) != []
    with pytest.raises(
        DataError, match="generation 4 of .* is not complete any more: generation 5 wrote .* was collected; use generation 5"
    ):
        open_dataset(str(out), before.number)
    assert collected(out, keep_generations=1, unfinished=True).garbage == ()
    shard(images, out)
    assert open_dataset(str(out)).number == told.generation


def test_a_collection_that_was_killed_goes_on(out: Path) -> None:
    compact_dataset(str(out), 0.3)
    names = [item.name for item in collected(out, keep_generations=1, dry_run=True).garbage]
    for name in names[: len(names) // 2]:
        (out / name).unlink()
    assert problems(out) == ()
    assert [item.name for item in collected(out, keep_generations=1).garbage] == names[len(names) // 2 :]
    assert problems(out) == ()


def bagged(tmp_path: Path) -> Path:
    """Bags of four samples, of which some lost members, some all."""
    rng = np.random.default_rng(0)
    for bag in range(8):
        (tmp_path / f"bags/bag-{bag}").mkdir(parents=True)
        for member in range(4):
            np.save(tmp_path / f"bags/bag-{bag}/{member}.npy", rng.normal(size=(3 + member, 2)).astype("f4"))
    spec = FolderSpec(url=str(tmp_path / "bags"), group="parent", extensions=("npy",), name="bags")
    shard_dataset(spec, str(tmp_path / "bagged"), SplitSpec(), ShardSpec(max_samples=8))
    for bag, left in ((0, 0), (1, 2), (2, 0), (3, 3), (4, 0)):
        for member in range(left, 4):
            (tmp_path / f"bags/bag-{bag}/{member}.npy").unlink()
    shard_dataset(spec, str(tmp_path / "bagged"), SplitSpec(), ShardSpec(max_samples=8, max_removed=1.0))
    return tmp_path / "bagged"


def test_bags_and_sequences_stay_whole_and_are_counted(tmp_path: Path) -> None:
    data = bagged(tmp_path)
    before = open_dataset(str(data))
    known = samples(before)
    compact_dataset(str(data), 0)
    after = open_dataset(str(data))
    assert samples(after) == known and not after.manifest.has_removed
    assert after.manifest.num_groups("train") == before.manifest.num_groups("train") == 5
    assert after.manifest.sample == before.manifest.sample and len(after.manifest.sample.shapes) == 4
    assert problems(data) == ()


@pytest.fixture
def adopted(tmp_path: Path) -> Path:
    """A dataset of external tars, of which one lost most samples."""
    images = image_folder(tmp_path / "images", "train", range(12))
    for number in range(2):
        with tarfile.open(tmp_path / f"tars-{number}.tar", "w") as tar:
            for path in sorted(images.rglob("*.png"))[number::2]:
                tar.add(path, path.stem + ".png")
                tar.add(label_file(tmp_path, path.parent.name), path.stem + ".cls")
    (tmp_path / "tars").mkdir()
    for number in range(2):
        (tmp_path / f"tars-{number}.tar").rename(tmp_path / f"tars/train-{number}.tar")
    adopt_shards(WebdatasetSpec(url=str(tmp_path / "tars")), str(tmp_path / "dataset"))
    remove(
        tmp_path / "dataset",
        open_dataset(str(tmp_path / "dataset")).index(open_dataset(str(tmp_path / "dataset")).manifest.shards[0])["key"].to_pylist()[:4],
    )
    return tmp_path / "dataset"


def label_file(folder: Path, name: str) -> Path:
    (folder / f"{name}.txt").write_text(str(len(name)))
    return folder / f"{name}.txt"


def test_adopted_tars_are_left_alone_unless_they_are_to_be_copied(adopted: Path) -> None:
    tars = tree(adopted.with_name("tars"))
    before = open_dataset(str(adopted))
    known = samples(before)
    told = compact_dataset(str(adopted), 0.5)
    assert (told.parts, told.adopted, told.generation) == ((), ("train-000000",), before.number)
    told = compact_dataset(str(adopted), 0.5, copy=True)
    assert [part.part for part in told.parts] == ["train-000000"] and told.adopted == ()
    after = open_dataset(str(adopted))
    assert samples(after) == known and after.manifest.content_sha256 == before.manifest.content_sha256
    assert [part.tar_base_url is None for part in after.manifest.shards] == [True, False]
    assert problems(adopted) == ()
    report = collected(adopted, keep_generations=1)
    assert {item.name for item in report.garbage} == {
        "shards/train-000000.parquet", "records/train-000000.json", "records/train-000000-g000002.json",
        "removed/train-000000-g000002.parquet",
    }  # fmt: skip
    assert tree(adopted.with_name("tars")) == tars and problems(adopted) == ()
    again = adopt_shards(WebdatasetSpec(url=str(adopted.with_name("tars"))), str(adopted), shards=ShardSpec(removed="drop"))
    assert problems(adopted) == () and again.content_sha256 is not None


def test_two_at_once_give_one_generation(out: Path) -> None:
    known, found = samples(open_dataset(str(out))), list[Compaction]()
    threads = [threading.Thread(target=lambda: found.append(compact_dataset(str(out), 0.3))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {each.generation for each in found} == {4}
    assert open_dataset(str(out)).number == 4 and samples(open_dataset(str(out))) == known and problems(out) == ()


def test_a_dry_run_writes_nothing_and_says_the_same(out: Path) -> None:
    before = tree(out, without=())
    asked = compact_dataset(str(out), 0.3, dry_run=True)
    assert tree(out, without=()) == before
    did = compact_dataset(str(out), 0.3)
    assert asked.parts == did.parts and asked.dry_run and asked.generation + 1 == did.generation


@pytest.mark.parametrize("share", [-0.1, 1, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(out: Path, share: float) -> None:
    with pytest.raises(ConfigError, match="expected at least 0 and below 1"):
        compact_dataset(str(out), share)


def test_damage_of_what_is_copied_is_found_and_nothing_committed(out: Path) -> None:
    shard_ref = open_dataset(str(out)).manifest.split("train")[0]
    data = bytearray((out / shard_ref.tar.name).read_bytes())
    reader = open_dataset(str(out)).reader(shard_ref)
    live = open_dataset(str(out)).index(shard_ref)["members"].to_pylist()[0][-1]
    reader.close()
    data[live["offset"] + 20] ^= 1
    os.chmod(out / shard_ref.tar.name, 0o644)
    (out / shard_ref.tar.name).write_bytes(data)
    with pytest.raises(DataError, match=f"{shard_ref.tar.name} is damaged at sample"):
        compact_dataset(str(out), 0.3)
    assert open_dataset(str(out)).number == 3


def test_a_run_that_began_before_finishes_on_its_generation(tmp_path: Path) -> None:
    data = sprites_dataset(tmp_path / "data", num_samples=192, val=0.1, max_samples=32)
    remove(data, live_keys(open_dataset(data))[:20])
    job = small_job(data, tmp_path / "run", epochs=2)
    whole = fit(dataclasses.replace(job, out=str(tmp_path / "whole")))
    assert died(lambda: fit(job), "checkpoint.linked")
    compact_dataset(data, 0.5)
    assert open_dataset(data).training_key("train") != open_dataset(data, 2).training_key("train")
    assert fit(job).step == whole.step
    assert [row["loss"] for row in losses(tmp_path / "run")] == [row["loss"] for row in losses(tmp_path / "whole")]
    collected(data, keep_generations=1)
    assert died(lambda: fit(dataclasses.replace(job, out=str(tmp_path / "other"))), "checkpoint.linked")
    assert open_dataset(data).number == 3, "a run that begins now takes the new generation"


def test_samples_that_are_left_out_are_still_there_when_the_other_of_their_content_goes(tmp_path: Path) -> None:
    """A compaction that dropped them would make the next run write them again."""
    images, out = image_folder(tmp_path / "images", "train", range(12)), str(tmp_path / "dataset")
    first, *others = sorted(images.rglob("*.png"))
    shutil.copyfile(first, first.with_name("zz.png"))
    shards = ShardSpec(max_samples=4, duplicates="drop", max_removed=1.0)

    def follow() -> DatasetManifest:
        return shard_dataset(FolderSpec(url=str(images)), out, SplitSpec(), shards, about=AboutSpec(owner="us"))

    follow()
    for path in others[:7]:
        path.unlink()
    before = follow()
    told = compact_dataset(out, 0)
    after = open_dataset(out).manifest
    assert told.parts and len(told.left_out) == 1 and after.about == before.about and before.about is not None
    assert (after.content_sha256, after.num_samples()) == (before.content_sha256, before.num_samples())
    assert (tmp_path / f"dataset/report/{after.number:06d}.json").exists()
    assert follow().number == after.number, "nothing is new"
    first.unlink()
    found = follow()
    fresh = shard_dataset(FolderSpec(url=str(images)), str(tmp_path / "fresh"), SplitSpec(), shards)
    assert found.content_sha256 == fresh.content_sha256 and found.num_samples() == fresh.num_samples() == 5
