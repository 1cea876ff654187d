"""Which sample goes into which batch of which rank: a pure function of (shard counts, key, seed, epoch). No disk, no torch.

An epoch permutes the shards, cuts the stream of their samples into C lanes whose sizes differ by at most one, and shuffles inside
blocks of every lane. Row k takes the k-th sample of every lane; a step is G/C rows; rank r of W takes lanes [rC/W, (r+1)C/W).
The batches are therefore the same for any W <= C, and any step of any epoch is found without walking to it.
The price: a sample moves only as far as its lane's block within an epoch (and with its shard between epochs), and G divides by C.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aecore.errors import ConfigError

Int64s = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StepRows:
    """The n rows of one global batch that one rank works on; n may be 0 in the short last step of an epoch.

    Attributes:
        indices: `[n]` int64, samples numbered through the split's shards in manifest order.
        positions: `[n]` int64, ascending, position of each row in the global batch.
        num_global: rows of the global batch over all ranks.
    """

    indices: Int64s
    positions: Int64s
    num_global: int


def check_lanes(global_batch: int, lanes: int, world: int = 1) -> None:
    """ConfigError unless `lanes` divides `global_batch` and there are no more ranks than lanes."""
    if lanes < 1 or global_batch < 1:
        raise ConfigError(f"train.global_batch is {global_batch} and train.lanes is {lanes}: both must be at least 1")
    if global_batch % lanes:
        below, above = global_batch // lanes * lanes, -(-global_batch // lanes) * lanes
        fits = max(c for c in range(1, min(lanes, global_batch) + 1) if global_batch % c == 0)
        batches = f"{below} or {above}" if below else str(above)
        raise ConfigError(
            f"train.global_batch is {global_batch}, which train.lanes={lanes} does not divide: "
            f"use train.global_batch={batches}, or train.lanes={fits}"
        )
    if world > lanes:
        raise ConfigError(f"{world} ranks need at least as many lanes, train.lanes is {lanes}: use fewer workers or train.lanes>={world}")


def locate(step: int, steps_per_epoch: int) -> tuple[int, int]:
    """Return (epoch, step in that epoch) of a training step: all that a resumed run has to know."""
    return divmod(step, steps_per_epoch)


class EpochOrder:
    """The order of one epoch. Blocks of lanes are computed when a step first needs them: memory is O(lanes * block + shards).

    Args:
        counts: samples of each shard in manifest order; empty shards are fine.
        key: what the samples are (the training split's hash); other data, other order.
        seed, epoch: numbers that choose the shuffle.
        lanes: C, see `check_lanes`.
        block: samples of a lane that are shuffled together.
    """

    def __init__(self, counts: Sequence[int], key: str, seed: int, epoch: int, lanes: int, block: int) -> None:
        if lanes < 1 or block < 1:
            raise ConfigError(f"train.lanes is {lanes} and train.block is {block}: both must be at least 1")
        sizes = np.asarray(counts, np.int64)
        self.num_samples = int(sizes.sum())
        self._key = f"{key}|{seed}|{epoch}"
        self._lanes, self._block_len = lanes, block
        self._bounds = np.array([i * self.num_samples // lanes for i in range(lanes + 1)], np.int64)
        shards = _permutation(f"{self._key}|shards", len(sizes))
        self._stream_starts = _starts(sizes[shards])
        self._shard_starts = _starts(sizes)[shards]
        self._cached: tuple[tuple[int, int, int], Int64s] | None = None

    @property
    def num_rows(self) -> int:
        """Rows of the epoch: samples of the longest lane."""
        return -(-self.num_samples // self._lanes)

    def num_steps(self, global_batch: int) -> int:
        """Return the steps of the epoch; only the last one may be short."""
        check_lanes(global_batch, self._lanes)
        return -(-self.num_rows // (global_batch // self._lanes))

    def step(self, step: int, rank: int, world: int, global_batch: int) -> StepRows:
        """Return the rows of `rank` in one step of this epoch, by position in the global batch."""
        check_lanes(global_batch, self._lanes, world)
        steps, lanes = self.num_steps(global_batch), self._lanes
        if not (0 <= step < steps and 0 <= rank < world):
            raise IndexError(f"step {step} of {steps}, rank {rank} of {world}")
        first, last = rank * lanes // world, (rank + 1) * lanes // world
        rows = global_batch // lanes
        start, stop = step * rows, min((step + 1) * rows, self.num_rows)
        indices = self._rows(first, last, start, stop)
        present = indices >= 0
        return StepRows(indices[present], self._positions(start, stop)[:, first:last][present], self._num_present(start, stop))

    def _num_present(self, start: int, stop: int) -> int:
        return int(np.minimum(np.diff(self._bounds), stop).sum() - np.minimum(np.diff(self._bounds), start).sum())

    def _positions(self, start: int, stop: int) -> Int64s:
        """Return `[rows, C]`: row by row, lane by lane; lanes that have ended take no position (only in the epoch's last row)."""
        present = np.arange(start, stop)[:, None] < np.diff(self._bounds)[None, :]
        return present.ravel().cumsum().reshape(present.shape) - 1

    def _rows(self, first: int, last: int, start: int, stop: int) -> Int64s:
        """Return `[rows, lanes of the rank]` sample numbers, -1 where a lane has ended."""
        pieces = []
        while start < stop:
            block, offset = divmod(start, self._block_len)
            length = min(self._block_len - offset, stop - start)
            pieces.append(self._block(first, last, block)[:, offset : offset + length])
            start += length
        return np.concatenate(pieces, axis=1).T

    def _block(self, first: int, last: int, block: int) -> Int64s:
        if self._cached is None or self._cached[0] != (first, last, block):
            begin = block * self._block_len
            out = np.full((last - first, min(self._block_len, self.num_rows - begin)), -1, np.int64)
            for lane in range(first, last):
                start = self._bounds[lane] + begin
                length = max(0, min(int(self._bounds[lane + 1] - start), self._block_len))
                stream = start + _permutation(f"{self._key}|{lane}|{block}", length)
                shard = np.searchsorted(self._stream_starts, stream, side="right") - 1
                out[lane - first, :length] = self._shard_starts[shard] + stream - self._stream_starts[shard]
            self._cached = (first, last, block), out
        return self._cached[1]


def _starts(sizes: Int64s) -> Int64s:
    return np.cumsum(sizes) - sizes


def _permutation(text: str, length: int) -> Int64s:
    """Return a permutation of `range(length)` that every numpy version gives: raw bits of Philox, sorted (stable).

    `Generator.permutation` may change between numpy versions; the raw stream of a bit generator may not.
    """
    key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")
    return np.argsort(np.random.Philox(key=key).random_raw(length), kind="stable").astype(np.int64, copy=False)
