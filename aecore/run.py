"""What a run is: its specs, its identity, its claim on a folder, and its result."""

import dataclasses
import logging
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from aecore._base.trainable import ModelSpec, Trainable
from aecore.checkpoint import LoadedModel, load_model, newest_checkpoint, read_checkpoint
from aecore.compatible import require_labels
from aecore.data.bags import BagLoader
from aecore.data.dataset import Dataset, open_dataset
from aecore.data.loader import InputSpec, Loader, TrainLoader
from aecore.data.names import split_in_version_1
from aecore.data.order import TrainingOrder
from aecore.data.pairs import PairSpec
from aecore.data.stream import StreamLoader, open_stream
from aecore.data.transform import TransformSpec
from aecore.errors import ConfigError, DataError
from aecore.generations import claim_generation, read_json, require_kind, require_same
from aecore.metrics import epoch_of
from aecore.model_config import ModelConfig
from aecore.nn import linear_path
from aecore.optim import OptimSpec
from aecore.preflight import require_batch_statistics
from aecore.registry import MODELS, absent_values, as_recorded, knob, spec, to_dict
from aecore.store import Store

logger = logging.getLogger(__name__)

CLAIM = "run.000001.json"
_SPECS = ("model", "backbone", "transform", "optim", "train", "checkpoint", "input", "pairs")  # of a job


@spec
class TrainSpec:
    """How long, in which batches, from which seed."""

    split: str = knob("train", "split to train on")
    val_split: str | None = knob(None, "split to validate on after each epoch; none: no validation")
    epochs: int = knob(10, "passes over the split", ge=1)
    max_steps: int = knob(0, "stop after this many steps; 0: after the epochs", ge=0)
    global_batch: int = knob(128, "samples (bags, for a model that takes bags) per step over all ranks; a multiple of train.lanes", ge=1)
    lanes: int = knob(16, "lanes of the input order: the largest possible number of ranks", ge=1)
    block: int = knob(4096, "samples that are shuffled together inside a lane", ge=1)
    seed: int = knob(0, "seed of weights, order and noise", ge=0)
    precision: Literal["fp32", "bf16"] = knob("fp32", "fp32, or bf16 autocast (heads and losses stay fp32)")
    init_from: str | None = knob(None, "run or checkpoint whose weights are the start (its hash is what counts)", identity=False)
    log_every_s: float = knob(10.0, "seconds between metric parts (at checkpoints and epoch ends in any case)", ge=0, identity=False)

    def order(self, rank: int = 0, world: int = 1) -> TrainingOrder:
        """Return the input order as `rank` of `world` reads it; ConfigError if lanes, batch and ranks do not fit each other."""
        return TrainingOrder(seed=self.seed, lanes=self.lanes, block=self.block, global_batch=self.global_batch, rank=rank, world=world)


@spec
class CheckpointSpec:
    """When checkpoints are written and which are kept."""

    every_steps: int = knob(0, "steps between checkpoints; 0: one at each epoch's end", ge=0, identity=False)
    keep: int = knob(2, "newest checkpoints to keep (the best one is kept besides)", ge=1, identity=False)
    best: bool = knob(False, "publish the weights of the epoch with the lowest validation loss instead of the last ones")


def require_possible(train: TrainSpec, checkpoint: CheckpointSpec, num_workers: int = 1) -> None:
    """ConfigError for combinations that cannot work, whatever the data: known before anything is read."""
    train.order(world=max(num_workers, 1))
    if checkpoint.best and train.val_split is None:
        raise ConfigError("checkpoint.best chooses by the validation loss: set train.val_split, or checkpoint.best=false")


