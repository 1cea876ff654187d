"""Load batches of a dataset: in training order from any step, in contiguous ranges for validation, shard by shard for encoding.

Batches hold stored values (`Transform` scales them on the device), planned ordinals, labels and positions in the global batch.
One background thread prefetches batches. It shares the interpreter with the training loop: nothing is copied between processes, which
suits small images on few cores.
"""

import copy
import dataclasses
import itertools
from collections.abc import Generator, Sequence
from contextlib import closing
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import torch

from aecore._base.batch import Batch
from aecore.data.dataset import Dataset
from aecore.data.format.decode import DecodeError, Pixels
from aecore.data.format.image import MAX_PIXELS
from aecore.data.format.ragged import crop
from aecore.data.format.transform import TransformSpec
from aecore.data.manifest import ShardRef
from aecore.data.read.order import EpochOrder, Int64s, StepRows, TrainingOrder, locate
from aecore.data.read.pairs import PairSpec, Partners, find_partners
from aecore.data.read.rows import Rows, SplitRows
from aecore.errors import ConfigError, DataError
from aecore.registry import knob, spec, to_dict
from aecore.threads import prefetched

DRAWN_AT_ONCE = 4096  # samples of a global batch whose partners are drawn in one go


@spec
class InputSpec:
    """How batches are read (`input.*` of a recipe). For the limits of `reader=webdataset` see `aecore.data.read.stream`."""

    reader: Literal["lanes", "webdataset"] = knob(
        "lanes", "lanes: indexed shards by offset, the same batches on any number of ranks; webdataset: external tars without an index"
    )
    resampled: bool = knob(False, "webdataset: draw tars with replacement; needs train.max_steps")
    epoch_samples: int = knob(0, "webdataset: samples that count as an epoch; 0: the whole run is one, train.max_steps long", ge=0)
    shuffle: int = knob(1000, "webdataset: samples of a rank that are shuffled together", ge=0)
    member: str = knob("", "webdataset: extension of the member that is the sample; empty: the only image or array")
    max_bad: float = knob(
        0.01, "webdataset: share of a rank's samples that may be left out because they cannot be used", ge=0.0, le=1.0, identity=False
    )
    max_pixels: int = knob(
        MAX_PIXELS, "webdataset: pixels of an image at most, as shards.max_pixels for shards", ge=1, le=1 << 32, identity=False
    )
    cache: Literal["auto", "ram", "none"] = knob("auto", "keep decoded samples in RAM: auto if the split fits cache_bytes", identity=False)
    cache_bytes: int = knob(2 << 30, "bytes of RAM for decoded samples, per rank", ge=0, identity=False)
    prefetch: int = knob(2, "batches read ahead by a thread; 0 reads in the training loop", ge=0, identity=False)

    def __post_init__(self) -> None:
        limits = self.max_bad != InputSpec.max_bad or self.max_pixels != InputSpec.max_pixels
        if not self.streams and (self.resampled or self.epoch_samples or self.member or limits):
            raise ConfigError(
                "input.resampled, input.epoch_samples, input.member, input.max_bad and input.max_pixels belong to input.reader=webdataset: "
                "set it, or leave them out"
            )

    @property
    def streams(self) -> bool:
        """Whether tars without an index are streamed. Checks of specs ask for it, and `Session`, which chooses what is opened and read."""
        return self.reader == "webdataset"

    def identity(self) -> dict[str, Any]:
        """Return the fields that can change what is read, as plain JSON data."""
        fields = to_dict(self, identity_only=True)
        if self.streams:
            return fields
        return {name: value for name, value in fields.items() if name not in ("resampled", "epoch_samples", "shuffle", "member")}


class TrainLoader(Protocol):
    """The loader interface of training: `Loader` (samples, pairs), `BagLoader` (whole bags), `StreamLoader` (tars without an index)."""

    @property
    def steps_per_epoch(self) -> int:
        """Steps that count as an epoch."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Messages for the user about how batches are composed; reads the indexes where pairs or bags need them."""

    def batches(self, start_step: int = 0, stop_step: int | None = None) -> Generator[Batch, None, None]:
        """Yield this rank's part of the global batches [start_step, stop_step), on and on if `stop_step` is None."""

    def reread(self, step: int) -> tuple[Batch, SplitRows] | None:
        """Return the batch of optimizer step 1, 2, ... of all ranks together, and its split; None if it cannot be read again."""

    def close(self) -> None:
        """Close open files; safe to repeat."""


class BadRow(NamedTuple):
    """A sample that does not decode: its row in the shard's index, a short reason, a readable message."""

    row: int
    reason: str
    message: str


