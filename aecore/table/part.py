"""One part of a latent table: its columns, its key-value metadata, and how it is committed.

Latents become `fixed_size_list<float32|float16>[D]`, the one type that DuckDB, Polars, pandas, HF datasets and Lance all take,
straight from numpy's buffers. Every page carries a checksum (23 bytes a file; without it 298 of 300 bit flips read silently).
A part of GPU floats may differ in its last bits between two attempts: the attempt that finds the name taken checks that the
committed part is the same one (metadata, columns, keys, checksums) and records that one.
"""

import contextlib
import hashlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from aecore.artifact.commit import left_behind, put_or_adopt
from aecore.artifact.documents import parse_json
from aecore.data.format.decode import preprocessing_hash
from aecore.data.format.footer import Footer
from aecore.data.format.form import Form, form_problems
from aecore.data.format.index import INDEX_SCHEMA, SOURCE_SHA256, column_problems, plain_type
from aecore.data.format.parquet import footer_sha256, read_metadata, read_parquet, same_footers
from aecore.errors import DataError, disk_error
from aecore.store import LEFT_BEHIND, AlreadyExists, FileRef, Store, read_again, sha256_json
from aecore.table.manifest import ALL, METADATA

T = TypeVar("T")
Compression = Literal["zstd", "none"]
PREFIX = "aecore."
# The hash of the values of PRODUCER. Attempts at a part may differ in these alone (another machine), so nothing else says whether those of
# a part that an attempt finds committed are what was written: a changed bit in one would go into the lineage. A part of version 1 has no
# seal: there the only known values are those of the attempt itself, and any others are refused.
SEAL = "producer_sha256"
PREPROCESSING = "preprocessing_sha256"  # follows from the config, which is compared, and the decoder's version, which is not
PRODUCER = ("device", "threads", "versions")  # of the machine that computed it: recorded, not compared
NOT_PASSED = frozenset(
    {"source", "sha256", SOURCE_SHA256, "members", "width", "height", "mode"}
)  # index columns that describe bytes, not samples
RENAMED = {"sha256": "sample_sha256"}  # column of an index -> that of a table
OWN_COLUMNS = ("shard", "split")
PART_FORM = Form(frozenset({"ZSTD", "UNCOMPRESSED"}), frozenset({"key"}), frozenset({"shard"}))
QUARANTINE_FORM = Form(PART_FORM.codecs)
_PASSED = [name for name in INDEX_SCHEMA.names if name not in (*NOT_PASSED, "key", "ordinal")]
FIRST_COLUMNS = pa.schema(  # of every part; then further ones of the dataset, then the encoded ones
    [
        pa.field("key", pa.string()),
        pa.field("shard", pa.string()),
        pa.field("ordinal", pa.int64()),
        *(pa.field(name, INDEX_SCHEMA.field(name).type) for name in _PASSED),
    ]  # type: ignore[arg-type]  # the stubs join the fields' types to object
)
QUARANTINE_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string()),
        pa.field("shard", pa.string()),
        pa.field("ordinal", pa.int64()),
        pa.field("stage", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("message", pa.string()),
        pa.field("sha256", pa.string()),
    ]  # type: ignore[arg-type]  # the stubs join the fields' types to object
)
Column = Any  # any: pyarrow's stubs type chunked arrays by their scalars, which are not known here


@dataclass(frozen=True, slots=True)
class RefusedRow:
    """A row of a shard without latents: the stage that failed (`decode`, `encode`), a short reason and the message."""

    row: int
    stage: str
    reason: str
    message: str


def part_name(split: str, stem: str) -> str:
    """Return the name of a part, in the layout of Hive partitions."""
    return f"data/split={split}/{stem}.parquet"


def fixed_size_list(values: NDArray[Any]) -> Column:  # any: float32, float16 or int32
    """Return `[n, D]` numbers as an Arrow column that shares their memory."""
    flat: Any = np.ascontiguousarray(values).reshape(-1)  # any: the stubs do not see that an array is a buffer
    child = pa.Array.from_buffers(pa.from_numpy_dtype(flat.dtype), len(flat), [None, pa.py_buffer(flat)])
    return pa.FixedSizeListArray.from_arrays(child, int(values.shape[1]))


