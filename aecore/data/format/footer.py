"""What the footer of a Parquet file says of its row groups and columns, where its bytes are not trusted.

pyarrow's reader raises an error for a footer with a changed bit, but its objects for a row group and a column (`FileMetaData.row_group`,
`RowGroupMetaData.column`, `.statistics`, `.compression`) may end the process: Arrow's C++ code throws there, and the bindings expect no
exception (pyarrow 26, 260 of 36,424 flipped bits). So nothing asks them: rows, sizes and statistics come from the footer's Thrift structs.
"""

from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from aecore.data.format.thrift import BINARY, I32, I64, LIST, STRUCT, Fields, read_struct

MAX_BYTES = 8 << 20  # of a footer. Ours have up to 30 kB; a column of a row group has about 150 bytes
_TYPES = ("BOOLEAN", "INT32", "INT64", "INT96", "FLOAT", "DOUBLE", "BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY")
_CODECS = ("UNCOMPRESSED", "SNAPPY", "GZIP", "LZO", "BROTLI", "LZ4", "ZSTD", "LZ4_RAW")
_DICTIONARIES = frozenset({2, 8})  # encodings PLAIN_DICTIONARY, RLE_DICTIONARY
# fields of FileMetaData, RowGroup, ColumnChunk, ColumnMetaData and Statistics in parquet.thrift, by number and kind
_ROWS, _GROUPS, _METADATA, _CREATED_BY = (3, I64), (4, LIST), (5, LIST), (6, BINARY)
_COLUMNS, _GROUP_BYTES, _GROUP_ROWS, _SORTING = (1, LIST), (2, I64), (3, I64), (4, LIST)
_COLUMN = (3, STRUCT)
_TYPE, _ENCODINGS, _PATH, _CODEC, _VALUES = (1, I32), (2, LIST), (3, LIST), (4, I32), (5, I64)
_UNCOMPRESSED, _COMPRESSED, _PAGES, _DICTIONARY, _STATISTICS = (6, I64), (7, I64), (9, I64), (11, I64), (12, STRUCT)
_OLD_MAX, _OLD_MIN, _NULLS, _DISTINCT, _MAX, _MIN = (1, BINARY), (2, BINARY), (3, I64), (4, I64), (5, BINARY), (6, BINARY)
# how pages are compressed, hence their sizes and places: it may differ between two attempts with one version of Parquet
_GROUP_PACKING, _CHUNK_PACKING = {_GROUP_BYTES, (5, I64), (6, I64)}, {(2, I64)}
_COLUMN_PACKING = {_CODEC, _UNCOMPRESSED, _COMPRESSED, _PAGES, _DICTIONARY}


@dataclass(frozen=True, slots=True)
class Statistics:
    """What a column of a row group says of its values; minimum and maximum as they are stored."""

    null_count: int | None
    distinct_count: int | None
    min: bytes | None
    max: bytes | None


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a row group: a leaf of the schema."""

    path: str
    physical_type: str
    codec: str
    num_values: int
    compressed_bytes: int
    uncompressed_bytes: int
    start: int  # of its first page
    has_dictionary: bool
    statistics: Statistics | None


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Some rows of a file, with all columns."""

    num_rows: int
    columns: tuple[Column, ...]


@dataclass(frozen=True, slots=True)
class Footer:
    """A footer that could be read: what it says, and pyarrow's object, for its reader."""

    arrow: pq.FileMetaData
    fields: Fields
    row_groups: tuple[RowGroup, ...]

    @property
    def num_rows(self) -> int:
        """Rows of the file."""
        return int(self.fields[_ROWS])

    @property
    def created_by(self) -> str:
        """Name and version of the writer; empty if it names none."""
        return bytes(self.fields.get(_CREATED_BY, b"")).decode(errors="replace")

    @property
    def metadata(self) -> dict[bytes, bytes]:
        """Key-value metadata."""
        return {pair[1, BINARY]: pair.get((2, BINARY), b"") for pair in self.fields.get(_METADATA, ())}

    @property
    def schema(self) -> pq.ParquetSchema:
        """Columns of the file."""
        return self.arrow.schema

    def counts(self) -> list[Any]:  # any: see Fields
        """Return rows, order and values of each row group: what any two versions of Parquet say alike of equal rows."""
        order = [fields.get(_SORTING) for fields in self.fields[_GROUPS]]
        return [(group.num_rows, [(column.path, column.num_values) for column in group.columns]) for group in self.row_groups] + order

    def statement(self) -> list[Fields]:
        """Return all that it says but for its metadata and the compression of pages: what one version of Parquet says of equal rows."""
        said = [_without(self.fields, {_GROUPS, _METADATA})]
        for group in self.fields[_GROUPS]:
            said.append(_without(group, {_COLUMNS, *_GROUP_PACKING}))
            for chunk in group[_COLUMNS]:
                said += [_without(chunk, {_COLUMN, *_CHUNK_PACKING}), _without(chunk[_COLUMN], _COLUMN_PACKING)]
        return said


