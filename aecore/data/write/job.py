"""`shard_dataset`: a source becomes a dataset, or the next generation of one.

List, compare with the dataset, plan, write the shards (anywhere: see `fanout`), say what is removed, publish the manifest. The process
may die at any point before the manifest: the same command finds its claim again and continues. Nothing is overwritten; what is stored,
in a shard or in quarantine, is written again only if it changed. A dataset follows its source (`follow.py`); one that was begun before
that was possible grows only (`append.py`), until a run gives `shards.removed`. Modules that only the adoption of tars needs are imported
by it.
"""

import contextlib
import dataclasses
import functools
import itertools
import logging
import math
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from aecore.artifact.commit import PartRecord, claim_generation, commit_manifest, find_claim, newest_of, require_same
from aecore.artifact.documents import read_json
from aecore.artifact.fanout import Commit, FanOut, OnPart, Worker, collect, serial
from aecore.artifact.withdrawn import made_of, require_not_withdrawn
from aecore.data.about import About, AboutSpec, stated
from aecore.data.classes import is_spelled
from aecore.data.dataset import Dataset
from aecore.data.format.bad_sample import BadSample
from aecore.data.format.index import LEDGER_SCHEMA, content_sha256, read_table
from aecore.data.format.sample_format import CHANNEL_LAST
from aecore.data.format.spill import Spill, filtered, is_large
from aecore.data.manifest import STEM, DatasetManifest, read_manifest
from aecore.data.removal import removed_of
from aecore.data.sources import Listing, Source, bound_pixels, generations, origin_of, takes_frames
from aecore.data.sources._filter import FILTERS, left_out
from aecore.data.sources._labels import by_rules, fixed_classes, with_class_names
from aecore.data.sources._skipped import first_of, shown_examples
from aecore.data.write.append import (
    SHOWN,
    listing_table,
    may_be_sequences,
    new_rows,
    report_formats,
    require_whole_bags,
    warn_if_address_changed,
    warn_of_orphans,
)
from aecore.data.write.equal import Policy, dropped, fixed_identity, lines_of, require_allowed
from aecore.data.write.follow import Changes, Rules, compare
from aecore.data.write.ledger import MOST_LISTINGS, REMOVED_PLACES, newest_rows, read_known, recorded_rows, samples_sha256
from aecore.data.write.manifest_build import Living, next_manifest
from aecore.data.write.plan import DatasetPlan, Placement, PlanSummary, place_samples, plan_dataset, plan_parts, require_unique
from aecore.data.write.refused import leave_refused, remove_refused, take_over
from aecore.data.write.remove import live_details, part_of, remove_samples
from aecore.data.write.report import ensure_report
from aecore.data.write.reread import Contents, Reread, hashes_of, is_little, read_again
from aecore.data.write.shard import Handed, pack_shard, put_table
from aecore.data.write.spec import ShardSpec, ShardTask
from aecore.data.write.splits import SplitSpec, resolve_splits, split_warnings, units_of, without_bad_splits
from aecore.errors import ConfigError, DataError, counted
from aecore.native.texts import Texts
from aecore.registry import SOURCES, absent_values, as_recorded, to_dict
from aecore.store import FileRef, Store, absolute_url, open_store, remove_staging, sha256_json

logger = logging.getLogger(__name__)
MOST_EXAMPLES = 1000  # rows of quarantines that are looked at for an error
LOST = 0.01  # share of values that `shards.value_range` may cut off without a warning


class ShardWorker:
    """Writes shards of one dataset: opens the output and the source once, in the process it works in."""

    def __init__(self, out: str, source: Any, handed: Handed | None = None) -> None:  # any: every source kind has its own spec class
        self._store, self._handed = open_store(out), handed
        self._source = SOURCES.build(source)

    def __call__(self, task: ShardTask) -> Commit:
        """Pack the shard of `task` and return the call that commits it."""
        return pack_shard(self._store, task, self._source, self._handed)


def shard_dataset(
    source: Any,  # any: every source kind has its own spec class
    out: str,
    splits: SplitSpec | None = None,
    shards: ShardSpec | None = None,
    *,
    fan_out: FanOut = serial,
    dry_run: bool = False,
    on_part: OnPart | None = None,
    about: AboutSpec | None = None,
    samples: int | None = None,
) -> DatasetManifest | PlanSummary:
    """Make the dataset at `out` what `source` is now: its next generation has what is new or changed, and lacks what is gone.

    Parameters
    ----------
    source : spec
        A source spec, for example `FolderSpec(url="./mnist")`.
    out : str
        URL of the dataset, which is created if needed.
    fan_out : FanOut
        Runs the shard tasks; the bytes do not depend on it.
    dry_run : bool
        Return the plan's summary; nothing is written.
    on_part : callable, optional
        `on_part(record, done, total)` after every shard.
    about : AboutSpec, optional
        What is said of the dataset; where that is new, it is a generation even without a new sample.
    samples : int, optional
        With `dry_run`: the summary estimates what so many samples of this kind take, from some that are packed into a scratch folder.

    Returns
    -------
    DatasetManifest or PlanSummary
        The new generation; the newest one if nothing changed; the summary for a dry run, which reads again what may have changed.

    Raises
    ------
    ConfigError
        If `out` was written with another source kind or other splits or shards (the differing fields are shown).
    DataError
        If the source is missing or empty, the newest generation was withdrawn, so many samples are gone that the source may be
        incomplete (`shards.max_removed`), a sample of a dataset that only grows changed, or more than `shards.max_bad` of the samples
        are bad (then there is no new manifest; the shards that were written are kept for a rerun).
    """
    started = time.perf_counter()
    work = _compare(_absolute(source), out, splits or SplitSpec(), shards or ShardSpec(), fan_out)
    work = work.saying(about)
    if samples is None or not dry_run:
        return _publish(work, fan_out, dry_run, on_part, started)
    from aecore.data.write.estimate import estimate

    plan, summary = work.plan(claim=1), _publish(work, fan_out, dry_run, on_part, started)
    assert isinstance(summary, PlanSummary)
    listing_s = time.perf_counter() - started
    found = estimate(plan, ShardWorker, work.store.url, work.source, samples, len(work.listing), listing_s, work.shards)
    return dataclasses.replace(summary, estimate=found)


