"""LatentTable: open a table of latents, read it without copies, and trace the lineage of a row.

A reader opens the parts that the manifest names and nothing else; page checksums are verified on every read. Rows are in the order
of the dataset's manifest. One part is returned as a view of Arrow's memory; several are copied, part by part, into one array.

A folder `data/` holds more than a table: parts of a generation that is being written, and those that a later generation has replaced
(until garbage collection). So other readers (DuckDB, Polars, pandas) get the paths that the manifest names from `LatentTable.files`.
A generation whose files were collected has expired: a table that was opened without a number, and of which nothing was read yet,
continues with the newest one; else readers say so.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.fs as pafs
from numpy.typing import NDArray

from aecore.artifact.commit import newest_number
from aecore.artifact.kinds import detect_artifact, other_kind
from aecore.artifact.root import stage_folders
from aecore.data.format.footer import Footer
from aecore.errors import DataError, Hint, counted, did_you_mean
from aecore.store import Store, canonical_json, open_store
from aecore.table.files import PartFiles
from aecore.table.manifest import STEM, TableManifest, TablePart, read_table_manifest
from aecore.table.part import (
    QUARANTINE_SCHEMA,
    Column,
    fixed_size_list,
    has_gaps,
    numpy_view,
    part_metadata,
    read_footer,
    read_part,
    schema_problems,
    unrecorded_footer_sha256,
)

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
KEYS = ("key", "shard", "ordinal")


class LatentTable:
    """An opened latent table, or the part of it that belongs to one split.

    `numpy` gives a view of Arrow's memory where one part holds the rows, else one array filled part by part; `torch` shares it. With
    `split`, only the parts of that are in `parts`. With `pinned`, the generation is never exchanged for a newer one.
    """

    def __init__(self, store: Store, manifest: TableManifest, split: str | None = None, *, pinned: bool = True) -> None:
        self.store = store
        self.split = split
        self._pinned = pinned
        self._open(manifest)

    def _open(self, manifest: TableManifest) -> None:
        self.manifest = manifest
        self.parts = tuple(part for part in manifest.parts if self.split in (None, part.split))
        self.__dict__.pop("schema", None)
        self._footers: dict[str, Footer] = {}
        self._footer_sha256: dict[str, str] = {}

    def __repr__(self) -> str:
        return f"LatentTable({self.store.url!r}, rows={self.num_rows}, parts={len(self.parts)}, columns={list(self.manifest.columns)})"

    def __len__(self) -> int:
        return self.num_rows

    @property
    def url(self) -> str:
        """Address of the table."""
        return self.store.url

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return sum(part.rows for part in self.parts)

    @property
    def metadata(self) -> dict[str, Any]:
        """Lineage, identity, encoded columns and generation, as plain data."""
        manifest = self.manifest
        return {
            "generation": manifest.number,
            "lineage": dict(manifest.lineage),
            "identity": dict(manifest.identity),
            "columns": dict(manifest.columns),
        }

    def files(self) -> list[str]:
        """Return the paths (or `s3://` addresses) of the parts: exactly the rows of this generation, for any Parquet reader."""
        return [f"{self.url}/{part.file.name}" for part in self.parts]

    def quarantine(self) -> pa.Table:
        """Return the samples of this generation that have no row, with the reason; `quarantine/` also has those of replaced parts.

        Those that the dataset itself has in quarantine are not among them: see `Dataset.quarantine`.
        """

        def read() -> pa.Table:
            refused = [(part.quarantine, part.quarantined) for part in self.parts if part.quarantine is not None]
            tables = [read_part(self.store, ref, rows=rows).replace_schema_metadata(None) for ref, rows in refused]
            return pa.concat_tables([QUARANTINE_SCHEMA.remove_metadata().empty_table(), *tables])

        return self._read(read)

    def sql(self, name: str = "latents") -> str:
        """Return the SQL (DuckDB) that makes a view `name` of the rows of this generation, with `split` as a column."""
        paths = ", ".join("'" + re.sub(r"[\[*?]", r"[\g<0>]", path).replace("'", "''") + "'" for path in self.files())
        reading = f"read_parquet([{paths}], union_by_name = true, hive_partitioning = true, hive_types = {{'split': VARCHAR}})"
        return f'CREATE OR REPLACE VIEW "{name.replace(chr(34), chr(34) * 2)}" AS SELECT * FROM {reading};'

    def _read(self, once: Callable[[], T]) -> T:
        """Return what `once` reads; if a file of this generation was removed, from the newest one, unless something was read before.

        DataError if the generation has expired.
        """
        try:
            found = once()
        except DataError as error:
            newest = self._successor()
            if newest is None:
                raise
            if self._pinned:
                raise self._expired(newest) from error
            self._open(read_table_manifest(self.store, newest))
            return self._read(once)
        self._pinned = True
        return found

    def _successor(self) -> int | None:
        """Return the newest generation if there is one after this, and a file of this one is gone."""
        newest = newest_number(self.store, STEM)
        if newest is None or newest <= self.manifest.number:
            return None
        return newest if any(self.store.size(part.file.name) is None for part in self.parts) else None

    def _expired(self, newest: int) -> DataError:
        why = "files that a later one has replaced were removed"
        return DataError(f"{self.url}: generation {self.manifest.number} has expired ({why}): open the newest, which is {newest}")

    @cached_property
    def schema(self) -> pa.Schema:
        """All columns of all parts (an append may add metadata columns); reads the parts' footers."""
        return self._read(self._schema)

    def _schema(self) -> pa.Schema:
        self.store.prefetch([part.file for part in self.parts])
        schemas = [self._footer(part).schema.to_arrow_schema().remove_metadata() for part in self.parts]
        if problems := generation_problems(self.parts, schemas):
            raise DataError(f"{self.url}: {'; '.join(problems)}: restore the part, or encode to another URL")
        return pa.unify_schemas(schemas) if schemas else pa.schema([])

    def _footer(self, part: TablePart) -> Footer:
        """Return the footer of a part, read and compared once; DataError if the file is another part than the manifest names."""
        if part.stem not in self._footers:
            sha256 = part.footer_sha256 or unrecorded_footer_sha256(self.store, part.file)
            footer = read_footer(self.store, part.file, sha256)
            problems = origin_problems(self.manifest, part, footer)
            if problems:
                raise DataError(
                    f"{self.url}/{part.file.name} is another part than the manifest names: {'; '.join(problems)}: restore it, or encode to "
                    "another URL"
                )
            self._footers[part.stem], self._footer_sha256[part.stem] = footer, sha256
        return self._footers[part.stem]

    def schema_of(self, part: TablePart) -> pa.Schema:
        """Return columns and metadata of one part."""
        return self._read_part(part, lambda: self._footer(part).schema.to_arrow_schema())

    def _read_part(self, part: TablePart, once: Callable[[], T]) -> T:
        """Return what `once` reads of a part of this generation, which no other can replace."""
        self._pinned = True
        return self._read(once)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns in the files; `split` is a folder name and comes with `dataset()`."""
        return tuple(self.schema.names)

    def select(self, split: str) -> "LatentTable":
        """Return the table of one split; DataError with the known ones if there is none of that name."""
        known = dict.fromkeys(part.split for part in self.manifest.parts)
        if split not in known:
            raise DataError(f"table {self.url} has no split {split!r}{did_you_mean(split, known)}")
        return LatentTable(self.store, self.manifest, split, pinned=self._pinned)

    def read(self, part: TablePart, columns: Sequence[str] | None = None) -> pa.Table:
        """Read columns of one part as Arrow, verifying the checksum of every page."""
        table = self._read_part(part, lambda: read_part(self.store, part.file, columns, part.rows, self._footer(part)))
        gaps = [name for name in table.column_names if name in (*KEYS, *self.manifest.columns) and has_gaps(table.column(name))]
        if gaps:
            raise DataError(f"{self.url}/{part.file.name} has rows without {', '.join(gaps)}: restore it, or encode to another URL")
        return table

    def _column(self, name: str) -> Iterator[Column]:
        if name not in self.columns:
            raise DataError(f"table {self.url} has no column {name!r}{did_you_mean(name, self.columns)}")
        wanted = self.schema.field(name).type
        for part in self.parts:
            if name in self.manifest.columns or name in self.schema_of(part).names:
                yield self.read(part, [name]).column(name)
            else:  # a metadata column that a later generation added
                yield pa.chunked_array([pa.nulls(part.rows, wanted)])

    def arrow(self, name: str) -> Column:
        """Return one column as Arrow, one chunk per part, nothing copied."""
        chunks = [chunk for column in self._column(name) for chunk in column.chunks]
        return pa.chunked_array(chunks, type=self.schema.field(name).type)

    @property
    def keys(self) -> Column:
        """Keys of the samples in row order."""
        return self.arrow("key")

    def numpy(self, name: str) -> NDArray[Any]:  # any: the column's dtype
        """Return a column as `[N, D]` or `[N]`: read-only without a copy if one part holds it, else one new array."""
        _ = self.schema  # of an expired generation the newest one takes the place
        if name not in self.manifest.columns:
            column: NDArray[Any] = self.arrow(name).to_numpy()
            return column
        if len(self.parts) == 1:
            return numpy_view(next(self._column(name)))
        for part in self.parts:
            self._footer(part)  # compared with the manifest before so much memory is taken
        info = self.manifest.columns[name]
        shape = (self.num_rows, info["dim"]) if info["dim"] else (self.num_rows,)
        out = np.empty(shape, dtype=info["dtype"])
        start = 0
        for part, column in zip(self.parts, self._column(name), strict=True):
            if part.rows:
                out[start : start + part.rows] = numpy_view(column)
            start += part.rows
        return out

    def torch(self, name: str) -> "torch.Tensor":
        """Return a number column as a CPU tensor that shares the memory of `numpy` (clone it before writing to it)."""
        import torch

        array = self.numpy(name)
        if array.flags.writeable:
            return torch.from_numpy(array)
        flat = fixed_size_list(array) if array.ndim == 2 else pa.array(array)
        values: torch.Tensor = torch.from_dlpack(flat.flatten() if array.ndim == 2 else flat)  # type: ignore[attr-defined]  # public, not in __all__
        return values.reshape(array.shape)  # from_numpy warns of read-only memory

    def dataset(self) -> pads.Dataset:
        """Return a `pyarrow.dataset` over the parts, with `split` as a column; pages are checked when it is scanned.

        A scan that meets a damaged page raises pyarrow's own OSError (without errno; its text says CRC): it comes from Arrow's scanner,
        which calls no code of ours between the page and whoever consumes the scan. `read`, `numpy`, `torch` and `verify_table` raise
        DataError with the name of the part, and fetch a damaged copy of a bucket's part again.
        """
        options = pads.ParquetFragmentScanOptions(page_checksum_verification=True)
        form = pads.ParquetFileFormat(default_fragment_scan_options=options)
        schema = self.schema.append(pa.field("split", pa.string()))  # reads all footers
        parts = {f"{self.url}/{part.file.name}": part for part in self.parts}
        footers = {path: self._footer_sha256[part.stem] for path, part in parts.items()}
        handler = PartFiles(self.store, {path: part.file for path, part in parts.items()}, footers, read=self._read)
        files = pafs.PyFileSystem(handler)
        fragments = [form.make_fragment(path, files, pc.field("split") == part.split) for path, part in parts.items()]
        return pads.FileSystemDataset(fragments, schema, form, files)

    def lineage(self, key: str) -> dict[str, Any]:
        """Return the chain of custody of one row: part, shard, dataset, checkpoint, run. DataError if no row has this key.

        Reads the key column of the parts whose key statistics admit the key.
        """
        return self._read(lambda: self._lineage(key))

    def _lineage(self, key: str) -> dict[str, Any]:
        for part in self.parts:
            footer = self._footer(part)
            if not _may_hold(footer, key):
                continue
            table = read_part(self.store, part.file, ["key", "ordinal"], part.rows, footer)
            row = pc.index(table.column("key"), pa.scalar(key, table.schema.field("key").type)).as_py()
            if row >= 0:
                shard = {"split": part.split, "stem": part.shard, "sha256": part.shard_sha256}
                where = {
                    "key": key,
                    "ordinal": table.column("ordinal")[row].as_py(),
                    "part": part.file.name,
                    "part_sha256": part.file.sha256,
                }
                return {**where, "shard": shard, **self.manifest.lineage, "produced_by": part_metadata(footer.schema.to_arrow_schema())}
        raise DataError(f"table {self.url} has no row with the key {key!r}: it may be in quarantine/, or not in the dataset")


def origin_problems(manifest: TableManifest, part: TablePart, footer: Footer) -> list[str]:
    """Return where a part's own metadata contradict the manifest: rows, checkpoint, shard, settings."""
    schema, identity = footer.schema.to_arrow_schema(), manifest.identity
    metadata = part_metadata(schema)
    wanted = {
        "checkpoint_sha256": identity["checkpoint_sha256"],
        "checkpoint_step": str(manifest.lineage["checkpoint"]["step"]),
        "dtype": identity["dtype"],
        "batch": str(identity["batch"]),
        "shard": part.shard,
        "shard_sha256": part.shard_sha256,
        "row_start": str(part.row_start),
        "latent_shape": canonical_json({name: [info["dim"]] for name, info in manifest.columns.items() if info["dim"]}).decode(),
        "seed": None if identity["seed"] is None else str(identity["seed"]),
        "bits": None if identity.get("bits", 1) == 1 else str(identity["bits"]),
        "where": identity.get("where"),
        "index_columns": canonical_json(identity["index_columns"]).decode() if "index_columns" in identity else None,
        "removed_sha256": part.removed_sha256,
        "copied_from": part.copied_from,
    }
    found = [f"it has {counted(footer.num_rows, 'row', 'rows')}, the manifest says {part.rows}"] if footer.num_rows != part.rows else []
    if len(footer.row_groups) > 1:
        found.append(f"it has {len(footer.row_groups)} row groups, expected one")
    found += schema_problems(schema, manifest.columns)
    return found + [
        f"it has {key} {metadata.get(key)!r}, the manifest {value!r}" for key, value in wanted.items() if metadata.get(key) != value
    ]


