"""Verify that a latent table matches its manifest, and that it holds every sample of its dataset exactly once.

Without `read_data`: every file exists with its size, footers agree with the manifest (rows, shard, checkpoint, producer), and the
manifest is consistent and follows its parent. With it also: every file's sha256, every page's checksum, the form that aecore gives its
files, all claims, manifests, records and metadata of parts against each other, unique keys, finite values, every row belongs to the part's
shard. Dataset and checkpoint are compared if they still exist at the URLs of the lineage: the dataset's generation has the recorded hash,
the keys of rows and quarantine together are, shard by shard and in order, the keys of its indexes (with `read_data` all columns that come
from there are compared), and the checkpoint has the recorded hash and settings. All problems are collected, then raised.
"""

import dataclasses
import hashlib
import itertools
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from aecore.artifact.commit import newest_number
from aecore.artifact.documents import (
    CLAIM,
    Document,
    disagreement,
    guarded,
    parse_json,
    read_all,
    read_bytes,
    read_document,
    read_json,
    typed,
)
from aecore.artifact.subset import VerifySubset
from aecore.artifact.unnamed import unnamed_problems
from aecore.data.dataset import Dataset, open_dataset
from aecore.data.format.decode import preprocessing_hash
from aecore.data.format.footer import Footer
from aecore.data.format.form import form_problems
from aecore.data.format.index import column_problems
from aecore.data.manifest import ShardRef
from aecore.data.read.where import parse_where
from aecore.errors import DataError, counted
from aecore.store import FileRef, canonical_json, open_store, recorded_url, sha256_json
from aecore.table.manifest import ALL, STEM, TableManifest, TablePart, read_table_manifest, table_manifest_of
from aecore.table.part import (
    PART_FORM,
    PRODUCER,
    QUARANTINE_FORM,
    QUARANTINE_SCHEMA,
    SEAL,
    Column,
    has_gaps,
    numpy_view,
    part_metadata,
    passed_columns,
    read_footer,
    read_part,
    seal_in,
    seal_of,
)
from aecore.table.table import KEYS, LatentTable, generation_problems, origin_problems

