"""The form in which aecore writes a Parquet file: page checksums, codec, dictionaries, statistics. A file that was written again loses it.

Queries skip row groups by statistics and readers find damage by page checksums, so a file without them, or with others, is not what was
written even where its rows are. pyarrow verifies a page's checksum and ignores a missing one, hence the headers of pages (Thrift's compact
protocol) are walked here; no page is decoded.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

WRITER = "parquet-cpp-arrow "  # what pyarrow calls itself in a footer
_COMPRESSED_SIZE, _CRC = 3, 4  # fields of a page header
_MAX_NESTED, _MAX_VARINT = 8, 10
_FIXED = {3: 1, 7: 8}  # byte, double


@dataclass(frozen=True, slots=True)
class Form:
    """How one kind of file is written: its codecs (one file has one), the columns with statistics and with dictionaries (None: any)."""

    codecs: frozenset[str]
    statistics: frozenset[str] | None = None
    dictionaries: frozenset[str] | None = None


def form_problems(source: Path | pa.Buffer, table: pa.Table, form: Form) -> list[str]:
    """Return in what a file is not of this form, or says in its footer something else of its rows (`table`) than they are."""
    try:
        data = source if isinstance(source, pa.Buffer) else pa.memory_map(str(source)).read_buffer()
        return list(_problems(data, pq.read_metadata(pa.BufferReader(data)), table, form))
    except (pa.ArrowException, OSError, ValueError, IndexError, UnicodeDecodeError) as error:
        return [f"its pages cannot be followed ({error})"]


def _problems(data: pa.Buffer, footer: pq.FileMetaData, table: pa.Table, form: Form) -> Iterator[str]:
    if not str(footer.created_by).startswith(WRITER):
        yield f"it was written by {footer.created_by!r}, expected {WRITER.strip()}"
    codecs, wrong, first = set(), dict[str, dict[str, None]](), 0
    for number in range(footer.num_row_groups):
        group = footer.row_group(number)
        rows, first = table.slice(first, group.num_rows), first + group.num_rows
        for at in range(group.num_columns if group.num_rows else 0):
            chunk = group.column(at)
            name, column = chunk.path_in_schema, chunk.path_in_schema.partition(".")[0]
            has_statistics = chunk.statistics is not None
            codecs.add(chunk.compression)
            if not _has_checksums(memoryview(data).cast("B"), chunk):
                wrong.setdefault("pages without a checksum", {})[name] = None
            if form.dictionaries is not None and chunk.has_dictionary_page and name not in form.dictionaries:
                wrong.setdefault("dictionaries", {})[name] = None
            if form.statistics is not None and has_statistics != (name in form.statistics):
                wrong.setdefault("statistics" if has_statistics else "no statistics", {})[name] = None
            elif name == column and has_statistics:
                yield from _wrong_statistics(name, chunk.statistics, rows.column(name))
    for what, names in wrong.items():
        yield f"its column{'s' if len(names) > 1 else ''} {', '.join(names)} {'have' if len(names) > 1 else 'has'} {what}"
    if len(codecs) > 1 or not codecs <= form.codecs:
        yield f"it is compressed with {', '.join(sorted(codecs))}, expected {' or '.join(sorted(form.codecs))}"


def _wrong_statistics(name: str, stated: Any, values: Any) -> Iterator[str]:  # any: pyarrow's stubs know no types of values
    if stated.has_null_count and stated.null_count != values.null_count:
        yield f"its statistics state {stated.null_count} missing values of {name}, it has {values.null_count}"
    if not stated.has_min_max or pa.types.is_floating(values.type):
        return
    right: Any = pc.min_max(values).as_py()  # any: as above
    if (stated.min, stated.max) != (right["min"], right["max"]):
        yield f"its statistics state {name} from {stated.min!r} to {stated.max!r}, it has {right['min']!r} to {right['max']!r}"


def _has_checksums(data: memoryview, chunk: Any) -> bool:  # any: the stubs take offsets for optional
    """Return whether every page of a column chunk has a checksum; IndexError or ValueError if its pages cannot be followed."""
    at = chunk.dictionary_page_offset if chunk.has_dictionary_page else chunk.data_page_offset
    end = at + chunk.total_compressed_size
    if not 0 <= at <= end <= len(data):
        raise ValueError(f"the pages of {chunk.path_in_schema} are outside the file")
    while at < end:
        fields, at = _struct(data, at)
        if _CRC not in fields:
            return False
        at += max(0, fields[_COMPRESSED_SIZE]) if _COMPRESSED_SIZE in fields else end
    return True


def _struct(data: memoryview, at: int, nested: int = 0) -> tuple[dict[int, int], int]:
    """Return the whole numbers among the fields of a Thrift struct, by field, and where it ends."""
    found: dict[int, int] = {}
    field = 0
    while kind := data[at] & 15:
        step, at = data[at] >> 4, at + 1
        if step:
            field += step
        else:
            number, at = _varint(data, at)
            field = _signed(number)
        if kind in (4, 5, 6):  # i16, i32, i64
            number, at = _varint(data, at)
            found[field] = _signed(number)
        else:
            at = _skipped(data, at, kind, nested)
    return found, at + 1


def _skipped(data: memoryview, at: int, kind: int, nested: int) -> int:
    """Return where a value of this kind ends; those of which a page header has none are a ValueError."""
    if kind in (1, 2):  # true, false: their kind is their value
        return at
    if kind in _FIXED:
        return at + _FIXED[kind]
    if kind == 8:  # bytes
        size, at = _varint(data, at)
        return at + size
    if kind == 12 and nested < _MAX_NESTED:
        return _struct(data, at, nested + 1)[1]
    raise ValueError(f"a page header holds a value of kind {kind}")


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for number in range(_MAX_VARINT):
        byte = data[at + number]
        value |= (byte & 127) << 7 * number
        if byte < 128:
            return value, at + number + 1
    raise ValueError("a page header holds a number that does not end")


def _signed(value: int) -> int:
    return value >> 1 ^ -(value & 1)
