"""Removal files: which samples of a part are removed, and why. A shard is never rewritten for it.

`removed/<stem>-gNNNNNN.parquet` names all that was removed of a part up to claim N, also of its quarantine. What it does not name is live.
Ordinals identify samples: one that is removed never comes back, what replaces it has another.
"""

from typing import Literal, get_args

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from aecore.artifact.commit import PartRecord
from aecore.data.format.index import REMOVED_SCHEMA, content_sha256, read_table
from aecore.data.manifest import RejectedPart, Removed, ShardRef
from aecore.errors import DataError
from aecore.store import Store

Reason = Literal["gone", "changed", "relabelled", "moved", "duplicate", "leak", "retried"]
REASONS: tuple[Reason, ...] = get_args(Reason)
LEFT_OUT: tuple[Reason, ...] = ("duplicate", "leak")  # the source has the sample, and another one its content


def removal_name(stem: str, claim: int) -> str:
    """Return the name of the file that a claim writes of what is removed of a part."""
    return f"removed/{stem}-g{claim:06d}.parquet"


def removed_of(record: PartRecord) -> Removed:
    """Return what a manifest says of the removal that has this record."""
    detail = record.detail
    counts = detail["removed_samples"], detail["removed_quarantined"], detail["removed_groups"]
    return Removed(record.files[0], detail["content_sha256"], *counts)


def read_removed(store: Store, part: ShardRef | RejectedPart) -> pa.Table | None:
    """Return what is removed of a part, by ordinal; None if nothing is. DataError if the file does not hold what the manifest names."""
    return None if part.removed is None else read_removal(store, part.removed)


def read_removal(store: Store, removed: Removed) -> pa.Table:
    """Return the rows of a removal file; DataError if it does not hold what the manifest names."""
    ref = removed.file
    where = f"{store.url}/{ref.name}"
    table = read_table(store.read(ref.name, ref=ref), where, removed.samples + removed.quarantined, REMOVED_SCHEMA)
    if content_sha256(table) != removed.content_sha256:
        raise DataError(f"{where} does not hold the rows that the manifest names: restore it or write the artefact again")
    return table


def live_rows(store: Store, shard: ShardRef, index: pa.Table) -> NDArray[np.int64] | None:
    """Return which rows of a shard's index are live, ascending; None: all of them.

    DataError if these are not as many as the manifest says.
    """
    removed = read_removed(store, shard)
    if removed is None:
        return None
    rows = np.flatnonzero(~np.isin(index["ordinal"].to_numpy(), removed["ordinal"].to_numpy()))
    if len(rows) != shard.live:
        raise DataError(
            f"{store.url}: {len(rows)} samples of shard {shard.stem} are not removed, the manifest says {shard.live}: restore its removal "
            "file, or write the dataset again"
        )
    return rows
