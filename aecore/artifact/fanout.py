"""Map parts over workers: the interface between what a job does and where it runs.

A job makes a list of tasks and a picklable factory of workers; a `FanOut` decides where the workers live (this process, Ray
actors) and yields one outcome per task, in any order. A worker makes a part and returns the call that commits it: commits
(fsync, or an upload) run in background threads while the next parts are made. A part that fails does not stop the others: its failure
is a value, and `collect` raises when everything else is done and recorded, so the next run makes only the failed parts.
"""

import contextlib
import functools
import logging
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from aecore.artifact.commit import PartRecord
from aecore.errors import AecoreError, ConfigError, DataError, Hint, RunFailed, WorkerDied, from_json, from_outside
from aecore.store import AlreadyExists
from aecore.threads import submit_ahead

T = TypeVar("T")
logger = logging.getLogger(__name__)
COMMITS = 4  # parts that are being committed while the next one is made: an upload may take longer than a part
PREFETCHED = 4  # parts whose input is downloaded in the background
SHOWN = 5  # failures spelled out in the error; the log has all of them


class Task(Protocol):
    """One part to make: picklable, named by `stem`, unique in its job."""

    @property
    def stem(self) -> str:
        """Name of the part."""


@dataclass(frozen=True, slots=True)
class PartFailure:
    """A part that could not be made: the class name, message and hint of its error, the traceback if it was no `AecoreError`."""

    part: str
    error_type: str
    message: str
    traceback: str = ""
    hint: Hint | None = None


Commit = Callable[[], PartRecord]
Worker = Callable[[Any], Commit]  # any: a worker takes the tasks of its own job (ShardTask, EncodeTask)
MakeWorker = Callable[[], Worker]
Outcome = PartRecord | PartFailure
FanOut = Callable[[MakeWorker, Sequence[Any]], Iterator[Outcome]]  # a call gets all ready (starts a Ray); parts are made while iterating
OnPart = Callable[[PartRecord, int, int], None]


def attempt(call: Callable[[], T], task: Task) -> T | PartFailure:
    """Return the result of `call` (making or committing the task's part), or its error as a value.

    KeyboardInterrupt and SystemExit pass through.
    """
    try:
        return call()
    except Exception as error:
        known = from_outside(error)
        if known is not None:
            return PartFailure(task.stem, type(known).__name__, str(known), hint=known.hint)
        # a bug in one part must not cost the others; `collect` reports it
        return PartFailure(task.stem, type(error).__name__, str(error), traceback.format_exc())


def make_part(worker: Worker, task: Any) -> Outcome:
    """Make and commit one part."""
    return attempt(lambda: worker(task)(), task)


def serial(make_worker: MakeWorker, tasks: Sequence[Any]) -> Iterator[Outcome]:
    """Make all parts one after the other with one worker in this process; they are committed while the next ones are made.

    A worker that has a method `prefetch(tasks)` gets, before each part, this task and the next `PREFETCHED` ones.
    If it is closed or interrupted, it waits for the commits that have begun.
    """
    worker = make_worker()
    prefetch: Callable[[Sequence[Any]], None] = getattr(worker, "prefetch", lambda tasks: None)

    def made() -> Iterator[tuple[Commit | PartFailure, Any]]:
        for number, task in enumerate(tasks):
            try:
                prefetch(tasks[number : number + 1 + PREFETCHED])
            except Exception as error:  # only a hint: the task itself raises the error
                logger.debug("the input of the parts after %s cannot be prefetched: %s", task.stem, error)
            yield attempt(functools.partial(worker, task), task), task

    def commit(part: tuple[Commit | PartFailure, Any]) -> Outcome:
        made, task = part
        return made if isinstance(made, PartFailure) else attempt(made, task)

    with (
        ThreadPoolExecutor(COMMITS, "commit") as background,
        contextlib.closing(submit_ahead(lambda part: background.submit(commit, part), made(), COMMITS, eager=True)) as committing,
    ):
        for outcome in committing:
            yield outcome.result()


