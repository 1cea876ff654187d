"""The worker of `encode`: loads the model once, then turns rows of one shard into one Parquet part.

One thread reads and decodes the next batch while the model works on this one, in as many threads as this process has CPUs to itself
(`num_streams`). Output buffers are allocated once per part and filled in place; Arrow takes them as they are.
"""

import copy
import dataclasses
import functools
import itertools
import logging
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import closing
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from aecore._base.batch import Batch
from aecore.artifact.commit import PartRecord, damage_of_part, read_record, recorded_parts, require_counts, write_record
from aecore.artifact.fanout import Commit
from aecore.checkpoint.weights import LoadedModel, load_model
from aecore.data.dataset import open_dataset
from aecore.data.format.decode import decoder_version
from aecore.data.format.transform import preprocessing_sha256
from aecore.data.manifest import ShardRef
from aecore.data.read.loader import InputSpec, Loader, ShardBatch
from aecore.encoding.encoder import Encoder, EncodeSpec
from aecore.errors import ConfigError, DataError, counted
from aecore.nn import linear_path
from aecore.store import Store, canonical_json, open_store
from aecore.table.part import RefusedRow, commit_part, commit_quarantine, part_name, part_table, read_footer
from aecore.threads import map_ordered

logger = logging.getLogger(__name__)

_Piece = tuple[NDArray[np.int64], Batch, Tensor | None]  # rows in the shard, themselves, their noise
IN_METADATA = ("shard", "shard_sha256", "index_content_sha256", "row_start")  # of the part's identity; the split is its folder


@dataclass(frozen=True, slots=True)
class EncodeTask:
    """One part to make: the rows `[row_start, row_stop)` of one shard; picklable."""

    stem: str
    shard: ShardRef
    row_start: int
    row_stop: int

    def identity(self, checkpoint_sha256: str) -> dict[str, Any]:
        """Return the inputs of the part by hash: shards of two datasets may have the same name."""
        return {
            "split": self.shard.split,
            "shard": self.shard.stem,
            "shard_sha256": self.shard.tar.sha256,
            "index_content_sha256": self.shard.index_content_sha256,
            "row_start": self.row_start,
            "row_stop": self.row_stop,
            "checkpoint_sha256": checkpoint_sha256,
        }


def recorded_part(store: Store, task: EncodeTask, checkpoint_sha256: str) -> PartRecord | None:
    """Return the record of an earlier attempt at this part, None if there is none; ConfigError if it is of other data."""
    record = read_record(store, task.stem)
    if record is None:
        return None
    _require_made_of(store, record, task, checkpoint_sha256)
    said: dict[str, tuple[object, object]] = {"samples": (record.rows + record.quarantined, task.row_stop - task.row_start)}
    with damage_of_part(store, task.stem):
        if store.is_local:  # a footer in a bucket costs the whole part
            footers = {"data": record.detail.get("footer_sha256")}
            for name, folder, count in (("rows", "data", record.rows), ("quarantined", "quarantine", record.quarantined)):
                ref = record.file_in(folder)
                said[name] = count, 0 if ref is None else read_footer(store, ref, footers.get(folder)).num_rows
        require_counts(store, record, said)
    return record


def _require_made_of(store: Store, record: PartRecord, task: EncodeTask, checkpoint_sha256: str) -> PartRecord:
    wanted = task.identity(checkpoint_sha256)
    differing = [name for name, value in wanted.items() if record.detail.get(name) != value]
    if differing:
        there = str(record.detail.get("shard_sha256"))
        raise ConfigError(
            f"{store.url} holds parts of another dataset, from an encoding that was not finished: part {task.stem} there was made of a "
            f"shard with sha256 {there[:12]}, the shard of this dataset has {task.shard.tar.sha256[:12]} "
            f"(they differ in {', '.join(differing)}): write to another URL"
        )
    return record


@dataclass(frozen=True, slots=True)
class EncodeSetup:
    """What every worker needs: addresses, the pinned checkpoint and dataset generation, the table's columns; picklable."""

    model_url: str
    checkpoint_sha256: str
    data_url: str
    dataset_number: int
    out_url: str
    spec: EncodeSpec
    columns: Mapping[str, Any]
    device: str
    threads: int


