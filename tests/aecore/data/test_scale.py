"""Large datasets: what is in scratch files gives the same as what is in memory, and memory does not grow with the texts of samples."""

import dataclasses
import json
import os
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from aecore.data.dataset import open_dataset
from aecore.data.format import spill
from aecore.data.read.verify import verify_dataset
from aecore.data.sources import Listing
from aecore.data.sources.arrays import ArraysSpec
from aecore.data.sources.folder import FolderSpec
from aecore.data.write.job import shard_dataset
from aecore.data.write.ledger import read_known, read_ledger
from aecore.data.write.plan import plan_dataset
from aecore.data.write.report import read_report
from aecore.data.write.spec import ShardSpec
from aecore.data.write.splits import SplitSpec
from aecore.native.texts import Texts
from tests.aecore.data.tiny import encoded, image
from tests.processes import run

SHARDS = ShardSpec(max_samples=4, max_removed=1.0, max_bad=1.0)


@pytest.fixture
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of more than four rows are in scratch files, three rows at a time."""
    monkeypatch.setattr(spill, "LARGE", 4)
    monkeypatch.setattr(spill, "BUCKET", 3)


def put(root: Path, files: dict[str, int]) -> FolderSpec:
    shutil.rmtree(root, ignore_errors=True)
    for name, number in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(image(number)) if number >= 0 else b"no image")
    return FolderSpec(url=str(root))


def generations() -> list[dict[str, int]]:
    """What a source holds, run by run: samples are added, changed, relabelled, renamed, damaged, repaired and removed."""
    first = {f"{'cat' if number % 3 else 'dog'}/{number:02d}.png": number for number in range(20)}
    second = {name: number + 100 * (number == 4) for name, number in first.items() if number % 7} | {"cat/new.png": 30, "é/a.png": 31}
    third = {name.replace("dog/", "wolf/"): number for name, number in second.items()} | {"cat/01.png": -1}
    return [first, second, third, first]


def state_of(out: Path) -> dict[str, Any]:
    """All that a dataset says of its samples, and the bytes of its shards."""
    dataset = open_dataset(str(out))
    ledger = read_ledger(dataset.store, dataset.manifest).drop_columns(["state", "origin"])
    manifest = {name: value for name, value in dataset.manifest.to_json().items() if name not in ("listings", "claim_sha256", "sha256")}
    return {
        "manifest": json.dumps(manifest, sort_keys=True),
        "ledger": ledger.sort_by([("split", "ascending"), ("ordinal", "ascending")]).to_pylist(),
        "files": {path.name: path.read_bytes() for folder in ("shards", "removed") for path in sorted((out / folder).glob("*"))},
    }


def history(root: Path, source: Path, splits: SplitSpec) -> list[dict[str, Any]]:
    found = []
    for files in generations():
        shard_dataset(put(source, files), str(root), splits, SHARDS)
        found.append(state_of(root))
    assert verify_dataset(open_dataset(str(root)), read_data=True).problems == ()
    return found


@pytest.mark.parametrize("splits", [SplitSpec(), SplitSpec(val=0.3, seed=1)], ids=["one split", "two splits"])
def test_a_dataset_in_scratch_files_is_the_one_in_memory(tmp_path: Path, request: pytest.FixtureRequest, splits: SplitSpec) -> None:
    expected = history(tmp_path / "memory", tmp_path / "source", splits)
    request.getfixturevalue("small_buckets")
    assert history(tmp_path / "files", tmp_path / "source", splits) == expected


@pytest.mark.parametrize(
    ("splits", "shards"),
    [
        (SplitSpec(by="hash", val=0.4, seed=3), {"duplicates": "drop"}),
        (SplitSpec(by="hash", val=0.4, seed=3, leaks="drop"), {}),
        (SplitSpec(by="hash", val=0.4, seed=3, leaks="drop"), {"duplicates": "drop"}),
        (SplitSpec(by="content", val=0.4), {"duplicates": "drop"}),
    ],
    ids=["duplicates", "leaks", "both", "by content"],
)
def test_what_is_left_out_in_scratch_files_is_what_is_in_memory(
    tmp_path: Path, request: pytest.FixtureRequest, splits: SplitSpec, shards: dict[str, Any]
) -> None:
    spec = dataclasses.replace(SHARDS, **shards)

    def runs(out: Path) -> list[Any]:
        found = list[Any]()
        for files in generations():
            few = {name: number % 9 if 0 <= number < 100 else number for name, number in files.items()}
            shard_dataset(put(tmp_path / "source", few), str(out), splits, spec)
            dataset = open_dataset(str(out))
            left = read_known(dataset.store, dataset.manifest)[1].drop_columns(["state", "origin"])
            report = {**(read_report(dataset) or {}), "seconds": 0, "manifest_sha256": ""}
            found.append((sorted(left.to_pylist(), key=str), report, state_of(out)))
        assert verify_dataset(open_dataset(str(out)), read_data=True).problems == ()
        return found

    expected = runs(tmp_path / "memory")
    assert any(left for left, _, _ in expected)
    request.getfixturevalue("small_buckets")
    assert runs(tmp_path / "files") == expected


def test_keys_of_one_number_are_told_apart(tmp_path: Path, small_buckets: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers of keys are compared before the keys are: all with the same number are the worst that may happen."""
    expected = history(tmp_path / "one", tmp_path / "source", SplitSpec())
    monkeypatch.setattr(Texts, "numbers", lambda self: np.array([len(text) % 2 for text in self], np.int64))
    assert history(tmp_path / "two", tmp_path / "source", SplitSpec()) == expected


