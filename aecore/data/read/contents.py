"""What the files of a dataset hold, compared with all that is stated of it.

Hashes can be made anew, so records and manifests are built again from what was read (`recount.py`, `next_manifest`) and compared with the
stored ones, and these with their claims: a change is found unless all files that state the value were changed with it.
"""

import dataclasses
import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from aecore.artifact.commit import PartRecord, claim_of
from aecore.artifact.documents import Document, disagreement, guarded, parse_json, read_all, read_json
from aecore.data.dataset import Dataset
from aecore.data.format.form import form_problems
from aecore.data.format.index import INDEX_FORM, LEDGER_SCHEMA, LISTING_SCHEMA, QUARANTINE_SCHEMA, read_table
from aecore.data.format.spill import take_rows
from aecore.data.manifest import STEM, DatasetManifest, RejectedPart, Removed, ShardRef, claim_of_listing, claim_problems, manifest_of
from aecore.data.read.recount import Headers, record_of, removal_problems, removal_record_of, require_values, row_problems
from aecore.data.removal import read_removal, removed_of
from aecore.data.write.equal import fixed_identity
from aecore.data.write.ledger import newest_rows, part_rows, samples_sha256
from aecore.data.write.manifest_build import Living, next_manifest
from aecore.errors import DataError
from aecore.registry import shown
from aecore.store import FileRef, canonical_json, sha256_json

FOR_THE_WRITER = ("first_frames", "unsettled", "value_range")  # of a record's detail: for its log and the next run, and no data tells
Column = Any  # any: pyarrow's stubs type chunked arrays by their scalars


@dataclass(slots=True)
class _Content:
    """What was found in the parts that were read: keys and sources of their samples, and the records that follow from their rows.

    `planned` has keys and sources of the parts whose listings have no more than that, `keys` those of live samples, `live` all that a
    listing of a dataset that follows its source says of them, if the manifest has the hash of it.
    """

    planned: list[pa.Table] = field(default_factory=list)
    keys: dict[str, Column] = field(default_factory=dict)
    live: list[pa.Table] = field(default_factory=list)
    records: dict[str, PartRecord] = field(default_factory=dict)


class _Listings:
    """The listings of a generation: which claims have one that says keys and sources only, and the newest row of each sample in others."""

    def __init__(self, tables: Mapping[int, pa.Table]) -> None:
        before = {claim: table for claim, table in tables.items() if "ordinal" not in table.column_names}
        self.before = pa.concat_tables([LISTING_SCHEMA.empty_table(), *before.values()])
        self.claims_before = before.keys()
        self.claims = [claim for claim in tables if claim not in before]
        rows = [tables[claim].append_column(_CLAIM, pa.array([claim] * len(tables[claim]), _CLAIM.type)) for claim in self.claims]
        ledger = newest_rows(pa.concat_tables([_LISTED.empty_table(), *rows]).combine_chunks(), _NONE_REMOVED)
        splits: list[Any] = ledger["split"].unique().to_pylist()  # any: pyarrow's stubs make them optional
        self._rows = {split: _by_ordinal(ledger.filter(pc.equal(ledger["split"], split))) for split in splits}
        self._unnamed = len(ledger)

    def of(self, part: ShardRef | RejectedPart) -> pa.Table:
        """Return what the listings say of the samples of a part, by ordinal; no rows where they say nothing."""
        rows = self._rows.get(part.split, _LISTED.empty_table())
        start, stop = np.searchsorted(rows["ordinal"].to_numpy(), [part.first_ordinal, part.first_ordinal + part.planned]).tolist()
        self._unnamed -= stop - start
        return rows.slice(start, stop - start)

    @property
    def unnamed(self) -> int:
        """Number of samples that are listed and belong to none of the parts that `of` was asked for."""
        return self._unnamed


