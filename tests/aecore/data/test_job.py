import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from aecore.artifact.fanout import serial
from aecore.data.dataset import open_dataset, read_listings
from aecore.data.format.index import read_table, table_bytes
from aecore.data.read.verify import verify_dataset
from aecore.data.sources import Listing
from aecore.data.sources.folder import FolderSpec
from aecore.data.sources.sprites import SpritesSpec
from aecore.data.write.append import listing_table
from aecore.data.write.job import ShardWorker, shard_dataset
from aecore.data.write.ledger import read_ledger
from aecore.data.write.plan import PlanSummary
from aecore.data.write.spec import ShardSpec
from aecore.data.write.splits import SplitSpec
from aecore.errors import ConfigError, DataError, RunFailed, StoreError
from aecore.store import _states, open_store
from aecore.store._environment import FAULT_STAGES
from tests.aecore.data.before import grows_only
from tests.aecore.data.tiny import encoded, image

ROLES = ("tar", "index", "quarantine", "listing", "record", "run", "manifest")


def images(root, numbers, label=lambda number: "ab"[number % 2], bad=()):
    """Write `label/number.png`; those in `bad` are cut in half."""
    for number in numbers:
        path = root / label(number) / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        data = encoded(image(number))
        path.write_bytes(data[: len(data) // 2] if number in bad else data)
    return FolderSpec(url=str(root))


def shard(source, out, splits=None, fan_out=serial, **shards):
    return shard_dataset(source, str(out), splits, ShardSpec(**shards), fan_out=fan_out)


def snapshot(root):
    """Every committed file with its bytes; what records and reports say of times (also of young states of source files) is left out."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_file() and not name.startswith(".tmp/"):
            data = path.read_bytes()
            if name.startswith("report/"):
                data = {**json.loads(data), "seconds": None, "sha256": None} if name.endswith(".json") else b""
            if name.startswith("records/"):
                data = {**json.loads(data), "timings": None, "sha256": None}
                data["detail"].pop("unsettled", None)
            found[name] = data
    return found


def keys_of(dataset):
    return sorted(key for part in dataset.manifest.shards for key in dataset.reader(part).keys)


def backwards(make_worker, tasks):
    """A fan-out that gives every task its own worker and finishes in the opposite order."""
    for task in reversed(tasks):
        yield from serial(pickle.loads(pickle.dumps(make_worker)), [pickle.loads(pickle.dumps(task))])


def test_a_folder_becomes_a_data_set_with_every_sample_once(tmp_path):
    made = shard(images(tmp_path / "in", range(10)), tmp_path / "out", SplitSpec(val=0.3), max_samples=3)
    dataset = open_dataset(str(tmp_path / "out"))
    assert dataset.manifest == made
    assert keys_of(dataset) == sorted(f"{'ab'[number % 2]}/{number:03d}" for number in range(10))
    assert made.classes == ("a", "b")
    assert dataset.input_shape() == (1, 4, 4)
    assert verify_dataset(dataset, read_data=True).ok


def test_bytes_do_not_depend_on_who_writes_the_shards(tmp_path):
    source = images(tmp_path / "in", range(12), bad=[5])
    made = [
        shard(source, tmp_path / name, None, fan_out, max_samples=4, max_bad=1.0) for name, fan_out in (("a", serial), ("b", backwards))
    ]
    assert made[0] == made[1]
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")


def test_addresses_do_not_change_the_bytes(tmp_path, monkeypatch):
    first, second = images(tmp_path / "in", range(4)), images(tmp_path / "elsewhere/in", range(4))
    monkeypatch.chdir(tmp_path)
    made = [shard(first, tmp_path / "a"), shard(FolderSpec(url="elsewhere/in"), "b")]
    assert len({manifest.claim_sha256 for manifest in made}) == 2, "a claim covers where samples come from"
    assert len({manifest.dataset_sha256 for manifest in made}) == len({manifest.content_sha256 for manifest in made}) == 1
    named = [name for name in snapshot(tmp_path / "a") if name.startswith(("shards/", "records/"))]  # a listing says where they come from
    assert {name: snapshot(tmp_path / "a")[name] for name in named} == {name: snapshot(tmp_path / "b")[name] for name in named}
    assert json.loads((tmp_path / "b/run.000001.json").read_text())["info"]["source"]["url"] == second.url


def test_doing_it_again_changes_nothing(tmp_path):
    source = images(tmp_path / "in", range(6), bad=[3])
    made = shard(source, tmp_path / "out", max_bad=0.5)
    before = snapshot(tmp_path / "out")
    assert shard(source, tmp_path / "out", max_bad=0.5) == made
    assert snapshot(tmp_path / "out") == before


def test_an_append_writes_the_new_samples_as_the_next_generation(tmp_path):
    source = images(tmp_path / "in", range(6))
    first = shard(source, tmp_path / "out", max_samples=4)
    images(tmp_path / "in", range(6, 9), label=lambda number: "0new")
    second = shard(source, tmp_path / "out", max_samples=4)
    assert (second.number, second.parent, second.parent_sha256) == (2, 1, first.dataset_sha256)
    assert [part.stem for part in second.shards] == ["train-000000", "train-000001", "train-g000002-000000"]
    assert (second.shards[-1].first_ordinal, second.shards[-1].samples) == (6, 3)
    assert second.classes == ("a", "b", "0new")
    dataset = open_dataset(str(tmp_path / "out"))
    assert len(set(keys_of(dataset))) == 9
    assert verify_dataset(dataset, read_data=True).ok
    assert open_dataset(str(tmp_path / "out"), 1).manifest == first


def test_another_folder_of_the_same_kind_can_be_appended(tmp_path):
    shard(images(tmp_path / "monday", range(3)), tmp_path / "out")
    made = shard(images(tmp_path / "tuesday", range(3, 5)), tmp_path / "out")
    assert (made.number, made.num_samples()) == (2, 5)


def test_other_settings_are_refused_with_the_fields_and_nothing_is_written(tmp_path):
    source = images(tmp_path / "in", range(4))
    shard(source, tmp_path / "out", max_samples=2)
    before = snapshot(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"(?s)shards.max_samples: there 2, asked 3.*splits.by: there 'none', asked 'hash'"):
        shard(source, tmp_path / "out", SplitSpec(val=0.5), max_samples=3)
    with pytest.raises(ConfigError, match=r"source.kind: there 'folder', asked 'sprites'"):
        shard(SpritesSpec(positions=2), tmp_path / "out", max_samples=2)
    assert snapshot(tmp_path / "out") == before


def test_where_a_dataset_only_grows_a_sample_that_changed_is_a_data_error_and_nothing_is_written(tmp_path):
    source = images(tmp_path / "in", range(8), bad=[1])
    shard(source, tmp_path / "out", max_bad=0.5)
    grows_only(tmp_path / "out")
    before = snapshot(tmp_path / "out")
    for number in (1, 2, 3):
        (tmp_path / "in" / "ab"[number % 2] / f"{number:03d}.png").write_bytes(encoded(image(number, side=9)))
    images(tmp_path / "in", [20])
    with pytest.raises(DataError, match=r"3 samples have other sizes than .*'a/002.png', 'b/001.png', 'b/003.png'\. A dataset only grows"):
        shard(source, tmp_path / "out", max_bad=0.5)
    assert snapshot(tmp_path / "out") == before


def test_where_a_dataset_only_grows_a_file_that_gives_a_known_one_another_key_is_a_data_error(tmp_path):
    source = images(tmp_path / "in", range(2))
    shard(source, tmp_path / "out")
    grows_only(tmp_path / "out")
    (tmp_path / "in/a/000.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match=r"1 sample has another key .*'a/000.png'"):
        shard(source, tmp_path / "out")


def test_where_a_dataset_only_grows_known_keys_from_another_address_give_a_warning(tmp_path, caplog):
    monday, tuesday = images(tmp_path / "monday", range(4)), images(tmp_path / "tuesday", range(4))
    shard(monday, tmp_path / "out")
    grows_only(tmp_path / "out")
    shard(monday, tmp_path / "out")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    for extra in ((), [7]):  # nothing new, and an append
        images(tmp_path / "tuesday", extra)
        shard(tuesday, tmp_path / "out")
        (warning,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
        assert warning.levelno == logging.WARNING
        assert f"4 samples of {tuesday.url} have the keys of samples that came from {monday.url}" in caplog.text
        assert "compared by key and size only" in caplog.text
        caplog.clear()
    shard(images(tmp_path / "wednesday", [8, 9]), tmp_path / "out")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_file_that_grew_between_listing_and_reading_is_no_change(tmp_path):
    source, path = images(tmp_path / "in", range(4)), tmp_path / "in/a/002.png"

    def grows(make_worker, tasks):
        path.write_bytes(encoded(image(2, side=9)))
        yield from serial(make_worker, tasks)

    made = shard(source, tmp_path / "out", SplitSpec(), grows)
    assert shard(source, tmp_path / "out") == made
    made = grows_only(tmp_path / "out")
    assert shard(source, tmp_path / "out") == made
    path.write_bytes(encoded(image(2, side=20)))
    with pytest.raises(DataError, match="1 sample has other sizes"):
        shard(source, tmp_path / "out")


def test_an_append_of_another_shape_gives_a_warning(tmp_path, caplog):
    source = images(tmp_path / "in", range(4))
    shard(source, tmp_path / "out")
    images(tmp_path / "in", [4])
    shard(source, tmp_path / "out")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    for number in (5, 6):  # only the first of them is news
        (tmp_path / f"in/a/{number:03d}.png").write_bytes(encoded(image(number, side=9)))
        made = shard(source, tmp_path / "out")
    (warning,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert warning.levelno == logging.WARNING
    assert "4x4x1/L (5), 9x9x1/L (1)" in caplog.text and "shards.resize=" in caplog.text
    assert (made.number, made.num_samples()) == (4, 7)


def test_quarantined_samples_are_not_tried_again(tmp_path):
    source = images(tmp_path / "in", range(10), bad=[2, 4])
    first = shard(source, tmp_path / "out", max_bad=0.5)
    assert (first.num_samples(), first.quarantined, sum(first.reasons.values())) == (8, 2, 2)
    assert read_ledger(open_store(tmp_path / "out"), first).num_rows == 10
    grows_only(tmp_path / "out")
    images(tmp_path / "in", [10])
    second = shard(source, tmp_path / "out", max_bad=0.0)
    assert (second.num_samples(), second.quarantined, second.shards[-1].planned) == (9, 2, 1)
    assert read_listings(open_store(tmp_path / "out"), second).num_rows == 11


def test_a_shard_of_nothing_but_bad_samples_is_in_quarantine_only(tmp_path):
    source = images(tmp_path / "in", range(6), bad=[0, 2, 4], label=lambda number: "ab"[number % 2])
    made = shard(source, tmp_path / "out", max_samples=3, shuffle=False, max_bad=0.5)
    assert [part.stem for part in made.rejected] == ["train-000000"]
    assert [(part.stem, part.first_ordinal) for part in made.shards] == [("train-000001", 3)]
    assert verify_dataset(open_dataset(str(tmp_path / "out")), read_data=True).ok
    assert shard(source, tmp_path / "out", max_samples=3, shuffle=False, max_bad=0.5) == made


def test_too_many_bad_samples_give_no_manifest_and_the_parts_are_kept(tmp_path):
    source = images(tmp_path / "in", range(10), bad=[1, 3])
    with pytest.raises(
        DataError, match=r"(?s)2 of 10 samples are bad, more than shards.max_bad=0.1.*b/001.png: .*quarantine/train-000000.parquet"
    ) as raised:
        shard(source, tmp_path / "out", max_samples=5, max_bad=0.1)
    assert raised.value.exit_code == 3
    with pytest.raises(DataError, match="unfinished run"):
        open_dataset(str(tmp_path / "out"))
    kept = snapshot(tmp_path / "out")
    assert kept.pop("listings/000001.refused") == b""
    made = shard(source, tmp_path / "out", max_samples=5, max_bad=0.2)
    assert made.quarantined == 2
    assert {name: data for name, data in snapshot(tmp_path / "out").items() if name in kept} == kept


def test_a_dry_run_counts_and_writes_nothing(tmp_path):
    source = images(tmp_path / "in", range(6))
    out = str(tmp_path / "out")
    summary = shard_dataset(source, out, SplitSpec(), ShardSpec(max_samples=4), dry_run=True)
    assert isinstance(summary, PlanSummary)
    assert (dict(summary.samples), dict(summary.shards), summary.known) == ({"train": 6}, {"train": 2}, 0)
    assert summary.notes[0] == "splits.by=auto chose none"
    assert not Path(out).exists()
    shard(source, out)
    images(tmp_path / "in", [7, 8])
    summary = shard_dataset(source, out, dry_run=True)
    assert (dict(summary.samples), summary.known) == ({"train": 2}, 6)
    assert open_dataset(out).manifest.number == 1


def test_progress_is_reported_and_the_choices_are_logged(tmp_path, caplog):
    seen = []
    with caplog.at_level(logging.INFO):
        shard_dataset(
            images(tmp_path / "in", range(5)),
            str(tmp_path / "out"),
            None,
            ShardSpec(max_samples=2),
            on_part=lambda record, done, total: seen.append((record.part, record.rows, done, total)),
        )
    assert seen == [("train-000000", 2, 1, 3), ("train-000001", 2, 2, 3), ("train-000002", 1, 3, 3)]
    assert "splits.by=auto chose none" in caplog.text
    assert "generation 1, 5 new samples, 0 quarantined" in caplog.text


def test_a_part_that_fails_leaves_the_rest_for_the_rerun(tmp_path):
    source = images(tmp_path / "in", range(6))
    calls = []

    class Failing(ShardWorker):
        def __call__(self, task):
            calls.append(task.stem)
            if task.stem == "train-000001" and len(calls) < 4:
                raise OSError("the disk is gone")
            return super().__call__(task)

    def failing(make_worker, tasks):
        yield from serial(lambda: Failing(*make_worker.args), tasks)

    with pytest.raises(StoreError, match=r"1 of 3 shards failed:\n  train-000001: StoreError: .*: the disk is gone; "):
        shard(source, tmp_path / "out", None, failing, max_samples=2)
    assert sorted(path.stem for path in tmp_path.glob("out/records/*")) == ["train-000000", "train-000002"]
    made = shard(source, tmp_path / "out", None, failing, max_samples=2)
    shard(source, tmp_path / "whole", max_samples=2)
    assert made.num_samples() == 6
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


def test_two_appends_at_once_one_is_told_to_run_again(tmp_path):
    images(tmp_path / "in", range(3))
    source = FolderSpec(url=str(tmp_path / "in"))
    shard(source, tmp_path / "out")
    other = images(tmp_path / "other", [10])
    images(tmp_path / "in", [20])

    def meanwhile(make_worker, tasks):
        shard(other, tmp_path / "out")
        yield from serial(make_worker, tasks)

    with pytest.raises(RunFailed, match="another append was committed"):
        shard(source, tmp_path / "out", None, meanwhile)
    made = shard(source, tmp_path / "out")
    assert (made.number, made.num_samples()) == (3, 5)
    assert verify_dataset(open_dataset(str(tmp_path / "out")), read_data=True).ok


def test_of_two_commands_with_other_settings_at_once_one_is_told_what_is_there_now(tmp_path):
    source = images(tmp_path / "in", range(6))

    def meanwhile(make_worker, tasks):
        shard(source, tmp_path / "out", max_samples=2)
        yield from serial(make_worker, tasks)

    with pytest.raises(ConfigError) as refused:
        shard(source, tmp_path / "out", None, meanwhile, max_samples=3)
    with pytest.raises(ConfigError) as again:
        shard(source, tmp_path / "out", max_samples=3)
    assert str(refused.value) == f"another command committed dataset.000001.json while this one ran: {again.value}"
    assert "shards.max_samples: there 2, asked 3\nwrite to another URL" in str(again.value)
    assert verify_dataset(open_dataset(str(tmp_path / "out"))).samples == 6


def test_of_two_commands_with_other_samples_at_once_one_appends_when_it_is_repeated(tmp_path):
    source, other = images(tmp_path / "in", range(3)), images(tmp_path / "other", range(10, 14))

    def meanwhile(make_worker, tasks):
        shard(other, tmp_path / "out")
        yield from serial(make_worker, tasks)

    with pytest.raises(RunFailed, match="another command committed the same place as dataset.000001.json while this one ran; run the same"):
        shard(source, tmp_path / "out", None, meanwhile)
    assert shard(source, tmp_path / "out").num_samples() == 7


def test_sprites_carry_their_factors_into_the_index(tmp_path):
    made = shard(SpritesSpec(size=16, positions=3, scales=2), tmp_path / "out", SplitSpec(by="hash", val=0.2))
    assert made.classes == ("ellipse", "heart", "square")
    dataset = open_dataset(str(tmp_path / "out"))
    assert dataset.input_shape() == (1, 16, 16)
    for row in dataset.reader(made.shards[0]).index.to_pylist():
        assert f"x{row['factor_x']:03d}-y{row['factor_y']:03d}" in row["key"]


LOOP = """
import os, sys
import pyarrow
from aecore.data.write.job import shard_dataset
from aecore.data.sources.folder import FolderSpec
from aecore.data.write.spec import ShardSpec
from aecore.store import _states
_states.YOUNG_NS = -(10**12)  # no file is too young to have a state
assert not {"torch", "ray", "prefect", "PIL"} & set(sys.modules)
pyarrow.array(["x"])  # loads pandas where it is installed, 0.5 s: here once, not in every child

def run(out):
    try:
        shard_dataset(FolderSpec(url=sys.argv[1]), out, None, ShardSpec(max_samples=3, max_bad=0.5, shuffle=False))
    except BaseException as error:
        os.write(2, repr(error).encode())
        os._exit(9)
    os._exit(0)

for fault in sys.stdin.read().split():  # one interpreter forks all the processes that get killed
    ends = []
    for asked in (fault, ""):
        child = os.fork()
        if not child:
            os.environ["AECORE_FAULT"] = asked
            run(os.path.join(sys.argv[2], fault))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        ends.append(status)
    print(fault, *ends, flush=True)
"""


def poll(root, done, wrong):
    """What a reader sees while processes die: no dataset, or a whole one."""
    while not done.wait(0.02):
        for url in root.glob("*"):
            try:
                dataset = open_dataset(str(url))
            except DataError as error:
                wrong += [] if "holds no dataset" in str(error) or "holds an unfinished run" in str(error) else [str(error)]
                continue
            wrong += verify_dataset(dataset).problems


def test_killed_anywhere_the_same_command_gives_the_same_bytes(tmp_path, monkeypatch):
    source, root = images(tmp_path / "in", range(8), bad=[0, 7]), tmp_path / "killed"
    root.mkdir()
    monkeypatch.setattr(_states, "YOUNG_NS", -(10**12))
    whole = shard(source, tmp_path / "whole", max_samples=3, max_bad=0.5, shuffle=False)
    assert (len(whole.shards), whole.quarantined, sum(part.quarantine is not None for part in whole.shards)) == (3, 2, 2)
    faults = [f"{role}.{stage}:{nth}" for role in ROLES for stage in FAULT_STAGES for nth in (1, 2)]
    once = {fault for fault in faults if fault.endswith(":2") and fault.split(".")[0] in ("listing", "run", "manifest")}
    done, wrong = threading.Event(), []
    reader = threading.Thread(target=poll, args=(root, done, wrong))
    reader.start()
    try:
        ran = subprocess.run(
            [sys.executable, "-W", "error", "-c", LOOP, source.url, str(root)],
            input=" ".join(faults),
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        done.set()
        reader.join()
    assert (ran.returncode, ran.stderr) == (0, "")
    ends = {name: (int(first), int(second)) for name, first, second in (line.split() for line in ran.stdout.splitlines())}
    assert ends == {fault: (0 if fault in once else -signal.SIGKILL, 0) for fault in faults}
    assert wrong == []
    expected = snapshot(tmp_path / "whole")
    for fault in faults:
        assert snapshot(root / fault) == expected, fault
    assert open_dataset(str(root / faults[0])).manifest == whole
    assert os.listdir(root / faults[0] / ".tmp")  # what a killed process leaves is under .tmp only


@pytest.mark.parametrize("count", [70_000, 300_000])
def test_a_listing_of_numbered_keys_and_one_size_is_within_its_bounds(count):
    keys = [f"digits/{number:09d}" for number in range(count)]  # less than a byte a row
    table = listing_table(Listing(keys, keys, np.full(count, 784)))
    assert read_table(table_bytes(table, {}), "listing").equals(table)


def warnings_of_orphans(caplog):
    found = [record.getMessage() for record in caplog.records if "without a manifest" in record.getMessage()]
    caplog.clear()
    return found


@pytest.mark.parametrize("place", ["folder", "bucket"])
def test_shards_whose_manifests_were_lost_are_counted_before_new_ones_hide_them(tmp_path, caplog, request, place):
    out = str(tmp_path / "out") if place == "folder" else f"{request.getfixturevalue('s3').url}/out"
    store = open_store(out)
    source = images(tmp_path / "in", range(10), bad=[2])
    shard(source, out, max_samples=5, max_bad=0.5)
    images(tmp_path / "in", [10, 11])
    shard(source, out, max_samples=5, max_bad=0.5)
    assert warnings_of_orphans(caplog) == []
    there = {f"{folder}/{name}": store.read(f"{folder}/{name}") for folder in ("shards", "quarantine") for name in store.list(folder)}
    for number in (1, 2):
        store.remove(f"dataset.{number:06d}.json")
    images(tmp_path / "in", [12])
    shard_dataset(source, out, SplitSpec(), ShardSpec(max_samples=5, max_bad=0.5), dry_run=True)
    warnings_of_orphans(caplog)
    made = shard(source, out, max_samples=5, max_bad=0.5)
    (warning,) = warnings_of_orphans(caplog)
    assert f"{len(there)} files ({sum(map(len, there.values()))} bytes; first: shards/train-000000.parquet) are there without" in warning
    assert made.num_samples() == 12
    assert {name: store.read(name) for name in there} == there
    shard(source, out, max_samples=5, max_bad=0.5)
    assert warnings_of_orphans(caplog) == []


def test_an_attempt_that_is_continued_and_manifests_that_come_again_are_no_orphans(tmp_path, caplog):
    source = images(tmp_path / "in", range(10))
    first = shard(source, tmp_path / "out", max_samples=5)
    manifest = tmp_path / "out/dataset.000001.json"
    before = manifest.read_bytes()
    manifest.unlink()
    assert shard(source, tmp_path / "out", max_samples=5) == first
    assert manifest.read_bytes() == before and warnings_of_orphans(caplog) == []