def require_pairs_are_taken(pairs: PairSpec, kind: str, model: type[Trainable] | None = None) -> None:
    """ConfigError if pairs are asked for and the model (by default the class that `kind` builds) trains on single samples."""
    if pairs in (type(pairs)(), as_recorded(type(pairs)(), {})):  # the default of today, or of an older run
        return
    if "x2" in model.train_inputs if model is not None else _takes(kind, "x2"):
        return
    asked = ", ".join(f"pairs.{name}={value}" for name, value in to_dict(pairs).items())
    raise ConfigError(f"{asked} draws pairs, but model.kind={kind} trains on single samples: remove pairs.*, or use model.kind=adagvae")


def _takes(kind: str, field: str) -> bool:
    """Return whether the model that `kind` builds trains on a field of `Batch` (True if its build function does not say which it is)."""
    built = MODELS.built_type(kind)
    return not isinstance(built, type) or not issubclass(built, Trainable) or field in built.train_inputs


def require_streamable(train: TrainSpec, input: InputSpec) -> None:
    """ConfigError for what tars without an index cannot give."""
    if not input.streams:
        return
    if not train.max_steps and (input.resampled or not input.epoch_samples):
        raise ConfigError(
            "input.reader=webdataset does not know how many samples there are: set train.max_steps"
            + ("" if input.resampled else ", or input.epoch_samples with train.epochs")
        )
    if train.val_split is not None:
        raise ConfigError(
            f"train.val_split={train.val_split} needs an index, which input.reader=webdataset does not have: "
            "`aepipe adopt SRC DATASET` makes one without a copy; or leave train.val_split out"
        )


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

    def identity(self, dataset: Dataset, init_sha256: str | None) -> dict[str, Any]:
        """Return what can change the weights: the specs, the content of the splits that are read, the checkpoint of `init_from`."""
        parts = {name: getattr(self, name) for name in _SPECS}
        if self.pairs == as_recorded(type(self.pairs)(), {}):  # left out where it says what runs without it do: most models draw no pairs
            del parts["pairs"]
        splits = [split for split in (self.train.split, self.train.val_split) if split is not None]
        return {
            **{name: to_dict(part, identity_only=True) for name, part in parts.items()},
            "input": self.input.identity(),
            "data": {split: dataset.manifest.training_key(split) for split in splits},
            "init_sha256": init_sha256,
        }

    def as_recorded(self, identity: Mapping[str, Any]) -> "TrainJob":
        """Return the job as a run of this identity wants it: later fields that nobody changed mean what they meant when it was claimed."""
        there: dict[str, Mapping[str, Any]] = {name: identity.get(name, {}) for name in _SPECS}
        return dataclasses.replace(self, **{name: as_recorded(getattr(self, name), there[name]) for name in _SPECS})

    def absent_values(self) -> dict[str, Any]:
        """Return what the absence of later fields means, nested like the identity."""
        return {name: absent_values(getattr(self, name)) for name in _SPECS}


@dataclass(frozen=True, slots=True)
class RunResult:
    """What `fit` leaves behind: the published model, its step, and the means of that step's epoch (see `aecore.metrics.EpochMean`)."""

    url: str
    model_url: str
    step: int
    metrics: Mapping[str, Any]
    checkpoint_sha256: str


def recorded_job(job: TrainJob, store: Store) -> TrainJob:
    """Return the job as the run at `store` wants it, if one is claimed there: see `TrainJob.as_recorded`."""
    if store.size(CLAIM) is None:
        return job
    return job.as_recorded(read_json(store, CLAIM).get("identity", {}))


def pinned_dataset(job: TrainJob, store: Store) -> Dataset:
    """Open the dataset generation that the run started with (the newest one for a new run); ConfigError if `store` holds no run."""
    require_kind(store, "run")
    if job.input.streams:
        return _claimed_stream(job, store) or open_stream(job.data, job.train.split, job.input.member)
    if store.size(CLAIM) is None:
        return open_dataset(job.data)
    return open_dataset(job.data, number=read_json(store, CLAIM)["info"]["dataset_number"])


