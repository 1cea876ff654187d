import logging
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import pytest

from aecore.artifact import fanout
from aecore.artifact.commit import PartRecord
from aecore.artifact.fanout import COMMITS, Commit, PartFailure, collect, serial
from aecore.errors import ConfigError, DataError, RunFailed, StoreError
from aecore.store import AlreadyExists
from tests.processes import WAIT_S


@dataclass(frozen=True)
class Task:
    stem: str
    raises: BaseException | None = None
    late: bool = False  # raised by the commit


class Worker:
    made = 0

    def __init__(self, rows: int = 1) -> None:
        self.rows = rows
        Worker.made += 1

    def __call__(self, task: Task) -> Commit:
        if task.raises is not None and not task.late:
            raise task.raises
        return partial(self.commit, task)

    def commit(self, task: Task) -> PartRecord:
        if task.raises is not None:
            raise task.raises
        return PartRecord(task.stem, (), self.rows)


def reverse(make_worker, tasks):
    """A fan-out with a worker per task that finishes in the opposite order."""
    for task in reversed(tasks):
        yield from serial(make_worker, [task])


@pytest.mark.parametrize("fan_out", [serial, reverse])
def test_records_come_in_the_order_of_the_tasks_whoever_runs_them(fan_out):
    tasks = [Task(f"part-{number}") for number in range(5)]
    seen = []
    records = collect(fan_out, partial(Worker, 3), tasks, on_part=lambda record, done, total: seen.append((record.part, done, total)))
    assert records == [PartRecord(task.stem, (), 3) for task in tasks]
    assert sorted(part for part, _, _ in seen) == [task.stem for task in tasks]
    assert [(done, total) for _, done, total in seen] == [(number, 5) for number in range(1, 6)]


def test_serial_makes_one_worker_for_all_tasks():
    Worker.made = 0
    collect(serial, Worker, [Task("a"), Task("b")])
    assert Worker.made == 1


def test_a_failed_part_does_not_stop_the_others():
    seen = []
    with pytest.raises(RunFailed, match=r"1 of 3 shards failed:\n  b: ValueError: no\n.*run the same command again"):
        collect(
            serial,
            Worker,
            [Task("a"), Task("b", ValueError("no")), Task("c")],
            what="shards",
            on_part=lambda record, done, total: seen.append(record.part),
        )
    assert seen == ["a", "c"]


@pytest.mark.parametrize("error", [DataError, StoreError, ConfigError])
def test_failures_of_one_kind_keep_their_type_and_exit_code(error):
    with pytest.raises(error) as raised:
        collect(serial, Worker, [Task("a", error("x")), Task("b", error("y")), Task("c")])
    assert "x" in str(raised.value)
    assert "y" in str(raised.value)


def test_a_narrower_error_keeps_the_exit_code_of_its_kind():
    with pytest.raises(StoreError, match="AlreadyExists: other content"):
        collect(serial, Worker, [Task("a", AlreadyExists("other content")), Task("b")])


def test_failures_of_different_kinds_are_a_failed_run():
    with pytest.raises(RunFailed):
        collect(serial, Worker, [Task("a", DataError("x")), Task("b", StoreError("y"))])


def test_a_part_is_committed_while_the_next_one_is_made():
    events, committing, made_next = [], threading.Event(), threading.Event()

    def worker(task):
        events.append(f"make {task.stem}")
        if task.stem == "b":
            assert committing.wait(WAIT_S), "the commit of the part before did not begin"
            made_next.set()

        def commit():
            committing.set()
            assert made_next.wait(WAIT_S), "the next part had to wait for this commit"
            events.append(f"commit {task.stem}")
            return PartRecord(task.stem, (), 1)

        return commit

    collect(serial, lambda: worker, [Task("a"), Task("b")])
    assert events[:2] == ["make a", "make b"]
    assert sorted(events[2:]) == ["commit a", "commit b"]


