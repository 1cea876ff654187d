"""A run, opened once: folder, claim, dataset, model and loader, for training and for a dry run alike.

Every look into a bucket costs a request, so nothing is read twice; and all parts of a run see the same claim and the same generation of
the dataset.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
import torch

from aecore._base.trainable import Trainable
from aecore.artifact.commit import claim_generation, newest_of, require_kind, require_same
from aecore.artifact.documents import CLAIM, read_json
from aecore.checkpoint.compatibility import require_labels, takes_labels
from aecore.checkpoint.files import require_own_checkpoints
from aecore.checkpoint.weights import LoadedModel, load_model
from aecore.data.classes import quoted
from aecore.data.dataset import Dataset, TrainingData, open_dataset
from aecore.data.format.sample_format import common_formats
from aecore.data.format.transform import Transform, TransformSpec
from aecore.data.read.bags import BagLoader
from aecore.data.read.loader import Loader, TrainLoader
from aecore.data.read.order import TrainingOrder
from aecore.data.read.stream import StreamDataset, StreamLoader, open_stream
from aecore.data.sources._names import split_in_version_1, split_of
from aecore.errors import ConfigError, DataError, Hint
from aecore.nn import linear_path
from aecore.store import open_store, sha256_json
from aecore.training.job import (
    HOW_TO_INDEX,
    TrainJob,
    build_model,
    model_config,
    require_pairs_are_taken,
    require_trainable,
    steps_per_epoch,
    total_steps,
    trains_on_bags,
)
from aecore.training.preflight import schedule_warnings
from aecore.training.ranks import Rank
from aecore.training.result import finished_run

logger = logging.getLogger(__name__)
Loaders = tuple[TrainLoader, Loader | None]  # of the training split, as one rank reads it, and of the validation split
Classes = tuple[str, ...] | None  # the names that the model's labels number; None: it takes none


def _loaders(dataset: Dataset, job: TrainJob, model: Trainable, order: TrainingOrder, classes: Classes) -> Loaders:
    """Return loaders of whole bags or of pairs if the model takes them, else of single samples; DataError for labels it does not know."""
    whose = "" if job.train.init_from is None else f"train.init_from {job.train.init_from}"
    require_labels(dataset, model, classes, filter(None, (job.train.split, job.train.val_split)), whose)
    split, pairs = job.train.val_split, job.pairs if "x_pair" in model.train_inputs else None
    val = None if split is None else Loader(dataset, split, transform=job.transform, spec=job.input, classes=classes)
    if trains_on_bags(job, dataset):
        return BagLoader(dataset, job.train.split, transform=job.transform, order=order, spec=job.input, classes=classes), val
    return Loader(dataset, job.train.split, transform=job.transform, spec=job.input, order=order, pairs=pairs, classes=classes), val


def _stream_loaders(dataset: StreamDataset, job: TrainJob, model: Trainable, order: TrainingOrder, classes: Classes) -> Loaders:
    """Return the loader of tars without an index, of single samples; ConfigError if the model takes pairs.

    Their labels are checked batch by batch.
    """
    if "x_pair" in model.train_inputs:
        raise ConfigError(
            f"model.kind={job.model.kind} trains on pairs, which input.reader=webdataset cannot draw: it has no index. "
            f"Index the tars without a copy{HOW_TO_INDEX}",
            hint=Hint("needs-index", {"python": HOW_TO_INDEX}),
        )
    steps = steps_per_epoch(job, dataset)
    return StreamLoader(dataset, transform=job.transform, order=order, steps_per_epoch=steps, spec=job.input, classes=classes), None


class Session:
    """The opened parts of a run on one rank. `close` frees its readers.

    Attributes
    ----------
    store
        The run's folder.
    claim
        The run's claim, None before it is claimed.
    dataset
        The generation that the run started with; the newest one for a new run.

    Raises
    ------
    ConfigError
        `job.out` holds no run, but something else.
    DataError
        There is no dataset.
    """

    def __init__(self, job: TrainJob, rank: Rank = Rank()) -> None:  # noqa: B008  # frozen
        self.job, self.rank, self.store = job, rank, open_store(job.out)
        names = self.store.list()
        number = newest_of(names, "run")
        self.claim = None if number is None else read_json(self.store, f"run.{number:06d}.json")
        if self.claim is not None and (number != 1 or self.claim.get("kind", "run") != "run"):
            require_kind(self.store, "run", names)
            self.claim = read_json(self.store, CLAIM)
        if self.claim is not None:
            self.job = job.as_recorded(self.claim.get("identity", {}))
        self.dataset, self._make_loaders = self._open()
        self._loaded: LoadedModel | None = None

    def _open(self) -> tuple[TrainingData, Callable[[TrainJob, Trainable, TrainingOrder, Classes], Loaders]]:
        """Open what the job trains on and choose its loaders: nothing else depends on the kind of data."""
        job = self.job
        if job.input.streams:
            stream = self._claimed_stream() or open_stream(
                job.data, job.train.split, job.input.member, pixels=job.transform.pixels, max_pixels=job.input.max_pixels
            )
            return stream, partial(_stream_loaders, stream)
        dataset = open_dataset(job.data, number=None if self.claim is None else self.claim["info"]["dataset_number"])
        return dataset, partial(_loaders, dataset)

    def _claimed_stream(self) -> StreamDataset | None:
        """Return the tars that a run took for its split, by the rules that it began with; None if these are not its tars, or it is new.

        The tars of a stream are part of the identity: of tars named `dev` or `testing` version 1 took every one for training data. So are
        the rules by which members become samples.
        """
        job, split = self.job, self.job.train.split
        claimed = None if self.claim is None else self.claim.get("identity", {}).get("data", {}).get(split)
        if claimed is None:
            return None
        known: tuple[tuple[Callable[[str], str], Literal[1, 2]], ...] = ((split_of, 2), (split_in_version_1, 1), (split_of, 1))
        for split_in_name, rules in known:
            with contextlib.suppress(DataError):
                dataset = open_stream(job.data, split, job.input.member, split_in_name, rules, job.transform.pixels, job.input.max_pixels)
                if dataset.training_key(split) == claimed:
                    return dataset
        return None

    @cached_property
    def model(self) -> Trainable:
        """The job's model, with the weights of its seed, or those of `init_from`."""
        return build_model(self.job, self.dataset)

    @cached_property
    def classes(self) -> Classes:
        """The names that the model's labels number, in order, from the run's beginning to its end; None if it takes no labels.

        They are those of `init_from`, whose weights know no others, else those of the dataset; of tars without an index the numbers.
        """
        if not takes_labels(self.model):
            return None
        recorded = None if self.claim is None else self.claim["info"].get("classes")
        if recorded is not None:
            return tuple(recorded)
        if self._loaded is not None and self._loaded.config.classes is not None:
            return self._loaded.config.classes
        if self.dataset.classes is not None:
            return self.dataset.classes
        return None if self.model.num_classes is None else tuple(map(str, range(self.model.num_classes)))

    @cached_property
    def loaders(self) -> Loaders:
        """What this rank reads; ConfigError if pairs are asked for and the model takes none."""
        job = self.job
        require_pairs_are_taken(job.pairs, job.model.kind, type(self.model))
        return self._make_loaders(job, self.model, job.train.order(self.rank.rank, self.rank.world_size), self.classes)

    @cached_property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return total_steps(self.job, self.dataset)

    @property
    def run_sha256(self) -> str:
        """The hash of the claimed identity: checkpoints of this run carry it."""
        assert self.claim is not None
        return sha256_json(self.claim["identity"])

    def is_claimed(self) -> bool:
        """Return whether `out` belongs to this job already; ConfigError with the differing fields if it belongs to another."""
        if self.claim is None:
            return False
        # a run in progress does not need the weights of `init_from` again
        init = self.claim["identity"]["init_sha256"] if self.job.train.init_from is not None else None
        self._require_same(self.job.identity(self.dataset, init))
        return True

    def _require_same(self, identity: Mapping[str, Any]) -> None:
        assert self.claim is not None
        urls = {"data": (self.claim["info"].get("data"), self.dataset.url)}
        longer = f"to train on from the weights of this run, add train.init_from={self.store.url} and another out"
        hints = {"train.epochs": longer, "train.max_steps": longer}
        begun, now = self.claim["info"].get("classes"), self.dataset.classes
        if begun is not None and now is not None and tuple(begun) != now and self.job.train.init_from is None:
            names = f"the classes of the dataset are {quoted(now)}, those of the run {quoted(begun)}"
            hints |= {f"data.{split}": names for split in (self.job.train.split, self.job.train.val_split)}
        require_same(self.store.url, "run", identity, self.claim["identity"], urls=urls, hints=hints, absent=self.job.absent_values())

    def require_trainable(self) -> None:
        """Raise ConfigError or DataError for what cannot be trained at all (see `job.require_trainable`), and log the loader's notes.

        Reads the weights of `init_from`, and the indexes of the split if the model trains on pairs or bags.
        """
        if self.job.train.init_from is not None and self.claim is None:
            self._loaded = load_model(self.job.train.init_from)
        require_trainable(self.job, self.dataset, self.model, self._loaded, self.rank.world_size)
        if isinstance(self.dataset, Dataset):
            transform = Transform(self.job.transform)
            for dtype in {known.dtype for known in self.dataset.manifest.sample.formats}:
                transform.scale(torch.from_numpy(np.zeros(1, dtype)))  # DataError for numbers that the scale does not fit
        for note in self._background_notes():
            logger.warning(note)
        for note in self.loaders[0].notes:
            logger.info(note)

    def _background_notes(self) -> Iterator[str]:
        """Yield that `transform.background` does nothing, since the model takes alpha as a channel."""
        background = self.job.transform.background
        if background == TransformSpec().background or not isinstance(self.dataset, Dataset):
            return
        formats = common_formats(self.dataset.manifest.sample.formats)
        channels = {known.tensor_shape[0] for known in formats if known.has_alpha}
        if channels:
            takes = f"the model takes {' or '.join(map(str, sorted(channels)))} channels, of which the last is alpha"
            yield (
                f"transform.background={background} changes nothing: {takes}. To compose alpha over a colour, shard with shards.mode=RGB "
                f"(or L) and shards.background={background}, and train on that"
            )

    def take(self) -> None:
        """Claim `out` for this job, or continue it.

        What cannot be trained at all is refused before the claim. ConfigError with the differing fields if another job owns it, DataError
        if the checkpoints there are not of its claim.
        """
        if self.is_claimed():
            require_own_checkpoints(self.store, self.run_sha256)
            self._require_own_generation()
            self._warn_if_product_changed()
            return
        self.require_trainable()
        identity = self.job.identity(self.dataset, None if self._loaded is None else self._loaded.sha256)
        info = {
            "data": self.job.data,
            "dataset_number": self.dataset.number,
            "dataset_sha256": self.dataset.dataset_sha256,
            "total_steps": self.total_steps,
            **({} if self._loaded is None else {"init_from": self._loaded.url.removesuffix("/model")}),
            **({} if self.classes is None else {"classes": list(self.classes)}),
            "linear": str(linear_path()),
        }
        claim_generation(self.store, "run", identity, info)
        self.claim = read_json(self.store, CLAIM)  # another attempt may have been first, on another generation with the same samples
        recorded = self.job.as_recorded(self.claim["identity"])  # by an older version, perhaps
        moved = self.claim["info"]["dataset_number"] != self.dataset.number
        if moved or recorded != self.job:
            self.close()
            for part in ("model", "classes", "loaders", "total_steps"):
                vars(self).pop(part, None)
        self.job = recorded
        self._require_same(self.job.identity(self.dataset, identity["init_sha256"]))
        if moved:
            self.dataset, self._make_loaders = self._open()
        self._require_own_generation()

    def _require_own_generation(self) -> None:
        """DataError if another generation is now where the run's was, one with the same splits; a finished run reads none."""
        assert self.claim is not None
        begun, now = self.claim["info"]["dataset_sha256"], self.dataset.dataset_sha256
        if begun != now and self.dataset.number and self.store.size("model/checkpoint.json") is None:
            raise DataError(
                f"generation {self.dataset.number} of {self.dataset.url} has the dataset_sha256 {now[:12]}, the run at {self.store.url} "
                f"began with {str(begun)[:12]}: another dataset is in its place; restore the one of then, or write to another out"
            )

    def _warn_if_product_changed(self) -> None:
        """Warn if the linear layers of a run use another matrix product than when it began: the last bits of its weights change."""
        assert self.claim is not None
        begun, now = self.claim["info"].get("linear"), linear_path()
        if begun is not None and str(begun).split(" ")[0] != now.name and self.store.size("model/checkpoint.json") is None:
            text = "%s began with the matrix product %s and continues with %s: the last bits of its weights will differ from one machine's"
            logger.warning(text, self.store.url, begun, now)

    def initial(self, url: str) -> LoadedModel:
        """Return the weights that the run starts from; ConfigError if they are not those of the claim."""
        assert self.claim is not None
        loaded = self._loaded or load_model(url)
        claimed = self.claim["identity"]["init_sha256"]
        if loaded.sha256 != claimed:
            hashes = f"now {loaded.sha256[:12]}, when this run began {claimed[:12]}"
            raise ConfigError(f"train.init_from {url} is another checkpoint than before ({hashes}): write to another out")
        return loaded

    def plan(self) -> dict[str, Any]:
        """Return what training would do: checks dataset, splits, shapes and the owner of `out`, builds the model, writes nothing."""
        job = self.job
        job.identity(self.dataset, None)  # DataError if a split is missing
        if self.is_claimed():
            self._require_own_generation()
        self.require_trainable()
        warnings = schedule_warnings(job.model, self.total_steps)
        return {
            "finished": finished_run(self.store, None if self.claim is None else self.run_sha256) is not None,
            "samples": self.dataset.num_samples(job.train.split),
            "input_shape": list(model_config(job, self.dataset).input_shape),
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "steps": self.total_steps,
            **({"warnings": warnings} if warnings else {}),
        }

    def close(self) -> None:
        """Free the readers of the splits, if they were opened."""
        for loader in vars(self).get("loaders", ()):
            if loader is not None:
                loader.close()
