"""fit(): train one model on one dataset, on any number of ranks, with the same result.

A step is one global batch in the order of `aecore.data.read.order`; its noise is drawn for the whole batch and sliced by position; a rank
multiplies its mean loss by n_r W / n_global, so DDP's average over ranks is the mean over the batch. Learning rate and beta are pure
functions of the step, so the cursor of a run is one integer. Losses stay on the device until a flush (one all-reduce for all steps
since the last), so no step waits for a log line; a NaN is therefore seen at the next flush, before a checkpoint could hold it.

The same number of ranks gives the same bits. Between different numbers only rounding differs: 1e-7 of a loss over 500 steps with a smooth
activation (the default). Behind ReLU a unit that is dead but for one sample on the kink has a gradient of zero here and not there,
and Adam scales both to whole steps: 1e-5 after 100 steps, 1e-2 after 500 (measured on MNIST, 784-256-256-20).
"""

import logging
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from aecore._base.batch import Batch
from aecore._base.noise import seed_generators, seed_of
from aecore.artifact.withdrawn import made_of
from aecore.checkpoint.files import (
    STATE,
    WEIGHTS,
    CheckpointRef,
    best_of_attempts,
    committed_checkpoints,
    newest_checkpoint,
    publish_model,
    read_checkpoint,
    remove_checkpoint,
    same_as_published,
)
from aecore.checkpoint.weights import load_state, load_weights, require_finite_weights, write_checkpoint
from aecore.data.format.transform import Transform
from aecore.errors import DataError, Interrupted, StoreError
from aecore.loss import LossResult
from aecore.training.job import CheckpointSpec, TrainJob, TrainSpec, model_config, require_batches_fit, start_from
from aecore.training.metric_log import MetricLog
from aecore.training.metrics import is_row
from aecore.training.objective import Objective, noise_for
from aecore.training.optimizer import build_optimizer, load_optimizer, lr_at, set_lr
from aecore.training.preflight import schedule_warnings
from aecore.training.ranks import Rank, all_sum, buffers_from_rank_zero, from_rank_zero, require_equal_parameters
from aecore.training.result import RunResult, finished_run, result_of
from aecore.training.session import Session
from aecore.training.validation import require_finite_samples, validate

__all__ = ["CheckpointSpec", "OnCheckpoint", "Rank", "RunResult", "TrainJob", "TrainSpec", "fit"]

logger = logging.getLogger(__name__)
LARGE_LOSS = 1e6  # of a first step: of values that no scale fits


OnCheckpoint = Callable[[CheckpointRef | None, Mapping[str, Any]], None]
Stop = Callable[[], bool]


def fit(
    job: TrainJob,
    *,
    rank: Rank = Rank(),  # noqa: B008  # frozen
    on_checkpoint: OnCheckpoint | None = None,
    stop: Stop = bool,
) -> RunResult:
    """Train to the end (from the newest checkpoint if there is one) and publish `<out>/model/`.

    Every rank calls it with the same job; with `rank.world_size > 1` the default process group must exist. Killed at any instant and
    called again, it ends with the same losses and weights (bit-equal for the same world size and threads). A finished run returns
    at once. `on_checkpoint(ref, metrics)` is called on every rank at the same steps; `ref` is None on all ranks but 0.

    Once `stop` returns True the run ends: the current step is finished, its checkpoint written, and Interrupted raised on all
    ranks. It is called on rank 0 only: after every step, or, with other ranks, about once a second. At the last step the
    run is finished instead. At another epoch's end the checkpoint is written without waiting for the validation: the next attempt
    makes that up, and ends as if nothing had been.

    Raises ConfigError (another job owns `out`, an impossible combination), DataError (no or unfitting data), Diverged (loss or
    weights not finite), Interrupted (`stop`).
    """
    with closing(_claimed(job, rank)) as session:
        result = finished_run(session.store, session.run_sha256)
        done = from_rank_zero(rank, "done" if result is not None else None)
        if not done:
            result = _Training(session, on_checkpoint, stop).run()
        result = result or finished_run(session.store, session.run_sha256)
    assert result is not None
    return result


def _claimed(job: TrainJob, rank: Rank) -> Session:
    """Return the session of a rank; rank 0 claims the run first, so that the others open the dataset generation that the claim names."""
    if rank.rank > 0:
        from_rank_zero(rank, None)
        return Session(job, rank)
    session = Session(job, rank)
    try:
        session.take()
    except BaseException:
        session.close()
        raise
    from_rank_zero(rank, None)
    return session


