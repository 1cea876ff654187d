"""Verify a dataset: every file that the manifest names exists and is what was written.

Sizes are always compared (one stat per file). With `read_data` every byte is: hashes, strict iteration of the tars, rows of tar, index,
quarantine and listing against each other, records and manifests against both (`contents.py`); with a subset only those of its shards.
Problems are collected, not raised: one run reports all of them.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from aecore.artifact.subset import VerifySubset
from aecore.data.dataset import Dataset
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
    parts = manifest.parts
    chosen = [part for part in parts if (read_data if only is None else only.takes(part.stem))]
    tars = {shard.tar: dataset.tars(shard) for shard in manifest.shards}  # adopted ones are in another store
    problems = [*_structure(dataset), *_sizes((tars.get(ref, dataset.store), ref) for ref in refs)]
    if read_data or only is not None:
        from aecore.data.read.contents import content_problems  # imported late: who reads no data needs no tables

        problems += [problem for problem in content_problems(dataset, chosen, documents=only is None) if problem not in problems]
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