def parse_footer(data: bytes) -> Footer:
    """Return what a footer, followed by its length and the magic number, says.

    Raises
    ------
    ValueError
        If it does not follow Parquet's definition, or has more than 8 MB.
    pyarrow.ArrowException, OSError
        If pyarrow cannot read it.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"its footer has {len(data)} bytes, expected at most {MAX_BYTES}")
    arrow = pq.read_metadata(pa.BufferReader(data))
    fields, end = read_struct(memoryview(data)[:-8])
    if end != len(data) - 8:
        raise ValueError(f"its footer says that it has {len(data) - 8} bytes, and its Thrift structs {end}")
    _require(fields, {_ROWS, _GROUPS}, "file")
    for pair in fields.get(_METADATA, ()):
        _require(pair, {(1, BINARY)}, "pair of the metadata")
    schema = arrow.schema
    leaves: list[tuple[str, str]] = [(schema.column(at).path, schema.column(at).physical_type) for at in range(len(schema))]
    return Footer(arrow, fields, tuple(_row_group(group, leaves) for group in fields[_GROUPS]))


def _row_group(fields: Any, leaves: list[tuple[str, str]]) -> RowGroup:  # any: not checked yet
    _require(fields, {_COLUMNS, _GROUP_BYTES, _GROUP_ROWS}, "row group")
    if fields[_GROUP_BYTES] < 0:
        raise ValueError(f"a row group of its footer has {fields[_GROUP_BYTES]} bytes")
    columns = tuple(map(_column, fields[_COLUMNS]))
    found = [(column.path, column.physical_type) for column in columns]
    if found != leaves:
        raise ValueError(f"a row group of its footer has the columns {found!r:.200}, the schema {leaves!r:.200}")
    return RowGroup(fields[_GROUP_ROWS], columns)


def _column(chunk: Any) -> Column:  # any: not checked yet
    _require(chunk, {_COLUMN}, "column")
    fields = chunk[_COLUMN]
    _require(fields, {_TYPE, _ENCODINGS, _PATH, _CODEC, _VALUES, _UNCOMPRESSED, _COMPRESSED, _PAGES}, "column")
    if not 0 <= fields[_TYPE] < len(_TYPES) or not 0 <= fields[_CODEC] < len(_CODECS):
        raise ValueError(f"a column of its footer has type {fields[_TYPE]} and codec {fields[_CODEC]}, which Parquet does not have")
    if any(fields[size] < 0 for size in (_VALUES, _UNCOMPRESSED, _COMPRESSED, _PAGES)):
        raise ValueError("a column of its footer has a negative size")
    return Column(
        path=".".join(part.decode() if isinstance(part, bytes) else repr(part) for part in fields[_PATH]),
        physical_type=_TYPES[fields[_TYPE]],
        codec=_CODECS[fields[_CODEC]],
        num_values=fields[_VALUES],
        uncompressed_bytes=fields[_UNCOMPRESSED],
        compressed_bytes=fields[_COMPRESSED],
        start=fields.get(_DICTIONARY, fields[_PAGES]),
        has_dictionary=_DICTIONARY in fields or not _DICTIONARIES.isdisjoint(filter(_is_integer, fields[_ENCODINGS])),
        statistics=_statistics(fields[_STATISTICS]) if _STATISTICS in fields else None,
    )


def _statistics(fields: Fields) -> Statistics:
    low, high = fields.get(_MIN, fields.get(_OLD_MIN)), fields.get(_MAX, fields.get(_OLD_MAX))
    return Statistics(fields.get(_NULLS), fields.get(_DISTINCT), low, high)


def _is_integer(value: object) -> bool:
    return isinstance(value, int)


def _require(fields: Any, required: set[tuple[int, int]], what: str) -> None:  # any: not checked yet
    """ValueError unless these are the fields of a struct, with all that are required."""
    missing = required - fields.keys() if isinstance(fields, dict) else required
    if missing:
        raise ValueError(f"a {what} in its footer lacks field {min(missing)[0]} of Parquet's definition")


def _without(fields: Fields, dropped: set[tuple[int, int]]) -> Fields:
    return {field: value for field, value in fields.items() if field not in dropped}
