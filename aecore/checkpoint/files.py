"""Checkpoints: config.json and safetensors; no pickle is ever executed. Written by a run, loaded as a model.

A checkpoint is a folder whose `checkpoint.json` is written last and lists every other file with size and sha256: without a valid list
it is no checkpoint. `config.json` holds the specs (plain data: a kind and numbers), so loading builds registered parts only and executes
nothing from the file. `model/` is the same format without the optimizer's state: what encode, evaluate and users load.
"""

import contextlib
import dataclasses
import hashlib
import io
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from aecore._base.trainable import Trainable
from aecore.artifact.commit import require_there
from aecore.artifact.documents import read_document, read_json, sealed
from aecore.artifact.kinds import other_kind
from aecore.checkpoint.config import ModelConfig
from aecore.errors import DataError, Hint
from aecore.store import FileRef, Store, open_store, sha256_json

logger = logging.getLogger(__name__)

MANIFEST = "checkpoint.json"
CLAIM = "run.000001.json"
_FOLDER = re.compile(r"step-(\d{8})-[0-9a-z]+")


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


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in eval mode, with its config (input shape, transform) and its checkpoint."""

    model: Trainable
    config: ModelConfig
    checkpoint: CheckpointRef
    url: str

    @property
    def sha256(self) -> str:
        """Return the sha256 of checkpoint.json, which covers every other file."""
        return self.checkpoint.sha256


def weights_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return the state dict on the CPU, without the `module.` and `_orig_mod.` prefixes of wrappers."""
    weights = {}
    for name, tensor in model.state_dict().items():
        clean = name.replace("_orig_mod.", "")
        weights[clean.removeprefix("module.")] = tensor.detach().to("cpu").contiguous()
    return weights


