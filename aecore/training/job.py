"""The specs, the identity, the checks and the result of a run. The session (`aecore.training.session`) opens what they describe."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from aecore._base.noise import seed_of
from aecore._base.trainable import ModelSpec, Trainable
from aecore.checkpoint.config import ModelConfig
from aecore.checkpoint.weights import LoadedModel
from aecore.data.dataset import TrainingData
from aecore.data.format.transform import TransformSpec
from aecore.data.read.loader import InputSpec
from aecore.data.read.order import TrainingOrder
from aecore.data.read.pairs import PairSpec
from aecore.errors import ConfigError, Hint
from aecore.registry import LARGEST_SIZE, MODELS, absent_values, as_recorded, default_of, knob, spec, to_dict
from aecore.training.optimizer import OptimSpec
from aecore.training.preflight import require_batch_statistics, require_batches_in_memory

HOW_TO_INDEX = " (aecore.data.write.job.adopt_shards; compressed ones: shard_dataset)"  # for users of the library
TRAINING_COPIES = 4  # of the weights, in memory: themselves, their gradients, and the optimizer's two moments
_SPECS = ("model", "backbone", "transform", "optim", "train", "checkpoint", "input", "pairs")  # of a job


@spec
class TrainSpec:
    """How long, in which batches, from which seed."""

    split: str = knob("train", "split to train on")
    val_split: str | None = knob(None, "split to validate on after each epoch; null: no validation")
    epochs: int = knob(10, "passes over the split", ge=1)
    max_steps: int = knob(0, "stop after this many steps; 0: after the epochs", ge=0)
    global_batch: int = knob(
        128, "samples (bags, for a model that takes bags) per step over all ranks; a multiple of train.lanes", ge=1, le=LARGEST_SIZE
    )
    lanes: int = knob(16, "lanes of the input order: the largest possible number of ranks", ge=1, le=1 << 16)
    block: int = knob(4096, "samples that are shuffled together inside a lane", ge=1)
    seed: int = knob(0, "seed of weights, order and noise", ge=0)
    precision: Literal["fp32", "bf16"] = knob("fp32", "fp32, or bf16 autocast (heads and losses stay fp32)")
    init_from: str | None = knob(None, "run or checkpoint whose weights are the start (its hash is what counts)", identity=False)
    log_every_s: float = knob(10.0, "seconds between metric parts (at checkpoints and epoch ends in any case)", ge=0, identity=False)

    def order(self, rank: int = 0, world_size: int = 1) -> TrainingOrder:
        """Return the input order as `rank` of `world_size` reads it; ConfigError if lanes, batch and ranks do not fit each other."""
        return TrainingOrder(
            seed=self.seed, lanes=self.lanes, block=self.block, global_batch=self.global_batch, rank=rank, world_size=world_size
        )


@spec
class CheckpointSpec:
    """When checkpoints are written and which are kept."""

    every_steps: int = knob(0, "steps between checkpoints; 0: one at each epoch's end", ge=0, identity=False)
    keep: int = knob(2, "newest checkpoints to keep (the best one is kept besides)", ge=1, identity=False)
    best: bool = knob(False, "publish the weights of the epoch with the lowest validation loss instead of the last ones")


def require_possible(train: TrainSpec, checkpoint: CheckpointSpec, num_workers: int = 1) -> None:
    """Raise ConfigError for combinations that cannot work with any data, before anything is read."""
    train.order(world_size=max(num_workers, 1))
    if checkpoint.best and train.val_split is None:
        raise ConfigError("checkpoint.best chooses by the validation loss: set train.val_split, or checkpoint.best=false")


def require_pairs_are_taken(pairs: PairSpec, kind: str, model: type[Trainable] | None = None) -> None:
    """Raise ConfigError if pairs are asked for and the model (by default the class that `kind` builds) trains on single samples."""
    if pairs in (type(pairs)(), as_recorded(type(pairs)(), {})):  # the default of today, or of an older run
        return
    if "x_pair" in model.train_inputs if model is not None else _takes(kind, "x_pair"):
        return
    asked = ", ".join(f"pairs.{name}={value}" for name, value in to_dict(pairs).items())
    raise ConfigError(f"{asked} draws pairs, but model.kind={kind} trains on single samples: remove pairs.*, or use model.kind=adagvae")


def _takes(kind: str, field: str) -> bool:
    """Return whether the model that `kind` builds trains on a field of `Batch` (True if its build function names no class)."""
    built = MODELS.built_type(kind)
    return not isinstance(built, type) or not issubclass(built, Trainable) or field in built.train_inputs


def require_streamable(train: TrainSpec, input: InputSpec, source: Any = None) -> None:  # any: the spec of a source, of any kind
    """Raise ConfigError for settings that need an index where the tars have none, and for options of `source` that a stream ignores."""
    if not input.streams:
        return
    if asked := [f"source.{name}" for name in _ignored_options(source, input)]:
        raise ConfigError(
            f"{', '.join(asked)} would have no effect: input.reader=webdataset reads every sample of data, with the labels of .cls "
            "(its own options are input.member, input.max_bad and input.max_pixels): choose tars by a pattern in data, or index the tars "
            "with these options and train on the index, or leave them out",
            hint=Hint("needs-index"),
        )
    if not train.max_steps and (input.resampled or not input.epoch_samples):
        raise ConfigError(
            "input.reader=webdataset does not know how many samples there are: set train.max_steps"
            + ("" if input.resampled else ", or input.epoch_samples with train.epochs")
        )
    if train.val_split is not None:
        raise ConfigError(
            f"train.val_split={train.val_split} needs an index, which input.reader=webdataset does not have: "
            f"index the tars without a copy{HOW_TO_INDEX}, or leave train.val_split out",
            hint=Hint("needs-index", {"python": HOW_TO_INDEX}),
        )


def _ignored_options(source: Any, input: InputSpec) -> list[str]:  # any: as above
    """Return the options of a source's spec that are not at their default and that a stream does not obey."""
    obeyed = {"label": "cls", "member": input.member}  # what a stream does anyway
    fields = () if source is None else dataclasses.fields(source)
    changed = {field.name: value for field in fields if (value := getattr(source, field.name)) != default_of(field)}
    changed = {name: value for name, value in changed.items() if name not in ("kind", "url")}  # of what is sharded: it reads `data`
    return [name for name, value in changed.items() if name not in obeyed or value != obeyed[name]]


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
    pairs: PairSpec = field(default_factory=PairSpec)

    def __post_init__(self) -> None:
        require_possible(self.train, self.checkpoint)
        require_streamable(self.train, self.input)

    def identity(self, data: TrainingData, init_sha256: str | None) -> dict[str, Any]:
        """Return what can change the weights: the specs, the content of the splits that are read, the checkpoint of `init_from`."""
        parts = {name: getattr(self, name) for name in _SPECS}
        if self.pairs == as_recorded(type(self.pairs)(), {}):  # left out at its default: most models draw no pairs
            del parts["pairs"]
        splits = [split for split in (self.train.split, self.train.val_split) if split is not None]
        return {
            **{name: to_dict(part, identity_only=True) for name, part in parts.items()},
            "input": self.input.identity(),
            "data": {split: data.training_key(split) for split in splits},
            "init_sha256": init_sha256,
        }

    def as_recorded(self, identity: Mapping[str, Any]) -> "TrainJob":
        """Return the job as a run of this identity recorded it: fields added since, if unchanged, keep their meaning of that time."""
        return dataclasses.replace(self, **{name: as_recorded(getattr(self, name), identity.get(name, {})) for name in _SPECS})

    def absent_values(self) -> dict[str, Any]:
        """Return what the absence of later fields means, nested like the identity."""
        return {name: absent_values(getattr(self, name)) for name in _SPECS}


