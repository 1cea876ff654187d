"""gc removes what nobody needs and nothing else: killed writers, overtaken appends, readers, reruns, names of other people."""

import itertools
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from aecore.artifact.documents import CLAIM, sealed
from aecore.checkpoint.files import committed_checkpoints, verify_checkpoint
from aecore.data.dataset import open_dataset
from aecore.data.read.verify import verify_dataset
from aecore.data.sources.folder import FolderSpec
from aecore.data.sources.webdataset import WebdatasetSpec
from aecore.data.write import job as job_module
from aecore.data.write.job import adopt_shards, shard_dataset
from aecore.data.write.spec import ShardSpec
from aecore.data.write.splits import SplitSpec
from aecore.encoding.encoder import EncodeSpec
from aecore.encoding.job import encode_dataset
from aecore.errors import DataError, StoreError
from aecore.maintenance.gc import DAY_S, Report, collect_garbage
from aecore.store import LocalStore, _states, open_store
from aecore.store._environment import FAULT_STAGES
from aecore.table.table import open_table
from aecore.table.verify import verify_table
from aecore.training.loop import fit
from aecore.training.metrics import last_row
from tests.aecore.encoding import encode, image_folder, saved_run, tree
from tests.aecore.training import losses, small_job
from tests.aecore.training import sprites_dataset as training_data

LATER = 2 * DAY_S


