"""The files of checkpoints: which there are, which are whole, how one is committed, published and removed. No torch is imported.

A checkpoint is a folder whose `checkpoint.json` is written last and lists every other file with size and sha256: without a valid list
it is no checkpoint. `model/` is the same format without the optimizer's state: what encode, evaluate and users load. What the files hold
is read and written by `aecore.checkpoint.weights`.
"""

import contextlib
import dataclasses
import hashlib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aecore.artifact.commit import require_there
from aecore.artifact.documents import CHECKPOINT_NAME, CLAIM, METRICS_NAME, read_document, read_json, require_once, sealed
from aecore.errors import DataError
from aecore.registry import shown
from aecore.store import FileRef, Store, sha256_json

logger = logging.getLogger(__name__)

MANIFEST = "checkpoint.json"
WEIGHTS, CONFIG, STATE = "model.safetensors", "config.json", "state.pt"
_CHECKPOINT, _METRICS = re.compile(CHECKPOINT_NAME), re.compile(METRICS_NAME)
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class CheckpointRef:
    """A committed checkpoint: `sha256` is the hash of its checkpoint.json, `metrics` the metric parts of steps 1..step."""

    name: str
    step: int
    sha256: str
    files: tuple[FileRef, ...]
    metrics: tuple[FileRef, ...] = ()
    best: Mapping[str, Any] | None = None
    info: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def file(self, suffix: str) -> FileRef:
        """Return the file whose name ends in `suffix`; DataError if the checkpoint has none."""
        for ref in self.files:
            if ref.name.endswith(suffix):
                return ref
        raise DataError(f"checkpoint {self.name} has no {suffix}")


def same_as_published(store: Store, chosen: CheckpointRef) -> CheckpointRef:
    """Return `chosen`, or the checkpoint of the same step whose weights are in `model/` already.

    Two concurrent attempts (on different numbers of ranks, say) may end with weights that differ in the last bits; if one of them
    was killed while it published, its checkpoint is the one to finish.
    """
    if store.size(f"model/{WEIGHTS}") is None:
        return chosen
    published = hashlib.sha256(store.read(f"model/{WEIGHTS}")).hexdigest()
    for step, name in committed_checkpoints(store):
        if step == chosen.step:
            with contextlib.suppress(DataError):  # a damaged one cannot be finished
                known = read_checkpoint(store, name)
                if known.file(WEIGHTS).sha256 == published:
                    return known
    return chosen


def publish_model(store: Store, checkpoint: CheckpointRef) -> CheckpointRef:
    """Copy the weights and config of a committed checkpoint to `model/`: the run's result.

    The bytes depend on the weights, the config and the data only, so a run that was killed and resumed publishes the same bytes.
    """
    files = []
    for suffix in (WEIGHTS, CONFIG):
        ref = checkpoint.file(suffix)
        files.append(store.put(f"model/{suffix}", store.read(ref.name, ref=ref), role="model"))
    return commit_checkpoint(store, CheckpointRef("model", checkpoint.step, "", tuple(files), info=checkpoint.info))


def commit_checkpoint(store: Store, ref: CheckpointRef) -> CheckpointRef:
    """Commit the checkpoint.json of files that are committed."""
    require_there(store, [*ref.files, *ref.metrics[-1:]], ref.metrics[:-1])
    content = {
        "step": ref.step,
        "files": [{**dataclasses.asdict(file), "name": file.name.removeprefix(f"{ref.name}/")} for file in ref.files],
        "metrics": [dataclasses.asdict(part) for part in ref.metrics],
        "best": ref.best,
        "info": ref.info,
    }
    committed = store.put(f"{ref.name}/{MANIFEST}", sealed(content), role="checkpoint")
    return dataclasses.replace(ref, sha256=committed.sha256)


def read_checkpoint(store: Store, name: str, *, verify: bool | None = True) -> CheckpointRef:
    """Read the checkpoint `name`; DataError if it is unfinished or a file is damaged (`verify` False: of another size; None: any)."""
    prefix = f"{name}/" if name else ""
    data, written = read_document(store, prefix + MANIFEST)
    with well_formed(store, prefix + MANIFEST):
        files = tuple(_file_ref(file, _FILE, prefix) for file in data["files"])
        metrics = tuple(_file_ref(part, _METRICS) for part in data["metrics"])
        require_once((ref.name for ref in (*files, *metrics)), "a file")
        step, best, info = data["step"], data["best"], data["info"]
        _require_facts(step, best, info)
    if verify is not None:
        store.check_all(files, verify=verify)
    sha256 = hashlib.sha256(written).hexdigest()
    return CheckpointRef(name, step, sha256, files, metrics, best, info)


def _file_ref(entry: Mapping[str, Any], names: re.Pattern[str], prefix: str = "") -> FileRef:
    """Return a reference to a file as JSON has it; ValueError, TypeError or KeyError if it is none."""
    ref = FileRef(**entry)
    if not names.fullmatch(ref.name) or type(ref.bytes) is not int or ref.bytes < 0 or not _SHA256.fullmatch(ref.sha256):
        raise ValueError(f"it names the file {shown(entry)}")
    return dataclasses.replace(ref, name=prefix + ref.name)


