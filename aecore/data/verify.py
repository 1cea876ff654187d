"""`aepipe verify` of a data set: is everything there that the manifest names, and is it what was written?

Sizes always (one stat per file). With `read_data` every byte: hashes, strict iteration of the tars, keys of tar, index,
quarantine and listing against each other. Problems are collected, not raised: one look says all that is wrong.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from aecore.data.index import read_table
from aecore.data.manifest import Dataset, DatasetManifest, RejectedPart, ShardRef, content_sha256, read_listings, read_manifest
from aecore.errors import DataError
from aecore.store import FileRef, Store


@dataclass(frozen=True, slots=True)
class Verification:
    """What was checked, and what is wrong (empty: nothing)."""

    problems: tuple[str, ...]
    files: int
    bytes: int
    samples: int
    quarantined: int
    data_read: bool

    @property
    def ok(self) -> bool:
        return not self.problems


def verify_dataset(dataset: Dataset, *, read_data: bool = False) -> Verification:
    """Check one generation (and all before it, whose shards it names); touches the disk only to read."""
    manifest = dataset.manifest
    refs = _files(manifest)
    tars = [(dataset.tars(shard), shard.tar) for shard in manifest.shards]
    problems = [*_structure(dataset), *_sizes(tars), *_sizes([(dataset.store, ref) for ref in refs])]
    if read_data:
        problems += [problem for problem in _contents(dataset) if problem not in problems]
    refs += [ref for _, ref in tars]
    num_bytes = sum(ref.bytes for ref in refs)
    return Verification(tuple(problems), len(refs), num_bytes, manifest.num_samples(), manifest.quarantined, data_read=read_data)


def _files(manifest: DatasetManifest) -> list[FileRef]:
    """Return all but the tars, which may lie elsewhere."""
    shards = [ref for shard in manifest.shards for ref in (shard.index, shard.quarantine) if ref is not None]
    return [*shards, *(part.quarantine for part in manifest.rejected), *manifest.listings]


def _structure(dataset: Dataset) -> Iterator[str]:
    manifest = dataset.manifest
    if content_sha256(manifest.shards, manifest.classes) != manifest.dataset_sha256:
        yield f"{dataset.url}: dataset_sha256 does not belong to the shards and classes of the manifest: it was changed by hand"
    for shard in manifest.shards:
        if shard.samples + shard.quarantined != shard.planned:
            yield f"{shard.stem}: {shard.samples} samples + {shard.quarantined} quarantined are not the {shard.planned} planned"
    if manifest.parent:
        try:
            parent = read_manifest(dataset.store, manifest.parent)
        except DataError as error:
            yield str(error)
            return
        if parent.dataset_sha256 != manifest.parent_sha256:
            yield f"{dataset.url}: generation {manifest.number} was added to another generation {manifest.parent} than is there"


def _sizes(refs: list[tuple[Store, FileRef]]) -> Iterator[str]:
    for store, ref in refs:
        try:
            store.check(ref)
        except DataError as error:
            yield str(error)


def _contents(dataset: Dataset) -> Iterator[str]:
    stems: dict[str, str] = {}  # key -> part that holds it
    damaged = False
    parts: list[ShardRef | RejectedPart] = [*dataset.manifest.shards, *dataset.manifest.rejected]
    for part in parts:
        try:
            keys = _keys(dataset, part)
        except DataError as error:
            damaged = True
            yield str(error)
            continue
        twice = [key for key in keys if stems.setdefault(key, part.stem) != part.stem]
        if twice or len(set(keys)) < len(keys):
            first = f"{twice[0]!r} is also in {stems[twice[0]]}" if twice else "inside the shard"
            yield f"{part.stem}: keys are not unique ({first})"
    try:
        planned = set(_strings(read_listings(dataset.store, dataset.manifest)))
    except DataError as error:
        yield str(error)
        return
    differing = [] if damaged else sorted(planned ^ stems.keys())
    if differing:
        yield f"{len(differing)} keys are planned but neither in a shard nor in quarantine, or the other way round, first {differing[0]!r}"


def _keys(dataset: Dataset, part: ShardRef | RejectedPart) -> list[str]:
    """Return the keys of shard and quarantine after reading every byte of both."""
    if isinstance(part, RejectedPart):
        ref = part.quarantine
        return _strings(read_table(dataset.store.read(ref.name, ref=ref), f"{dataset.url}/{ref.name}"))
    reader = dataset.reader(part)
    try:
        reader.verify()
        return reader.keys if reader.quarantine is None else [*reader.keys, *_strings(reader.quarantine)]
    finally:
        reader.close()


def _strings(table: pa.Table) -> list[str]:
    return [str(key) for key in table["key"].to_pylist()]
