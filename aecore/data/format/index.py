"""The Parquet index of a shard: one row per sample with its offset in the tar, its hash and its metadata.

Two hashes, two purposes: the sha256 of the file finds damage, the content hash (over canonical rows) is what a dataset's identity
is made of, so another Parquet version or compression level does not make another dataset. Pages carry checksums.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from aecore.data.format.form import Form
from aecore.data.format.parquet import open_parquet, read_parquet
from aecore.data.format.record import DATA_EXTENSIONS
from aecore.data.format.spill import BUCKET, spilled
from aecore.errors import DataError
from aecore.native.texts import Texts

MEMBERS = pa.list_(pa.struct([("ext", pa.string()), ("offset", pa.int64()), ("size", pa.int64())]))
_INDEX_COLUMNS: dict[str, pa.DataType] = {
    "key": pa.string(),
    "ordinal": pa.int64(),
    "label": pa.int32(),
    "label_name": pa.string(),
    "source": pa.string(),
    "sha256": pa.string(),
    "members": MEMBERS,
    "width": pa.int32(),
    "height": pa.int32(),
    "mode": pa.string(),
    "group": pa.string(),
    "length": pa.int32(),
}
SOURCE_SHA256 = "source_sha256"  # of the bytes that the source gave, in the index of samples that may have been converted
_QUARANTINE_COLUMNS: dict[str, pa.DataType] = {
    "source": pa.string(),
    "key": pa.string(),
    "ordinal": pa.int64(),
    "split": pa.string(),
    "stage": pa.string(),
    "reason": pa.string(),
    "message": pa.string(),
    "sha256": pa.string(),
}
_LISTING_COLUMNS: dict[str, pa.DataType] = {"key": pa.string(), "source": pa.string(), "bytes": pa.int64()}
_LEDGER_COLUMNS: dict[str, pa.DataType] = {
    **_LISTING_COLUMNS,
    "split": pa.string(),
    "ordinal": pa.int64(),
    "label_name": pa.string(),
    "group": pa.string(),
    "columns": pa.string(),
    "sha256": pa.string(),
    "sample_sha256": pa.string(),
    "quarantined": pa.bool_(),
    "origin": pa.string(),
    "state": pa.string(),
}
_REMOVED_COLUMNS: dict[str, pa.DataType] = {"ordinal": pa.int64(), "key": pa.string(), "reason": pa.string()}
INDEX_SCHEMA, QUARANTINE_SCHEMA, LISTING_SCHEMA = pa.schema(_INDEX_COLUMNS), pa.schema(_QUARANTINE_COLUMNS), pa.schema(_LISTING_COLUMNS)
LEDGER_SCHEMA = pa.schema(_LEDGER_COLUMNS)  # of the listings of datasets that follow their source
REMOVED_SCHEMA = pa.schema(_REMOVED_COLUMNS)
INDEX_FORM = Form(frozenset({"ZSTD"}), frozenset({"key", "ordinal"}))  # of indexes, listings and quarantines
_REPEATED = ["label_name", "mode", "group", "members.list.element.ext", "split", "stage", "reason", "origin"]


def data_members(index: pa.Table) -> tuple[Any, NDArray[np.int64], NDArray[np.int64]]:  # any: pyarrow's stubs know no types of values
    """Return extension, first byte and size of the data member of each row of an index."""
    members: Any = index["members"].combine_chunks()  # any: as above
    ext, begins, sizes = members.flatten().flatten()
    is_data: Any = pc.is_in(ext, value_set=pa.array(sorted(DATA_EXTENSIONS)))  # any: as above
    return ext.filter(is_data), begins.filter(is_data).to_numpy(), sizes.filter(is_data).to_numpy()


def make_table(schema: pa.Schema, columns: Mapping[str, Any], num_rows: int) -> pa.Table:  # any: lists or arrays
    """Return a table of all columns of `schema` (null where not given) and the further ones of `columns` after them."""
    names = [*schema.names, *(name for name in columns if name not in schema.names)]
    arrays = []
    for name in names:
        wanted = schema.field(name).type if name in schema.names else None
        values = columns.get(name)
        arrays.append(pa.nulls(num_rows, wanted) if values is None else _array(values, wanted))
    return pa.table(arrays, names=names)


def _array(values: Any, wanted: pa.DataType | None) -> Any:  # any: list, numpy array or arrow array
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return values
    if isinstance(values, Texts):
        return values.column()
    try:
        return pa.array(values, wanted)
    except UnicodeEncodeError:  # file names that are no UTF-8 arrive with lone surrogates
        return pa.array([text.encode("utf-8", "backslashreplace").decode() for text in values], wanted)


def table_bytes(table: pa.Table, metadata: Mapping[str, Any]) -> bytes:  # any: plain JSON data
    """Return the table as Parquet (zstd, page checksums), with `metadata` as JSON under the key `aecore`."""
    sink = pa.BufferOutputStream()
    _write(table, metadata, sink)
    return bytes(sink.getvalue())


def write_table(table: pa.Table, metadata: Mapping[str, Any], path: Path) -> None:  # any: as above
    """Write the table as `table_bytes` returns it, in row groups of some memory."""
    with pa.OSFile(str(path), "wb") as sink:
        _write(table, metadata, sink, BUCKET)


def _write(table: pa.Table, metadata: Mapping[str, Any], sink: Any, rows: int | None = None) -> None:  # any: pyarrow's files
    described = (table if rows else table.combine_chunks()).replace_schema_metadata({"aecore": json.dumps(metadata, sort_keys=True)})
    leaves = set(_leaf_names(table.schema))
    dictionaries: Any = [name for name in _REPEATED if name in leaves]  # any: pyarrow's stubs know only the boolean
    statistics: Any = sorted(INDEX_FORM.statistics or ())  # any: as above
    written: Any = {"use_dictionary": dictionaries, "write_statistics": statistics, "row_group_size": rows}  # any: as above
    pq.write_table(described, sink, compression="zstd", write_page_checksum=True, **written)


def _leaf_names(schema: pa.Schema) -> Iterator[str]:
    for column in schema:
        if column.type == MEMBERS:
            yield from (f"{column.name}.list.element.{part}" for part in ("ext", "offset", "size"))
        else:
            yield column.name


def read_table(
    data: bytes,
    where: str,
    rows: int | None = None,
    schema: pa.Schema | None = None,
    *,
    more: bool = False,
    columns: Sequence[str] | None = None,
) -> pa.Table:
    """Return the table of Parquet bytes, page checksums verified; DataError naming `where` if they are damaged.

    DataError too if the table has not these `rows`, or not the columns of `schema` (with `more`: these and further ones). Of the
    `columns` that are asked for those are read that it has.
    """
    try:
        # a process that ends soon after is aborted by threads (2 of 60 runs)
        table = read_parquet(pa.py_buffer(data), rows, columns, threads=False)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{where} is not a readable Parquet file ({error}): restore it or write the artefact again") from error
    wrong = [] if schema is None else column_problems(table.schema, schema, more=more)
    if wrong:
        raise DataError(f"{where} has other columns than aecore writes ({'; '.join(wrong)}): restore it or write the artefact again")
    return table


def read_mapped(path: Path, where: str) -> pa.Table:
    """Return the table of a Parquet file as `read_table` does, in a scratch file that is mapped, a row group at a time."""
    try:
        file = open_parquet(path)
        schema = file.schema_arrow
        return spilled((file.read_row_group(number, use_threads=False) for number in range(file.num_row_groups)), schema)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{where} is not a readable Parquet file ({error}): restore it or write the artefact again") from error


def column_problems(found: pa.Schema, wanted: pa.Schema, *, more: bool = False) -> list[str]:
    """Return which columns are missing, of another type, there twice or, unless there may be `more`, unexpected."""
    names = Counter(found.names)
    problems = [f"column {name!r} is there {count} times" for name, count in names.items() if count > 1]
    for field in wanted:
        if field.name not in names:
            problems.append(f"column {field.name!r} is missing")
        elif names[field.name] == 1 and (kind := found.field(field.name).type) != field.type:
            problems.append(f"column {field.name!r} is of type {kind}, expected {field.type}")
    extra = [] if more else [name for name in names if name not in wanted.names]
    return problems + [f"column {name!r} is unexpected" for name in extra]


def plain_type(kind: Any) -> pa.DataType:  # any: pyarrow's stubs know no types of values
    """Return the type of the values of a column: that of a dictionary's."""
    plain: pa.DataType = kind.value_type if pa.types.is_dictionary(kind) else kind
    return plain


