"""The files of a run or a table that a newer one of its pipeline has superseded as a whole."""

import contextlib
import os

from aecore.artifact.documents import CLAIM
from aecore.maintenance.gc._claims import claim_name, read_ledger
from aecore.maintenance.gc._parts import files_of_table
from aecore.maintenance.gc._plan import Plan
from aecore.maintenance.gc._run import files_of_run
from aecore.store import Store
from aecore.table.manifest import STEM


def plan_superseded(plan: Plan, kind: str) -> None:
    """Add all files of a run or table to the plan unless one is young; what names others goes after them, the first claim last."""
    store = plan.store
    if kind == "run":
        files = files_of_run(plan)
    else:
        ledger = read_ledger(store, kind)
        manifests = [name for number in range(ledger.newest, 0, -1) if store.size(name := f"{STEM}.{number:06d}.json") is not None]
        files = [*files_of_table(plan, ledger), *manifests, *map(claim_name, sorted({*ledger.claims} - {1}, reverse=True)), CLAIM]
    plan.remove_or_wait(kind, files, f"of a {kind} that a newer one of the pipeline has superseded")
    plan.temporary_files()


def remove_empty_folders(store: Store) -> None:
    """Remove what is left of a folder on a local disk in which there are no files any more; a bucket has no folders."""
    for folder, _, _ in os.walk(store.url, topdown=False) if store.is_local else ():
        with contextlib.suppress(OSError):  # files of others, or somebody was faster
            os.rmdir(folder)