class EncodeWorker:
    """Makes parts. Opens its stores and loads the model when it is made, once per process.

    `num_streams` pieces of batches are encoded at a time, each by its own copy of the model (the weights are shared); what comes out
    does not depend on how many there are.
    """

    def __init__(
        self, setup: EncodeSetup, loaded: LoadedModel | None = None, recorded: Set[str] | None = None, *, num_streams: int = 1
    ) -> None:
        torch.set_num_threads(setup.threads)
        self.setup = setup
        self.num_streams = num_streams
        self.store = open_store(setup.out_url)
        self.recorded = recorded_parts(self.store) if recorded is None else recorded  # a worker that replaces a killed one lists them again
        self.dataset = open_dataset(setup.data_url, number=setup.dataset_number)
        loaded = loaded or load_model(setup.model_url, device=setup.device)
        if loaded.sha256 != setup.checkpoint_sha256:
            raise DataError(f"checkpoint {setup.model_url} changed while its latents were being written: run the same command again")
        self.encoder = Encoder(loaded, setup.spec, setup.device)
        self.free = SimpleQueue[Encoder]()
        for model in (loaded, *_copies(loaded, num_streams - 1)):
            self.free.put(Encoder(model, setup.spec, setup.device))
        self.classes = loaded.config.classes
        self.loaders: dict[str, Loader] = {}
        self.encoded_by = encoded_by(loaded, setup)
        self.metadata = _metadata(loaded, setup, self.encoded_by)

    def __call__(self, task: EncodeTask) -> Commit:
        """Encode one part and return the call that commits it; an earlier attempt's record is returned as it is (a rerun)."""
        known = recorded_part(self.store, task, self.setup.checkpoint_sha256) if task.stem in self.recorded else None
        if known is not None:
            return lambda: known
        started = time.perf_counter()
        with self._loader(task.shard.split) as loader:  # closes the shard; the loader is kept
            values = _PartValues(task.row_stop - task.row_start, self.setup.columns)
            self._fill(values, task, loader)
            index = loader.index(task.shard)
        return functools.partial(self._commit, task, values, index, time.perf_counter() - started)

    def prefetch(self, tasks: Sequence[EncodeTask]) -> None:
        """Start the background download of the shards of the next tasks (nothing to do for local datasets)."""
        self.dataset.prefetch([task.shard for task in tasks if task.stem not in self.recorded])

    def _commit(self, task: EncodeTask, values: "_PartValues", index: pa.Table, encode_s: float) -> PartRecord:
        started, shard = time.perf_counter(), task.shard
        values.drop_not_finite()
        rows = values.rows[: values.filled]
        identity = task.identity(self.setup.checkpoint_sha256)
        metadata = {**self.metadata, **{name: str(identity[name]) for name in IN_METADATA}}
        table = part_table(index, rows, shard.stem, values.filled_columns(), metadata)
        quarantine = commit_quarantine(self.store, task.stem, shard.stem, index, values.refused)
        compression = self.setup.spec.compression
        file, written_by, footer_sha256 = commit_part(self.store, part_name(shard.split, task.stem), table, compression=compression)
        detail = {**identity, "encoded_by": {name: written_by[name] for name in self.encoded_by}, "footer_sha256": footer_sha256}
        timings = {"encode_s": encode_s, "commit_s": time.perf_counter() - started}
        logger.info(
            "part %s: %s, %d quarantined, %.2f s", task.stem, counted(len(rows), "row", "rows"), len(values.refused), sum(timings.values())
        )
        files = (file,) if quarantine is None else (file, quarantine)
        record = write_record(self.store, PartRecord(task.stem, files, len(rows), len(values.refused), detail, timings))
        return _require_made_of(self.store, record, task, self.setup.checkpoint_sha256)  # another attempt may have been first

    def _loader(self, split: str) -> Loader:
        if split not in self.loaders:
            transform = self.encoder.transform.spec
            self.loaders[split] = Loader(
                self.dataset,
                split,
                transform=transform,
                spec=InputSpec(cache="none"),
                channels=self.encoder.channels,
                classes=self.classes,
            )
        return self.loaders[split]

    def _fill(self, values: "_PartValues", task: EncodeTask, loader: Loader) -> None:
        with (
            closing(loader.shard_batches(task.shard, self.setup.spec.batch, task.row_start, task.row_stop)) as batches,
            closing(map_ordered(self._latents, self._pieces(batches, task, values), threads=self.num_streams)) as found,
        ):
            for rows, columns in found:
                values.add(rows, columns)

    def _pieces(self, batches: Iterable[ShardBatch], task: EncodeTask, values: "_PartValues") -> Iterator[_Piece]:
        """Yield what goes through the model together, with its rows in the shard; rows that do not decode go to the refused ones."""
        for number, (batch, rows, bad) in enumerate(batches, start=task.row_start // self.setup.spec.batch):
            values.refused += [RefusedRow(row.row, "decode", row.reason, row.message) for row in bad]
            if len(rows):
                for taken, piece, eps in self.encoder.pieces(batch, self.encoder.noise(batch, number, task.shard.tar.sha256)):
                    yield rows[taken], piece, eps

    def _latents(self, piece: _Piece) -> tuple[NDArray[np.int64], dict[str, Tensor]]:
        rows, batch, eps = piece
        torch.set_num_threads(self.setup.threads)  # every thread has its own number
        encoder = self.free.get()
        try:
            return rows, encoder.columns(batch, eps)
        finally:
            self.free.put(encoder)


def _copies(loaded: LoadedModel, count: int) -> list[LoadedModel]:
    """Return copies of the model that share its weights: attributes that a model sets in a forward pass belong to one thread.

    No copies of a model that cannot be copied (it holds a lock, say). Hooks and closures over a model refer to the first one only.
    """
    weights = {id(tensor): tensor for tensor in itertools.chain(loaded.model.parameters(), loaded.model.buffers())}
    try:
        return [dataclasses.replace(loaded, model=copy.deepcopy(loaded.model, dict(weights))) for _ in range(count)]
    except Exception as error:  # attributes of a user's model raise what they like
        logger.info("one piece at a time is encoded: the model cannot be copied (%s: %s)", type(error).__name__, error)
        return []


class MakeEncodeWorker:
    """Makes workers. In the process of the plan they share its loaded model and have all its CPUs, `setup.threads` per stream.

    A copy that was sent to another process loads everything again, and has one stream: the cluster allots its CPUs.
    """

    def __init__(
        self, setup: EncodeSetup, loaded: LoadedModel | None = None, recorded: Set[str] | None = None, num_streams: int = 1
    ) -> None:
        self.setup = setup
        self.loaded = loaded if setup.device == "cpu" else None
        self.recorded = recorded
        self.num_streams = num_streams

    def __call__(self) -> EncodeWorker:
        """Return a new worker."""
        return EncodeWorker(self.setup, self.loaded, self.recorded, num_streams=self.num_streams)

    def __reduce__(self) -> tuple[type["MakeEncodeWorker"], tuple[EncodeSetup]]:
        return MakeEncodeWorker, (self.setup,)


class _PartValues:
    """The output buffers of one part, allocated once; rows are filled from the front."""

    def __init__(self, capacity: int, columns: Mapping[str, Any]) -> None:
        self.rows = np.empty(capacity, np.int64)
        self.columns = {
            name: np.empty((capacity, info["dim"]) if info["dim"] else capacity, info["dtype"]) for name, info in columns.items()
        }
        self.filled = 0
        self.refused: list[RefusedRow] = []

    def add(self, rows: NDArray[np.int64], found: Mapping[str, Tensor]) -> None:
        """Copy the columns of a batch (any device, converted to the column's type) behind the filled rows."""
        assert found.keys() == self.columns.keys(), "the model gives other columns than it was planned with"
        stop = self.filled + len(rows)
        self.rows[self.filled : stop] = rows
        for name, tensor in found.items():
            torch.from_numpy(self.columns[name][self.filled : stop]).copy_(tensor)
        self.filled = stop

    def filled_columns(self) -> dict[str, NDArray[Any]]:  # any: float32, float16 or int32
        """Return the columns of the filled rows, as views."""
        return {name: column[: self.filled] for name, column in self.columns.items()}

    def drop_not_finite(self) -> None:
        """Move rows with a value that is not finite (in the column's type: float16 ends at 65,504) to the refused ones."""
        good = np.ones(self.filled, np.bool_)
        for name, column in self.filled_columns().items():
            finite = np.isfinite(column) if column.dtype.kind == "f" else column >= 0  # a code of -1: its vector was not finite
            finite = finite if column.ndim == 1 else finite.all(1)
            message = f"{name} is not finite as {column.dtype}"
            self.refused += [RefusedRow(row, "encode", "not_finite", message) for row in self.rows[: self.filled][good & ~finite].tolist()]
            good &= finite
        if not good.all():
            kept = int(good.sum())
            self.rows[:kept] = self.rows[: self.filled][good]
            for name, column in self.filled_columns().items():
                self.columns[name][:kept] = column[good]
            self.filled = kept


def encoded_by(loaded: LoadedModel, setup: EncodeSetup) -> dict[str, str]:
    """Return the environment that can change the last bits: device, thread count, library versions, matrix product."""
    if setup.device.startswith("cuda"):
        device = torch.cuda.get_device_name(setup.device)
    else:
        device = f"{setup.device} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    decoder = decoder_version(loaded.config.transform.decoder, loaded.config.transform.pixels)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__, "pyarrow": pa.__version__}
    versions["decoder"] = decoder
    if not setup.device.startswith("cuda"):
        versions["linear"] = linear_path().name
    return {"device": device, "threads": str(setup.threads), "versions": canonical_json(versions).decode()}


def _metadata(loaded: LoadedModel, setup: EncodeSetup, producer: Mapping[str, str]) -> dict[str, str]:
    """Return the key-value metadata that all parts share."""
    config = loaded.config
    latents = {name: [info["dim"]] for name, info in setup.columns.items() if info["dim"]}
    return {
        "checkpoint_sha256": loaded.sha256,
        "checkpoint_step": str(loaded.checkpoint.step),
        "config": canonical_json(config.to_dict()).decode(),
        "preprocessing_sha256": preprocessing_sha256(config.transform),
        "latent_shape": canonical_json(latents).decode(),
        "dtype": setup.spec.dtype,
        "batch": str(setup.spec.batch),
        **({"seed": str(setup.spec.seed)} if setup.spec.sample else {}),
        **producer,
    }