def _by_ordinal(rows: pa.Table) -> pa.Table:
    return take_rows(rows, np.argsort(rows["ordinal"].to_numpy(), kind="stable"))  # the newest rows of many samples are in no order


_CLAIM = pa.field("claim", pa.int64())  # of the listing that has the row
_LISTED = LEDGER_SCHEMA.append(_CLAIM)
_NONE_REMOVED = pa.table({"split": pa.array([], pa.string()), "ordinal": pa.array([], pa.int64())})
_COMPARED = ("key", "quarantined", "source", "label_name", "group", "columns", "sample_sha256")  # columns of listings that parts have too


def content_problems(dataset: Dataset, chosen: Sequence[ShardRef | RejectedPart], *, documents: bool) -> list[str]:
    """Read the chosen parts and all listings, and return the problems of both; with `documents` those of all small files too."""
    content = _Content()
    if not documents:
        return list(_contents(dataset, chosen, content, [dataset.manifest]))
    known, damaged = read_all(dataset.store)
    manifests = list(_manifests(dataset, known, damaged))
    found = list(_contents(dataset, chosen, content, manifests))
    return [*damaged, *found, *_document_problems(dataset, known, manifests, content.records)]


def _manifests(dataset: Dataset, documents: Mapping[str, Document], problems: list[str]) -> Iterator[DatasetManifest]:
    """Yield all generations that can be read, and add to `problems` what is wrong with others."""
    for name, document in sorted(documents.items()):
        if name.startswith(f"{STEM}."):
            try:
                yield manifest_of(document.content, f"{dataset.url}/{name}")
            except DataError as error:
                problems.append(str(error))


def _contents(
    dataset: Dataset, chosen: Sequence[ShardRef | RejectedPart], content: _Content, manifests: Sequence[DatasetManifest]
) -> Iterator[str]:
    """Yield the problems of the chosen parts and of all listings, and collect in `content` what was found in them."""
    listed: dict[int, pa.Table] = {}
    for ref in dict.fromkeys(ref for manifest in (dataset.manifest, *manifests) for ref in manifest.listings):
        try:
            table = _read_listing(dataset, ref)
            yield from _file_problems(dataset, ref, table, {"claim": claim_of_listing(ref)})
            if ref in dataset.manifest.listings:
                listed[claim_of_listing(ref)] = table.replace_schema_metadata(None)
        except DataError as error:
            yield str(error)
    listings = _Listings(listed) if len(listed) == len(dataset.manifest.listings) else None  # else the rows of a damaged one are not known
    removals = _removals(manifests)
    for part in chosen:
        try:
            yield from guarded(f"{dataset.url}: {part.stem}", _part_problems(dataset, part, content, listings, removals.get(part.stem, ())))
        except DataError as error:
            yield str(error)
    yield from _repeated_keys(content)
    if listings is None or len(content.keys) < len(chosen):
        return
    everything = len(chosen) == len(dataset.manifest.parts)
    where = f"{dataset.url}/listings"
    yield from (f"{where}: {problem}" for problem in _planned_problems(content, listings.before, everything=everything))
    if everything and listings.unnamed:
        yield f"{where}: they name {listings.unnamed} samples that belong to no part"
    stated = dataset.manifest.content_sha256
    if everything and stated is not None:
        found = samples_sha256(pa.concat_tables([LEDGER_SCHEMA.empty_table(), *content.live]))
        if found != stated:
            yield f"{dataset.url}: content_sha256 of the manifest is {stated}, its live samples have {found}: one of them was changed"


def _read_listing(dataset: Dataset, ref: FileRef) -> pa.Table:
    """Return a listing, of keys and sources or of all that is known of samples; DataError if it is damaged."""
    data, where = dataset.store.read(ref.name, ref=ref), f"{dataset.url}/{ref.name}"
    table = read_table(data, where)
    if "ordinal" not in table.column_names:
        return read_table(data, where, schema=LISTING_SCHEMA)
    table = read_table(data, where, schema=LEDGER_SCHEMA)
    if any(table[name].null_count for name in ("key", "split", "ordinal", "quarantined")) or (pc.min(table["ordinal"]).as_py() or 0) < 0:
        raise DataError(f"{where} has rows without key, split, ordinal or quarantined: restore it or write the dataset again")
    return table.select(LEDGER_SCHEMA.names)