logger = logging.getLogger(__name__)
SHOWN = 20
CHECKPOINT = "checkpoint.json"
Heirs = Mapping[tuple[str, str | None], str | None]  # split and stem of a shard that was retired -> the one that took its place
KL_TOLERANCE = {"float32": 1e-3, "float16": 2e-2}  # of kl, which is computed in float32 before mu and log_var are rounded


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
    table: LatentTable,
    *,
    read_data: bool = False,
    dataset_url: str | None = None,
    run_url: str | None = None,
    only: VerifySubset | None = None,
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
    run_url : str, optional
        The run that the table has to belong to; by default its checkpoint is compared if it still is where it was.
    only : VerifySubset, optional
        Read, and compare with the dataset, only the parts of this subset.

    Raises
    ------
    DataError
        If there are problems; the first 20 are spelled out.
    """
    problems: list[str] = []
    keys: list[pa.ChunkedArray[Any]] = []
    try:
        dataset = _dataset(table, dataset_url)
    except DataError as error:
        dataset = None
        problems.append(str(error))
    checkpoint = _checkpoint_url(table, run_url)
    found = itertools.chain(_run_problems(table, run_url), _checkpoint_problems(table, checkpoint, verify=read_data or only is not None))
    problems += guarded(f"{table.url}: its lineage", found)
    elsewhere = len(problems)
    problems += guarded(table.url, _lineage_problems(table, dataset))
    shards = {} if dataset is None else {(shard.split, shard.stem): shard for shard in dataset.manifest.shards}
    chosen = [part for part in table.parts if (read_data if only is None else only.takes(part.stem))]
    stems = {part.stem for part in chosen}
    sources = _sources(table) if any(part.copied_from is not None for part in chosen) else {}
    heirs: Heirs | None = None if dataset is None else {(part.split, part.stem): part.by for part in dataset.manifest.retired}
    footers: dict[str, Footer] = {}
    for part in table.parts:
        read = part.stem in stems
        try:
            problems += guarded(part.file.name, _footer_problems(table, part, read, footers))
            if read or (only is None and dataset is not None):
                rows = read_part(table.store, part.file, None if read else list(KEYS), part.rows)
                keys.append(rows.column("key"))
                problems += guarded(part.file.name, _row_problems(table, part, rows, read))
            if dataset is not None and (only is None or read):
                shard = shards.get((part.split, part.shard))
                problems += guarded(part.file.name, _index_problems(table, part, rows, dataset, shard, read))
            if read:
                problems += guarded(part.file.name, _copy_problems(table, part, rows, sources, heirs))
        except DataError as error:
            problems.append(str(error))
    problems = [*_foreign(table), *problems, *guarded(table.url, _unnamed_problems(table))]
    problems += _coverage_problems(table, [ref for ref in shards.values() if table.manifest.identity.get("split", "") in ("", ref.split)])
    known = [part for part in table.parts if part.stem in footers]
    problems += generation_problems(known, [footers[part.stem].schema.to_arrow_schema() for part in known])
    if read_data:
        documents, damaged = read_all(table.store)
        problems += [problem for problem in (*damaged, *_document_problems(table, documents, footers, heirs)) if problem not in problems]
    if chosen and dataset is None:
        logger.warning(
            "%s: there is no dataset at %s, so keys, labels and metadata columns were not compared with the samples: say where it is now",
            table.url,
            table.manifest.lineage["dataset"]["url"],
        )
    if keys and (
        doubled := sum(map(len, keys)) - pc.count_distinct(pa.chunked_array([c for k in keys for c in k.chunks], pa.string())).as_py()
    ):
        problems.append(counted(doubled, "row has a key that another row has too", "rows have a key that another row has too"))
    _require_none(table, problems, elsewhere)
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


def _require_none(table: LatentTable, problems: Sequence[str], elsewhere: int) -> None:
    """DataError if there are problems, of which the first `elsewhere` are not of the table's own files."""
    if not problems:
        return
    lines = "".join(f"\n  {problem}" for problem in problems[:SHOWN])
    own = "encode to a new URL, or restore the files"
    remedy = own if len(problems) > elsewhere else "nothing is wrong with the table's own files"
    raise DataError(f"table {table.url} does not match its manifest, {counted(len(problems), 'problem', 'problems')}:{lines}\n{remedy}")


def _dataset(table: LatentTable, url: str | None) -> Dataset | None:
    lineage = table.manifest.lineage["dataset"]
    if url is None:
        url = recorded_url(lineage["url"], f"the dataset in the lineage of {table.url}")
        if newest_number(open_store(url), "dataset") is None:
            return None  # moved or removed: the table is verified without it
    return open_dataset(url, number=lineage["number"])


def _foreign(table: LatentTable) -> Iterator[str]:
    """Yield that the manifest is not of this table, if no claim has its identity: then all that it names seems to be damaged."""
    wanted, last = table.manifest.claim_sha256, newest_number(table.store, "run") or 0
    claims = [name for number in range(last, 0, -1) if table.store.size(name := f"run.{number:06d}.json") is not None]
    if wanted is None or not claims:
        return
    for name in claims:  # the newest made it, mostly
        try:
            if sha256_json(read_json(table.store, name)["identity"]) == wanted:
                return
        except DataError as error:
            yield str(error)
            return
    where = f"{table.url}/{STEM}.{table.manifest.number:06d}.json"
    yield (
        f"{where}: claim_sha256 is {wanted[:12]}, which no claim has: it belongs to another table, or {', '.join(sorted(claims))} was "
        "changed or removed; restore the right one"
    )


def _unnamed_problems(table: LatentTable) -> Iterator[str]:
    """Yield the Parquet files that no manifest names and that a pattern over the folder would read as well."""
    manifests = [table.manifest, *_manifests(table)]
    committed = {(manifest.claim_sha256, manifest.lineage["dataset"]["sha256"]) for manifest in manifests}

    def is_of_attempt(claim: Mapping[str, Any], number: int, stem: str) -> bool:  # any: plain JSON data
        covers, again = claim["info"]["lineage"]["dataset"]["sha256"], re.search(r"-t(\d{6})$", stem)
        own = {(sha256_json(claim["identity"]), covers), (None, covers)}  # version 1 stated no hash of the claim
        return not own & committed and (again is None or int(again[1]) == number)

    named = (ref for manifest in manifests for ref in manifest.files)  # what a later one has replaced is there until it is collected
    yield from unnamed_problems(table.store, {"data": (".parquet",), "quarantine": (".parquet",)}, named, is_of_attempt)


