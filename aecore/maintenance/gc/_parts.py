"""Garbage of a dataset or a table: parts, records, listings and claims that no manifest names and no command will finish."""

import re
from collections.abc import Collection, Iterator, Sequence

from aecore.artifact.commit import claim_of
from aecore.artifact.documents import read_json
from aecore.errors import DataError
from aecore.maintenance.gc._claims import DATASET, STEM, Ledger, State, claim_name, read_ledger
from aecore.maintenance.gc._plan import Plan, below
from aecore.store import Store

_SUFFIXES = {
    "shards": (".tar", ".parquet"),
    "data": (".parquet",),
    "quarantine": (".parquet",),
    "removed": (".parquet",),
    "records": (".json",),
}
_NUMBERED = re.compile(r"(?:run|dataset|table|withdrawn)\.\d{6}\.json")
_FOLDERS = {"dataset": ("records", "shards", "quarantine", "removed", "listings"), "table": ("records", "data", "quarantine")}
REPORTS, _REPORT = "report", re.compile(r"report/(\d{6})\.(?:json|sha256)")
_WHY = {
    State.COMMITTED: "no manifest names it, and its generation is committed",
    State.DEAD: "of an attempt that a newer generation has superseded",
    State.UNFINISHED: "of an unfinished attempt that was given up",
}


def plan_parts(plan: Plan, kind: str) -> Ledger:
    """Add the garbage of a dataset or a table to the plan; return what its manifests and claims hold."""
    store = plan.store
    ledger = read_ledger(store, kind)
    known = (*_FOLDERS[kind], ".tmp", *([REPORTS] if kind == DATASET else []))
    plan.not_ours += [name for name in store.list() if not _NUMBERED.fullmatch(name) and name not in known]
    if kind == DATASET:
        _plan_reports(plan, ledger)
    groups: dict[int, list[str]] = {number: [] for number in ledger.claims}
    there = list(_files(store, kind))
    for name in there:
        is_record = name.startswith("records/")
        if name in ledger.files or (is_record and name.removeprefix("records/").removesuffix(".json") in ledger.stems):
            continue
        claim = _claim_of(name, kind, ledger)
        if claim is None:
            plan.not_ours.append(name)
        else:
            groups.setdefault(claim, []).append(name)
    _plan_replaced(plan, ledger, {*there})
    gone = [claim for claim in sorted(groups) if _plan_group(plan, ledger, claim, groups[claim])]
    _plan_claims(plan, ledger, gone)
    plan.temporary_files()
    return ledger


def _plan_replaced(plan: Plan, ledger: Ledger, there: Collection[str]) -> None:
    """Plan the parts that no kept generation names and that were replaced long enough ago; the others wait.

    Most of all that was ever replaced is not `there` any more, so it is not asked for name by name.
    """
    store, kept, young = plan.store, list[str](), dict[int, bool]()
    for name, number in ledger.replaced.items():
        if name not in there:
            continue
        if number not in young:
            written = store.modified(f"{ledger.kind}.{number:06d}.json")
            young[number] = written is None or written > plan.replaced_before
        if number > ledger.newest - plan.keep_generations + 1 or young[number]:
            kept.append(name)
        else:
            plan.add([name], f"generation {number} has replaced it, and no kept generation names it")
    if kept:
        plan.wait("replaced parts", kept, "readers of the last generations may still need them, or they were replaced a short time ago")


def _plan_reports(plan: Plan, ledger: Ledger) -> None:
    """Add the reports of generations that are not there; those of the others stay, and what has another name is external."""
    for name in below(plan.store, REPORTS):
        match = _REPORT.fullmatch(name)
        if match is None:
            plan.not_ours.append(name)
        elif plan.store.size(f"{DATASET}.{match[1]}.json") is None:
            plan.remove_or_wait("report", [name], "report of a generation that is not there")


def files_of_table(plan: Plan, ledger: Ledger) -> list[str]:
    """Return all files of the parts of a table, also those that no manifest names; other files are recorded in `not_ours`."""
    store, kind = plan.store, ledger.kind
    plan.not_ours += [name for name in store.list() if not _NUMBERED.fullmatch(name) and name not in (*_FOLDERS[kind], ".tmp")]
    files = list(_files(store, kind))
    ours = [name for name in files if name in ledger.files or _claim_of(name, kind, ledger) is not None]
    plan.not_ours += [name for name in files if name not in ours]
    return ours