def _require_facts(step: object, best: object, info: object) -> None:
    """ValueError unless step, best checkpoint and lineage have the types that a run writes."""
    if type(step) is not int or step < 0:
        raise ValueError(f"its step is {shown(step)}")
    if not isinstance(info, dict):
        raise ValueError(f"its info is {shown(info)}")
    if best is None:
        return
    if not isinstance(best, dict) or best.keys() != {"name", "step", "loss"}:
        raise ValueError(f"its best checkpoint is {shown(best)}")
    if not _CHECKPOINT.fullmatch(str(best["name"])) or type(best["step"]) is not int or type(best["loss"]) not in (int, float):
        raise ValueError(f"its best checkpoint is {shown(best)}")


@contextlib.contextmanager
def well_formed(store: Store, name: str) -> Iterator[None]:
    """DataError for a file that is JSON but not a checkpoint of aecore."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{store.url}/{name} was not written by aecore, or changed since ({error!r}): take another checkpoint") from error


def verify_checkpoint(store: Store, name: str) -> CheckpointRef:
    """Read the checkpoint `name` and compare every file and every metric part with its hash (DataError)."""
    checkpoint = read_checkpoint(store, name)
    for part in checkpoint.metrics:
        store.check(part, verify=True)
    return checkpoint


def committed_checkpoints(store: Store) -> list[tuple[int, str]]:
    """Return (step, name) of all checkpoints with a checkpoint.json, newest first (ties: smallest name first)."""
    found = []
    for folder in store.list("checkpoints"):
        match = _CHECKPOINT.fullmatch(f"checkpoints/{folder}")
        if match and store.size(f"{match[0]}/{MANIFEST}") is not None:
            found.append((-int(match[1]), match[0]))
    return [(-step, name) for step, name in sorted(found)]


def best_of_attempts(store: Store, committed: Sequence[tuple[int, str]]) -> set[str]:
    """Return those of these checkpoints (newest first) that are the best of their attempt; all of an attempt that cannot be read."""
    of_attempt: dict[str, list[str]] = {}
    for _, name in committed:
        of_attempt.setdefault(name.rpartition("-")[2], []).append(name)
    found: set[str] = set()
    for names in of_attempt.values():
        try:
            best = read_json(store, f"{names[0]}/{MANIFEST}")["best"]
            found |= set() if best is None else {str(best["name"])}
        except (DataError, KeyError, TypeError):
            found |= set(names)
    return found


def newest_checkpoint(store: Store, run_sha256: str | None = None) -> CheckpointRef | None:
    """Return the newest checkpoint whose every file matches its sha256; damaged ones are skipped with a warning.

    With `run_sha256` (the hash of the run's identity) those that were copied from another run are skipped as well.
    """
    for _, name in committed_checkpoints(store):
        try:
            checkpoint = read_checkpoint(store, name)
        except DataError as error:
            logger.warning("skipping a damaged checkpoint: %s (%s)", name, error)
            continue
        if run_sha256 is None or checkpoint.info.get("run_sha256") == run_sha256:
            return checkpoint
        logger.warning("skipping %s/%s: it belongs to another run (another config or dataset)", store.url, name)
    return None


def require_own_checkpoints(store: Store, run_sha256: str) -> None:
    """DataError if a run has checkpoints and none of them is of its claim, whose identity has the hash `run_sha256`: one was changed.

    Those that cannot be read say nothing. Reads small files only, one where nothing is wrong.
    """
    others = []
    for _, name in committed_checkpoints(store):
        with contextlib.suppress(DataError):
            checkpoint = read_checkpoint(store, name, verify=None)
            if checkpoint.info.get("run_sha256") == run_sha256:
                return
            others.append(checkpoint)
    if others:
        made_by = str(others[0].info.get("run_sha256"))
        raise DataError(
            f"{store.url}/{CLAIM} has the identity {run_sha256[:12]}, its checkpoints ({others[0].name} is the newest) are of the run "
            f"{made_by[:12]}: the claim was changed, or the checkpoints are those of another run; restore the claim, or move them away"
        )


def remove_checkpoint(store: Store, name: str) -> None:
    """Remove a checkpoint that this run wrote; checkpoint.json goes first, so a half-removed one is no checkpoint.

    A damaged one (which files belong to it is unknown), or one that another attempt is removing, is kept with a warning.
    """
    try:
        files = read_checkpoint(store, name, verify=None).files
    except DataError as error:
        logger.warning("not removing an old checkpoint: %s", error)
        return
    store.remove(f"{name}/{MANIFEST}")
    for file in files:
        store.remove(file.name)


def require_own_model(store: Store, model: CheckpointRef, run_sha256: str | None = None) -> None:
    """DataError if `model/` of the run at `store` was published by another run: copied there, or restored to the wrong place.

    `run_sha256` is the hash of the run's identity, read from the claim if it is not given.
    """
    if run_sha256 is None and store.size(CLAIM) is None:
        return
    own, made_by = run_sha256 or sha256_json(read_json(store, CLAIM)["identity"]), model.info.get("run_sha256")
    if made_by is not None and made_by != own:
        raise DataError(
            f"{store.url}/model belongs to another run (run_sha256 {str(made_by)[:12]}, this run has {own[:12]}): restore the right "
            "one, or remove it and run the same train command again"
        )
