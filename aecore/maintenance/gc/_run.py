"""Garbage of a run: unfinished or damaged checkpoints with a newer valid one, metrics that no checkpoint names."""

import re
from collections.abc import Iterable

from aecore.artifact.documents import CHECKPOINT_NAME, CLAIM, METRICS_NAME, read_json
from aecore.checkpoint.files import MANIFEST, CheckpointRef, read_checkpoint
from aecore.errors import DataError
from aecore.maintenance.gc._plan import Plan, below
from aecore.store import Store

_CHECKPOINT, _METRICS = re.compile(CHECKPOINT_NAME), re.compile(METRICS_NAME)
_CHECKPOINT_FILES = (MANIFEST, "model.safetensors", "config.json", "state.pt")  # the manifest first: a half removed one is no checkpoint
_MODEL_FILES = (MANIFEST, "model.safetensors", "config.json")


def plan_run(plan: Plan) -> None:
    """Add the garbage of a run to the plan; all of an unfinished run if it is given up."""
    store = plan.store
    known = {CLAIM, "checkpoints", "metrics", "model", ".tmp"}
    plan.not_ours += [name for name in store.list() if name not in known]
    folders, metrics = list(below(store, "checkpoints")), list(below(store, "metrics"))
    plan.not_ours += [name for name in folders if not _CHECKPOINT.fullmatch(name)]
    plan.not_ours += [name for name in metrics if not _METRICS.fullmatch(name)]
    plan.not_ours += [name for name in below(store, "model") if name.removeprefix("model/") not in _MODEL_FILES]
    folders = [name for name in folders if _CHECKPOINT.fullmatch(name)]
    metrics = [name for name in metrics if _METRICS.fullmatch(name)]
    if store.size(f"model/{MANIFEST}") is None:
        files = [*_files_of(plan, folders), *metrics, *(f"model/{file}" for file in _MODEL_FILES), CLAIM]
        if plan.unfinished:
            plan.remove_or_wait("run", files, "of an unfinished run that was given up")
            plan.temporary_files()
            return
        plan.wait("run", files, "unfinished: the command that wrote it continues it; --unfinished gives it up")
    _plan_attempts(plan, folders, metrics)
    plan.temporary_files()


def _files_of(plan: Plan, folders: Iterable[str]) -> list[str]:
    """Return the files of checkpoints in the order of removal; other files are recorded in `not_ours`."""
    found = []
    for folder in folders:
        listed = list(below(plan.store, folder))
        expected = [f"{folder}/{file}" for file in _CHECKPOINT_FILES]
        plan.not_ours += [name for name in listed if name not in expected]
        found += [name for name in expected if name in listed]
    return found


def _plan_attempts(plan: Plan, folders: list[str], metrics: list[str]) -> None:
    """Plan the garbage of each attempt. An attempt with any young file may still run: it keeps all its files."""
    store = plan.store
    valid = {name: ref for name in folders if (ref := _valid(store, name)) is not None}
    newest = max((ref.step for ref in valid.values()), default=-1)
    best = {str(ref.best["name"]) for ref in valid.values() if ref.best}
    lost = [name for name in folders if name not in valid and name not in best and _step(name) <= newest]
    named = {part for name in folders if name not in lost for part in _metrics_of(store, name)}
    unnamed = [name for name in metrics if name not in named]
    for attempt in sorted({_attempt(name) for name in (*lost, *unnamed)}):
        everything = [*_files_of(plan, (name for name in folders if _attempt(name) == attempt))]
        everything += [name for name in metrics if _attempt(name) == attempt]
        own = [name for name in unnamed if _attempt(name) == attempt]
        checkpoints = [name for name in lost if _attempt(name) == attempt]
        if plan.young(everything):
            plan.wait(f"attempt {attempt}", own, "it may still run: something that it wrote is younger than the limit")
            continue
        plan.add(_files_of(plan, checkpoints), f"of a checkpoint that is unfinished or damaged; the one of step {newest} is valid")
        plan.add(own, "metrics that no checkpoint names")
    plan.not_ours = list(dict.fromkeys(plan.not_ours))


def _valid(store: Store, name: str) -> CheckpointRef | None:
    try:
        return read_checkpoint(store, name)
    except (DataError, KeyError, TypeError):
        return None


def _metrics_of(store: Store, name: str) -> list[str]:
    """Return the metric parts that a checkpoint names, even if one of its files is damaged: it may be restored."""
    try:
        return [str(part["name"]) for part in read_json(store, f"{name}/{MANIFEST}")["metrics"]]
    except (DataError, KeyError, TypeError):
        return []


def _step(name: str) -> int:
    match = _CHECKPOINT.fullmatch(name)
    assert match is not None
    return int(match[1])


def _attempt(name: str) -> str:
    match = _CHECKPOINT.fullmatch(name) or _METRICS.fullmatch(name)
    assert match is not None
    return str(match[match.lastindex or 1])