def adopt_shards(
    source: Any,  # any: as above
    out: str,
    splits: SplitSpec | None = None,
    shards: ShardSpec | None = None,
    *,
    fan_out: FanOut = serial,
    dry_run: bool = False,
    on_part: OnPart | None = None,
    about: AboutSpec | None = None,
) -> DatasetManifest | PlanSummary:
    """Index the tars of a `WebdatasetSpec` in place, as a dataset at `out` or its next generation; see `adopt` and `shard_dataset`.

    Raises ConfigError for other sources and for shards.resize and shards.mode, DataError for tars that are compressed or damaged.
    """
    from aecore.data.write.adopt import require_adoptable

    started, shards = time.perf_counter(), shards or ShardSpec()
    require_adoptable(source, shards)
    work = _compare(_absolute(source), out, splits or SplitSpec(), shards, fan_out, adopt=True)
    try:
        return _publish(work.saying(about), fan_out, dry_run, on_part, started)
    finally:
        remove_staging(work.store)  # the folder may be that of the tars


def _publish(work: "_Work", fan_out: FanOut, dry_run: bool, on_part: OnPart | None, started: float) -> DatasetManifest | PlanSummary:
    if dry_run:
        plan = work.plan(claim=1)
        if "drop" in (work.policy.duplicates, work.policy.leaks) and len(work.fresh):
            unread = "which of the new samples are left out (shards.duplicates, splits.leaks) is known only after they are read"
            plan = dataclasses.replace(plan, notes=(*plan.notes, unread))
        _warn_of_orphans(work, plan)
        _warn_of_plan(work, plan)
        return plan.summary(known=len(work.listing) - len(work.fresh), changes=work.shown)
    _require_usable(work)
    if work.parent is not None and work.is_idle:
        logger.info(
            "%s: nothing new in %s, generation %d stays",
            work.store.url,
            counted(len(work.listing), "sample", "samples"),
            work.parent.number,
        )
        _report(Dataset(work.store, work.parent), {})
        return work.parent
    return _write(work, fan_out, on_part, {"list and compare": time.perf_counter() - started})


def _report(dataset: Dataset, seconds: Mapping[str, float], known: tuple[pa.Table, pa.Table] | None = None, before: Any = None) -> None:
    """Make the report of a generation unless it is there, and log what it says of equal content."""  # any: a table or None
    report = ensure_report(dataset, seconds, known, before)
    if report is None:
        return
    for name, line in lines_of(report):
        log = logger.info if name == "duplicates" or not report[name]["remaining"] else logger.warning
        log("%s: %s", dataset.url, line)