def model_config(job: TrainJob, data: TrainingData, classes: tuple[str, ...] | None = None) -> ModelConfig:
    """Return the config of the model that this job trains on this dataset; sequences may differ in length if it takes lengths.

    `classes` are the names of the labels that it takes, None if it takes none.
    """
    shape = data.input_shape(sequences=_takes(job.model.kind, "lengths"))
    return ModelConfig(job.model, job.backbone, job.transform, shape, classes)


def build_model(job: TrainJob, data: TrainingData) -> Trainable:
    """Build the job's model with the weights that its seed gives; torch's own generators stay as they are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of("weights", job.train.seed))
        return model_config(job, data).build(copies=TRAINING_COPIES)


def require_trainable(job: TrainJob, data: TrainingData, model: Trainable, loaded: LoadedModel | None = None, world_size: int = 1) -> None:
    """Raise ConfigError or DataError unless data, batches over `world_size` ranks and the weights of `init_from` fit the model.

    The weights of `loaded` are then those of the model.
    """
    if loaded is not None:
        start_from(model, loaded)
    require_batches_fit(job, data, model, world_size)


def require_batches_fit(job: TrainJob, data: TrainingData, model: Trainable, world_size: int) -> None:
    """Raise ConfigError if a step of the run leaves one of `world_size` ranks too few samples for batch normalisation, or too many.

    Batches of whole bags are not checked: their numbers of instances are not known before they are read.
    """
    if trains_on_bags(job, data):
        return
    known = data.num_samples(job.train.split) or 0
    shape, order = model_config(job, data).input_shape, job.train.order(world_size=world_size)
    require_batches_in_memory(model, shape, order, known)
    require_batch_statistics(model, shape, order, known, total_steps(job, data), job.train.split)


def start_from(model: Trainable, loaded: LoadedModel) -> None:
    """Copy the weights of a loaded model; ConfigError if they do not fit."""
    try:
        model.load_state_dict(loaded.model.state_dict())
    except RuntimeError as error:
        raise ConfigError(
            f"train.init_from {loaded.url} does not fit this model: {error}; give model.* and backbone.* as that run has them"
        ) from error


def steps_per_epoch(job: TrainJob, data: TrainingData) -> int:
    """Return the steps of an epoch; samples that are not counted have epochs of `input.epoch_samples`, or one epoch."""
    order, split = job.train.order(), job.train.split
    known = data.num_groups(split) if trains_on_bags(job, data) else data.num_samples(split)
    return order.num_steps(job.input.epoch_samples) or job.train.max_steps if known is None else order.num_steps(known)


def trains_on_bags(job: TrainJob, data: TrainingData) -> bool:
    """Return whether a step takes whole bags: the model takes a `mask`, and the samples of the training split form bags."""
    built = MODELS.built_type(job.model.kind)
    takes_mask = isinstance(built, type) and issubclass(built, Trainable) and "mask" in built.train_inputs
    return takes_mask and data.num_groups(job.train.split) > 0


def total_steps(job: TrainJob, data: TrainingData) -> int:
    """Return the steps of the whole run."""
    steps = job.train.epochs * steps_per_epoch(job, data)
    return min(steps, job.train.max_steps) if job.train.max_steps else steps
