"""The tar of one shard and the rows of its index, in one pass over the samples: read, check, hash, pack.

The order is the task's; a sample that cannot be read or is damaged is left out and kept as a row for the quarantine. The loop below is
where all the time goes (about 6 us for a 28x28 PNG with a label), so it works on plain lists; beside it one thread hashes finished chunks
of 1 MiB, another writes them. Memory: two such chunks with their samples, and the index.
"""

import errno
import hashlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from aecore.beside import Beside
from aecore.data.convert import Header, prepare
from aecore.data.image import BadSample
from aecore.data.index import INDEX_SCHEMA, MEMBERS, QUARANTINE_SCHEMA, make_table
from aecore.data.record import DATA_EXTENSIONS
from aecore.data.sources import Source, reader
from aecore.data.tar import BLOCK, Packer
from aecore.data.tasks import ShardTask
from aecore.disk import DiskWriter

T = TypeVar("T")
Read = Callable[[str], tuple[str, bytes]]  # a source to its extension and bytes
CHUNK_BYTES = 1 << 20
_OURS = frozenset(  # not the sample's fault: no memory or room here, or the file system it lies on went away
    {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EROFS}
    | {errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ESHUTDOWN, errno.EHOSTDOWN, errno.EREMOTEIO, errno.EINTR}
)
_POWERS = 10 ** np.arange(1, 10)  # a class id has one digit more than the powers up to it
_SUFFIXES = {ext: f".{ext}".encode() for ext in DATA_EXTENSIONS}


class Pack:
    """The shard being written: good samples by column, bad samples by row, hash and size of the tar so far."""

    def __init__(self, task: ShardTask) -> None:
        self.task = task
        self.digest = hashlib.sha256()
        self.size = 0
        self.positions: list[int] = []  # of the good samples in the task; with their headers' numbers, sha256 and sizes
        self.headers: dict[Header, int] = {}  # and their numbers: a data set has few different ones
        self.codes: list[int] = []
        self.hashes: list[str] = []
        self.sizes: list[int] = []
        self.bad: list[tuple[int, str, str, str, str | None]] = []  # position, stage, reason, message, sha256
        self.labels: list[int] | None = None if task.labels is None else task.labels.tolist()
        digits = {label: b"%d" % label if label >= 0 else None for label in set(self.labels or ())}
        self.digits = None if self.labels is None else [digits[label] for label in self.labels]  # contents of the `.cls` members

    def write(self, path: Path, source: Source) -> None:
        """Write the whole tar to `path`."""
        packed, read = Packer(), reader(source, self.task.sources)
        position = 0
        with DiskWriter(path) as file:
            with Beside(self._hash) as hashing, Beside(file.pages) as writing:
                while position < len(self.task):
                    names, contents = list[bytes](), list[bytes]()
                    position = self._fill(names, contents, position, read)
                    pages = packed(names, contents)
                    hashing(pages)
                    writing(pages)
            end = packed.end()
            self._hash(end)
            file.end(end)

    def scan(self, source: "Source") -> None:
        """Read, check and hash all samples without writing them."""
        read, position = reader(source, self.task.sources), 0
        while position < len(self.task):
            position = self._fill([], [], position, read)

    def _fill(self, names: list[bytes], contents: list[bytes], first: int, read: Read) -> int:
        """Append members from position `first` on until a chunk is full; return the next position."""
        keys, sources, shards, labels = self.task.keys, self.task.sources, self.task.shards, self.digits
        sha256, free = hashlib.sha256, CHUNK_BYTES
        add_position, add_code, add_hash, add_size = self.positions.append, self.codes.append, self.hashes.append, self.sizes.append
        last, code, headers = None, 0, self.headers
        for position in range(first, len(keys)):
            data: bytes | None = None
            try:
                ext, data = read(sources[position])
                header, data = prepare(data, ext, shards)
            except BadSample as bad:
                self._reject(position, "check", bad.reason, bad.message, data)
                continue
            except OSError as error:
                if error.errno in _OURS:
                    raise
                self._reject(position, "read", "unreadable", error.strerror or str(error), None)
                continue
            ext, size, key = header.ext, len(data), keys[position].encode()
            add_position(position)
            if header is not last:  # equal headers are mostly one object, and hashing it takes 0.2 us
                last, code = header, headers.setdefault(header, len(headers))
            add_code(code)
            add_hash(sha256(data).hexdigest())
            add_size(size)
            if labels is None or (label := labels[position]) is None:
                names.append(key + _SUFFIXES[ext])
                contents.append(data)
            elif ext > "cls":  # members of a sample stand by extension
                names += (key + b".cls", key + _SUFFIXES[ext])
                contents += (label, data)
            else:
                names += (key + _SUFFIXES[ext], key + b".cls")
                contents += (data, label)
            free -= size + 2 * BLOCK
            if free < 0:
                return position + 1
        return len(keys)

    def _hash(self, data: bytes | memoryview) -> None:
        self.digest.update(data)
        self.size += len(data)

    def _reject(self, position: int, stage: str, reason: str, message: str, data: bytes | None) -> None:
        self.bad.append((position, stage, reason, message, None if data is None else hashlib.sha256(data).hexdigest()))

    def index(self) -> pa.Table:
        """Return the index of the good samples."""
        task, positions = self.task, self.positions
        rows, codes = np.array(positions, np.int64), np.array(self.codes, np.int64)
        at: Any = pa.array(codes)  # any: pyarrow's stubs take it for booleans
        labels = None if task.labels is None else task.labels[rows]
        headers = list(self.headers)
        columns: dict[str, Any] = {  # any: lists and arrays
            "key": _take(task.keys, positions),
            "ordinal": task.ordinals[rows],
            "label": None if labels is None else pa.array(labels, pa.int32(), mask=labels < 0),
            "label_name": _take(task.label_names, positions),
            "source": _take(task.sources, positions),
            "sha256": self.hashes,
            "members": _members([header.ext for header in headers], codes, np.array(self.sizes, np.int64), labels),
            "width": pa.array([header.width for header in headers], pa.int32()).take(at),
            "height": pa.array([header.height for header in headers], pa.int32()).take(at),
            "mode": pa.array([header.mode for header in headers], pa.string()).take(at),
            "group": _take(task.groups, positions),
            "length": pa.array([header.length for header in headers], pa.int32()).take(at),
        }
        columns |= {name: values[rows] for name, values in task.columns.items()}
        return make_table(INDEX_SCHEMA, columns, len(rows))

    def counts(self) -> dict[str, Any]:
        """Return what the manifest sums up: bytes of the tar, forms, extensions, samples per class name (or id), bags if there are any."""
        forms: Counter[str] = Counter()
        extensions: Counter[str] = Counter()
        for header, count in zip(self.headers, np.bincount(self.codes).tolist(), strict=True):
            forms[header.form] += count
            extensions[header.ext] += count
        names = _take(self.task.label_names, self.positions) or map(str, _take(self.labels, self.positions) or ())
        groups = _take(self.task.groups, self.positions)
        bags = {} if groups is None else {"groups": len(set(groups))}
        return {"bytes": self.size, "shapes": dict(forms), "extensions": dict(extensions), "classes": dict(Counter(names)), **bags}

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


