"""Compare two ways of doing the same work fairly on a machine that is not quiet.

Both sides run in turn, pair by pair, the first side of a pair changing each time, so a slow minute hits both. The ratio of each
pair is taken before the median: that is steadier than the ratio of two medians. Peak memory comes from a further run of each.
"""

import gc
import multiprocessing
import os
import pickle
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aecore.fanout import MakeWorker, Outcome, Worker, attempt

Side = Callable[[], object]


@dataclass(frozen=True)
class Pairs:
    """Seconds of both sides, pair by pair, for `units` units of work; peaks in MiB are 0 where they were not measured."""

    name: str
    units: int
    ours_s: tuple[float, ...]
    theirs_s: tuple[float, ...]
    ours_peak_mib: float = 0.0
    theirs_peak_mib: float = 0.0

    @property
    def ratio(self) -> float:
        """How many times as fast as the other side ours is: the median over the pairs."""
        return statistics.median(theirs / ours for ours, theirs in zip(self.ours_s, self.theirs_s, strict=True))

    @property
    def spread(self) -> tuple[float, float]:
        """Smallest and largest ratio of a pair."""
        ratios = [theirs / ours for ours, theirs in zip(self.ours_s, self.theirs_s, strict=True)]
        return min(ratios), max(ratios)

    def row(self, asked: str = "") -> str:
        """Return a row of the README's table."""
        ours, theirs = (self.units / statistics.median(side) for side in (self.ours_s, self.theirs_s))
        low, high = self.spread
        peaks = f"{self.ours_peak_mib:.0f} / {self.theirs_peak_mib:.0f}" if self.ours_peak_mib else ""
        ratio = f"{self.ratio:.2f} ({low:.2f}-{high:.2f})"
        return f"| {self.name} | {ours:,.0f} | {theirs:,.0f} | {ratio} | {asked} | {peaks} | {len(self.ours_s)} |"


HEADER = """\
| what | ours, units/s | other side, units/s | ratio: median (range) | asked | peak MiB, ours / other | pairs |
|---|--:|--:|--:|--:|--:|--:|"""


def compare(name: str, ours: Side, theirs: Side, *, units: int, pairs: int = 5) -> Pairs:
    """Run both sides `pairs` times in turn in this process, after a run of each in a process of its own that gives its peak memory."""
    peaks = {side: peak_mib(side) for side in (ours, theirs)}
    _seconds(ours), _seconds(theirs)  # not counted
    seconds: dict[Side, list[float]] = {ours: [], theirs: []}
    for number in range(pairs):
        for side in (ours, theirs) if number % 2 == 0 else (theirs, ours):
            seconds[side].append(_seconds(side))
    return Pairs(name, units, tuple(seconds[ours]), tuple(seconds[theirs]), peaks[ours], peaks[theirs])


def machine() -> str:
    """Return one line on where the numbers come from: processor, cores, system, Python, date."""
    try:
        with open("/proc/cpuinfo") as info:
            model = next(line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.machine()
    cores = multiprocessing.cpu_count()
    return f"{model}, {cores} cores, {platform.system()}, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}"


def _seconds(side: Side) -> float:
    gc.collect()
    begun = time.perf_counter()
    side()
    return time.perf_counter() - begun


def peak_mib(side: Side) -> float:
    """Run `side` in a forked process and return the most memory that it and the processes it starts had for themselves alone.

    What they share with this process (imported packages, data prepared here) is not counted. Looked at every 10 ms.
    """
    child = multiprocessing.get_context("fork").Process(target=side)
    child.start()
    peak = 0
    while child.is_alive():
        peak = max(peak, sum(_private_kib(pid) for pid in _family(child.pid)))
        child.join(0.01)
    assert child.exitcode == 0, "the side failed"
    return peak / 1024


def _family(pid: int | None) -> list[int]:
    try:
        children = [int(child) for tasks in Path(f"/proc/{pid}/task").iterdir() for child in (tasks / "children").read_text().split()]
    except OSError:  # it ended
        return []
    return [int(pid or 0), *(member for child in children for member in _family(child))]


def _private_kib(pid: int) -> int:
    try:
        return sum(map(int, re.findall(r"Private_\w+:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text())))
    except OSError:
        return 0


def two_processes(make_worker: MakeWorker, tasks: Sequence[Any]) -> Iterator[Outcome]:
    """Fan out over two forked processes. They are started once and kept, as the workers of a cluster are: starting them is not timed."""
    pool = _pools.setdefault(os.getpid(), None) or ProcessPoolExecutor(2, multiprocessing.get_context("fork"))
    _pools[os.getpid()] = pool
    made = pickle.dumps(make_worker)
    for future in as_completed([pool.submit(_part, made, task) for task in tasks]):
        yield future.result()


_pools: dict[int, ProcessPoolExecutor | None] = {}
_workers: dict[bytes, Worker] = {}


def _part(made: bytes, task: Any) -> Outcome:
    if made not in _workers:
        _workers.clear()
        _workers[made] = pickle.loads(made)()
    return attempt(_workers[made], task)