def _removals(manifests: Sequence[DatasetManifest]) -> dict[str, list[Removed]]:
    """Return all that generations removed of each part, by its stem, the oldest first."""
    found: dict[str, list[Removed]] = {}
    for manifest in sorted(manifests, key=lambda manifest: manifest.number):
        for part in manifest.parts:
            if part.removed is not None and part.removed not in found.setdefault(part.stem, []):
                found[part.stem].append(part.removed)
    return found


def _part_problems(
    dataset: Dataset,
    part: ShardRef | RejectedPart,
    content: _Content,
    listings: _Listings | None,
    removals: Sequence[Removed],
) -> Iterator[str]:
    """Yield what is wrong in a part after reading every byte of it; DataError if it is damaged."""
    manifest, index, is_there = dataset.manifest, None, True
    headers = Headers(manifest.identity["shards"])
    if isinstance(part, ShardRef):
        reader, is_there = dataset.reader(part), bool(part.live or part.tar_base_url is None)
        try:
            if is_there:  # of an adopted tar that is not needed any more the index remains
                reader.verify(headers)
            index, quarantine = reader.index, reader.quarantine
        finally:
            reader.close()
        where = f"{dataset.url}/{part.index.name}"
    else:
        where, ref = f"{dataset.url}/{part.quarantine.name}", part.quarantine
        quarantine = read_table(dataset.store.read(ref.name, ref=ref), where, part.quarantined, QUARANTINE_SCHEMA)
    require_values(where, index, quarantine)
    for file, table in ((part.index if isinstance(part, ShardRef) else None, index), (part.quarantine, quarantine)):
        if file is not None and table is not None:
            yield from _file_problems(dataset, file, table, _stated_in(part, file))
    found = [*row_problems(part, index, quarantine, manifest.classes, manifest.identity)]
    if index is not None and is_there:
        found += [*headers.problems(index), *headers.unlike(manifest.identity["shards"])]
    yield from (f"{where}: {problem}" for problem in found)
    shapes = headers.formats(index) if index is not None and is_there else _stated_shapes(dataset, part, part.stem)
    if shapes is not None:
        content.records[part.stem] = record_of(part, index, quarantine, shapes)
    removed: dict[Removed | None, pa.Table | None] = {None: None}
    for each in removals:
        removed[each] = yield from _removal_problems(dataset, part, each, index, quarantine, removed[[*removed][-1]])
        (live, rows), (bad, _) = _without(index, removed[each]), _without(quarantine, removed[each])
        shapes = headers.formats(index, rows) if index is not None and is_there else _stated_shapes(dataset, part, each.record)
        if shapes is not None:
            content.records[each.record] = removal_record_of(part, each, live, bad, shapes)
    (live, _), (bad, _) = _without(index, removed[part.removed]), _without(quarantine, removed[part.removed])
    kept = [table for table in (live, bad) if table is not None]
    content.keys[part.stem] = pa.chunked_array([chunk for table in kept for chunk in table["key"].chunks], pa.string())
    if listings is not None:
        yield from _listed_problems(dataset, part, content, listings, (index, quarantine), (live, bad))


def _stated_shapes(dataset: Dataset, part: ShardRef | RejectedPart, record: str) -> Mapping[str, int] | None:
    """Return the formats of samples that cannot be looked at, as a record states them; None if it is gone."""
    name = f"records/{record}.json"
    if isinstance(part, RejectedPart):
        return {}
    if dataset.store.size(name) is None:
        return None
    shapes: Mapping[str, int] = read_json(dataset.store, name)["detail"]["shapes"]
    return shapes


