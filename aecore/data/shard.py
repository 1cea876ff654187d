"""Write one shard in one pass: read, check, pack, hash, index; commit tar, index, quarantine and last the record.

The tar is what `webdataset.TarWriter(mtime=0)` writes for the same samples. A sample that cannot be read or is damaged goes to the
quarantine with a reason and leaves a hole in the ordinals; an error of the output store ends the shard. If no sample of a shard is
good there is no tar and no index, only the quarantine and a record of 0 rows. Memory stays at a few MiB plus the index.
"""

import errno
import hashlib
import logging
import os
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from aecore.data.convert import Header, prepare
from aecore.data.image import BadSample
from aecore.data.index import INDEX_SCHEMA, MEMBERS, QUARANTINE_SCHEMA, content_sha256, make_table, read_table, table_bytes
from aecore.data.shard_reader import ShardReader
from aecore.data.tar import BLOCK, end_of_archive, member
from aecore.data.tasks import ShardTask
from aecore.errors import StoreError
from aecore.generations import PartRecord, read_record, write_record
from aecore.store import AlreadyExists, FileRef, Store

if TYPE_CHECKING:
    from aecore.data.sources import Source

__all__ = ["ShardReader", "write_shard"]

CHUNK_BYTES = 4 << 20
_OURS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # not the sample's fault
_log = logging.getLogger(__name__)


def write_shard(store: Store, task: ShardTask, source: "Source") -> PartRecord:
    """Write and commit one shard, or return its record if it is there already (a rerun).

    Raises StoreError if the output cannot be written; never for a bad sample (see the record's `quarantined`).
    """
    known = read_record(store, task.stem)
    if known is not None:
        return known
    started = time.perf_counter()
    pack = _Pack(task)
    files: list[FileRef] = []
    detail: dict[str, Any] = {}
    with store.stage() as staged:
        pack.write(staged, source)
        packed = time.perf_counter()
        if pack.rows:
            tar = store.put_staged(f"shards/{task.stem}.tar", staged, role="tar", sha256=pack.digest.hexdigest())
            index = pack.index()
            metadata = {"format": 1, "split": task.split, "stem": task.stem, "tar_sha256": tar.sha256}
            files = [tar, _put_table(store, f"shards/{task.stem}.parquet", index, metadata, "index")]
            detail = {"content_sha256": content_sha256(index), **pack.counts()}
    if pack.bad:
        name, metadata = f"quarantine/{task.stem}.parquet", {"format": 1, "split": task.split, "stem": task.stem}
        files.append(_put_table(store, name, pack.quarantine(), metadata, "quarantine"))
    detail |= {"split": task.split, "samples": len(pack.rows), "planned": len(task), "quarantined": len(pack.bad)}
    detail |= {"first_ordinal": int(task.ordinals[0]) if len(task) else 0, "reasons": dict(Counter(bad[2] for bad in pack.bad))}
    ended = time.perf_counter()
    timings = {"pack_s": packed - started, "commit_s": ended - packed}
    _log.info("shard %s: %d samples, %d quarantined, %.2f s", task.stem, len(pack.rows), len(pack.bad), ended - started)
    return write_record(store, PartRecord(task.stem, tuple(files), len(pack.rows), len(pack.bad), detail, timings))


def _put_table(store: Store, name: str, table: pa.Table, metadata: dict[str, Any], role: str) -> FileRef:
    """Commit a table; an earlier attempt's file of the same rows (another Parquet version wrote other bytes) is taken as it is."""
    try:
        return store.put(name, table_bytes(table, metadata), role=role)
    except AlreadyExists:
        data = store.read(name)
        if content_sha256(read_table(data, f"{store.url}/{name}")) != content_sha256(table):
            raise
        return FileRef(name, len(data), hashlib.sha256(data).hexdigest())


