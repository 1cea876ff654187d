"""What a run is: its specs, its identity, its claim on a folder, and its result."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from aecore._base.trainable import ModelSpec
from aecore.checkpoint import newest_checkpoint, read_checkpoint
from aecore.data.loader import InputSpec
from aecore.data.manifest import Dataset, open_dataset
from aecore.data.order import check_lanes
from aecore.data.transform import TransformSpec
from aecore.errors import ConfigError
from aecore.generations import claim_generation, read_json, require_same
from aecore.metrics import read_rows
from aecore.optim import OptimSpec
from aecore.registry import knob, spec, to_dict
from aecore.store import Store

CLAIM = "run.000001.json"


@spec
class TrainSpec:
    """How long, in which batches, from which seed."""

    split: str = knob("train", "split to train on")
    val_split: str | None = knob(None, "split to validate on after each epoch; none: no validation")
    epochs: int = knob(10, "passes over the split", ge=1)
    max_steps: int = knob(0, "stop after this many steps; 0: after the epochs", ge=0)
    global_batch: int = knob(128, "samples per step over all ranks; a multiple of train.lanes", ge=1)
    lanes: int = knob(16, "lanes of the input order: the largest possible number of ranks", ge=1)
    block: int = knob(4096, "samples that are shuffled together inside a lane", ge=1)
    seed: int = knob(0, "seed of weights, order and noise", ge=0)
    precision: Literal["fp32", "bf16"] = knob("fp32", "fp32, or bf16 autocast (heads and losses stay fp32)")
    init_from: str | None = knob(None, "run or checkpoint whose weights are the start")
    log_every_s: float = knob(10.0, "seconds between metric parts (at checkpoints and epoch ends in any case)", ge=0, identity=False)


@spec
class CheckpointSpec:
    """When checkpoints are written and which are kept."""

    every_steps: int = knob(0, "steps between checkpoints; 0: one at each epoch's end", ge=0, identity=False)
    keep: int = knob(2, "newest checkpoints to keep (the best one is kept besides)", ge=1, identity=False)
    best: bool = knob(False, "publish the weights of the epoch with the lowest validation loss instead of the last ones")


def require_possible(train: TrainSpec, checkpoint: CheckpointSpec, num_workers: int = 1) -> None:
    """ConfigError for combinations that cannot work, whatever the data: known before anything is read."""
    check_lanes(train.global_batch, train.lanes, max(num_workers, 1))
    if checkpoint.best and train.val_split is None:
        raise ConfigError("checkpoint.best chooses by the validation loss: set train.val_split, or checkpoint.best=false")


@dataclass(frozen=True)
class TrainJob:
    """Everything that decides a run. `data` is a dataset's URL, `out` the run's; the rest are specs."""

    data: str
    out: str
    model: ModelSpec
    backbone: Any  # any: a registered backbone's spec
    transform: TransformSpec = field(default_factory=TransformSpec)
    optim: OptimSpec = field(default_factory=OptimSpec)
    train: TrainSpec = field(default_factory=TrainSpec)
    checkpoint: CheckpointSpec = field(default_factory=CheckpointSpec)
    input: InputSpec = field(default_factory=InputSpec)

    def __post_init__(self) -> None:
        require_possible(self.train, self.checkpoint)

    def identity(self, dataset: Dataset) -> dict[str, Any]:
        """Return what can change the weights: the specs and the content of the splits that are read."""
        parts = {name: getattr(self, name) for name in ("model", "backbone", "transform", "optim", "train", "checkpoint", "input")}
        splits = [split for split in (self.train.split, self.train.val_split) if split is not None]
        return {
            **{name: to_dict(part, identity_only=True) for name, part in parts.items()},
            "data": {split: dataset.manifest.training_key(split) for split in splits},
        }


@dataclass(frozen=True, slots=True)
class RunResult:
    """What `fit` leaves behind: the published model, its step, the last row of metrics (with `validation` if there was any)."""

    url: str
    model_url: str
    step: int
    metrics: Mapping[str, Any]
    checkpoint_sha256: str


def pinned_dataset(job: TrainJob, store: Store) -> Dataset:
    """Open the dataset generation that the run started with (the newest one for a new run)."""
    if store.size(CLAIM) is None:
        return open_dataset(job.data)
    return open_dataset(job.data, number=read_json(store, CLAIM)["info"]["dataset_number"])


def claim_run(job: TrainJob, store: Store, dataset: Dataset) -> None:
    """Claim `out` for this job, or continue it; ConfigError with the differing fields if another job owns it."""
    identity = job.identity(dataset)
    if store.size(CLAIM) is not None:
        require_same(store.url, "run", identity, read_json(store, CLAIM)["identity"])
        return
    info = {
        "data": job.data,
        "dataset_number": dataset.manifest.number,
        "dataset_sha256": dataset.manifest.dataset_sha256,
        "total_steps": total_steps(job, dataset),
    }
    claim_generation(store, "run", identity, info)
    require_same(store.url, "run", identity, read_json(store, CLAIM)["identity"])


def total_steps(job: TrainJob, dataset: Dataset) -> int:
    per_epoch = -(-dataset.manifest.num_samples(job.train.split) // job.train.global_batch)
    steps = job.train.epochs * per_epoch
    return min(steps, job.train.max_steps) if job.train.max_steps else steps


def finished_run(store: Store) -> RunResult | None:
    """Return the result of a run whose model is published, None if it is not (yet)."""
    if store.size("model/checkpoint.json") is None:
        return None
    model = read_checkpoint(store, "model")
    newest = newest_checkpoint(store)
    rows = read_rows(store, newest.metrics[-1:]) if newest is not None else []
    return RunResult(store.url, f"{store.url}/model", model.step, rows[-1] if rows else {}, model.sha256)
