"""A folder of PNGs in class folders that people change, and what a table says of it."""

import hashlib
from collections.abc import Set
from pathlib import Path

import numpy as np
import pyarrow as pa

from aecore.table.table import LatentTable


def pictures(folder: Path, split: str = "*") -> list[Path]:
    return sorted(folder.glob(f"{split}/*/*.png"))


def change_files(folder: Path, *, relabelled: int, deleted: int, replaced: int, seed: int, spared: Set[Path] = frozenset()) -> None:
    """Move files to the next class, delete others, and give others the pixels of other digits."""
    chosen = np.random.default_rng(seed).permutation(np.array([path for path in pictures(folder) if path not in spared], dtype=object))
    cuts = np.cumsum([relabelled, deleted, replaced, replaced])
    moved, gone, targets, donors = np.split(chosen, cuts)[:4]
    bytes_of = [path.read_bytes() for path in donors]
    for path in moved:
        path.rename(path.parent.parent / str((int(path.parent.name) + 1) % 10) / f"moved-{path.name}")
    for path in gone:
        path.unlink()
    for path, data in zip(targets, bytes_of, strict=True):
        path.write_bytes(data)


def columns(table: LatentTable) -> pa.Table:
    """Return all columns but those that say where a row and its class stand, by key."""
    names = [name for name in table.columns if name not in ("shard", "ordinal", "label")]
    return pa.table({name: table.arrow(name) for name in names}).sort_by("key")


def require_rows_of_files(folder: Path, table: LatentTable) -> pa.Table:
    """AssertionError unless each file is one row with its label and its hash; return the rows by key."""
    found = columns(table)
    truth = {path.relative_to(folder).as_posix(): path for path in pictures(folder)}
    assert set(found["source"].to_pylist()) == set(truth) and len(found) == len(truth)
    for source, label, sha256 in zip(*(found[name].to_pylist() for name in ("source", "label_name", "sample_sha256")), strict=True):
        assert truth[source].parent.name == label
        assert hashlib.sha256(truth[source].read_bytes()).hexdigest() == sha256
    return found