@dataclass(frozen=True, slots=True)
class _Work:
    """The work of one run: the newest generation, everything listed, and the samples of it that are written.

    `placed`, `ledger` and `changes` are those of a dataset that follows its source; `removal` is None for one that only grows.
    `before_states`: it goes on with a claim of a version that knew no states, so nothing is known of when its samples were read. `made_of`
    are the generations of other datasets that were listed. `contents` are the hashes
    of the listed samples, with `splits.by=content`.
    """

    store: Store
    source: Any  # any: every source kind has its own spec class
    asked: SplitSpec
    splits: SplitSpec  # resolved
    shards: ShardSpec
    parent: DatasetManifest | None
    listing: Listing
    fresh: Listing
    identity: Mapping[str, Any]  # any: plain JSON data
    adopt: bool
    removal: str | None
    placed: Placement | None = None
    ledger: pa.Table | None = None
    changes: Changes | None = None
    before_states: bool = False
    made_of: Mapping[str, int] = dataclasses.field(default_factory=dict)
    contents: list[str] | None = None
    about: About | None = None

    def saying(self, about: AboutSpec | None) -> "_Work":
        """Return the work with what the generation says of the dataset."""
        return dataclasses.replace(self, about=stated(about, None if self.parent is None else self.parent.about))

    @property
    def policy(self) -> Policy:
        """What becomes of samples of equal content."""
        return Policy.of(self.shards, self.splits)

    @property
    def is_idle(self) -> bool:
        """Whether there is no generation to write.

        New states alone are none, unless reading these samples again in each run costs more than that.
        """
        if len(self.fresh) or (self.parent is not None and self.removal != self.parent.removal):
            return False
        if self.parent is not None and (self.policy != _policy_of(self.parent) or self.about != self.parent.about):
            return False
        if self.changes is None:
            return True
        renewed = self.changes.renewed
        little = is_little(len(renewed), pc.sum(renewed["bytes"]).as_py() or 0)
        return little and not (len(self.changes.removed) or len(self.changes.excess) or self.changes.noted)

    @property
    def shown(self) -> Mapping[str, Mapping[str, Any]]:  # any: a number, a list of texts
        """What happens to samples of a dataset that exists, for people."""
        if self.changes is not None:
            return self.changes.shown
        return {} if self.parent is None else {"added": {"samples": len(self.fresh), "examples": [*self.fresh.sources[:SHOWN]]}}

    def plan(self, claim: int) -> DatasetPlan:
        """Return the plan of the samples that are written, its notes starting with the choice of `auto`."""
        files: list[str] | None = None
        listing = self.fresh if self.changes is None else self.listing
        if self.adopt:
            from aecore.data.write.adopt import files_of

            files = files_of(listing.sources)
        if self.changes is None:
            plan = plan_dataset(listing, self.splits, self.shards, self.parent, claim, self.source, files, self.contents)
        else:
            assert self.placed is not None
            written = self.changes.written
            plan = plan_parts(listing, self.placed, self.shards, self.parent, claim, self.source, files, written)
        if self.before_states:
            plan = dataclasses.replace(plan, tasks=tuple(dataclasses.replace(task, source_hashes=False) for task in plan.tasks))
        in_names = self.splits.by == "folders" and self.listing.paths is not None and not self.listing.label_paths
        where = ": the names of the files say the split" if in_names else ""
        chosen = (f"splits.by=auto chose {self.splits.by}{where}",) if self.asked.by == "auto" else ()
        return dataclasses.replace(plan, notes=(*chosen, *self._notes(), *plan.notes))

    def _notes(self) -> Iterator[str]:
        """Yield that nothing is new, or why the next generation is written although no sample is."""
        if self.is_idle:
            yield "nothing new"
        elif not len(self.fresh):
            yield "no new sample"
        parent = self.parent
        if parent is not None and self.removal != parent.removal:
            yield f"shards.removed: {parent.removal or 'not set'} becomes {self.removal or 'not set'}"
        before = self.policy if parent is None else _policy_of(parent)
        for name, old, new in (
            ("shards.duplicates", before.duplicates, self.policy.duplicates),
            ("splits.leaks", before.leaks, self.policy.leaks),
        ):
            if new != old:
                yield f"{name}: {old} becomes {new}"
        if parent is not None and self.about != parent.about:
            yield "about: other statements than before"
        renewed = 0 if self.changes is None else len(self.changes.renewed)
        if renewed and not self.is_idle and not any(found["samples"] for found in self.shown.values()):
            yield f"new times or addresses of {counted(renewed, 'sample', 'samples')} are recorded: their bytes are the same"


def _compare(
    source: Any, out: str, asked: SplitSpec, shards: ShardSpec, fan_out: FanOut, *, adopt: bool = False
) -> _Work:  # any: every source kind has its own spec class
    store = open_store(out)
    names = store.list()
    newest = newest_of(names, STEM)
    if newest is not None:  # the next generation would be made of it
        require_not_withdrawn(store, newest, names, "write the source to another URL")
    parent = None if newest is None else read_manifest(store, newest)
    recorded, source, opened, listing = _listed(store, names, parent, with_class_names(source), asked, shards.max_pixels)
    require_unique(listing)
    if recorded is not None:
        asked, shards = as_recorded(asked, recorded.get("splits", {})), as_recorded(shards, recorded.get("shards", {}))
    if source.kind == "dataset":
        from aecore.data.sources.dataset import require_writable

        require_writable(opened, store.url, shards.layout)
    there = None if recorded is None else recorded.get("splits", {})
    asked, shards = _with_policy(asked, shards, None if parent is None else parent.identity)
    splits = resolve_splits(listing, asked, there, parent.splits if parent else (), frames=takes_frames(source))
    specs = {"source": source, "splits": splits, "shards": shards}
    identity = {name: to_dict(spec, identity_only=True) for name, spec in specs.items()}
    if adopt:
        from aecore.data.write.adopt import require_readable_by_offset

        identity["adopted"] = {"by": "offset"}
        require_readable_by_offset(listing, opened)
    removal = shards.removed or ("drop" if parent is None else parent.removal)
    listed = dict(generations(opened))
    work = _Work(store, source, asked, splits, shards, parent, listing, listing, identity, adopt, removal, made_of=listed)
    if removal is None and not work.policy.is_plain:
        raise ConfigError(
            f"{store.url} was begun when datasets only grew, and shards.duplicates={work.policy.duplicates} with "
            f"splits.leaks={work.policy.leaks} may remove samples: set shards.removed=drop (or keep), which makes it follow its source"
        )
    if parent is None:
        if splits.by == "content":
            work = dataclasses.replace(work, contents=_contents(work, fan_out).of(listing, LEDGER_SCHEMA.empty_table()))
        _warn(store, listing, asked, splits)
        return work
    _require_same(work, parent)
    work = _grown(work, parent, opened) if removal is None else _followed(work, parent, opened, fan_out)
    del opened  # a source may hold copies of files in the cache
    if len(work.fresh):
        _warn(store, listing, asked, splits)
    return work


def _grown(work: _Work, parent: DatasetManifest, opened: Source) -> _Work:
    """Return the work on a dataset that only grows: the new samples, if no known one changed."""
    store, listing = work.store, work.listing
    warn_if_address_changed(store, parent, work.source, listing)
    rows = new_rows(store, parent, listing, work.shards, work.source)
    fresh = listing.take(rows)
    if work.adopt:
        from aecore.data.write.adopt import require_same_tars

        require_same_tars(store, parent, opened, listing, fresh, limited=work.source.limit is not None)
    require_whole_bags(store, listing, rows)
    return dataclasses.replace(work, fresh=fresh)