def generation_problems(parts: Sequence[TablePart], schemas: Sequence[pa.Schema]) -> list[str]:
    """Return which parts have other columns than another part of the same shard: both have those of its index.

    Shards that one claim wrote have the same columns too, but where it compacted those of several generations: no table says which did.
    """
    first: dict[tuple[str, str], tuple[TablePart, pa.Schema]] = {}
    problems = []
    for part, schema in zip(parts, schemas, strict=True):
        other, wanted = first.setdefault((part.split, part.shard), (part, schema))
        if schema.names != wanted.names:
            differing = ", ".join(sorted({*schema.names} ^ {*wanted.names})) or "their order"
            problems.append(f"{part.file.name} has other columns than {other.file.name} ({differing})")
    return problems


def _may_hold(footer: Footer, key: str) -> bool:
    for group in footer.row_groups:
        statistics = group.columns[0].statistics
        if statistics is None or statistics.min is None or statistics.max is None or statistics.min <= key.encode() <= statistics.max:
            return True
    return False


def _newest_of_root(store: Store) -> tuple[Store, int | None]:
    """Return the newest table of a root that was committed, with its newest generation; the place itself, with None, if there is none."""
    found = detect_artifact(store)
    folders = [] if found is None or found.kind != "root" else stage_folders(found.stages, "table")
    for folder in reversed(folders):
        table = open_store(f"{store.url}/{folder}")
        if (newest := newest_number(table, STEM)) is not None:
            return table, newest
    return store, None


def open_table(url: str, number: int | None = None) -> LatentTable:
    """Open the newest generation of the table at `url`, or generation `number`; reads the manifest and nothing else.

    `url` may be the root of a pipeline: its newest table is opened, of the newest run that has one.
    Only parts that the manifest names are seen; a glob over `data/**` also finds those of unfinished and of replaced generations. Of
    those, garbage collection keeps the last ones for some days: DataError from what is read of one that has expired.
    """
    store = open_store(url)
    newest = newest_number(store, STEM)
    if newest is None:
        store, newest = _newest_of_root(store)
    if newest is None:
        other = other_kind(store, "table")
        if other is not None:
            raise other
        if newest_number(store, "run") is not None:
            raise DataError(f"{store.url} holds an unfinished encoding: run the same command again to finish it")
        python = ", or write one with aecore.encoding.job.encode_dataset"
        message = f"{store.url} holds no latent table: check the address{python}"
        raise DataError(message, hint=Hint("no-table", {"url": store.url, "python": python}))
    if number is not None and store.size(f"{STEM}.{number:06d}.json") is None:
        raise DataError(f"{store.url} has no generation {number} (the newest is {newest})")
    return LatentTable(store, read_table_manifest(store, newest if number is None else number), pinned=number is not None)