def _removal_problems(
    dataset: Dataset,
    part: ShardRef | RejectedPart,
    removed: Removed,
    index: pa.Table | None,
    quarantine: pa.Table | None,
    before: pa.Table | None,
) -> Generator[str, None, pa.Table]:
    """Yield what is wrong in a removal file of a part, and return its rows; DataError if it is damaged."""
    store, ref = dataset.store, removed.file
    table = read_removal(store, removed)
    store.check(ref, verify=True)  # in the store itself: what was read above may be a cached copy
    yield from _file_problems(dataset, ref, table, _stated_in(part, ref))
    yield from (f"{dataset.url}/{ref.name}: {problem}" for problem in removal_problems(table, index, quarantine, before))
    return table


def _without(table: pa.Table | None, removed: pa.Table | None) -> tuple[pa.Table | None, NDArray[np.int64] | None]:
    """Return the rows of a table that are not removed, and their numbers (None: all of them)."""
    if table is None or removed is None:
        return table, None
    rows = np.flatnonzero(~np.isin(table["ordinal"].to_numpy(), removed["ordinal"].to_numpy()))
    return table.take(rows), rows


def _listed_problems(
    dataset: Dataset,
    part: ShardRef | RejectedPart,
    content: _Content,
    listings: _Listings,
    stored: tuple[pa.Table | None, pa.Table | None],
    kept: tuple[pa.Table | None, pa.Table | None],
) -> Iterator[str]:
    """Yield where the listings say something else of the live samples of a part than index and quarantine (`kept` of the `stored` rows)."""
    listed, where = listings.of(part), f"{dataset.url}/listings"
    if claim_of(part.stem) in listings.claims_before:
        content.planned += [table.select(["key", "source"]).replace_schema_metadata(None) for table in stored if table is not None]
    if not listings.claims and dataset.manifest.content_sha256 is None:
        return
    rows = pa.concat_tables([LEDGER_SCHEMA.empty_table(), *part_rows(part, *kept)]).sort_by("ordinal").combine_chunks()
    if dataset.manifest.content_sha256 is not None:
        content.live.append(rows)
    at = pc.index_in(rows["ordinal"].combine_chunks(), value_set=listed["ordinal"].combine_chunks())
    if claim_of(part.stem) not in listings.claims_before and at.null_count:
        keys = rows["key"].filter(at.is_null())
        yield f"{where}: {len(keys)} samples of {part.stem} are not listed, first {shown(keys[0].as_py())}"
    rows, listed = rows.filter(at.is_valid()), listed.take(at.drop_null())
    for name in _COMPARED:
        right: Any = rows[name].combine_chunks()  # any: pyarrow's stubs know no types of values
        said: Any = listed[name].combine_chunks()
        if pa.types.is_string(right.type):
            right, said = pc.fill_null(right, ""), pc.fill_null(said, "")
        different = pc.not_equal(right, said)
        if name == "source":  # a file that was renamed and kept its key and its bytes has another one now
            different = pc.and_(different, pc.equal(listed["claim"].combine_chunks(), pa.scalar(claim_of(part.stem))))
        elif name not in ("key", "quarantined"):  # a quarantine has none of the others
            different = pc.and_(different, pc.invert(rows["quarantined"].combine_chunks()))
        if pc.any(different).as_py():
            row = pc.index(different, True).as_py()
            key, there, stated = shown(rows["key"][row].as_py()), shown(right[row].as_py()), shown(said[row].as_py())
            if name == "source":
                yield f"{where}: the sample {key} comes from {there}, its listing says {stated}"
            else:
                yield f"{where}: of the sample {key} of {part.stem} they say {stated} as {name}, its part has {there}"
            return


