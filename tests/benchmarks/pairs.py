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
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from aecore.artifact.fanout import MakeWorker, Outcome, Worker, make_part
from aecore.native import processor
from pipelines.cluster.memory import disable_malloc_trim

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
        return f"| {self.name} | {ours:,.0f} | {theirs:,.0f} | {ratio} | {asked} | {peaks} | {len(self.ours_s)} | {processor().name} |"


HEADER = """\
| what | ours, units/s | other side, units/s | ratio: median (range) | asked | peak MiB, ours / other | pairs | processor |
|---|--:|--:|--:|--:|--:|--:|---|"""


def compare(name: str, ours: Side, theirs: Side, *, units: int, pairs: int = 5, before: Side = lambda: None) -> Pairs:
    """Run both sides `pairs` times in turn in this process, after a run of each in a process of its own that gives its peak memory.

    `before` runs before each of them and is not timed.
    """
    peaks: dict[Side, float] = {}
    for side in (ours, theirs):
        before()
        peaks[side] = peak_mib(side)
        before()
        _seconds(side)  # not counted
    seconds: dict[Side, list[float]] = {ours: [], theirs: []}
    for number in range(pairs):
        for side in (ours, theirs) if number % 2 == 0 else (theirs, ours):
            before()
            seconds[side].append(_seconds(side))
    return Pairs(name, units, tuple(seconds[ours]), tuple(seconds[theirs]), peaks[ours], peaks[theirs])


def machine() -> str:
    """Return one line on where the numbers come from: processor, cores, system, Python, date."""
    system = f"{multiprocessing.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"
    return f"{processor().name}, {system}, {time.strftime('%Y-%m-%d')}"


def _seconds(side: Side) -> float:
    gc.collect()
    begun = time.perf_counter()
    side()
    return time.perf_counter() - begun


def peak_mib(side: Side) -> float:
    """Run `side` in a forked process and return the most memory that it and the processes it starts had for themselves alone.

    What they share with this process (imported packages, data prepared here) is not counted. Looked at every 10 ms.
    """
    if isinstance(side, HomeSide):
        return side.peak_mib()
    child = multiprocessing.get_context("fork").Process(target=_run_alone, args=(side,))
    child.start()
    assert child.pid is not None
    peak = _highest(child.pid, child)
    assert child.exitcode == 0, "the side failed"
    return peak / 1024


def peak_mib_here(side: Side) -> float:
    """Run `side` in this process and return how much private memory it and the processes that it starts take, above what it has now."""
    begun_kib, ended = _family_kib(os.getpid()), threading.Event()

    def watch() -> int:
        peak = begun_kib
        while not ended.wait(0.01):
            peak = max(peak, _family_kib(os.getpid()))
        return peak

    with ThreadPoolExecutor(1) as watcher:
        peak = watcher.submit(watch)
        try:
            side()
        finally:
            ended.set()
        return (peak.result() - begun_kib) / 1024


def _highest(pid: int, running: BaseProcess | threading.Thread) -> int:
    peak = 0
    while running.is_alive():
        peak = max(peak, _family_kib(pid))
        running.join(0.01)
    return peak


def _family_kib(pid: int) -> int:
    return sum(_private_kib(member) for member in _family(pid))


class Home:
    """A process for one side alone, started once and kept: what the side does to its process helps no other side.

    The calls of a home give sides that take no time but their own; what they run must be picklable. `with` ends the process.
    """

    def __init__(self, begin: Callable[[], None]) -> None:
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=begin)
        self.pid: int = self._pool.submit(os.getpid).result()
        self.begun_kib = _family_kib(self.pid)

    def __call__(self, side: Side) -> "HomeSide":
        return HomeSide(self, side)

    def run(self, side: Side) -> None:
        self._pool.submit(side).result()

    def __enter__(self) -> "Home":
        return self

    def __exit__(self, *_: object) -> None:
        for pid in reversed(_family(self.pid)):
            os.kill(pid, signal.SIGKILL)
        self._pool.shutdown()


@dataclass(frozen=True)
class HomeSide:
    """A side that runs in its home."""

    home: Home
    side: Side

    def __call__(self) -> None:
        self.home.run(self.side)

    def peak_mib(self) -> float:
        """Run once and return how much private memory the home and what it started take, above what the home began with."""
        running = threading.Thread(target=self)
        running.start()
        return (_highest(self.home.pid, running) - self.home.begun_kib) / 1024


def _run_alone(side: Side) -> None:
    side()
    if (pool := _pools.get(os.getpid())) is not None:
        pool.shutdown()  # else the process waits for workers that wait for work


def _family(pid: int) -> list[int]:
    try:
        children = [int(child) for tasks in Path(f"/proc/{pid}/task").iterdir() for child in (tasks / "children").read_text().split()]
    except OSError:  # it ended
        return []
    return [pid, *(member for child in children for member in _family(child))]


def _private_kib(pid: int) -> int:
    try:
        return sum(map(int, re.findall(r"Private_\w+:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text())))
    except OSError:
        return 0


def two_processes(make_worker: MakeWorker, tasks: Sequence[Any]) -> Iterator[Outcome]:
    """Fan out over two processes. They are started once and kept, as the workers of a cluster are: starting them is not timed."""
    pool = _pools.get(os.getpid()) or ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), initializer=disable_malloc_trim)
    _pools[os.getpid()] = pool
    made = pickle.dumps(make_worker)
    for future in as_completed([pool.submit(_part, made, task) for task in tasks]):
        yield future.result()


_pools: dict[int, ProcessPoolExecutor] = {}  # by process: a forked one makes its own
_workers: dict[bytes, Worker] = {}


def _part(made: bytes, task: Any) -> Outcome:
    if made not in _workers:
        _workers.clear()
        _workers[made] = pickle.loads(made)()
    return make_part(_workers[made], task)
