"""The claims of a dataset or a table: which are committed, which are dead, which the same command would continue."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from aecore.artifact.commit import newest_number
from aecore.artifact.documents import read_json
from aecore.data.manifest import SPLIT_ORDER, DatasetManifest, read_manifest
from aecore.data.manifest import STEM as DATASET_STEM
from aecore.errors import DataError
from aecore.store import Store, sha256_json
from aecore.table.manifest import TableManifest, TablePart, read_table_manifest

DATASET = DATASET_STEM
# the name of a part: split, claim, number, rows, table claim that wrote it again; or that of what a claim removes of one
STEM = re.compile(r"([A-Za-z0-9][A-Za-z0-9_-]*?)(?:-g(\d{6}))?-\d{6}(?:(?:-r\d{6})?(?:-t\d{6})?|-g(\d{6}))")


class State(Enum):
    """State of a claim."""

    COMMITTED = "committed"
    DEAD = "dead"
    UNFINISHED = "unfinished"


@dataclass(frozen=True)
class Ledger:
    """The files that an artefact's manifests name, the parts and removals that have a record (`stems`), and the state of each claim."""

    kind: str
    newest: int  # manifest; 0: none
    files: frozenset[str]
    stems: frozenset[str]
    claims: Mapping[int, State]
    splits: frozenset[str]  # parts are named after them
    adopted: bool = False  # its tars are external, wherever they are
    replaced: Mapping[str, int] = field(default_factory=dict)  # files (and records) of parts -> generation that no longer names them

    @property
    def highest(self) -> int:
        """Number of the newest claim; it is kept, so that no number is used twice."""
        return max(self.claims, default=0)


def read_ledger(store: Store, kind: str) -> Ledger:
    """Read all manifests and claims. DataError if a manifest is damaged: the files that it names are unknown then."""
    newest = newest_number(store, kind) or 0
    names = set(store.list())
    numbers = [number for number in range(1, newest + 1) if f"{kind}.{number:06d}.json" in names]
    claims = [number for number in range(1, (newest_number(store, "run") or 0) + 1) if claim_name(number) in names]
    if kind == DATASET:
        datasets = [read_manifest(store, number) for number in numbers]
        files = frozenset(ref.name for manifest in datasets for ref in manifest.files)
        parts = [part for manifest in datasets for part in manifest.parts]
        stems = frozenset({part.stem for part in parts} | {part.removed.record for part in parts if part.removed is not None})
        adopted = any("adopted" in manifest.identity for manifest in datasets) or any(_adopts(store, number) for number in claims)
        states = {number: _dataset_state(store, number, newest, files) for number in claims}
        return Ledger(kind, newest, files, stems, states, _splits(stems), adopted, _replaced(datasets))
    tables = [read_table_manifest(store, number) for number in numbers]
    files = frozenset(ref.name for manifest in tables for ref in manifest.files)
    stems = frozenset(part.stem for manifest in tables for part in manifest.parts)
    states = {number: _table_state(store, number, tables) for number in claims}
    return Ledger(kind, newest, files, stems, states, _splits(stems), replaced=_replaced(tables))


def _replaced(manifests: Sequence[DatasetManifest] | Sequence[TableManifest]) -> dict[str, int]:
    """Return the files of parts that the newest generation does not name, records first, by the first that did not.

    Of a dataset these are retired parts, with what older generations removed of them.
    """
    last, records, files = dict[str, int](), dict[str, list[str]](), dict[str, list[str]]()
    for manifest in manifests:
        for part in manifest.parts:
            last[part.stem] = manifest.number
            records.setdefault(part.stem, []).append(part.stem)
            if isinstance(part, TablePart):
                refs = [part.file, *([] if part.quarantine is None else [part.quarantine])]
            else:
                refs = [*part.own_files]
                records[part.stem] += [] if part.removed is None else [part.removed.record]
            files.setdefault(part.stem, []).extend(ref.name for ref in refs)
    found = dict[str, int]()
    for stem, number in last.items():
        if number < manifests[-1].number:
            found |= dict.fromkeys([*(f"records/{name}.json" for name in records[stem]), *files[stem]], number + 1)
    return found


def _splits(stems: Iterable[str]) -> frozenset[str]:
    """Return the splits of recorded parts and the usual ones: parts of any other split may be external files."""
    return frozenset({*SPLIT_ORDER, *(match[1] for stem in stems if (match := STEM.fullmatch(stem)))})


def claim_name(number: int) -> str:
    """Return the file name of a claim."""
    return f"run.{number:06d}.json"


def _dataset_state(store: Store, number: int, newest: int, files: frozenset[str]) -> State:
    if f"listings/{number:06d}.parquet" in files:
        return State.COMMITTED
    parent = _claim_value(store, number, "identity", "parent")
    return State.DEAD if parent < newest else State.UNFINISHED


def _adopts(store: Store, number: int) -> bool:
    dataset = _claim_value(store, number, "identity").get("dataset")
    return isinstance(dataset, Mapping) and "adopted" in dataset


def _table_state(store: Store, number: int, tables: Sequence[TableManifest]) -> State:
    sha256, own = _claim_value(store, number, "identity", "dataset_sha256"), sha256_json(_claim_value(store, number, "identity"))
    if any(manifest.claim_sha256 in (None, own) and manifest.lineage["dataset"]["sha256"] == sha256 for manifest in tables):
        return State.COMMITTED
    generation = _claim_value(store, number, "info", "lineage", "dataset", "number")
    newest = max((manifest.lineage["dataset"]["number"] for manifest in tables), default=0)
    return State.DEAD if generation < newest else State.UNFINISHED


def _claim_value(store: Store, number: int, *path: str) -> Any:
    found: Any = read_json(store, claim_name(number))
    for key in path:
        if not isinstance(found, Mapping) or key not in found:
            raise DataError(f"{store.url}/{claim_name(number)} has no {'.'.join(path)}: it is damaged or was not written by aecore")
        found = found[key]
    return found
