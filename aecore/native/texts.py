"""Many texts in Arrow, without a Python object for each: the columns of listings and plans.

A column is plain (offsets and bytes) or coded (a number each, and the different texts once). Texts that are no UTF-8, as names of files
may be, have lone surrogates in Python; in Arrow these have three bytes each, as with `surrogatepass`, so bytes sort as Python sorts
texts.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray

from aecore import native
from aecore.native.bytes_column import BytesColumn

pc: Any = pyarrow.compute  # any: pyarrow's stubs know no types of values
Arrow = Any  # any: as above
BATCH = 1 << 16  # texts that are Python objects at a time
_PIECE = 1 << 20  # texts of a chunk
_MOST_PREFIX = 127  # bytes, in blake2b.c


class Texts(Sequence[str]):
    """n texts, read-only; None where a value is missing (states that are not known). An index makes one `str`, a slice copies nothing."""

    __slots__ = ("_different", "arrow")
    arrow: Any  # any: pyarrow's stubs know no types of values
    __hash__ = None  # type: ignore[assignment]  # as of a list

    def __init__(self, arrow: Arrow) -> None:
        self.arrow = arrow if isinstance(arrow, pa.ChunkedArray) else pa.chunked_array([arrow])
        self._different: bool | None = None  # what `all_different` found

    @classmethod
    def of(cls, values: "Sequence[str | None] | Arrow") -> "Texts":
        """Return these texts in Arrow; TypeError, with the value as its argument, if one of them is no text."""
        if isinstance(values, Texts):
            return values
        if isinstance(values, pa.Array | pa.ChunkedArray):
            return cls(values)
        pieces = [_array(values[at : at + _PIECE]) for at in range(0, len(values), _PIECE)]
        return cls(pa.chunked_array(pieces, pa.string()))

    @classmethod
    def coded(cls, values: Sequence[str | None], codes: NDArray[Any]) -> "Texts":  # any: of any width
        """Return `values[codes]`."""
        known = {value: number for number, value in enumerate(dict.fromkeys(values))}
        if len(known) < len(values):
            codes = np.array([known[value] for value in values], np.int32)[codes]
        dictionary = _array(list(known))
        return cls(pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32()), dictionary))

    @property
    def is_coded(self) -> bool:
        """Whether each different text is there once."""
        return bool(pa.types.is_dictionary(self.arrow.type))

    def __len__(self) -> int:
        return len(self.arrow)

    @overload
    def __getitem__(self, row: int) -> str: ...

    @overload
    def __getitem__(self, row: slice) -> "Texts": ...

    def __getitem__(self, row: int | slice) -> "str | Texts":
        if isinstance(row, slice):
            start, stop, step = row.indices(len(self))
            return self._slice(start, max(0, stop - start)) if step == 1 else self.take(np.arange(start, stop, step))
        at = int(row) + (len(self) if row < 0 else 0)
        if not 0 <= at < len(self):
            raise IndexError(f"row {row} of {len(self)} texts")
        found: str = next(iter(self._slice(at, 1)))
        return found

    def _slice(self, start: int, count: int) -> "Texts":
        return Texts(self.arrow.slice(start, count))

    def __iter__(self) -> Iterator[Any]:  # any: str, or None where a value is missing
        for batch in self.batches():
            yield from _listed(batch)

    def __contains__(self, value: object) -> bool:
        return any(pc.any(pc.equal(batch, value)).as_py() for batch in self.batches()) if isinstance(value, str) else False

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(one == two for one, two in zip(self, other, strict=True))

    def __repr__(self) -> str:
        return repr(list(self)) if len(self) <= BATCH else f"<{len(self)} texts>"

    def __reduce__(self) -> tuple[Any, ...]:
        sink = pa.BufferOutputStream()  # of a slice only its own rows
        batch = pa.record_batch([self.arrow.combine_chunks() if self.arrow.num_chunks != 1 else self.arrow.chunk(0)], names=["texts"])
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
        return _restored, (sink.getvalue().to_pybytes(),)

    def tolist(self) -> list[str]:
        """Return the texts as a list."""
        return [text for batch in self.batches() for text in _listed(batch)]

    def slices(self) -> Iterator[list[str]]:
        """Yield lists of some of the texts, in order."""
        yield from map(_listed, self.batches())

    def batches(self) -> Iterator[Arrow]:
        """Yield plain arrays of some of the texts, in order."""
        for chunk in self.arrow.chunks:
            for start in range(0, len(chunk), BATCH):
                piece = chunk.slice(start, BATCH)
                yield piece.dictionary.take(piece.indices) if self.is_coded else piece

    def plain(self) -> list[Arrow]:
        """Return plain arrays of all texts, in order."""
        return [*self.batches()] if self.is_coded else self.arrow.chunks

    def take(self, rows: NDArray[np.int64]) -> "Texts":
        """Return the texts at these rows, in this order."""
        if len(rows) and rows[-1] - rows[0] == len(rows) - 1 and bool((np.diff(rows) == 1).all()):
            return self._slice(int(rows[0]), len(rows))
        return Texts(self.arrow.take(pa.array(rows, pa.int64())))

    def without(self, rows: Sequence[int] | NDArray[np.int64]) -> "Texts":
        """Return the texts, which are missing at these rows."""
        if not len(rows):
            return self
        missing = np.zeros(len(self), np.bool_)
        missing[np.asarray(rows)] = True
        if not self.is_coded:
            return Texts(pc.if_else(pa.array(missing), pa.scalar(None, pa.string()), self.arrow))
        (chunk,) = self.arrow.chunks
        missing |= chunk.indices.is_null().to_numpy(zero_copy_only=False)
        codes: Arrow = pa.array(chunk.indices.fill_null(0).to_numpy(), mask=missing)
        return Texts(pa.DictionaryArray.from_arrays(codes, chunk.dictionary))

    def codes(self) -> tuple[NDArray[np.int32], list[str]]:
        """Return a number for each text, and the different texts, in the order in which they come first."""
        encoded = self.arrow if self.is_coded else self.arrow.dictionary_encode()
        values = list[str](_listed(encoded.chunk(0).dictionary)) if encoded.num_chunks else []
        if not self.is_coded and encoded.num_chunks:  # all chunks have the dictionary of the last one, or a beginning of it
            values = _listed(encoded.chunk(encoded.num_chunks - 1).dictionary)
        codes = np.concatenate([np.zeros(0, np.int32), *(chunk.indices.to_numpy(zero_copy_only=False) for chunk in encoded.chunks)])
        if not self.is_coded:
            return codes, values
        first = np.full(len(values), len(codes), np.int64)
        first[codes[::-1]] = np.arange(len(codes) - 1, -1, -1)
        order = np.argsort(first, kind="stable")[: np.count_nonzero(first < len(codes))]
        places = np.zeros(len(values), np.int32)
        places[order] = np.arange(len(order), dtype=np.int32)
        return places[codes], [values[number] for number in order.tolist()]

    def distinct(self) -> list[str]:
        """Return the different texts, in the order in which they come first."""
        return self.codes()[1] if self.is_coded else _listed(pc.unique(self.arrow))

    def mapped(self, change: Callable[[str], str]) -> "Texts":
        """Return `change` of each text, called once for each different one."""
        codes, values = self.codes()
        changed = [change(value) for value in values]
        return self if changed == values else Texts.coded(changed, codes)

    def column(self) -> Arrow:
        """Return the texts as a plain column of a table, with escapes for what is no UTF-8."""
        if self.is_coded:
            return pa.chunked_array([_printable(chunk.dictionary).take(chunk.indices) for chunk in self.arrow.chunks], pa.string())
        return pa.chunked_array([_printable(chunk) for chunk in self.arrow.chunks], pa.string())

    def all_different(self) -> bool:
        """Return whether no two texts are equal."""
        if self._different is None:
            if self.is_coded:
                self._different = len(self.distinct()) == len(self)
            elif len(self) <= _PIECE:
                self._different = pc.count_distinct(self.arrow).as_py() == len(self)
            else:
                self._different = not len(self.repeated())
        return self._different

    def numbers(self) -> NDArray[np.int64]:
        """Return a number for each text, equal for equal texts, in this process only; two texts may have one number."""
        parts = [np.fromiter(map(hash, _listed(batch)), np.int64, len(batch)) for batch in self.batches()]
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def repeated(self) -> NDArray[np.int64]:
        """Return the rows of texts that may be there more than once, and of all those that are."""
        numbers = self.numbers()
        ordered = np.sort(numbers)
        return np.flatnonzero(np.isin(numbers, ordered[1:][ordered[1:] == ordered[:-1]]))

    def missing(self) -> list[int]:
        """Return the rows of texts that are missing."""
        if not self.arrow.null_count and not self.is_coded:
            return []
        parts = [batch.is_null().to_numpy(zero_copy_only=False) for batch in self.batches()]
        rows: list[int] = np.flatnonzero(np.concatenate([np.zeros(0, np.bool_), *parts])).tolist()
        return rows

    def is_sorted(self) -> bool:
        """Return whether no text is before the one that precedes it."""
        last: str | None = None
        for chunk in self.plain():
            if last is not None and len(chunk) and self._first(chunk) < last:
                return False
            if len(chunk) > 1 and not pc.all(pc.less_equal(chunk.slice(0, len(chunk) - 1), chunk.slice(1))).as_py():
                return False
            last = self._first(chunk.slice(len(chunk) - 1)) if len(chunk) else last
        return True

    @staticmethod
    def _first(chunk: Arrow) -> str:
        return str(_listed(chunk.slice(0, 1))[0])

    def order(self) -> NDArray[np.int64]:
        """Return the rows in the order of the texts, equal ones as they are."""
        plain = pa.chunked_array(self.plain(), pa.string())
        return np.asarray(pc.array_sort_indices(plain)).astype(np.int64)

    def ending(self, width: int) -> str | None:
        """Return the last `width` characters, if these are ASCII and the same of all texts, else None."""
        endings = set[bytes]()
        for batch in self.batches():
            offsets = _offsets(batch)
            if len(batch) and np.diff(offsets).min() < width:
                return None
            found = _bytes(batch)[offsets[1:, None].astype(np.int64) + np.arange(-width, 0)]
            if (found != found[:1]).any():
                return None
            endings |= {found[0].tobytes()} if len(batch) else set()
        ending = endings.pop() if len(endings) == 1 else b"\x80"
        return ending.decode() if ending.isascii() else None

    def without_ending(self, width: int) -> "Texts":
        """Return the texts without their last `width` bytes."""
        found = [pc.binary_slice(chunk.view(pa.binary()), 0, -width).view(pa.string()) for chunk in self.plain()]
        return Texts(pa.chunked_array(found, pa.string()))

    def is_utf8(self) -> bool:
        """Return whether no text has lone surrogates."""
        return all(_is_utf8(chunk) for chunk in self.plain())

    def are_ascii(self) -> bool:
        """Return whether all characters of all texts are ASCII; none is missing."""
        return all(ascii_bytes(batch) is not None for batch in self.batches())

    def num_bytes(self) -> int:
        """Return the bytes of all texts together."""
        return sum(pc.sum(pc.binary_length(batch)).as_py() or 0 for batch in self.batches())

    def terminated(self, end: str = "\0", *, inside: bool = False) -> Iterator[BytesColumn]:
        """Yield batches of the texts, in buffers in which each is followed by `end`; texts that are missing are empty.

        The texts are without that end, or, with `inside`, without its last byte.
        """
        for batch in self.batches():
            whole = pc.binary_join_element_wise(pc.fill_null(batch, ""), "", end)
            offsets = _offsets(whole).astype(np.int64)
            yield BytesColumn(_bytes(whole), offsets[:-1], offsets[1:] - (1 if inside else len(end.encode())))

    def hashes(self, salt: str) -> NDArray[np.uint64]:
        """Return 64 bits of the blake2b hash of `salt`, NUL and each text: stable across versions and machines."""
        if self.is_coded:
            codes, values = self.codes()
            return Texts.of(values).hashes(salt)[codes]
        return np.concatenate([np.zeros(0, np.uint64), *(_hashes(batch, salt.encode() + b"\0") for batch in self.batches())])


def of_folder(prefix: str, joined: bytes) -> Texts:
    """Return `prefix` before each of the names in `joined`, which a zero byte ends; names that are no UTF-8 as `os.fsdecode` has them."""
    data = np.frombuffer(joined, np.uint8)
    if data.max(initial=0) > 127 or not prefix.isascii():
        return Texts.of([prefix + name for name in os.fsdecode(joined).split("\0")[:-1]])
    ends = np.flatnonzero(data == 0)
    offsets = np.zeros(len(ends) + 1, np.int32)
    offsets[1:] = ends - np.arange(len(ends))
    names = pa.StringArray.from_buffers(len(ends), pa.py_buffer(offsets.data), pa.py_buffer(data[data != 0].data))
    return Texts(pc.binary_join_element_wise(prefix, names, "") if prefix else names)


def of_width(characters: NDArray[np.uint8]) -> Texts:
    """Return each row `[n, width]` of ASCII characters as a text."""
    offsets = np.arange(len(characters) + 1, dtype=np.int32) * characters.shape[1]
    return Texts(
        pa.StringArray.from_buffers(len(characters), pa.py_buffer(offsets.data), pa.py_buffer(np.ascontiguousarray(characters).data))
    )


def numbered(prefix: str, count: int, width: int = 0) -> Texts:
    """Return `prefix` before each of the numbers from 0 to `count`, with zeros before it up to a width."""
    pieces = list[Arrow]()
    for start in range(0, count, _PIECE):
        numbers = pc.cast(pa.array(np.arange(start, min(start + _PIECE, count))), pa.string())
        padded = pc.ascii_lpad(numbers, width, "0") if width else numbers
        pieces.append(pc.binary_join_element_wise(_array([prefix])[0], padded, ""))
    return Texts(pa.chunked_array(pieces, pa.string()))


def joined(parts: Sequence[Texts]) -> Texts:
    """Return the texts of all parts, in order; coded if all are."""
    if parts and all(part.is_coded for part in parts):
        values = {value: number for number, value in enumerate(dict.fromkeys(value for part in parts for value in part.codes()[1]))}
        found = [np.array([values[value] for value in known], np.int32)[codes] for codes, known in (part.codes() for part in parts)]
        return Texts.coded(list(values), np.concatenate(found))
    chunks, pieces = [chunk for part in parts for chunk in part.plain()], list[Arrow]()
    while chunks:  # a chunk for each of many folders would be slow
        sizes = np.cumsum([len(chunk) for chunk in chunks])
        count = max(1, int(np.searchsorted(sizes, _PIECE, side="right")))
        pieces.append(pa.concat_arrays(chunks[:count]))
        chunks = chunks[count:]
    return Texts(pa.chunked_array(pieces, pa.string()))


def _array(values: Sequence[str | None]) -> Arrow:
    if others := {*map(type, values)} - {str, type(None)}:
        raise TypeError(next(value for value in values if type(value) in others))
    try:
        joined = "".join(values)  # type: ignore[arg-type]  # nearly always all are texts
    except TypeError:
        joined = "\x80"
    if joined.isascii() and len(joined) < 1 << 31:  # half the time of pyarrow's own conversion
        offsets = np.zeros(len(values) + 1, np.int32)
        np.cumsum(np.fromiter(map(len, values), np.int32, len(values)), out=offsets[1:])  # type: ignore[arg-type]  # as above
        return pa.StringArray.from_buffers(len(values), pa.py_buffer(offsets.data), pa.py_buffer(joined.encode()))
    try:
        found: Arrow = pa.array(values, pa.string())
    except UnicodeEncodeError:
        found = pa.array([None if value is None else value.encode("utf-8", "surrogatepass") for value in values], pa.binary()).view(
            pa.string()
        )
    return found


def _restored(data: bytes) -> Texts:
    return Texts(pa.ipc.open_stream(data).read_all().column(0))


def _listed(array: Arrow) -> list[Any]:  # any: str, or None
    try:
        found: list[Any] = array.to_pylist()
    except (UnicodeDecodeError, pa.ArrowException):
        found = [None if value is None else value.decode("utf-8", "surrogatepass") for value in array.view(pa.binary()).to_pylist()]
    return found


def _printable(array: Arrow) -> Arrow:
    if not _is_utf8(array):
        texts = (None if text is None else text.encode("utf-8", "backslashreplace").decode() for text in _listed(array))
        return pa.array(texts, pa.string())
    return array


def _is_utf8(array: Arrow) -> bool:
    try:
        array.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _offsets(array: Arrow) -> NDArray[np.int32]:
    """Return where each text begins in `_bytes`, and the end of the last."""
    return np.frombuffer(array.buffers()[1] or b"\0\0\0\0", np.int32)[array.offset : array.offset + len(array) + 1]


def _bytes(array: Arrow) -> NDArray[np.uint8]:
    return np.frombuffer(array.buffers()[2] or b"", np.uint8)


def ascii_bytes(array: Arrow) -> tuple[NDArray[np.uint8], NDArray[np.int32]] | None:
    """Return the bytes of an array of texts without missing ones, and where each begins and the last ends; None if one is not ASCII."""
    offsets = _offsets(array)
    data = _bytes(array)[offsets[0] : offsets[-1]]
    return None if data.max(initial=0) > 127 else (data, offsets - offsets[0])


def _hashes(batch: Arrow, prefix: bytes) -> NDArray[np.uint64]:
    library, digests = native._library(), np.empty(len(batch), np.uint64)
    if library is not None and len(prefix) <= _MOST_PREFIX:
        library.aecore_blake2b(
            prefix, len(prefix), np.ascontiguousarray(_bytes(batch)), np.ascontiguousarray(_offsets(batch)), len(batch), digests
        )
        return digests
    start, out = hashlib.blake2b(prefix, digest_size=8), bytearray()
    for text in batch.view(pa.binary()).to_pylist():
        digest = start.copy()
        digest.update(text)
        out += digest.digest()
    return np.frombuffer(bytes(out), np.dtype("<u8")).astype(np.uint64)
