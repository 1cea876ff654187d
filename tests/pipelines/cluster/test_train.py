"""Training on Ray: the same numbers as in one process, whatever happens to the workers."""

import os
import re
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from aecore.checkpoint.files import committed_checkpoints, newest_checkpoint
from aecore.checkpoint.weights import load_model
from aecore.errors import ClusterError, ConfigError, RunFailed
from aecore.store import open_store
from aecore.training.job import TrainJob
from aecore.training.loop import fit
from aecore.training.metrics import last_row, read_rows
from pipelines.cluster.train import train
from pipelines.recipe.recipe import ClusterSpec, load_recipe
from pipelines.steps.steps import train_job_of
from tests.aecore.data.test_external_tars import samples, write_tar
from tests.pipelines.sockets import Listener, listeners
from tests.processes import below

KNOBS = ("model.latent_dim=4", "backbone.hidden=[16]", "train.global_batch=32", "checkpoint.every_steps=20", "checkpoint.keep=99")
LONG = ("train.epochs=150", "checkpoint.every_steps=200")
SAID = re.compile(r"interrupted at step (\d+): checkpoint step-(\d{8}) written; the same command goes on from there")


def job_for(data: Path, out: Path, *overrides: str) -> TrainJob:
    job: TrainJob = train_job_of(load_recipe(None, [f"data={data}", f"out={out}", *KNOBS, *overrides]))
    return job


def rows(out: Path) -> list[dict[str, Any]]:
    store = open_store(str(out))
    newest = newest_checkpoint(store)
    assert newest is not None
    return read_rows(store, newest.metrics)


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in rows(out)]


def train_workers() -> list[int]:
    """Return the train workers below this process: an external Ray on this machine is left alone."""
    return [pid for pid, command in below().items() if "RayTrainWorker" in command]


@dataclass(frozen=True)
class Disturbed:
    """A run on two workers that was told to end, was started again, lost a worker, and ended."""

    job: TrainJob
    said: str
    saved_then: int
    attempts: set[str]
    steps: int
    listened: set[Listener]
    actors: set[str]


@pytest.fixture(scope="module")
def disturbed(two_workers: ClusterSpec, sprites: Path, tmp_path_factory: pytest.TempPathFactory) -> Disturbed:
    job = job_for(sprites, tmp_path_factory.mktemp("disturbed") / "run", *LONG)
    store = open_store(job.out)
    sent, killed, seen, listened, actors = list[int](), list[int](), set[str](), set[Listener](), set[str]()

    def attempts() -> set[str]:
        return {name.rsplit("-", 1)[-1] for _, name in committed_checkpoints(store)}

    def interrupt_once() -> None:
        if not sent and last_row(store) is not None:
            sent.append(signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt) as stopped:
        train(job, two_workers, interrupt_once)
    saved_then, before, ended = max(step for step, _ in committed_checkpoints(store)), attempts(), set(train_workers())

    def kill_one_worker() -> None:
        seen.update(attempts())  # a later attempt removes what it does not need
        if not killed and seen > before:
            heads = [pid for pid, command in below().items() if "ray start --head" in command]  # clusters of other tests
            listened.update(listeners({os.getpid(), *below()} - {pid for head in heads for pid in (head, *below(head))}))
            actors.update(command for command in below().values() if command.startswith("ray::"))
            killed.append(next(pid for pid in train_workers() if pid not in ended))
            os.kill(killed[0], signal.SIGKILL)

    result = train(job, two_workers, kill_one_worker)
    assert killed, "no worker was there to be killed"
    return Disturbed(job, str(stopped.value), saved_then, seen | attempts(), result.step, listened, actors)


@pytest.mark.ray
@pytest.mark.slow
def test_workers_end_their_step_and_save_it_when_the_driver_is_told_to_end(disturbed: Disturbed) -> None:
    found = SAID.search(disturbed.said)
    assert found, disturbed.said
    assert int(found[1]) == int(found[2]) == disturbed.saved_then < disturbed.steps


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_that_was_stopped_and_whose_worker_was_killed_has_the_losses_of_another(disturbed: Disturbed, tmp_path: Path) -> None:
    undisturbed = fit(replace(disturbed.job, out=str(tmp_path / "run")))
    assert disturbed.steps == undisturbed.step
    assert losses(Path(disturbed.job.out)) == pytest.approx(losses(tmp_path / "run"), rel=1e-5)
    assert len(disturbed.attempts) == 3, "each attempt went on from a checkpoint of the one before"
    load_model(disturbed.job.out)


@pytest.mark.ray
@pytest.mark.slow
def test_a_ray_of_ours_and_its_training_listen_on_loopback_alone_and_show_no_metrics(disturbed: Disturbed) -> None:
    seen = disturbed.listened
    assert any("RayTrainWorker" in one.command for one in seen), "the processes were not listed while it trained"
    assert any("raylet" in one.command for one in seen)
    assert [one for one in seen if not one.is_loopback] == []
    assert not {one.port for one in seen} & {44217, 44227}, "the ports of Ray's metrics"
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "DASHBOARD_METRIC_PORT")
    assert not [name for name in names if name in os.environ], "the next Ray may be one of several machines"


@pytest.mark.ray
@pytest.mark.slow
def test_a_training_on_a_ray_of_ours_starts_no_actor_that_it_does_not_use(disturbed: Disturbed) -> None:
    assert any("RayTrainWorker" in actor for actor in disturbed.actors)
    assert not [actor for actor in disturbed.actors if "DatasetManager" in actor or "PlacementGroupCleaner" in actor]


@pytest.mark.ray
@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_at_once(two_workers: ClusterSpec, sprites: Path, tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=r"(loss is|weights are not finite).*lower optim.lr") as raised:
        train(job_for(sprites, tmp_path / "run", "optim.lr=1e30"), replace(two_workers, num_workers=1))
    assert "restarts" not in str(raised.value), "another attempt would fail again: there must be none"
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.ray
def test_a_finished_run_returns_at_once_and_another_job_may_not_use_its_place(sprites: Path, tmp_path: Path) -> None:
    here = ClusterSpec(num_workers=0)
    first = train(job_for(sprites, tmp_path / "run", "train.epochs=1"), here)
    many = ClusterSpec(num_workers=512)
    assert train(job_for(sprites, tmp_path / "run", "train.epochs=1"), many) == first
    with pytest.raises(ConfigError, match=r"train.epochs: there 1, asked 2"):
        train(job_for(sprites, tmp_path / "run", "train.epochs=2"), many)


@pytest.mark.ray
def test_more_workers_than_there_are_is_a_cluster_error(two_workers: ClusterSpec, sprites: Path, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"num_workers=512.*room for \d+"):
        train(job_for(sprites, tmp_path / "run"), ClusterSpec(num_workers=512))
    assert not (tmp_path / "run").exists()


@pytest.mark.ray
@pytest.mark.long  # of ranks without Ray: tests/aecore/data/test_stream.py
def test_two_workers_take_equal_steps_of_uneven_tars(tmp_path: Path, two_workers: ClusterSpec) -> None:
    write_tar(tmp_path / "in/a.tar", samples(0, 40))
    write_tar(tmp_path / "in/b.tar", samples(40, 3))
    streamed = ("input.reader=webdataset", "input.shuffle=8", "train.max_steps=20", "train.global_batch=16")
    assert train(job_for(tmp_path / "in", tmp_path / "run", *streamed), two_workers).step == 20
    assert [row["samples"] for row in rows(tmp_path / "run")] == [16] * 20