def collect(
    fan_out: FanOut,
    make_worker: MakeWorker,
    tasks: Sequence[Any],
    *,
    what: str = "parts",
    on_part: OnPart | None = None,
    on_start: Callable[[], None] = lambda: None,
) -> list[PartRecord]:
    """Run all tasks and return their records in the order of the tasks.

    Parameters
    ----------
    what : str
        Plural noun of the parts, for the error.
    on_part : callable, optional
        Called as `on_part(record, done, total)` when a part is finished (in the order of finishing).
    on_start : callable
        Called when the fan-out is ready, before the first part: threads that work beside the parts are started here. Before, the
        fan-out may change this process's environment and working directory (a local Ray does), which compiled code in another thread
        may be reading: with glibc up to 2.40, `getenv` there ends the process with SIGSEGV now and then.

    Raises
    ------
    AecoreError
        If any part failed: of the parts' own type where they agree on one (DataError stays DataError), else WorkerDied if the worker
        of one kept dying, else RunFailed.
        Raised after every task had its turn: finished parts are recorded and kept.
    """
    stems = [task.stem for task in tasks]
    assert len(set(stems)) == len(stems), "two tasks of one job have one stem"
    records: dict[str, PartRecord] = {}
    failures: list[PartFailure] = []
    outcomes = fan_out(make_worker, tasks)
    with contextlib.ExitStack() as stack:
        if isinstance(outcomes, Generator):  # an interrupted job must not leave workers running
            stack.callback(outcomes.close)
        on_start()
        for outcome in outcomes:
            if isinstance(outcome, PartFailure):
                logger.warning("%s failed (%s); the other %s go on", outcome.part, outcome.error_type, what)
                for line in (outcome.traceback or "").splitlines():
                    logger.error("  %s", line)
                failures.append(outcome)
                continue
            records[outcome.part] = outcome
            if on_part is not None:
                on_part(outcome, len(records), len(tasks))
    if failures:
        raise _failed(failures, len(tasks), what)
    lost = [stem for stem in stems if stem not in records]
    if lost:
        names = ", ".join(lost[:SHOWN]) + (", ..." if len(lost) > SHOWN else "")
        raise RunFailed(f"{len(lost)} of {len(tasks)} {what} came back without a record ({names}): run the same command again")
    return [records[stem] for stem in stems]


def _named(stems: list[str]) -> str:
    return ", ".join(stems[:SHOWN]) + (f" and {len(stems) - SHOWN} more" if len(stems) > SHOWN else "")


def _failed(failures: list[PartFailure], total: int, what: str) -> AecoreError:
    kinds = {type(from_json({"error": failure.error_type})) for failure in failures}
    kind = kinds.pop() if len(kinds) == 1 else WorkerDied if WorkerDied in kinds else RunFailed
    parts: dict[str, list[str]] = {}  # what went wrong -> where: several parts often fail for one reason
    for failure in failures:
        parts.setdefault(f"{failure.error_type}: {failure.message}", []).append(failure.part)
    reasons = [f"{_named(stems)}: {reason}" for reason, stems in parts.items()]
    lines = "".join(f"\n  {reason}" for reason in reasons[:SHOWN])
    for reason in reasons[SHOWN:]:
        logger.error("%s", reason)
    more = f"\n  and {len(reasons) - SHOWN} more (see the log)" if len(reasons) > SHOWN else ""
    first = "put that right, then " if issubclass(kind, DataError | AlreadyExists) else ""  # the same data would fail again
    last = f"the rest is kept; {first}run the same command again to finish"
    if issubclass(kind, ConfigError):  # the same settings too
        last = "change the settings that are named, and run the command with these"
    message = f"{len(failures)} of {total} {what} failed:{lines}{more}\n{last}"
    return kind(message, hint=next((failure.hint for failure in failures if failure.hint is not None), None))