def _manifests(table: LatentTable) -> list[TableManifest]:
    """Return the other generations of a table that can be read."""
    found = []
    for number in range(1, (newest_number(table.store, STEM) or 0) + 1):
        if number != table.manifest.number and table.store.size(f"{STEM}.{number:06d}.json") is not None:
            try:
                found.append(read_table_manifest(table.store, number))
            except DataError as error:
                logger.warning("%s", error)
    return found


def _sources(table: LatentTable) -> dict[str, TablePart]:
    """Return sha256 -> part of every part that a generation before this one names."""
    return {part.file.sha256: part for manifest in _manifests(table) if manifest.number < table.manifest.number for part in manifest.parts}


def _left_to(part: TablePart, heirs: Heirs | None) -> set[str | None]:
    """Return the shards that have had what was live of a part's shard (None: nothing was), as far as the dataset says it."""
    found: list[str | None] = [part.shard]
    while heirs is not None and (part.split, found[-1]) in heirs:
        found.append(heirs[part.split, found[-1]])
    return {*found}


def _copy_problems(
    table: LatentTable, part: TablePart, rows: pa.Table, sources: Mapping[str, TablePart], heirs: Heirs | None
) -> Iterator[str]:
    """Yield where a part is not what it says it was copied from, as far as that is still there."""
    if part.copied_from is None:
        return
    source, name = sources.get(part.copied_from), part.file.name
    if source is None:
        yield f"{name} states that it was copied from a part with the sha256 {part.copied_from[:12]}, which no generation before names"
        return
    if source.split != part.split or (heirs is not None and part.shard not in _left_to(source, heirs)):
        yield f"{name} states that it was copied from {source.file.name}, which is of another shard"
        return
    if table.store.size(source.file.name) is None:
        return  # it was collected
    table.store.check(source.file, verify=True)
    there = read_part(table.store, source.file, ["ordinal", *table.manifest.columns], source.rows)
    places = pc.index_in(rows["ordinal"], value_set=there["ordinal"].combine_chunks())
    if places.null_count:
        yield f"{name} has rows that {source.file.name}, from which it was copied, does not have"
        return
    for column in table.manifest.columns:
        if not there[column].take(places.cast(pa.int64())).combine_chunks().equals(rows[column].combine_chunks()):
            yield f"{name}: the values of {column} differ from those in {source.file.name}, from which it was copied"


def _checkpoint_url(table: LatentTable, run_url: str | None) -> str | None:
    """Return where the rows' checkpoint is: below `run_url` if that is given, else where it was; None if there is none."""
    stated: str = table.manifest.lineage["checkpoint"]["url"]
    if run_url is None:
        stated = recorded_url(stated, f"the checkpoint in the lineage of {table.url}")
    else:
        inside = re.search(r"/(?:model|checkpoints/[^/]+)$", stated)
        is_model = open_store(run_url).size(CHECKPOINT) is not None  # the model alone stands where the run was
        stated = run_url if is_model else f"{run_url}{inside[0] if inside else '/model'}"
    if open_store(stated).size(CHECKPOINT) is not None:
        return stated
    logger.warning("%s: the checkpoint that made the rows is not at %s: it was not checked", table.url, stated)
    return None


def _run_problems(table: LatentTable, run_url: str | None) -> Iterator[str]:
    """Yield that a run is not the one whose checkpoint made the rows."""
    made_by = table.manifest.lineage["checkpoint"]["info"].get("run_sha256")
    if run_url is None or made_by is None or (store := open_store(run_url)).size(CLAIM) is None:
        return
    try:
        own = sha256_json(read_json(store, CLAIM)["identity"])
    except DataError as error:
        yield str(error)
        return
    if own != made_by:
        yield f"the table was made by another run (run_sha256 {made_by[:12]}) than {run_url} is ({own[:12]}): restore that run beside it"


