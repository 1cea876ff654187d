"""Read known samples again, where their source may have changed, exactly as they would be packed: what comes out decides what is written.

Nothing is stored. The work is cut and mapped over workers like shards; what comes back are hashes.
"""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aecore.artifact.commit import PartRecord
from aecore.artifact.fanout import Commit, FanOut, collect, serial
from aecore.data.format.limits import exclusive_cumsum, split_by_limits
from aecore.data.sources import Listing
from aecore.data.write.pack import ShardWriter
from aecore.data.write.spec import ShardSpec, ShardTask
from aecore.registry import SOURCES

LITTLE_SAMPLES, LITTLE_BYTES = 1000, 64 << 20


def is_little(samples: int, num_bytes: int) -> bool:
    """Return whether these samples are read again in about a second: by this process alone, and again by each run."""
    return samples < LITTLE_SAMPLES and num_bytes < LITTLE_BYTES


@dataclass(frozen=True, slots=True)
class Reread:
    """What n samples are now: the sha256 of what would be stored (None: it would be quarantined), or of what was read if it is bad.

    `unsettled` are those that changed while they were read.
    """

    stored: list[str | None]
    bad: list[str | None]
    unsettled: NDArray[np.bool_]


class RereadWorker:
    """Reads samples of one source, which it opens once."""

    def __init__(self, source: Any) -> None:  # any: every source kind has its own spec class
        self._source = SOURCES.build(source)

    def __call__(self, task: ShardTask) -> Commit:
        """Read the samples of `task`; the call that is returned writes nothing."""
        writer = ShardWriter(task)
        writer.scan(self._source)
        stored: list[str | None] = [None] * len(task)
        for position, digest in zip(writer.good[0].tolist(), writer.digests(), strict=True):
            stored[position] = digest
        bad = {position: sha256 for position, _, _, _, sha256 in writer.bad}
        detail = {"stored": stored, "bad": [bad.get(position) for position in range(len(task))], "unsettled": writer.unsettled()}
        record = PartRecord(task.stem, (), len(task), detail=detail)
        return lambda: record


def read_again(listing: Listing, source: Any, shards: ShardSpec, fan_out: FanOut) -> Reread:  # any: as above
    """Return what these samples are now; StoreError if one cannot be read."""
    count = len(listing)
    if not count:
        return Reread([], [], np.zeros(0, np.bool_))
    limits = (np.arange(count + 1), shards.max_samples), (exclusive_cumsum(listing.sizes), shards.max_bytes)
    tasks = [_task(listing.slice(start, stop), start, source, shards) for start, stop in split_by_limits(*limits)]
    fan_out = serial if is_little(count, int(listing.sizes.sum())) else fan_out
    records = collect(fan_out, functools.partial(RereadWorker, source), tasks, what="parts of what is read again")
    unsettled = np.zeros(count, np.bool_)
    unsettled[[ordinal for record in records for ordinal in record.detail["unsettled"]]] = True
    stored, bad = ([sha256 for record in records for sha256 in record.detail[name]] for name in ("stored", "bad"))
    return Reread(stored, bad, unsettled)


def _task(part: Listing, first: int, source: Any, shards: ShardSpec) -> ShardTask:  # any: as above
    return ShardTask(
        split="train",
        stem=f"read-again-{first:09d}",
        source=source,
        keys=part.keys,
        sources=part.sources,
        sizes=part.sizes,
        ordinals=np.arange(first, first + len(part)),
        shards=shards,
        unusable=part.unusable,
        states=part.states,
    )