def write_checkpoint(
    store: Store,
    name: str,
    model: torch.nn.Module,
    config: ModelConfig,
    *,
    step: int,
    state: Mapping[str, Any],
    metrics: tuple[FileRef, ...] = (),
    best: Mapping[str, Any] | None = None,
    info: Mapping[str, Any],
) -> CheckpointRef:
    """Commit the folder `name` of `store`: weights, config, optimizer state, and last of all checkpoint.json."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    files = (
        store.put(f"{name}/model.safetensors", save_safetensors(weights_of(model)), role="weights"),
        store.put(f"{name}/config.json", sealed(config.to_dict()), role="config"),
        store.put(f"{name}/state.pt", buffer.getvalue(), role="state"),
    )
    return _commit(store, CheckpointRef(name, step, "", files, metrics, best, info))


def same_as_published(store: Store, chosen: CheckpointRef) -> CheckpointRef:
    """Return `chosen`, or the checkpoint of the same step whose weights are in `model/` already.

    Two concurrent attempts (on different numbers of ranks, say) may end with weights that differ in the last bits; if one of them
    was killed while it published, its checkpoint is the one to finish.
    """
    if store.size("model/model.safetensors") is None:
        return chosen
    published = hashlib.sha256(store.read("model/model.safetensors")).hexdigest()
    for step, name in committed_checkpoints(store):
        if step == chosen.step:
            with contextlib.suppress(DataError):  # a damaged one cannot be finished
                known = read_checkpoint(store, name)
                if known.file("model.safetensors").sha256 == published:
                    return known
    return chosen


def publish_model(store: Store, checkpoint: CheckpointRef) -> CheckpointRef:
    """Copy the weights and config of a committed checkpoint to `model/`: the run's result.

    The bytes depend on the weights, the config and the data only, so a run that was killed and resumed publishes the same bytes.
    """
    files = []
    for suffix in ("model.safetensors", "config.json"):
        ref = checkpoint.file(suffix)
        files.append(store.put(f"model/{suffix}", store.read(ref.name, ref=ref), role="model"))
    return _commit(store, CheckpointRef("model", checkpoint.step, "", tuple(files), info=checkpoint.info))


def _commit(store: Store, ref: CheckpointRef) -> CheckpointRef:
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
    with _well_formed(store, prefix + MANIFEST):
        files = tuple(FileRef(prefix + file["name"], file["bytes"], file["sha256"]) for file in data["files"])
        metrics = tuple(FileRef(**part) for part in data["metrics"])
        step, best, info = int(data["step"]), data["best"], data["info"]
    if verify is not None:
        store.check_all(files, verify=verify)
    sha256 = hashlib.sha256(written).hexdigest()
    return CheckpointRef(name, step, sha256, files, metrics, best, info)


@contextlib.contextmanager
def _well_formed(store: Store, name: str) -> Iterator[None]:
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
        match = _FOLDER.fullmatch(folder)
        if match and store.size(f"checkpoints/{folder}/{MANIFEST}") is not None:
            found.append((-int(match[1]), f"checkpoints/{folder}"))
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
        except (DataError, KeyError, TypeError) as error:
            logger.warning("skipping a damaged checkpoint: %s (%s)", name, error)
            continue
        if run_sha256 is None or checkpoint.info.get("run_sha256") == run_sha256:
            return checkpoint
        logger.warning("skipping %s/%s: it belongs to another run (another config or dataset)", store.url, name)
    return None


def remove_checkpoint(store: Store, name: str) -> None:
    """Remove a checkpoint that this run wrote; checkpoint.json goes first, so a half-removed one is no checkpoint.

    A damaged one (which files belong to it is unknown), or one that another attempt is removing, is kept with a warning.
    """
    try:
        files = read_json(store, f"{name}/{MANIFEST}")["files"]
    except (DataError, KeyError) as error:
        logger.warning("not removing an old checkpoint: %s", error)
        return
    store.remove(f"{name}/{MANIFEST}")
    for file in files:
        store.remove(f"{name}/{file['name']}")


def load_weights(model: torch.nn.Module, store: Store, checkpoint: CheckpointRef) -> None:
    """Load the weights of a checkpoint (strict); DataError if names or shapes do not fit the model."""
    ref = checkpoint.file("model.safetensors")
    try:
        model.load_state_dict(load_safetensors(store.read(ref.name, ref=ref)))
    except (RuntimeError, SafetensorError) as error:
        raise DataError(f"{store.url}/{checkpoint.name} does not fit the model that its config describes: {error}") from error


def load_state(store: Store, checkpoint: CheckpointRef) -> dict[str, Any]:
    """Load the optimizer's state: plain types and tensors only (`weights_only=True`)."""
    ref = checkpoint.file("state.pt")
    state: dict[str, Any] = torch.load(io.BytesIO(store.read(ref.name, ref=ref)), weights_only=True, map_location="cpu")
    return state


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


def load_model(url: str, *, device: str | torch.device = "cpu") -> LoadedModel:
    """Load the result of a run, ready for use (eval mode).

    `url` is a run (its `model/` is taken), a run's `model` folder, or one checkpoint folder. Reads and verifies the files; raises
    DataError if there is none, ConfigError if a part it names is not known here.
    """
    store = open_store(url)
    name = "model" if store.size(f"model/{MANIFEST}") is not None else ""
    if not name and store.size(MANIFEST) is None:
        other = other_kind(store, "run")
        if other is not None:
            raise other
        if store.size("run.000001.json") is not None:
            raise DataError(f"{store.url} is a run that has not finished: run the same train command again, then repeat this one")
        raise DataError(
            f"{store.url} holds no trained model: expected a run with model/{MANIFEST}, or a checkpoint folder; check the address, "
            "or train one (aecore.training.loop.fit)",
            hint=Hint("no-model", {"url": store.url}),
        )
    checkpoint = read_checkpoint(store, name, verify=None)
    if name:
        require_own_model(store, checkpoint)
    config_ref = checkpoint.file("config.json")
    store.prefetch([config_ref, checkpoint.file("model.safetensors")])  # both are verified when they are read
    with _well_formed(store, config_ref.name):
        config = ModelConfig.from_dict(read_json(store, config_ref.name, ref=config_ref))
    with torch.random.fork_rng(devices=[]):
        model = config.build()
    load_weights(model, store, checkpoint)
    return LoadedModel(model.to(device).eval(), config, checkpoint, f"{store.url}/{name}".rstrip("/"))
