"""Read one shard strictly: manifest, index and tar must agree to the last bit, else DataError.

`iterate` compares every header and padding with what the index implies, and every data member with its sha256: no flipped bit and no
truncation passes. `read_rows` reads members by offset (one descriptor, thread-safe `pread`), each verified by its sha256. The headers of
an adopted tar were written by another program: there `verify` compares the sha256 of the whole file instead.
"""

import functools
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import cached_property
from typing import TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from aecore.artifact.commit import newest_number
from aecore.data.format.index import INDEX_SCHEMA, QUARANTINE_SCHEMA, content_sha256, read_table
from aecore.data.format.limits import split_by_limits
from aecore.data.format.record import Sample
from aecore.data.format.tar import different_headers, end_of_archive
from aecore.data.manifest import STEM, ShardRef, read_manifest, tar_store
from aecore.data.read.layout import REMEDY, Layout
from aecore.errors import DataError
from aecore.native.bytes_column import BytesColumn
from aecore.native.loops import read_pieces, sha256s
from aecore.store import Files, Store, close_read, read_again
from aecore.threads import map_ordered

T = TypeVar("T")
WINDOW_BYTES = 1 << 21
LARGE_SAMPLE, ADOPTED_ROWS = 1 << 12, 64
PARALLEL_BYTES = 1 << 20  # of large samples: they are read and hashed in two threads, which costs 0.1 ms


