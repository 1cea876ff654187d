"""The tar of one shard and the rows of its index, in one pass over the samples: read, check, hash, pack.

Samples keep the order of the task; a damaged one is skipped and becomes a row of the quarantine, and so does, unread, one that was listed
with more bytes than a member may have (`MAX_MEMBER_BYTES`). A read error ends the shard (StoreError): only complete bytes are judged. If
the source is files and a block holds only plain images, nothing is done sample by sample in Python (`_write_fast`). Everything else goes
through `_write_checked`, which finds the reason of a damage; one background thread hashes the tar and the samples, another writes.
Memory: a few blocks of 2 MiB, and the index.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from aecore.data.format.bad_sample import BadSample
from aecore.data.format.image import image_header
from aecore.data.format.index import INDEX_SCHEMA, MEMBERS, QUARANTINE_SCHEMA, SOURCE_SHA256, make_table
from aecore.data.format.limits import exclusive_cumsum
from aecore.data.format.record import Header
from aecore.data.format.tar import BLOCK, MAX_MEMBER_BYTES, PAGE, Samples, TarPacker
from aecore.data.sources import Source, bound_pixels, read_states, reader, take
from aecore.data.write.fast_path import PlainFiles, plain_files
from aecore.data.write.spec import ShardTask
from aecore.errors import ConfigError
from aecore.native.bytes_column import BytesColumn
from aecore.native.loops import StreamHash, sha256s
from aecore.native.tar_builder import TarBuilder
from aecore.native.texts import Texts
from aecore.store._direct import DiskWriter
from aecore.threads import BackgroundCall

Int64s = NDArray[np.int64]
Read = Callable[[str], tuple[str, bytes]]  # a source to its extension and bytes
CHUNK_BYTES, IN_VAIN = 1 << 20, 4  # after this many consecutive blocks that are not plain, the fast path is no longer tried
_MOST_TEXT = 2**31 - 1  # bytes of all texts in a column of an index
_POWERS = 10 ** np.arange(1, 10)  # a class id has one digit more than the powers up to it


class ShardWriter:
    """The shard being written: good samples by column, bad samples by row, hash and size of the tar so far."""

    def __init__(self, task: ShardTask) -> None:
        self.task = task
        self.hash = StreamHash()  # of the tar
        self.headers: dict[Header, int] = {}  # header -> code: a dataset has few different ones
        self.bad: list[tuple[int, str, str, str, str | None]] = []  # position, stage, reason, message, sha256
        self.ranged = Counter[str]()  # by `shards.value_range`: see `prepare`
        self._good: list[tuple[Int64s, Int64s, Int64s]] = []  # positions in the task, codes of the headers, sizes
        self._digests: list[NDArray[np.uint8]] = []
        self._known: dict[tuple[bytes, str], Header] = {}  # by facts and extension
        self._changed: list[int] = []  # positions of samples whose states, after they were read, are not the listed ones
        self._source_digests: list[bytes] = []  # of samples that may be converted
        self._unread: dict[int, tuple[str, str, str]] = {}  # position -> stage, reason and message of samples that are bad unread

    def write(self, path: Path, source: Source) -> None:
        """Write the whole tar to `path`."""
        bound_pixels(source, self.task.shards.max_pixels)
        packer, files, most = TarPacker(), plain_files(source, self.task), len(self.task)
        read = reader(source, self._to_read())
        bounds = [0, len(self.task)] if files is None else files.blocks.tolist()
        with DiskWriter(path) as file:
            block, num_blocks, in_vain = 0, len(bounds) - 1, 0
            while block < num_blocks:
                taken = 0 if files is None or in_vain == IN_VAIN else self._write_fast(files, block, most, packer, file)
                block, in_vain = block + taken, 0 if taken else min(in_vain + 1, IN_VAIN)
                if taken < most and block < num_blocks:  # this one is not plain
                    self._write_checked(bounds[block], bounds[block + 1], source, read, packer, file)
                    block += 1
                most = max(1, 2 * taken)  # what was read ahead of an unusual block is read again
            end = packer.end()
            self.hash.append(end)
            file.end(end)

    def scan(self, source: Source) -> None:
        """Read, check and hash all samples without writing them."""
        position, read = 0, reader(source, self._to_read())
        while position < len(self.task):
            samples, position = self._checked(position, len(self.task), source, read)
            self._digests.append(sha256s(samples.contents))

    def _to_read(self) -> Sequence[str]:
        """Return the samples to read: not those that the source said to be unusable, nor those of more bytes than a member may have."""
        sources, sizes = self.task.sources, self.task.sizes
        for position in np.flatnonzero(sizes > MAX_MEMBER_BYTES).tolist():
            text = f"a sample of {sizes[position]} bytes, at most {MAX_MEMBER_BYTES} are read as one: cut it into smaller ones"
            self._unread[position] = "check", "too_large", text
        for position, why in enumerate(self.task.unusable or ()):
            if why is not None:
                self._unread[position] = "list", why.reason, why.message
        return [name for position, name in enumerate(sources) if position not in self._unread] if self._unread else sources

    def _write_checked(self, first: int, stop: int, source: Source, read: Read, packer: TarPacker, file: DiskWriter) -> None:
        """Write the samples [first, stop) one by one: read, check, pack; hash and write in background threads."""
        with BackgroundCall(self._hash) as hashing, BackgroundCall(file.pages) as writing:
            while first < stop:
                samples, first = self._checked(first, stop, source, read)
                pages = packer(samples)
                hashing(pages, samples)
                writing(pages)

    def _hash(self, tar: memoryview, samples: Samples) -> None:
        self._digests.append(self.hash.update(tar, samples.contents))

    def _write_fast(self, files: PlainFiles, block: int, most: int, packer: TarPacker, file: DiskWriter) -> int:
        """Write blocks of plain images from their files, from this block up to one that is not plain; return how many."""
        first = int(files.blocks[block])
        with files.builder(block, most, packer, self.hash) as builder:
            if builder is None:
                return 0
            while (rows := builder.next_block()) is not None:
                headers = self._headers_of(builder, rows, files.exts_of(first + rows.start, first + rows.stop))
                if headers is None:
                    break
                builder.submit()
                codes = np.array([self.headers.setdefault(header, len(self.headers)) for header in headers], np.int64)
                count, sizes = rows.stop - rows.start, builder.files.ends[rows] - builder.files.begins[rows]
                self._good.append((np.arange(first + rows.start, first + rows.stop), np.broadcast_to(codes, count), sizes))
                if builder.submitted - builder.released > 2:  # two more are being hashed
                    file.pages(builder.finished_pages())
                    builder.release()
            while builder.released < builder.submitted:
                file.pages(builder.finished_pages())
                builder.release()
        done = builder.files.blocks[builder.submitted]
        self._changed += (first + np.flatnonzero(builder.changed[:done])).tolist()
        self._digests.append(builder.digests[:done])
        packer.size = int(builder.files.starts[done])
        packer.rest = builder.tail[: packer.size % PAGE].tobytes()
        return builder.submitted

    def _headers_of(self, builder: TarBuilder, rows: slice, exts: list[str]) -> Sequence[Header] | None:
        """Return the header of each of these images, or the single header of all; None if one needs `prepare`."""
        facts = builder.facts[rows].view(f"V{builder.facts.itemsize}")
        different = slice(0, 1) if (facts == facts[0]).all() and len(set(exts)) == 1 else slice(None)
        keys = list(zip([fact.tobytes() for fact in facts[different]], exts[different], strict=True))
        try:
            for row, key in enumerate(keys, rows.start):
                if key not in self._known:
                    shards = self.task.shards
                    self._known[key] = image_header(builder.content(row), key[1], pixels=shards.pixels, max_pixels=shards.max_pixels)
        except BadSample:
            return None
        headers = [self._known[key] for key in keys]
        return headers if all(header.ext == ext for header, (_, ext) in zip(headers, keys, strict=True)) else None

    def _checked(self, first: int, last: int, source: Source, read: Read) -> tuple[Samples, int]:
        """Return the good samples from position `first` on, up to `last` or until a chunk is full, and the next position."""
        from aecore.data.write.convert import prepare  # and all decoders: plain images in files need none

        free = CHUNK_BYTES
        sources, shards = self._names[1], self.task.shards
        keys, labels = self._names[0], self.task.labels
        frames: Any = getattr(self.task.source, "frames", "first")  # any: a Literal; sources of arrays have none
        positions, codes, exts, contents = list[int](), list[int](), list[str](), list[bytes]()
        for position in range(first, last):
            if position in self._unread:
                self.bad.append((position, *self._unread[position], None))
                continue
            data: bytes | None = None
            try:
                ext, data = read(sources[position])
                given = data
                header, data = prepare(data, ext, shards, frames, self.ranged)
            except BadSample as bad:
                digest = None if data is None else hashlib.sha256(data).hexdigest()  # None: a sample that has no bytes of its own
                self.bad.append((position, "check", bad.reason, bad.message, digest))
                continue
            except ConfigError as error:
                raise ConfigError(f"{sources[position]!r}: {error}") from error
            except MemoryError as error:
                raise MemoryError(f"for {sources[position]!r} of {self.task.sizes[position]} bytes") from error
            positions.append(position)
            codes.append(self.headers.setdefault(header, len(self.headers)))
            exts.append(header.ext)
            contents.append(data)
            if self._hashes_source:
                self._source_digests.append(hashlib.sha256(given).digest())
            free -= len(data) + 2 * BLOCK
            if free < 0:
                last = position + 1
                break
        self._compare_states(source, [position for position in range(first, last) if position not in self._unread])
        column = BytesColumn.from_bytes(contents)
        self._good.append((np.array(positions, np.int64), np.array(codes, np.int64), column.sizes))
        good = [keys[position] for position in positions]
        return Samples(good, exts, column, None if labels is None else labels[positions]), last

    @property
    def _hashes_source(self) -> bool:
        return self.task.shards.converts and self.task.source_hashes

    @cached_property
    def _names(self) -> tuple[list[str], list[str]]:
        """Keys and sources of samples that are read one by one."""
        return Texts.of(self.task.keys).tolist(), Texts.of(self.task.sources).tolist()

    def _compare_states(self, source: Source, positions: list[int]) -> None:
        """Compare the states of samples that were just read with the listed ones."""
        listed = self.task.states
        if listed is not None:
            at = np.array(positions, np.int64)
            states = read_states(source, [*take(self.task.sources, at)])
            changed = zip(positions, states, take(listed, at), strict=True)
            self._changed += [position for position, state, before in changed if state != before]

    def unsettled(self) -> list[int]:
        """Return the ordinals of the samples that may have been read in another state than the one that a later listing shows, sorted."""
        unknown = [] if self.task.states is None else Texts.of(self.task.states).missing()
        return sorted(self.task.ordinals[sorted({*self._changed, *unknown})].tolist())

    @cached_property
    def good(self) -> tuple[Int64s, Int64s, Int64s]:
        """Positions of the good samples in the task, codes of their headers, their sizes; complete when all are read."""
        columns = zip(*self._good, strict=True) if self._good else [()] * 3
        positions, codes, sizes = (np.concatenate([np.zeros(0, np.int64), *column]) for column in columns)
        return positions, codes, sizes

    def digests(self) -> list[str]:
        """Return the sha256 of each good sample, as it is stored."""
        return [bytes(row).hex() for digests in self._digests for row in digests]

    def index(self) -> pa.Table:
        """Return the index of the good samples."""
        task, (rows, codes, sizes) = self.task, self.good
        at: Any = pa.array(codes)  # any: pyarrow's stubs take it for booleans
        labels = None if task.labels is None else task.labels[rows]
        headers = list(self.headers)
        columns: dict[str, Any] = {  # any: lists and arrays
            "key": _select(task.keys, rows),
            "ordinal": task.ordinals[rows],
            "label": None if labels is None else pa.array(labels, pa.int32(), mask=labels < 0),
            "label_name": _select(task.label_names, rows),
            "source": _select(task.sources, rows),
            "sha256": _split_text(np.concatenate(self._digests).tobytes().hex(), np.full(len(rows), 64)),
            "members": members_column([header.ext for header in headers], codes, sizes, labels),
            "width": pa.array([header.width for header in headers], pa.int32()).take(at),
            "height": pa.array([header.height for header in headers], pa.int32()).take(at),
            "mode": pa.array([header.mode for header in headers], pa.string()).take(at),
            "group": _select(task.groups, rows),
            "length": pa.array([header.length for header in headers], pa.int32()).take(at),
        }
        if self._hashes_source:
            columns[SOURCE_SHA256] = _split_text(b"".join(self._source_digests).hex(), np.full(len(rows), 64))
        columns |= {name: values.take(rows) for name, values in task.columns.items()}
        return make_table(INDEX_SCHEMA, columns, len(rows))

    def counts(self) -> dict[str, Any]:
        """Return the counts for the manifest: bytes of the tar, formats, extensions, samples per class name (or id), and bags."""
        formats: Counter[str] = Counter()
        extensions: Counter[str] = Counter()
        rows, codes, _ = self.good
        for header, count in zip(self.headers, np.bincount(codes).tolist(), strict=True):
            formats[header.format_text] += count
            extensions[header.ext] += count
        labels, names = self.task.labels, _select(self.task.label_names, rows)
        if names is None:
            classes = Counter(map(str, () if labels is None else labels[rows].tolist()))
        else:
            numbers, different = names.codes()
            classes = Counter(dict(zip(different, np.bincount(numbers, minlength=len(different)).tolist(), strict=True)))
        groups = _select(self.task.groups, rows)
        bags = {} if groups is None else {"groups": len(groups.distinct())}
        several = sum(count for header, count in zip(self.headers, np.bincount(codes).tolist(), strict=True) if header.frames > 1)
        return {
            "bytes": self.hash.size,
            "shapes": dict(formats),
            "extensions": dict(extensions),
            "classes": dict(classes),
            **bags,
        } | {name: value for name, value in (("first_frames", several), ("value_range", dict(self.ranged))) if value}

    def quarantine(self) -> pa.Table:
        """Return the table of the bad samples."""
        positions, stages, reasons, messages, hashes = (list(column) for column in zip(*self.bad, strict=True))
        rows = np.array(positions, np.int64)
        columns = {
            "source": _select(self.task.sources, rows),
            "key": _select(self.task.keys, rows),
            "ordinal": self.task.ordinals[positions],
            "split": [self.task.split] * len(positions),
            "stage": stages,
            "reason": reasons,
            "message": messages,
            "sha256": hashes,
        }
        return make_table(QUARANTINE_SCHEMA, columns, len(positions))


def _split_text(joined: str, lengths: Int64s) -> Any:  # any: pyarrow's stubs do not give the type
    """Return the consecutive strings of these lengths in `joined`, which is ASCII, as an array."""
    offsets = exclusive_cumsum(lengths)
    if offsets[-1] > _MOST_TEXT:
        raise ConfigError(f"{len(lengths)} samples are too many for the index of one shard: lower shards.max_samples")
    return pa.StringArray.from_buffers(len(lengths), pa.py_buffer(offsets.astype(np.int32).data), pa.py_buffer(joined.encode()))


def _select(values: Sequence[str] | None, rows: Int64s) -> Texts | None:
    return None if values is None else Texts.of(values) if len(values) == len(rows) else Texts.of(values).take(rows)  # nearly always all


def members_column(exts: list[str], codes: NDArray[np.int64], sizes: NDArray[np.int64], labels: NDArray[np.int32] | None) -> Any:
    """Return a list array of ext, offset and size of every member, in the order and at the offsets that `ShardWriter` wrote.

    `exts[codes]` are the extensions of the data members.
    """
    names = sorted({*exts, "cls"})  # members of a sample are sorted by extension, so codes sort them
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