def _stated_in(part: ShardRef | RejectedPart, ref: FileRef) -> dict[str, Any]:  # any: plain JSON data
    """Return what the metadata of a part's Parquet file say of it."""
    stated = {"format": 1, "split": part.split, "stem": part.stem}
    return stated | {"tar_sha256": part.tar.sha256} if isinstance(part, ShardRef) and ref == part.index else stated


def _file_problems(dataset: Dataset, ref: FileRef, table: pa.Table, stated: dict[str, Any]) -> Iterator[str]:  # any: as above
    """Yield in what a Parquet file is not as its writer left it; `stated` is what its metadata say."""
    where = f"{dataset.url}/{ref.name}"
    yield from (f"{where}: {problem}" for problem in form_problems(dataset.store.local(ref), table, INDEX_FORM))
    try:
        found = parse_json((table.schema.metadata or {}).get(b"aecore", b"null"))
    except ValueError:
        found = None
    if found != stated:
        yield f"{where}: its metadata say {disagreement(found, stated)}"


def _repeated_keys(content: _Content) -> Iterator[str]:
    everything = pa.chunked_array([chunk for keys in content.keys.values() for chunk in keys.chunks], pa.string())
    if pc.count_distinct(everything).as_py() == len(everything):
        return
    stems: dict[str, str] = {}  # key -> part that holds it
    for stem, column in content.keys.items():
        keys = column.to_pylist()
        twice = [key for key in keys if stems.setdefault(key, stem) != stem]
        if twice or len(set(keys)) < len(keys):
            first = f"{twice[0]!r} is also in {stems[twice[0]]}" if twice else "inside the shard"
            yield f"{stem}: keys are not unique ({first})"


def _planned_problems(content: _Content, listed: pa.Table, *, everything: bool) -> Iterator[str]:
    """Yield where listings of keys and sources have other keys than the parts, a key twice, or another source of it."""
    planned = listed["key"].combine_chunks()
    stored = pa.concat_tables([LISTING_SCHEMA.empty_table().select(["key", "source"]), *content.planned])
    found: Any = stored["key"].combine_chunks()  # any: pyarrow's stubs know no types of values
    sources: Any = stored["source"].combine_chunks()
    at = pc.index_in(found, value_set=planned)
    unplanned = found.filter(at.is_null()).to_pylist()
    missing = planned.filter(pc.invert(pc.is_in(planned, value_set=found))).to_pylist() if everything else []
    if differing := sorted(unplanned + missing):
        yield f"{len(differing)} keys are planned but neither in a shard nor in quarantine, or the other way round, first {differing[0]!r}"
        return
    if pc.count_distinct(planned).as_py() != len(planned):
        yield f"the listings name {len(planned) - pc.count_distinct(planned).as_py()} keys twice"
    if not (wanted := listed["source"].combine_chunks().take(at)).equals(sources):
        row = pc.index(pc.equal(wanted, sources).fill_null(False), False).as_py()
        yield f"the sample {found[row].as_py()!r} comes from {sources[row].as_py()!r}, its listing says {wanted[row].as_py()!r}"


def _document_problems(
    dataset: Dataset, documents: Mapping[str, Document], generations: Sequence[DatasetManifest], records: Mapping[str, PartRecord]
) -> Iterator[str]:
    """Yield where claims, records and manifests contradict each other, or the `records` that follow from the data."""
    for stem, right in records.items():
        name = f"records/{stem}.json"
        if name in documents:
            stated = {key: value for key, value in documents[name].content.items() if key != "timings"}
            stated["detail"] = {key: value for key, value in stated["detail"].items() if key not in FOR_THE_WRITER}
            expected = {key: value for key, value in dataclasses.asdict(right).items() if key != "timings"}
            if stated != json.loads(canonical_json(expected)):
                yield f"{dataset.url}/{name} does not say what its files hold: {disagreement(stated, expected)}"
    manifests: dict[int, DatasetManifest | None] = {0: None}  # the first has no parent
    for manifest in generations:
        manifests[manifest.number] = manifest
        where = f"{dataset.url}/{STEM}.{manifest.number:06d}.json"
        yield from guarded(
            where, (f"{where}: {problem}" for problem in _claim_problems(manifest, manifests.get(manifest.parent), documents))
        )
        if manifest.parent in manifests:
            yield from (f"{where}: {problem}" for problem in _generation_problems(manifests[manifest.parent], manifest, records))


