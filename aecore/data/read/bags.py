"""Load whole bags for training: the same lanes, counted in bags; a batch is padded to its longest bag and has a mask.

A bag is the samples of one `group` of the index, adjacent in one shard. `train.global_batch` counts bags; positions in the global
batch count instances, so noise per instance does not depend on padding, which differs between ranks.
The price: every rank holds the table of bags in memory (16 bytes per bag) and reads the indexes before the first step. A bag is never
split, so memory follows the largest one.
"""

import copy
import dataclasses
from collections.abc import Generator, Sequence
from contextlib import closing
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch

from aecore._base.batch import Batch
from aecore.data.dataset import Dataset
from aecore.data.format.transform import TransformSpec
from aecore.data.read.loader import InputSpec
from aecore.data.read.order import EpochOrder, Int64s, TrainingOrder, locate
from aecore.data.read.rows import Rows, SplitRows
from aecore.errors import DataError
from aecore.threads import prefetched


class Bags:
    """The bags of a split, numbered in manifest order: first sample and number of samples of each, bags of each shard."""

    def __init__(self, rows: SplitRows) -> None:
        rows.dataset.store.prefetch([shard.index for shard in rows.shards])
        where, names = f"split {rows.split!r} of {rows.dataset.url}", set[str]()
        starts, counts, first = list[Int64s](), list[int](), 0
        for number, samples in enumerate(rows.counts.tolist()):
            found = rows.index(number)["group"]
            if found.null_count:
                raise DataError(f"{where}: {found.null_count} samples of shard {rows.shards[number].stem} have no group: shard again")
            codes: Any = pc.dictionary_encode(found.combine_chunks())  # any: pyarrow's stubs do not see a dictionary array
            begins = np.concatenate([[0], np.flatnonzero(np.diff(codes.indices.to_numpy())) + 1])[:samples]  # none of a shard without any
            _require_new(where, rows.shards[number].stem, names, codes.dictionary.to_pylist(), len(begins))
            starts.append(first + begins)
            counts.append(len(begins))
            first += samples
        self.counts = counts
        self.starts = np.concatenate(starts)
        self.sizes = np.diff(self.starts, append=first)

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def notes(self) -> tuple[str, ...]:
        """Messages for the user: the number of bags and of their instances."""
        sizes = self.sizes
        return (f"a step takes whole bags: {len(self)} bags of {sizes.min()} to {sizes.max()} instances, {sizes.mean():.1f} on average",)

    def samples(self, bags: Int64s) -> Int64s:
        """Return the indices of all samples of these bags, bag by bag."""
        return _ranges(self.starts[bags], self.sizes[bags])


def _require_new(where: str, stem: str, names: set[str], found: list[str], num_bags: int) -> None:
    """Raise DataError if a bag is stored in two pieces: each would count as a bag."""
    again = sorted(names.intersection(found))
    if again or num_bags != len(found):
        bag = f"bag {again[0]!r}" if again else "a bag"
        raise DataError(
            f"{where}: {bag} of shard {stem} is stored in two pieces, and a bag must be contiguous in one shard: shard the data again"
        )
    names.update(found)


def _ranges(starts: Int64s, sizes: Int64s) -> Int64s:
    """Return the concatenated ranges [start, start + size)."""
    ends = np.cumsum(sizes)
    total = int(ends[-1]) if len(ends) else 0
    places: Int64s = np.arange(total, dtype=np.int64) + np.repeat(starts - (ends - sizes), sizes)
    return places


