"""Read one shard strictly: what the manifest, the index and the tar say must agree to the last bit, else DataError.

`iterate` compares every header and padding with what the index implies, and every data member with its sha256: no flipped bit and no
truncation passes. `read_rows` reads members by offset (one descriptor, thread-safe `pread`), each verified by its sha256.
"""

import bisect
import hashlib
import os
import weakref
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from aecore.data.index import content_sha256, read_table
from aecore.data.record import DATA_EXTENSIONS, Sample, require_allowed
from aecore.data.tar import BLOCK, different_headers, end_of_archive
from aecore.errors import DataError
from aecore.store import Store

if TYPE_CHECKING:
    from aecore.data.manifest import ShardRef

WINDOW_BYTES = 1 << 20
LARGE_SAMPLE = 1 << 13
REMEDY = "restore it or write the data set again"


class ShardReader:
    """One shard of a manifest. Opens the tar when first read; `close` (or the garbage collector) closes it."""

    def __init__(self, store: Store, shard: "ShardRef") -> None:
        self.shard = shard
        self._store = store
        self._close: weakref.finalize[..., ShardReader] | None = None

    def __repr__(self) -> str:
        return f"ShardReader({self._store.url}/{self.shard.tar.name}, {self.shard.samples} samples)"

    def __len__(self) -> int:
        return self.shard.samples

    def close(self) -> None:
        """Close the descriptor; a later read opens it again."""
        if self._close is not None:
            self._close()
            self._close = None
            del self._descriptor

    @cached_property
    def _descriptor(self) -> int:
        path = self._store.local(self.shard.tar)
        descriptor = os.open(path, os.O_RDONLY)
        self._close = weakref.finalize(self, os.close, descriptor)
        return descriptor

    @cached_property
    def index(self) -> pa.Table:
        """The index, one row per sample, verified by its sha256, page checksums and content hash (DataError)."""
        where = f"{self._store.url}/{self.shard.index.name}"
        table = read_table(self._store.read(self.shard.index.name, ref=self.shard.index), where)
        if content_sha256(table) != self.shard.index_content_sha256:
            raise DataError(f"{where} does not hold the rows that the manifest names: restore it or write the artefact again")
        if table.num_rows != self.shard.samples:
            raise DataError(f"{where} has {table.num_rows} rows, the manifest says {self.shard.samples}")
        return table

    @cached_property
    def quarantine(self) -> pa.Table | None:
        """The table of the samples that are not in the shard, None if there are none; verified (DataError)."""
        ref = self.shard.quarantine
        return None if ref is None else read_table(self._store.read(ref.name, ref=ref), f"{self._store.url}/{ref.name}")

    @cached_property
    def keys(self) -> list[str]:
        """Keys of the samples, in row order."""
        return self._layout.keys

    @cached_property
    def _layout(self) -> "_Layout":
        return _layout(self.index, self._name)

    @property
    def _name(self) -> str:
        return f"{self._store.url}/{self.shard.tar.name}"

    def read_rows(self, rows: NDArray[np.int64] | list[int]) -> list[bytes]:
        """Return the data members of these rows (numbers in the shard, any order); DataError naming the key if one is damaged."""
        offsets, sizes, hashes = self._layout.data_offsets, self._layout.data_sizes, self._layout.hashes
        descriptor, pread, sha256 = self._descriptor, os.pread, hashlib.sha256
        found = []
        for row in rows if isinstance(rows, list) else rows.tolist():
            data = pread(descriptor, sizes[row], offsets[row])
            if sha256(data).hexdigest() != hashes[row]:
                raise self._damaged(row)
            found.append(data)
        return found

    def iterate(self, *, verify: bool = True) -> Iterator[Sample]:
        """Yield all samples in order; nothing of a damaged window is yielded. Without `verify` only the size is checked."""
        starts, num, row, buffer = self._layout.starts, self.shard.samples, 0, bytearray()
        with ThreadPoolExecutor(1) as helper:  # starts its thread only when asked
            while row < num:
                stop = max(row + 1, bisect.bisect_right(starts, starts[row] + WINDOW_BYTES, row, num) - 1)
                if len(buffer) < starts[stop] - starts[row]:
                    buffer = bytearray(max(starts[stop] - starts[row], WINDOW_BYTES))
                window = self._read(memoryview(buffer)[: starts[stop] - starts[row]], starts[row])
                samples = self._cut(window, row, stop)
                if verify:
                    self._check(window, samples, row, helper)
                yield from samples
                row = stop
        end = end_of_archive(starts[num])
        if verify and self._read(memoryview(bytearray(len(end) + 1)), starts[num]) != end:
            raise DataError(f"{self._name} is damaged after its last sample: {REMEDY}")

    def verify(self) -> None:
        """Read everything (tar, index, quarantine) and compare it with the manifest; DataError names what is damaged."""
        for _ in self.iterate():
            pass
        self._store.local(self.shard.tar, verify=True)
        if self.quarantine is not None and self.quarantine.num_rows != self.shard.quarantined:
            found, expected = self.quarantine.num_rows, self.shard.quarantined
            raise DataError(f"{self._name}: {found} rows in quarantine, the manifest says {expected}: {REMEDY}")

    def _read(self, window: memoryview, offset: int) -> memoryview:
        """Fill `window`, or a part of it at the end of the file: that is the caller's to notice. Return what was filled."""
        done = 0
        while done < len(window) and (num := os.preadv(self._descriptor, [window[done:]], offset + done)):
            done += num
        return window[:done]

    def _cut(self, window: memoryview, first: int, stop: int) -> list[Sample]:
        layout, base = self._layout, self._layout.starts[first]
        ext, begins, ends, firsts, labels = layout.ext, layout.begins, layout.ends, layout.firsts, layout.labels
        samples = []
        for row in range(first, stop):
            members = {ext[at]: bytes(window[begins[at] - base : ends[at] - base]) for at in range(firsts[row], firsts[row + 1])}
            samples.append(Sample(layout.keys[row], members, labels[row]))
        return samples

    def _check(self, window: memoryview, samples: list[Sample], first: int, helper: Executor) -> None:
        """DataError naming a damaged sample unless all hashes, labels, headers and paddings are what the index implies.

        `window` starts at the first header of the samples (row `first` and on), which were cut from it.
        """
        layout, base = self._layout, self._layout.starts[first]
        # hashing lets other threads run above 2047 bytes: 25 us become 20 for an image of 19 kB if two cores are free
        half = len(samples) // 2 if len(window) > LARGE_SAMPLE * len(samples) else len(samples)
        rest = helper.submit(self._check_contents, samples[half:], first + half) if half < len(samples) else None
        self._check_contents(samples[:half], first)
        if rest is not None:
            rest.result()
        last = first + len(samples)
        if len(window) < layout.starts[last] - base:  # all contents are there: what is cut off is the last padding
            raise self._damaged(last - 1)
        members_of = slice(layout.firsts[first], layout.firsts[last])
        begins, ends = (np.array(places[members_of]) - base for places in (layout.begins, layout.ends))
        names = [f"{sample.key}.{ext}".encode() for sample in samples for ext in sample.members]
        wrong = different_headers(np.frombuffer(window, np.uint8), names, begins, ends)
        if len(wrong):
            raise self._damaged(bisect.bisect_right(layout.firsts, members_of.start + int(wrong[0])) - 1)

    def _check_contents(self, samples: list[Sample], first: int) -> None:
        data_ext, hashes, sha256 = self._layout.data_ext, self._layout.hashes, hashlib.sha256
        for row, sample in enumerate(samples, first):
            members, label = sample.members, sample.label
            if sha256(members[data_ext[row]]).hexdigest() != hashes[row] or (label is not None and members.get("cls") != b"%d" % label):
                raise self._damaged(row)

    def _damaged(self, row: int) -> DataError:
        return DataError(f"{self._name} is damaged at sample {self._layout.keys[row]!r} (row {row}): {REMEDY}")


