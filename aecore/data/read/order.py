"""Which sample goes into which batch of which rank: a pure function of (shard counts, key, seed, epoch). No disk, no torch.

An epoch permutes the shards, cuts the stream of their samples into C lanes whose sizes differ by at most one, and shuffles inside
blocks of every lane. Row k takes the k-th sample of every lane; a step is G/C rows; rank r of W takes lanes [rC/W, (r+1)C/W).
The batches are therefore the same for any W <= C, and any step of any epoch is computed directly.
The price: a sample moves only as far as its lane's block within an epoch (and with its shard between epochs), and G divides by C.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aecore.errors import ConfigError

Int64s = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingOrder:
    """How the samples of a split become global batches, and which part of each of them one rank reads.

    Attributes
    ----------
    seed : int
        Chooses the shuffle, together with the epoch and the hash of the samples.
    lanes : int
        C, the largest possible number of ranks; divides `global_batch`.
    block : int
        Samples of a lane that are shuffled together.
    global_batch : int
        G, samples of a step over all ranks.
    rank, world_size : int
        The rank that reads, and the number of ranks.

    Raises
    ------
    ConfigError
        The numbers do not fit each other; the message names some that do.
    """

    seed: int = 0
    lanes: int = 16
    block: int = 4096
    global_batch: int = 128
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        batch, lanes = self.global_batch, self.lanes
        if min(batch, lanes, self.block) < 1:
            raise ConfigError(f"train.global_batch is {batch}, train.lanes {lanes} and train.block {self.block}: all must be at least 1")
        if batch % lanes:
            below, above = batch // lanes * lanes, -(-batch // lanes) * lanes
            fits = max(c for c in range(1, min(lanes, batch) + 1) if batch % c == 0)
            batches = f"{below} or {above}" if below else str(above)
            raise ConfigError(
                f"train.global_batch is {batch}, which train.lanes={lanes} does not divide: "
                f"use train.global_batch={batches}, or train.lanes={fits}"
            )
        if self.world_size > lanes:
            raise ConfigError(
                f"{self.world_size} ranks need at least as many lanes, train.lanes is {lanes}: "
                f"use fewer workers or train.lanes>={self.world_size}"
            )
        if not 0 <= self.rank < self.world_size:
            raise ConfigError(f"rank {self.rank} of {self.world_size} ranks: expected 0 to {self.world_size - 1}")

    @property
    def own_lanes(self) -> range:
        """The lanes that this rank reads."""
        return range(self.rank * self.lanes // self.world_size, (self.rank + 1) * self.lanes // self.world_size)

    def num_steps(self, num_samples: int) -> int:
        """Return the steps of an epoch; only the last one may be short."""
        return -(-num_samples // self.global_batch)


@dataclass(frozen=True, slots=True)
class StepRows:
    """The n rows of one global batch that one rank works on; n may be 0 in the short last step of an epoch.

    Attributes
    ----------
    indices : `[n]` int64
        Samples, numbered through the split's shards in manifest order.
    positions : `[n]` int64
        Position of each row in the global batch, ascending.
    num_global : int
        Rows of the global batch over all ranks.
    """

    indices: Int64s
    positions: Int64s
    num_global: int


def locate(step: int, steps_per_epoch: int) -> tuple[int, int]:
    """Return (epoch, step in that epoch) of a training step: the whole cursor of a resumed run."""
    return divmod(step, steps_per_epoch)


class EpochOrder:
    """One epoch of a training order. Blocks of lanes are computed when a step first needs them: memory is O(lanes * block + shards).

    Parameters
    ----------
    counts : sequence of int
        Samples of each shard in manifest order; empty shards are fine.
    key : str
        The training split's hash: other data, other order.
    order : TrainingOrder
        Seed, lanes and rank.
    epoch : int
        Its number.
    """

    def __init__(self, counts: Sequence[int], key: str, order: TrainingOrder, epoch: int) -> None:
        sizes = np.asarray(counts, np.int64)
        num_samples = int(sizes.sum())
        self.num_steps = order.num_steps(num_samples)
        self._order = order
        self._key = f"{key}|{order.seed}|{epoch}"
        self._bounds = np.array([i * num_samples // order.lanes for i in range(order.lanes + 1)], np.int64)
        self._num_rows = -(-num_samples // order.lanes)  # samples of the longest lane
        shards = _permutation(f"{self._key}|shards", len(sizes))
        self._shards = shards
        self._stream_starts = _starts(sizes[shards])
        self._shard_starts = _starts(sizes)[shards]
        self._cached: tuple[int, Int64s] | None = None

    def step(self, step: int) -> StepRows:
        """Return the rank's rows in one step of this epoch, by position in the global batch."""
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} of {self.num_steps}")
        own, rows = self._order.own_lanes, self._order.global_batch // self._order.lanes
        start, stop = step * rows, min((step + 1) * rows, self._num_rows)
        indices = self._rows(start, stop)
        present = indices >= 0
        sizes = np.diff(self._bounds)
        num_global = int((np.minimum(sizes, stop) - np.minimum(sizes, start)).sum())
        return StepRows(indices[present], self._positions(start, stop)[:, own.start : own.stop][present], num_global)

    def block_of(self, step: int) -> int:
        """Return the number of the block that a step begins in."""
        return step * (self._order.global_batch // self._order.lanes) // self._order.block

    def shards_from(self, step: int) -> tuple[Int64s, Int64s]:
        """Return the numbers of the shards that the rank reads in the block of `step`, and of those that it first needs later.

        Both in the order in which they are needed, block by block: inside a block samples are shuffled.
        """
        block, begin = self._order.block, self.block_of(step) * self._order.block
        needed: dict[int, int] = {}  # shard -> first block
        for lane in self._order.own_lanes:
            first, last = int(self._bounds[lane]) + begin, int(self._bounds[lane + 1])
            if first < last:
                low, high = np.searchsorted(self._stream_starts, [first, last - 1], side="right").tolist()
                for place in range(low - 1, high):
                    at = max(0, int(self._stream_starts[place]) - first) // block
                    shard = int(self._shards[place])
                    needed[shard] = min(at, needed.get(shard, at))
        order = sorted(needed, key=needed.__getitem__)
        now = sum(at == 0 for at in needed.values())
        return np.array(order[:now], np.int64), np.array(order[now:], np.int64)

    def _positions(self, start: int, stop: int) -> Int64s:
        """Return `[rows, C]`: row by row, lane by lane; lanes that have ended take no position (only in the epoch's last row)."""
        present = np.arange(start, stop)[:, None] < np.diff(self._bounds)[None, :]
        return present.ravel().cumsum().reshape(present.shape) - 1

    def _rows(self, start: int, stop: int) -> Int64s:
        """Return `[rows, lanes of the rank]` sample numbers, -1 where a lane has ended."""
        pieces = []
        while start < stop:
            block, offset = divmod(start, self._order.block)
            length = min(self._order.block - offset, stop - start)
            pieces.append(self._block(block)[:, offset : offset + length])
            start += length
        return np.concatenate(pieces, axis=1).T

    def _block(self, block: int) -> Int64s:
        if self._cached is None or self._cached[0] != block:
            own, size = self._order.own_lanes, self._order.block
            begin = block * size
            out = np.full((len(own), min(size, self._num_rows - begin)), -1, np.int64)
            for row, lane in zip(out, own, strict=True):
                start = self._bounds[lane] + begin
                length = max(0, min(int(self._bounds[lane + 1] - start), size))
                stream = start + _permutation(f"{self._key}|{lane}|{block}", length)
                shard = np.searchsorted(self._stream_starts, stream, side="right") - 1
                row[:length] = self._shard_starts[shard] + stream - self._stream_starts[shard]
            self._cached = block, out
        return self._cached[1]


def _starts(sizes: Int64s) -> Int64s:
    return np.cumsum(sizes) - sizes


def _permutation(text: str, length: int) -> Int64s:
    """Return a permutation of `range(length)` that is the same in every numpy version: raw bits of Philox, sorted (stable).

    `Generator.permutation` may change between numpy versions; the raw stream of a bit generator may not.
    """
    key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")
    return np.argsort(np.random.Philox(key=key).random_raw(length), kind="stable").astype(np.int64, copy=False)
