"""Open a Parquet file of which nothing is believed: what it would take in memory is bounded before a page is decoded.

A megabyte can state thirty million rows (a run of one value has three bytes), or one long text that ten thousand rows repeat. Hence rows
are compared with what the manifest says and with the size of the file (every file of ours has a different key in each row), columns with
the rows, and texts and lists with the size of the file. All of that is in the footer; dictionaries that may be repeated too often are read
without repeating them. Not found: a footer that understates what its own pages take (rows and values are those that Arrow reads).
"""

import base64
import hashlib
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from aecore.data.format.footer import Footer, parse_footer

FREE_BYTES, FREE_ROWS = 64 << 20, 1 << 16  # a file of any size may take so much
ROWS_PER_BYTE = 8  # a listing of numbered keys and one size takes 0.8 bytes a row
TEXT_RATIO = 1000  # bytes of all texts for each byte of the file; an index of ours has a sha256, of 32 random bytes, in each row
# bytes of vectors for each byte of the file. A collapsed model gives every row the same vector: 7,500 in our parts (zstd, a million rows of
# 64 zeros, or 100,000 of 512); this is twice that
VALUE_RATIO = 1 << 14
# items of a list for each row of its file, on average: the members of a sample, of which shards of ours have one or two (the data, `cls`)
# and those of other writers a few more (`json`, `txt`, depth, masks)
MAX_ITEMS = 64
_ARROW_SCHEMA = b"ARROW:schema"  # key of the metadata of a file that Arrow wrote
_TAIL_BYTES = 1 << 14  # read at once for a footer; that of a part of ours has 6 kB
_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8}


