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
from queue import SimpleQueue
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from aecore._base.batch import Batch
from aecore.artifact.commit import PartRecord
from aecore.artifact.fanout import Commit
from aecore.checkpoint.weights import LoadedModel, load_model
from aecore.data.format.decode import decoder_version
from aecore.data.format.transform import preprocessing_sha256
from aecore.data.read.loader import InputSpec, Loader, ShardBatch
from aecore.encoding.copied import CopyWorker
from aecore.encoding.encoder import Encoder
from aecore.encoding.writer import EncodeSetup, EncodeTask, PartWriter, part_facts
from aecore.errors import DataError
from aecore.nn import linear_path
from aecore.store import FileRef, canonical_json
from aecore.table.part import RefusedRow, commit_quarantine, part_table
from aecore.threads import map_ordered

logger = logging.getLogger(__name__)

_Piece = tuple[NDArray[np.int64], Batch, Tensor | None]  # rows in the shard, themselves, their noise


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
        self.writer = PartWriter(setup, recorded)
        self.copier = CopyWorker(setup, writer=self.writer)
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
        if task.source is not None:
            return self.copier(task)
        known = self.writer.known(task)
        if known is not None:
            return lambda: known
        started = time.perf_counter()
        if task.row_start == task.row_stop:  # nothing is left of the shard
            return functools.partial(self._commit, task, _PartValues(0, self.setup.columns), self.writer.dataset.index(task.shard), 0.0)
        with self._loader(task.shard.split) as loader:  # closes the shard; the loader is kept
            index = loader.index(task.shard)
            rows = self.writer.rows(task, index)
            values = _PartValues(len(rows), self.setup.columns)
            self._fill(values, task, loader, rows, index)
        return functools.partial(self._commit, task, values, index, time.perf_counter() - started)

    def prefetch(self, tasks: Sequence[EncodeTask]) -> None:
        """Start the background download of the shards of the next tasks (nothing to do for local datasets)."""
        self.copier.prefetch([task for task in tasks if task.source is not None])
        made = [task.shard for task in tasks if task.source is None and task.stem not in self.writer.recorded]
        self.writer.dataset.prefetch(made)

    def _commit(self, task: EncodeTask, values: "_PartValues", index: pa.Table, encode_s: float) -> PartRecord:
        values.in_order()
        values.drop_not_finite()
        rows = values.rows[: values.filled]
        metadata = {**self.metadata, **part_facts(task, self.setup.checkpoint_sha256)}
        table = part_table(index, rows, task.shard.stem, values.filled_columns(), metadata, task.index_columns)

        def quarantine() -> FileRef | None:
            return commit_quarantine(self.writer.store, task.stem, task.shard.stem, index, values.refused)

        return self.writer.commit(task, table, quarantine, len(values.refused), encode_s)

    def _loader(self, split: str) -> Loader:
        if split not in self.loaders:
            transform = self.encoder.transform.spec
            self.loaders[split] = Loader(
                self.writer.dataset,
                split,
                transform=transform,
                spec=InputSpec(cache="none"),
                channels=self.encoder.channels,
                classes=self.classes,
            )
        return self.loaders[split]

    def _fill(self, values: "_PartValues", task: EncodeTask, loader: Loader, chosen: NDArray[np.int64], index: pa.Table) -> None:
        with (
            closing(loader.shard_batches(task.shard, self.setup.spec.batch, rows=chosen)) as batches,
            closing(map_ordered(self._latents, self._pieces(batches, task, values, index), threads=self.num_streams)) as found,
        ):
            for rows, columns in found:
                values.add(rows, columns)

    def _pieces(self, batches: Iterable[ShardBatch], task: EncodeTask, values: "_PartValues", index: pa.Table) -> Iterator[_Piece]:
        """Yield what goes through the model together, with its rows in the shard; rows that do not decode go to the refused ones."""
        samples = self.setup.spec.sample and self.setup.spec.bits > 1
        names = list(zip(index["key"].to_pylist(), index["sha256"].to_pylist(), strict=True)) if samples else []
        for number, (batch, rows, bad) in enumerate(batches, start=task.row_start // self.setup.spec.batch):
            values.refused += [RefusedRow(row.row, "decode", row.reason, row.message) for row in bad]
            if len(rows):
                own = [names[row] for row in rows.tolist()] if names else []
                noise = self.encoder.noise(batch, number, task.shard.tar.sha256, own)
                for taken, piece, eps in self.encoder.pieces(batch, noise):
                    yield rows[taken.numpy()], piece, eps

    def _latents(self, piece: _Piece) -> tuple[NDArray[np.int64], dict[str, Tensor]]:
        rows, batch, eps = piece
        torch.set_num_threads(self.setup.threads)  # every thread has its own number
        encoder = self.free.get()
        try:
            return rows, {name: column[: len(rows)] for name, column in encoder.columns(batch, eps).items()}  # without repeated rows
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

    def in_order(self) -> None:
        """Put the rows into the shard's order: sequences come by their length."""
        order = np.argsort(self.rows[: self.filled])
        if not np.array_equal(order, np.arange(self.filled)):
            self.rows[: self.filled] = self.rows[order]
            for column in self.columns.values():
                column[: self.filled] = column[order]

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
        **({"bits": str(setup.spec.bits)} if setup.spec.bits > 1 else {}),
        **({"where": setup.spec.where} if setup.spec.where else {}),
        **producer,
    }