def _claim_problems(manifest: DatasetManifest, parent: DatasetManifest | None, documents: Mapping[str, Document]) -> Iterator[str]:
    """Yield where a manifest is not what the claim of its generation says; nothing where the claim is gone: readers do not need it."""
    if (name := f"run.{manifest.claim:06d}.json") in documents:
        identity = documents[name].content["identity"]
        yield from claim_problems(manifest, name, identity)
        if parent is not None and identity.get("parent_manifest") not in (None, sha256_json(parent.to_json())):
            yield f"{name} follows another generation {parent.number} than the one that is there: one of them was changed; restore it"


def _fixed(identity: Mapping[str, Any], *, follows: bool) -> dict[str, Any]:  # any: plain JSON data
    """Return what of an identity never changes.

    `source.classes` may grow at its end (the classes themselves are compared).
    """
    fixed = fixed_identity(identity, follows=follows)
    return {**fixed, "source": {key: value for key, value in fixed.get("source", {}).items() if key != "classes"}}


def _generation_problems(parent: DatasetManifest | None, manifest: DatasetManifest, records: Mapping[str, PartRecord]) -> Iterator[str]:
    """Yield where a manifest is not the next one of its parent with the parts that are there."""
    old = set() if parent is None else {part.stem for part in parent.parts}
    new = [part for part in manifest.parts if part.stem not in old]
    claim = manifest.claim
    for part in new:
        if claim_of(part.stem) != claim:
            yield f"the part {part.stem} is not of claim {claim}, whose listing the generation has"
    if parent is not None:
        now, before = (_fixed(each.identity, follows=manifest.removal is not None) for each in (manifest, parent))
        if differences := disagreement(now, before):
            yield f"its identity is not that of generation {parent.number}: {differences}"
    if parent is not None and manifest.classes[: len(parent.classes)] != parent.classes:
        yield f"its classes do not begin with those of generation {parent.number}"
    removed = {part.stem: part.removed for part in manifest.parts if part.removed is not None}
    known_retired = () if parent is None else parent.retired
    compacted = {part.stem: part.by for part in manifest.retired if part not in known_retired}
    own = {stem: each.record for stem, each in removed.items() if claim_of(each.record) == claim}
    known = [part.stem for part in new] + [*own.values()]
    details = None
    if (removed or compacted) and parent is not None:  # the counts of all parts before it are needed
        known += (kept := [own.get(part.stem) or _record_of(part) for part in parent.parts if part.stem not in compacted])
        details = [records[name].detail for name in kept if name in records]
    if any(name not in records for name in known):
        return  # damaged, or not among those that were read
    living = Living(
        manifest.removal,
        manifest.content_sha256,
        {stem: removed_of(records[name]) for stem, name in own.items()},
        details,
        counts={part.stem: records[own[part.stem]].detail for part in new if part.stem in own},
        merged=parent is not None and manifest.listings[:-1] != parent.listings,
        compacted=compacted,
    )
    right = next_manifest(
        parent,
        manifest.identity,
        manifest.classes,
        [records[part.stem] for part in new],
        manifest.listings[-1],
        manifest.claim_sha256,
        living,
        manifest.about,
    )
    if manifest != right:
        yield f"it does not follow from its parts and its parent: {disagreement(manifest.to_json(), right.to_json())}"


def _record_of(part: ShardRef | RejectedPart) -> str:
    """Return the name of the record that states the live counts of a part."""
    return part.stem if part.removed is None else part.removed.record