def numpy_view(column: Column) -> NDArray[Any]:  # any: the column's dtype
    """Return a one-chunk number or fixed-size-list column as `[n]` or `[n, D]` without a copy (read-only)."""
    assert column.num_chunks == 1, "a part is one row group"
    chunk = column.chunk(0)
    if pa.types.is_fixed_size_list(chunk.type):
        flat: NDArray[Any] = chunk.flatten().to_numpy(zero_copy_only=True)
        return flat.reshape(len(chunk), chunk.type.list_size)
    view: NDArray[Any] = chunk.to_numpy(zero_copy_only=True)
    return view


def passed_names(names: Sequence[str], chosen: Sequence[str]) -> dict[str, str]:
    """Return the columns that a table takes from an index with these columns: its name -> the index's, in the order of the table.

    `chosen` is what `encode.columns` says: names, and the words `ALL` and `METADATA` (all but NOT_PASSED). FIRST_COLUMNS always are in it.
    """
    table = {RENAMED.get(name, name): name for name in names if name != "members"}
    first = [name for name in FIRST_COLUMNS.names if name in table]
    wanted = {name for name, own in table.items() if ALL in chosen or name in chosen or (METADATA in chosen and own not in NOT_PASSED)}
    return {name: table[name] for name in (*first, *(name for name in table if name in wanted and name not in first))}


def passed_columns(index: pa.Table, chosen: Sequence[str] = (METADATA,)) -> dict[str, Column]:
    """Return the columns that rows take from the index of their shard, as `passed_names`."""
    names = passed_names(index.column_names, chosen)
    return {name: index[own].cast(plain_type(index[own].type)) for name, own in names.items()}  # HF refuses dictionaries


def part_table(
    index: pa.Table,
    rows: NDArray[np.int64],
    shard: str,
    columns: Mapping[str, Column],
    metadata: Mapping[str, str],
    chosen: Sequence[str] = (METADATA,),
) -> pa.Table:
    """Return the rows of one part: key, shard, ordinal, the `chosen` columns of the index (see `passed_names`), then the encoded columns.

    `rows` are the encoded rows of the shard's index, ascending; `columns` are `[n, D]` or `[n]`, or Arrow columns; `metadata` comes without
    prefix. DataError if a metadata column of the dataset has the name of a column of the table.
    """
    first = int(rows[0]) if len(rows) else 0
    contiguous = not len(rows) or int(rows[-1]) - first + 1 == len(rows)
    known = passed_columns(index.slice(first, len(rows)) if contiguous else index.take(pa.array(rows, pa.int64())), chosen)
    doubled = {RENAMED[name] for name in RENAMED if RENAMED[name] in known and RENAMED[name] in index.column_names}
    taken = sorted(({*known} & {*columns, *OWN_COLUMNS}) | doubled)
    if taken:
        raise DataError(f"the dataset has a metadata column {taken[0]!r}, which the latent table uses itself: rename it and shard again")
    arrays: dict[str, Column] = {"key": known.pop("key"), "shard": pa.repeat(pa.scalar(shard), len(rows)), "ordinal": known.pop("ordinal")}
    arrays |= known
    for name, values in columns.items():
        if isinstance(values, np.ndarray):
            values = fixed_size_list(values) if values.ndim == 2 else pa.array(values)
        arrays[name] = values
    return pa.table(arrays, metadata={PREFIX + key: value for key, value in metadata.items()})


def schema_problems(schema: pa.Schema, encoded: Mapping[str, Any]) -> list[str]:
    """Return where a part has not the columns that its writer gives it; `encoded` are the manifest's."""
    types = {name: _encoded_type(info) for name, info in encoded.items()}
    wanted = pa.schema([*FIRST_COLUMNS, *(pa.field(name, kind) for name, kind in types.items())])
    problems = column_problems(schema, wanted, more=True)
    names, first = schema.names, FIRST_COLUMNS.names
    if not problems and (names[: len(first)] != first or {*names[len(names) - len(types) :]} != types.keys()):
        problems.append(f"its columns are {', '.join(names)}, expected {', '.join(first)}, those of the dataset, {', '.join(types)}")
    return problems


def _encoded_type(info: Mapping[str, Any]) -> pa.DataType:
    number: pa.DataType = pa.from_numpy_dtype(np.dtype(info["dtype"]))
    return number if info["dim"] is None else pa.list_(number, info["dim"])