class _Pack:
    """The shard being written: rows of the index, rows of the quarantine, hash and size of the tar so far."""

    def __init__(self, task: ShardTask) -> None:
        self.task = task
        self.digest = hashlib.sha256()
        self.size = 0
        self.rows: list[tuple[int, Header, str, int]] = []  # position in the task, header, sha256, size of the data member
        self.bad: list[tuple[int, str, str, str, str | None]] = []  # position, stage, reason, message, sha256
        self.labels: list[int] | None = None if task.labels is None else task.labels.tolist()

    def write(self, path: Path, source: "Source") -> None:
        """Write the whole tar to `path`."""
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except OSError as error:
            raise StoreError(f"cannot write {path}: {error.strerror}") from error
        try:
            position = 0
            while position < len(self.task):
                parts: list[bytes] = []
                position = self._fill(parts, position, source)
                self._flush(descriptor, parts, path)
            self._flush(descriptor, [end_of_archive(self.size)], path)
        finally:
            os.close(descriptor)

    def _fill(self, parts: list[bytes], first: int, source: "Source") -> int:
        """Append members from position `first` on until a chunk is full; return the next position."""
        read, shards, labels, sha256 = source.read, self.task.shards, self.labels, hashlib.sha256
        full = CHUNK_BYTES
        for position in range(first, len(self.task)):
            data: bytes | None = None
            try:
                ext, data = read(self.task.sources[position])
                header, data = prepare(data, ext, shards)
            except BadSample as bad:
                self._reject(position, "check", bad.reason, bad.message, data)
                continue
            except OSError as error:
                if error.errno in _OURS:
                    raise
                self._reject(position, "read", "unreadable", error.strerror or str(error), None)
                continue
            ext, size, name = header.ext, len(data), self.task.keys[position]
            self.rows.append((position, header, sha256(data).hexdigest(), size))
            packed = member(f"{name}.{ext}".encode(), data)
            if labels is None or labels[position] < 0:
                parts += packed
            elif ext < "cls":
                parts += packed + member(f"{name}.cls".encode(), b"%d" % labels[position])
            else:
                parts += member(f"{name}.cls".encode(), b"%d" % labels[position]) + packed
            full -= size + 1024
            if full < 0:
                return position + 1
        return len(self.task)

    def _flush(self, descriptor: int, parts: list[bytes], path: Path) -> None:
        chunk = b"".join(parts)
        self.digest.update(chunk)
        self.size += len(chunk)
        view = memoryview(chunk)
        try:
            while view:
                view = view[os.write(descriptor, view) :]
        except OSError as error:
            raise StoreError(f"cannot write {path}: {error.strerror}") from error

    def _reject(self, position: int, stage: str, reason: str, message: str, data: bytes | None) -> None:
        self.bad.append((position, stage, reason, message, None if data is None else hashlib.sha256(data).hexdigest()))

    def index(self) -> pa.Table:
        """Return the index of the good samples."""
        task = self.task
        positions, headers, hashes, sizes = (list(column) for column in zip(*self.rows, strict=True))
        rows = np.array(positions, np.int64)
        labels = None if task.labels is None else task.labels[rows]
        columns: dict[str, Any] = {  # any: lists and arrays
            "key": _take(task.keys, positions),
            "ordinal": task.ordinals[rows],
            "label": None if labels is None else pa.array(labels, pa.int32(), mask=labels < 0),
            "label_name": _take(task.label_names, positions),
            "source": _take(task.sources, positions),
            "sha256": hashes,
            "members": _members([header.ext for header in headers], np.array(sizes, np.int64), labels),
            "width": [header.width for header in headers],
            "height": [header.height for header in headers],
            "mode": [header.mode for header in headers],
            "group": _take(task.groups, positions),
        }
        columns |= {name: values[rows] for name, values in task.columns.items()}
        return make_table(INDEX_SCHEMA, columns, len(rows))

    def counts(self) -> dict[str, Any]:
        """Return what the manifest sums up: bytes of the tar, forms, extensions, samples per class name (or id)."""
        headers = {id(header): header for _, header, _, _ in self.rows}
        forms: Counter[str] = Counter()
        extensions: Counter[str] = Counter()
        for number, count in Counter(id(header) for _, header, _, _ in self.rows).items():
            forms[headers[number].form] += count
            extensions[headers[number].ext] += count
        names = self.task.label_names or self.labels
        classes = Counter() if names is None else Counter(str(names[row[0]]) for row in self.rows)
        return {"bytes": self.size, "shapes": dict(forms), "extensions": dict(extensions), "classes": dict(classes)}

    def quarantine(self) -> pa.Table:
        """Return the table of the bad samples."""
        positions, stages, reasons, messages, hashes = (list(column) for column in zip(*self.bad, strict=True))
        columns = {
            "source": _take(self.task.sources, positions),
            "key": _take(self.task.keys, positions),
            "ordinal": self.task.ordinals[positions],
            "split": [self.task.split] * len(positions),
            "stage": stages,
            "reason": reasons,
            "message": messages,
            "sha256": hashes,
        }
        return make_table(QUARANTINE_SCHEMA, columns, len(positions))


def _take(values: list[str] | None, positions: list[int]) -> list[str] | None:
    return None if values is None else [values[position] for position in positions]


def _members(extensions: list[str], sizes: NDArray[np.int64], labels: NDArray[np.int32] | None) -> Any:  # any: a pyarrow list array
    """Return ext, offset and size of every member, in the order and at the places where `_Pack` wrote them."""
    num = len(sizes)
    ext = np.array([extensions, ["cls"] * num])  # [2, N]: data member, class member
    size = np.stack([sizes, np.zeros(num, np.int64)])
    if labels is not None:
        size[1] = np.where(labels < 0, 0, np.char.str_len(labels.astype(str)))
    stored = BLOCK + size + -size % BLOCK
    stored[1] *= size[1] > 0
    swap = ext[0] > "cls"  # members of a sample stand by extension
    for values in (ext, size, stored):
        values[:, swap] = values[::-1, swap]
    present = stored.T.ravel() > 0
    ends = np.cumsum(stored.T.ravel())
    offsets = (ends - stored.T.ravel() + BLOCK)[present]
    flat = pa.StructArray.from_arrays(
        [pa.array(ext.T.ravel()[present].tolist(), pa.string()), pa.array(offsets), pa.array(size.T.ravel()[present])],
        fields=list(MEMBERS.value_type),
    )
    counts = (stored > 0).sum(axis=0)
    return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32()), flat).cast(MEMBERS)