def _claimed_stream(job: TrainJob, store: Store) -> Dataset | None:
    """Return the tars that a run of version 1 took for its split, by the words that it knew; None if it is no such run.

    What a stream holds is part of the identity: of tars named `dev` or `testing` that version took every one for training data.
    """
    split = job.train.split
    claimed = None if store.size(CLAIM) is None else read_json(store, CLAIM).get("identity", {}).get("data", {}).get(split)
    if claimed is None:
        return None
    try:
        dataset = open_stream(job.data, split, job.input.member, split_in_version_1)
    except DataError:
        return None
    return dataset if dataset.manifest.training_key(split) == claimed else None


def is_claimed(job: TrainJob, store: Store, dataset: Dataset) -> bool:
    """Return whether `out` belongs to this job already; ConfigError with the differing fields if it belongs to another."""
    require_kind(store, "run")
    if store.size(CLAIM) is None:
        return False
    claimed = read_json(store, CLAIM)["identity"]
    init = claimed["init_sha256"] if job.train.init_from is not None else None  # a run in progress does not need the weights again
    _require_same_run(job, store, dataset, job.identity(dataset, init))
    return True


def _require_same_run(job: TrainJob, store: Store, dataset: Dataset, identity: Mapping[str, Any]) -> None:
    """ConfigError with the differing fields unless the claim of `store` is of this identity."""
    claim = read_json(store, CLAIM)
    places = {"data": (claim["info"].get("data"), dataset.url)}
    longer = f"to train on from the weights of this run, add train.init_from={store.url} and another out"
    hints = {"train.epochs": longer, "train.max_steps": longer}
    require_same(store.url, "run", identity, claim["identity"], places=places, hints=hints, absent=job.absent_values())


def claim_run(job: TrainJob, store: Store, dataset: Dataset, world: int = 1) -> None:
    """Claim `out` for this job, or continue it; ConfigError with the differing fields if another job owns it.

    What cannot be trained at all is refused before the claim (see `require_trainable`).
    """
    if is_claimed(job, store, dataset):
        _warn_of_other_product(store)
        return
    loaded = None if job.train.init_from is None else load_model(job.train.init_from)
    require_trainable(job, dataset, loaded, world)
    identity = job.identity(dataset, None if loaded is None else loaded.sha256)
    info = {
        "data": job.data,
        "dataset_number": dataset.manifest.number,
        "dataset_sha256": dataset.manifest.dataset_sha256,
        "total_steps": total_steps(job, dataset),
        "linear": str(linear_path()),
    }
    claim_generation(store, "run", identity, info)
    _require_same_run(job, store, dataset, identity)


def _warn_of_other_product(store: Store) -> None:
    """Warn if the linear layers of a run use another matrix product than when it began: the last bits of its weights change."""
    begun, now = read_json(store, CLAIM)["info"].get("linear"), linear_path()
    if begun is not None and str(begun).split(" ")[0] != now.name and store.size("model/checkpoint.json") is None:
        text = "%s began with the matrix product %s and goes on with %s: the weights differ in the last bits from those of one machine"
        logger.warning(text, store.url, begun, now)


def model_config(job: TrainJob, dataset: Dataset) -> ModelConfig:
    """Return the config of the model that this job trains on this dataset; sequences may differ in length if it takes lengths."""
    shape = dataset.manifest.input_shape(sequences=_takes(job.model.kind, "lengths"))
    return ModelConfig(job.model, job.backbone, job.transform, shape)


def require_trainable(job: TrainJob, dataset: Dataset, loaded: LoadedModel | None = None, world: int = 1) -> Trainable:
    """Build and return the job's model, unless the dataset, its labels, its pairs or the weights of `init_from` do not fit it.

    Nor if its batches over `world` ranks do not, see `require_batches_fit`.

    Raises ConfigError or DataError; reads the indexes of the split if the model trains on pairs.
    """
    with torch.random.fork_rng(devices=[]):
        model = model_config(job, dataset).build()
    if loaded is not None:
        start_from(model, loaded)
    if not job.input.streams:  # tars without an index say at each batch what labels they have
        require_labels(dataset.url, dataset.manifest.classes, model)
    require_batches_fit(job, dataset, model, world)
    with closing(train_loader(job, dataset, model)) as loader:
        for note in loader.notes:
            logger.info(note)
    return model


