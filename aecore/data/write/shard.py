"""Write one shard: pack it, then commit tar, index, quarantine and last the record.

The tar is what `webdataset.TarWriter(mtime=0)` writes for the same samples. A bad sample goes to the quarantine with a reason and
leaves a hole in the ordinals; an error of the output store ends the shard. If no sample of a shard is good there is no tar
and no index, only the quarantine and a record of 0 rows.
"""

import contextlib
import functools
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from aecore.artifact.commit import PartRecord, damage_of_part, put_or_adopt, read_record, require_counts, write_record
from aecore.artifact.fanout import Commit
from aecore.data.format.form import form_problems
from aecore.data.format.index import INDEX_FORM, content_sha256, read_table, table_bytes, write_table
from aecore.data.format.parquet import same_footers
from aecore.data.format.spill import is_large
from aecore.data.write.pack import ShardWriter
from aecore.data.write.spec import ShardTask
from aecore.errors import ConfigError, counted
from aecore.store import FileRef, Store, unchecked_bodies

if TYPE_CHECKING:
    from aecore.data.sources import Source

_log = logging.getLogger(__name__)


class Handed:
    """Indexes and quarantines of shards, for the process that wrote them: it need not read them again. Another process gets none."""

    def __init__(self, *, here: bool = True) -> None:
        self._here, self._tables = here, dict[str, dict[str, pa.Table]]()

    def __reduce__(self) -> tuple[Any, ...]:
        return _elsewhere, ()

    def put(self, stem: str, folder: str, table: pa.Table) -> None:
        """Hand over the table of a part that is in this folder."""
        if self._here:
            self._tables.setdefault(stem, {})[folder] = table

    def take(self, stem: str) -> Mapping[str, pa.Table]:
        """Return the tables of a part by their folder, and forget them."""
        return self._tables.pop(stem, {})


def _elsewhere() -> Handed:
    return Handed(here=False)


def pack_shard(store: Store, task: ShardTask, source: "Source", handed: Handed | None = None) -> Commit:
    """Pack one shard and return the call that commits it; an earlier attempt's record is returned as it is (a rerun).

    Raises StoreError if the output cannot be written or a sample cannot be read, ConfigError if the existing record is of another task;
    never for a bad sample (see the record's `quarantined`).
    """
    known = recorded_shard(store, task)
    if known is not None:
        return lambda: known
    started = time.perf_counter()
    writer = ShardWriter(task)
    with contextlib.ExitStack() as stack:
        staged = stack.enter_context(store.stage())
        unchecked = unchecked_bodies()
        writer.write(staged, source)
        if unchecked := unchecked_bodies() - unchecked:
            _log.info(
                "shard %s: the bucket gave no checksum with %d of the downloads, so their bytes are compared with nothing",
                task.stem,
                unchecked,
            )
        handed = handed or Handed(here=False)
        return functools.partial(_commit, store, writer, staged, stack.pop_all(), time.perf_counter() - started, handed)


def _commit(store: Store, writer: ShardWriter, staged: Path, release: contextlib.ExitStack, pack_s: float, handed: Handed) -> PartRecord:
    started = time.perf_counter()
    with release:
        files, detail = _put_shard(store, writer, staged, handed) if len(writer.good[0]) else ([], {})
    return record_shard(store, writer, files, detail, pack_s, started, handed)


def record_shard(
    store: Store,
    writer: ShardWriter,
    files: list[FileRef],
    detail: dict[str, Any],
    pack_s: float,
    started: float,
    handed: Handed | None = None,
) -> PartRecord:  # any: plain JSON data
    """Commit the quarantine and the record of a shard whose `files` are committed."""
    task = writer.task
    if writer.bad:
        name, metadata = f"quarantine/{task.stem}.parquet", {"format": 1, "split": task.split, "stem": task.stem}
        table = writer.quarantine()
        files.append(put_table(store, name, table, metadata, "quarantine"))
        if handed is not None:
            handed.put(task.stem, "quarantine", table)
    detail |= place_of(task) | {"samples": len(writer.good[0]), "quarantined": len(writer.bad)}
    detail |= {"reasons": dict(Counter(bad[2] for bad in writer.bad))}
    if unsettled := writer.unsettled():
        detail["unsettled"] = unsettled
    timings = {"pack_s": pack_s, "commit_s": time.perf_counter() - started}
    _log.info(
        "shard %s: %s, %d quarantined, %.2f s",
        task.stem,
        counted(len(writer.good[0]), "sample", "samples"),
        len(writer.bad),
        sum(timings.values()),
    )
    return write_record(store, PartRecord(task.stem, tuple(files), len(writer.good[0]), len(writer.bad), detail, timings))


