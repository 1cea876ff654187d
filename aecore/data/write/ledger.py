"""The ledger of a dataset that follows its source: what is known of every live sample, so that the next run reads only what changed.

Each generation commits, as its listing, the rows of samples that are new and of those whose state or origin was renewed. Of several rows
of one (split, ordinal) the newest counts; what removal files name counts no more. Listings of datasets that only grew have no more than
key, source and bytes: indexes, quarantines and claims complete them. All columns are Arrow's: no sample is a Python object here.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray

from aecore.artifact.commit import PartRecord, claim_of
from aecore.artifact.documents import read_json
from aecore.data.format.index import (
    INDEX_SCHEMA,
    LEDGER_SCHEMA,
    LISTING_SCHEMA,
    QUARANTINE_SCHEMA,
    REMOVED_SCHEMA,
    SOURCE_SHA256,
    make_table,
    read_mapped,
    read_table,
)
from aecore.data.format.spill import filtered, gathered, is_large, narrow, slices, take_rows
from aecore.data.manifest import DatasetManifest, RejectedPart, ShardRef, claim_of_listing
from aecore.data.removal import LEFT_OUT, read_removed
from aecore.data.sources import origin_of_url
from aecore.data.write.spec import ShardTask
from aecore.errors import DataError
from aecore.native.texts import Texts
from aecore.store import FileRef, Store
from aecore.threads import map_ordered

pc: Any = pyarrow.compute  # any: pyarrow's stubs know no types of values
Column = Any  # any: as above
MOST_LISTINGS = 16  # of a manifest; more are merged into the new one
READERS = 16  # files that are read at a time
REMOVED_PLACES = REMOVED_SCHEMA.insert(0, pa.field("split", pa.string()))
_SLICE = 1 << 16  # rows that are hashed at a time


def read_ledger(store: Store, manifest: DatasetManifest) -> pa.Table:
    """Return what is known of every live sample, quarantined ones too, as a table of `LEDGER_SCHEMA`, by split and ordinal; verified."""
    return read_known(store, manifest)[0]


def read_known(store: Store, manifest: DatasetManifest) -> tuple[pa.Table, pa.Table]:
    """Return the ledger, and what is known of the samples that were left out since another one has their content.

    The latter are rows of stored samples that were removed as `duplicate` or `leak`. A later row without `sample_sha256` says of such a one
    that its source is gone, or that it was written again.
    """
    large = is_large(sum(part.planned for part in manifest.parts))
    listings = [*map_ordered(lambda ref: (ref, read_listing(store, ref, large=large)), manifest.listings, threads=1 if large else READERS)]
    before = [(claim_of_listing(ref), table) for ref, table in listings if table.schema.equals(LISTING_SCHEMA)]
    newer = [table for _, table in listings if table.schema.equals(LEDGER_SCHEMA)]
    ledger = pa.concat_tables([*([_completed(store, manifest, dict(before))] if before else []), *newer])
    removed = removed_rows(store, manifest.parts)
    left_out = removed.filter(pc.is_in(removed["reason"], value_set=pa.array(LEFT_OUT)))
    return newest_rows(ledger, removed), _rows_at(ledger, left_out)


def _rows_at(ledger: pa.Table, places: pa.Table) -> pa.Table:
    """Return the newest row of each of these (split, ordinal) that says what is stored there."""
    if not len(places):
        return LEDGER_SCHEMA.empty_table()
    splits = pc.unique(ledger["split"])
    rows = newest_rows(filtered(ledger, np.isin(_places(ledger, splits), _places(places, splits))), REMOVED_PLACES.empty_table())
    return rows.filter(pc.is_valid(rows["sample_sha256"]))


def read_listing(store: Store, ref: FileRef, *, large: bool = False) -> pa.Table:
    """Return a listing of either version, without metadata, mapped if it is `large`; DataError if its columns are those of none."""
    if large:
        store.check(ref, verify=True)
        table = read_mapped(store.local(ref), f"{store.url}/{ref.name}")
    else:
        table = read_table(store.read(ref.name, ref=ref), f"{store.url}/{ref.name}")
    schema = LEDGER_SCHEMA if "ordinal" in table.column_names else LISTING_SCHEMA
    if not table.schema.remove_metadata().equals(schema):
        raise DataError(
            f"{store.url}/{ref.name} has the columns {', '.join(table.column_names)}, expected {', '.join(schema.names)}: restore it"
        )
    return table.replace_schema_metadata(None)


def removed_rows(store: Store, parts: Sequence[ShardRef | RejectedPart]) -> pa.Table:
    """Return split, ordinal, key and reason of all that is removed of these parts."""
    found = map_ordered(lambda part: (part, read_removed(store, part)), parts, threads=READERS)
    tables = [place_removed(part, table) for part, table in found if table is not None]
    return pa.concat_tables(tables) if tables else REMOVED_PLACES.empty_table()


def place_removed(part: ShardRef | RejectedPart, removed: pa.Table) -> pa.Table:
    """Return the rows of a removal file with the split of its part."""
    splits = pa.array([part.split] * len(removed), pa.string())
    return removed.replace_schema_metadata(None).add_column(0, "split", splits)


def newest_rows(ledger: pa.Table, removed: pa.Table) -> pa.Table:
    """Return the newest row of each (split, ordinal) that is not among the removed ones, by split and ordinal; many rows as they are."""
    splits = pc.unique(ledger["split"])
    places = _places(ledger, splits)
    if is_large(len(ledger)):
        keep = _is_newest(places)
        if len(removed):
            keep &= ~np.isin(places, _places(removed, splits))
        return filtered(ledger, keep)
    last, newest = np.unique(places[::-1], return_index=True)
    keep = ~np.isin(last, _places(removed, splits)) if len(removed) else np.ones(len(last), np.bool_)
    return ledger.combine_chunks().take(len(places) - 1 - newest[keep])


def _is_newest(places: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return whether each place is the last of its number."""
    ordered, newest = np.sort(places), np.ones(len(places), np.bool_)
    if len(again := ordered[1:][ordered[1:] == ordered[:-1]]):
        rows = np.flatnonzero(np.isin(places, again))
        _, last = np.unique(places[rows][::-1], return_index=True)
        newest[rows] = False
        newest[rows[len(rows) - 1 - last]] = True
    return newest