def _checkpoint_problems(table: LatentTable, url: str | None, *, verify: bool) -> Iterator[str]:
    """Yield that the checkpoint at an address is damaged, or another one than the rows', or not what the manifest says of it."""
    if url is None:
        return
    stated, identity, store = table.manifest.lineage["checkpoint"], table.manifest.identity, open_store(url)
    wanted = identity["checkpoint_sha256"]
    try:
        content, written = read_document(store, CHECKPOINT)
        if (found := hashlib.sha256(written).hexdigest()) != wanted:
            yield f"{url} is another checkpoint (sha256 {found[:12]}) than the one that made the rows ({wanted[:12]})"
            return
        right = {name: content[name] for name in ("step", "info")}
        if differences := disagreement({"step": stated["step"], "info": stated["info"]}, right):
            yield f"the lineage does not say what {url} does: {differences}"
        for ref in (typed(FileRef, file) for file in content["files"]):
            try:
                store.check(ref, verify=verify)
            except DataError as error:
                yield str(error)
        config = read_json(store, "config.json")
    except DataError as error:
        yield str(error)
        return
    preprocessing = {"transform": config["transform"], "input_shape": config["input_shape"]}
    if differences := disagreement(identity["preprocessing"], preprocessing):
        yield f"the table's preprocessing is not that of {url}: {differences}"


def _lineage_problems(table: LatentTable, dataset: Dataset | None) -> Iterator[str]:
    manifest, lineage = table.manifest, table.manifest.lineage
    if manifest.parent:
        try:
            parent = hashlib.sha256(read_bytes(table.store, f"{STEM}.{manifest.parent:06d}.json")).hexdigest()
        except DataError as error:
            yield str(error)
        else:
            if parent != manifest.parent_sha256:
                yield f"{table.url}: generation {manifest.number} was added to another generation {manifest.parent} than the stored one"
    made_by, wanted = lineage["checkpoint"]["sha256"], manifest.identity["checkpoint_sha256"]
    if made_by != wanted:
        yield f"the lineage names the checkpoint with sha256 {made_by[:12]}, the table's identity the one with {wanted[:12]}"
    if dataset is not None and (found := dataset.manifest.dataset_sha256) != lineage["dataset"]["sha256"]:
        known = lineage["dataset"]["sha256"][:12]
        yield f"generation {dataset.manifest.number} of {dataset.url} has dataset_sha256 {found[:12]}, the lineage names {known}"


def _footer_problems(table: LatentTable, part: TablePart, read_data: bool, footers: dict[str, Footer]) -> Iterator[str]:
    """Yield where files and footer of a part contradict the manifest; the footer is added to `footers`."""
    name = part.file.name
    for ref in (part.file, part.quarantine):
        if ref is not None:
            table.store.check(ref, verify=read_data)
    footer = footers[part.stem] = read_footer(table.store, part.file, part.footer_sha256)
    schema = footer.schema.to_arrow_schema()
    yield from (f"{name}: {problem}" for problem in origin_problems(table.manifest, part, footer))
    span = part.row_stop - part.row_start
    chosen = "where" in table.manifest.identity  # how many is compared with the index
    if part.rows + part.quarantined > span or (part.rows + part.quarantined < span and not chosen):
        yield f"{name} has {counted(part.rows, 'row', 'rows')} and {part.quarantined} quarantined of {counted(span, 'sample', 'samples')}"
    metadata = part_metadata(schema)
    if {key: metadata.get(key) for key in PRODUCER} not in table.manifest.lineage["encoded_by"]:
        yield f"{name} was encoded on {metadata.get('device')!r} with versions that the lineage does not name"
    if read_data:
        yield from (f"{name}: {problem}" for problem in _metadata_problems(table.manifest, schema))


def _metadata_problems(manifest: TableManifest, schema: pa.Schema) -> Iterator[str]:
    """Yield what a part's metadata say of settings and producer that is not so in the manifest or in themselves."""
    metadata, seal, preprocessing = part_metadata(schema), seal_in(schema), manifest.identity["preprocessing"]
    if seal is not None and seal != seal_of(metadata):
        yield f"its {SEAL} is {seal[:12]}, device, threads and versions have {seal_of(metadata)[:12]}"
    try:
        config, versions = parse_json(metadata["config"]), parse_json(metadata["versions"])
        right = preprocessing_hash(preprocessing["transform"], versions["decoder"])
        stated = {"transform": config["transform"], "input_shape": config["input_shape"]}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        yield f"its metadata cannot be read ({error!r})"
        return
    if differences := disagreement(stated, preprocessing):
        yield f"its config is not of the table's preprocessing: {differences}"
    if (found := metadata.get("preprocessing_sha256")) != right:
        yield f"it has preprocessing_sha256 {found!r}, transform and decoder have {right!r}"


