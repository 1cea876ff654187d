"""Garbage of a run: half-written checkpoints, damaged ones with a newer valid one, metrics that no checkpoint names.

What a `checkpoint.json` that cannot be read names is unknown: as long as there is one, it stays, and so do all metrics that no other names.
"""

import re
from collections.abc import Iterable

from aecore.artifact.documents import CHECKPOINT_NAME, CLAIM, METRICS_NAME, read_json
from aecore.checkpoint.files import MANIFEST, CheckpointRef, read_checkpoint
from aecore.errors import DataError
from aecore.maintenance.gc._plan import Plan, below
from aecore.store import Store, sha256_json

_CHECKPOINT, _METRICS = re.compile(CHECKPOINT_NAME), re.compile(METRICS_NAME)
_CHECKPOINT_FILES = (MANIFEST, "model.safetensors", "config.json", "state.pt")  # the manifest first: a half removed one is no checkpoint
_MODEL_FILES = (MANIFEST, "model.safetensors", "config.json")


def plan_run(plan: Plan) -> None:
    """Add the garbage of a run to the plan; all of an unfinished run if it is given up."""
    store = plan.store
    folders, metrics = _ours(plan)
    if store.size(f"model/{MANIFEST}") is None:
        files = _all_files(plan, folders, metrics)
        damaged = _documents(store, (name for name in folders if store.size(f"{name}/{MANIFEST}") is not None))[1]
        if plan.unfinished and not damaged:
            plan.remove_or_wait("run", files, "of an unfinished run that was given up")
            plan.temporary_files()
            return
        plan.wait("run", files, "unfinished: the command that wrote it continues it; --unfinished gives it up")
    _plan_attempts(plan, folders, metrics)
    plan.temporary_files()


def files_of_run(plan: Plan) -> list[str]:
    """Return all files of a run in the order of removal; other files are recorded in `not_ours`."""
    return _all_files(plan, *_ours(plan))


def _ours(plan: Plan) -> tuple[list[str], list[str]]:
    """Return the folders of checkpoints and the parts of the metrics; other files are recorded in `not_ours`."""
    store, known = plan.store, {CLAIM, "checkpoints", "metrics", "model", ".tmp"}
    plan.not_ours += [name for name in store.list() if name not in known]
    folders, metrics = list(below(store, "checkpoints")), list(below(store, "metrics"))
    plan.not_ours += [name for name in folders if not _CHECKPOINT.fullmatch(name)]
    plan.not_ours += [name for name in metrics if not _METRICS.fullmatch(name)]
    plan.not_ours += [name for name in below(store, "model") if name.removeprefix("model/") not in _MODEL_FILES]
    return [name for name in folders if _CHECKPOINT.fullmatch(name)], [name for name in metrics if _METRICS.fullmatch(name)]


def _all_files(plan: Plan, folders: Iterable[str], metrics: Iterable[str]) -> list[str]:
    return [*_files_of(plan, folders), *metrics, *(f"model/{file}" for file in _MODEL_FILES), CLAIM]


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
    written = {name for name in folders if store.size(f"{name}/{MANIFEST}") is not None}
    documents, damaged = _documents(store, sorted(written))
    valid = {name: ref for name in documents if (ref := _valid(store, name)) is not None}
    newest = max((ref.step for ref in valid.values()), default=-1)
    best = {str(ref.best["name"]) for ref in valid.values() if ref.best}
    why = "; ".join(damaged) or _end_is_gone(store, documents.values())
    half = [name for name in folders if name not in written and name not in best]
    broken = [name for name in documents if name not in valid and name not in best and documents[name].step <= newest]
    named = {part.name for name, ref in documents.items() if name not in broken for part in ref.metrics}
    unnamed = [name for name in metrics if name not in named]
    kept = [*_files_of(plan, (name for name in folders if name not in valid)), *unnamed]
    if why and kept:
        plan.wait("checkpoints and metrics", kept, f"which of them are needed is unknown: {why}")
        return
    for attempt in sorted({_attempt(name) for name in (*half, *broken, *unnamed)}):
        everything = [*_files_of(plan, (name for name in folders if _attempt(name) == attempt))]
        everything += [name for name in metrics if _attempt(name) == attempt]
        own = [name for name in unnamed if _attempt(name) == attempt]
        if plan.young(everything):
            plan.wait(f"attempt {attempt}", own, "it may still run: something that it wrote is younger than the limit")
            continue
        for names, text in (
            (half, "of a checkpoint that was never finished: nothing continues from it"),
            (broken, f"of a checkpoint that is damaged; the one of step {newest} is valid"),
        ):
            plan.add(_files_of(plan, (name for name in names if _attempt(name) == attempt)), text)
        plan.add(own, "metrics that no checkpoint names")
    plan.not_ours = list(dict.fromkeys(plan.not_ours))


def _documents(store: Store, names: Iterable[str]) -> tuple[dict[str, CheckpointRef], list[str]]:
    """Return what the checkpoint.json of each folder says, and what is wrong with those that cannot be read."""
    found, damaged = dict[str, CheckpointRef](), []
    own = sha256_json(read_json(store, CLAIM)["identity"])
    for name in names:
        try:
            found[name] = read_checkpoint(store, name, verify=None)
            if found[name].info.get("run_sha256", own) != own:
                raise DataError(f"{store.url}/{name}/{MANIFEST} belongs to another run: restore the right one")
        except DataError as error:
            found.pop(name, None)
            damaged.append(f"{error} (or remove {store.url}/{name} by hand)")
    return found, damaged


def _end_is_gone(store: Store, documents: Iterable[CheckpointRef]) -> str:
    """Return what is missing if a finished run has no checkpoint of its last step, which named all metrics; "" otherwise."""
    last = read_json(store, CLAIM)["info"].get("total_steps")
    if last is None or store.size(f"model/{MANIFEST}") is None or any(ref.step == last for ref in documents):
        return ""
    return (
        f"the run has finished, and the checkpoint of its last step ({last}), which names its metrics, is gone: restore it, or remove "
        "all of checkpoints/ and metrics/ by hand"
    )


def _valid(store: Store, name: str) -> CheckpointRef | None:
    try:
        return read_checkpoint(store, name)
    except DataError:
        return None


def _attempt(name: str) -> str:
    match = _CHECKPOINT.fullmatch(name) or _METRICS.fullmatch(name)
    assert match is not None
    return str(match[match.lastindex or 1])
