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
from aecore.native.texts import Texts

__all__ = ["DatasetPlan", "PlanSummary", "ShardSpec", "SplitSpec", "plan_dataset", "require_unique"]


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a source of `samples` takes as a dataset, by one worker on this machine.

    Attributes
    ----------
    shards, tar_bytes, index_bytes, listing_bytes, manifest_bytes : int
        Number of shards, and the bytes of all files of a kind.
    source_requests, requests : int
        Requests to the source and to the output; 0 for a local one.
    hours : float
        Time of one worker: listing and comparing, packing, committing.
    measured : mapping
        The costs of a unit that all of this was computed from: samples that were packed, seconds and bytes.
    """

    samples: int
    shards: int
    tar_bytes: int
    index_bytes: int
    listing_bytes: int
    manifest_bytes: int
    source_requests: int
    requests: int
    hours: float
    measured: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class PlanSummary:
    """Counts of a plan, as `--dry-run` shows them: samples and shards by split, bytes to read, class names, notes.

    `changes` are those of a dataset that exists: what happens to samples -> their number, and examples of their sources.
    `estimate`: what a source of another size takes, if that was asked.
    """

    samples: Mapping[str, int]
    shards: Mapping[str, int]
    bytes: int
    known: int
    classes: tuple[str, ...]
    notes: tuple[str, ...]
    changes: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)  # any: a number, a list of texts
    estimate: Estimate | None = None


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
    names, ids : `[n]` texts, int32 array
        The class of each sample as the dataset spells it ("": none), and its number (-1); None if no sample has one.
    classes : tuple of str
        All class names, those of the parent first.
    splits : SplitSpec
        The resolved choice.
    """

    members: Mapping[str, NDArray[np.int64]]
    names: Texts | None
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
    codes, different = names.codes()
    numbers = numbers_of(different, classes) | {"": -1}
    ids = np.array([numbers[name] for name in different], np.int32)[codes]
    names = names.mapped(lambda name: classes[numbers[name]] if numbers[name] >= 0 else "")  # as the parent spells them
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
        ordered = labelled.take(rows)
        labels = None if placed.ids is None else placed.ids[rows]
        for number, (start, stop) in enumerate(_cut(ordered, shards) if files is None else _runs([files[row] for row in rows])):
            part = ordered.slice(start, stop)
            task = ShardTask(
                split=split,
                stem=part_stem(split, claim, number),
                source=source,
                keys=part.keys,
                sources=part.sources,
                sizes=part.sizes,
                ordinals=np.arange(first + start, first + stop, dtype=np.int64),
                labels=None if labels is None else labels[start:stop],
                label_names=part.label_names,
                groups=part.groups,
                columns=part.columns,
                shards=shards,
                unusable=part.unusable,
                states=part.states,
            )
            tasks.append(task)
    counts = [f"{split} {len(rows)}" for split, rows in members.items()]
    counted = (f"splits.by={placed.splits.by}: {first_of(counts, MANY)}",) if counts else ()
    num_bytes = int((listing.sizes if written is None else listing.sizes[written]).sum())
    notes = (*counted, *_unusable_notes(listing, written), *listing.notes)
    return DatasetPlan(tuple(tasks), placed.classes, placed.splits, num_bytes, notes)


def _unusable_notes(listing: Listing, written: NDArray[np.bool_] | None) -> list[str]:
    """Return one line for each reason why samples that are written cannot be used, with a count and examples."""
    if listing.unusable is None:
        return []
    found: dict[str, list[str]] = {}
    for row, (source, why) in enumerate(zip(listing.sources, listing.unusable, strict=True)):
        if why is not None and (written is None or written[row]):
            found.setdefault(why.reason, []).append(source)
    return [
        f"{counted(len(names), 'sample goes', 'samples go')} to the quarantine ({reason}), {shown_examples(names, len(names))}"
        for reason, names in found.items()
    ]


def require_unique(listing: Listing) -> None:
    """Raise DataError, which names both sources, if two samples of a listing (in any splits) have one key."""
    keys = Texts.of(listing.keys)
    if keys.all_different():
        return
    rows, seen = keys.repeated(), dict[str, str]()
    for key, source in zip(keys.take(rows), take(listing.sources, rows), strict=True):
        if key in seen:
            raise DataError(f"{seen[key]!r} and {source!r} have one key {key!r}: rename one of them")
        seen[key] = source


def _classes(known: Sequence[str], names: Texts | None, fixed: Sequence[str]) -> tuple[str, ...]:
    """Return the classes with the new names after them in their order; those that the recipe fixes, if it does.

    DataError if a sample has a class that is not one of these.
    """
    codes, different = (np.zeros(0, np.int32), []) if names is None else names.codes()
    if fixed:
        counts = dict(zip(different, np.bincount(codes, minlength=len(different)).tolist(), strict=True))
        counts.pop("", None)
        remedy = "add it to the end of source.classes, or move these samples away"
        require_known(counts, fixed, "source.url", "source.classes", remedy)
        return tuple(fixed)
    found = numbers_of({*different} - {""}, known)
    return (*known, *in_order(name for name, number in found.items() if number == UNKNOWN))


def _require_whole_groups(
    listing: Listing, members: Mapping[str, NDArray[np.int64]], splits: SplitSpec, files: Sequence[str] | None
) -> None:
    """Raise DataError if samples of one group are in two splits, or, where shards follow `files`, not next to each other in one of them."""
    if listing.groups is None:
        return
    codes, groups = Texts.of(listing.groups).codes()
    names, place = [*members], np.full(len(groups), -1)
    for number, (split, rows) in enumerate(members.items()):
        inside = codes[rows]
        cut = inside[place[inside] >= 0]
        if len(cut):
            raise DataError(
                f"samples of the group {groups[cut[0]]!r} are in the splits {names[place[cut[0]]]} and {split}, and splits.by={splits.by} "
                "would cut it: a group stays whole, so use splits.by=hash, or leave source.group out"
            )
        place[inside] = number
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
    groups = Texts.of(listing.groups).take(rows)
    codes, _ = groups.codes()
    if not shards.shuffle:
        return rows[np.argsort(codes, kind="stable")]
    return rows[np.lexsort((codes, hashes(groups, f"order {shards.seed} {split}")))]  # the code separates groups of equal hashes


def _runs(values: Sequence[str]) -> list[tuple[int, int]]:
    """Return [start, stop) of each run of equal values."""
    bounds = [0, *(at for at, (left, right) in enumerate(itertools.pairwise(values), 1) if left != right), len(values)]
    return list(itertools.pairwise(bounds))


def _cut(ordered: Listing, shards: ShardSpec) -> list[tuple[int, int]]:
    """Return [start, stop) of each shard of samples in order: as many units (samples or whole groups) as fit both limits, at least one."""
    ends = np.arange(1, len(ordered) + 1)
    if ordered.groups is not None:
        codes, _ = Texts.of(ordered.groups).codes()
        ends = np.append(np.flatnonzero(np.diff(codes)) + 1, len(ordered))
    num = np.concatenate([[0], ends])  # samples, and bytes, before each unit
    size = exclusive_cumsum(ordered.sizes)[num]
    return [(int(num[start]), int(num[stop])) for start, stop in split_by_limits((num, shards.max_samples), (size, shards.max_bytes))]
