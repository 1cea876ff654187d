"""Verify a dataset: every file that the manifest names exists and is what was written.

Sizes are always compared (one stat per file). With `read_data` every byte is: hashes, strict iteration of the tars, rows of tar, index,
quarantine and listing against each other, records and manifests against both (`contents.py`); with a subset only those of its shards.
Problems are collected, not raised: one run reports all of them.
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aecore.artifact.commit import claim_of, newest_number
from aecore.artifact.documents import disagreement, guarded, read_json
from aecore.artifact.subset import VerifySubset
from aecore.artifact.unnamed import unnamed_problems
from aecore.artifact.withdrawn import is_withdrawn
from aecore.data.dataset import Dataset
from aecore.data.manifest import STEM, DatasetManifest, RejectedPart, ShardRef, claim_problems, read_manifest, shards_sha256
from aecore.errors import DataError
from aecore.store import FileRef, Store

PART_FOLDERS = ("shards", "quarantine", "removed")


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
    report: str = "ok"  # or `missing`, or what is wrong with it: the next run makes it again

    @property
    def ok(self) -> bool:
        """Whether no problem was found."""
        return not self.problems


def verify_dataset(dataset: Dataset, *, read_data: bool = False, only: VerifySubset | None = None) -> Verification:
    """Check one generation (and all before it, whose shards it names); reads only.

    With `only`, the shards of that subset are read (and all listings, which hold the planned keys).
    """
    from aecore.data.write.report import report_state  # imported late: it needs tables

    manifest, parts = dataset.manifest, dataset.manifest.parts
    before = [*_named_before(dataset)]
    refs = tuple(dict.fromkeys([*manifest.files, *before]))
    chosen = [part for part in parts if (read_data if only is None else only.takes(part.stem))]
    tars = {shard.tar: dataset.tars(shard) for shard in manifest.shards}  # adopted ones are in another store
    problems = [
        *guarded(dataset.url, _foreign(dataset)),
        *_structure(dataset),
        *guarded(dataset.url, _unnamed_problems(dataset, refs)),
        *_sizes((tars.get(ref, dataset.store), ref) for ref in refs),
    ]
    if read_data or only is not None:
        from aecore.data.read.contents import content_problems  # imported late: who reads no data needs no tables

        problems += [problem for problem in content_problems(dataset, chosen, documents=only is None) if problem not in problems]
    if read_data and manifest.retired:  # of what no part of this generation has, the bytes
        own = {ref for part in parts for ref in part.own_files} | {*manifest.listings}
        files = [ref for ref in dict.fromkeys(before) if ref not in own and not ref.name.startswith("listings/")]
        problems += [problem for problem in _hashes(dataset.store, files) if problem not in problems]
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
        report=report_state(dataset),
        bytes_read=sum(ref.bytes for part in chosen for ref in _files_of(part)) + sum(ref.bytes for ref in manifest.listings if chosen),
    )


def _files_of(part: ShardRef | RejectedPart) -> list[FileRef]:
    adopted = [part.tar] if isinstance(part, ShardRef) and part.tar_base_url is not None and part.live else []
    return [*adopted, *part.own_files]


def _named_before(dataset: Dataset) -> Iterator[FileRef]:
    """Yield what generations before this one name: runs are pinned to them. What was removed or merged since is not in this one.

    Files of retired parts that were collected are left out.
    """
    if dataset.manifest.removal is None:
        return
    names, retired = set(dataset.store.list()), {part.stem for part in dataset.manifest.retired}
    folders = {folder: {*dataset.store.list(folder)} for folder in (PART_FOLDERS if retired else ())}
    for number in range(1, dataset.number):
        if f"{STEM}.{number:06d}.json" in names:
            with contextlib.suppress(DataError):  # `_structure` and `content_problems` say so
                manifest = read_manifest(dataset.store, number)
                yield from manifest.listings
                for part in manifest.parts:
                    for ref in part.own_files:
                        folder, _, name = ref.name.rpartition("/")
                        if part.stem not in retired or name in folders[folder]:
                            yield ref


def _structure(dataset: Dataset) -> Iterator[str]:
    manifest = dataset.manifest
    if shards_sha256(manifest.shards, manifest.classes) != manifest.dataset_sha256:
        yield f"{dataset.url}: dataset_sha256 does not belong to the shards and classes of the manifest: it was changed by hand"
    for shard in manifest.shards:
        if shard.samples + shard.quarantined + shard.lost != shard.planned:
            lost = f" + {shard.lost} lost" if shard.lost else ""
            yield f"{shard.stem}: {shard.samples} samples + {shard.quarantined} quarantined{lost} are not the {shard.planned} planned"
    if manifest.parent and not is_withdrawn(dataset.store, manifest.parent):  # one that was need not be there any more
        try:
            parent = read_manifest(dataset.store, manifest.parent)
        except DataError as error:
            yield str(error)
            return
        if parent.dataset_sha256 != manifest.parent_sha256:
            yield f"{dataset.url}: generation {manifest.number} was added to another generation {manifest.parent} than the stored one"


def _foreign(dataset: Dataset) -> Iterator[str]:
    """Yield that the manifest is of another dataset than its claim, or its first record, is: then all that it names seems damaged."""
    store, manifest = dataset.store, dataset.manifest
    where, name = f"{dataset.url}/{STEM}.{manifest.number:06d}.json", f"run.{manifest.claim:06d}.json"
    try:
        if store.size(name) is not None:
            identity = read_json(store, name)["identity"]
            yield from (f"{where}: {problem}" for problem in claim_problems(manifest, name, identity))
        if manifest.claim_sha256 is None or store.size(name) is None:
            first = next(_new_files(manifest), None)
            record = None if first is None else f"records/{first[0]}.json"
            if first is None or record is None or store.size(record) is None:
                return
            files = [dataclasses.asdict(ref) for ref in first[1]]
            if differences := disagreement(read_json(store, record)["files"], files):
                yield f"{where} belongs to another dataset than {record}: {differences}; restore the right one"
    except DataError as error:
        yield str(error)


def _new_files(manifest: DatasetManifest) -> Iterator[tuple[str, Sequence[FileRef]]]:
    """Yield the record and the files of each part and each removal that the generation itself added (an adopted tar has no record)."""
    for part in manifest.parts:
        removed = part.removed
        if claim_of(part.stem) == manifest.claim:
            yield part.stem, [ref for ref in part.own_files if removed is None or ref != removed.file]
        if removed is not None and claim_of(removed.record) == manifest.claim:
            yield removed.record, [removed.file]


def _unnamed_problems(dataset: Dataset, named: Sequence[FileRef]) -> Iterator[str]:
    """Yield the tars and Parquet files that no manifest names and that a pattern over the folder would read as well."""
    newest = newest_number(dataset.store, STEM) or dataset.manifest.number
    manifest = dataset.manifest if newest == dataset.manifest.number else read_manifest(dataset.store, newest)
    if manifest is not dataset.manifest:
        named = [*manifest.files, *_named_before(Dataset(dataset.store, manifest))]

    listed = {ref.name for ref in named}

    def is_of_attempt(claim: Mapping[str, Any], number: int, stem: str) -> bool:  # any: plain JSON data
        return number == claim_of(stem) and f"listings/{number:06d}.parquet" not in listed

    folders = {"shards": (".tar", ".parquet"), "quarantine": (".parquet",), "removed": (".parquet",)}
    if any(shard.tar_base_url is not None for shard in manifest.shards):
        del folders["shards"]  # adopted: the folder may be that of the tars' owner
    yield from unnamed_problems(dataset.store, folders, named, is_of_attempt)


def _hashes(store: Store, refs: Iterable[FileRef]) -> Iterator[str]:
    for ref in refs:
        try:
            store.check(ref, verify=True)
        except DataError as error:
            yield str(error)


def _sizes(refs: Iterable[tuple[Store, FileRef]]) -> Iterator[str]:
    for store, ref in refs:
        try:
            store.check(ref)
        except DataError as error:
            yield str(error)
