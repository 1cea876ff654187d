"""Verify a dataset: every file that the manifest names exists and is what was written.

Sizes are always compared (one stat per file). With `read_data` every byte is: hashes, strict iteration of the tars, keys of tar, index,
quarantine and listing against each other; with a subset only those of its shards. Problems are collected, not raised: one run
reports all of them.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa

from aecore.artifact.documents import problems_of
from aecore.artifact.subset import VerifySubset
from aecore.data.dataset import Dataset, read_listings
from aecore.data.format.index import read_table
from aecore.data.manifest import RejectedPart, ShardRef, content_sha256, read_manifest
from aecore.errors import DataError
from aecore.store import FileRef, Store


@dataclass(frozen=True, slots=True)
class Verification:
    """What was checked, and the problems found (empty: none)."""

    problems: tuple[str, ...]
    files: int
    bytes: int
    samples: int
    quarantined: int
    data_read: bool
    slice: str | None = None  # k/n: only the shards of this subset were read
    parts_read: int = 0
    parts: int = 0
    bytes_read: int = 0

    @property
    def ok(self) -> bool:
        """Whether no problem was found."""
        return not self.problems


def verify_dataset(dataset: Dataset, *, read_data: bool = False, only: VerifySubset | None = None) -> Verification:
    """Check one generation (and all before it, whose shards it names); reads only.

    With `only`, the shards of that subset are read (and all listings, which hold the planned keys).
    """
    manifest, refs = dataset.manifest, dataset.manifest.files
    parts: list[ShardRef | RejectedPart] = [*manifest.shards, *manifest.rejected]
    chosen = [part for part in parts if (read_data if only is None else only.takes(part.stem))]
    tars = {shard.tar: dataset.tars(shard) for shard in manifest.shards}  # adopted ones are in another store
    problems = [*_structure(dataset), *_sizes((tars.get(ref, dataset.store), ref) for ref in refs)]
    if read_data or only is not None:
        documents = [] if only is not None else problems_of(dataset.store)
        problems += [problem for problem in (*documents, *_contents(dataset, chosen)) if problem not in problems]
    return Verification(
        tuple(problems),
        files=len(refs),
        bytes=sum(ref.bytes for ref in refs),
        samples=manifest.num_samples(),
        quarantined=manifest.quarantined,
        data_read=read_data,
        slice=None if only is None else str(only),
        parts_read=len(chosen),
        parts=len(parts),
        bytes_read=sum(ref.bytes for part in chosen for ref in _files_of(part)) + sum(ref.bytes for ref in manifest.listings if chosen),
    )


def _files_of(part: ShardRef | RejectedPart) -> list[FileRef]:
    refs = [part.quarantine] if isinstance(part, RejectedPart) else [part.tar, part.index, part.quarantine]
    return [ref for ref in refs if ref is not None]


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
            yield f"{dataset.url}: generation {manifest.number} was added to another generation {manifest.parent} than the stored one"


def _sizes(refs: Iterable[tuple[Store, FileRef]]) -> Iterator[str]:
    for store, ref in refs:
        try:
            store.check(ref)
        except DataError as error:
            yield str(error)


def _contents(dataset: Dataset, chosen: Sequence[ShardRef | RejectedPart]) -> Iterator[str]:
    stems: dict[str, str] = {}  # key -> part that holds it
    damaged = False
    for part in chosen:
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
    everything = len(chosen) == len(dataset.manifest.shards) + len(dataset.manifest.rejected)
    differing = [] if damaged else sorted(planned ^ stems.keys() if everything else stems.keys() - planned)
    if differing:
        yield f"{len(differing)} keys are planned but neither in a shard nor in quarantine, or the other way round, first {differing[0]!r}"


def _keys(dataset: Dataset, part: ShardRef | RejectedPart) -> list[str]:
    """Return the keys of shard and quarantine after reading every byte of both."""
    if isinstance(part, RejectedPart):
        ref = part.quarantine
        return _strings(read_table(dataset.store.read(ref.name, ref=ref), f"{dataset.url}/{ref.name}", part.planned))
    reader = dataset.reader(part)
    try:
        reader.verify()
        return reader.keys if reader.quarantine is None else [*reader.keys, *_strings(reader.quarantine)]
    finally:
        reader.close()


def _strings(table: pa.Table) -> list[str]:
    return [str(key) for key in table["key"].to_pylist()]
