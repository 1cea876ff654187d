"""A run, opened once: folder, claim, dataset, model and loader, for training and for a dry run alike.

Every look into a bucket costs a request, so nothing is read twice; and all parts of a run see the same claim and the same generation of
the dataset.
"""

import logging
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from aecore._base.trainable import Trainable
from aecore.artifact.commit import claim_generation, newest_of, read_json, require_kind, require_same
from aecore.checkpoint.files import LoadedModel, load_model
from aecore.data.dataset import Dataset, open_dataset
from aecore.data.read.loader import TrainLoader
from aecore.data.read.stream import open_stream
from aecore.data.sources._names import split_in_version_1
from aecore.errors import ConfigError, DataError
from aecore.nn import linear_path
from aecore.store import open_store, sha256_json
from aecore.training.job import CLAIM, TrainJob, build_model, finished_run, model_config, require_trainable, total_steps, train_loader
from aecore.training.preflight import schedule_warnings
from aecore.training.ranks import Rank

logger = logging.getLogger(__name__)


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
        self.dataset = self._open_dataset()
        self._loaded: LoadedModel | None = None

    def _open_dataset(self) -> Dataset:
        job = self.job
        if job.input.streams:
            return self._claimed_stream() or open_stream(job.data, job.train.split, job.input.member)
        return open_dataset(job.data, number=None if self.claim is None else self.claim["info"]["dataset_number"])

    def _claimed_stream(self) -> Dataset | None:
        """Return the tars that a run of version 1 took for its split, by the split names it knew; None if it is no such run.

        The tars of a stream are part of the identity: of tars named `dev` or `testing` that version took every one for training data.
        """
        job, split = self.job, self.job.train.split
        claimed = None if self.claim is None else self.claim.get("identity", {}).get("data", {}).get(split)
        if claimed is None:
            return None
        try:
            dataset = open_stream(job.data, split, job.input.member, split_in_version_1)
        except DataError:
            return None
        return dataset if dataset.manifest.training_key(split) == claimed else None

    @cached_property
    def model(self) -> Trainable:
        """The job's model, with the weights of its seed, or those of `init_from`."""
        return build_model(self.job, self.dataset)

    @cached_property
    def loader(self) -> TrainLoader:
        """The part of the training split that this rank reads."""
        return train_loader(self.job, self.dataset, self.model, self.rank.rank, self.rank.world_size)

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
        require_same(self.store.url, "run", identity, self.claim["identity"], urls=urls, hints=hints, absent=self.job.absent_values())

    def require_trainable(self) -> None:
        """Raise ConfigError or DataError for what cannot be trained at all (see `job.require_trainable`), and log the loader's notes.

        Reads the weights of `init_from`, and the indexes of the split if the model trains on pairs or bags.
        """
        if self.job.train.init_from is not None and self.claim is None:
            self._loaded = load_model(self.job.train.init_from)
        require_trainable(self.job, self.dataset, self.model, self._loaded, self.rank.world_size)
        for note in self.loader.notes:
            logger.info(note)

    def take(self) -> None:
        """Claim `out` for this job, or continue it; ConfigError with the differing fields if another job owns it.

        What cannot be trained at all is refused before the claim.
        """
        if self.is_claimed():
            self._warn_if_product_changed()
            return
        self.require_trainable()
        manifest = self.dataset.manifest
        identity = self.job.identity(self.dataset, None if self._loaded is None else self._loaded.sha256)
        info = {
            "data": self.job.data,
            "dataset_number": manifest.number,
            "dataset_sha256": manifest.dataset_sha256,
            "total_steps": self.total_steps,
            "linear": str(linear_path()),
        }
        claim_generation(self.store, "run", identity, info)
        self.claim = read_json(self.store, CLAIM)  # another attempt may have been first, on another generation with the same samples
        recorded = self.job.as_recorded(self.claim["identity"])  # by an older version, perhaps
        moved = self.claim["info"]["dataset_number"] != manifest.number and not self.job.input.streams
        if moved or recorded != self.job:
            self.close()
            for part in ("model", "loader", "total_steps"):
                vars(self).pop(part, None)
        self.job = recorded
        self._require_same(self.job.identity(self.dataset, identity["init_sha256"]))
        if moved:
            self.dataset = self._open_dataset()

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
        job, manifest = self.job, self.dataset.manifest
        for split in (job.train.split, job.train.val_split):
            if split is not None:
                manifest.split(split)
        self.is_claimed()
        self.require_trainable()
        warnings = schedule_warnings(job.model, self.total_steps)
        return {
            "finished": finished_run(self.store) is not None,
            "samples": manifest.num_samples(job.train.split) or None,  # tars without an index: not known
            "input_shape": list(model_config(job, self.dataset).input_shape),
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "steps": self.total_steps,
            **({"warnings": warnings} if warnings else {}),
        }

    def close(self) -> None:
        """Free the readers of the training split, if they were opened."""
        if "loader" in vars(self):
            self.loader.close()