def _files(store: Store, kind: str) -> Iterator[str]:
    """Yield every file below the folders of the kind, records first: a part without a record was never finished."""
    for folder in _FOLDERS[kind]:
        for name in below(store, folder):
            if folder == "data" and name.startswith("data/split="):
                yield from below(store, name)
            else:
                yield name


def _claim_of(name: str, kind: str, ledger: Ledger) -> int | None:
    """Return the claim that a file belongs to; None if its name matches no pattern, or names a claim that never existed.

    Where tars are adopted every tar is external: they may be in this very folder, under names that match the patterns.

    Parts of a table carry the claim of the dataset's shard in their names, not the table's: they belong to its newest claim.
    """
    folder, _, file = name.partition("/")
    inside, _, base = file.rpartition("/")
    if ledger.adopted and file.endswith(".tar"):
        return None
    if folder == "listings":
        match = re.fullmatch(r"()(\d{6})\.(?:parquet|refused)", file)
    else:
        match = STEM.fullmatch(next((base.removesuffix(end) for end in _SUFFIXES[folder] if base.endswith(end)), ""))
        if match is not None and (match[1] not in ledger.splits or inside != (f"split={match[1]}" if folder == "data" else "")):
            return None
        if match is not None and (folder != "records" or kind != DATASET) and bool(match[3]) != (folder == "removed"):
            return None  # what is removed of a part is in `removed/`, and nothing else is there
    if match is None:
        return None
    claim = ledger.highest
    if kind == DATASET:
        claim = int(match[2]) if folder == "listings" else claim_of(match[0])
    return claim if 1 <= claim <= ledger.highest else None


def _state(ledger: Ledger, claim: int) -> State:
    """Return the state of the files of a claim; they are dead if a collection removed the claim and its process went on writing.

    Any claim of a table may have made its parts, so one that can be continued keeps all of them.
    """
    if ledger.kind == DATASET or claim != ledger.highest:
        return ledger.claims.get(claim, State.DEAD)
    return State.UNFINISHED if State.UNFINISHED in ledger.claims.values() else State.COMMITTED


def _plan_group(plan: Plan, ledger: Ledger, claim: int, names: list[str]) -> bool:
    """Plan the files of one claim; return whether only the claim itself is left."""
    state = _state(ledger, claim)
    what = f"{ledger.kind} claim {claim}"
    if state is State.UNFINISHED and not plan.unfinished:
        if names or ledger.claims.get(claim) is State.UNFINISHED:
            plan.wait(what, names, "unfinished: the command that wrote it continues it; --unfinished gives it up")
        return False
    if damaged := _damaged_records(plan.store, names):
        plan.wait(what, names, f"which of its files are needed is unknown: {'; '.join(damaged)}")
        return False
    own = [claim_name(claim)] if state is not State.COMMITTED and claim in ledger.claims else []
    if plan.young([*names, *own]):
        if names or own:
            plan.wait(what, names, "it may still be written: something in it is younger than the limit")
        return False
    plan.add(names, _WHY[state])
    return True


def _damaged_records(store: Store, names: Sequence[str]) -> list[str]:
    """Return what is wrong with the records among these files that cannot be read."""
    found = []
    for name in names:
        if name.startswith("records/"):
            try:
                read_json(store, name)
            except DataError as error:
                found.append(f"{error} (or remove {store.url}/{name} by hand)")
    return found


def _plan_claims(plan: Plan, ledger: Ledger, gone: list[int]) -> None:
    """Plan the claims of which nothing is left, last of all, and the highest only if nothing else remains."""
    over = [claim for claim in gone if ledger.claims.get(claim) in (State.DEAD, State.UNFINISHED)]
    if ledger.kind != DATASET and ledger.highest not in gone:  # its parts still exist, whichever claim made them
        over = [claim for claim in over if ledger.claims[claim] is State.DEAD]
    if ledger.newest or len(over) < len(ledger.claims):
        over = [claim for claim in over if claim != ledger.highest]
    plan.add([claim_name(claim) for claim in over], "claim of an attempt that no command will finish")
