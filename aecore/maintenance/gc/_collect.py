"""Plan a collection, check that the artefact has not changed meanwhile, remove."""

import dataclasses
import logging
import time
from dataclasses import dataclass
from typing import Any

from aecore.artifact.kinds import detect_artifact
from aecore.errors import ConfigError, DataError, RunFailed, StoreError
from aecore.maintenance.gc._parts import plan_parts
from aecore.maintenance.gc._plan import DAY_S, Garbage, Plan, Waiting
from aecore.maintenance.gc._run import plan_run
from aecore.maintenance.gc._superseded import plan_superseded, remove_empty_folders
from aecore.store import SKEW_S, Store, ahead_s, open_store

logger = logging.getLogger(__name__)
WEEK_S = 7 * DAY_S


@dataclass(frozen=True, slots=True)
class Report:
    """What was removed (in a dry run: would be), what has to wait, and `not_ours`: external files, which are never touched."""

    kind: str
    url: str
    garbage: tuple[Garbage, ...]
    waiting: tuple[Waiting, ...]
    not_ours: tuple[str, ...]
    dry_run: bool

    @property
    def bytes(self) -> int:
        """Sum of the sizes of the garbage."""
        return sum(item.bytes for item in self.garbage)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {**dataclasses.asdict(self), "files": len(self.garbage), "bytes": self.bytes}


def collect_garbage(
    url: str,
    *,
    older_than_s: float = DAY_S,
    keep_generations: int = 2,
    retention_s: float = WEEK_S,
    unfinished: bool = False,
    superseded: bool = False,
    dry_run: bool = False,
    now: float | None = None,
) -> Report:
    """Remove the garbage of the dataset, run or table at `url`.

    Parameters
    ----------
    url : str
        URL of one artefact.
    older_than_s : float
        All files of an attempt stay if one of them is younger.
    keep_generations : int
        The parts that these last generations name stay.
    retention_s : float
        Parts stay that a generation younger than this has replaced (of a table) or retired (of a dataset).
    unfinished : bool
        Also give up attempts that the same command would continue.
    superseded : bool
        The run or table is garbage as a whole, since a newer one has taken its place (see `superseded_folders`).
    dry_run : bool
        Remove nothing.
    now : float, optional
        The time from which ages are counted, in seconds since the epoch; by default the storage's own, by whose clock files are dated.
        Where that cannot be asked (no right to write), this machine's, and then nothing younger than a week is old.

    Raises
    ------
    DataError
        If there is none of the three, or a manifest or a claim is damaged: then nothing is removed, since the files that it names are
        unknown. What a damaged record or `checkpoint.json` may name waits.
    RunFailed
        If attempts were committed during each of three tries to make a plan.
    StoreError
        If a file cannot be removed.
    """
    require_one_stays(keep_generations)
    store = open_store(url)
    _kind_of(store)  # nothing is written to a place that holds something else, not even to ask for the time
    before, replaced_before = (
        written_before(store, older_than_s, retention_s) if now is None else [now - age for age in (older_than_s, retention_s)]
    )
    for _ in range(3):
        before_plan = _numbered(store)
        kind = _kind_of(store)
        plan = Plan(store, before, unfinished, keep_generations, replaced_before)
        try:
            if superseded and kind in ("run", "table"):
                plan_superseded(plan, kind)
            elif kind == "run":
                plan_run(plan)
            elif kind == "nothing":
                plan.temporary_files()
            else:
                plan_parts(plan, kind)
        except DataError as error:
            text = "nothing was removed: which files it names is not known before it is restored, or removed by hand"
            raise DataError(f"{error}\n{text}") from error
        if dry_run or before_plan == _numbered(store):
            report = _remove(plan, kind, dry_run)
            if superseded and not dry_run:
                remove_empty_folders(store)
            return report
    raise RunFailed(f"{store.url} changed three times while it was examined: collect again when fewer commands write there")


def require_one_stays(keep_generations: int) -> None:
    """ConfigError if not even the newest generation is to stay."""
    if keep_generations < 1:
        raise ConfigError(f"keep_generations is {keep_generations}, expected at least 1: the newest generation always stays")


def written_before(store: Store, *ages_s: float) -> list[float]:
    """Return the moments before which files are as old as this, by the storage's clock if it can be asked."""
    try:
        skew = ahead_s(store)
    except StoreError as error:
        logger.warning("%s; ages are taken from this machine's clock, and nothing younger than 7 days is old", error)
        return [time.time() - max(age, WEEK_S) for age in ages_s]
    if abs(skew) > SKEW_S:
        text = "this machine's clock is %s s %s that of %s, by which ages are counted: synchronise it (NTP)"
        logger.warning(text, f"{abs(skew):,.0f}", "ahead of" if skew > 0 else "behind", store.url)
    there = time.time() - skew
    return [there - age for age in ages_s]


def _numbered(store: Store) -> list[str]:
    """Return the names of claims and manifests: a new one makes a plan out of date."""
    return [name for name in store.list() if name.endswith(".json")] + store.list("model")


def _remove(plan: Plan, kind: str, dry_run: bool) -> Report:
    if not dry_run:
        for item in plan.garbage:
            plan.store.remove(item.name)
    report = Report(kind, plan.store.url, tuple(plan.garbage), tuple(plan.waiting), tuple(plan.not_ours), dry_run)
    done = "would remove" if dry_run else "removed"
    logger.info("%s: %s %d files, %.1f MB", report.url, done, len(report.garbage), report.bytes / 1e6)
    return report


def _kind_of(store: Store) -> str:
    """Return dataset, table or run, or "nothing" for a folder with temporary files only; DataError for anything else."""
    found = detect_artifact(store)
    if found is None:
        if store.list() == [".tmp"]:
            return "nothing"
        there = ", ".join(store.list()[:8])
        text = f"{store.url} holds no dataset, run or table: check the address; only what aecore wrote is collected"
        raise DataError(f"{text} (it has: {there})" if there else text)
    if found.is_generated:
        raise DataError(f"{store.url} holds {found.name}: all of it is one result, remove the folder if it is not needed")
    if found.kind == "checkpoint":
        raise DataError(f"{store.url} is {found.name}: a run keeps and removes whole checkpoints, give the run that it is in")
    if found.kind == "root":
        raise DataError(f"{store.url} is {found.name}: give one of {', '.join(f'{store.url}/{name}' for name in found.stages)}")
    return found.kind