class ShardReader:
    """One shard of a manifest. Opens the tar when first read; `close` (or the garbage collector) closes it."""

    def __init__(self, store: Store, shard: ShardRef) -> None:
        self.shard = shard
        self._store, self._tars = store, tar_store(store, shard)
        self._adopted = shard.tar_base_url is not None
        self._refetching = threading.Lock()
        self._close: weakref.finalize[..., ShardReader] | None = None

    def __repr__(self) -> str:
        return f"ShardReader({self._tars.url}/{self.shard.tar.name}, {self.shard.samples} samples)"

    def __len__(self) -> int:
        return self.shard.samples

    def close(self) -> None:
        """Close the descriptor; a later read opens it again."""
        if self._close is not None:
            self._close()
            self._close = None
            vars(self).pop("_descriptor", None)  # gone already where a corrupt copy could not be fetched again

    @cached_property
    def _descriptor(self) -> int:
        descriptor = self._opened()
        self._close = weakref.finalize(self, close_read, descriptor)
        return descriptor

    def _opened(self) -> int:
        try:
            return self._tars.open(self.shard.tar)
        except DataError as error:
            raise self._changed_by_owner() or error from error

    @cached_property
    def index(self) -> pa.Table:
        """The index, one row per sample, verified by its sha256, page checksums and content hash (DataError)."""
        where = f"{self._store.url}/{self.shard.index.name}"
        data = self._store.read(self.shard.index.name, ref=self.shard.index)
        table = read_table(data, where, self.shard.samples, INDEX_SCHEMA, more=True)
        if content_sha256(table) != self.shard.index_content_sha256:
            raise DataError(f"{where} does not hold the rows that the manifest names: restore it or write the artefact again")
        return table

    @cached_property
    def quarantine(self) -> pa.Table | None:
        """The table of the samples that are not in the shard, None if there are none; verified (DataError)."""
        ref = self.shard.quarantine
        if ref is None:
            return None
        where = f"{self._store.url}/{ref.name}"
        return read_table(self._store.read(ref.name, ref=ref), where, self.shard.quarantined, QUARANTINE_SCHEMA)

    @property
    def keys(self) -> list[str]:
        """Keys of the samples, in row order."""
        return self._layout.keys

    @cached_property
    def _layout(self) -> Layout:
        layout = Layout(self.index, self._name, packed=not self._adopted)
        end = int(layout.starts[-1])
        if end > self.shard.tar.bytes if self._adopted else end + len(end_of_archive(end)) != self.shard.tar.bytes:
            raise DataError(
                f"the index of {self._name} describes a tar of another size than the manifest ({self.shard.tar.bytes} bytes): {REMEDY}"
            )
        return layout

    @property
    def _name(self) -> str:
        return f"{self._tars.url}/{self.shard.tar.name}"

    def read_rows(self, rows: NDArray[np.int64] | list[int]) -> list[bytes]:
        """Return the data members of these rows (numbers in the shard, any order); DataError naming the key if one is damaged."""
        return list(self.read_members(np.asarray(rows, np.int64)))

    def read_pieces(self, files: Files, rows: NDArray[np.int64]) -> BytesColumn:
        """Return the data members of these rows as `read_members` does, each by a request of its own to the files that hold the tar."""
        begins, ends = self._layout.data_begins[rows].tolist(), self._layout.data_ends[rows].tolist()
        places = [(self.shard.tar.name, begin, end - begin) for begin, end in zip(begins, ends, strict=True)]
        read = files.pieces(places, 0)
        if read is None:  # local files
            return self.read_members(rows)
        found = BytesColumn.from_bytes([read(place) for place in range(len(places))])
        self._check_members(found, rows)
        return found

    def read_members(self, rows: NDArray[np.int64]) -> BytesColumn:
        """Return the data members of these rows in one buffer, as `read_rows` does."""
        nbytes = int((self._layout.data_ends[rows] - self._layout.data_begins[rows]).sum())
        half, _ = len(rows) // 2, self._descriptor  # opened once, not by both threads
        if nbytes < max(PARALLEL_BYTES, LARGE_SAMPLE * len(rows)):
            return self._read_members(rows, verify=True)
        with ThreadPoolExecutor(1) as helper:
            rest = helper.submit(self._read_members, rows[half:], verify=True)
            return BytesColumn.concat([self._read_members(rows[:half], verify=True), rest.result()])

    def _read_members(self, rows: NDArray[np.int64], *, verify: bool) -> BytesColumn:
        """Return the data members of these rows; a damaged cached copy is fetched again and read once more."""
        descriptor = self._descriptor
        found = self._pread(rows)
        if not verify:
            return found
        try:
            self._check_members(found, rows)
        except DataError:
            if not self._refetch_if_corrupt(descriptor):
                raise
            found = self._pread(rows)
            self._check_members(found, rows)
        return found

    def _refetch_if_corrupt(self, descriptor: int) -> bool:
        """Fetch a corrupt cached tar again; return whether the file is now another than `descriptor`, which stays open for its readers."""
        with self._refetching:
            if self._descriptor == descriptor:
                if not self._tars.refetch_if_corrupt(self.shard.tar):
                    return False
                del self._descriptor
            return self._descriptor != descriptor

    def _pread(self, rows: NDArray[np.int64]) -> BytesColumn:
        return self._again(functools.partial(self._pieces, rows))

    def _again(self, read: Callable[[int], T]) -> T:
        """Return `read(descriptor)`, tried again with the tar opened anew after an OSError: the descriptor may be stale."""
        try:
            return read(self._descriptor)
        except OSError as error:
            return read_again(lambda: read(self._reopened()), self._name, error)

    def _reopened(self) -> int:
        """Open the tar again under the number of the descriptor, which other threads may be reading."""
        descriptor = self._opened()
        try:
            return os.dup2(descriptor, self._descriptor, inheritable=False)
        finally:
            close_read(descriptor)

    def _pieces(self, rows: NDArray[np.int64], descriptor: int) -> BytesColumn:
        begins, ends = self._layout.data_begins[rows], self._layout.data_ends[rows]
        if len(rows) and ends[-1] - begins[0] <= WINDOW_BYTES and (np.diff(rows) == 1).all():  # one read costs less than many
            window = read_pieces(descriptor, begins[:1], ends[-1:] - begins[:1])
            size = window.ends[0]
            return BytesColumn(window.data, (begins - begins[0]).clip(max=size), (ends - begins[0]).clip(max=size))
        return read_pieces(descriptor, begins, ends - begins)

    def iterate(self, *, verify: bool = True) -> Iterator[Sample]:
        """Yield all samples in order; nothing of a damaged window is yielded. Without `verify` only the size is checked."""
        if self._adopted:
            yield from self._members(verify=verify)
            return
        starts, _ = self._layout.starts, self._descriptor  # opened once, not by two threads

        def is_huge(window: tuple[int, int]) -> bool:
            return bool(starts[window[1]] - starts[window[0]] > WINDOW_BYTES)

        # hashing and reading let other threads run
        found = map_ordered(lambda window: self._window(*window, verify), split_by_limits((starts, WINDOW_BYTES)), threads=2, alone=is_huge)
        with closing(found) as windows:
            for samples in windows:
                yield from samples
        end, descriptor = end_of_archive(int(starts[-1])), self._descriptor
        if verify and self._tail(len(end)) != end and not (self._refetch_if_corrupt(descriptor) and self._tail(len(end)) == end):
            raise DataError(f"{self._name} is damaged after its last sample: {REMEDY}")

    def _window(self, first: int, stop: int, verify: bool) -> list[Sample]:
        """Return the samples of the rows [first, stop); a damaged cached copy is fetched again and read once more."""
        descriptor, starts = self._descriptor, self._layout.starts
        window = self._read(starts[first], starts[stop])
        samples = self._cut(window, first, stop)
        if not verify:
            return samples
        try:
            self._check(window, samples, first)
        except DataError:
            if not self._refetch_if_corrupt(descriptor):
                raise
            window = self._read(starts[first], starts[stop])
            samples = self._cut(window, first, stop)
            self._check(window, samples, first)
        return samples

    def _tail(self, size: int) -> bytes:
        begin = self._layout.starts[-1]
        return self._read(begin, begin + size + 1)

    def _members(self, *, verify: bool) -> Iterator[Sample]:
        """Yield the samples of an adopted tar: the data members, and labels from the index as members `cls`."""
        layout, num = self._layout, len(self)
        for start in range(0, num, ADOPTED_ROWS):
            rows = np.arange(start, min(start + ADOPTED_ROWS, num))
            for row, data in zip(rows.tolist(), self._read_members(rows, verify=verify), strict=True):
                members, label = {layout.data_ext[row]: data}, layout.classes[row]
                yield Sample(layout.keys[row], members if label is None else {"cls": label, **members}, layout.labels[row])

    def verify(self, look: Callable[[Sample], object] = lambda sample: None) -> None:
        """Read everything (tar, index, quarantine) and compare it with the manifest; DataError names what is damaged.

        `look` is called with each sample that is read.
        """
        for sample in self.iterate():
            look(sample)
        self._tars.check(self.shard.tar, verify=True)
        self._store.check(self.shard.index, verify=True)  # in the store itself: what was read above may be a cached copy
        _ = self.quarantine  # raises if it is damaged or has other rows

    def _read(self, begin: np.int64, end: np.int64) -> bytes:
        """Return the bytes [begin, end) of the tar, fewer where the file ends early: the caller checks the length."""
        position, pieces = int(begin), list[bytes]()
        while position < end:
            piece = self._again(functools.partial(_pread, int(end) - position, position))
            if not piece:
                break
            pieces.append(piece)
            position += len(piece)
        return b"".join(pieces)

    def _cut(self, window: bytes, first: int, stop: int) -> list[Sample]:
        layout, base = self._layout, int(self._layout.starts[first])
        rows = zip(layout.keys[first:stop], layout.members[first:stop], layout.labels[first:stop], strict=True)
        return [Sample(key, {ext: window[begin - base : end - base] for ext, begin, end in members}, label) for key, members, label in rows]

    def _check(self, window: bytes, samples: list[Sample], first: int) -> None:
        """Raise DataError, which names a damaged sample, unless all hashes, labels, headers and paddings are what the index implies.

        `window` starts at the first header of the samples (row `first` and on), which were cut from it.
        """
        layout, last = self._layout, first + len(samples)
        rows = np.arange(first, last)
        size = len(window)  # a file that ends early has less than the layout says
        begins, ends = (places[rows] - layout.starts[first] for places in (layout.data_begins, layout.data_ends))
        self._check_members(BytesColumn(np.frombuffer(window, np.uint8), begins.clip(max=size), ends.clip(max=size)), rows)
        classes = [sample.members.get("cls") for sample in samples]
        if classes != layout.classes[first:last]:
            raise self._damaged(first + next(at for at, found in enumerate(classes) if found != layout.classes[first + at]))
        if len(window) < layout.starts[last] - layout.starts[first]:  # all contents are complete: the last padding is truncated
            raise self._damaged(last - 1)
        members_of = slice(layout.firsts[first], layout.firsts[last])
        begins, ends = (places[members_of] - layout.starts[first] for places in (layout.begins, layout.ends))
        wrong = different_headers(np.frombuffer(window, np.uint8), layout.names[members_of], begins, ends)
        if len(wrong):
            raise self._damaged(int(np.searchsorted(layout.firsts, members_of.start + wrong[0], side="right")) - 1)

    def _check_members(self, members: BytesColumn, rows: NDArray[np.int64]) -> None:
        """Raise DataError, which names the first of these rows whose bytes do not have the sha256 of the index."""
        wrong = (sha256s(members) != self._layout.digests[rows]).any(axis=1)
        if wrong.any():
            raise self._damaged(int(rows[np.argmax(wrong)]))

    def _changed_by_owner(self) -> DataError | None:
        """Return the error about an adopted tar of which nothing is live in the newest generation; None if it should be as it was."""
        newest = newest_number(self._store, STEM) if self._adopted and self.shard.live else None
        if newest is None:
            return None
        try:
            there = read_manifest(self._store, newest).splits.get(self.shard.split, ())
        except DataError:  # of that manifest, which is not the one that is read
            return None
        if not any(shard.stem == self.shard.stem and not shard.live for shard in there):
            return None
        return DataError(
            f"{self._name} was changed in place, or removed, by its owner since it was indexed: generation {newest} of {self._store.url} "
            "follows it; use that one, or restore the tar"
        )

    def _damaged(self, row: int) -> DataError:
        return self._changed_by_owner() or DataError(f"{self._name} is damaged at sample {self._layout.keys[row]!r} (row {row}): {REMEDY}")


def _pread(size: int, position: int, descriptor: int) -> bytes:
    return os.pread(descriptor, size, position)
