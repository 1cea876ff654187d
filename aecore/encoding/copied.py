"""Parts that are written again without the model: their shard lost samples, or the table gets more columns of the index.

The encoded columns of the rows that are left come from a part of the parent generation, whose bytes are compared with its sha256 first;
all others come from the live index of the shard. The quarantine goes with them. What made the rows (device, versions) stays as it was.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from aecore.artifact.commit import PartRecord
from aecore.artifact.fanout import Commit
from aecore.data.dataset import Dataset
from aecore.data.manifest import ShardRef
from aecore.encoding.writer import LATER, EncodeSetup, EncodeTask, PartWriter, part_facts
from aecore.errors import DataError
from aecore.store import FileRef, Store
from aecore.table.manifest import TablePart
from aecore.table.part import QUARANTINE_SCHEMA, part_metadata, part_table, put_quarantine, read_part


class CopyWorker:
    """Writes parts again, from their `source`; loads no model."""

    def __init__(self, setup: EncodeSetup, *, writer: PartWriter | None = None) -> None:
        self.setup = setup
        self.writer = writer or PartWriter(setup)

    def __call__(self, task: EncodeTask) -> Commit:
        """Read what is left of a part and return the call that commits it; an earlier attempt's record is returned as it is."""
        known = self.writer.known(task)
        if known is not None:
            return lambda: known
        started, store, source = time.perf_counter(), self.writer.store, task.source
        assert source is not None
        for ref in (source.file, source.quarantine):
            if ref is not None:
                store.check(ref, verify=True)
        index = self.writer.dataset.index(task.shard)
        old = read_part(store, source.file, None, source.rows)
        refused = None if source.quarantine is None else read_part(store, source.quarantine, None, source.quarantined)
        rows = self.writer.rows(task, index)
        chosen: Any = pa.array(index["ordinal"].to_numpy()[rows])  # any: as below
        if refused is not None:
            left: Any = pc.is_in(refused["ordinal"], value_set=chosen)  # any: the stubs say that it is no chunked array
            refused = refused.filter(left)
            refused = refused.set_column(1, QUARANTINE_SCHEMA.field("shard"), pa.array([task.shard.stem] * len(refused), pa.string()))
            rows = rows[~np.isin(chosen.to_numpy(), refused["ordinal"].to_numpy())]
        kept = self._places(task, index, rows, old)
        encoded = {name: old.column(name).take(kept) for name in old.column_names if name in self.setup.columns}
        kept_facts = {name: value for name, value in part_metadata(old.schema).items() if name not in LATER}
        metadata = {**kept_facts, **part_facts(task, self.setup.checkpoint_sha256)}
        table = part_table(index, rows, task.shard.stem, encoded, metadata, task.index_columns)
        return partial(self._commit, task, table, refused if refused is not None and len(refused) else None, time.perf_counter() - started)

    def prefetch(self, tasks: Sequence[EncodeTask]) -> None:
        """Start the background download of the parts that the next tasks copy from (nothing to do for local tables)."""
        self.writer.store.prefetch([task.source.file for task in tasks if task.source and task.stem not in self.writer.recorded])

    def _commit(self, task: EncodeTask, table: pa.Table, refused: pa.Table | None, made_s: float) -> PartRecord:
        def quarantine() -> FileRef | None:
            return None if refused is None else put_quarantine(self.writer.store, task.stem, refused)

        return self.writer.commit(task, table, quarantine, 0 if refused is None else len(refused), made_s)

    def _places(self, task: EncodeTask, index: pa.Table, rows: NDArray[np.int64], old: pa.Table) -> Any:  # any: an Arrow array of int64
        """Return where the rows of the live index are in the old part; DataError if one is not, or is another sample there."""
        wanted = index.select(["ordinal", "key"]).take(pa.array(rows, pa.int64()))
        places = pc.index_in(wanted["ordinal"], value_set=old["ordinal"].combine_chunks())
        if places.null_count or not old["key"].take(places.cast(pa.int64())).cast(pa.string()).equals(wanted["key"].cast(pa.string())):
            assert task.source is not None
            raise DataError(
                f"{self.writer.store.url}/{task.source.file.name} does not have the samples that are left of shard {task.shard.stem}: "
                "verify the table, or encode to another URL"
            )
        return places.cast(pa.int64())


@dataclass(frozen=True)
class MakeCopyWorker:
    """Makes workers that copy; picklable."""

    setup: EncodeSetup

    def __call__(self) -> CopyWorker:
        """Return a new worker."""
        return CopyWorker(self.setup)


def live_ranges(store: Store, dataset: Dataset, shard: ShardRef, parts: Sequence[TablePart], size: int) -> list[tuple[int, int]]:
    """Return which live rows of a shard its parts of the parent generation cover now, one range after the other and all of them.

    A shard is cut into ranges of `size` live rows (0: into one) when it is encoded first, and never again: samples that are removed make
    ranges shorter. The ordinals in a part tell where it begins now; rows before the first one that `encode.where` chose are in its range
    or in the one before, as `size` allows.
    """
    starts = [0]
    if len(parts) > 1:
        live, following = dataset.index(shard)["ordinal"].to_numpy(), shard.first_ordinal + shard.planned
        firsts = list[int]()
        for part in reversed(parts[1:]):
            following = _first(store, part, following)
            firsts.insert(0, int(np.searchsorted(live, following)))
        for first in firsts:  # as far as the range before may reach: so it does not matter where the ranges after it begin
            starts.append(min(first, starts[-1] + size))
    return list(zip(starts, [*starts[1:], shard.live], strict=True))


def _first(store: Store, part: TablePart, none: int) -> int:
    """Return the first ordinal that a part has or refused; `none` if it has none."""
    tables = [(part.file, part.rows), *([(part.quarantine, part.quarantined)] if part.quarantine is not None else [])]
    found = [each for ref, rows in tables for each in read_part(store, ref, ["ordinal"], rows)["ordinal"].to_numpy().tolist()]
    return min(found, default=none)
