"""Training on Ray: the same numbers as in one process, whatever happens to the workers."""

import os
import signal
from pathlib import Path

import pytest

from aecore.checkpoint.files import committed_checkpoints, newest_checkpoint
from aecore.checkpoint.weights import load_model
from aecore.errors import ClusterError, ConfigError, RunFailed
from aecore.store import open_store
from aecore.training.job import TrainJob
from aecore.training.loop import fit
from aecore.training.metrics import read_rows
from pipelines.cluster.train import train
from pipelines.recipe.recipe import ClusterSpec, load_recipe
from pipelines.steps.steps import train_job_of
from tests.processes import below

KNOBS = ("model.latent_dim=4", "backbone.hidden=[16]", "train.global_batch=32", "checkpoint.every_steps=20", "checkpoint.keep=99")


def job_for(data: Path, out: Path, *overrides: str) -> TrainJob:
    job: TrainJob = train_job_of(load_recipe(None, [f"data={data}", f"out={out}", *KNOBS, *overrides]))
    return job


def losses(out: Path) -> list[float]:
    store = open_store(str(out))
    newest = newest_checkpoint(store)
    assert newest is not None
    return [row["loss"] for row in read_rows(store, newest.metrics)]


def train_workers() -> list[int]:
    """Return the train workers below this process: an external Ray on this machine is left alone."""
    return [pid for pid, command in below().items() if "RayTrainWorker" in command]


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_whose_worker_was_killed_has_the_losses_of_another(two_workers: ClusterSpec, sprites: Path, tmp_path: Path) -> None:
    epochs = "train.epochs=40"
    undisturbed = fit(job_for(sprites, tmp_path / "one", epochs))
    killed: list[int] = []

    def kill_one() -> None:
        if not killed and committed_checkpoints(open_store(str(tmp_path / "two"))):
            killed.append(train_workers()[-1])
            os.kill(killed[0], signal.SIGKILL)

    result = train(job_for(sprites, tmp_path / "two", epochs), two_workers, kill_one)
    assert killed, "no worker was there to be killed"
    assert result.step == undisturbed.step
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    attempts = {name.rsplit("-", 1)[-1] for _, name in committed_checkpoints(open_store(str(tmp_path / "two")))}
    assert len(attempts) == 2, "the second attempt went on from a checkpoint of the first"
    load_model(str(tmp_path / "two"))


@pytest.mark.ray
@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_at_once(two_workers: ClusterSpec, sprites: Path, tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=r"(loss is|weights are not finite).*lower optim.lr") as raised:
        train(job_for(sprites, tmp_path / "run", "optim.lr=1e30"), two_workers)
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
