"""gc of a dataset from which generations removed samples: removal files and their records go with the claim that wrote them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from aecore.artifact.documents import sealed
from aecore.data.dataset import open_dataset
from aecore.data.read.verify import verify_dataset
from aecore.store._environment import FAULT_STAGES
from tests.aecore.data.removals import live_keys, remove
from tests.aecore.encoding import image_folder, tree
from tests.aecore.test_gc import died, later, named, shard


@pytest.fixture(scope="module")
def removed_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two generations of a folder, and one that removed two samples of the first part."""
    root = tmp_path_factory.mktemp("removed")
    shard(image_folder(root / "images", "train", range(6)), root / "dataset")
    shard(image_folder(root / "images", "train", range(6, 9)), root / "dataset")
    keys = live_keys(open_dataset(str(root / "dataset")))
    remove(root / "dataset", keys[:2])
    return root / "dataset"


@pytest.fixture
def out(removed_once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(removed_once, tmp_path / "dataset"))


def removes(out: Path, count: int) -> Callable[[], object]:
    keys = live_keys(open_dataset(str(out)))
    return lambda: remove(out, keys[-count:])


def test_removal_files_and_records_of_all_generations_stay(out: Path) -> None:
    remove(out, live_keys(open_dataset(str(out)))[:2])
    (out / "withdrawn.000001.json").write_bytes(b"{}")
    before = tree(out, without=())
    report = later(out, unfinished=True)
    assert (report.garbage, report.waiting, report.not_ours) == ((), (), ())
    assert tree(out, without=()) == before
    assert sum(name.startswith("removed/train-000000-g") for name in before) == 2


@pytest.mark.parametrize("stage", FAULT_STAGES)
@pytest.mark.parametrize("role", ["run", "removal", "record", "listing", "manifest"])
def test_a_removal_killed_anywhere_waits_is_continued_and_goes_when_it_is_overtaken(out: Path, role: str, stage: str) -> None:
    again = removes(out, 4)
    before = named(out)
    assert died(again, f"{role}.{stage}")
    is_committed = (role, stage) == ("manifest", "linked")
    claimed = (out / "run.000004.json").exists()
    report = later(out)
    assert [item.what for item in report.waiting] == ["dataset claim 4"] * (claimed and not is_committed)
    assert {item.name.split("/")[0] for item in report.garbage} <= {".tmp"}
    whole = Path(shutil.copytree(out, out.with_name("continued")))
    if not is_committed:
        removes(whole, 4)()
    assert verify_dataset(open_dataset(str(whole)), read_data=True).problems == ()
    assert open_dataset(str(whole)).manifest.num_samples() == 3
    assert later(whole, unfinished=True).garbage == ()
    if is_committed:
        return
    removes(out, 1)()  # another one takes its place
    before = named(out)
    report = later(out)
    assert named(out) == before
    assert verify_dataset(open_dataset(str(out)), read_data=True).problems == ()
    left = tree(out, without=())
    assert not any("g000004" in name for name in left if claimed)
    assert claimed == ("run.000004.json" in {item.name for item in report.garbage})
    assert later(out, unfinished=True).garbage == ()


def test_a_killed_removal_is_given_up_when_asked(out: Path) -> None:
    before = tree(out)
    assert died(removes(out, 4), "listing.linked")
    assert any("removed/" in item.name for item in later(out, unfinished=True).garbage)
    assert {name: data for name, data in tree(out).items() if name != "run.000004.json"} == before


def test_files_with_other_names_are_not_ours(out: Path) -> None:
    file = next((out / "removed").iterdir()).read_bytes()
    names = [
        "removed/holiday.parquet",
        "removed/train-000000.parquet",
        "removed/train-000000-g000003.tar",
        "removed/train-000000-g000099.parquet",
        "removed/cats-000000-g000003.parquet",
        "removed/train-000000-g3.parquet",
        "shards/train-000000-g000003.parquet",
        "quarantine/train-000000-g000003.parquet",
    ]
    for name in names:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(file)
    (out / "records/cats-000000-g000003.json").write_bytes(sealed({}))
    report = later(out, unfinished=True)
    assert {*report.not_ours} == {*names, "records/cats-000000-g000003.json"}
    assert report.garbage == ()
    stray = out / "removed/train-000001-g000003.parquet"  # of a committed claim, and named by nobody
    stray.write_bytes(file)
    assert [item.name for item in later(out).garbage] == ["removed/train-000001-g000003.parquet"]
