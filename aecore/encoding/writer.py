"""What the workers of a table share: the tasks, the pinned inputs, and how a part is committed and recorded."""

import logging
import time
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from aecore.artifact.commit import PartRecord, damage_of_part, read_record, recorded_parts, require_counts, write_record
from aecore.data.dataset import open_dataset
from aecore.data.manifest import ShardRef
from aecore.data.read.where import parse_where
from aecore.encoding.encoder import EncodeSpec
from aecore.errors import ConfigError, counted
from aecore.store import FileRef, Store, canonical_json, open_store
from aecore.table.manifest import METADATA, TablePart
from aecore.table.part import PRODUCER, commit_part, part_name, read_footer

logger = logging.getLogger(__name__)

LATER = ("removed_sha256", "index_columns", "copied_from")  # of the part's identity; absent where they say nothing, as in records of before
# of the part's identity; the split is its folder
IN_METADATA = ("shard", "shard_sha256", "index_content_sha256", "row_start", *LATER)


@dataclass(frozen=True, slots=True)
class EncodeTask:
    """One part to make: the live rows `[row_start, row_stop)` of one shard; picklable.

    `index_columns` is what `encode.columns` says. With `source`, a part of the parent generation, its rows are copied, not encoded.
    """

    stem: str
    shard: ShardRef
    row_start: int
    row_stop: int
    index_columns: tuple[str, ...] = (METADATA,)
    source: TablePart | None = None

    def identity(self, checkpoint_sha256: str) -> dict[str, Any]:
        """Return the inputs of the part by hash: shards of two datasets may have the same name."""
        later: dict[str, Any] = {}  # see LATER
        if self.shard.removed is not None:
            later["removed_sha256"] = self.shard.removed.content_sha256
        if self.index_columns != (METADATA,):
            later["index_columns"] = list(self.index_columns)
        if self.source is not None:
            later["copied_from"] = self.source.file.sha256
        return {
            **later,
            "split": self.shard.split,
            "shard": self.shard.stem,
            "shard_sha256": self.shard.tar.sha256,
            "index_content_sha256": self.shard.index_content_sha256,
            "row_start": self.row_start,
            "row_stop": self.row_stop,
            "checkpoint_sha256": checkpoint_sha256,
        }


def recorded_part(store: Store, task: EncodeTask, checkpoint_sha256: str, *, chosen: bool = False) -> PartRecord | None:
    """Return the record of an earlier attempt at this part, None if there is none; ConfigError if it is of other data.

    With `chosen` (by `encode.where`) it may have fewer rows than the task.
    """
    record = read_record(store, task.stem)
    if record is None:
        return None
    _require_made_of(store, record, task, checkpoint_sha256)
    samples, span = record.rows + record.quarantined, task.row_stop - task.row_start
    said: dict[str, tuple[object, object]] = {"samples": (samples, min(samples, span) if chosen else span)}
    with damage_of_part(store, task.stem):
        if store.is_local:  # a footer in a bucket costs the whole part
            footers = {"data": record.detail.get("footer_sha256")}
            for name, folder, count in (("rows", "data", record.rows), ("quarantined", "quarantine", record.quarantined)):
                ref = record.file_in(folder)
                said[name] = count, 0 if ref is None else read_footer(store, ref, footers.get(folder)).num_rows
        require_counts(store, record, said)
    return record


def _require_made_of(store: Store, record: PartRecord, task: EncodeTask, checkpoint_sha256: str) -> PartRecord:
    wanted = {**dict.fromkeys(LATER), **task.identity(checkpoint_sha256)}
    differing = [name for name, value in wanted.items() if record.detail.get(name) != value]
    if differing:
        there = str(record.detail.get("shard_sha256"))
        raise ConfigError(
            f"{store.url} holds parts of another dataset, from an encoding that was not finished: part {task.stem} there was made of a "
            f"shard with sha256 {there[:12]}, the shard of this dataset has {task.shard.tar.sha256[:12]} "
            f"(they differ in {', '.join(differing)}): write to another URL"
        )
    return record


@dataclass(frozen=True, slots=True)
class EncodeSetup:
    """What every worker needs: addresses, the pinned checkpoint and dataset generation, the table's columns; picklable."""

    model_url: str
    checkpoint_sha256: str
    data_url: str
    dataset_number: int
    out_url: str
    spec: EncodeSpec
    columns: Mapping[str, Any]
    device: str
    threads: int


class PartWriter:
    """What all workers of a table share: its store, the pinned dataset, and how a part is committed and recorded."""

    def __init__(self, setup: EncodeSetup, recorded: Set[str] | None = None) -> None:
        self.setup = setup
        self.store = open_store(setup.out_url)
        self.recorded = recorded_parts(self.store) if recorded is None else recorded  # a worker that replaces a killed one lists them again
        self.dataset = open_dataset(setup.data_url, number=setup.dataset_number)
        self.where = parse_where(setup.spec.where) if setup.spec.where else None

    def known(self, task: EncodeTask) -> PartRecord | None:
        """Return the record of an earlier attempt at this part."""
        if task.stem not in self.recorded:
            return None
        return recorded_part(self.store, task, self.setup.checkpoint_sha256, chosen=self.where is not None)

    def rows(self, task: EncodeTask, index: pa.Table) -> NDArray[np.int64]:
        """Return the rows of the live index of its shard that a part has or refuses: all, or those that `encode.where` chooses."""
        rows = np.arange(task.row_start, task.row_stop)
        return rows if self.where is None else rows[self.where.mask(index.slice(task.row_start, len(rows)))]

    def commit(
        self, task: EncodeTask, table: pa.Table, quarantine: Callable[[], FileRef | None], quarantined: int, made_s: float
    ) -> PartRecord:
        """Commit the table of a part, its quarantine, and its record."""
        started, identity = time.perf_counter(), task.identity(self.setup.checkpoint_sha256)
        refused = quarantine()
        file, written_by, footer_sha256 = commit_part(
            self.store, part_name(task.shard.split, task.stem), table, compression=self.setup.spec.compression
        )
        detail = {**identity, "encoded_by": {name: written_by[name] for name in PRODUCER}, "footer_sha256": footer_sha256}
        timings = {"encode_s": made_s, "commit_s": time.perf_counter() - started}
        logger.info(
            "part %s: %s, %d quarantined, %.2f s", task.stem, counted(len(table), "row", "rows"), quarantined, sum(timings.values())
        )
        files = (file,) if refused is None else (file, refused)
        record = write_record(self.store, PartRecord(task.stem, files, len(table), quarantined, detail, timings))
        return _require_made_of(self.store, record, task, self.setup.checkpoint_sha256)  # another attempt may have been first


def part_facts(task: EncodeTask, checkpoint_sha256: str) -> dict[str, str]:
    """Return the metadata of a part that say what it was made of."""
    identity = task.identity(checkpoint_sha256)
    known = {name: identity[name] for name in IN_METADATA if name in identity}
    return {name: canonical_json(value).decode() if isinstance(value, list) else str(value) for name, value in known.items()}
