"""`shard_dataset`: a source becomes a dataset, or the next generation of one.

List, compare with the dataset, plan, write the shards (anywhere: see `fanout`), publish the manifest. The process may die at any
point before the manifest: the same command finds its claim again and continues. Nothing is overwritten; a sample that is stored
already, in a shard or in quarantine, is never written again.
"""

import dataclasses
import functools
import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from aecore.artifact.commit import PartRecord, claim_generation, commit_manifest, newest_of, require_same
from aecore.artifact.documents import read_json
from aecore.artifact.fanout import Commit, FanOut, OnPart, collect, serial
from aecore.data.format.index import read_table
from aecore.data.manifest import STEM, DatasetManifest, read_manifest
from aecore.data.sources import Listing
from aecore.data.write.adopt import AdoptWorker, files_of, require_adoptable
from aecore.data.write.append import (
    SHOWN,
    listing_table,
    new_rows,
    require_whole_bags,
    warn_if_address_changed,
    warn_if_format_changed,
    warn_of_orphans,
)
from aecore.data.write.manifest_build import next_manifest
from aecore.data.write.plan import DatasetPlan, PlanSummary, plan_dataset, require_unique
from aecore.data.write.shard import pack_shard, put_table
from aecore.data.write.spec import ShardSpec, ShardTask
from aecore.data.write.splits import SplitSpec, resolve_splits, split_warnings
from aecore.errors import DataError
from aecore.registry import SOURCES, absent_values, as_recorded, to_dict
from aecore.store import FileRef, Store, absolute_url, open_store, sha256_json

logger = logging.getLogger(__name__)


class ShardWorker:
    """Writes shards of one dataset: opens the output and the source once, in the process it works in."""

    def __init__(self, out: str, source: Any) -> None:  # any: every source kind has its own spec class
        self._store = open_store(out)
        self._source = SOURCES.build(source)

    def __call__(self, task: ShardTask) -> Commit:
        """Pack the shard of `task` and return the call that commits it."""
        return pack_shard(self._store, task, self._source)


def shard_dataset(
    source: Any,  # any: every source kind has its own spec class
    out: str,
    splits: SplitSpec | None = None,
    shards: ShardSpec | None = None,
    *,
    fan_out: FanOut = serial,
    dry_run: bool = False,
    on_part: OnPart | None = None,
) -> DatasetManifest | PlanSummary:
    """Write the samples of `source` that the dataset at `out` does not have yet, as its next generation.

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

    Returns
    -------
    DatasetManifest or PlanSummary
        The new generation; the newest one if there is nothing new; the summary for a dry run.

    Raises
    ------
    ConfigError
        If `out` was written with another source kind or other splits or shards (the differing fields are shown).
    DataError
        If the source is missing or empty, a known sample changed, or more than `shards.max_bad` of the samples are bad
        (then there is no new manifest; the shards that were written are kept for a rerun).
    """
    work = _compare(_absolute(source), out, splits or SplitSpec(), shards or ShardSpec())
    return _publish(work, fan_out, dry_run, on_part)


def adopt_shards(
    source: Any,  # any: as above
    out: str,
    splits: SplitSpec | None = None,
    shards: ShardSpec | None = None,
    *,
    fan_out: FanOut = serial,
    dry_run: bool = False,
    on_part: OnPart | None = None,
) -> DatasetManifest | PlanSummary:
    """Index the tars of a `WebdatasetSpec` in place, as a dataset at `out` or its next generation; see `adopt` and `shard_dataset`.

    Raises ConfigError for other sources and for shards.resize and shards.mode, DataError for tars that are compressed or damaged.
    """
    shards = shards or ShardSpec()
    require_adoptable(source, shards)
    work = _compare(_absolute(source), out, splits or SplitSpec(), shards, adopt=True)
    files_of(work.fresh.sources)  # refuses what cannot be adopted before anything is claimed
    return _publish(work, fan_out, dry_run, on_part)