def footer_of(file: IO[bytes] | pa.NativeFile) -> bytes:
    """Return the footer of a Parquet file, with its length and the magic number: the last bytes of the file. ValueError if it has none."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _TAIL_BYTES))
    tail = file.read(_TAIL_BYTES)
    length = int.from_bytes(tail[-8:-4], "little") + 8
    if tail[-4:] != b"PAR1" or length > size:
        raise ValueError(f"the last of its {size} bytes are no footer of Parquet")
    if length > len(tail):
        file.seek(size - length)
        tail = file.read(length)
    return tail[-length:]


def footer_sha256(file: IO[bytes] | pa.NativeFile) -> str:
    """Return the sha256 of `footer_of` a file."""
    return hashlib.sha256(footer_of(file)).hexdigest()


def read_metadata(file: IO[bytes] | pa.NativeFile, sha256: str | None = None) -> Footer:
    """Return what the footer of a file says; ValueError if it has none that can be read, or with another hash than `sha256`.

    No page checksum covers a footer, and a changed bit in one returns wrong rows: a column of nulls where its name changed, no rows where
    the statistics that a filter asks did. What is compared here is what is parsed.
    """
    footer = footer_of(file)
    if sha256 is not None and (found := hashlib.sha256(footer).hexdigest()) != sha256:
        raise ValueError(f"its footer has the sha256 {found[:12]}, expected {sha256[:12]}")
    return parse_footer(footer)


def open_parquet(
    source: Path | pa.Buffer, rows: int | None = None, columns: Sequence[str] | None = None, footer: Footer | None = None
) -> pq.ParquetFile:
    """Return an open file whose `columns` (None: all) can be read in bounded memory; page checksums are verified when they are.

    Parameters
    ----------
    rows : int, optional
        How many rows it must have.
    footer : Footer, optional
        Its footer, if that is known: the one in the file is not read.

    Raises
    ------
    ValueError
        If it has other rows, or would take more memory than any file of its size that this package writes.
    """
    footer = footer or _footer_in(source)
    file = _opened(source, footer)
    num_bytes = source.size if isinstance(source, pa.Buffer) else source.stat().st_size
    _require_rows(footer, rows, num_bytes)
    doubtful = _require_columns(footer, file.schema_arrow, num_bytes, columns)
    if doubtful:
        most = FREE_BYTES + TEXT_RATIO * num_bytes
        size = sum(_text_bytes(chunk) for name in doubtful for chunk in _texts_of(source, footer, name))
        if size > most:
            raise ValueError(f"its texts would take {size} bytes, expected at most {most} in a file of {num_bytes}")
    return file


def read_parquet(
    source: Path | pa.Buffer,
    rows: int | None = None,
    columns: Sequence[str] | None = None,
    footer: Footer | None = None,
    *,
    threads: bool = True,
) -> pa.Table:
    """Return `columns` (None: all) as `open_parquet` reads them; ValueError if a column has not as many rows as the footer says.

    Where a footer with a changed bit sends the reader to a wrong place, Arrow returns columns of no rows, and no error.
    """
    file = open_parquet(source, rows, columns, footer)
    table = file.read(None if columns is None else list(columns), use_threads=threads)
    for name, column in zip(table.column_names, table.columns, strict=True):
        if len(column) != file.metadata.num_rows:
            raise ValueError(f"its column {name} has {len(column)} rows, its footer says {file.metadata.num_rows}")
    return table


def _footer_in(source: Path | pa.Buffer) -> Footer:
    with pa.BufferReader(source) if isinstance(source, pa.Buffer) else source.open("rb") as file:
        return read_metadata(file)


def _opened(source: Path | pa.Buffer, footer: Footer, dictionaries: Iterable[str] = ()) -> pq.ParquetFile:
    """Open a file without a memory map, in which a read error of the disk, or the end of a file that shrinks, is a SIGBUS and no error.

    The price, 70,000 rows in 7 parts of zstd, CPU time of 60 interleaved pairs (AMD EPYC, 2 cores, 2026-11-30): a column of latents 1.02 of
    D = 64 and 1.05 of D = 16, all columns 1.04 and 1.07, keys 0.94.
    """
    file: Any = pa.BufferReader(source) if isinstance(source, pa.Buffer) else source  # any: what pyarrow takes for a file
    return pq.ParquetFile(file, metadata=footer.arrow, page_checksum_verification=True, read_dictionary=list(dictionaries) or None)


def same_footers(ours: Path | pa.Buffer, theirs: Path | pa.Buffer, ignored: Collection[str] = ()) -> bool:
    """Return whether two files of the same rows also say the same of them in their footers, which a query believes without reading a row.

    No page checksum covers a footer. Of one version of Parquet, all is compared but the compression of pages and the `ignored` keys
    of the metadata. Another version says more or less, in another way, but all rows have been read: there counts, order, statistics and
    metadata are compared, as far as both have them. A footer that cannot be read is no other one's.
    """
    try:
        own, other = map(_footer_in, (ours, theirs))
    except (pa.ArrowException, OSError, ValueError):
        return False
    same_version, free = own.created_by == other.created_by, {_ARROW_SCHEMA, *(name.encode() for name in ignored)}
    known, found = ({name: text for name, text in footer.metadata.items() if name not in free} for footer in (own, other))
    if same_version:
        said = other.metadata.get(_ARROW_SCHEMA)
        return known == found and said == _arrow_schema(own, other.metadata) and own.statement() == other.statement()
    if own.counts() != other.counts() or any(known.get(name, text) != text for name, text in found.items()):
        return False
    pairs = zip(*([x.statistics for group in footer.row_groups for x in group.columns] for footer in (own, other)), strict=True)
    return all(a is None or b is None or a == b for a, b in pairs)


def _arrow_schema(footer: Footer, metadata: Mapping[bytes, bytes]) -> bytes | None:
    """Return how Arrow stores the schema of a file of ours beside other metadata, which it repeats."""
    stored = footer.metadata.get(_ARROW_SCHEMA)
    if stored is None:
        return None
    schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(stored)))
    repeated = {name: text for name, text in metadata.items() if name != _ARROW_SCHEMA}
    schema = schema.with_metadata(repeated) if repeated else schema.remove_metadata()
    return base64.b64encode(schema.serialize().to_pybytes())


def _require_rows(footer: Footer, rows: int | None, num_bytes: int) -> None:
    found = [group.num_rows for group in footer.row_groups]
    if min(found, default=0) < 0 or sum(found) != footer.num_rows:
        raise ValueError(f"its footer states {footer.num_rows} rows, its row groups {sum(found)}")
    if rows is not None and footer.num_rows != rows:
        raise ValueError(f"it has {footer.num_rows} rows, the manifest says {rows}")
    if footer.num_rows > max(ROWS_PER_BYTE * num_bytes, FREE_ROWS):
        raise ValueError(f"it states {footer.num_rows} rows in {num_bytes} bytes, expected at most {ROWS_PER_BYTE} in a byte")


def _require_columns(footer: Footer, schema: pa.Schema, num_bytes: int, columns: Sequence[str] | None) -> list[str]:
    """Compare the columns with the rows; return the paths of those whose texts may be far more than their pages.

    A row group of Parquet has a column for each leaf of the schema, in the order in which a walk into the depth meets them, and no column
    for a list or a struct; the same walk over Arrow's types meets the same leaves. So the leaf number `at` of `fields` (each with the top
    field that it is in, whose type says how many values a row may have) is column `at` of every row group.
    """
    fields = [field for field in schema for _ in _leaves(field.type)]
    vectors, texts, repeated = 0, 0, dict[str, int]()
    for group in footer.row_groups:
        if len(fields) != len(group.columns):
            raise ValueError(f"its schema has {len(group.columns)} columns, and {len(fields)} as Arrow reads it")
        for at, (field, column) in enumerate(zip(fields, group.columns, strict=True)):
            if columns is not None and field.name not in columns:
                continue
            is_flat = not pa.types.is_nested(field.type)
            items = field.type.list_size if pa.types.is_fixed_size_list(field.type) else 1 if is_flat else MAX_ITEMS
            most = group.num_rows * items
            if column.num_values > max(most, 0 if is_flat else FREE_ROWS):
                raise ValueError(
                    f"its column {column.path} states {column.num_values} values, expected at most {most} in {group.num_rows} rows"
                )
            if column.physical_type != "BYTE_ARRAY":
                vectors += column.num_values * (_WIDTHS.get(column.physical_type) or footer.schema.column(at).length or 0)
                continue
            texts += column.uncompressed_bytes
            if column.has_dictionary:
                repeated[column.path] = repeated.get(column.path, 0) + column.num_values * column.uncompressed_bytes
    for what, size, most in (
        ("numbers", vectors, FREE_BYTES + VALUE_RATIO * num_bytes),
        ("texts", texts, FREE_BYTES + TEXT_RATIO * num_bytes),
    ):
        if size > most:
            raise ValueError(f"its {what} would take {size} bytes, expected at most {most} in a file of {num_bytes}")
    return [path for path, size in repeated.items() if size > FREE_BYTES + TEXT_RATIO * num_bytes]


def _leaves(kind: Any) -> Iterator[Any]:  # any: pyarrow's stubs do not know the types of nested ones
    """Yield the types of the columns that Parquet makes of a type."""
    if pa.types.is_nested(kind):
        for number in range(kind.num_fields):
            yield from _leaves(kind.field(number).type)
    else:
        yield kind


def _texts_of(source: Path | pa.Buffer, footer: Footer, path: str) -> list[Any]:  # any: pyarrow's stubs know no nested chunks
    """Return the chunks of a column with its texts as dictionaries, which repeat nothing."""
    return _opened(source, footer, [path]).read(columns=[path], use_threads=False).column(0).chunks


def _text_bytes(array: Any) -> int:  # any: as above
    """Return how many bytes the texts of an array take, written out."""
    if pa.types.is_dictionary(array.type):
        lengths = pc.binary_length(array.dictionary).cast(pa.int64())
        return int(pc.sum(lengths.take(array.indices)).as_py() or 0)
    if pa.types.is_list(array.type) or pa.types.is_fixed_size_list(array.type):
        return _text_bytes(array.flatten())
    if pa.types.is_struct(array.type):
        return sum(map(_text_bytes, array.flatten()))
    return int(array.nbytes)