def _row_problems(table: LatentTable, part: TablePart, rows: pa.Table, read_data: bool) -> Iterator[str]:
    """Yield where the rows of a part, and with `read_data` its values, its form and its quarantine, are not what an encoder writes."""
    name = part.file.name
    if rows.column("shard").unique().to_pylist() not in ([], [part.shard]):
        yield f"{name} has rows of another shard than {part.shard}"
    if not read_data:
        return
    yield from (f"{name}: {problem}" for problem in form_problems(table.store.local(part.file), rows, PART_FORM))
    values = {column: rows.column(column) for column in table.manifest.columns if column in rows.column_names}
    gaps = [column for column in (*KEYS, *values) if has_gaps(rows.column(column))]
    if gaps:
        yield f"{name} has rows without {', '.join(gaps)}"
    elif part.rows:
        yield from (f"{name}: {problem}" for problem in _value_problems({column: _numbers(found) for column, found in values.items()}))
    if part.quarantine is None:
        return
    where = part.quarantine.name
    refused = read_part(table.store, part.quarantine, rows=part.quarantined)
    yield from (f"{where}: {problem}" for problem in column_problems(refused.schema, QUARANTINE_SCHEMA))
    yield from (f"{where}: {problem}" for problem in form_problems(table.store.local(part.quarantine), refused, QUARANTINE_FORM))
    if "shard" in refused.column_names and refused.column("shard").unique().to_pylist() != [part.shard]:
        yield f"{where} has rows of another shard than {part.shard}"


def _numbers(column: Column) -> NDArray[Any]:  # any: the column's dtype
    """Return the numbers of a column without gaps as `[n]` or `[n, D]`."""
    return numpy_view(column if column.num_chunks == 1 else pa.chunked_array([pa.concat_arrays(column.chunks)]))


def _value_problems(columns: Mapping[str, NDArray[Any]]) -> Iterator[str]:  # any: float32, float16 or int32
    """Yield the encoded columns with values that no encoder writes, and a divergence that is not that of mu and log_var."""
    for name, values in columns.items():
        good = np.isfinite(values).all() if values.dtype.kind == "f" else (values >= 0).all()
        if not good:
            yield f"its column {name} has values that are {'not finite' if values.dtype.kind == 'f' else 'below 0'}"
            return
    if not {"mu", "log_var", "kl"} <= columns.keys() or columns["mu"].shape != columns["log_var"].shape:
        return
    mu, log_var = (columns[name].astype(np.float32, copy=False) for name in ("mu", "log_var"))
    with np.errstate(over="ignore", invalid="ignore"):
        terms = np.exp(log_var)
        terms -= log_var
        terms += mu * mu
        right = 0.5 * (np.einsum("nd->n", terms) - mu.shape[1])
        tolerance = KL_TOLERANCE[columns["mu"].dtype.name] * (1 + np.abs(right))
        wrong = np.flatnonzero(~(np.abs(columns["kl"] - right) <= tolerance) & np.isfinite(right))
    if len(wrong):
        row = int(wrong[0])
        yield f"its column kl is not that of mu and log_var: {columns['kl'][row]:g} instead of {right[row]:g} in row {row}"