def require_batches_fit(job: TrainJob, dataset: Dataset, model: Trainable, world: int) -> None:
    """ConfigError if a step of the run leaves one of `world` ranks too few samples for batch normalisation in the model.

    Of whole bags the number of instances is not known before they are read: they are not looked at.
    """
    if trains_on_bags(job, dataset):
        return
    known = dataset.manifest.num_samples(job.train.split) if not job.input.streams else 0
    shape, order = model_config(job, dataset).input_shape, job.train.order(world=world)
    require_batch_statistics(model, shape, order, known, total_steps(job, dataset), job.train.split)


def train_loader(job: TrainJob, dataset: Dataset, model: Trainable, rank: int = 0, world: int = 1) -> TrainLoader:
    """Return the loader of the training split: of pairs or of whole bags if the model takes them, else of single samples.

    ConfigError if the model takes no pairs and they are asked for.
    """
    require_pairs_are_taken(job.pairs, job.model.kind, type(model))
    order, pairs = job.train.order(rank, world), job.pairs if "x2" in model.train_inputs else None
    if trains_on_bags(job, dataset):
        return BagLoader(dataset, job.train.split, transform=job.transform, order=order, spec=job.input)
    if not job.input.streams:
        return Loader(dataset, job.train.split, transform=job.transform, spec=job.input, order=order, pairs=pairs)
    if pairs is not None:
        raise ConfigError(
            f"model.kind={job.model.kind} trains on pairs, which input.reader=webdataset cannot draw: it has no index. "
            "`aepipe adopt SRC DATASET` makes one without a copy"
        )
    return StreamLoader(
        dataset,
        job.train.split,
        transform=job.transform,
        order=order,
        steps_per_epoch=steps_per_epoch(job, dataset),
        spec=job.input,
    )


def start_from(model: Trainable, loaded: LoadedModel) -> None:
    """Copy the weights of a loaded model; ConfigError if they do not fit."""
    try:
        model.load_state_dict(loaded.model.state_dict())
    except RuntimeError as error:
        raise ConfigError(
            f"train.init_from {loaded.url} does not fit this model: {error}; give model.* and backbone.* as that run has them"
        ) from error


def steps_per_epoch(job: TrainJob, dataset: Dataset) -> int:
    """Return the steps of an epoch; tars without an index have the epochs that `input.epoch_samples` says, or one."""
    if job.input.streams:
        return job.train.order().num_steps(job.input.epoch_samples) or job.train.max_steps
    manifest, split = dataset.manifest, job.train.split
    return job.train.order().num_steps(manifest.num_groups(split) if trains_on_bags(job, dataset) else manifest.num_samples(split))


def trains_on_bags(job: TrainJob, dataset: Dataset) -> bool:
    """Return whether a step takes whole bags: the model takes a `mask`, and the samples of the training split form bags."""
    built = MODELS.built_type(job.model.kind)
    takes_mask = isinstance(built, type) and issubclass(built, Trainable) and "mask" in built.train_inputs
    return takes_mask and not job.input.streams and dataset.manifest.num_groups(job.train.split) > 0


def total_steps(job: TrainJob, dataset: Dataset) -> int:
    steps = job.train.epochs * steps_per_epoch(job, dataset)
    return min(steps, job.train.max_steps) if job.train.max_steps else steps


def finished_run(store: Store) -> RunResult | None:
    """Return the result of a run whose model is published, None if it is not (yet)."""
    if store.size("model/checkpoint.json") is None:
        return None
    model = read_checkpoint(store, "model")
    newest = newest_checkpoint(store, model.info.get("run_sha256"))
    metrics = {} if newest is None else epoch_of(store, newest.metrics, model.step).to_dict()
    return RunResult(store.url, f"{store.url}/model", model.step, metrics, model.sha256)