class _Layout(NamedTuple):
    """The index as plain lists: per sample (N) or per member (M, in file order)."""

    keys: list[str]
    labels: list[int | None]
    hashes: list[str]
    starts: list[int]  # N+1: first byte of each sample's first header, and of the end
    firsts: list[int]  # N+1: number of each sample's first member
    data_ext: list[str]
    data_offsets: list[int]
    data_sizes: list[int]
    ext: list[str]  # M
    begins: list[int]
    ends: list[int]


def _layout(index: pa.Table, where: str) -> _Layout:
    members: Any = index.column("members").combine_chunks()  # any: pyarrow's stubs give no flatten
    strings: Any = {name: index.column(name).to_pylist() for name in ("key", "sha256")}  # any: nor are these columns optional
    ext, offsets, sizes = members.flatten().flatten()
    extensions, begins, lengths = ext.to_pylist(), offsets.to_numpy(), sizes.to_numpy()
    for name in sorted(set(extensions)):
        require_allowed(name, f"a member of {where}")
    firsts = np.concatenate([[0], np.cumsum(members.value_lengths().to_numpy())])
    data = np.flatnonzero([name in DATA_EXTENSIONS for name in extensions])
    if not np.array_equal(np.searchsorted(firsts, data, side="right") - 1, np.arange(index.num_rows)):
        raise DataError(f"the index of {where} does not name one data member per sample: {REMEDY}")
    ends = np.cumsum(BLOCK + lengths + -lengths % BLOCK)
    if not np.array_equal(begins + lengths + -lengths % BLOCK, ends):
        raise DataError(f"the members in the index of {where} do not follow each other without gaps: {REMEDY}")
    return _Layout(
        keys=strings["key"],
        labels=list(index.column("label").to_pylist()),
        hashes=strings["sha256"],
        starts=[*(begins[firsts[:-1]] - BLOCK).tolist(), *ends[-1:].tolist()],
        firsts=firsts.tolist(),
        data_ext=[extensions[at] for at in data.tolist()],
        data_offsets=begins[data].tolist(),
        data_sizes=lengths[data].tolist(),
        ext=extensions,
        begins=begins.tolist(),
        ends=(begins + lengths).tolist(),
    )