def content_sha256(table: pa.Table) -> str:
    """Return the hash of the rows: column names, types and values, independent of Parquet, chunks and column order.

    Per column (by name): type, validity bytes, then values; strings and lists as int64 lengths and their joined contents; nulls are zeros.
    """
    digest = hashlib.sha256(f"{table.num_rows} rows".encode())
    for name in sorted(table.column_names):
        column = table.column(name)
        digest.update(f"\n{name}\n".encode())
        _update(digest, pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type))
    return digest.hexdigest()


def _update(digest: Any, array: Any) -> None:  # any: hashlib's object has no public type, pyarrow's stubs know no flatten
    kind = array.type
    digest.update(type(kind).__name__.encode() if pa.types.is_nested(kind) else str(kind).encode())  # how Parquet names list items varies
    complete = array.null_count == 0
    digest.update(b"\1" * len(array) if complete else array.is_valid().to_numpy(zero_copy_only=False).tobytes())
    if pa.types.is_string(kind) or pa.types.is_binary(kind):
        array = array if complete else array.fill_null("" if pa.types.is_string(kind) else b"")
        offsets = np.frombuffer(array.buffers()[1] or b"\0\0\0\0", "<i4")[array.offset : array.offset + len(array) + 1]
        digest.update(np.diff(offsets).astype("<i8").tobytes())
        digest.update(memoryview(array.buffers()[2] or b"")[offsets[0] : offsets[-1]])
    elif pa.types.is_list(kind):
        digest.update(pc.list_value_length(array).fill_null(0).to_numpy().astype("<i8").tobytes())
        _update(digest, array.flatten())
    elif pa.types.is_struct(kind):
        for child in array.flatten():
            _update(digest, child)
    elif pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind):
        array = array if complete else array.fill_null(False if pa.types.is_boolean(kind) else 0)
        values = array.to_numpy(zero_copy_only=False)
        digest.update(values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes())
    elif not pa.types.is_null(kind):
        raise DataError(f"an index column of type {kind} has no canonical form: use strings, booleans or numbers")
