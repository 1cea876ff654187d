"""Read known samples again, where their source may have changed, exactly as they would be packed: what comes out decides what is written.

Nothing is stored. The work is cut and mapped over workers like shards; what comes back are hashes.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray

from aecore.artifact.commit import PartRecord
from aecore.artifact.fanout import Commit, FanOut, collect, serial
from aecore.data.format.limits import exclusive_cumsum, split_by_limits
from aecore.data.sources import Listing
from aecore.data.write.pack import ShardWriter
from aecore.data.write.spec import ShardSpec, ShardTask
from aecore.native.texts import Texts
from aecore.registry import SOURCES

pc: Any = pyarrow.compute  # any: pyarrow's stubs know no types of values
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


class Contents:
    """The hashes of samples before they are written, for `splits.by=content`: what a ledger does not know of their files is read, once.

    `read` returns what samples of a listing are now; with `checksum` all are read.
    """

    def __init__(self, read: Callable[[Listing], Reread], *, checksum: bool = False) -> None:
        self._read, self._checksum = read, checksum
        self._found: dict[str, tuple[str | None, str | None, bool]] = {}

    def of(self, listing: Listing, ledger: pa.Table) -> list[str]:
        """Return the hash of each sample, of what would be stored, or what was read of a bad one; of one that has neither its key."""
        own = ledger.filter(pc.fill_null(pc.equal(ledger["origin"], listing.origin), True))
        at = pc.index_in(Texts.of(listing.keys).column(), value_set=own["key"].combine_chunks())
        known = own.take(at)
        states = pa.nulls(len(listing), pa.string()) if listing.states is None else Texts.of(listing.states).column()
        same = pc.and_(pc.equal(known["bytes"], pa.array(listing.sizes)), pc.equal(known["state"], states))
        is_known = _mask(pc.fill_null(same, False)) & (not self._checksum)
        hashes: list[str | None] = pc.if_else(pa.array(is_known), hashes_of(known), None).to_pylist()
        rows = np.flatnonzero(~is_known)
        part = listing.take(rows)
        found = self._read(part)
        self._found = dict(zip(part.keys, zip(found.stored, found.bad, found.unsettled.tolist(), strict=True), strict=True))
        for row, stored, bad in zip(rows.tolist(), found.stored, found.bad, strict=True):
            hashes[row] = stored or bad
        return [digest or key for digest, key in zip(hashes, listing.keys, strict=True)]

    def again(self, listing: Listing) -> Reread:
        """Return what these samples, all of which `of` has read, are now."""
        stored, bad, unsettled = ([self._found[key][column] for key in listing.keys] for column in range(3))
        return Reread(stored, bad, np.array(unsettled, np.bool_))  # type: ignore[arg-type]  # columns of several types


def hashes_of(rows: pa.Table) -> Any:  # any: pyarrow's stubs know no types of values
    """Return the hash of each sample of a ledger: of what is stored, or what was read of a bad one."""
    return pc.coalesce(rows["sample_sha256"], rows["sha256"])


def _mask(values: Any) -> NDArray[np.bool_]:  # any: as above
    found: NDArray[np.bool_] = (values.to_numpy() if isinstance(values, pa.ChunkedArray) else values.to_numpy(zero_copy_only=False)).astype(
        np.bool_
    )
    return found


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