def _index_problems(
    table: LatentTable, part: TablePart, rows: pa.Table, dataset: Dataset, shard: ShardRef | None, read_data: bool
) -> Iterator[str]:
    """Yield where rows, and with `read_data` their metadata columns and the quarantine, are not what the shard's index says."""
    name = part.file.name
    if shard is None or shard.tar.sha256 != part.shard_sha256:
        yield f"{name} was encoded from a shard {part.shard} (sha256 {part.shard_sha256[:12]}) that the dataset does not have"
        return
    removal = None if shard.removed is None else shard.removed.content_sha256
    if removal != part.removed_sha256:
        stated, right = ("none" if each is None else each[:12] for each in (part.removed_sha256, removal))
        yield f"{name} follows the removal {stated} of its shard, the dataset has {right}"
        return
    index = dataset.index(shard).slice(part.row_start, part.row_stop - part.row_start)
    identity = table.manifest.identity
    if "where" in identity:
        index = index.filter(pa.array(parse_where(identity["where"]).mask(index)))
    if part.quarantine is not None:
        refused = read_part(table.store, part.quarantine, None, part.quarantined)
        is_refused = pc.is_in(index.column("key"), value_set=refused.column("key").combine_chunks())
        expected = index.filter(is_refused)
        if read_data and any(not refused.column(column).equals(expected.column(column)) for column in ("key", "ordinal", "sha256")):
            yield f"{part.quarantine.name}: keys, ordinals or hashes differ from those in {shard.index.name}"
        index = index.filter(pc.invert(is_refused))
    columns = passed_columns(index if read_data else index.select(["key", "ordinal"]), table.manifest.index_columns)
    for column, values in columns.items():
        if column not in rows.column_names:
            yield f"{name} has no column {column!r}, which {shard.index.name} has"
        elif not _same(rows.column(column), values):
            yield f"{name}: the {column}s differ from those in {shard.index.name}"
    if not read_data:
        return
    extra = [column for column in rows.column_names if column not in {*columns, "shard", *table.manifest.columns}]
    if extra:
        yield f"{name} has columns {', '.join(map(repr, extra))}, which neither {shard.index.name} nor the encoding has"
    if (found := part_metadata(rows.schema).get("index_content_sha256")) != shard.index_content_sha256:
        yield f"{name} has index_content_sha256 {found!r}, its shard {shard.index_content_sha256!r}"


def _same(found: Column, right: Column) -> bool:
    """Return whether two columns are equal; missing numbers (NaN) are."""
    if found.equals(right) or not (pa.types.is_floating(right.type) and found.type == right.type and found.null_count == right.null_count):
        return bool(found.equals(right))
    return bool(np.array_equal(found.to_numpy(), right.to_numpy(), equal_nan=True))


def _document_problems(
    table: LatentTable, documents: Mapping[str, Document], footers: Mapping[str, Footer], heirs: Heirs | None
) -> Iterator[str]:
    """Yield where claims, records, manifests and the metadata of parts contradict each other."""
    schemas = {stem: footer.schema.to_arrow_schema() for stem, footer in footers.items()}
    manifests = dict[int, TableManifest]()
    for name, document in sorted(documents.items()):
        if name.startswith(f"{STEM}."):
            where = f"{table.url}/{name}"
            try:
                manifest = table_manifest_of(document.content, where)
            except DataError as error:
                yield str(error)
                continue
            parent = manifests.get(manifest.parent)
            manifests[manifest.number] = manifest
            if parent is not None and manifest.parent_sha256 != documents[f"{STEM}.{manifest.parent:06d}.json"].sha256:
                yield f"{where}: generation {manifest.number} was added to another generation {manifest.parent} than the stored one"
            found = (f"{where}: {problem}" for problem in _generation_problems(parent, manifest, documents, schemas, heirs))
            yield from guarded(where, found)
    for part in table.parts:
        name = f"records/{part.stem}.json"
        if name in documents:
            where = f"{table.url}/{name}"
            found = (f"{where}: {problem}" for problem in _record_problems(part, documents[name], schemas.get(part.stem)))
            yield from guarded(where, found)