def test_so_many_parts_are_committed_at_once_and_no_more():
    made, together = [], threading.Barrier(COMMITS)

    def worker(task):
        made.append(task.stem)

        def commit():
            assert len(made) <= int(task.stem) + COMMITS + 1, "the parts run away from their commits"
            together.wait(WAIT_S)
            return PartRecord(task.stem, (), 1)

        return commit

    records = collect(serial, lambda: worker, [Task(str(number)) for number in range(3 * COMMITS)])
    assert [record.part for record in records] == made


def test_a_worker_that_wants_to_know_is_told_what_comes_next():
    told = []

    class Foresighted(Worker):
        def prefetch(self, tasks):
            told.append([task.stem for task in tasks])

    collect(serial, Foresighted, [Task("a"), Task("b"), Task("c")])
    assert told == [["a", "b", "c"], ["b", "c"], ["c"]]


def test_a_commit_that_fails_is_the_failure_of_its_part():
    seen = []
    with pytest.raises(StoreError, match=r"1 of 3 parts failed:\n  a: StoreError: full"):
        collect(
            serial,
            Worker,
            [Task("a", StoreError("full"), late=True), Task("b"), Task("c")],
            on_part=lambda record, *_: seen.append(record.part),
        )
    assert seen == ["b", "c"]


def test_an_interrupt_lets_the_running_commit_end(monkeypatch):
    ended, begun, awaited = [], threading.Event(), threading.Event()

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait=True, **options):
            if wait:
                awaited.set()
            super().shutdown(wait, **options)

    monkeypatch.setattr(fanout, "ThreadPoolExecutor", Pool)

    def worker(task):
        if task.stem == "b":
            assert begun.wait(WAIT_S)
            raise KeyboardInterrupt

        def commit():
            begun.set()
            assert awaited.wait(WAIT_S), "the interrupt did not wait for the commit"
            ended.append(task.stem)
            return PartRecord(task.stem, (), 1)

        return commit

    with pytest.raises(KeyboardInterrupt):
        collect(serial, lambda: worker, [Task("a"), Task("b")])
    assert ended == ["a"]


def test_a_bug_in_a_part_is_logged_with_its_traceback(caplog):
    with caplog.at_level(logging.ERROR), pytest.raises(RunFailed):
        collect(serial, Worker, [Task("a", ZeroDivisionError("bug"))])
    assert "Traceback" in caplog.text


@pytest.mark.parametrize("signal", [KeyboardInterrupt(), SystemExit(3)])
def test_an_interrupt_passes_through_and_closes_the_fan_out(signal):
    closed = []

    def watched(make_worker, tasks):
        try:
            yield from serial(make_worker, tasks)
        finally:
            closed.append(True)

    with pytest.raises(type(signal)):
        collect(watched, Worker, [Task("a", signal)])
    with pytest.raises(type(signal)):
        collect(watched, Worker, [Task("a")], on_part=lambda *_: (_ for _ in ()).throw(signal))
    assert closed == [True, True]


def test_a_part_that_never_came_back_is_a_failed_run():
    with pytest.raises(RunFailed, match="came back without a record"):
        collect(lambda make_worker, tasks: serial(make_worker, tasks[:1]), Worker, [Task("a"), Task("b")])


def test_outcomes_travel_between_processes():
    failure = PartFailure("a", "DataError", "x")
    assert pickle.loads(pickle.dumps(failure)) == failure


def test_why_parts_failed_is_said_once(caplog):
    full = "the disk is full"
    tasks = [Task(f"part-{number}", StoreError(full) if number else ConfigError("another reason")) for number in range(9)]
    with pytest.raises(RunFailed) as failed:
        collect(serial, Worker, tasks)
    shown = "part-1, part-2, part-3, part-4, part-5 and 3 more: StoreError: the disk is full"
    assert str(failed.value).splitlines()[:3] == ["9 of 9 parts failed:", "  part-0: ConfigError: another reason", f"  {shown}"]
    assert "part-8 failed (StoreError)" in caplog.text and full not in caplog.text
    with pytest.raises(DataError, match=r"part-4: DataError: reason 4\n  and 2 more \(see the log\)"):
        collect(serial, Worker, [Task(f"part-{number}", DataError(f"reason {number}")) for number in range(7)])
    assert "part-6: DataError: reason 6" in caplog.text and "reason 4" not in caplog.text
