"""What the files of a checkpoint hold: config.json and safetensors. No pickle is ever executed.

`config.json` holds the specs (plain data: a kind and numbers), so loading builds registered parts only and executes nothing from the
file. A hash says that a file is the one that was written, not that it is sound: types, shapes and numbers are checked as well, before any
memory is allocated for them.
"""

import contextlib
import io
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor
from torch.nn.parameter import is_lazy

from aecore._base.trainable import Trainable
from aecore.artifact.documents import CLAIM, read_json, sealed
from aecore.artifact.kinds import other_kind
from aecore.checkpoint.config import ModelConfig
from aecore.checkpoint.files import (
    CONFIG,
    MANIFEST,
    STATE,
    WEIGHTS,
    CheckpointRef,
    commit_checkpoint,
    read_checkpoint,
    require_own_model,
    well_formed,
)
from aecore.checkpoint.limits import bytes_of
from aecore.errors import ConfigError, DataError, Hint
from aecore.registry import shown
from aecore.store import FileRef, Store, open_store

HEADER_BYTES = 16 << 20  # the most that a file of tensors may have besides their values
_REMEDY = "restore it from a copy, or take another checkpoint"


@dataclass(frozen=True, slots=True)
class FoundModel:
    """The config (input shape, transform) and the checkpoint of a model that is not loaded."""

    config: ModelConfig
    checkpoint: CheckpointRef
    url: str

    @property
    def sha256(self) -> str:
        """Return the sha256 of checkpoint.json, which covers every other file."""
        return self.checkpoint.sha256


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in eval mode, with its config and its checkpoint."""

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
    return commit_checkpoint(store, CheckpointRef(name, step, "", files, metrics, best, info))


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


@contextlib.contextmanager
def _says(store: Store, name: str) -> Iterator[None]:
    """Put the name of the file whose content it is about before a ConfigError."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{store.url}/{name}: {error}", hint=error.hint) from error


def find_model(url: str) -> FoundModel:
    """Return config and checkpoint of the result of a run, without its weights; `url` and what it raises as `load_model`."""
    store = open_store(url)
    name = "model" if store.size(f"model/{MANIFEST}") is not None else ""
    if not name and store.size(MANIFEST) is None:
        other = other_kind(store, "run")
        if other is not None:
            raise other
        if store.size(CLAIM) is not None:
            raise DataError(f"{store.url} is a run that has not finished: run the same train command again, then repeat this one")
        python = ", or train one (aecore.training.loop.fit)"
        raise DataError(
            f"{store.url} holds no trained model: expected a run with model/{MANIFEST}, or a checkpoint folder; check the address{python}",
            hint=Hint("no-model", {"url": store.url, "python": python}),
        )
    checkpoint = read_checkpoint(store, name, verify=None)
    if name:
        require_own_model(store, checkpoint)
    config_ref = checkpoint.file(CONFIG)
    store.prefetch([config_ref, checkpoint.file(WEIGHTS)])  # both are verified when they are read
    with _says(store, config_ref.name), well_formed(store, config_ref.name):
        config = ModelConfig.from_dict(read_json(store, config_ref.name, ref=config_ref))
    return FoundModel(config, checkpoint, f"{store.url}/{name}".rstrip("/"))


def load_model(url: str, *, device: str | torch.device = "cpu") -> LoadedModel:
    """Load the result of a run, ready for use (eval mode).

    `url` is a run (its `model/` is taken), a run's `model` folder, or one checkpoint folder. Reads and verifies the files; raises
    DataError if there is none, ConfigError if a part it names is not known here.
    """
    store, found = open_store(url), find_model(url)
    config, checkpoint, name = found.config, found.checkpoint, found.checkpoint.file(CONFIG).name
    with _says(store, name):
        expected = config.shapes()
    tensors = read_weights(store, checkpoint, expected)  # before the model is built: they show that it has the size of its file
    with _says(store, name), torch.random.fork_rng(devices=[]):
        model = config.build()
    load_weights(model, store, checkpoint, tensors)
    return LoadedModel(model.to(device).eval(), config, checkpoint, found.url)
