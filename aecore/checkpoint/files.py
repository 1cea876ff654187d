"""Checkpoints: config.json and safetensors; no pickle is ever executed. Written by a run, loaded as a model.

A checkpoint is a folder whose `checkpoint.json` is written last and lists every other file with size and sha256: without a valid list
it is no checkpoint. `config.json` holds the specs (plain data: a kind and numbers), so loading builds registered parts only and executes
nothing from the file. `model/` is the same format without the optimizer's state: what encode, evaluate and users load.

A hash says that a file is the one that was written, not that it is sound: types, shapes and numbers are checked as well, before any
memory is allocated for them.
"""

import contextlib
import dataclasses
import hashlib
import io
import logging
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor
from torch.nn.parameter import is_lazy

from aecore._base.trainable import Trainable
from aecore.artifact.commit import require_there
from aecore.artifact.documents import read_document, read_json, require_once, sealed
from aecore.artifact.kinds import other_kind
from aecore.checkpoint.config import ModelConfig
from aecore.checkpoint.limits import bytes_of
from aecore.errors import ConfigError, DataError, Hint
from aecore.registry import shown
from aecore.store import FileRef, Store, open_store, sha256_json

logger = logging.getLogger(__name__)

MANIFEST = "checkpoint.json"
CLAIM = "run.000001.json"
WEIGHTS, CONFIG, STATE = "model.safetensors", "config.json", "state.pt"
_FOLDER = re.compile(r"step-(\d{8})-[0-9a-z]+")
_METRICS = re.compile(r"metrics/\d{8,}-\d{8,}-[0-9a-z]+\.jsonl")
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
HEADER_BYTES = 16 << 20  # the most that a file of tensors may have besides their values
_REMEDY = "restore it from a copy, or take another checkpoint"


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
    """Return the state dict on the CPU, without the `module.` and `_orig_mod.` prefixes of wrappers; tied weights once for each name."""
    weights: dict[str, Tensor] = {}
    memory = set()
    for name, tensor in model.state_dict().items():
        clean = name.replace("_orig_mod.", "").removeprefix("module.")
        weights[clean] = tensor.detach().to("cpu").contiguous()
        if (there := weights[clean].untyped_storage().data_ptr()) in memory:  # safetensors refuses to write the same memory twice
            weights[clean] = weights[clean].clone()
        memory.add(there)
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
        store.put(f"{name}/{WEIGHTS}", save_safetensors(weights_of(model)), role="weights"),
        store.put(f"{name}/{CONFIG}", sealed(config.to_dict()), role="config"),
        store.put(f"{name}/{STATE}", buffer.getvalue(), role="state"),
    )
    return _commit(store, CheckpointRef(name, step, "", files, metrics, best, info))


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
    folder, _, name = str(best["name"]).rpartition("/")
    if folder != "checkpoints" or not _FOLDER.fullmatch(name) or type(best["step"]) is not int or type(best["loss"]) not in (int, float):
        raise ValueError(f"its best checkpoint is {shown(best)}")


@contextlib.contextmanager
def _well_formed(store: Store, name: str) -> Iterator[None]:
    """DataError for a file that is JSON but not a checkpoint of aecore."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{store.url}/{name} was not written by aecore, or changed since ({error!r}): take another checkpoint") from error


@contextlib.contextmanager
def _says(store: Store, name: str) -> Iterator[None]:
    """Put the name of the file whose content it is about before a ConfigError."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{store.url}/{name}: {error}", hint=error.hint) from error


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
        except DataError as error:
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
        files = read_checkpoint(store, name, verify=None).files
    except DataError as error:
        logger.warning("not removing an old checkpoint: %s", error)
        return
    store.remove(f"{name}/{MANIFEST}")
    for file in files:
        store.remove(file.name)


def load_weights(model: torch.nn.Module, store: Store, checkpoint: CheckpointRef, tensors: Mapping[str, Tensor] | None = None) -> None:
    """Load the weights of a checkpoint (strict); DataError if names, shapes or dtypes do not fit the model.

    `tensors` are those of `read_weights`, if they are known; else they are read.
    """
    where, state = f"{store.url}/{checkpoint.file(WEIGHTS).name}", model.state_dict()
    if tensors is None:
        tensors = read_weights(store, checkpoint, None if any(map(is_lazy, state.values())) else state)
    _require_tied(where, tensors, state)
    try:
        model.load_state_dict(dict(tensors))
    except RuntimeError as error:
        raise _unfit(where, str(error)) from error