def _publish(work: "_Work", fan_out: FanOut, dry_run: bool, on_part: OnPart | None) -> DatasetManifest | PlanSummary:
    if dry_run:
        plan = work.plan(claim=1)
        _warn_of_orphans(work, plan)
        return plan.summary(known=len(work.listing) - len(work.fresh))
    if work.parent is not None and not len(work.fresh):
        logger.info("%s: nothing new in %d samples, generation %d stays", work.store.url, len(work.listing), work.parent.number)
        return work.parent
    return _write(work, fan_out, on_part)


@dataclass(frozen=True, slots=True)
class _Work:
    """The work of one run: the newest generation, everything listed, and the samples of it that are new."""

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

    def plan(self, claim: int) -> DatasetPlan:
        """Return the plan of the new samples, its notes starting with the choice of `auto`."""
        files = files_of(self.fresh.sources) if self.adopt else None
        plan = plan_dataset(self.fresh, self.splits, self.shards, self.parent, claim, self.source, files)
        chosen = (f"splits.by=auto chose {self.splits.by}",) if self.asked.by == "auto" else ()
        return dataclasses.replace(plan, notes=(*chosen, *plan.notes))


def _compare(
    source: Any, out: str, asked: SplitSpec, shards: ShardSpec, *, adopt: bool = False
) -> _Work:  # any: every source kind has its own spec class
    store = open_store(out)
    listing: Listing = SOURCES.build(source).listing()
    require_unique(listing)
    names = store.list()
    newest = newest_of(names, STEM)
    parent = None if newest is None else read_manifest(store, newest)
    recorded = _unfinished(store, names, listing) if parent is None else parent.identity
    if recorded is not None:
        source, asked, shards = (
            as_recorded(source, recorded.get("source", {})),
            as_recorded(asked, recorded.get("splits", {})),
            as_recorded(shards, recorded.get("shards", {})),
        )
    splits = resolve_splits(listing, asked, (recorded or {}).get("splits"), parent.splits if parent else ())
    specs = {"source": source, "splits": splits, "shards": shards}
    identity = {name: to_dict(spec, identity_only=True) for name, spec in specs.items()}
    if adopt:
        identity["adopted"] = {"by": "offset"}
    if parent is None:
        _warn(store, listing, asked, splits)
        return _Work(store, source, asked, splits, shards, None, listing, listing, identity, adopt)
    work = _Work(store, source, asked, splits, shards, parent, listing, listing, identity, adopt)
    _require_same(work, parent)
    warn_if_address_changed(store, parent, source, listing)
    rows = new_rows(store, parent, listing, shards)
    fresh = listing.take(rows)
    require_whole_bags(store, listing, rows)
    if len(fresh):
        _warn(store, listing, asked, splits)
    return dataclasses.replace(work, fresh=fresh)


def _require_same(work: _Work, there: DatasetManifest) -> None:
    """Raise ConfigError with the differing fields if the dataset was written with other settings."""
    specs = {"source": work.source, "splits": work.splits, "shards": work.shards}
    absent = {name: absent_values(spec) for name, spec in specs.items()}
    require_same(work.store.url, "dataset", work.identity, there.identity, absent=absent)


def _unfinished(store: Store, names: Sequence[str], listing: Listing) -> Mapping[str, Any] | None:  # any: plain JSON data
    """Return the identity of an unfinished first generation of this same listing, None if there is none."""
    number = newest_of(names, "run") or 0
    claims = [name for claim in range(number, 0, -1) if (name := f"run.{claim:06d}.json") in names]
    wanted = listing.sha256() if claims else ""
    for name in claims:
        identity = read_json(store, name).get("identity", {})
        if identity.get("listing") == wanted:
            found: Mapping[str, Any] = identity["dataset"]
            return found
    return None


def _warn(store: Store, listing: Listing, asked: SplitSpec, splits: SplitSpec) -> None:
    """Log warnings about the splits; not for an explicit choice of none or hash."""
    if asked.by == "auto" or splits.by == "folders":
        for warning in split_warnings(listing, splits):
            logger.warning("%s: %s", store.url, warning)