def has_gaps(column: Column) -> bool:
    """Return whether a value, or a number of a vector, is missing in a column."""
    nested = pa.types.is_fixed_size_list(column.type)
    return bool(column.null_count) or (nested and any(chunk.flatten().null_count for chunk in column.chunks))


def commit_part(store: Store, name: str, table: pa.Table, *, compression: Compression) -> tuple[FileRef, dict[str, str], str]:
    """Write and commit one part; return it with its metadata and the hash of its footer.

    If another attempt committed an equal part first, they are those of that one.
    """
    metadata = part_metadata(table.schema)
    table = table.replace_schema_metadata({PREFIX + key: value for key, value in (*metadata.items(), (SEAL, seal_of(metadata)))})
    with store.stage() as path:
        with _refusal_named(f"{store.url}/{name}"):
            pq.write_table(
                table,
                path,
                compression=compression,
                use_dictionary=sorted(PART_FORM.dictionaries or ()),  # type: ignore[arg-type]  # the stubs know only bool
                write_statistics=sorted(PART_FORM.statistics or ()),
                write_page_checksum=True,
                row_group_size=max(1, len(table)),
            )
        with path.open("rb") as file:
            footer = footer_sha256(file)
        ref, adopted = put_or_adopt(
            store, name, path, role="part", accepts=lambda there, data: _require_same_part(store, there, data, table, path)
        )
    if adopted is None:
        return ref, part_metadata(table.schema), footer
    return ref, part_metadata(read_part(store, ref, ["key"]).schema), footer_sha256(io.BytesIO(adopted))


def seal_in(schema: pa.Schema) -> str | None:
    """Return the hash of its producer that a part states; None in version 1."""
    seal = (schema.metadata or {}).get(f"{PREFIX}{SEAL}".encode())
    return None if seal is None else seal.decode(errors="replace")


def seal_of(metadata: Mapping[str, str]) -> str:
    """Return the hash of the producer that a part's metadata name."""
    return sha256_json({key: metadata.get(key) for key in PRODUCER})


def _require_same_part(store: Store, ref: FileRef, data: bytes, table: pa.Table, path: Path) -> bool:
    """Return True if `data` of the committed `ref` is `table`, written to `path`, up to producer and values of latents.

    Else AlreadyExists; DataError if it is damaged.
    """
    committed = read_part(store, ref)
    new, known = part_metadata(table.schema), part_metadata(committed.schema)
    ignored = [*PRODUCER]
    if known.get(PREPROCESSING) == _preprocessing_of(known):  # of another version of the decoder, with the settings that are compared
        ignored.append(PREPROCESSING)
    differing = [key for key in sorted({*new, *known}) if key not in ignored and new.get(key) != known.get(key)]
    seal = seal_in(committed.schema)
    if seal_of(known) != (seal_of(new) if seal is None else seal):  # without one (version 1) only ours is known
        differing.append("producer")
    if not committed.schema.equals(table.schema):
        differing.append("columns")
    elif not committed.column("key").equals(table.column("key")):
        differing.append("keys")
    if not differing and not same_footers(path, pa.py_buffer(data), [PREFIX + key for key in (*ignored, SEAL)]):
        differing.append("footer")
    if not differing and (problems := form_problems(pa.py_buffer(data), committed, PART_FORM)):
        differing.append(f"form: {'; '.join(problems)}")
    if differing:
        raise AlreadyExists(
            f"{store.url}/{ref.name} exists and is another part (differs in {', '.join(differing)}): nothing was overwritten. "
            f"{LEFT_BEHIND}",
            hint=left_behind(store),
        )
    return True