class ShardBatch(NamedTuple):
    """Some rows of one shard: the batch of the good ones (may be empty), their rows in the index, and the bad ones."""

    batch: Batch
    rows: Int64s
    bad: tuple[BadRow, ...]


class Loader:
    """Batches of one split. Opens nothing before the first batch; `close` (or `with`) closes files and is safe to repeat.

    Parameters
    ----------
    dataset, split : Dataset and str
        What is read.
    transform : TransformSpec, optional
        Says how samples are decoded.
    spec : InputSpec, optional
        Cache and prefetch.
    order : TrainingOrder, optional
        The order of `batches`; not needed to read ranges and shards.
    pairs : PairSpec, optional
        Gives every batch of `batches` partners in `x_pair`; None: there is no `x_pair`.
    channels : int, optional
        Channels of the images that the model takes: alpha that is one more is composed over `transform.background`.
    classes : sequence of str, optional
        Names that a model numbers: labels are mapped to them by name; None: labels are those of the dataset.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        *,
        transform: TransformSpec | None = None,
        spec: InputSpec | None = None,
        order: TrainingOrder | None = None,
        pairs: PairSpec | None = None,
        channels: int | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        self.spec = spec or InputSpec()
        reading = (transform or TransformSpec()).reading
        self.rows = SplitRows(dataset, split, reading, self.spec.cache, self.spec.cache_bytes, channels, classes)
        self.num_samples = self.rows.num_samples
        self._order = order
        self._pairs = pairs

    @property
    def order(self) -> TrainingOrder:
        """The training order; ConfigError if this loader was made without one."""
        if self._order is None:
            raise ConfigError(f"this Loader of split {self.rows.split!r} has no training order: give it order=TrainingOrder(...)")
        return self._order

    @cached_property
    def partners(self) -> Partners | None:
        """The object that draws partners, None without `pairs`; the first access reads the split's indexes (see `find_partners`)."""
        return None if self._pairs is None else find_partners(self.rows, self._pairs, self.order.seed)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of the training order's epochs."""
        return self.order.num_steps(self.num_samples)

    def epoch_order(self, epoch: int) -> EpochOrder:
        """Return one epoch of the training order."""
        return EpochOrder(self.rows.counts.tolist(), self.rows.dataset.training_key(self.rows.split), self.order, epoch)

    def batches(self, start_step: int = 0, stop_step: int | None = None) -> Generator[Batch, None, None]:
        """Yield this rank's part of the order's global batches [start_step, stop_step), on and on if `stop_step` is None.

        A rank without a sample in a short last step gets one repeated row with empty `positions` and `ordinals`: run it with weight 0.
        """
        step = start_step
        while stop_step is None or step < stop_step:
            epoch_end = (step // self.steps_per_epoch + 1) * self.steps_per_epoch
            stop = epoch_end if stop_step is None else min(epoch_end, stop_step)
            # taking rows from RAM costs less than handing them over from a thread
            yield from prefetched(self._epoch(step, stop), 0 if self.rows.in_ram else self.spec.prefetch)
            step = stop

    @property
    def notes(self) -> tuple[str, ...]:
        """Messages for the user about the pairs; reads the indexes. Empty without pairs."""
        return () if self.partners is None else self.partners.notes

    def reread(self, step: int) -> tuple[Batch, SplitRows]:
        """Return the batch of optimizer step 1, 2, ... of all ranks together, and its split."""
        whole = copy.copy(self)
        whole._order = dataclasses.replace(self.order, rank=0, world_size=1)
        with closing(whole.batches(step - 1, step)) as batches:
            return next(batches), self.rows

    def range_batches(self, start_row: int, stop_row: int, batch: int) -> Generator[Batch, None, None]:
        """Yield samples [start_row, stop_row) of the split in stored order, `batch` at a time; every batch counts as a global one."""
        if not 0 <= start_row <= stop_row <= self.num_samples or batch < 1:
            raise DataError(
                f"rows [{start_row}, {stop_row}) by {batch} are not within the {self.num_samples} samples of split {self.rows.split!r}"
            )
        return prefetched(self._range(start_row, stop_row, batch), 0 if self.rows.in_ram else self.spec.prefetch)

    def take(self, indices: Int64s) -> Batch:
        """Return the samples of the split with these indices, in this order; the batch counts as a global one."""
        return self._batch(self.rows.read(indices), np.arange(len(indices)), len(indices))

    def shard_batches(
        self, shard: ShardRef, batch: int, start: int = 0, stop: int | None = None, *, rows: Int64s | None = None
    ) -> Generator[ShardBatch, None, None]:
        """Yield rows [start, stop) of one shard, or these `rows`, `batch` at a time; those that do not decode are reported, not raised.

        `positions` count bad rows too, so noise sliced by them does not depend on which samples decode.
        """
        rows = np.arange(start, shard.live if stop is None else stop) if rows is None else rows
        return prefetched(self._shard(self._number(shard), rows, batch), self.spec.prefetch)

    def index(self, shard: ShardRef) -> pa.Table:
        """Return the index of one shard; it is read and verified once while the shard is open."""
        return self.rows.index(self._number(shard))

    def _number(self, shard: ShardRef) -> int:
        for number, known in enumerate(self.rows.shards):
            if known.stem == shard.stem:
                return number
        raise DataError(f"{self.rows.dataset.url}: split {self.rows.split!r} has no shard {shard.stem!r}")

    def close(self) -> None:
        """Close the open shards."""
        self.rows.close()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _epoch(self, start: int, stop: int) -> Generator[Batch, None, None]:
        epoch, first = locate(start, self.steps_per_epoch)
        order, block = self.epoch_order(epoch), -1
        steps = range(first, first + stop - start)
        for step, (part, indices, partners) in zip(steps, self._steps(order, epoch, steps), strict=True):
            if order.block_of(step) != block:
                block = order.block_of(step)
                self._prefetch(*order.shards_from(step))
            rows, x_pair = self._read(indices, partners)
            if not len(part.indices):
                rows = rows._replace(ordinals=rows.ordinals[:0])
            yield self._batch(rows, part.positions, part.num_global, x_pair)

    def _prefetch(self, now: Int64s, later: Int64s) -> None:
        """Start background download of shards; a partner may be in any shard, so with pairs all are needed now."""
        paired = self.partners is not None
        self.rows.prefetch(np.concatenate([now, np.setdiff1d(np.arange(len(self.rows.shards)), now)]) if paired else now, later)

    def _steps(self, order: EpochOrder, epoch: int, steps: range) -> Generator[tuple[StepRows, Int64s, Int64s | None], None, None]:
        """Yield steps with the samples to read and their partners, drawn for many steps at once at a fifth of the cost."""
        at_once = max(1, DRAWN_AT_ONCE // self.order.global_batch)
        for begin in range(0, len(steps), at_once):
            parts = [order.step(step) for step in steps[begin : begin + at_once]]
            indices = [part.indices if len(part.indices) else np.zeros(1, np.int64) for part in parts]
            if self.partners is None:
                yield from zip(parts, indices, itertools.repeat(None))
            else:
                drawn = self.partners.partners_of(np.concatenate(indices), epoch)
                yield from zip(parts, indices, np.split(drawn, np.cumsum([len(own) for own in indices])[:-1]), strict=True)

    def _read(self, indices: Int64s, partners: Int64s | None) -> tuple[Rows, Pixels | None]:
        """Return samples and the pixels of their partners (None without partners), read together."""
        if partners is None:
            return self.rows.read(indices), None
        both = self.rows.read(np.concatenate([indices, partners]))
        return both.take(slice(len(indices))), both.pixels[len(indices) :]

    def _range(self, start: int, stop: int, batch: int) -> Generator[Batch, None, None]:
        self.rows.prefetch(self.rows.shards_of(start, stop))
        for begin in range(start, stop, batch):
            indices = np.arange(begin, min(begin + batch, stop))
            yield self._batch(self.rows.read(indices), np.arange(len(indices)), len(indices))

    def _shard(self, number: int, chosen: Int64s, batch: int) -> Generator[ShardBatch, None, None]:
        for start in range(0, len(chosen), batch):
            own, errors = chosen[start : start + batch], list[DecodeError]()
            rows = self.rows.read_shard(number, own, errors.append)
            places = np.arange(len(own))
            if errors:
                places = np.delete(places, [error.row for error in errors])
                rows = rows.take(places)
            bad = tuple(BadRow(int(own[error.row]), error.reason, str(error)) for error in errors)
            yield ShardBatch(self._batch(rows, places, len(own)), own[places], bad)

    def _batch(self, rows: Rows, positions: Int64s, num_global: int, x_pair: Pixels | None = None) -> Batch:
        pixels = rows.pixels if rows.lengths is None else crop(rows.pixels, rows.lengths)
        x, partners = self._tensor(pixels), None if x_pair is None else self._tensor(x_pair)
        lengths = None if rows.lengths is None else torch.from_numpy(rows.lengths)
        label = torch.from_numpy(rows.labels) if self.rows.labelled else None
        ordinals = torch.from_numpy(rows.ordinals)
        return Batch(x, ordinals, torch.from_numpy(positions), num_global, x_pair=partners, label=label, lengths=lengths)

    def _tensor(self, pixels: Pixels) -> torch.Tensor:
        tensor = torch.from_numpy(pixels)
        return tensor.permute(0, 3, 1, 2) if self.rows.sample_format.image else tensor