def _write(work: _Work, fan_out: FanOut, on_part: OnPart | None) -> DatasetManifest:
    started = time.perf_counter()
    store, parent = work.store, work.parent
    generation = {"dataset": work.identity, "listing": work.listing.sha256(), "parent": parent.number if parent else 0}
    claim = claim_generation(store, "dataset", generation, {"source": to_dict(work.source)})
    plan = work.plan(claim)
    _warn_of_orphans(work, plan)
    for note in plan.notes:
        logger.info("%s: %s", store.url, note)
    make_worker = functools.partial(AdoptWorker if work.adopt else ShardWorker, store.url, work.source)
    with ThreadPoolExecutor(1, "listing") as background:  # only the manifest waits for it
        listing = background.submit(_put_listing, store, claim, work.fresh)
        records = collect(fan_out, make_worker, plan.tasks, what="shards", on_part=on_part)
        listed = listing.result()
    _require_good(store, records, work.shards.max_bad)
    manifest = next_manifest(parent, work.identity, plan.classes, records, listed, sha256_json(generation))
    old = [] if parent is None else parent.own_files
    new = set(manifest.own_files) - set(old)
    new_files = sorted(new, key=lambda ref: ref.name)

    def require_continued(number: int) -> None:
        _require_same(work, read_manifest(store, number))

    commit_manifest(store, STEM, manifest.parent, manifest.to_json(), new=new_files, old=old, require_continued=require_continued)
    counts = sum(record.rows for record in records), sum(record.quarantined for record in records)
    seconds = time.perf_counter() - started
    logger.info("%s: generation %d, %d new samples, %d quarantined, %.1f s", store.url, manifest.number, *counts, seconds)
    if parent is not None:
        warn_if_format_changed(store, parent, manifest)
    return manifest


def _warn_of_orphans(work: _Work, plan: DatasetPlan) -> None:
    if work.parent is None:
        warn_of_orphans(work.store, {task.stem for task in plan.tasks}, adopted=work.adopt)


def _absolute(source: Any) -> Any:  # any: every source kind has its own spec class
    """Return the spec with an absolute `url`, if it has one: workers have another working directory."""
    urls = {field.name for field in dataclasses.fields(source)} & {"url"}
    return dataclasses.replace(source, **{name: absolute_url(getattr(source, name), f"source.{name}") for name in urls})


def _put_listing(store: Store, claim: int, listing: Listing) -> FileRef:
    """Commit keys, sources and source sizes of the planned samples; the next append compares its listing with them."""
    return put_table(store, f"listings/{claim:06d}.parquet", listing_table(listing), {"claim": claim}, "listing")


def _require_good(store: Store, records: Sequence[PartRecord], max_bad: float) -> None:
    bad = sum(record.quarantined for record in records)
    planned = sum(record.detail["planned"] for record in records)
    if bad <= max_bad * planned:
        return
    refs = [ref for record in records for ref in record.files if ref.name.startswith("quarantine/")]
    rows: list[Mapping[str, Any]] = []  # any: a row of the quarantine table
    for ref in refs:
        if len(rows) < SHOWN:
            rows += read_table(store.read(ref.name, ref=ref), f"{store.url}/{ref.name}").slice(0, SHOWN - len(rows)).to_pylist()
    lines = "".join(f"\n  {row['source']}: {row['reason']}: {row['message']}" for row in rows)
    raise DataError(
        f"{bad} of {planned} samples are bad, more than shards.max_bad={max_bad:g} allows; no manifest was written. First of them:{lines}\n"
        f"all are listed in {', '.join(f'{store.url}/{ref.name}' for ref in refs[:SHOWN])}{', ...' if len(refs) > SHOWN else ''}\n"
        "remove these files, or accept them with a higher shards.max_bad, and run the command again; repaired files need another output URL"
    )
