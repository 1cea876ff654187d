"""Verify that a latent table matches its manifest, and that it holds every sample of its dataset exactly once.

Without `read_data`: every file exists with its size, footers agree with the manifest (rows, shard, checkpoint, producer), and the
manifest is consistent and follows its parent. With it also: every file's sha256, every page's checksum, all claims, manifests and
records, unique keys, every row belongs to the part's shard. Dataset and checkpoint are compared if they still exist at the URLs of the
lineage: the dataset's generation has the recorded hash, the keys of rows and quarantine together are, shard by shard and in order, the
keys of its indexes, and the checkpoint has the recorded hash. All problems are collected, then raised.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from aecore.artifact.commit import newest_number
from aecore.artifact.documents import problems_of, read_bytes
from aecore.artifact.subset import VerifySubset
from aecore.data.dataset import Dataset, open_dataset
from aecore.data.manifest import ShardRef
from aecore.errors import DataError
from aecore.store import open_store, recorded_url
from aecore.table.manifest import STEM, TablePart
from aecore.table.part import PRODUCER, part_metadata, read_footer, read_part
from aecore.table.table import LatentTable, origin_problems

SHOWN = 20


@dataclass(frozen=True, slots=True)
class TableReport:
    """What was checked: counts of the table, and the dataset and checkpoint it was compared with (None: they no longer exist)."""

    url: str
    generation: int
    parts: int
    num_rows: int
    quarantined: int
    read_data: bool
    dataset: str | None = None
    checkpoint: str | None = None
    slice: str | None = None  # k/n: only the parts of this subset were read
    parts_read: int = 0
    bytes_read: int = 0

    def to_dict(self) -> dict[str, object]:
        """Return plain JSON data."""
        return dataclasses.asdict(self)


def verify_table(
    table: LatentTable, *, read_data: bool = False, dataset_url: str | None = None, only: VerifySubset | None = None
) -> TableReport:
    """Check a table and return the counts.

    Parameters
    ----------
    table : LatentTable
        The table.
    read_data : bool
        Also read every byte.
    dataset_url : str, optional
        The dataset whose indexes are compared, by default that of the lineage if it still exists; the generation is that of the lineage.
    only : VerifySubset, optional
        Read, and compare with the dataset, only the parts of this subset.

    Raises
    ------
    DataError
        If there are problems; the first 20 are spelled out.
    """
    problems: list[str] = []
    keys: list[pa.ChunkedArray[Any]] = []
    dataset = _dataset(table, dataset_url)
    checkpoint = _checkpoint(table, problems)
    problems += _lineage_problems(table, dataset)
    shards = {} if dataset is None else {(shard.split, shard.stem): shard for shard in dataset.manifest.shards}
    chosen = [part for part in table.parts if (read_data if only is None else only.takes(part.stem))]
    stems = {part.stem for part in chosen}
    for part in table.parts:
        read = part.stem in stems
        try:
            problems += _footer_problems(table, part, read)
            if read or (only is None and dataset is not None):
                rows = read_part(table.store, part.file, ["key", "shard", "ordinal"], part.rows)
                keys.append(rows.column("key"))
                problems += _row_problems(table, part, rows, read)
            if dataset is not None and (only is None or read):
                problems += _index_problems(table, part, rows, dataset, shards.get((part.split, part.shard)))
        except DataError as error:
            problems.append(str(error))
    problems += _coverage_problems(table, list(shards.values()))
    if read_data:
        problems += problems_of(table.store)
    if keys and (
        doubled := sum(map(len, keys)) - pc.count_distinct(pa.chunked_array([c for k in keys for c in k.chunks], pa.string())).as_py()
    ):
        problems.append(f"{doubled} rows have a key that another row has too")
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems[:SHOWN])
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise DataError(f"table {table.url} does not match its manifest, {count}:{lines}\nencode to a new URL, or restore the files")
    quarantined = sum(part.quarantined for part in table.parts)
    where = None if dataset is None else dataset.url
    read_bytes = sum(ref.bytes for part in chosen for ref in (part.file, part.quarantine) if ref is not None)
    return TableReport(
        table.url,
        table.manifest.number,
        len(table.parts),
        table.num_rows,
        quarantined,
        read_data,
        where,
        checkpoint,
        slice=None if only is None else str(only),
        parts_read=len(chosen),
        bytes_read=read_bytes,
    )


def _dataset(table: LatentTable, url: str | None) -> Dataset | None:
    lineage = table.manifest.lineage["dataset"]
    if url is None:
        url = recorded_url(lineage["url"], f"the dataset in the lineage of {table.url}")
        if newest_number(open_store(url), "dataset") is None:
            return None  # moved or removed: the table is verified without it
    return open_dataset(url, number=lineage["number"])


def _checkpoint(table: LatentTable, problems: list[str]) -> str | None:
    """Return the URL of the rows' checkpoint, None if it no longer exists; another checkpoint at that URL is a problem."""
    url, wanted = table.manifest.lineage["checkpoint"]["url"], table.manifest.identity["checkpoint_sha256"]
    store = open_store(recorded_url(url, f"the checkpoint in the lineage of {table.url}"))
    if store.size("checkpoint.json") is None:
        return None
    found = hashlib.sha256(read_bytes(store, "checkpoint.json")).hexdigest()
    if found != wanted:
        problems.append(f"{url} is another checkpoint (sha256 {found[:12]}) than the one that made the rows ({wanted[:12]})")
    return str(url)


