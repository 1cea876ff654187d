"""What the files of a dataset hold, compared with all that is stated of it.

Hashes can be made anew, so records and manifests are built again from what was read (`recount.py`, `next_manifest`) and compared with the
stored ones, and these with their claims: a change is found unless all files that state the value were changed with it.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from aecore.artifact.commit import PartRecord, claim_of
from aecore.artifact.documents import Document, disagreement, guarded, parse_json, read_all
from aecore.data.dataset import Dataset
from aecore.data.format.form import form_problems
from aecore.data.format.index import INDEX_FORM, LISTING_SCHEMA, QUARANTINE_SCHEMA, read_table
from aecore.data.manifest import STEM, DatasetManifest, RejectedPart, ShardRef, claim_of_listing, claim_problems, manifest_of
from aecore.data.read.recount import Headers, record_of, require_values, row_problems
from aecore.data.write.manifest_build import next_manifest
from aecore.errors import DataError
from aecore.store import FileRef, canonical_json

FOR_THE_LOG = ("first_frames", "value_range")  # of a record's detail: what the run that wrote it said, and no data tells
Column = Any  # any: pyarrow's stubs type chunked arrays by their scalars


@dataclass(slots=True)
class _Content:
    """What was found in the parts that were read: their keys and sources, by part, and the records that follow from their rows."""

    keys: dict[str, Column] = field(default_factory=dict)
    sources: list[Column] = field(default_factory=list)
    records: dict[str, PartRecord] = field(default_factory=dict)


def content_problems(dataset: Dataset, chosen: Sequence[ShardRef | RejectedPart], *, documents: bool) -> list[str]:
    """Read the chosen parts and all listings, and return the problems of both; with `documents` those of all small files too."""
    content = _Content()
    found = list(_contents(dataset, chosen, content))
    if not documents:
        return found
    known, damaged = read_all(dataset.store)
    return [*damaged, *found, *_document_problems(dataset, known, content.records)]


def _contents(dataset: Dataset, chosen: Sequence[ShardRef | RejectedPart], content: _Content) -> Iterator[str]:
    """Yield the problems of the chosen parts and of all listings, and collect in `content` what was found in them."""
    for part in chosen:
        try:
            yield from guarded(f"{dataset.url}: {part.stem}", _part_problems(dataset, part, content))
        except DataError as error:
            yield str(error)
    yield from _repeated_keys(content)
    listed = []
    for ref in dataset.manifest.listings:
        where = f"{dataset.url}/{ref.name}"
        try:
            listed.append(read_table(dataset.store.read(ref.name, ref=ref), where, schema=LISTING_SCHEMA))
            yield from _file_problems(dataset, ref, listed[-1], {"claim": claim_of_listing(ref)})
        except DataError as error:
            yield str(error)
    if len(content.keys) == len(chosen) and len(listed) == len(dataset.manifest.listings):  # else keys of a damaged file are not known
        planned = pa.concat_tables([table.replace_schema_metadata(None) for table in listed])
        yield from (
            f"{dataset.url}/listings: {problem}"
            for problem in _planned_problems(content, planned, everything=len(chosen) == len(dataset.manifest.parts))
        )


def _part_problems(dataset: Dataset, part: ShardRef | RejectedPart, content: _Content) -> Iterator[str]:
    """Yield what is wrong in a part after reading every byte of it; DataError if it is damaged."""
    manifest, index = dataset.manifest, None
    headers = Headers(manifest.identity["shards"])
    if isinstance(part, ShardRef):
        reader = dataset.reader(part)
        try:
            reader.verify(headers)
            index, quarantine = reader.index, reader.quarantine
        finally:
            reader.close()
        where = f"{dataset.url}/{part.index.name}"
    else:
        where, ref = f"{dataset.url}/{part.quarantine.name}", part.quarantine
        quarantine = read_table(dataset.store.read(ref.name, ref=ref), where, part.planned, QUARANTINE_SCHEMA)
    tables = [table for table in (index, quarantine) if table is not None]
    content.keys[part.stem] = pa.chunked_array([chunk for table in tables for chunk in table["key"].chunks], pa.string())
    content.sources += [chunk for table in tables for chunk in table["source"].chunks]
    require_values(where, index, quarantine)
    for file, table in ((part.index if isinstance(part, ShardRef) else None, index), (part.quarantine, quarantine)):
        if file is not None and table is not None:
            yield from _file_problems(dataset, file, table, _stated_in(part, file))
    found = [*row_problems(part, index, quarantine, manifest.classes, manifest.identity)]
    if index is not None:
        found += [*headers.problems(index), *headers.unlike(manifest.identity["shards"])]
    yield from (f"{where}: {problem}" for problem in found)
    content.records[part.stem] = record_of(part, index, quarantine, {} if index is None else headers.formats(index))


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
    """Yield where the listings have other keys than the parts, a key twice, or another source of it."""
    planned = listed["key"].combine_chunks()
    found = pa.concat_arrays([chunk for keys in content.keys.values() for chunk in keys.chunks] or [pa.array([], pa.string())])
    sources = pa.concat_arrays(content.sources or [pa.array([], pa.string())])
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


def _document_problems(dataset: Dataset, documents: Mapping[str, Document], records: Mapping[str, PartRecord]) -> Iterator[str]:
    """Yield where claims, records and manifests contradict each other, or the `records` that follow from the data."""
    for stem, right in records.items():
        name = f"records/{stem}.json"
        if name in documents:
            stated = {key: value for key, value in documents[name].content.items() if key != "timings"}
            stated["detail"] = {key: value for key, value in stated["detail"].items() if key not in FOR_THE_LOG}
            expected = {key: value for key, value in dataclasses.asdict(right).items() if key != "timings"}
            if stated != json.loads(canonical_json(expected)):
                yield f"{dataset.url}/{name} does not say what its files hold: {disagreement(stated, expected)}"
    manifests: dict[int, DatasetManifest | None] = {0: None}  # the first has no parent
    for name, document in sorted(documents.items()):
        if name.startswith(f"{STEM}."):
            try:
                manifest = manifest_of(document.content, f"{dataset.url}/{name}")
            except DataError as error:
                yield str(error)
                continue
            manifests[manifest.number] = manifest
            where = f"{dataset.url}/{name}"
            yield from guarded(where, (f"{where}: {problem}" for problem in _claim_problems(manifest, documents)))
            if manifest.parent in manifests:
                yield from (f"{where}: {problem}" for problem in _generation_problems(manifests[manifest.parent], manifest, records))


def _claim_problems(manifest: DatasetManifest, documents: Mapping[str, Document]) -> Iterator[str]:
    """Yield where a manifest is not what the claim of its generation says; nothing where the claim is gone: readers do not need it."""
    if (name := f"run.{manifest.claim:06d}.json") in documents:
        yield from claim_problems(manifest, name, documents[name].content["identity"])


def _with_fewer_classes(identity: Mapping[str, Any]) -> dict[str, Any]:  # any: plain JSON data
    """Return an identity without `source.classes`, which may grow at its end: the classes themselves are compared."""
    source = {key: value for key, value in identity.get("source", {}).items() if key != "classes"}
    return {**identity, "source": source}


def _generation_problems(parent: DatasetManifest | None, manifest: DatasetManifest, records: Mapping[str, PartRecord]) -> Iterator[str]:
    """Yield where a manifest is not the next one of its parent with the parts that are there."""
    old = set() if parent is None else {part.stem for part in parent.parts}
    new = [part for part in manifest.parts if part.stem not in old]
    claim = manifest.claim
    for part in new:
        if claim_of(part.stem) != claim:
            yield f"the part {part.stem} is not of claim {claim}, whose listing the generation has"
    if parent is not None and (differences := disagreement(_with_fewer_classes(manifest.identity), _with_fewer_classes(parent.identity))):
        yield f"its identity is not that of generation {parent.number}: {differences}"
    if parent is not None and manifest.classes[: len(parent.classes)] != parent.classes:
        yield f"its classes do not begin with those of generation {parent.number}"
    if any(part.stem not in records for part in new):
        return  # damaged, or not among those that were read
    right = next_manifest(
        parent, manifest.identity, manifest.classes, [records[part.stem] for part in new], manifest.listings[-1], manifest.claim_sha256
    )
    if manifest != right:
        yield f"it does not follow from its parts and its parent: {disagreement(manifest.to_json(), right.to_json())}"