class _Training:
    """One attempt of a run on one rank."""

    def __init__(self, session: Session, on_checkpoint: OnCheckpoint | None = None, stop: Stop = bool) -> None:
        self.session, self.on_checkpoint = session, on_checkpoint
        job, store, dataset, rank = session.job, session.store, session.dataset, session.rank
        self.job, self.store, self.dataset, self.rank = job, store, dataset, rank
        self.attempt = str(from_rank_zero(rank, secrets.token_hex(4)))
        self.config = model_config(job, dataset, session.classes)
        self.run_sha256 = session.run_sha256
        model = session.model
        require_batches_fit(job, dataset, model, rank.world_size)
        self.loader, self.val_loader = session.loaders
        self.total_steps = session.total_steps
        for warning in schedule_warnings(job.model, self.total_steps) if rank.rank == 0 else ():
            logger.warning("%s", warning)
        self.log = MetricLog(store, rank, self.attempt, job.train.log_every_s, self._require_finite_data, stop)
        self.best: dict[str, Any] | None = None
        self.kept: list[str] = []  # checkpoints of this attempt and the one that it resumed from, oldest first
        self.objective = Objective(model, Transform(job.transform), job.model.likelihood).to(rank.device)
        self.parameters = list(self.objective.parameters())
        self.optimizer = build_optimizer(job.optim, self.objective)
        self.step = 0
        self.held: dict[str, Any] | None = None  # the row of this step, an epoch's end, where the attempt before stopped without validation
        self._resume()
        self.wrapped = DistributedDataParallel(self.objective, gradient_as_bucket_view=True) if rank.world_size > 1 else self.objective

    def _resume(self) -> None:
        """Load the newest valid checkpoint (rank 0 chooses), if there is one.

        A concurrent attempt at this run may remove it meanwhile, once it has written a newer one.
        """
        name = self._newest()
        while name is not None:
            failure = self._load(name)
            if not all_sum(self.rank, torch.tensor([failure is not None])):
                return
            gone, name = name, self._newest()
            if name in (gone, None):
                raise failure or DataError(f"{self.store.url}/{gone} could not be read by another rank: run the same command again")
        if self.job.train.init_from is not None:
            start_from(self.objective.model, self.session.initial(self.job.train.init_from))

    def _newest(self) -> str | None:
        newest = newest_checkpoint(self.store, self.run_sha256) if self.rank.rank == 0 else None
        return from_rank_zero(self.rank, None if newest is None else newest.name)

    def _load(self, name: str) -> DataError | None:
        """Load weights, optimizer, metrics and step of a checkpoint; return the error if that failed."""
        try:
            checkpoint = read_checkpoint(self.store, name)
            where = f"{self.store.url}/{name}"
            if not 0 < checkpoint.step <= self.total_steps:
                raise DataError(f"{where} is of step {checkpoint.step}, this run has steps 1 to {self.total_steps}: move it away")
            load_weights(self.objective.model, self.store, checkpoint)
            require_finite_weights(self.objective.model, f"{where}/{WEIGHTS}")
            state = load_state(self.store, checkpoint)
            load_optimizer(self.optimizer, state["optimizer"], checkpoint.step, f"{where}/{STATE}")
            held = state.get("held")
            if held is not None and (self.val_loader is None or not is_row(held, checkpoint.step)):
                raise DataError(f"{where}/{STATE} holds a row that waits for a validation, and it is none of this run: move {name} away")
        except DataError as error:
            return error
        self.held = held
        self.log.resume(checkpoint.metrics, checkpoint.step - (self.held is not None))
        self.kept, self.best = [name], None if checkpoint.best is None else dict(checkpoint.best)
        self.step = checkpoint.step
        if self.rank.rank == 0:
            logger.info("resuming from step %d of %d (%s)", checkpoint.step, self.total_steps, name)
        return None

    def run(self) -> RunResult | None:
        """Take every remaining step, then publish the chosen weights; return the result where it is known without reading it."""
        started = time.perf_counter()
        self.objective.train()
        if self.held is not None:
            self._make_up(self.held)
        with closing(self.loader.batches(start_step=self.step, stop_step=self.total_steps)) as batches:
            for batch in batches:
                self.objective.model.require_samples(batch)
                self._train_step(batch.to(self.rank.device))
                self.step += 1
                if self._after_step(started):
                    started = time.perf_counter()
        result = self._publish() if self.rank.rank == 0 else None
        from_rank_zero(self.rank, None)  # no rank returns before the model is published
        return result

    def _train_step(self, batch: Batch) -> None:
        job, step = self.job, self.step + 1
        samples = len(batch.positions)
        lr = lr_at(job.optim, step, self.total_steps)
        beta = job.model.beta_at(step)
        set_lr(self.optimizer, lr)
        self.objective.model.at_step(step)
        seed_generators(seed_of("step", job.train.seed, step, self.rank.rank), self.rank.device)  # dropout in user nets resumes exactly
        batch = self.objective.transform.draw(batch, job.train.seed, step)
        result = self._loss(batch, noise_for(self.objective.model, batch, job.train.seed, step), beta)
        for parameter in self.parameters:  # 40 us less than the optimizer's own
            parameter.grad = None
        (result.objective * (samples * self.rank.world_size / batch.num_global)).backward()  # type: ignore[no-untyped-call]  # torch
        if job.optim.clip:
            torch.nn.utils.clip_grad_norm_(self.parameters, job.optim.clip)
        self.optimizer.step()
        row = {"step": step, "epoch": self.step // self.loader.steps_per_epoch, "samples": batch.num_global, "lr": lr, "beta": beta}
        self.log.add(row, result.reported, samples)

    def _loss(self, batch: Batch, eps: Tensor | None, beta: float) -> LossResult:
        weight = torch.tensor(beta, device=self.rank.device)  # a tensor: a new Python float would compile again at every step
        bf16 = self.job.train.precision == "bf16"
        with torch.autocast(torch.device(self.rank.device).type, torch.bfloat16, enabled=bf16):
            result: LossResult = self.wrapped(batch, eps, weight)
        return result

    def _after_step(self, started: float) -> bool:
        """Flush, validate and checkpoint where this step or a request to stop asks for it; True at an epoch's end."""
        last = self.step == self.total_steps
        epoch_end = self.step % self.loader.steps_per_epoch == 0 or last
        due = self._checkpoint_due(epoch_end)
        if not (due or epoch_end or self.log.due):
            return False
        if epoch_end:
            buffers_from_rank_zero(self.rank, self.objective)
        validates = epoch_end and self.val_loader is not None
        hold = validates and not last and self.log.agree_to_stop()  # the next attempt validates: the time to stop in may be short
        row = self.log.flush(self._validate() if validates and not hold else None, commit=due or epoch_end, hold=hold)
        self._warn_of_scale(row)
        if epoch_end:
            require_equal_parameters(self.rank, self.objective, self.step)
        if epoch_end and not hold:
            self._log_epoch(time.perf_counter() - started)
        if due or self.log.stopping:
            self.held = row if hold else None
            self._checkpoint(row)
        if self.log.stopping and not last:
            raise Interrupted(
                f"interrupted at step {self.step}: checkpoint step-{self.step:08d} written; the same command goes on from there"
            )
        return epoch_end

    def _warn_of_scale(self, row: Mapping[str, Any]) -> None:
        """Warn if the loss of the first step says that the samples' values, which are taken as they are, are large."""
        loss = row.get("loss", 0.0) if row.get("step") == 1 and self.job.transform.scale == "none" else 0.0
        if loss > LARGE_LOSS and self.rank.rank == 0:
            logger.warning(
                "the loss begins at %.2g with transform.scale=none, which takes the values as they are: training of large ones is slow or "
                "diverges. uint8 and uint16 have transform.scale=unit; save other numbers as floats of about 1 "
                "(array.astype('float32') / largest)",
                loss,
            )

    def _checkpoint_due(self, epoch_end: bool) -> bool:
        spec, last = self.job.checkpoint, self.step == self.total_steps
        every = self.step % spec.every_steps == 0 if spec.every_steps else epoch_end
        return last or every or (epoch_end and spec.best)

    def _make_up(self, row: dict[str, Any]) -> None:
        """Do what the attempt before left out at this epoch's end: validate, log, and write the checkpoint that knows the validation."""
        started = time.perf_counter()
        self.objective.model.at_step(self.step)
        row, self.held = self.log.release(row, self._validate()), None
        self._log_epoch(time.perf_counter() - started)
        if self._checkpoint_due(epoch_end=True):
            self._checkpoint(row)

    def _validate(self) -> dict[str, float]:
        assert self.val_loader is not None
        train = self.job.train
        return validate(self.objective, self.val_loader, seed=seed_of("validation", train.seed), batch=train.global_batch, rank=self.rank)

    def _require_finite_data(self, step: int | None) -> None:
        """Raise DataError if a sample of a step (None: of validation) is not finite; tars without an index cannot be read again."""
        if step is None and self.val_loader is not None:
            loader = self.val_loader
            with closing(loader.range_batches(0, loader.num_samples, self.job.train.global_batch)) as batches:
                require_finite_samples(batches, loader.rows)
        elif step is not None and (found := self.loader.reread(step)) is not None:  # the batch of all ranks: all raise the same error
            batch, rows = found
            require_finite_samples([batch], rows)

    def _log_epoch(self, seconds: float) -> None:
        if self.rank.rank == 0:
            mean = self.log.epoch.to_dict()
            validation = f", validation {mean['validation']['loss']:.4f}" if "validation" in mean else ""
            text = "epoch %d: step %d of %d, mean loss %.4f%s, %.1f s"
            logger.info(text, mean["epoch"], self.step, self.total_steps, mean["loss"], validation, seconds)

    def _checkpoint(self, row: Mapping[str, Any]) -> None:
        buffers_from_rank_zero(self.rank, self.objective)
        require_equal_parameters(self.rank, self.objective, self.step)
        ref = None
        if self.rank.rank == 0:
            name = f"checkpoints/step-{self.step:08d}-{self.attempt}"
            if self.job.checkpoint.best and "validation" in row:
                loss = row["validation"]["loss"]
                if self.best is None or loss < self.best["loss"]:
                    self.best = {"name": name, "step": self.step, "loss": loss}
            with made_of(self.dataset.url, self.dataset.number, f"{self.store.url}/{name}"):
                ref = write_checkpoint(
                    self.store,
                    name,
                    self.objective.model,
                    self.config,
                    step=self.step,
                    state={
                        "step": self.step,
                        "optimizer": self.optimizer.state_dict(),
                        **({} if self.held is None else {"held": self.held}),
                    },
                    metrics=tuple(self.log.parts),
                    best=self.best,
                    info=self._lineage(),
                )
            self.kept.append(name)
            try:
                self._retain()
            except StoreError as error:  # the checkpoint is committed; the next one tries again
                logger.warning("old checkpoints stay for now: %s", error)
        if self.on_checkpoint is not None:
            self.on_checkpoint(ref, row)

    def _lineage(self) -> dict[str, Any]:
        return {
            "dataset_sha256": self.dataset.dataset_sha256,
            "dataset_number": self.dataset.number,
            "train_split": self.job.train.split,
            "total_steps": self.total_steps,
            "run_sha256": self.run_sha256,
        }

    def _retain(self) -> None:
        """Keep the newest `keep` checkpoints of this attempt (known to be good); remove all older steps but the best ones.

        Best ones of other attempts are kept too: one may be running now, and its next checkpoint names its best one again.
        """
        self.kept = self.kept[-self.job.checkpoint.keep :]
        oldest = int(self.kept[0].split("-")[1])
        committed = committed_checkpoints(self.store)
        spared = {*self.kept, *best_of_attempts(self.store, committed)}
        for step, name in committed:
            if step < oldest and name not in spared:
                remove_checkpoint(self.store, name)

    def _publish(self) -> RunResult | None:
        newest = newest_checkpoint(self.store, self.run_sha256)
        if newest is None or newest.step != self.total_steps:
            left = "the beginning" if newest is None else f"step {newest.step}"
            raise DataError(
                f"{self.store.url}: the checkpoint of step {self.total_steps}, the last one, was written and cannot be read back (the log "
                f"names the file): its disk may be failing. Run the same command again: it continues from {left}"
            )
        chosen = newest if newest.best is None else read_checkpoint(self.store, newest.best["name"])
        chosen = same_as_published(self.store, chosen)
        with made_of(self.dataset.url, self.dataset.number, f"{self.store.url}/model"):
            model = publish_model(self.store, chosen)
        logger.info("published step %d as %s/model (%s)", model.step, self.store.url, model.sha256[:12])
        mean = self.log.epoch.to_dict()  # of the last step; a better one's has to be read
        return result_of(self.store, model, mean) if mean.get("step") == model.step else None