def _lineage_problems(table: LatentTable, dataset: Dataset | None) -> Iterator[str]:
    manifest, lineage, identity = table.manifest, table.manifest.lineage, table.manifest.identity
    if manifest.parent:
        try:
            parent = hashlib.sha256(read_bytes(table.store, f"{STEM}.{manifest.parent:06d}.json")).hexdigest()
        except DataError as error:
            yield str(error)
        else:
            if parent != manifest.parent_sha256:
                yield f"{table.url}: generation {manifest.number} was added to another generation {manifest.parent} than the stored one"
    made_by, wanted = lineage["checkpoint"]["sha256"], identity["checkpoint_sha256"]
    if made_by != wanted:
        yield f"the lineage names the checkpoint with sha256 {made_by[:12]}, the table's identity the one with {wanted[:12]}"
    if dataset is not None and (found := dataset.manifest.dataset_sha256) != lineage["dataset"]["sha256"]:
        known = lineage["dataset"]["sha256"][:12]
        yield f"generation {dataset.manifest.number} of {dataset.url} has dataset_sha256 {found[:12]}, the lineage names {known}"


def _footer_problems(table: LatentTable, part: TablePart, read_data: bool) -> Iterator[str]:
    name = part.file.name
    for ref in (part.file, part.quarantine):
        if ref is not None:
            table.store.check(ref, verify=read_data)
    footer = read_footer(table.store, part.file)
    metadata = part_metadata(footer.schema.to_arrow_schema())
    yield from (f"{name}: {problem}" for problem in origin_problems(table.manifest, part, footer))
    span = part.row_stop - part.row_start
    if part.rows + part.quarantined != span:
        yield f"{name} has {part.rows} rows and {part.quarantined} quarantined of {span} samples"
    if {key: metadata.get(key) for key in PRODUCER} not in table.manifest.lineage["encoded_by"]:
        yield f"{name} was encoded on {metadata.get('device')!r} with versions that the lineage does not name"


def _row_problems(table: LatentTable, part: TablePart, rows: pa.Table, read_data: bool) -> Iterator[str]:
    if rows.column("shard").unique().to_pylist() not in ([], [part.shard]):
        yield f"{part.file.name} has rows of another shard than {part.shard}"
    if read_data:
        read_part(table.store, part.file, rows=part.rows)  # every page of every column
        refused = 0 if part.quarantine is None else len(read_part(table.store, part.quarantine, rows=part.quarantined))
        if refused != part.quarantined:
            yield f"quarantine of {part.stem} has {refused} rows, the manifest says {part.quarantined}"


def _index_problems(table: LatentTable, part: TablePart, rows: pa.Table, dataset: Dataset, shard: ShardRef | None) -> Iterator[str]:
    if shard is None or shard.tar.sha256 != part.shard_sha256:
        yield f"{part.file.name} was encoded from a shard {part.shard} (sha256 {part.shard_sha256[:12]}) that the dataset does not have"
        return
    index = dataset.reader(shard).index.select(["key", "ordinal"]).slice(part.row_start, part.row_stop - part.row_start)
    if part.quarantine is not None:
        refused = read_part(table.store, part.quarantine, ["key"], part.quarantined).column("key")
        index = index.filter(pc.invert(pc.is_in(index.column("key"), value_set=refused.combine_chunks())))
    for column in ("key", "ordinal"):
        if index.column(column).to_pylist() != rows.column(column).to_pylist():
            yield f"{part.file.name}: the {column}s differ from those in {shard.index.name}"


def _coverage_problems(table: LatentTable, shards: Sequence[ShardRef]) -> Iterator[str]:
    spans: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for part in table.manifest.parts:
        spans.setdefault((part.split, part.shard), []).append((part.row_start, part.row_stop))
    for (split, shard), found in spans.items():
        starts = [0, *(stop for _, stop in sorted(found))]
        if [start for start, _ in sorted(found)] != starts[:-1]:
            yield f"the parts of shard {split}/{shard} overlap or leave rows out: {sorted(found)}"
    for ref in shards:
        covered = max((stop for _, stop in spans.get((ref.split, ref.stem), [])), default=-1)
        if covered != ref.samples:
            yield f"shard {ref.split}/{ref.stem} has {ref.samples} samples, the table covers {max(covered, 0)} of them"
