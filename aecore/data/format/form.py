"""The form in which aecore writes a Parquet file: page checksums, codec, dictionaries, statistics. A file that was written again loses it.

Queries skip row groups by statistics and readers find damage by page checksums, so a file without them, or with others, is not what was
written even where its rows are. pyarrow verifies a page's checksum and ignores a missing one, hence the headers of pages are walked here;
no page is decoded.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from aecore.data.format.footer import Column, Footer, Statistics
from aecore.data.format.parquet import read_metadata
from aecore.data.format.thrift import I32, read_struct

_WRITER = re.compile(r"parquet-cpp-arrow version \d+\.\d+\.\d+(-SNAPSHOT)?")  # what pyarrow calls itself in a footer
_COMPRESSED_SIZE, _CRC = (3, I32), (4, I32)  # fields of a page header


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
        return list(_problems(data, read_metadata(pa.BufferReader(data)), table, form))
    except (pa.ArrowException, OSError, ValueError) as error:
        return [f"its pages cannot be followed ({error})"]


def _problems(data: pa.Buffer, footer: Footer, table: pa.Table, form: Form) -> Iterator[str]:
    if not _WRITER.fullmatch(footer.created_by):
        yield f"it was written by {footer.created_by!r}, expected parquet-cpp-arrow and its version"
    codecs, wrong, first = set(), dict[str, dict[str, None]](), 0
    for group in footer.row_groups:
        rows, first = table.slice(first, group.num_rows), first + group.num_rows
        for chunk in group.columns if group.num_rows else ():
            name, column = chunk.path, chunk.path.partition(".")[0]
            has_statistics = chunk.statistics is not None
            codecs.add(chunk.codec)
            if not _has_checksums(memoryview(data).cast("B"), chunk):
                wrong.setdefault("pages without a checksum", {})[name] = None
            if form.dictionaries is not None and chunk.has_dictionary and name not in form.dictionaries:
                wrong.setdefault("dictionaries", {})[name] = None
            if form.statistics is not None and has_statistics != (name in form.statistics):
                wrong.setdefault("statistics" if has_statistics else "no statistics", {})[name] = None
            elif name == column and chunk.statistics is not None:
                yield from _wrong_statistics(name, chunk.statistics, rows.column(name))
    for what, names in wrong.items():
        yield f"its column{'s' if len(names) > 1 else ''} {', '.join(names)} {'have' if len(names) > 1 else 'has'} {what}"
    if len(codecs) > 1 or not codecs <= form.codecs:
        yield f"it is compressed with {', '.join(sorted(codecs))}, expected {' or '.join(sorted(form.codecs))}"


def _wrong_statistics(name: str, stated: Statistics, values: Any) -> Iterator[str]:  # any: pyarrow's stubs know no types of values
    if stated.null_count not in (None, values.null_count):
        yield f"its statistics state {stated.null_count} missing values of {name}, it has {values.null_count}"
    if stated.min is None or stated.max is None or not (pa.types.is_string(values.type) or pa.types.is_integer(values.type)):
        return
    right: Any = pc.min_max(values).as_py()  # any: as above
    if (stated.min, stated.max) != tuple(_stored(right[which], values.type) for which in ("min", "max")):
        yield f"its statistics state {name} from {stated.min!r} to {stated.max!r}, it has {right['min']!r} to {right['max']!r}"


def _stored(value: int | str | None, kind: pa.DataType) -> bytes | None:
    """Return a value as statistics store it: integers in the 4 or 8 bytes of their physical type."""
    if isinstance(value, int):
        return value.to_bytes(max(4, kind.bit_width // 8), "little", signed=pa.types.is_signed_integer(kind))
    return None if value is None else value.encode()


def _has_checksums(data: memoryview, chunk: Column) -> bool:
    """Return whether every page of a column chunk has a checksum; ValueError if its pages cannot be followed."""
    at, end = chunk.start, chunk.start + chunk.compressed_bytes
    if not 0 <= at <= end <= len(data):
        raise ValueError(f"the pages of {chunk.path} are outside the file")
    while at < end:
        fields, at = read_struct(data, at)
        if _CRC not in fields:
            return False
        at += max(0, fields.get(_COMPRESSED_SIZE, end))
    if at != end:
        raise ValueError(f"the pages of {chunk.path} end at byte {at}, its footer says {end}")
    return True
