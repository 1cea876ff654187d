"""A worker that always dies is started three times and no more, whatever runs above it: one level retries it."""

import dataclasses
import functools
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from aecore.checkpoint.files import committed_checkpoints
from aecore.errors import ClusterError, ConfigError, DataError, Diverged, RunFailed, StoreError, WorkerDied
from aecore.store import open_store
from pipelines.cluster.fanout import TASK_RETRIES, call_on_worker, ray_fan_out
from pipelines.cluster.train import train
from pipelines.flows import factory
from pipelines.recipe.recipe import ClusterSpec, load_recipe
from tests.pipelines.cluster.test_fanout import Job
from tests.pipelines.cluster.test_train import job_for, train_workers
from tests.processes import run

STARTS = TASK_RETRIES + 1


OUT_OF_MEMORY = """
import functools, sys, time
from aecore.artifact.fanout import collect
from pipelines.cluster.fanout import call_on_worker, ray_fan_out
from pipelines.cluster.session import disconnect
from pipelines.recipe.recipe import ClusterSpec, load_recipe
from pipelines.steps.steps import STEPS

class Part:
    stem = "part-0"

class Slow:
    def __call__(self, task):
        time.sleep(60)

def started_slowly():
    time.sleep(60)

cluster = ClusterSpec(num_workers=1)
tiny = ["model.latent_dim=2", "backbone.hidden=[8]", "train.epochs=9999", "train.global_batch=16"]
recipe = load_recipe(None, [f"data={sys.argv[1]}", f"out={sys.argv[2]}", "cluster.num_workers=1", "cluster.max_failures=0", *tiny])
works = (
    lambda: collect(ray_fan_out(cluster), started_slowly, [Part()]),
    lambda: call_on_worker(cluster, functools.partial(time.sleep, 60)),
    lambda: collect(ray_fan_out(cluster), Slow, [Part()]),
    lambda: STEPS["train"](recipe),
)
for work in works[: int(sys.argv[3])]:
    try:
        work()
    except Exception as error:
        print(type(error).__name__, str(error).replace(chr(10), "<line>"), flush=True)
disconnect()
"""


def die(log: Path) -> None:
    with log.open("a") as file:
        file.write(f"{os.getpid()}\n")
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.ray
def test_a_call_whose_worker_always_dies_is_started_as_often_as_a_part(two_workers: ClusterSpec, tmp_path: Path) -> None:
    with pytest.raises(WorkerDied, match=f"its worker died {STARTS} times"):
        call_on_worker(two_workers, functools.partial(die, tmp_path / "log"))
    assert len((tmp_path / "log").read_text().splitlines()) == STARTS


@pytest.mark.ray
def test_what_a_worker_meets_outside_is_typed_and_not_tried_again(two_workers: ClusterSpec, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="No such file or directory"):
        call_on_worker(two_workers, functools.partial(os.listdir, tmp_path / "nothing"))
    with pytest.raises(StoreError, match="No such file or directory"):
        list(ray_fan_out(two_workers)(functools.partial(os.listdir, tmp_path / "nothing"), [Job("part-0")]))


@pytest.mark.prefect
@pytest.mark.slow
def test_a_flow_does_not_start_a_worker_again_that_its_fan_out_gave_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines.flows.server import with_server
    from pipelines.flows.shard import shard_flow

    starts = list[int]()

    def shard(*_: Any, **__: Any) -> dict[str, Any]:
        starts.append(len(starts))
        raise WorkerDied(f"part-0: its worker died {STARTS} times")

    monkeypatch.setattr(factory, "STEPS", {**factory.STEPS, "shard": shard})
    recipe = load_recipe(None, [f"out={tmp_path}/out", "source.kind=sprites"])
    with pytest.raises(WorkerDied):
        with_server(shard_flow)(recipe.tree)
    assert starts == [0]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("works", [2, pytest.param(4, marks=pytest.mark.long)])
def test_a_worker_that_ray_kills_for_its_memory_has_died_like_any_other(sprites: Path, tmp_path: Path, works: int) -> None:
    memory = {"RAY_memory_usage_threshold": "0.001", "RAY_memory_monitor_refresh_ms": "1000"}  # always exceeded
    done = run([sys.executable, "-c", OUT_OF_MEMORY, sprites, tmp_path / "run", works], env=os.environ | memory)
    killed = r"\d+ worker\(s\) were killed due to the node running low on memory\. [^<]*"
    patterns = (
        rf"ClusterError a worker died while it started: {killed}; is there enough memory\?",
        rf"WorkerDied its worker died {STARTS} times: {killed}; is there enough memory\?",
        rf"(WorkerDied 1 of 1 parts failed:<line>  part-0: WorkerDied: its worker died {STARTS} times \({killed}\).*"
        rf"|ClusterError a worker died while it started: {killed}; is there enough memory\?)",
        rf"WorkerDied training failed after cluster\.max_failures restarts: {killed} \(is there enough memory\?\); no checkpoint .*",
    )[:works]
    lines = done.stdout.splitlines()
    assert len(lines) == len(patterns), (done.stdout, done.stderr)
    for pattern, line in zip(patterns, lines, strict=True):
        assert re.fullmatch(pattern, line), line


@pytest.mark.ray
@pytest.mark.slow
def test_training_whose_worker_always_dies_ends_after_its_restarts(two_workers: ClusterSpec, sprites: Path, tmp_path: Path) -> None:
    out, killed = tmp_path / "run", list[int]()

    def kill_whoever_trains() -> None:
        attempts = {name.rsplit("-", 1)[-1] for _, name in committed_checkpoints(open_store(str(out)))}
        if len(attempts) > len(killed):
            killed.append(train_workers()[-1])
            os.kill(killed[-1], signal.SIGKILL)

    cluster = dataclasses.replace(two_workers, num_workers=1, max_failures=1)
    with pytest.raises(WorkerDied, match=r"after cluster.max_failures restarts: .*; its newest checkpoint is that of step \d+"):
        train(job_for(sprites, out, "train.epochs=2000"), cluster, kill_whoever_trains)
    assert len(set(killed)) == cluster.max_failures + 1


class _State:
    def __init__(self, error: Exception) -> None:
        self.error = error

    def result(self) -> None:
        raise self.error


@pytest.mark.parametrize(
    ("error", "retried"),
    [
        (StoreError("x"), True),
        (RunFailed("another append was committed"), True),
        (KeyError("x"), True),
        (WorkerDied("x"), False),
        (ClusterError("x"), False),
        (ConfigError("x"), False),
        (DataError("x"), False),
        (Diverged("x"), False),
    ],
)
def test_a_flow_tries_again_what_may_pass_and_no_dead_worker(error: Exception, retried: bool) -> None:
    assert factory.is_retryable(None, None, _State(error)) is retried