def _followed(work: _Work, parent: DatasetManifest, opened: Source, fan_out: FanOut) -> _Work:
    """Return the work on a dataset that follows its source."""
    store, source, listing, tars = work.store, work.source, work.listing, None
    if work.adopt:
        from aecore.data.write.adopt import AdoptedTars, files_of

        tars = AdoptedTars(store, parent, opened)
    (ledger, left), known, contents = read_known(store, parent), dict[str, str](), None
    reread: Callable[[Listing], Reread] = functools.partial(read_again, source=source, shards=work.shards, fan_out=fan_out)
    if work.splits.by == "content":
        read = _contents(work, fan_out)
        contents, reread = read.of(listing, pa.concat_tables([ledger, left])), read.again
    if work.splits.stratify:
        keys, sources, splits = (list[Any](ledger[name].to_pylist()) for name in ("key", "source", "split"))  # any: texts
        units = units_of(keys, sources, None, work.splits)
        if contents is not None:
            units = hashes_of(ledger).to_pylist()
        known = dict(zip((group or unit for group, unit in zip(ledger["group"].to_pylist(), units, strict=True)), splits, strict=True))
    placed = place_samples(listing, work.splits, parent, source, files_of(listing.sources) if work.adopt else None, known, contents)
    rules = Rules(
        url=store.url,
        drop=work.removal == "drop",
        max_removed=work.shards.max_removed,
        checksum=work.shards.checksum,
        accept_filter=work.shards.accept_filter,
        reread=reread,
        outside=functools.partial(_left_out, source, parent),
        tars=tars,
        all_frames=takes_frames(source),
        split_folders=work.splits.by == "folders",
        named_places=source.kind == "dataset",
        policy=work.policy,
    )
    changes = compare(listing, placed, ledger, left, rules)
    identity = work.identity
    if changes.left_out:  # until they are dropped, the filter that has them is that of the dataset
        logger.warning(
            "%s: %s that the filter of the source leaves out now (%s); they stay, and so does the recorded filter, until a run has "
            "shards.accept_filter=true, which drops them",
            store.url,
            counted(changes.shown["outside_filter"]["samples"], "sample is there", "samples are there"),
            shown_examples(changes.shown["outside_filter"]["examples"], changes.shown["outside_filter"]["samples"]),
        )
        identity = {**identity, "source": _filters_of(parent.identity["source"], identity["source"])}
    fresh = listing.take(np.flatnonzero(changes.written))
    return dataclasses.replace(work, fresh=fresh, identity=identity, placed=placed, ledger=ledger, changes=changes, contents=contents)


def _contents(work: _Work, fan_out: FanOut) -> Contents:
    """Return what reads the samples of a source for `splits.by=content`."""
    read = functools.partial(read_again, source=work.source, shards=work.shards, fan_out=fan_out)
    return Contents(read, checksum=work.shards.checksum)


def _with_policy(
    splits: SplitSpec, shards: ShardSpec, there: Mapping[str, Any] | None
) -> tuple[SplitSpec, ShardSpec]:  # any: plain JSON data
    """Return the settings with what becomes of equal content: what is asked for, else what the dataset has; None for the default."""
    recorded, plain = there or {}, Policy()
    leaks = splits.leaks or recorded.get("splits", {}).get("leaks")
    duplicates = shards.duplicates or recorded.get("shards", {}).get("duplicates")
    return (
        dataclasses.replace(splits, leaks=None if leaks == plain.leaks else leaks),
        dataclasses.replace(shards, duplicates=None if duplicates == plain.duplicates else duplicates),
    )


def _policy_of(manifest: DatasetManifest) -> Policy:
    splits, shards = (manifest.identity.get(name, {}) for name in ("splits", "shards"))
    return Policy(shards.get("duplicates") or "keep", splits.get("leaks") or "warn")


def _left_out(source: Any, parent: DatasetManifest, rows: pa.Table) -> NDArray[np.bool_]:  # any: every source kind has its own spec class
    """Return which of these samples of a dataset the filter of the source leaves out."""
    names, sizes = list[Any](rows["source"].to_pylist()), list[Any](rows["bytes"].to_pylist())  # any: texts, numbers
    unread: Any = pc.is_null(rows["sha256"])  # any: the stubs know no types of values
    for row in np.flatnonzero(unread.to_numpy() & (rows["bytes"].to_numpy() == 0)).tolist():
        sizes[row] = sys.maxsize  # of a link to nothing, which no source.min_size leaves out
    return np.array(left_out(source, parent.identity.get("source", {}), names, sizes), np.bool_)