def _preprocessing_of(metadata: Mapping[str, str]) -> str | None:
    """Return the preprocessing hash that follows from a part's own config and versions; None if they cannot be read."""
    try:
        return preprocessing_hash(parse_json(metadata["config"])["transform"], parse_json(metadata["versions"])["decoder"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def commit_quarantine(store: Store, stem: str, shard: str, index: pa.Table, refused: Sequence[RefusedRow]) -> FileRef | None:
    """Commit the quarantined rows of a shard with their keys, ordinals and hashes; None if there are none."""
    if not refused:
        return None
    return put_quarantine(store, stem, _quarantine_table(shard, index, refused))


def _quarantine_table(shard: str, index: pa.Table, refused: Sequence[RefusedRow]) -> pa.Table:
    rows = sorted(refused, key=lambda row: row.row)
    taken = index.select(["key", "ordinal", "sha256"]).take(pa.array([row.row for row in rows], pa.int64()))
    columns: dict[str, Column] = {"key": taken["key"], "shard": [shard] * len(rows), "ordinal": taken["ordinal"], "sha256": taken["sha256"]}
    columns |= {name: [getattr(row, name) for row in rows] for name in ("stage", "reason", "message")}
    return pa.table(columns, schema=QUARANTINE_SCHEMA)


def put_quarantine(store: Store, stem: str, table: pa.Table) -> FileRef:
    """Commit the table of the quarantined rows of a part."""
    name = f"quarantine/{stem}.parquet"
    with store.stage() as path:
        with _refusal_named(f"{store.url}/{name}"):
            pq.write_table(table, path, compression="none", write_page_checksum=True)

        # an earlier attempt may have used another version of Parquet: equal rows are accepted
        def says_the_same(there: FileRef, data: bytes) -> bool:
            buffer = pa.py_buffer(data)
            rows = read_part(store, there)
            return bool(rows.equals(table)) and same_footers(path, buffer) and not form_problems(buffer, rows, QUARANTINE_FORM)

        return put_or_adopt(store, name, path, role="quarantine", accepts=says_the_same)[0]


def part_metadata(schema: pa.Schema) -> dict[str, str]:
    """Return the key-value metadata with our prefix of a part's schema, without the prefix and the seal."""
    pairs = {key.decode(errors="replace"): value.decode(errors="replace") for key, value in (schema.metadata or {}).items()}
    return {key.removeprefix(PREFIX): value for key, value in pairs.items() if key.startswith(PREFIX) and key != PREFIX + SEAL}


@contextlib.contextmanager
def _refusal_named(where: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # no space, a quota, a limit on file sizes
        raise disk_error(f"cannot write {where}: {error.strerror or error}; nothing was committed under this name", error) from error


@contextlib.contextmanager
def damage_named(path: object) -> Iterator[None]:
    """DataError that names `path` for what a damaged file raises; errors of the file system stay what they are."""
    try:
        yield
    except (OSError, ValueError, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.errno:  # of the file system; Parquet's own have no number
            raise
        raise DataError(f"{path} is damaged ({error}): restore it, or encode to another URL") from error


def read_part(
    store: Store, ref: FileRef, columns: Sequence[str] | None = None, rows: int | None = None, footer: Footer | None = None
) -> pa.Table:
    """Read columns of a committed part, verifying the checksum of every page; with `footer`, that of the file is not read again.

    DataError if it is damaged or has not so many `rows`, StoreError if it cannot be read.
    """

    def read(path: Path) -> pa.Table:
        return read_parquet(path, rows, columns, footer)

    return _read(store, ref, read)


def read_footer(store: Store, ref: FileRef, sha256: str | None = None) -> Footer:
    """Read the footer of a committed part: schema, rows, statistics.

    DataError if it is damaged (with `sha256`: if it has another hash), StoreError if it cannot be read.
    """

    def read(path: Path) -> Footer:
        with path.open("rb") as file:
            return read_metadata(file, sha256)

    return _read(store, ref, read)


def unrecorded_footer_sha256(store: Store, ref: FileRef) -> str:
    """Return the hash of the footer of a part whose manifest has none (version 1), after comparing the whole file with its sha256."""

    def read(path: Path) -> str:
        with path.open("rb") as file:
            if (found := hashlib.file_digest(file, "sha256").hexdigest()) != ref.sha256:
                raise ValueError(f"it has the sha256 {found[:12]}, the manifest says {ref.sha256[:12]}")
            return footer_sha256(file)

    return _read(store, ref, read)


def _read(store: Store, ref: FileRef, read: Callable[[Path], T]) -> T:
    def once() -> T:
        path = store.local(ref)
        with damage_named(path):
            return read(path)

    return again_if_corrupt(store, ref, once, f"{store.url}/{ref.name}")


def again_if_corrupt(store: Store, ref: FileRef, once: Callable[[], T], where: str) -> T:
    """Return `once()`, which reads the local copy of a file; called again if it fails, or if the copy was corrupt and is fetched again."""
    try:
        return read_again(once, where)
    except DataError:
        if not store.refetch_if_corrupt(ref):
            raise
        return read_again(once, where)
