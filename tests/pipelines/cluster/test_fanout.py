"""The pool of actors: every task has one outcome, whatever happens to the processes."""

import functools
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from aecore.artifact.commit import PartRecord
from aecore.artifact.fanout import Commit, PartFailure, collect
from aecore.errors import ClusterError, DataError, WorkerDied
from pipelines.cluster.fanout import TASK_RETRIES, ray_fan_out
from pipelines.recipe.recipe import ClusterSpec


@dataclass(frozen=True)
class Job:
    stem: str
    how: str = "work"


class Worker:
    """Writes a line per start and per part; `how` says what goes wrong."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / f"start-{os.getpid()}").touch()

    def __call__(self, task: Job) -> Commit:
        log = self.folder / task.stem
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        if (task.how == "die once" and len(log.read_text().splitlines()) == 1) or task.how == "die always":
            os.kill(os.getpid(), signal.SIGKILL)
        if task.how == "bad":
            raise DataError(f"{task.stem} is damaged")
        return lambda: PartRecord(task.stem, (), 1)


def refuse(folder: Path) -> Worker:
    raise DataError("no such model")


def tries(folder: Path, stem: str) -> int:
    return len((folder / stem).read_text().splitlines())


@pytest.mark.ray
def test_a_killed_worker_is_replaced_and_its_part_is_made(two_workers: ClusterSpec, tmp_path: Path) -> None:
    tasks = [Job(f"part-{number}", "die once" if number == 2 else "work") for number in range(6)]
    records = collect(ray_fan_out(two_workers), functools.partial(Worker, tmp_path), tasks)
    assert [record.part for record in records] == [task.stem for task in tasks]
    assert tries(tmp_path, "part-2") == 2
    assert all(tries(tmp_path, task.stem) == 1 for task in tasks if task.how == "work")
    assert len(list(tmp_path.glob("start-*"))) == 3, "the worker is made once per process: two, and one for the killed one"


@pytest.mark.ray
def test_a_part_that_always_kills_its_worker_fails_alone(two_workers: ClusterSpec, tmp_path: Path) -> None:
    tasks = [Job("part-0", "die always"), *(Job(f"part-{number}") for number in range(1, 5)), Job("part-5", "bad")]
    outcomes = {outcome.part: outcome for outcome in ray_fan_out(two_workers)(functools.partial(Worker, tmp_path), tasks)}
    assert set(outcomes) == {task.stem for task in tasks}
    failed = {part: outcome for part, outcome in outcomes.items() if isinstance(outcome, PartFailure)}
    assert set(failed) == {"part-0", "part-5"}
    assert f"its worker died {TASK_RETRIES + 1} times" in failed["part-0"].message
    assert tries(tmp_path, "part-0") == TASK_RETRIES + 1
    assert (failed["part-5"].error_type, failed["part-5"].message) == ("DataError", "part-5 is damaged")
    with pytest.raises(WorkerDied, match=f"its worker died {TASK_RETRIES + 1} times"):
        collect(lambda factory, tasks: iter([failed["part-0"]]), functools.partial(Worker, tmp_path), tasks[:1])


@pytest.mark.ray
def test_an_error_of_the_factory_keeps_its_type(two_workers: ClusterSpec, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such model"):
        list(ray_fan_out(two_workers)(functools.partial(refuse, tmp_path), [Job("part-0")]))


@pytest.mark.ray
def test_more_workers_than_the_cluster_has_are_refused_at_once(two_workers: ClusterSpec, tmp_path: Path) -> None:
    cluster = ClusterSpec(num_workers=64, timeout_s=5)
    tasks = [Job("part-0"), Job("part-1")]
    with pytest.raises(ClusterError, match=r"num_workers=64 .* room for \d+; set cluster.num_workers="):
        list(ray_fan_out(cluster)(functools.partial(Worker, tmp_path), tasks))
    with pytest.raises(ClusterError, match=r"1 GPU.*cluster.use_gpu=false"):
        list(ray_fan_out(ClusterSpec(num_workers=1, use_gpu=True))(functools.partial(Worker, tmp_path), tasks))


def test_no_worker_means_this_process(tmp_path: Path) -> None:
    collect(ray_fan_out(ClusterSpec(num_workers=0)), functools.partial(Worker, tmp_path), [Job("part-0")])
    assert (tmp_path / f"start-{os.getpid()}").exists()
