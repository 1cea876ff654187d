"""PURE: plan which sample goes to which shard of which split, from the listing and the config. No file is opened.

The write-time shuffle sorts by a hash of (seed, split, key), or of the group: it depends neither on the listing's order nor on
any library's random stream. Samples of a group stay adjacent, in one shard. A bad sample found later leaves a short shard;
no other sample moves.
"""

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aecore.artifact.commit import part_stem
from aecore.data.format.index import INDEX_SCHEMA
from aecore.data.format.limits import exclusive_cumsum, split_by_limits
from aecore.data.manifest import DatasetManifest
from aecore.data.sources import Listing, take
from aecore.data.sources._skipped import shown_examples
from aecore.data.write.spec import ShardSpec, ShardTask
from aecore.data.write.splits import SplitSpec, assign_splits, hashes, resolve_splits
from aecore.errors import DataError

_NUMBER = re.compile(r"[0-9]{1,18}")

__all__ = ["DatasetPlan", "PlanSummary", "ShardSpec", "SplitSpec", "plan_dataset", "require_unique"]


@dataclass(frozen=True, slots=True)
class PlanSummary:
    """Counts of a plan, as `--dry-run` shows them: samples and shards by split, bytes to read, class names, notes."""

    samples: Mapping[str, int]
    shards: Mapping[str, int]
    bytes: int
    known: int
    classes: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DatasetPlan:
    """The shards to write: tasks in manifest order, all class names (the parent's first), the chosen splits."""

    tasks: tuple[ShardTask, ...]
    classes: tuple[str, ...]
    splits: SplitSpec
    bytes: int
    notes: tuple[str, ...]

    def summary(self, known: int = 0) -> PlanSummary:
        """Return the counts; `known` is the number of listed samples that the dataset has already."""
        samples: dict[str, int] = {}
        shards: dict[str, int] = {}
        for task in self.tasks:
            samples[task.split] = samples.get(task.split, 0) + len(task)
            shards[task.split] = shards.get(task.split, 0) + 1
        return PlanSummary(samples, shards, self.bytes, known, self.classes, self.notes)


def _require_free_columns(listing: Listing) -> None:
    """Raise DataError if the source names a further column like one that the index has anyway: it would take that one's place."""
    taken = sorted({*listing.columns} & {*INDEX_SCHEMA.names})
    if taken:
        raise DataError(
            f"the source gives {', '.join(map(repr, taken))} as further columns, which are columns of every index: give labels as "
            "`label_names`, bags as `groups`, splits as `splits` of the Listing, or name the column differently (for example factor_label)"
        )


def plan_dataset(
    listing: Listing,
    splits: SplitSpec,
    shards: ShardSpec,
    parent: DatasetManifest | None,
    claim: int,
    source: Any,
    files: Sequence[str] | None = None,
) -> DatasetPlan:  # any: every source kind has its own spec class
    """Return the plan for the samples of `listing`, all of them new to `parent`.

    With `files`, the file that holds each sample, shards follow these files, in the order of the listing.

    Raises
    ------
    DataError
        If two samples have one key, or a folder or column value cannot name a split.
    ConfigError
        If the source does not have the folders or column that `splits` needs.
    """
    require_unique(listing)
    _require_free_columns(listing)
    chosen = resolve_splits(listing, splits)
    members = assign_splits(listing, chosen, parent.splits.keys() if parent else ())
    names = _label_names(listing, chosen)
    classes = _grown(parent.classes if parent else (), names)
    ids = None if names is None else _ids(names, classes)
    labelled = dataclasses.replace(listing, label_names=names, splits=None)  # tasks are of one split each
    tasks: list[ShardTask] = []
    for split in members:
        rows = members[split] if files is not None else _order(listing, members[split], split, shards)
        first = parent.num_planned(split) if parent else 0
        for number, (start, stop) in enumerate(_cut(listing, rows, shards) if files is None else _runs([files[row] for row in rows])):
            part = labelled.take(rows[start:stop])
            task = ShardTask(
                split=split,
                stem=part_stem(split, claim, number),
                source=source,
                keys=part.keys,
                sources=part.sources,
                sizes=part.sizes,
                ordinals=np.arange(first + start, first + stop, dtype=np.int64),
                labels=None if ids is None else ids[rows[start:stop]],
                label_names=part.label_names,
                groups=part.groups,
                columns=part.columns,
                shards=shards,
                unusable=part.unusable,
            )
            tasks.append(task)
    counts = ", ".join(f"{split} {len(rows)}" for split, rows in members.items())
    counted = (f"splits.by={chosen.by}: {counts}",) if counts else ("nothing new",)
    notes = (*counted, *_unusable_notes(listing), *listing.notes)
    return DatasetPlan(tuple(tasks), classes, chosen, int(listing.sizes.sum()), notes)