def place_of(task: ShardTask) -> dict[str, Any]:
    """Return the fields of a task's record that are known before a byte is read."""
    return {"split": task.split, "planned": len(task), "first_ordinal": int(task.ordinals[0]) if len(task) else 0}


def recorded_shard(store: Store, task: ShardTask) -> PartRecord | None:
    """Return the record of an earlier attempt at this shard, compared with the files that it names; None if there is none.

    Raises
    ------
    ConfigError
        If it was written for other samples: another version planned other shards under this name.
    DataError
        If record and files disagree.
    """
    known = read_record(store, task.stem)
    if known is None:
        return None
    asked = place_of(task)
    there = {name: known.detail.get(name) for name in asked}
    if there != asked:
        raise ConfigError(
            f"{store.url}: the recorded shard {task.stem} is of other samples than in this plan (recorded {there}, planned {asked}): "
            "another version of this package may have written it; write to another URL"
        )
    found: dict[str, tuple[object, object]] = {"planned": (known.detail["planned"], known.rows + known.quarantined)}
    with damage_of_part(store, task.stem):
        if store.is_local:  # in a bucket it would be a download for each shard; the record is sealed
            tables = {ref.name.partition("/")[0]: ref for ref in known.files if ref.name.endswith(".parquet")}
            rows = {folder: read_table(store.read(ref.name, ref=ref), ref.name) for folder, ref in tables.items()}
            found["rows"] = known.rows, len(rows.get("shards", ()))
            found["quarantined"] = known.quarantined, len(rows.get("quarantine", ()))
            if known.rows:
                found["content_sha256"] = known.detail.get("content_sha256"), content_sha256(rows["shards"])
        require_counts(store, known, found)
    return known


def _put_shard(store: Store, writer: ShardWriter, staged: Path, handed: Handed) -> tuple[list[FileRef], dict[str, Any]]:
    """Commit the tar, then the index, which is built while the tar is written to the disk (fsync).

    In this order, because an index without its tar would bind a rerun to samples that may have changed since.
    """
    stem, sha256 = writer.task.stem, writer.hash.hexdigest()
    with ThreadPoolExecutor(1) as background:
        committing = background.submit(put_or_adopt, store, f"shards/{stem}.tar", staged, role="tar", sha256=sha256)
        index = writer.index()
        detail = {"content_sha256": content_sha256(index), **writer.counts()}
        tar, _ = committing.result()
    handed.put(stem, "shards", index)
    metadata = {"format": 1, "split": writer.task.split, "stem": stem, "tar_sha256": sha256}
    return [tar, put_table(store, f"shards/{stem}.parquet", index, metadata, "index")], detail


def put_table(
    store: Store,
    name: str,
    table: pa.Table,
    metadata: dict[str, Any],
    role: str,
    accepts: Callable[[pa.Table], bool] = lambda there: False,
) -> FileRef:
    """Commit a table; an earlier attempt's file that says the same (another Parquet version wrote other bytes) is kept.

    So is one whose rows `accepts`, if it is written as this one would be.
    """
    with contextlib.ExitStack() as stack:
        content: bytes | Path
        if is_large(len(table)):
            content = stack.enter_context(store.stage())
            write_table(table, metadata, content)
        else:
            content = table_bytes(table, metadata)

        def says_the_same(there: FileRef, data: bytes) -> bool:
            known, buffer = read_table(data, f"{store.url}/{there.name}"), pa.py_buffer(data)
            if content_sha256(known) == content_sha256(table):
                ours = pa.py_buffer(content.read_bytes() if isinstance(content, Path) else content)
                return same_footers(ours, buffer) and not form_problems(buffer, known, INDEX_FORM)
            return accepts(known.replace_schema_metadata(None)) and not form_problems(buffer, known, INDEX_FORM)

        return put_or_adopt(store, name, content, role=role, accepts=says_the_same)[0]
