"""Progress of a job in the driver: the logs of workers do not reach it, so it counts records and reads the run's metric parts.

A step calls a `Report` with `Progress` values. A report shows them: as one line that is redrawn on a terminal, or as one INFO line
per shard or epoch in a log (Prefect's run log in a flow). Progress is never a reason to fail: what cannot be read now is read at the
next look, and what a terminal or pipe does not take is not shown.
"""

import logging
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO

from aecore.artifact.commit import PartRecord
from aecore.artifact.documents import CLAIM, read_json
from aecore.artifact.fanout import OnPart
from aecore.errors import printable
from aecore.store import Store
from aecore.training.metrics import last_epoch, last_row
from pipelines.cluster.outside import known_error


@dataclass(frozen=True, slots=True)
class Progress:
    """`done` of `total` `unit`s of a step; `text` describes the latest result, `milestone` is whether it is logged."""

    step: str
    done: int
    total: int
    unit: str
    text: str
    milestone: bool = True

    def __str__(self) -> str:
        return printable(f"{self.step}: {self.done} of {self.total} {self.unit}, {self.text}", one_line=True)


logger = logging.getLogger(__name__)
Report = Callable[[Progress], None]
PASSING = "... "  # prefix of a line that is not a milestone
_LINE = re.compile(r"(\.\.\. )?(\w+): (\d+) of (\d+) (\w+), (.*)")


def write_text(stream: TextIO, text: str) -> None:
    """Write to a terminal or pipe; one that is gone or full gets nothing, the work goes on."""
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        logger.debug("progress is not shown: %s", error)


def silent(progress: Progress) -> None:
    """Ignore the progress."""


def log_to(logger: logging.Logger | logging.LoggerAdapter) -> Report:
    """Return a report that writes one INFO line per milestone."""

    def report(progress: Progress) -> None:
        if progress.milestone:
            logger.info("%s", progress)

    return report


def lines_to(stream: TextIO, every_s: float = 1.0) -> Report:
    """Return a report for another process: a line per milestone, and at most one per `every_s` in between; see `from_line`."""
    last = -every_s

    def report(progress: Progress) -> None:
        nonlocal last
        now = time.monotonic()
        if progress.milestone or now - last >= every_s:
            last = now
            write_text(stream, f"{'' if progress.milestone else PASSING}{progress}\n")

    return report


def from_line(line: str) -> Progress | None:
    """Parse a line of `lines_to`; None for any other line."""
    match = _LINE.fullmatch(line)
    if match is None:
        return None
    passing, step, done, total, unit, text = match.groups()
    return Progress(step, int(done), int(total), unit, text, milestone=passing is None)


class TerminalLine:
    """Redraws one line with rate and time left, at most ten times a second."""

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream or sys.stderr, clock
        self._step, self._first, self._started, self._drawn = "", 0, 0.0, 0.0

    def __call__(self, progress: Progress) -> None:
        """Draw the progress, unless the line was drawn less than 0.1 s ago."""
        now = self._clock()
        if progress.step != self._step:
            self._step, self._first, self._started, self._drawn = progress.step, progress.done, now, 0.0
        last = progress.done >= progress.total
        if not last and now - self._drawn < 0.1:
            return
        self._drawn = now
        rate = (progress.done - self._first) / max(now - self._started, 1e-9)
        speed = f", {rate:,.1f} {progress.unit}/s, {_duration((progress.total - progress.done) / rate)} left" if rate and not last else ""
        line = f"{progress.step}: {progress.done:,}/{progress.total:,} {progress.unit}{speed}, {progress.text}"
        write_text(self._stream, f"\r\x1b[2K{printable(line, one_line=True)}" + ("\n" if last else ""))


def terminal() -> Report:
    """Return a progress line if standard error is a terminal, else a report that shows nothing."""
    return TerminalLine() if sys.stderr.isatty() else silent


def line_printer() -> Callable[[str], None]:
    """Return a function that prints a line to standard error, above the progress line of `terminal`."""
    before = "\r\x1b[2K" if sys.stderr.isatty() else ""

    def show(line: str) -> None:
        write_text(sys.stderr, f"{before}{printable(line, one_line=True)}\n")

    return show


def both(first: Report, second: Report) -> Report:
    """Return a report that calls two others."""

    def report(progress: Progress) -> None:
        first(progress)
        second(progress)

    return report


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def on_part(step: str, unit: str, report: Report, *, milestones: bool) -> OnPart:
    """Return the callback of `aecore.artifact.fanout.collect` that reports every finished part.

    `milestones` is false if the workers run in this process, whose own log has the same lines.
    """

    def finished(record: PartRecord, done: int, total: int) -> None:
        bad = f", {record.quarantined:,} quarantined" if record.quarantined else ""
        report(Progress(step, done, total, unit, f"{record.part}: {record.rows:,} rows{bad}", milestones))

    return finished


class TrainWatch:
    """Polls the metrics of a run that other processes write, and reports steps and finished epochs.

    Metrics that cannot be read are read at the next look: the first failure is a warning, those that follow it are logged at DEBUG.
    """

    def __init__(self, store: Store, report: Report, *, milestones: bool, interval_s: float = 0.5) -> None:
        self._store, self._report, self._milestones, self._interval_s = store, report, milestones, interval_s
        self._step, self._epoch, self._total, self._looked = 0, -1, 0, 0.0
        self._blind = False

    def __call__(self) -> None:
        """Call `look` at most once per interval."""
        now = time.monotonic()
        if now - self._looked >= self._interval_s:
            self._looked = now
            self.look()

    def look(self) -> None:
        """Report the newest step if it is new; the first report of an epoch and that of the last step are milestones."""
        try:
            self._look()
            self._blind = False
        except Exception as error:
            known = known_error(error)
            if known is None:
                raise
            logger.log(logging.DEBUG if self._blind else logging.WARNING, "the progress of training cannot be read now: %s", known)
            self._blind = True

    def _look(self) -> None:
        row = last_row(self._store)
        if row is None or row["step"] <= self._step:
            return
        self._total = self._total or read_json(self._store, CLAIM)["info"]["total_steps"]
        self._step = row["step"]
        validation = f", validation {row['validation']['loss']:.4f}" if "validation" in row else ""
        news = row["epoch"] != self._epoch or "validation" in row or self._step == self._total
        self._epoch = row["epoch"]
        mean = last_epoch(self._store) if news and self._milestones else None  # in between, the newest step is enough, and cheap
        loss = f"mean loss {mean['loss']:.4f}" if mean else f"loss {row['loss']:.4f}"
        text = f"epoch {row['epoch'] + 1}, {loss}{validation}"
        self._report(Progress("train", self._step, self._total, "steps", text, news and self._milestones))