def require_finite_weights(model: torch.nn.Module, where: str) -> None:
    """DataError unless all weights that were loaded from `where` are finite: a run that went on from others would seem to diverge."""
    for name, parameter in model.named_parameters():  # no buffers: running statistics may be anything
        if parameter.is_floating_point() and not bool(parameter.isfinite().all()):
            raise DataError(f"{where} is damaged: {name} holds numbers that are not finite; {_REMEDY}")


def read_weights(store: Store, checkpoint: CheckpointRef, expected: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint's weights.

    `expected` are tensors with the names, shapes and dtypes that they must have (on any device, meta too); None: any.

    Raises
    ------
    DataError
        The file is damaged, or its tensors are not the expected ones. A file that is too large for these is not read.
    """
    ref = checkpoint.file(WEIGHTS)
    where = f"{store.url}/{ref.name}"
    if expected is not None and ref.bytes > bytes_of(expected) + HEADER_BYTES:
        raise _unfit(where, f"it has {ref.bytes:,} bytes, the weights take {bytes_of(expected):,}")
    data = store.read(ref.name, ref=ref)
    try:
        tensors = load_safetensors(data)
    except (SafetensorError, RuntimeError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise DataError(f"{where} is no safetensors file: {error}; {_REMEDY}") from error
    if expected is None:
        return tensors
    for name in sorted({*tensors, *expected}):
        found, wanted = _described(tensors.get(name)), _described(expected.get(name))
        if found != wanted:
            raise _unfit(where, f"{name} is {found}, expected {wanted}")
    return tensors


def _described(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _unfit(where: str, difference: str) -> DataError:
    return DataError(f"{where} does not fit the model that its config describes: {difference}; {_REMEDY}")


def _require_tied(where: str, tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """DataError if the file has two values for weights that are one in the model."""
    first: dict[tuple[int, torch.Size], str] = {}
    for name in [name for name in state if name in tensors and not is_lazy(state[name]) and state[name].numel()]:
        other = first.setdefault((state[name].data_ptr(), state[name].shape), name)
        if other != name and not torch.equal(tensors[name], tensors[other]):
            raise _unfit(where, f"{name} and {other} are the same weights in the model, and differ in the file")


def load_state(store: Store, checkpoint: CheckpointRef) -> dict[str, Any]:
    """Load the training state: plain types and tensors only (`weights_only=True`).

    Returns
    -------
    dict
        `step`, that of the checkpoint; `optimizer`, which `aecore.training.optimizer.load_optimizer` checks; perhaps `held`.

    Raises
    ------
    DataError
        The file is damaged, was not written by aecore, or belongs to another step.
    """
    ref = checkpoint.file(STATE)
    where, most = f"{store.url}/{ref.name}", 3 * checkpoint.file(WEIGHTS).bytes + HEADER_BYTES  # Adam keeps two numbers for each weight
    if ref.bytes > most:
        raise DataError(f"{where} has {ref.bytes:,} bytes, expected at most {most:,} for weights of this size; {_REMEDY}")
    data = store.read(ref.name, ref=ref)
    try:
        _require_uncompressed(data)
        state = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except Exception as error:  # the unpickler raises whatever the bytes lead it to
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise DataError(f"{where} is no state of an optimizer: {reason}; {_REMEDY}") from error
    if not isinstance(state, dict) or not {"step", "optimizer"} <= state.keys() <= {"step", "optimizer", "held"}:
        keys = shown(list(state) if isinstance(state, dict) else type(state).__name__)
        raise DataError(f"{where} holds {keys}, expected step and optimizer; {_REMEDY}")
    if type(state["step"]) is not int or state["step"] != checkpoint.step:
        raise DataError(f"{where} has step {shown(state['step'])}, its checkpoint has {checkpoint.step}; {_REMEDY}")
    return state


def _require_uncompressed(data: bytes) -> None:
    """ValueError unless the members of a zip file are stored as they are: compressed ones unpack to any size."""
    if not data.startswith(b"PK\x03\x04"):
        raise ValueError("it is no zip file")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members) or sum(member.file_size for member in members) > len(data):
        raise ValueError("its members are compressed")


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
    config_ref = checkpoint.file(CONFIG)
    store.prefetch([config_ref, checkpoint.file(WEIGHTS)])  # both are verified when they are read
    with _says(store, config_ref.name):
        with _well_formed(store, config_ref.name):
            config = ModelConfig.from_dict(read_json(store, config_ref.name, ref=config_ref))
        expected = config.shapes()
    tensors = read_weights(store, checkpoint, expected)  # before the model is built: they show that it has the size of its file
    with _says(store, config_ref.name), torch.random.fork_rng(devices=[]):
        model = config.build()
    load_weights(model, store, checkpoint, tensors)
    return LoadedModel(model.to(device).eval(), config, checkpoint, f"{store.url}/{name}".rstrip("/"))