def _filters_of(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:  # any: plain JSON data
    """Return the settings `other` of a source with the filters of `one`."""
    chosen = {name: one[name] for name in FILTERS if name in one}
    return {**{name: value for name, value in other.items() if name not in FILTERS}, **chosen}


def _require_same(work: _Work, there: DatasetManifest) -> None:
    """Raise ConfigError with the differing fields if the dataset was written with other settings; filters may differ if it follows."""
    specs = {"source": work.source, "splits": work.splits, "shards": work.shards}
    absent = {name: absent_values(spec) for name, spec in specs.items()}
    asked, recorded, absent = (
        fixed_identity(part, follows=work.removal is not None) for part in (work.identity, _with_classes(there, work.source), absent)
    )
    require_same(work.store.url, "dataset", asked, recorded, absent=absent)


def _with_classes(parent: DatasetManifest, source: Any) -> Mapping[str, Any]:  # any: as above
    """Return the identity of a generation as if it had been given the `source.classes` of this one, if these begin with its classes."""
    given = list(fixed_classes(source))
    if not given or tuple(given[: len(parent.classes)]) != parent.classes:
        return parent.identity
    return {**parent.identity, "source": {**parent.identity.get("source", {}), "classes": given}}


def _listed(
    store: Store, names: Sequence[str], parent: DatasetManifest | None, source: Any, splits: SplitSpec, max_pixels: int
) -> tuple[Mapping[str, Any] | None, Any, Source, Listing]:  # any: plain JSON data, and every source kind has its own spec class
    """Return the identity of the dataset that this source continues (None: a new one), the source's spec, the source, and its listing.

    A dataset that exists is listed by the rules that it recorded. Before its first manifest that is one with a claim of this listing.
    `splits` are those that are asked for.
    """
    listed: list[tuple[Any, Source, Listing]] = []  # any: as above
    hashes: list[tuple[str, str]] = []  # as they are, and as versions before states made them

    def rows(spec: Any) -> int:  # any: as above
        known = next((number for number, found in enumerate(listed) if found[0] == spec), None)
        if known is not None:
            return known
        opened: Source = SOURCES.build(spec)
        bound_pixels(opened, max_pixels)
        listing = without_bad_splits(by_rules(spec, opened.listing()), splits).spilled()
        listed.append((spec, opened, dataclasses.replace(listing, origin=listing.origin or origin_of(spec))))
        return len(listed) - 1

    if parent is not None:
        return parent.identity, *listed[rows(as_recorded(source, parent.identity.get("source", {})))]
    for number in range(newest_of(names, "run") or 0, 0, -1):
        name = f"run.{number:06d}.json"
        identity = read_json(store, name).get("identity", {}) if name in names else {}
        if "listing" not in identity:
            continue
        at = rows(as_recorded(source, identity["dataset"].get("source", {})))
        hashes += [(found[2].sha256(), found[2].without_states().sha256()) for found in listed[len(hashes) :]]
        if identity["listing"] in hashes[at]:
            return identity["dataset"], *listed[at]
    return None, *listed[rows(source)]


def _warn(store: Store, listing: Listing, asked: SplitSpec, splits: SplitSpec) -> None:
    """Log warnings about the splits; not for an explicit choice of none or hash."""
    if asked.by == "auto" or splits.by == "folders":
        for warning in split_warnings(listing, splits):
            logger.warning("%s: %s", store.url, warning)


def _write(work: _Work, fan_out: FanOut, on_part: OnPart | None, spent: dict[str, float]) -> DatasetManifest:
    started = time.perf_counter()
    store, parent = work.store, work.parent
    generation, work = _as_begun(work, _generation(work))
    plan = work.plan(claim=1)  # before anything is claimed: what cannot be planned leaves nothing behind
    if parent is None:
        remove_refused(store, generation)
    told = {"source": to_dict(work.source), **({"made_of": work.made_of} if work.made_of else {})}
    claim = claim_generation(store, "dataset", generation, told)
    plan = plan if claim == 1 else work.plan(claim)
    take_over(store, claim)
    _warn_of_orphans(work, plan)
    _warn_of_plan(work, plan)
    for note in plan.notes:
        logger.info("%s: %s", store.url, note)
    handed = Handed()
    make_worker = _make_worker(work, handed)
    with _Listing(work, plan, claim, handed) as listing:  # in the background: only the manifest waits for it
        try:
            records = collect(fan_out, make_worker, plan.tasks, what="shards", on_part=listing.reporting(on_part), on_start=listing.start)
            spent["shards"] = time.perf_counter() - started
            _require_good(work, records)
            removed = listing.removed()
        except (ConfigError, DataError):
            listing.close()
            leave_refused(store, claim, [task.stem for task in plan.tasks])
            raise
        removals = list[PartRecord]()
        if len(removed):  # of parts of this generation too, which no manifest names yet
            parts = next_manifest(parent, work.identity, plan.classes, records, FileRef("", 0, ""), None)
            removals = remove_samples(Dataset(store, parts), removed, claim)
        listed, living = listing.put(removals)
    manifest = next_manifest(parent, work.identity, plan.classes, records, listed, sha256_json(generation), living, work.about)
    old = [] if parent is None else parent.own_files
    new = set(manifest.own_files) - set(old)
    new_files = sorted(new, key=lambda ref: ref.name)

    def require_continued(number: int) -> None:
        _require_same(work, read_manifest(store, number))

    made, place = {**work.made_of, store.url: manifest.parent}, f"{store.url}/{STEM}.{manifest.number:06d}.json"
    with contextlib.ExitStack() as stack:
        for url, number in made.items():
            stack.enter_context(made_of(url, number, place))
        commit_manifest(store, STEM, manifest.parent, manifest.to_json(), new=new_files, old=old, require_continued=require_continued)
    rows = counted(sum(record.rows for record in records), "new sample", "new samples")
    counts = rows, sum(record.quarantined for record in records)
    seconds = time.perf_counter() - started
    logger.info("%s: generation %d, %s, %d quarantined, %.1f s", store.url, manifest.number, *counts, seconds)
    if changes := ", ".join(f"{name} {found['samples']}" for name, found in work.shown.items() if found["samples"] and name != "left_out"):
        logger.info("%s: %s", store.url, changes)
    if left := len(listing.left):
        logger.info("%s: %s left out, whose content others have", store.url, counted(left, "sample is", "samples are"))
    for note in _pixel_notes(records, manifest.sample.shapes):
        logger.info("%s: %s", store.url, note)
    for warning in _range_warnings(records, work.shards):
        logger.warning("%s: %s", store.url, warning)
    report_formats(store, parent, manifest)
    spent["commit"] = time.perf_counter() - started - spent["shards"]
    _report(Dataset(store, manifest), spent, None if listing.ledger is None else (listing.ledger, listing.left), work.ledger)
    return manifest


def _as_begun(work: _Work, generation: dict[str, Any]) -> tuple[dict[str, Any], _Work]:  # any: plain JSON data
    """Return the identity of a claim and the work as a version that knew no states began them, if it did; else both as they are.

    Such a dataset only grows, so a run that says what becomes of removed samples begins anew.
    """
    if work.shards.removed is not None:
        return generation, work
    names, newest = work.store.list(), work.parent.claim if work.parent else 0
    if (newest_of(names, "run") or 0) <= newest:
        return generation, work
    listing = work.listing.without_states()
    begun = {**generation, "listing": listing.sha256()}
    if begun == generation or find_claim(work.store, begun, names, above=newest) is None:
        return generation, work
    return begun, dataclasses.replace(work, listing=listing, fresh=work.fresh.without_states(), removal=None, before_states=True)


def _generation(work: _Work) -> dict[str, Any]:  # any: plain JSON data
    """Return the identity of the claim: all that decides what the generation holds."""
    parent = work.parent
    generation: dict[str, Any] = {"dataset": work.identity, "listing": work.listing.sha256(), "parent": parent.number if parent else 0}
    names = work.fresh.label_names  # older versions would have written other classes under this claim
    if names is not None and not all(map(is_spelled, Texts.of(names).distinct())):
        generation["names"] = "NFC"
    if work.removal is not None and (parent is not None or work.removal != "drop"):
        generation["removal"] = work.removal
    if parent is not None and work.changes is not None:
        generation["parent_manifest"] = sha256_json(parent.to_json())
        generation["changes"] = {"removed": content_sha256(work.changes.removed), "written": work.fresh.sha256()}
    if work.contents is not None:
        generation["contents"] = sha256_json(work.contents)
    return generation


class _Listing(contextlib.AbstractContextManager["_Listing"]):
    """The listing of a generation, made in a thread while the shards are written."""

    def __init__(self, work: _Work, plan: DatasetPlan, claim: int, handed: Handed) -> None:
        self._work, self._claim, self._handed = work, claim, handed
        self._tasks = {task.stem: task for task in plan.tasks}
        self._background = ThreadPoolExecutor(1, "listing")
        self._rows: dict[str, Future[pa.Table]] = {}
        large = is_large(sum(map(len, plan.tasks)))
        self._spill = Spill(LEDGER_SCHEMA) if large else None
        self._places = dict[str, tuple[int, int]]()  # of parts in the scratch file
        self._grown: Future[FileRef] | None = None
        self._before: Future[str] | None = None
        self._new = LEDGER_SCHEMA.empty_table()
        self._removed = REMOVED_PLACES.empty_table()
        self._left = LEDGER_SCHEMA.empty_table()
        self.ledger: pa.Table | None = None

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait for what was begun."""
        self._background.shutdown()
        if self._spill is not None:
            self._spill.close()

    def start(self) -> None:
        """Write the whole listing of a dataset that only grows: it depends on no shard. Of another one, hash the ledger of its parent."""
        parent, ledger = self._work.parent, self._work.ledger
        if parent is not None and parent.content_sha256 is not None and ledger is not None:
            self._before = self._background.submit(samples_sha256, ledger)
        if self._work.removal is None:
            self._grown = self._background.submit(_put_listing, self._work.store, self._claim, listing_table(self._work.fresh))

    def reporting(self, on_part: OnPart | None) -> OnPart:
        """Return `on_part`, which before that makes the rows of the part."""

        def made(record: PartRecord, done: int, total: int) -> None:
            tables = self._handed.take(record.part)
            if self._work.removal is not None:
                self._rows[record.part] = self._background.submit(self._rows_of, record, tables)
            if on_part is not None:
                on_part(record, done, total)

        return made

    def _rows_of(self, record: PartRecord, tables: Mapping[str, pa.Table]) -> pa.Table:
        rows = recorded_rows(self._work.store, self._tasks[record.part], self._work.listing.origin, record, tables)
        if self._spill is None:
            return rows
        self._places[record.part] = self._spill.rows, len(rows)
        self._spill.add(rows)
        return LEDGER_SCHEMA.empty_table()

    def _known_with(self, new: pa.Table) -> pa.Table:
        """Return the ledger of the generation, which this listing completes."""
        ledger = self._work.ledger
        if ledger is None:
            ledger = LEDGER_SCHEMA.empty_table()
            if not len(self._removed):
                return new
        before = [] if self._work.changes is None else [self._work.changes.was_left]  # of which some are renewed
        removed = pa.concat_tables([table.select(["split", "ordinal"]) for table in (self._removed, *before)])
        return newest_rows(pa.concat_tables([ledger, new]), removed)

    @property
    def left(self) -> pa.Table:
        """What is known of samples that the generation leaves out since another one has their content."""
        known = [] if self._work.changes is None else [self._work.changes.left]
        return pa.concat_tables([*known, self._left]).combine_chunks()

    def removed(self) -> pa.Table:
        """Return split, ordinal, key and reason of all that the generation removes: what changed, and equal content.

        Called when all parts are recorded. DataError if the policy refuses what they hold.
        """
        work = self._work
        if work.removal is None:
            return self._removed
        rows = [self._rows[stem].result() for stem in self._tasks]
        if self._spill is not None:
            recorded = self._spill.table()
            rows = [recorded.slice(*self._places[stem]) for stem in self._tasks]
        changes = [] if work.changes is None else [work.changes.renewed]
        self._new = pa.concat_tables([LEDGER_SCHEMA.empty_table(), *changes, *rows])
        self._removed = REMOVED_PLACES.empty_table() if work.changes is None else work.changes.removed
        if not work.policy.is_plain:
            ledger = self._known_with(self._new)
            require_allowed(ledger, work.policy, work.store.url)
            why = dropped(ledger, work.policy)
            self._left, given = filtered(ledger, why != ""), list[str](why[why != ""])
            more = self._left.select(["split", "ordinal", "key"]).append_column("reason", pa.array(given, pa.string()))
            self._removed = pa.concat_tables([self._removed, more])
        return self._removed

    def put(self, removals: Sequence[PartRecord]) -> tuple[FileRef, Living | None]:
        """Commit the listing; return it, and what else the manifest has of a dataset that follows its source."""
        work, parent = self._work, self._work.parent
        if self._grown is not None:
            return self._grown.result(), None
        if parent is not None and self._before is not None and self._before.result() != parent.content_sha256:
            raise DataError(
                f"{work.store.url}: the listings of generation {parent.number} hold samples of content_sha256 {self._before.result()}, its "
                f"manifest says {parent.content_sha256}: one of them was changed; restore it (nothing was committed)"
            )
        new = self._new
        ledger, merged = self._known_with(new), parent is not None and _is_merged(parent)
        self.ledger = ledger
        content = self._background.submit(samples_sha256, ledger)

        def knows_the_same(there: pa.Table) -> bool:  # of an attempt that was killed, at which time other states were known
            if not there.schema.equals(LEDGER_SCHEMA):
                return False
            ours, theirs = (rows.drop_columns(["bytes", "origin", "state"]) for rows in (ledger, self._known_with(there)))
            return bool(ours.equals(theirs))

        listed = _put_listing(work.store, self._claim, pa.concat_tables([ledger, self.left]) if merged else new, knows_the_same)
        by_part = {part_of(record): record for record in removals}
        details = None if parent is None or not removals else live_details(work.store, parent.parts, by_part)
        removed = {stem: removed_of(record) for stem, record in by_part.items()}
        counts = {stem: record.detail for stem, record in by_part.items() if stem in self._tasks}
        return listed, Living(work.removal, content.result(), removed, details, counts, merged)


def _is_merged(parent: DatasetManifest) -> bool:
    """Return whether the next listing takes the place of all that a manifest names: many, or of before there were states.

    What the latter do not say is read from all indexes, so each run would do so again.
    """
    return len(parent.listings) >= MOST_LISTINGS or parent.removal is None


def _make_worker(work: _Work, handed: Handed) -> Callable[[], Worker]:
    if not work.adopt:
        return functools.partial(ShardWorker, work.store.url, work.source, handed)
    from aecore.data.write.adopt import AdoptWorker

    return functools.partial(AdoptWorker, work.store.url, work.source)


def _pixel_notes(records: Sequence[PartRecord], shapes: Mapping[str, int]) -> Iterator[str]:
    """Yield what was chosen where files leave a choice: the frame of several, the axes of arrays that can be no sequences."""
    if several := sum(record.detail.get("first_frames", 0) for record in records):
        what = counted(several, "file has several pages or frames", "files have several pages or frames")
        yield f"{what}, of which the first was stored (source.frames=first; all or refuse)"
    counts: dict[str, Counter[str]] = defaultdict(Counter)  # by channels
    for record in records:
        for text, count in record.detail.get("shapes", {}).items():
            if f"/{CHANNEL_LAST};" in text:
                shape = text.partition("/")[0]
                counts[shape.rpartition("x")[2]][shape] += count
    for channels, found in [] if may_be_sequences(shapes) else sorted(counts.items())[:SHOWN]:
        of_shapes = f"{len(found)} shapes such as {min(found)}" if len(found) > 1 else min(found)
        arrays = counted(found.total(), f"array of {of_shapes} is an image", f"arrays of {of_shapes} are images")
        yield f"{arrays} [H, W, C] of {channels} channels (shards.layout=auto; hwc or chw)"


def _range_warnings(records: Sequence[PartRecord], shards: ShardSpec) -> Iterator[str]:
    """Yield what `shards.value_range` lost, or that it did nothing."""
    if shards.value_range is None or not any(record.rows for record in records):
        return
    total = sum((Counter(record.detail.get("value_range", {})) for record in records), Counter[str]())
    asked = f"shards.value_range=[{shards.value_range[0]:g},{shards.value_range[1]:g}]"
    if not total["images"]:
        yield f"{asked} changed nothing: all images have 8 bits, whose range is known"
    elif total["cut"] > LOST * total["values"]:
        images = counted(total["images"], "image", "images")
        yield (
            f"{asked} cut off {total['cut'] / total['values']:.1%} of the values of {images}, which are black or white now: check the "
            "range, or write to another URL with a wider one"
        )


def _warn_of_plan(work: _Work, plan: DatasetPlan) -> None:
    """Log what of the settings has no effect on the new samples."""
    shards, parent = work.shards, work.parent
    if shards.background != "white" and shards.resize is None and shards.mode == "keep" and shards.value_range is None:
        logger.warning(
            "%s: shards.background=%s changes nothing: without shards.resize, shards.mode or shards.value_range images keep their alpha "
            "(a model of three channels composes it over transform.background)",
            work.store.url,
            shards.background,
        )
    filled = {task.split for task in plan.tasks} | {*(parent.splits if parent else ())}
    for name, share in (("val", work.splits.val), ("test", work.splits.test)):
        if share and len(work.fresh) and name not in filled:
            units = "groups of samples" if work.fresh.groups is not None else "samples"
            logger.warning(
                "%s: no sample is in the split %s, which splits.%s=%g asks for: of few %s a hash may choose none; try "
                "splits.stratify=true, another splits.seed or a larger share, before anything is trained on these",
                work.store.url,
                name,
                name,
                share,
                units,
            )


def _warn_of_orphans(work: _Work, plan: DatasetPlan) -> None:
    if work.parent is None:
        warn_of_orphans(work.store, {task.stem for task in plan.tasks}, adopted=work.adopt)


def _absolute(source: Any) -> Any:  # any: every source kind has its own spec class
    """Return the spec with an absolute `url`, if it has one: workers have another working directory."""
    urls = {field.name for field in dataclasses.fields(source)} & {"url"}
    return dataclasses.replace(source, **{name: absolute_url(getattr(source, name), f"source.{name}") for name in urls})


def _put_listing(store: Store, claim: int, rows: pa.Table, accepts: Callable[[pa.Table], bool] = lambda there: False) -> FileRef:
    """Commit what is known of the samples that a generation writes or renews; the next run compares the source with that.

    A listing that another attempt committed under this claim is kept if it says the same, or if `accepts(its rows)`.
    """
    return put_table(store, f"listings/{claim:06d}.parquet", rows, {"claim": claim}, "listing", accepts)


def _require_usable(work: _Work) -> None:
    """Raise DataError if already the source says of too many new samples that they cannot be used: before anything is written.

    These are part of the count of `_require_good`, which comes after the samples were read.
    """
    if not len(work.fresh):
        return
    asked = work.fresh if work.removal is None else work.listing
    unusable, total = asked.unusable or [], len(asked)
    rows = [row for row, why in enumerate(unusable) if why is not None]
    all_bad = work.parent is None and total == len(rows) > 0
    if len(rows) <= work.shards.max_bad * total and not all_bad:
        return
    lines = _examples((asked.sources[row], why.reason, why.message) for row in rows if (why := unusable[row]))
    counts = ", ".join(f"{reason} {count}" for reason, count in _reasons(unusable).most_common())
    remedy = f"or accept them with shards.max_bad={_share(len(rows), total)} or more, and"
    if len(rows) == total:
        remedy = "or say how to read them, and"
    too_many = "" if all_bad else f", more than shards.max_bad={work.shards.max_bad:g} allows"
    raise DataError(
        f"{len(rows)} of {total} samples cannot be used{too_many}; nothing was written. Their reasons: {counts}. First of them:{lines}\n"
        f"repair or remove them, {remedy} run the command again"
    )


def _examples(bad: Iterable[tuple[str, str, str]]) -> str:
    """Return lines of source, reason and message of the first bad samples: one for all those of one message, as of a broken tar."""
    found: dict[tuple[str, str], list[str]] = {}
    for source, reason, message in bad:
        if (reason, message) in found or len(found) < SHOWN:
            found.setdefault((reason, message), []).append(source)
    return "".join(f"\n  {first_of(names)}: {reason}: {message}" for (reason, message), names in found.items())


def _reasons(unusable: Sequence[BadSample | None]) -> Counter[str]:
    return Counter(why.reason for why in unusable if why is not None)


def _share(count: int, total: int) -> str:
    """Return a share that is not less than `count` of `total`, in few digits."""
    return f"{math.ceil(count / total * 1000) / 1000:g}"


def _require_good(work: _Work, records: Sequence[PartRecord]) -> None:
    """Raise DataError if more samples are bad than `shards.max_bad` allows, or if all of a new dataset are."""
    store, max_bad = work.store, work.shards.max_bad
    bad = sum(record.quarantined for record in records)
    planned = sum(record.detail["planned"] for record in records)
    all_bad = work.parent is None and bad == planned
    share, total = bad, planned
    if bad and work.changes is not None:  # the share is that of the whole source, as if it were sharded anew
        share, total = bad + work.changes.stayed, len(work.listing)
    if share <= max_bad * total and not all_bad:
        return
    refs = [ref for record in records for ref in record.files if ref.name.startswith("quarantine/")]
    tables = (read_table(store.read(ref.name, ref=ref), f"{store.url}/{ref.name}").to_pylist() for ref in refs)
    rows = itertools.islice(itertools.chain.from_iterable(tables), MOST_EXAMPLES)
    lines = _examples((row["source"], row["reason"], row["message"]) for row in rows)
    reasons: Counter[str] = Counter()
    for record in records:
        reasons.update(record.detail.get("reasons", {}))
    counts = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common(SHOWN))
    accept = f", or accept them with shards.max_bad={_share(share, total)} or more" if not all_bad else ""
    if not any(record.rows for record in records):
        raise DataError(
            f"all {planned} samples are bad ({counts}): nothing was kept. First of them:{lines}\n"
            f"put them right, or check source.url and source.extensions{accept}, and run the command again"
        )
    known = work.listing.states is not None
    unseen = "" if known else "; files that are repaired without another size need another output URL"  # they would be the same listing
    raise DataError(
        f"{share} of {total} samples are bad, more than shards.max_bad={max_bad:g} allows ({counts}); no manifest was written. First of "
        f"them:{lines}\n"
        f"all are listed in {', '.join(f'{store.url}/{ref.name}' for ref in refs[:SHOWN])}{', ...' if len(refs) > SHOWN else ''}\n"
        f"repair or remove these files{accept}, and run the command again{unseen}"
    )