def _places(table: pa.Table, splits: Column) -> NDArray[np.int64]:
    """Return one number for each (split, ordinal); -1 for splits that are none of these."""
    places = np.empty(len(table), np.int64)
    at = 0
    for (part,) in slices(table.select(["split", "ordinal"])):
        codes = pc.index_in(part["split"], value_set=splits).fill_null(-1).to_numpy().astype(np.int64)
        places[at : at + len(part)] = np.where(codes < 0, -1, (codes << 44) + part["ordinal"].to_numpy())
        at += len(part)
    return places


def part_rows(
    part: ShardRef | RejectedPart, index: pa.Table | None, quarantine: pa.Table | None, *, converts: bool = False
) -> Iterator[pa.Table]:
    """Yield what index and quarantine of a part say of its samples: rows of a ledger without bytes, origin and state.

    With `converts`, samples may have been stored with other bytes than those that were read.
    """
    if index is not None:
        given: dict[str, Column] = {name: index[name].combine_chunks() for name in ("key", "source", "ordinal", "label_name", "group")}
        stored = index["sha256"].combine_chunks()
        read = index[SOURCE_SHA256].combine_chunks() if SOURCE_SHA256 in index.column_names else None if converts else stored
        further = {name: index[name] for name in index.column_names if name not in INDEX_SCHEMA.names and name != SOURCE_SHA256}
        given |= {"columns": columns_sha256(further, len(index)), "sha256": read, "sample_sha256": stored}
        yield _rows(part.split, given, len(index), quarantined=False)
    if quarantine is not None:
        given = {name: quarantine[name].combine_chunks() for name in ("key", "source", "ordinal", "sha256")}
        yield _rows(part.split, given, len(quarantine), quarantined=True)


def _rows(split: str, given: Mapping[str, Any], count: int, *, quarantined: bool) -> pa.Table:  # any: lists and arrays
    return make_table(LEDGER_SCHEMA, {**given, "split": [split] * count, "quarantined": np.full(count, quarantined)}, count)


