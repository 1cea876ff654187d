"""What listing, planning, comparing and appending take a sample, from 10^5 to 10^6 samples (10^7: `BENCH_SAMPLES=1e7`), on one core.

`python -m tests.benchmarks scale`. The source is a folder of `.npy` files, whose rows are samples without files of their own. Each row is
a process of its own; time is CPU time of all its threads, memory the peak of RssAnon and RssShmem, imports included: pages of mapped
scratch files are the kernel's. The ratio is that of the time a sample to the smallest number of samples: 1 is linear.
"""

import json
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from aecore.data.sources.arrays import ArraysSpec
from aecore.data.write.job import shard_dataset
from aecore.data.write.spec import ShardSpec
from aecore.native import processor
from pipelines.cluster.memory import disable_malloc_trim

SIZES = (100_000, 1_000_000)
SHARDS = ShardSpec(max_samples=100_000)
ASKED_US, ASKED_MIB = 20, 1000
HEADER = """\
| what | samples | us a sample | ratio to the fewest | peak MiB | processor |
|---|--:|--:|--:|--:|---|"""


def source(folder: Path) -> ArraysSpec:
    return ArraysSpec(url=str(folder / "source"))


def list_and_plan(folder: Path) -> None:
    shard_dataset(source(folder), str(folder / "other"), shards=SHARDS, dry_run=True)


def write(folder: Path) -> None:
    shard_dataset(source(folder), str(folder / "data"), shards=SHARDS)


WORK: dict[str, Callable[[Path], None]] = {
    "list and plan a new dataset": list_and_plan,
    "write it": write,
    "run again, nothing changed": write,
    "append 1 %": write,
}


def memory_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:"))) / 1024


def measured(work: Callable[[Path], None], folder: Path) -> None:
    """Run `work` in this process, and leave its CPU time and its peak memory in the folder."""
    disable_malloc_trim()
    peak, ended = [0.0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.01):
            peak[0] = max(peak[0], memory_mib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begun = time.process_time()
    work(folder)
    seconds = time.process_time() - begun
    ended.set()
    watcher.join()
    (folder / "measured.json").write_text(json.dumps([seconds, peak[0]]))


def rows_of(count: int, folder: Path) -> list[tuple[str, float, float]]:
    """Return seconds and peak memory of each work on so many samples."""
    (folder / "source").mkdir(parents=True)
    np.lib.format.open_memmap(folder / "source/a.npy", "w+", np.uint8, (count, 2))
    time.sleep(2.1)  # from then on its state is known
    found = []
    for name, work in WORK.items():
        if name.startswith("append"):
            np.lib.format.open_memmap(folder / "source/b.npy", "w+", np.uint8, (count // 100, 2))
            time.sleep(2.1)
        child = multiprocessing.get_context("spawn").Process(target=measured, args=(work, folder))
        child.start()
        child.join()
        assert child.exitcode == 0, name
        found.append((name, *json.loads((folder / "measured.json").read_text())))
    return found


def main() -> None:
    print(HEADER, flush=True)
    most = int(float(os.environ.get("BENCH_SAMPLES", SIZES[-1])))
    first: dict[str, float] = {}
    for count in [size for size in SIZES if size < most] + [most]:
        folder = Path(tempfile.mkdtemp(prefix="aecore-scale-"))
        try:
            for name, seconds, peak in rows_of(count, folder):
                cost = 1e6 * seconds / count
                first.setdefault(name, cost)
                marked = f"**{cost:.1f}**" if name != "write it" and cost > ASKED_US else f"{cost:.1f}"
                memory = f"**{peak:.0f}**" if peak > ASKED_MIB else f"{peak:.0f}"
                print(f"| {name} | {count:,} | {marked} | {cost / first[name]:.2f} | {memory} | {processor().name} |", flush=True)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
