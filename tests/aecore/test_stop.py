"""A run that is asked to stop ends its step, writes a checkpoint, and goes on as if nothing had been."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aecore.checkpoint.files import committed_checkpoints, newest_checkpoint
from aecore.errors import Interrupted
from aecore.store import open_store
from aecore.training import loop, metric_log, metrics
from aecore.training.job import TrainJob
from aecore.training.loop import fit
from aecore.training.ranks import Rank
from aecore.training.result import finished_run
from tests.aecore.training import fit_on, losses, on_ranks, published_weights, small_job, sprites_dataset


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return sprites_dataset(tmp_path_factory.mktemp("stop") / "sprites", num_samples=1536, val=0.1)


def at_step(out: str | Path, step: int) -> Callable[[], bool]:
    """Return a request to stop that is made when the metrics of a step are there."""

    def stop() -> bool:
        row = metrics.last_row(open_store(out))
        return row is not None and row["step"] >= step

    return stop


def test_a_stopped_run_says_its_step_and_ends_like_an_uninterrupted_one(data, tmp_path):
    options = {"epochs": 2, "every_steps": 1000, "val_split": "val"}
    fit(small_job(data, tmp_path / "whole", **options))
    job, asked = small_job(data, tmp_path / "run", **options), iter(range(100))
    with pytest.raises(
        Interrupted, match=r"^interrupted at step 8: checkpoint step-00000008 written; the same command goes on from there$"
    ):
        fit(job, stop=lambda: next(asked) >= 7)  # the first flush asks twice
    assert [step for step, _ in committed_checkpoints(open_store(job.out))] == [8]
    assert not (tmp_path / "run/model").exists()
    fit(job)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert published_weights(tmp_path / "run") == published_weights(tmp_path / "whole")


def _stopped_at_epoch_end(job: TrainJob, step: int, rank: Rank) -> None:
    def validates(*args: Any, **options: Any) -> None:
        pytest.fail("the checkpoint waits for the validation")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted, match=f"at step {step}:"):
        patch.setattr(metric_log, "AGREE_S", 1e9)
        patch.setattr(loop, "validate", validates)
        patch.setattr(metric_log.MetricLog, "agree_to_stop", patched_agreement(step))
        fit(job, rank=rank)


def patched_agreement(step: int) -> Callable[[metric_log.MetricLog], bool]:
    """Return `agree_to_stop` for a run whose stop is asked for at this step."""
    agree = metric_log.MetricLog.agree_to_stop

    def agreement(self: metric_log.MetricLog) -> bool:
        assert self._rows[-1]["step"] == step
        self.stop = lambda: True
        return agree(self)

    return agreement


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("options", [{"best": True, "keep": 1}, {"best": True, "every_steps": 15}, {"every_steps": 1000}, {}], ids=str)
def test_a_stop_at_an_epochs_end_leaves_the_validation_to_the_next_attempt(data, tmp_path, options, ranks):
    options = {"epochs": 3, "val_split": "val", **options}
    whole, job = (small_job(data, tmp_path / name, **options) for name in ("whole", "run"))
    _fit(whole, ranks)
    step = next(row["step"] for row in losses(whole.out) if "validation" in row)
    _on(functools.partial(_stopped_at_epoch_end, job, step), ranks)
    assert committed_checkpoints(open_store(job.out))[0][0] == step
    _fit(job, ranks)
    assert losses(job.out) == losses(whole.out)
    assert published_weights(job.out) == published_weights(whole.out)
    found, expected = (newest_checkpoint(open_store(out)).best or {} for out in (job.out, whole.out))
    assert {**found, "name": ""} == {**expected, "name": ""}
    assert finished_run(open_store(job.out)).metrics == finished_run(open_store(whole.out)).metrics


def _on(work: Callable[..., object], ranks: int) -> None:
    work(rank=Rank()) if ranks == 1 else on_ranks(work, ranks)


def _fit(job: TrainJob, ranks: int) -> None:
    _on(functools.partial(fit, job), ranks)


def test_a_request_at_the_last_step_finishes_the_run(data, tmp_path):
    job = small_job(data, tmp_path / "run", max_steps=1)
    assert fit(job, stop=lambda: True).step == 1


def test_an_interrupted_run_is_exit_code_130():
    assert Interrupted.exit_code == 130


def _stopped(job: TrainJob, rank: Rank) -> str:
    metric_log.AGREE_S = 0.0  # in this process: ranks agree at every step
    with pytest.raises(Interrupted) as stopped:
        fit(job, rank=rank, stop=at_step(job.out, 5) if rank.rank == 0 else lambda: pytest.fail("only rank 0 is asked"))
    return str(stopped.value)


def test_all_ranks_stop_at_the_step_that_rank_0_chooses(data, tmp_path):
    options = {"epochs": 2, "every_steps": 1000, "log_every_s": 0.0}
    fit_on(small_job(data, tmp_path / "whole", **options), 2)
    job = small_job(data, tmp_path / "run", **options)
    messages = on_ranks(functools.partial(_stopped, job), 2)
    (step, _), *others = committed_checkpoints(open_store(job.out))
    assert not others
    assert messages == [f"interrupted at step {step}: checkpoint step-{step:08d} written; the same command goes on from there"] * 2
    fit_on(job, 2)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert published_weights(tmp_path / "run") == published_weights(tmp_path / "whole")


def test_ranks_that_agree_often_write_no_more_parts(data, tmp_path, monkeypatch):
    monkeypatch.setattr(metric_log, "AGREE_S", 0.0)
    fit_on(small_job(data, tmp_path / "run", max_steps=20, log_every_s=3600.0), 2)
    parts = [name for name in open_store(tmp_path / "run").list("metrics") if name.endswith(".jsonl")]
    assert len(parts) == 2, "that of the first step, and that of the end"
    assert [row["step"] for row in losses(tmp_path / "run")] == list(range(1, 21))