def _completed(store: Store, manifest: DatasetManifest, listings: Mapping[int, pa.Table]) -> pa.Table:
    """Return the rows of the listings of version 1, by their claims, with what indexes, quarantines and claims say of these samples."""
    origins = {claim: _origin_of_claim(store, claim) for claim in listings}
    shards = manifest.identity.get("shards", {})
    converts = shards.get("resize") is not None or shards.get("mode", "keep") != "keep" or shards.get("value_range") is not None

    def rows(part: ShardRef | RejectedPart) -> list[pa.Table]:
        refs = (part.index, part.quarantine) if isinstance(part, ShardRef) else (None, part.quarantine)
        index, quarantine = (None if ref is None else read_table(store.read(ref.name, ref=ref), f"{store.url}/{ref.name}") for ref in refs)
        if quarantine is not None and not quarantine.schema.remove_metadata().equals(QUARANTINE_SCHEMA):
            raise DataError(f"{store.url}: the quarantine of {part.stem} has other columns than aecore writes: restore it")
        origin: Column = pa.array([origins[claim_of(part.stem)]], pa.string())
        found = part_rows(part, index, quarantine, converts=converts)
        at = LEDGER_SCHEMA.get_field_index("origin")
        return [table.set_column(at, "origin", origin.take(pa.array(np.zeros(len(table), np.int64)))) for table in found]

    parts = [part for part in manifest.parts if claim_of(part.stem) in listings]
    ledger = pa.concat_tables([table for tables in map_ordered(rows, parts, threads=READERS) for table in tables]).combine_chunks()
    planned = pa.concat_tables([*listings.values()])
    sizes: Column = planned["bytes"].combine_chunks()
    at = pc.index_in(ledger["key"].combine_chunks(), value_set=planned["key"].combine_chunks())
    return ledger.set_column(LEDGER_SCHEMA.get_field_index("bytes"), "bytes", sizes.take(at))


def _origin_of_claim(store: Store, claim: int) -> str | None:
    """Return where a claim says that its samples come from, "" if from no address; None if the claim is gone."""
    name = f"run.{claim:06d}.json"
    if store.size(name) is None:
        return None
    url = read_json(store, name).get("info", {}).get("source", {}).get("url")
    return origin_of_url(url) if isinstance(url, str) and url else ""


def recorded_rows(store: Store, task: ShardTask, origin: str, record: PartRecord, tables: Mapping[str, pa.Table]) -> pa.Table:
    """Return what is known of the samples of a task that is recorded: hashes as its files have them, no state of what changed meanwhile.

    `tables` are those of the files that were written by this process, by their folders; others are read.
    """
    count, first = len(task), int(record.detail["first_ordinal"])
    at, bad = np.full(count, -1), np.zeros(count, np.bool_)
    texts: dict[str, Any] = {
        "key": task.keys,
        "source": task.sources,
        "label_name": task.label_names,
        "group": task.groups,
    }  # any: lists, arrays
    source, sample = list[Column](), list[Column]()
    for ref in sorted(record.files, key=lambda ref: ref.name):
        if not ref.name.endswith(".parquet"):
            continue
        table = tables.get(ref.name.partition("/")[0])
        if table is None:
            columns = [*texts, "ordinal", "sha256", SOURCE_SHA256]
            table = read_table(store.read(ref.name, ref=ref), f"{store.url}/{ref.name}", columns=columns)
        rows, hashes, none = table["ordinal"].to_numpy() - first, table["sha256"].combine_chunks(), pa.nulls(len(table), pa.string())
        at[rows] = np.arange(len(table)) + sum(map(len, source))
        if ref.name.startswith("quarantine/"):
            bad[rows] = True
            source.append(hashes)
            sample.append(none)
            continue
        is_stated = SOURCE_SHA256 in table.column_names
        source.append(table[SOURCE_SHA256].combine_chunks() if is_stated else none if task.shards.converts else hashes)
        sample.append(hashes)
        if np.array_equal(rows, np.arange(count)):  # the same texts, and no longer a Python object each
            texts = {name: table[name].combine_chunks() for name in texts}
    unsettled = np.array(record.detail.get("unsettled", []), np.int64) - first
    states = None if task.states is None else Texts.of(task.states).without(unsettled.tolist())
    places: Column = pa.array(at)
    hashes_read, hashes_stored = (pa.concat_arrays(hashes) for hashes in (source, sample))
    if not np.array_equal(at, np.arange(count)):
        hashes_read, hashes_stored = hashes_read.take(places), hashes_stored.take(places)
    columns_of = {
        **texts,
        "bytes": task.sizes,
        "split": pa.repeat(pa.scalar(task.split), count),
        "ordinal": task.ordinals,
        "columns": columns_sha256(task.columns, count),
        "sha256": hashes_read,
        "sample_sha256": hashes_stored,
        "quarantined": bad,
        "origin": pa.repeat(pa.scalar(origin), count),
        "state": states,
    }
    return make_table(LEDGER_SCHEMA, columns_of, count)


