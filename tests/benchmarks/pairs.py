"""Compare two ways of doing the same work fairly on a machine that is not quiet.

Both sides run in turn, pair by pair, the first side of a pair changing each time, so a slow minute hits both. The ratio of each
pair is taken before the median: that is steadier than the ratio of two medians. A side may run in a process of its own, which
also gives its peak memory; its start is not timed.
"""

import gc
import multiprocessing
import platform
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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


def compare(name: str, ours: Side, theirs: Side, *, units: int, pairs: int = 5, own_process: bool = False) -> Pairs:
    """Run both sides `pairs` times in turn, after one run of each that does not count.

    With `own_process` each run is a fresh spawned process (the sides must be picklable) and peak memory is measured.
    """
    run = _in_process if own_process else _here
    run(ours), run(theirs)
    seconds: dict[Side, list[float]] = {ours: [], theirs: []}
    peaks = {ours: 0.0, theirs: 0.0}
    for number in range(pairs):
        for side in (ours, theirs) if number % 2 == 0 else (theirs, ours):
            took, peak = run(side)
            seconds[side].append(took)
            peaks[side] = max(peaks[side], peak)
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


def _here(side: Side) -> tuple[float, float]:
    gc.collect()
    begun = time.perf_counter()
    side()
    return time.perf_counter() - begun, 0.0


def _in_process(side: Side) -> tuple[float, float]:
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_timed_with_peak, (side,))


def _timed_with_peak(side: Side) -> tuple[float, float]:
    took, _ = _here(side)
    status = Path("/proc/self/status").read_text()  # getrusage would carry the parent's peak over
    return took, int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024