def _unusable_notes(listing: Listing) -> list[str]:
    """Return one line for each reason why samples cannot be used, with a count and examples."""
    found: dict[str, list[str]] = {}
    for source, why in zip(listing.sources, listing.unusable or (), strict=False):
        if why is not None:
            found.setdefault(why.reason, []).append(source)
    return [f"{len(names)} samples go to the quarantine ({reason}), {shown_examples(names, len(names))}" for reason, names in found.items()]


def require_unique(listing: Listing) -> None:
    """Raise DataError, which names both sources, if two samples of a listing (in any splits) have one key."""
    if len(set(listing.keys)) == len(listing):
        return
    seen: dict[str, str] = {}
    for key, source in zip(listing.keys, listing.sources, strict=True):
        if key in seen:
            raise DataError(f"{seen[key]!r} and {source!r} have one key {key!r}: rename one of them")
        seen[key] = source


def _label_names(listing: Listing, splits: SplitSpec) -> list[str] | None:
    """Return the class of each sample ("": none), relative to its split folder; None if no sample has one."""
    names = listing.label_names
    if names is not None and listing.splits is not None and listing.label_paths and splits.by == "folders":
        below = {name: name.partition("/")[2] for name in set(names)}
        names = list(map(below.__getitem__, names))
    return names if names is not None and any(names) else None


def _grown(classes: Sequence[str], names: list[str] | None) -> tuple[str, ...]:
    """Return the classes with the new names after them, sorted; numbers are sorted by value, so that class 10 of 100 is number 10."""
    new = set(names or ()) - {*classes, ""}
    return (*classes, *(sorted(new, key=lambda name: (int(name), name)) if all(map(_NUMBER.fullmatch, new)) else sorted(new)))


def _ids(names: list[str], classes: Sequence[str]) -> NDArray[np.int32]:
    numbers = {name: number for number, name in enumerate(classes)} | {"": -1}
    return np.fromiter(map(numbers.__getitem__, names), dtype=np.int32, count=len(names))


def _order(listing: Listing, rows: NDArray[np.int64], split: str, shards: ShardSpec) -> NDArray[np.int64]:
    """Return the rows in the order of writing: by hash of key or group if shuffled, groups adjacent in any case."""
    if listing.groups is None:
        return rows[np.argsort(hashes(take(listing.keys, rows), f"order {shards.seed} {split}"), kind="stable")] if shards.shuffle else rows
    groups = take(listing.groups, rows)
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    codes = np.fromiter((numbers[group] for group in groups), dtype=np.int64, count=len(groups))
    if not shards.shuffle:
        return rows[np.argsort(codes, kind="stable")]
    return rows[np.lexsort((codes, hashes(groups, f"order {shards.seed} {split}")))]  # the code separates groups of equal hashes


def _runs(values: Sequence[str]) -> list[tuple[int, int]]:
    """Return [start, stop) of each run of equal values."""
    bounds = [0, *(at for at, (left, right) in enumerate(itertools.pairwise(values), 1) if left != right), len(values)]
    return list(itertools.pairwise(bounds))


def _cut(listing: Listing, rows: NDArray[np.int64], shards: ShardSpec) -> list[tuple[int, int]]:
    """Return [start, stop) of each shard: as many units (samples or whole groups) as fit both limits, at least one."""
    ends = np.arange(1, len(rows) + 1)
    if listing.groups is not None:
        groups = take(listing.groups, rows)
        last = [left != right for left, right in itertools.pairwise(groups)]
        ends = np.append(np.flatnonzero(last) + 1, len(rows))
    num = np.concatenate([[0], ends])  # samples, and bytes, before each unit
    size = exclusive_cumsum(listing.sizes[rows])[num]
    return [(int(num[start]), int(num[stop])) for start, stop in split_by_limits((num, shards.max_samples), (size, shards.max_bytes))]