class BagLoader:
    """Training batches of whole bags; a `TrainLoader`.

    Parameters
    ----------
    dataset, split : Dataset and str
        What is read; its indexes have groups.
    transform : TransformSpec
        Names the decoder.
    order : TrainingOrder
        Lanes, and the global batch in bags.
    spec : InputSpec
        Cache and prefetch.
    classes : sequence of str, optional
        As for `Loader`.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        *,
        transform: TransformSpec,
        order: TrainingOrder,
        spec: InputSpec,
        classes: Sequence[str] | None = None,
    ) -> None:
        self.rows = SplitRows(dataset, split, transform.reading, spec.cache, spec.cache_bytes, classes=classes)
        if self.rows.sample_format.varying:
            raise DataError(
                f"{dataset.url}: the instances of bags are sequences of different lengths, expected one shape: cut or pad them, or train "
                "a model of sequences without bags, such as model.kind=rvae"
            )
        self.steps_per_epoch = order.num_steps(dataset.num_groups(split))
        self._order, self._spec = order, spec

    @cached_property
    def bags(self) -> Bags:
        """The bags of the split; the first access reads the split's indexes."""
        return Bags(self.rows)

    def batches(self, start_step: int = 0, stop_step: int | None = None) -> Generator[Batch, None, None]:
        """Yield this rank's part of the global batches [start_step, stop_step), on and on if `stop_step` is None.

        A rank without a bag in a short last step gets a bag of one instance with empty `positions` and `ordinals`: run it with weight 0.
        """
        step = start_step
        while stop_step is None or step < stop_step:
            epoch_end = (step // self.steps_per_epoch + 1) * self.steps_per_epoch
            stop = epoch_end if stop_step is None else min(epoch_end, stop_step)
            yield from prefetched(self._epoch(step, stop), 0 if self.rows.in_ram else self._spec.prefetch)
            step = stop

    @property
    def notes(self) -> tuple[str, ...]:
        """Messages for the user: the number of bags and of their instances; reads the indexes."""
        return self.bags.notes

    def reread(self, step: int) -> tuple[Batch, SplitRows]:
        """Return the batch of optimizer step 1, 2, ... of all ranks together, and its split."""
        whole = copy.copy(self)
        whole._order = dataclasses.replace(self._order, rank=0, world_size=1)
        with closing(whole.batches(step - 1, step)) as batches:
            return next(batches), self.rows

    def close(self) -> None:
        """Close the open shards."""
        self.rows.close()

    def _epoch(self, start: int, stop: int) -> Generator[Batch, None, None]:
        epoch, first = locate(start, self.steps_per_epoch)
        order = self._epoch_order(epoch, self._order)
        whole = dataclasses.replace(self._order, rank=0, world_size=1)
        every_rank = self._epoch_order(epoch, whole) if self._order.world_size > 1 else order
        block = -1
        for step in range(first, first + stop - start):
            if order.block_of(step) != block:
                block = order.block_of(step)
                self.rows.prefetch(*order.shards_from(step))
            own, sizes = order.step(step), self.bags.sizes[every_rank.step(step).indices]
            firsts = np.cumsum(sizes) - sizes  # position of each bag's first instance in the global batch
            positions = _ranges(firsts[own.positions], sizes[own.positions])
            yield self._batch(own.indices, positions, int(sizes.sum()))

    def _epoch_order(self, epoch: int, order: TrainingOrder) -> EpochOrder:
        return EpochOrder(self.bags.counts, self.rows.dataset.training_key(self.rows.split), order, epoch)

    def _batch(self, bags: Int64s, positions: Int64s, num_global: int) -> Batch:
        if not len(bags):
            one = self.rows.read(np.zeros(1, np.int64))
            return self._padded(one._replace(ordinals=one.ordinals[:0]), np.ones(1, np.int64), positions, num_global)
        return self._padded(self.rows.read(self.bags.samples(bags)), self.bags.sizes[bags], positions, num_global)

    def _padded(self, rows: Rows, sizes: Int64s, positions: Int64s, num_global: int) -> Batch:
        mask = np.arange(sizes.max()) < sizes[:, None]
        pixels = np.zeros((*mask.shape, *rows.pixels.shape[1:]), rows.pixels.dtype)
        pixels[mask] = rows.pixels
        labels = np.full(mask.shape, -1, np.int64)
        labels[mask] = rows.labels
        x = torch.from_numpy(pixels)
        return Batch(
            x.permute(0, 1, 4, 2, 3) if self.rows.sample_format.image else x,
            torch.from_numpy(rows.ordinals),
            torch.from_numpy(positions),
            num_global,
            label=torch.from_numpy(labels) if self.rows.labelled else None,
            mask=torch.from_numpy(mask),
        )