@pytest.fixture(autouse=True)
def nothing_is_young(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that were written just now have a state: else what a run claims and lists would depend on how long the one before took."""
    monkeypatch.setattr(_states, "YOUNG_NS", 0)


def later(url: Path, **options: object) -> Report:
    """Collect as if two days had passed."""
    return collect_garbage(str(url), now=time.time() + LATER, **options)  # type: ignore[arg-type]


def died(work: Callable[[], object], fault: str = "") -> bool:
    """Run `work` in a child that dies at `fault`; False if it ended before (a failure that names another append is no bug)."""
    pid = os.fork()
    if pid == 0:
        os.environ["AECORE_FAULT"] = fault
        torch.set_num_threads(1)
        try:
            work()
        except BaseException:
            os._exit(9)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def shard(images: Path, out: Path) -> None:
    shard_dataset(FolderSpec(url=str(images)), str(out), SplitSpec(by="folders"), ShardSpec(max_samples=3))


def named(out: Path) -> dict[str, bytes]:
    """Return what readers may open: the manifests and all that they name."""
    files = tree(out)
    names = {name for name in files if name.startswith(("dataset.", "table."))}
    for number in range(1, 1 + sum(name.startswith("dataset.") for name in files)):
        names |= {ref.name for ref in open_dataset(str(out), number).manifest.files}
    return {name: files[name] for name in sorted(names)}


def test_a_finished_dataset_run_and_table_lose_nothing(tmp_path):
    images = image_folder(tmp_path / "images", "train", range(8))
    shard(images, tmp_path / "dataset")
    run = saved_run(tmp_path / "run")
    encode(run, str(tmp_path / "dataset"), tmp_path / "table")
    for name in ("dataset", "table"):
        before = tree(tmp_path / name, without=())
        report = later(tmp_path / name, unfinished=True)
        assert (report.garbage, report.waiting, report.not_ours) == ((), (), ())
        assert tree(tmp_path / name, without=()) == before


@pytest.mark.parametrize("dry_run", [True, False])
def test_looking_for_garbage_adds_nothing_to_an_artefact_that_has_none(tmp_path, dry_run):
    shard(image_folder(tmp_path / "images", "train", range(8)), tmp_path / "dataset")
    (tmp_path / "dataset/.tmp").rmdir()  # as after a copy of the files
    before = sorted((path, path.lstat().st_mtime_ns) for path in tmp_path.rglob("*"))
    assert collect_garbage(str(tmp_path / "dataset"), dry_run=dry_run).garbage == ()
    assert sorted((path, path.lstat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("stage", FAULT_STAGES)
@pytest.mark.parametrize("role", ["run", "listing", "tar", "index", "record", "manifest"])
def test_an_append_killed_anywhere_and_overtaken_is_collected_and_nothing_that_is_named(tmp_path, role, stage):
    images, out = image_folder(tmp_path / "images", "train", range(4)), tmp_path / "dataset"
    shard(images, out)
    image_folder(images, "train", range(4, 8))
    assert died(lambda: shard(images, out), f"{role}.{stage}")
    image_folder(images, "train", range(8, 12))
    shard(images, out)
    before, claims = named(out), sorted(out.glob("run.*.json"))
    kept = later(out)
    overtaken = {"run.000001.json": 1}.get(claims[-2].name, 2)  # the claim itself may have been killed
    assert named(out) == before
    assert verify_dataset(open_dataset(str(out)), read_data=True).ok
    left = [name for name in tree(out, without=()) if not name.startswith("report/")]
    stems = {part.stem for part in open_dataset(str(out)).manifest.shards}
    assert {name for name in left if name.startswith("records/")} == {f"records/{stem}.json" for stem in stems}
    assert set(left) == set(before) | {f"records/{stem}.json" for stem in stems} | {path.name for path in out.glob("run.*.json")}
    if overtaken == 2 and (role, stage) != ("manifest", "linked"):
        assert "run.000002.json" in {item.name for item in kept.garbage}
    assert later(out).garbage == ()


def test_what_the_same_command_continues_stays_and_is_given_up_only_when_asked(tmp_path):
    images, out, whole = image_folder(tmp_path / "images", "train", range(4)), tmp_path / "dataset", tmp_path / "whole"
    shard(images, out)
    shard(images, whole)
    image_folder(images, "train", range(4, 10))
    shard(images, whole)
    assert died(lambda: shard(images, out), "record.linked:1")
    before = tree(out)
    report = later(out)
    assert [item.what for item in report.waiting] == ["dataset claim 2"]
    assert {item.name.split("/")[0] for item in report.garbage} <= {".tmp"}
    assert tree(out) == before
    given_up = later(out, unfinished=True)
    assert any(item.name.startswith("records/train-g000002") for item in given_up.garbage)
    assert (out / "run.000002.json").exists(), "its number must not be given to other work"
    shard(images, out)
    assert named(out) == named(whole)


def test_an_unfinished_first_attempt_that_is_given_up_goes_as_a_whole(tmp_path):
    images, out = image_folder(tmp_path / "images", "train", range(7)), tmp_path / "dataset"
    assert died(lambda: shard(images, out), "manifest.synced")
    assert len(later(out).waiting) == 1
    later(out, unfinished=True)
    assert tree(out, without=()) == {}
    shard(images, out)
    assert verify_dataset(open_dataset(str(out)), read_data=True).ok


def test_a_young_file_keeps_all_that_its_attempt_wrote(tmp_path):
    images, out = image_folder(tmp_path / "images", "train", range(4)), tmp_path / "dataset"
    shard(images, out)
    image_folder(images, "train", range(4, 10))
    assert died(lambda: shard(images, out), "record.linked:2")
    image_folder(images, "train", range(10, 12))
    shard(images, out)
    before = tree(out, without=())
    report = collect_garbage(str(out), unfinished=True)
    assert report.garbage == ()
    assert "younger than the limit" in report.waiting[0].why
    record = next((out / "records").glob("train-g000002-*"))
    report = later(out)
    assert report.garbage
    assert not record.exists()
    assert set(tree(out, without=())) < set(before)


def test_a_dry_run_removes_nothing_and_says_the_same(tmp_path):
    images, out = image_folder(tmp_path / "images", "train", range(7)), tmp_path / "dataset"
    assert died(lambda: shard(images, out), "record.linked:1")
    before = tree(out, without=())
    planned = later(out, unfinished=True, dry_run=True)
    assert tree(out, without=()) == before
    assert later(out, unfinished=True).garbage == planned.garbage


def test_names_that_are_not_ours_are_left_alone_and_listed(tmp_path):
    images, out = image_folder(tmp_path / "images", "train", range(4)), tmp_path / "dataset"
    shard(images, out)
    theirs = [
        "notes.txt",
        "shards/mine.tar",
        "shards/photos-000000.tar",
        "shards/photos-000000.parquet",
        "records/train-000000.json.bak",
        ".tmp/work",
        "shards/train-g000009-000000.tar",
        "quarantine/x/y",
    ]
    for name in theirs:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")
    report = later(out, unfinished=True)
    assert report.garbage == ()
    assert set(report.not_ours) == {*theirs[:-1], "quarantine/x"}
    assert all((out / name).read_text() == "mine" for name in theirs)


def test_files_of_others_inside_a_table_stay(tmp_path):
    data, out = tmp_path / "data", tmp_path / "table"
    shard(image_folder(tmp_path / "images", "train", range(9)), data)
    encode_dataset(saved_run(tmp_path / "run"), str(data), str(out), EncodeSpec(batch=4))
    theirs = ["data/mine-000001.parquet", "data/split=train/mine-000000.parquet", "data/split=mine/train-000000.parquet"]
    for name in theirs:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    report = later(out, unfinished=True)
    assert report.garbage == ()
    assert set(report.not_ours) == set(theirs)


def test_tars_of_others_inside_an_adopted_dataset_stay(tmp_path):
    shard(image_folder(tmp_path / "images", "train", range(9)), tmp_path / "made")
    theirs = tmp_path / "theirs/shards"
    theirs.mkdir(parents=True)
    for number in range(3):
        shutil.copy(tmp_path / "made/shards" / f"train-{number:06d}.tar", theirs)
    before = {path.name: path.read_bytes() for path in theirs.iterdir()}
    adopt_shards(WebdatasetSpec(url=f"{theirs}/train-{{000000..000001}}.tar"), str(theirs.parent))
    report = later(theirs.parent)
    assert {name: (theirs / name).read_bytes() for name in before} == before, "adopted ones, and one that was not"
    assert report.garbage == () and len(report.not_ours) == 3


def test_a_damaged_manifest_stops_the_collection(tmp_path):
    images, out = image_folder(tmp_path / "images", "train", range(4)), tmp_path / "dataset"
    shard(images, out)
    text = (out / "dataset.000001.json").read_text()
    (out / "dataset.000001.json").write_text(text.replace("train-000000.tar", "train-000009.tar"))
    before = tree(out, without=())
    with pytest.raises(DataError, match="is damaged"):
        later(out)
    assert tree(out, without=()) == before


def test_a_place_without_an_artefact_is_refused(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.json").write_text("{}")
    with pytest.raises(DataError, match="holds no dataset, run or table"):
        later(tmp_path / "photos")
    (tmp_path / "run.000001.json").write_bytes(sealed({"kind": "notes", "claim": 1, "identity": {}, "info": {}}))
    with pytest.raises(DataError, match="has kind 'notes'"):
        later(tmp_path)


@pytest.mark.parametrize("seed", [0, 1, 2, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(3, 20))])
def test_any_history_with_collections_ends_as_it_would_without(tmp_path, seed):
    draw = random.Random(seed)
    images = image_folder(tmp_path / "images", "train", range(3))
    roles = ("run", "listing", "tar", "index", "record", "manifest")
    plain, collected = tmp_path / "plain", tmp_path / "collected"
    number = 3
    for _ in range(5):
        step = draw.randint(1, 4)
        image_folder(images, "train", range(number, number + step))
        number += step
        fault = draw.choice(["", *(f"{role}.{stage}:{draw.randint(1, 2)}" for role in roles for stage in FAULT_STAGES)])
        for out in (plain, collected):
            died(lambda out=out: shard(images, out), fault)
        if collected.exists():
            later(collected)
    for out in (plain, collected):
        shard(images, out)
    later(collected)
    assert verify_dataset(open_dataset(str(collected)), read_data=True).ok
    assert named(collected) == named(plain)


@pytest.mark.parametrize(
    "fault", ["run.linked", "part.linked:1", "record.linked:1", "record.staged:2", "manifest.synced", "manifest.linked"]
)
def test_a_table_killed_anywhere_ends_the_same_after_a_collection(tmp_path, fault):
    images = image_folder(tmp_path / "images", "train", range(7))
    data, run, out = tmp_path / "dataset", saved_run(tmp_path / "run"), tmp_path / "table"
    shard(images, data)
    assert died(lambda: encode(run, str(data), out), fault)
    report = later(out)
    assert {item.name.split("/")[0] for item in report.garbage} <= {".tmp"}
    image_folder(images, "train", range(7, 10))
    shard(images, data)
    expected = tree(tmp_path / "whole") if encode(run, str(data), tmp_path / "whole") else {}
    encode(run, str(data), out)
    overtaken = later(out)
    assert ("run.000001.json" in {item.name for item in overtaken.garbage}) == (fault != "manifest.linked")
    parts = {name for name in expected if name.startswith("data/")}
    found = tree(out)
    assert {name: found[name] for name in parts} == {name: expected[name] for name in parts}
    assert {name for name in found if name.startswith("data/")} == parts
    assert verify_table(open_table(str(out)), read_data=True, dataset_url=str(data)).num_rows == 10
    assert later(out).garbage == ()


def test_an_encoding_that_is_given_up_goes_as_a_whole(tmp_path):
    data, run, out = tmp_path / "dataset", saved_run(tmp_path / "run"), tmp_path / "table"
    shard(image_folder(tmp_path / "images", "train", range(7)), data)
    assert died(lambda: encode(run, str(data), out), "record.linked:2")
    later(out, unfinished=True)
    assert tree(out, without=()) == {}


@pytest.fixture(scope="module")
def sprites(tmp_path_factory):
    return training_data(tmp_path_factory.mktemp("data") / "sprites", val=0.1)


OPTIONS = {"every_steps": 10, "max_steps": 30, "log_every_s": 0.0}


@pytest.mark.parametrize("fault", ["weights.linked:2", "state.synced:2", "checkpoint.synced:2", "metrics.linked:3", "model.linked:1"])
def test_a_killed_run_resumes_after_a_collection_and_ends_the_same(sprites, tmp_path, tmp_path_factory, fault):
    whole = tmp_path_factory.getbasetemp() / "gc-whole"
    if not whole.exists():
        fit(small_job(sprites, whole, **OPTIONS))
    job = small_job(sprites, tmp_path / "run", **OPTIONS)
    assert died(lambda: fit(job), fault)
    first = later(tmp_path / "run")
    fit(job)
    later(tmp_path / "run")
    assert tree(tmp_path / "run/model") == tree(whole / "model")
    assert losses(tmp_path / "run") == losses(whole)
    if fault.startswith(("weights", "state", "checkpoint")):
        assert any(item.name.startswith("checkpoints/step-00000020") for item in first.garbage)
    folders = {path.parent for path in (tmp_path / "run/checkpoints").rglob("*")}
    assert all((folder / "checkpoint.json").exists() for folder in folders if folder.name.startswith("step-"))
    assert later(tmp_path / "run").garbage == ()


def test_a_damaged_checkpoint_goes_once_a_newer_one_is_valid(sprites, tmp_path):
    fit(small_job(sprites, tmp_path / "run", **OPTIONS))
    older, newer = sorted((tmp_path / "run/checkpoints").iterdir())
    weights = newer / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + b"!")
    assert later(tmp_path / "run").garbage == (), "the newest may be restored"
    weights.write_bytes(good)
    state = older / "state.pt"
    state.write_bytes(state.read_bytes()[:-1] + b"!")
    assert {item.name.split("/")[1] for item in later(tmp_path / "run").garbage} == {older.name}
    assert not older.exists()
    assert losses(tmp_path / "run")[-1]["step"] == 30


def flipped(path: Path) -> bytes:
    """Flip a bit in the middle of a file; return what it held."""
    good = path.read_bytes()
    bad = bytearray(good)
    bad[len(bad) // 2] ^= 1
    path.write_bytes(bad)
    return good


@pytest.mark.parametrize("unfinished", [False, True])
@pytest.mark.parametrize("at", [0, -1], ids=["oldest", "newest"])
def test_what_a_damaged_checkpoint_json_may_name_stays_until_it_is_restored(sprites, tmp_path, at, unfinished):
    run = tmp_path / "run"
    fit(small_job(sprites, run, **OPTIONS))
    for path in run.rglob("*"):
        os.utime(path, (time.time() - LATER,) * 2)
    before = tree(run)
    document = sorted(run.glob("checkpoints/*/checkpoint.json"))[at]
    good = flipped(document)
    report = collect_garbage(str(run), unfinished=unfinished)
    assert report.garbage == ()
    (waiting,) = report.waiting
    assert f"{document} is damaged" in waiting.why and f"or remove {document.parent} by hand" in waiting.why
    document.write_bytes(good)
    assert tree(run) == before
    assert later(run).garbage == ()
    assert losses(run)[-1]["step"] == 30


def test_a_checkpoint_json_of_another_run_in_the_place_of_the_right_one_costs_nothing(sprites, tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    for place, seed in ((run, 0), (other, 1)):
        fit(small_job(sprites, place, seed=seed, **OPTIONS))
    newest, foreign = (max(place.glob("checkpoints/*/checkpoint.json")) for place in (run, other))
    good = newest.read_bytes()
    newest.write_bytes(foreign.read_bytes())
    assert "belongs to another run" in later(run).waiting[0].why
    newest.write_bytes(good)
    assert losses(run)[-1]["step"] == 30


def test_metrics_of_a_finished_run_stay_if_the_checkpoint_that_named_them_is_gone(sprites, tmp_path):
    run = tmp_path / "run"
    fit(small_job(sprites, run, **OPTIONS))
    before = tree(run)
    newest = sorted(run.glob("checkpoints/*/checkpoint.json"))[-1]
    good = newest.read_bytes()
    newest.unlink()
    report = later(run)
    assert report.garbage == () and "the checkpoint of its last step (30)" in report.waiting[0].why
    newest.write_bytes(good)
    assert tree(run) == before
    shutil.rmtree(run / "checkpoints")
    shutil.rmtree(run / "metrics")
    assert later(run).waiting == (), "as the documentation allows"


@pytest.mark.parametrize("kind", ["dataset", "record", "claim"])
def test_what_a_damaged_document_of_a_dataset_may_name_stays(tmp_path, kind):
    images, out = image_folder(tmp_path / "images", "train", range(4)), tmp_path / "dataset"
    shard(images, out)
    image_folder(images, "train", range(4, 8))
    assert died(lambda: shard(images, out), "record.linked:1")
    image_folder(images, "train", range(8, 12))
    shard(images, out)
    (record,) = out.glob("records/train-g000002-*")
    document = {"dataset": out / "dataset.000001.json", "record": record, "claim": out / "run.000002.json"}[kind]
    good = flipped(document)
    before = tree(out)
    if kind == "record":
        report = later(out)
        assert {item.name.split("/")[0] for item in report.garbage} <= {".tmp"}
        assert any(f"{document} is damaged" in item.why for item in report.waiting)
    else:
        with pytest.raises(DataError, match=f"{document} is damaged(.|\n)*nothing was removed"):
            later(out)
    assert tree(out) == before
    document.write_bytes(good)
    assert str(record.relative_to(out)) in {item.name for item in later(out).garbage}


@pytest.mark.parametrize("kind", ["table", "record", "claim"])
def test_what_a_damaged_document_of_a_table_may_name_stays(tmp_path, kind):
    images, data, run, out = tmp_path / "images", tmp_path / "dataset", saved_run(tmp_path / "run"), tmp_path / "table"
    shard(image_folder(images, "train", range(7)), data)
    encode(run, str(data), out)
    if kind != "table":
        (out / "table.000001.json").unlink()  # an attempt that ended before its manifest
    document = {"table": "table.000001.json", "record": "records/train-000000.json", "claim": "run.000001.json"}[kind]
    good = flipped(out / document)
    before = tree(out)
    if kind == "record":
        assert f"{out / document} is damaged" in later(out, unfinished=True).waiting[0].why
    else:
        with pytest.raises(DataError, match=f"{out / document} is damaged"):
            later(out, unfinished=True)
    assert tree(out) == before
    (out / document).write_bytes(good)
    assert (later(out, unfinished=True).garbage == ()) == (kind == "table")


@pytest.mark.parametrize("step", [5, 20, 99], ids=["older", "same step", "newer"])
def test_a_checkpoint_of_which_a_full_disk_kept_a_part_is_garbage_whatever_its_step(sprites, tmp_path, step):
    run = tmp_path / "run"
    assert died(lambda: fit(small_job(sprites, run, **OPTIONS)), "checkpoint.linked:2")
    before = tree(run)
    half = run / f"checkpoints/step-{step:08d}-0badc0de"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half of the weights")
    report = collect_garbage(str(run))
    assert report.garbage == () and any(item.what == "attempt 0badc0de" for item in report.waiting), "its process may live"
    report = later(run)
    assert f"checkpoints/{half.name}/model.safetensors" in {item.name for item in report.garbage}
    assert not half.exists() and set(tree(run)) <= set(before)
    fit(small_job(sprites, run, **OPTIONS))
    assert losses(run)[-1]["step"] == 30


def test_a_reader_that_polls_never_breaks_while_metrics_and_parts_are_collected(sprites, tmp_path):
    job = small_job(sprites, tmp_path / "run", **OPTIONS)
    store, done, wrong = open_store(tmp_path / "run"), threading.Event(), []

    def poll() -> None:
        while not done.wait(0.0005):
            try:
                last_row(store)
            except Exception as error:
                wrong.append(error)

    reader = threading.Thread(target=poll)
    reader.start()
    try:
        for number in range(3, 6):
            assert died(lambda: fit(job), f"metrics.linked:{number}")  # the child copies it
            later(tmp_path / "run")
    finally:
        done.set()
        reader.join()
    assert wrong == []
    fit(job)
    assert losses(tmp_path / "run")[-1]["step"] == 30


class Killed(BaseException):
    """The end of the collecting process."""


@pytest.mark.parametrize("unfinished", [False, True])
def test_a_collection_that_is_killed_anywhere_can_be_run_again(tmp_path, monkeypatch, unfinished):
    images, whole, first = image_folder(tmp_path / "images", "train", range(4)), tmp_path / "whole", tmp_path / "first"
    for out in (whole, first):
        shard(images, out)
    image_folder(images, "train", range(4, 10))
    for _ in range(1 if unfinished else 2):  # the second append overtakes the killed one
        died(lambda: shard(images, first), "record.linked:2" if not (first / "run.000002.json").exists() else "")
        image_folder(images, "train", range(10, 10 if unfinished else 12))
    total = len(later(first, unfinished=unfinished, dry_run=True).garbage)
    assert total > 3
    shard(images, whole)
    for allowed in range(total):
        out = tmp_path / f"killed-{allowed}"
        shutil.copytree(first, out)
        remove, count = LocalStore.remove, itertools.count()

        def dying(self: LocalStore, name: str, remove=remove, count=count, allowed=allowed) -> None:
            if next(count) == allowed:
                raise Killed
            remove(self, name)

        with monkeypatch.context() as patch:
            patch.setattr(LocalStore, "remove", dying)
            with pytest.raises(Killed):
                later(out, unfinished=unfinished)
        if allowed % 2:
            later(out, unfinished=unfinished)
        shard(images, out)
        later(out)
        assert verify_dataset(open_dataset(str(out)), read_data=True).ok
        keys = {name: data for name, data in named(out).items() if name.endswith(".tar")}
        if unfinished:
            assert keys == {name: data for name, data in named(whole).items() if name.endswith(".tar")}


def test_a_bucket_is_collected_as_a_folder_is(tmp_path, s3):
    images, out = image_folder(tmp_path / "images", "train", range(4)), tmp_path / "dataset"
    shard(images, out)
    image_folder(images, "train", range(4, 10))
    assert died(lambda: shard(images, out), "record.linked:2")
    image_folder(images, "train", range(10, 12))
    shard(images, out)
    shutil.rmtree(out / ".tmp")
    s3.upload(out, "data")
    there = collect_garbage(f"{s3.url}/data", now=time.time() + LATER)
    here = later(out)
    assert there.garbage == here.garbage
    assert s3.objects("data/") == tree(out)
    assert verify_dataset(open_dataset(f"{s3.url}/data"), read_data=True).ok
    assert collect_garbage(f"{s3.url}/data", now=time.time() + LATER).garbage == ()


@pytest.mark.parametrize("days", [2, -2])
def test_a_wrong_clock_of_this_machine_makes_nothing_old(tmp_path, monkeypatch, caplog, days):
    images, out = image_folder(tmp_path / "images", "train", range(8)), tmp_path / "dataset"
    assert died(lambda: shard(images, out), "record.linked:2")
    before, here = tree(out, without=()), time.time() + days * DAY_S
    monkeypatch.setattr(time, "time", lambda: here)
    assert collect_garbage(str(out), unfinished=True).garbage == ()
    assert tree(out, without=()) == before
    assert f"this machine's clock is 172,800 s {'ahead of' if days > 0 else 'behind'}" in caplog.text


def test_without_the_right_to_ask_the_storage_nothing_younger_than_a_week_is_old(tmp_path, monkeypatch, caplog):
    images, out = image_folder(tmp_path / "images", "train", range(8)), tmp_path / "dataset"
    assert died(lambda: shard(images, out), "record.linked:2")

    def refused(store: LocalStore) -> float:
        raise StoreError("cannot ask for the time")

    monkeypatch.setattr(LocalStore, "now", refused)
    here = time.time()
    for days, collected in ((6.9, False), (7.1, True)):
        monkeypatch.setattr(time, "time", lambda days=days: here + days * DAY_S)
        assert bool(collect_garbage(str(out), unfinished=True, dry_run=True).garbage) is collected
    assert "nothing younger than 7 days is old" in caplog.text


def test_what_a_manifest_is_about_to_name_is_looked_at(tmp_path, monkeypatch):
    images, out = image_folder(tmp_path / "images", "train", range(8)), tmp_path / "dataset"
    commit = job_module.commit_manifest

    def while_another_removes(*arguments: object, **options: object) -> int:
        gone.unlink()
        return commit(*arguments, **options)

    monkeypatch.setattr(job_module, "commit_manifest", while_another_removes)
    gone = out / "shards/train-000001.tar"
    with pytest.raises(DataError, match=r"train-000001\.tar is missing"):
        shard(images, out)
    assert not list(out.glob("dataset.*.json"))
    shutil.rmtree(out)
    monkeypatch.undo()
    shard(images, out)
    image_folder(images, "train", range(8, 12))
    monkeypatch.setattr(job_module, "commit_manifest", while_another_removes)
    gone = out / "shards/train-000000.parquet"  # of the generation before
    with pytest.raises(DataError, match=r"train-000000\.parquet is gone"):
        shard(images, out)
    assert [path.name for path in out.glob("dataset.*.json")] == ["dataset.000001.json"]


def test_a_run_of_a_hundred_million_steps_is_ours(tmp_path):
    """Names of checkpoints and metrics have one pattern for who reads, verifies and collects them."""
    run = open_store(saved_run(tmp_path / "run", seed=123_456_789))
    run.put(CLAIM, sealed({"kind": "run", "claim": 1, "identity": {}, "info": {}}), role="run")
    part = run.put("metrics/00000001-123456789-aa.jsonl", b"{}\n", role="metrics")
    assert [step for step, _ in committed_checkpoints(run)] == [123_456_789]
    assert verify_checkpoint(run, "checkpoints/step-123456789-aa").step == 123_456_789
    report = collect_garbage(run.url)
    assert report.not_ours == ()
    assert part.name not in [item.name for item in report.garbage]