def test_rows_of_arrays_are_followed_in_scratch_files(tmp_path: Path, small_buckets: None) -> None:
    rows = np.arange(60, dtype=np.uint8).reshape(20, 3)
    np.save(tmp_path / "x.npy", rows)
    np.save(tmp_path / "y.npy", np.arange(20) % 3)
    source, out = ArraysSpec(url=str(tmp_path / "x.npy")), str(tmp_path / "out")
    assert shard_dataset(source, out, shards=SHARDS).statistics["train"].samples == 20
    np.save(tmp_path / "y.npy", np.arange(20) % 2)
    np.save(tmp_path / "x.npy", np.concatenate([rows[:10] + 1, rows[10:]]))
    made = shard_dataset(source, out, shards=SHARDS)
    fresh = shard_dataset(source, str(tmp_path / "fresh"), shards=SHARDS)
    assert made.content_sha256 == fresh.content_sha256


@pytest.mark.parametrize("rows", [[], [3], [5, 6, 7], [9, 0, 9, 4, 4, 1], [*range(10)], [*range(9, -1, -1)]], ids=str)
def test_rows_are_taken_as_arrow_takes_them(rows: list[int], small_buckets: None) -> None:
    table = pa.table({"text": [f"{number}é" for number in range(10)], "number": pa.array([None, *range(9)], pa.int64())})
    taken = spill.take_rows(spill.spilled([table.slice(0, 4), table.slice(4)], table.schema), np.array(rows, np.int64))
    assert taken.equals(table.take(pa.array(rows, pa.int64()))) or taken.to_pylist() == table.take(pa.array(rows, pa.int64())).to_pylist()
    mask = np.isin(np.arange(10), rows)
    assert spill.filtered(table, mask).to_pylist() == table.filter(pa.array(mask)).to_pylist()


def test_nothing_is_left_in_the_scratch_folder(tmp_path: Path, small_buckets: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "scratch").mkdir(mode=0o700)
    for files in generations():
        shard_dataset(put(tmp_path / "source", files), str(tmp_path / "out"), shards=SHARDS)
    assert [path for path in (tmp_path / "scratch").rglob("*") if path.is_file()] == []


def test_a_task_that_is_sent_has_its_own_rows_alone() -> None:
    """A worker gets the rows of its shard: before, and now, a slice of a large column must not bring the whole column."""
    texts = Texts.of([f"{number:0100d}" for number in range(10_000)])
    values = pa.array(texts.tolist())
    listing = Listing(texts, texts, np.ones(len(texts), np.int64), columns={"name": values, "chunks": pa.chunked_array([values])})
    plan = plan_dataset(listing, SplitSpec(), ShardSpec(max_samples=10, shuffle=False), None, 1, None)
    sent = pickle.dumps(plan.tasks[500])
    assert len(sent) < 20_000
    task = pickle.loads(sent)
    assert task.keys == task.columns["name"].to_pylist() == task.columns["chunks"].to_pylist() == texts[5000:5010]


MEASURED = """
import sys, threading, time
import numpy as np
from aecore.data.format import spill
spill.LARGE, spill.BUCKET = 1 << 14, 1 << 13
from aecore.data.sources.arrays import ArraysSpec
from aecore.data.write.job import shard_dataset
from aecore.data.write.spec import ShardSpec
from tests.aecore.data.test_scale import memory_kib
path, out, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
np.lib.format.open_memmap(path, "w+", np.uint8, (count, 2))
time.sleep(2.1)  # then the file has a state
spec = ArraysSpec(url=path)
shard_dataset(spec, out + "/warm", shards=ShardSpec(max_samples=2000), dry_run=True)
peak, ended = 0, threading.Event()
def watch():
    global peak
    while not ended.wait(0.005):
        peak = max(peak, memory_kib())
threading.Thread(target=watch, daemon=True).start()
begun = memory_kib()
shard_dataset(spec, out + "/data", shards=ShardSpec(max_samples=2000))
shard_dataset(spec, out + "/data", shards=ShardSpec(max_samples=2000))
ended.set()
print(peak - begun)
"""


def memory_kib() -> int:
    """Return the memory of this process that is not the pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


def test_memory_grows_by_few_bytes_a_sample(tmp_path: Path) -> None:
    """Two sizes are compared, so what a process has anyway is not counted; a row of the listing has some 300 bytes, and is not held."""
    small, large = 20_000, 60_000
    peaks = []
    for count in (small, large):
        out = tmp_path / str(count)
        out.mkdir()
        done = run(
            [sys.executable, "-c", MEASURED, str(out / "x.npy"), str(out), str(count)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=True,
        )
        peaks.append(int(done.stdout.split()[-1]))
    assert (peaks[1] - peaks[0]) * 1024 / (large - small) < 300, peaks
