"""PURE: plan which sample goes to which shard of which split, from the listing and the config. No file is opened.

The write-time shuffle sorts by a hash of (seed, split, key), or of the group: it depends neither on the listing's order nor on
any library's random stream. Samples of a group stay adjacent, in one shard. A bad sample found later leaves a short shard;
no other sample moves.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aecore.artifact.commit import part_stem
from aecore.data.classes import UNKNOWN, in_order, numbers_of, require_known
from aecore.data.format.index import INDEX_SCHEMA, SOURCE_SHA256
from aecore.data.format.limits import exclusive_cumsum, split_by_limits
from aecore.data.manifest import DatasetManifest
from aecore.data.sources import Listing, take, takes_frames
from aecore.data.sources._labels import fixed_classes, label_names
from aecore.data.sources._skipped import MANY, first_of, shown_examples
from aecore.data.write.spec import ShardSpec, ShardTask
from aecore.data.write.splits import SplitSpec, assign_splits, hashes, resolve_splits
from aecore.errors import ConfigError, DataError, counted

__all__ = ["DatasetPlan", "PlanSummary", "ShardSpec", "SplitSpec", "plan_dataset", "require_unique"]


@dataclass(frozen=True, slots=True)
class PlanSummary:
    """Counts of a plan, as `--dry-run` shows them: samples and shards by split, bytes to read, class names, notes.

    `changes` are those of a dataset that exists: what happens to samples -> their number, and examples of their sources.
    """

    samples: Mapping[str, int]
    shards: Mapping[str, int]
    bytes: int
    known: int
    classes: tuple[str, ...]
    notes: tuple[str, ...]
    changes: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)  # any: a number, a list of texts


@dataclass(frozen=True, slots=True)
class DatasetPlan:
    """The shards to write: tasks in manifest order, all class names (the parent's first), the chosen splits."""

    tasks: tuple[ShardTask, ...]
    classes: tuple[str, ...]
    splits: SplitSpec
    bytes: int
    notes: tuple[str, ...]

    def summary(self, known: int = 0, changes: Mapping[str, Mapping[str, Any]] | None = None) -> PlanSummary:  # any: as in PlanSummary
        """Return the counts; `known` is the number of listed samples that the dataset has already."""
        samples: dict[str, int] = {}
        shards: dict[str, int] = {}
        for task in self.tasks:
            samples[task.split] = samples.get(task.split, 0) + len(task)
            shards[task.split] = shards.get(task.split, 0) + 1
        return PlanSummary(samples, shards, self.bytes, known, self.classes, self.notes, changes or {})


def _require_free_columns(listing: Listing) -> None:
    """Raise DataError if the source names a further column like one that the index has anyway: it would take that one's place."""
    taken = sorted({*listing.columns} & {*INDEX_SCHEMA.names, SOURCE_SHA256})
    if taken:
        raise DataError(
            f"the source gives {', '.join(map(repr, taken))} as further columns, which are columns of every index: give labels as "
            "`label_names`, bags as `groups`, splits as `splits` of the Listing, or name the column differently (for example factor_label)"
        )


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the samples of a listing belong, of which a plan may write all or some.

    Attributes
    ----------
    members : mapping
        The rows of each split (ascending).
    names, ids : `[n]` list of str, int32 array
        The class of each sample as the dataset spells it ("": none), and its number (-1); None if no sample has one.
    classes : tuple of str
        All class names, those of the parent first.
    splits : SplitSpec
        The resolved choice.
    """

    members: Mapping[str, NDArray[np.int64]]
    names: list[str] | None
    ids: NDArray[np.int32] | None
    classes: tuple[str, ...]
    splits: SplitSpec


def plan_dataset(
    listing: Listing,
    splits: SplitSpec,
    shards: ShardSpec,
    parent: DatasetManifest | None,
    claim: int,
    source: Any,
    files: Sequence[str] | None = None,
    contents: list[str] | None = None,
) -> DatasetPlan:  # any: every source kind has its own spec class
    """Return the plan for the samples of `listing`, all of them new to `parent`.

    With `files`, the file that holds each sample, shards follow these files, in the order of the listing. `contents` are the hashes of the
    samples for `splits.by=content`.

    Raises
    ------
    DataError
        If two samples have one key, a folder or column value cannot name a split, a sample has a class that `source.classes` lacks, or
        a group would be cut.
    ConfigError
        If the source does not have the folders, column or labels that `splits` needs.
    """
    placed = place_samples(listing, splits, parent, source, files, contents=contents)
    return plan_parts(listing, placed, shards, parent, claim, source, files)


def place_samples(
    listing: Listing,
    splits: SplitSpec,
    parent: DatasetManifest | None,
    source: Any,
    files: Sequence[str] | None = None,
    known: Mapping[str, str] | None = None,
    contents: list[str] | None = None,
) -> Placement:  # any: as above
    """Return split and class of each sample; raises as `plan_dataset`.

    `contents` are the hashes of the samples for `splits.by=content`.
    `known` are the splits of keys and groups that are there already: with `splits.stratify` they keep them.
    """
    require_unique(listing)
    chosen = resolve_splits(listing, splits, frames=takes_frames(source))
    names = label_names(listing, chosen.by == "folders")
    members = assign_splits(listing, chosen, names, parent, known, contents)
    _require_whole_groups(listing, members, chosen, files)
    fixed = fixed_classes(source)
    if fixed and names is None and parent is None:
        raise ConfigError(f"source.classes names {len(fixed)} classes, and no sample has a label: see source.label")
    classes = _classes(parent.classes if parent else listing.classes, names, fixed)
    if names is None:
        return Placement(members, None, None, classes, chosen)
    numbers = numbers_of(set(names), classes) | {"": -1}
    ids = np.fromiter(map(numbers.__getitem__, names), dtype=np.int32, count=len(names))
    if any(name and classes[number] != name for name, number in numbers.items()):
        names = [classes[number] if number >= 0 else "" for number in ids.tolist()]  # as the parent spells them
    return Placement(members, names, ids, classes, chosen)


def plan_parts(
    listing: Listing,
    placed: Placement,
    shards: ShardSpec,
    parent: DatasetManifest | None,
    claim: int,
    source: Any,
    files: Sequence[str] | None = None,
    written: NDArray[np.bool_] | None = None,
) -> DatasetPlan:  # any: as above
    """Return the plan that writes the placed samples, or those of them that are `written`, as `plan_dataset` does."""
    _require_free_columns(listing)
    labelled = dataclasses.replace(listing, label_names=placed.names, splits=None)  # tasks are of one split each
    members = {split: rows if written is None else rows[written[rows]] for split, rows in placed.members.items()}
    members = {split: rows for split, rows in members.items() if len(rows)}
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
                labels=None if placed.ids is None else placed.ids[rows[start:stop]],
                label_names=part.label_names,
                groups=part.groups,
                columns=part.columns,
                shards=shards,
                unusable=part.unusable,
                states=part.states,
            )
            tasks.append(task)
    counts = [f"{split} {len(rows)}" for split, rows in members.items()]
    counted = (f"splits.by={placed.splits.by}: {first_of(counts, MANY)}",) if counts else ("nothing new",)
    chosen = listing if written is None else listing.take(np.flatnonzero(written))
    notes = (*counted, *_unusable_notes(chosen), *listing.notes)
    return DatasetPlan(tuple(tasks), placed.classes, placed.splits, int(chosen.sizes.sum()), notes)


def _unusable_notes(listing: Listing) -> list[str]:
    """Return one line for each reason why samples cannot be used, with a count and examples."""
    found: dict[str, list[str]] = {}
    for source, why in zip(listing.sources, listing.unusable or (), strict=False):
        if why is not None:
            found.setdefault(why.reason, []).append(source)
    return [
        f"{counted(len(names), 'sample goes', 'samples go')} to the quarantine ({reason}), {shown_examples(names, len(names))}"
        for reason, names in found.items()
    ]


def require_unique(listing: Listing) -> None:
    """Raise DataError, which names both sources, if two samples of a listing (in any splits) have one key."""
    if len(set(listing.keys)) == len(listing):
        return
    seen: dict[str, str] = {}
    for key, source in zip(listing.keys, listing.sources, strict=True):
        if key in seen:
            raise DataError(f"{seen[key]!r} and {source!r} have one key {key!r}: rename one of them")
        seen[key] = source


def _classes(known: Sequence[str], names: list[str] | None, fixed: Sequence[str]) -> tuple[str, ...]:
    """Return the classes with the new names after them in their order; those that the recipe fixes, if it does.

    DataError if a sample has a class that is not one of these.
    """
    if fixed:
        counts = Counter(names)
        counts.pop("", None)
        remedy = "add it to the end of source.classes, or move these samples away"
        require_known(counts, fixed, "source.url", "source.classes", remedy)
        return tuple(fixed)
    found = numbers_of(set(names or ()) - {""}, known)
    return (*known, *in_order(name for name, number in found.items() if number == UNKNOWN))


def _require_whole_groups(
    listing: Listing, members: Mapping[str, NDArray[np.int64]], splits: SplitSpec, files: Sequence[str] | None
) -> None:
    """Raise DataError if samples of one group are in two splits, or, where shards follow `files`, not next to each other in one of them."""
    if listing.groups is None:
        return
    place: dict[str, str] = {}
    for split, rows in members.items():
        for group in dict.fromkeys(take(listing.groups, rows)):
            if place.setdefault(group, split) != split:
                raise DataError(
                    f"samples of the group {group!r} are in the splits {place[group]} and {split}, and splits.by={splits.by} would cut it: "
                    "a group stays whole, so use splits.by=hash, or leave source.group out"
                )
    if files is not None:
        runs = Counter(group for (_, group), _ in itertools.groupby(zip(files, listing.groups, strict=True)))
        if len(runs) < sum(runs.values()):
            raise DataError(
                f"samples of the group {runs.most_common(1)[0][0]!r} are not next to each other in one tar, and the tars stay as they are: "
                "write the samples anew (shard_dataset), or leave source.group out"
            )


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