def _take(values: list[T] | None, positions: list[int]) -> list[T] | None:
    if values is None or len(values) == len(positions):  # nearly always all of them
        return values
    return [values[position] for position in positions]


def _members(exts: list[str], codes: NDArray[np.int64], sizes: NDArray[np.int64], labels: NDArray[np.int32] | None) -> Any:
    """Return a list array of ext, offset and size of every member, in the order and at the places where `Pack` wrote them.

    `exts[codes]` are the extensions of the data members.
    """
    names = sorted({*exts, "cls"})  # members of a sample stand by extension, so codes sort them
    data = np.array([names.index(ext) for ext in exts])[codes]
    codes = np.stack([data, np.full_like(data, names.index("cls"))], axis=1)  # [N, 2]: data member, class member
    present = np.ones(codes.shape, bool)
    present[:, 1] = False if labels is None else labels >= 0
    lengths = np.stack([sizes, np.zeros_like(sizes) if labels is None else np.searchsorted(_POWERS, labels, side="right") + 1], axis=1)
    order = np.argsort(codes, axis=1)
    codes, present, lengths = (np.take_along_axis(values, order, axis=1) for values in (codes, present, lengths))
    counts = present.sum(axis=1)
    codes, lengths = codes[present], lengths[present]
    ends = np.cumsum(BLOCK + lengths + -lengths % BLOCK)
    offsets = ends - lengths - -lengths % BLOCK
    ext = pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32()), pa.array(names)).cast(pa.string())
    flat = pa.StructArray.from_arrays([ext, pa.array(offsets), pa.array(lengths)], fields=list(MEMBERS.value_type))
    return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32()), flat).cast(MEMBERS)