def _generation_problems(
    parent: TableManifest | None,
    manifest: TableManifest,
    documents: Mapping[str, Document],
    schemas: Mapping[str, pa.Schema],
    heirs: Heirs | None,
) -> Iterator[str]:
    """Yield where a generation is not its parent's, its claim's or its parts'."""
    old = () if parent is None else parent.parts
    if parent is not None:
        same = {**manifest.identity, "index_columns": parent.identity.get("index_columns")}  # columns may be added
        if differences := disagreement(same, {"index_columns": None, **parent.identity}):
            yield f"its identity is not that of generation {parent.number}: {differences}"
        if lost := [name for name in parent.index_columns if name not in manifest.index_columns and ALL not in manifest.index_columns]:
            yield f"it lacks the columns {', '.join(lost)} of generation {parent.number}"
    yield from _succession_problems(old, manifest, heirs)
    run, checkpoint = manifest.lineage["run"], manifest.lineage["checkpoint"]["url"]
    if run != checkpoint.removesuffix("/model"):
        yield f"its lineage names the run {run!r} and a checkpoint at {checkpoint!r}"
    claims = {name: document.content for name, document in documents.items() if name.startswith("run.")}
    if manifest.claim_sha256 is not None and claims:
        made = [(name, claim) for name, claim in claims.items() if sha256_json(claim["identity"]) == manifest.claim_sha256]
        if not made:
            yield f"claim_sha256 is {manifest.claim_sha256[:12]}, which no claim has: {', '.join(sorted(claims))} was changed or removed"
        for name, claim in made:
            if differences := disagreement(*map(_without_urls, (claim["info"].get("lineage", {}), manifest.lineage))):
                yield f"{name} says another lineage: {differences}"
    if all(part.stem in schemas for part in manifest.parts):
        producers = ({key: part_metadata(schemas[part.stem]).get(key) for key in PRODUCER} for part in manifest.parts)
        unique = {canonical_json(producer): producer for producer in producers}
        if differences := disagreement(manifest.lineage["encoded_by"], [unique[key] for key in sorted(unique)]):
            yield f"its lineage does not name what its parts say they were encoded by: {differences}"


def _succession_problems(old: Sequence[TablePart], manifest: TableManifest, heirs: Heirs | None) -> Iterator[str]:
    """Yield where a generation neither names a part of its parent nor a copy of it; of a shard without live samples it need not."""
    copies = {part.copied_from: part for part in manifest.parts}
    named = {part.stem: part for part in manifest.parts}
    for part in old:
        copy = copies.get(part.file.sha256)
        if named.get(part.stem) == part:
            continue
        left = _left_to(part, heirs)
        if copy is None and (heirs is None or None in left) and part.shard not in {each.shard for each in manifest.parts}:
            continue
        if copy is None or copy.split != part.split or (heirs is not None and copy.shard not in left):
            yield f"it does not name the parts of generation {manifest.parent} as that one does, nor copies of them: {part.stem}"
            return


def _without_urls(lineage: Mapping[str, Any]) -> dict[str, Any]:  # any: plain JSON data
    """Return checkpoint and dataset of a lineage without their addresses, which may have changed since a claim."""
    parts = {name: lineage.get(name, {}) for name in ("checkpoint", "dataset")}
    return {name: {key: value for key, value in part.items() if key != "url"} for name, part in parts.items()}


def _record_problems(part: TablePart, document: Document, schema: pa.Schema | None) -> Iterator[str]:
    """Yield what a record says that its part, or the metadata of that, do not."""
    record, detail = document.content, document.content["detail"]
    files = [ref for ref in (part.file, part.quarantine) if ref is not None]
    names = ("split", "shard", "shard_sha256", "row_start", "row_stop", "footer_sha256", "removed_sha256", "copied_from")
    where = {name: getattr(part, name) for name in names}
    right = {"rows": part.rows, "quarantined": part.quarantined, "files": [dataclasses.asdict(ref) for ref in files], "detail": where}
    stated = {**{name: record[name] for name in right}, "detail": {name: detail.get(name) for name in where}}
    if schema is not None:
        metadata = part_metadata(schema)
        if document.is_sealed and seal_in(schema) is None:  # version 1 sealed neither
            yield f"{part.file.name} has no {SEAL}, which its writer gave it"
        chosen = detail.get("index_columns")
        stated["detail"]["index_columns"] = None if chosen is None else canonical_json(chosen).decode()
        where["index_columns"] = metadata.get("index_columns")
        for name in ("checkpoint_sha256", "index_content_sha256"):
            stated["detail"][name], where[name] = detail.get(name), metadata.get(name)
        stated["detail"]["encoded_by"], where["encoded_by"] = detail.get("encoded_by"), {name: metadata.get(name) for name in PRODUCER}
    if differences := disagreement(stated, right):
        yield f"it does not say what the manifest and the part do: {differences}"


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
        if covered != ref.live:
            samples = counted(ref.live, "sample", "samples")
            yield f"shard {ref.split}/{ref.stem} has {samples}, the table covers {max(covered, 0)} of them"