def columns_sha256(columns: Mapping[str, Any], count: int) -> Column:  # any: arrays of numpy or Arrow
    """Return the hash of the values of all further columns of each of `count` samples; null where there are none.

    Equal values have equal hashes, whatever the type of their column: 1 is 1.0, and a column's name counts. A null is no value: a sample
    has the same hash in a dataset without that column.
    """
    if not columns:
        return pa.nulls(count, pa.string())
    names = sorted(columns)
    values = [map(_canonical, _listed(columns[name])) for name in names]
    digests = [
        _sha256({name: value for name, value in zip(names, row, strict=True) if value is not None}) for row in zip(*values, strict=True)
    ]
    return pa.array(digests, pa.string())


def _sha256(values: Mapping[str, Any]) -> str | None:  # any: plain JSON data
    text = json.dumps(values, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest() if values else None


def _listed(column: Any) -> list[Any]:  # any: as above
    arrow = column if isinstance(column, pa.Array | pa.ChunkedArray) else make_table(pa.schema([]), {"": column}, 0)[""]
    return list(arrow.to_pylist())


def _canonical(value: Any) -> Any:  # any: a value of a column
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _order(live: pa.Table) -> NDArray[Any]:  # any: as above
    """Return the rows by split and key."""
    order = list[NDArray[Any]]()  # any: integers of any width
    for name in sorted(pc.unique(live["split"]).to_pylist()):
        rows = narrow(np.flatnonzero(pc.equal(live["split"], name).to_numpy()))
        keys = live["key"] if len(rows) == len(live) else take_rows(live.select(["key"]), rows)["key"]
        order.append(rows[np.asarray(pc.array_sort_indices(keys))])
    return np.concatenate([np.zeros(0, np.int64), *order])


def samples_sha256(ledger: pa.Table) -> str:
    """Return the hash of the live samples of a ledger, `content_sha256` of a manifest.

    sha256 over `split NUL key NUL label_name NUL sample_sha256 NUL columns LF` of each sample that is not quarantined, sorted by split
    and key. Sources, ordinals, shards and numbers of classes are not in it.
    """
    live = ledger.select(["split", "key", "label_name", "sample_sha256", "columns"])
    if pc.any(ledger["quarantined"]).as_py():
        live = filtered(live, ~ledger["quarantined"].to_numpy())
    order, digest = _order(live), hashlib.sha256()
    for part in (
        gathered(live, order) if is_large(len(live)) else (live.take(order[at : at + _SLICE]) for at in range(0, len(live), _SLICE))
    ):
        rows = part.combine_chunks()
        *texts, last = (pc.fill_null(rows[name].combine_chunks(), "") for name in rows.column_names)
        ends = "\n" if rows["columns"].null_count == len(rows) else pc.binary_join_element_wise(last, "", "\n")
        lines = pc.binary_join_element_wise(*texts, ends, "\0")
        offsets = np.frombuffer(lines.buffers()[1], "<i4")[lines.offset : lines.offset + len(lines) + 1]
        digest.update(memoryview(lines.buffers()[2])[offsets[0] : offsets[-1]])
    return digest.hexdigest()
