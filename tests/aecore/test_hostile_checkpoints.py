"""A checkpoint from outside, whose hashes are right: whatever it says, it loads as it was written or is refused with a typed error.

Hundreds of small changes are made to checkpoints and sealed anew, as somebody would who means harm, or a program that is wrong. They are
loaded in child processes of limited memory, so that a crash, a huge allocation or a hang shows as such.
"""

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import pickle
import random
import reprlib
import resource
import shutil
import struct
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from aecore.checkpoint.config import ModelConfig
from aecore.checkpoint.files import committed_checkpoints, newest_checkpoint, read_checkpoint
from aecore.checkpoint.limits import shapes_of
from aecore.checkpoint.weights import load_model, load_state, load_weights, require_finite_weights, write_checkpoint
from aecore.data.format.transform import TransformSpec
from aecore.errors import AecoreError, ConfigError, DataError
from aecore.native.memory import machine_bytes
from aecore.nn.attention import AttentionSpec, smallest_side
from aecore.nn.conv import ConvSpec
from aecore.nn.hybrid import HybridSpec
from aecore.nn.mlp import MLPSpec
from aecore.nn.recurrent import RecurrentSpec
from aecore.nn.resnet import ResNetSpec
from aecore.registry import BACKBONES, MODELS, flatten
from aecore.store import open_store
from aecore.training.job import TrainSpec
from aecore.training.loop import fit
from aecore.training.metrics import is_row
from aecore.training.optimizer import OptimSpec, build_optimizer, load_optimizer
from aecore.training.session import Session
from aecore.variational import VAESpec
from tests.aecore.training import losses, published_weights, small_job, sprites_dataset
from tests.documents import content, rewrite
from tests.processes import children, join, run

Files = dict[str, bytes]  # of a checkpoint's folder
Mutation = tuple[str, Callable[[Path], None]]  # its name, and what it does to such a folder
LIMIT_BYTES, LIMIT_S = 2 << 30, 20.0
STEP = 4  # of the checkpoint whose training state is changed

NETS: dict[str, tuple[str, Any, tuple[int, ...], dict[str, Any]]] = {  # every backbone, and most kinds of models
    "vae on mlp": ("vae", MLPSpec(hidden=(8, 8)), (1, 8, 8), {"latent_dim": 3}),
    "rvae on recurrent": ("rvae", RecurrentSpec(width=6), (0, 3), {"latent_dim": 3}),
    "rvae on hybrid": ("rvae", HybridSpec(channels=(4,), width=6), (0, 8, 8), {"latent_dim": 3}),
    "vqvae on conv": ("vqvae", ConvSpec(channels=(4, 8)), (1, 8, 8), {"num_embeddings": 6, "embedding_dim": 4}),
    "cvae on attention": ("cvae", AttentionSpec(width=8, heads=2, depth=1), (1, 8, 8), {"latent_dim": 3}),
    "dae on resnet": ("dae", ResNetSpec(channels=(4,)), (1, 8, 8), {"latent_dim": 3}),
    "mil_vae on mlp": ("mil_vae", MLPSpec(hidden=(8,), activation="relu"), (12,), {"latent_dim": 3}),
}


def config_of(name: str) -> ModelConfig:
    kind, backbone, shape, sizes = NETS[name]
    return ModelConfig(MODELS.spec_type(kind)(**sizes), backbone, TransformSpec(), shape)


def written(folder: Path, config: ModelConfig, state: dict[str, Any] | None = None) -> Files:
    """Return the files of a checkpoint of step `STEP` with fresh weights."""
    torch.manual_seed(0)
    name = f"checkpoints/step-{STEP:08d}-aa"
    write_checkpoint(open_store(folder), name, config.build(), config, step=STEP, state=state or {}, info={})
    return {path.name: path.read_bytes() for path in (folder / name).iterdir()}


def reseal(folder: Path) -> None:
    """Write the sizes and hashes of the files of a checkpoint into its checkpoint.json."""
    files = []
    for file in content(folder / "checkpoint.json")["files"]:
        data = (folder / file["name"]).read_bytes()
        files.append({**file, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})
    rewrite(folder / "checkpoint.json", files=files)


def changed_file(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def mutate(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))
        reseal(folder)

    return mutate


def short(value: Any) -> str:
    """Return a text for the name of a mutation."""
    return reprlib.repr(value) + (f" of {len(value)}" if isinstance(value, list) else "")


# config.json

WRONG = (None, "x", -1, 10**12)
MORE_WRONG = (10**30, 1e300, 0.5, True, [], {"a": 1}, "x" * 100_000, [1] * 100_000)  # tried in one kind of model


def config_mutations(config: dict[str, Any], wrong: tuple[Any, ...]) -> Iterator[Mutation]:
    """Every value of a config.json replaced by each of `wrong`, every key removed, unknown keys added, sizes that nothing can hold."""

    def at(section: str, key: str, value: Any) -> Callable[[Path], None]:
        def mutate(folder: Path) -> None:
            rewrite(folder / "config.json", **{section: {**config[section], key: value}})
            reseal(folder)

        return mutate

    def whole(**changes: Any) -> Callable[[Path], None]:
        def mutate(folder: Path) -> None:
            rewrite(folder / "config.json", **changes)
            reseal(folder)

        return mutate

    for section in ("model", "backbone", "transform"):
        for key in config[section]:
            rest = {name: value for name, value in config[section].items() if name != key}
            yield f"{section} without {key}", whole(**{section: rest})
            for value in wrong:
                yield f"{section}.{key}={short(value)}", at(section, key, value)
        yield f"{section}.later=1", at(section, "later", 1)
        for value in wrong:
            yield f"{section}={short(value)}", whole(**{section: value})
    for value in (*wrong, [0], [1, 0], [-1], [2**62], [2**24] * 3, [True], ["8"], [1, 8, 8.0], [1, 8, 9], [8], [1] * 70, [[1, 8, 8]]):
        yield f"input_shape={short(value)}", whole(input_shape=value)
    for value in ([10**9], [2**24, 2**24], [1] * 129, [2**24] * 20):
        for key in ("hidden", "channels"):
            if key in config["backbone"]:
                yield f"{key}={short(value)}", at("backbone", key, value)
    for key in ("layers", "depth", "blocks", "heads", "width", "latent_dim", "num_classes", "num_embeddings", "num_levels"):
        for section in ("model", "backbone"):
            if key in config[section]:
                yield f"{key}=128", at(section, key, 128)
                yield f"{key}=2^24", at(section, key, 1 << 24)


# checkpoint.json


def manifest_mutations(manifest: dict[str, Any]) -> Iterator[Mutation]:
    first, *rest = manifest["files"]
    whole: dict[str, list[Any]] = {
        "step": [None, "4", 4.0, -1, True, [4]],
        "best": [1, "x", [], {}, {"name": "../x", "step": 1, "loss": 0.5}, {"name": 5, "step": 1, "loss": 0.5}],
        "info": [None, 1, "x", []],
        "metrics": [None, 1, "x", [1], [{}], [{**first, "name": "metrics/../../x"}], [{**first, "name": "metrics/a-b-c.jsonl"}]],
        "files": [None, 1, "x", {}, [], [1], [None], [{}], [*rest], [first, first, *rest]],
    }
    for key, values in whole.items():
        for value in values:
            yield f"{key}={short(value)}", lambda folder, key=key, value=value: rewrite(folder / "checkpoint.json", **{key: value})
    of_file: dict[str, list[Any]] = {
        "name": [None, 1, "", "..", "/etc/passwd", "a/b", "\0"],
        "bytes": [None, -1, 1e300, "1", True, 10**30],
        "sha256": [None, 1, "", "x" * 64, first["sha256"].upper(), []],
    }
    for key, values in of_file.items():
        for value in values:
            files = [{**first, key: value}, *rest]
            yield f"files.{key}={short(value)}", lambda folder, files=files: rewrite(folder / "checkpoint.json", files=files)
    for gone in first:
        files = [{key: value for key, value in first.items() if key != gone}, *rest]
        yield f"files without {gone}", lambda folder, files=files: rewrite(folder / "checkpoint.json", files=files)


# model.safetensors


def split_header(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header: Any, body: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def weights_mutations(data: bytes) -> Iterator[Mutation]:
    header, body = split_header(data)
    tensors, name = load_safetensors(data), next(key for key in header if key.endswith(("0.weight", "1.weight")))
    entry = header[name]

    def changed(**changes: Any) -> bytes:
        return with_header({**header, name: {**entry, **changes}}, body)

    cases: dict[str, bytes] = {"empty": b"", "eight zeros": bytes(8), "text": b"no tensors", "no header": with_header(b"", body)}
    for length in (0, 1, 7, len(data), 100_000_001, 1 << 40, 1 << 63, (1 << 64) - 1):
        cases[f"header length {length}"] = with_header(header, body, length)
    for text in (b"{", b"[]", b"null", b"5", b'{"a":1}', b"{" * 100_000, b"\xff\xfe", b'{"a":{}}'):
        cases[f"header {text[:10]!r}"] = with_header(text, body)
    for dtype in ("F16", "BF16", "F64", "I32", "I64", "U8", "BOOL", "F8_E4M3", "C64", "X", "", None, 4):
        cases[f"dtype {dtype}"] = changed(dtype=dtype)
    for shape in ([], [0], [-1], [1 << 62], [1 << 32, 1 << 32], entry["shape"][::-1], [*entry["shape"], 1], "x", None, [1.5], [2**64]):
        cases[f"shape {shape}"] = changed(shape=shape)
    for offsets in ([0, 0], [0, 1 << 62], [-4, 4], [4, 0], [0], [], None, "x", [len(body), 2 * len(body)]):
        cases[f"offsets {offsets}"] = changed(data_offsets=offsets)
    cases["short body"], cases["long body"] = with_header(header, body[:-1]), with_header(header, body + bytes(64))
    cases["huge body"] = with_header(header, body + bytes(20 << 20))
    cases["metadata"] = with_header({"__metadata__": {"a": 1}, **header}, body)
    cases["without a tensor"] = save_safetensors({key: value for key, value in tensors.items() if key != name})
    cases["another tensor"] = save_safetensors({**tensors, "another": torch.zeros(3)})
    cases["another name"] = save_safetensors({f"{key}x": value for key, value in tensors.items()})
    cases["no tensor"] = save_safetensors({})
    for dtype in (torch.float16, torch.float64, torch.int32, torch.complex64):
        cases[f"a tensor of {dtype}"] = save_safetensors({**tensors, name: tensors[name].to(dtype)})
    for shape in ((0,), (1,), (2, 3, 4), (tensors[name].numel(),)):
        cases[f"a tensor of shape {shape}"] = save_safetensors({**tensors, name: torch.zeros(shape)})
    for case, changed_data in cases.items():
        yield f"weights: {case}", changed_file("model.safetensors", lambda _, made=changed_data: made)


# state.pt


def saved(state: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, **options)
    return buffer.getvalue()


def compressed(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as before, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as after:
        for member in before.infolist():
            after.writestr(member.filename, before.read(member))
    return buffer.getvalue()


class Evil:
    def __reduce__(self) -> Any:
        return sys.exit, (3,)


def bad_moments(good: Tensor) -> dict[str, Any]:
    """Return, by name, what a moment of a parameter must not be."""
    shape = tuple(good.shape)
    return {
        "of twice the rows": torch.zeros(2 * shape[0], *shape[1:]),
        "of no rows": torch.zeros(0, *shape[1:]),
        "of one number": torch.zeros(1),
        "a scalar": torch.zeros(()),
        "transposed": torch.zeros(shape[::-1] if len(shape) > 1 else (shape[0], 1)),
        "huge, of one number": torch.zeros(1).expand(1 << 40),
        "float64": good.double(),
        "float16": good.half(),
        "int64": good.long(),
        "bool": good > 0,
        "complex": torch.complex(good, good),
        "sparse": good.to_sparse(),
        "a parameter": nn.Parameter(good.clone()),
        "nan": torch.full_like(good, torch.nan),
        "infinite": torch.full_like(good, torch.inf),
        "None": None,
        "a number": 0.5,
        "a list": [0.0] * 3,
        "a text": "x",
        "a dict": {},
    }


def state_mutations(state: dict[str, Any]) -> Iterator[Mutation]:
    optimizer, (group,) = state["optimizer"], state["optimizer"]["param_groups"]
    states, last = optimizer["state"], max(optimizer["state"])

    def of(number: int, **changes: Any) -> dict[str, Any]:
        entry = {name: value for name, value in {**states[number], **changes}.items() if value is not Ellipsis}
        return {**state, "optimizer": {**optimizer, "state": {**states, number: entry}}}

    def groups(*changed: Any) -> dict[str, Any]:
        return {**state, "optimizer": {**optimizer, "param_groups": list(changed)}}

    def entries(changed: Any) -> dict[str, Any]:
        return {**state, "optimizer": {**optimizer, "state": changed}}

    cases: dict[str, Any] = {}
    for number in (0, last):
        for moment in ("exp_avg", "exp_avg_sq"):
            for case, value in bad_moments(states[number][moment]).items():
                if (moment, case) != ("exp_avg_sq", "infinite"):  # the square of a large gradient
                    cases[f"{number}.{moment} is {case}"] = of(number, **{moment: value})
            cases[f"{number}.{moment} is missing"] = of(number, **{moment: ...})
        cases[f"{number}.exp_avg_sq is negative"] = of(number, exp_avg_sq=-1 - states[number]["exp_avg_sq"])
        for step in (5.0, 0.0, -1.0, torch.nan, torch.inf):
            cases[f"{number}.step is {step}"] = of(number, step=torch.tensor(step))
        for value in (None, 4, 4.0, "4", torch.tensor([4.0]), torch.tensor(4), torch.zeros(0), torch.tensor(4.0, dtype=torch.float64)):
            cases[f"{number}.step is {value!r}"] = of(number, step=value)
        cases[f"{number} has another entry"] = of(number, max_exp_avg_sq=torch.zeros(3))
        for value in (None, 1, "x", [], {}):
            cases[f"{number} is {value!r}"] = entries({**states, number: value})
    cases["the states of two parameters are swapped"] = entries({**states, 0: states[last], last: states[0]})
    for value in (None, 1, "x", [], {}, [states[0]], {**states, last + 1: states[0]}, {str(key): each for key, each in states.items()}):
        cases[f"state is {str(value)[:12]}"] = entries(value)
    for change in ({"betas": (5.0, 0.9)}, {"betas": "x"}, {"betas": torch.ones(2)}, {"eps": torch.nan}, {"fused": False}, {"params": []}):
        cases[f"group with {change}"] = groups({**group, **change})
    for change in ({"params": [5] * 10}, {"params": list(range(10**4))}, {"params": "x"}, {"amsgrad": True}, {"weight_decay": None}):
        cases[f"group with {str(change)[:20]}"] = groups({**group, **change})
    cases |= {"no group": groups(), "two groups": groups(group, group), "a group is a number": groups(5), "a group is None": groups(None)}
    for value in (None, 1, "x", [], {}, torch.zeros(2), {"state": {}}, {"param_groups": []}, {**optimizer, "more": 1}):
        cases[f"optimizer is {str(value)[:16]}"] = {**state, "optimizer": value}
        cases[f"the whole is {str(value)[:16]}"] = value
    for step in (None, "4", 4.0, 5, -1, True, torch.tensor(4)):
        cases[f"step is {step!r}"] = {**state, "step": step}
    cases |= {"another key": {**state, "more": 1}, "no step": {"optimizer": optimizer}, "no optimizer": {"step": STEP}}
    raw = saved(state)
    files = {f"state: {case}": saved(value) for case, value in cases.items()}
    files |= {
        "state is empty": b"",
        "state is text": b"no pickle",
        "state is a pickle": pickle.dumps({"step": STEP}),
        "state is code": saved({**state, "optimizer": Evil()}),
        "state in the format before zip": saved(state, _use_new_zipfile_serialization=False),
        "state is compressed": compressed(raw),
        "state is a bomb": compressed(saved({**state, "optimizer": torch.zeros(16 << 20)})),
        "state has 17 MiB": raw + bytes(17 << 20),
        "state with the start of another file": b"MZ" + raw,
    }
    files |= {f"state of {size} bytes": raw[:size] for size in (1, 4, 30, 100, len(raw) // 2, len(raw) - 100, len(raw) - 1)}
    for case, data in files.items():
        yield case, changed_file("state.pt", lambda _, made=data: made)


def flips(name: str, data: bytes, first: int, last: int, count: int) -> Iterator[Mutation]:
    """Single bits of a file inverted between two of its bytes."""
    chosen = random.Random(name)
    for _ in range(count):
        place, bit = chosen.randrange(first, last), chosen.randrange(8)
        flipped = bytearray(data)
        flipped[place] ^= 1 << bit
        yield f"bit {bit} of byte {place} of {name}", changed_file(name, lambda _, made=bytes(flipped): made)


# what is done with a changed checkpoint, and in which process


def loads(folder: Path) -> dict[str, Tensor]:
    """Load the checkpoint as a model."""
    return dict(load_model(str(folder)).model.state_dict())


def resumes(folder: Path) -> dict[str, Tensor]:
    """Load weights and optimizer as a resumed run does, and take a step: torch's fused Adam reads the moments."""
    store = open_store(folder)
    checkpoint = read_checkpoint(store, "")
    model = config_of("vae on mlp").build()
    load_weights(model, store, checkpoint)
    require_finite_weights(model, f"{folder}/model.safetensors")
    state = load_state(store, checkpoint)
    optimizer = build_optimizer(OptimSpec(), model)
    load_optimizer(optimizer, state["optimizer"], checkpoint.step, f"{folder}/state.pt")
    found = {f"{number}.{name}": value.clone() for number, each in optimizer.state_dict()["state"].items() for name, value in each.items()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return found


def _child(folder: Path, base: Files, mutations: list[Mutation], use: Callable[[Path], dict[str, Tensor]], exact: bool) -> None:
    """Write a line of JSON for each mutation: its name, before it is tried, and then what came of it."""
    torch.set_num_threads(1)
    sizes = Path("/proc/self/statm").read_text().split()
    most = int(sizes[0]) * resource.getpagesize() + LIMIT_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    expected = use(_fresh(folder / "base", base))
    with (folder / "results.jsonl").open("w") as results:
        for number, (name, mutate) in enumerate(mutations):
            results.write(json.dumps({"trying": name}) + "\n")
            results.flush()
            changed = _fresh(folder / str(number), base)
            mutate(changed)
            started = time.process_time()
            try:
                found = use(changed)
                same = found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
                outcome = "equal" if same else "loads" if not exact else "DIFFERENT"
            except AecoreError as error:
                outcome = type(error).__name__ if len(str(error)) < 2000 else f"MESSAGE of {len(str(error))} characters"
            except BaseException as error:  # what it is about: none may escape
                outcome = f"RAW {error!r}"
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
            results.write(json.dumps({"name": name, "outcome": outcome, "seconds": time.process_time() - started, "bytes": grown}) + "\n")
            shutil.rmtree(changed)


def _fresh(folder: Path, base: Files) -> Path:
    folder.mkdir()
    for name, data in base.items():
        (folder / name).write_bytes(data)
    return folder


def outcomes(
    folder: Path, base: Files, mutations: list[Mutation], use: Callable[[Path], dict[str, Tensor]], *, exact: bool = True
) -> dict[str, str]:
    """Return what came of each mutation; AssertionError if one crashed, hung, took too much memory or raised what is no AecoreError."""
    assert len({name for name, _ in mutations}) == len(mutations)
    folder.mkdir(parents=True, exist_ok=True)
    process = multiprocessing.get_context("fork").Process(target=_child, args=(folder, base, mutations, use, exact))
    with children(process):
        (code,) = join(process, timeout_s=120)
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    ended = [line for line in lines if "name" in line]
    crashed = sorted({line["trying"] for line in lines if "trying" in line} - {line["name"] for line in ended})
    assert code == 0 and not crashed, (code, crashed)
    assert not [line for line in ended if line["outcome"].split(" ")[0] in ("RAW", "DIFFERENT", "MESSAGE")]
    assert not [line for line in ended if line["seconds"] > LIMIT_S or line["bytes"] > LIMIT_BYTES]
    assert len(ended) == len(mutations)
    return {line["name"]: line["outcome"] for line in ended}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Files, dict[str, Any]]:
    """The files of a checkpoint with the state of its optimizer, and that state."""
    config = config_of("vae on mlp")
    torch.manual_seed(0)
    model = config.build()
    optimizer = build_optimizer(OptimSpec(), model)
    for _ in range(STEP):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    state = {"step": STEP, "optimizer": optimizer.state_dict()}
    return written(tmp_path_factory.mktemp("trained"), config, state), state


@pytest.mark.parametrize("name", NETS)
def test_a_changed_config_is_refused_or_changes_no_weight(tmp_path: Path, name: str) -> None:
    config = config_of(name)
    wrong = (*WRONG, *MORE_WRONG) if name == "vae on mlp" else WRONG
    base = written(tmp_path / "written", config)
    found = outcomes(tmp_path, base, list(config_mutations(config.to_dict(), wrong)), loads)
    assert len(found) > 75
    assert set(found.values()) <= {"ConfigError", "DataError", "equal"}
    harmless = (
        "=-1",
        "=0.5",
        "=1000000000000",
        "=1e+300",
        "=True",
        "=128",
        "=2^24",
        "input_shape=[1, 8, 9] of 3",
        "transform without pixels",  # as version 1 wrote it
    )  # a number that some other field may have
    assert not [case for case, outcome in found.items() if outcome == "equal" and not case.endswith(harmless)]
    sizes = ("latent_dim", "hidden", "channels", "width", "num_classes", "num_embeddings", "embedding_dim", "input_shape")
    changed = [case for case, outcome in found.items() if outcome == "equal" and case.split(".")[-1].split("=")[0] in sizes]
    assert not changed or name == "vqvae on conv", changed  # whose weights are of any image and any number of codes


def test_a_changed_list_of_files_is_refused(tmp_path: Path, trained: tuple[Files, dict[str, Any]]) -> None:
    base, _ = trained
    (tmp_path / "one").mkdir()
    manifest = content(_fresh(tmp_path / "one/base", base) / "checkpoint.json")
    found = outcomes(tmp_path / "all", base, list(manifest_mutations(manifest)), loads)
    assert set(found.values()) == {"DataError"}, {case: outcome for case, outcome in found.items() if outcome != "DataError"}


def test_changed_weights_are_refused(tmp_path: Path, trained: tuple[Files, dict[str, Any]]) -> None:
    base, _ = trained
    found = outcomes(tmp_path / "all", base, list(weights_mutations(base["model.safetensors"])), loads)
    assert set(found.values()) == {"DataError"}, {case: outcome for case, outcome in found.items() if outcome != "DataError"}


def test_a_changed_state_of_the_optimizer_is_refused(tmp_path: Path, trained: tuple[Files, dict[str, Any]]) -> None:
    base, state = trained
    found = outcomes(tmp_path / "all", base, list(state_mutations(state)), resumes)
    assert len(found) > 150
    assert set(found.values()) == {"DataError"}, {case: outcome for case, outcome in found.items() if outcome != "DataError"}


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt"])
def test_a_flipped_bit_in_a_structure_leads_nowhere_where_the_hashes_are_made_to_fit(
    tmp_path: Path, trained: tuple[Files, dict[str, Any]], name: str
) -> None:
    """One in a number cannot be seen; the header of the tensors, the pickle at the start and the directory at the end are structures."""
    base, _ = trained
    data = base[name]
    start = 8 + struct.unpack("<Q", data[:8])[0] if name == "model.safetensors" else 2500
    mutations = dict(flips(name, data, 0, start, 80))
    if name == "state.pt":
        mutations |= dict(flips(name, data, len(data) - 2500, len(data), 80))
    assert len(outcomes(tmp_path / "all", base, list(mutations.items()), resumes, exact=False)) > 70


# a run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return sprites_dataset(tmp_path_factory.mktemp("hostile") / "sprites", val=0.1, max_samples=4000)


def interrupted(data: str, out: Path, **options: Any) -> Path:
    """Train 8 steps of 12 and return the folder of the newest checkpoint."""
    taken = itertools.count()
    with contextlib.suppress(AecoreError):
        fit(small_job(data, out, max_steps=12, every_steps=4, **options), stop=lambda: next(taken) >= 7)
    return Path(out) / committed_checkpoints(open_store(out))[0][1]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_run_does_not_go_on_from_weights_that_are_not_finite(data: str, tmp_path: Path, value: float) -> None:
    folder = interrupted(data, tmp_path / "run")
    tensors = load_safetensors((folder / "model.safetensors").read_bytes())
    tensors["decoder.0.bias"][0] = value
    (folder / "model.safetensors").write_bytes(save_safetensors(tensors))
    reseal(folder)
    with pytest.raises(DataError, match=rf"{folder.name}/model.safetensors is damaged: decoder\.0\.bias holds numbers that are not finite"):
        fit(small_job(data, tmp_path / "run", max_steps=12, every_steps=4))


@pytest.mark.parametrize(
    ("change", "entry"),
    [
        (
            lambda state: state["optimizer"]["state"][0].update(exp_avg=torch.zeros(1)),
            r"state\.0\.exp_avg is float32 \(1,\), expected float32",
        ),
        (lambda state: state["optimizer"]["state"][1]["exp_avg"].fill_(torch.nan), r"state\.1\.exp_avg is .*not finite"),
        (lambda state: state["optimizer"]["param_groups"][0].update(betas=(2.0, 2.0)), r"param_groups\.betas is \(2\.0, 2\.0\), expected"),
        (lambda state: state.update(step=7), r"has step 7, its checkpoint has \d"),
        (lambda state: state.update(held={"step": 8, "epoch": 0, "samples": 64, "loss": 1.0}), "waits for a validation"),
    ],
)
def test_a_run_whose_newest_state_is_wrong_says_which_entry_of_which_file(
    data: str, tmp_path: Path, change: Callable[[Any], None], entry: str
) -> None:
    folder = interrupted(data, tmp_path / "run")
    state = torch.load(folder / "state.pt", weights_only=True)
    change(state)
    (folder / "state.pt").write_bytes(saved(state))
    reseal(folder)
    with pytest.raises(DataError, match=f"{folder.name}/state.pt .*{entry}"):
        fit(small_job(data, tmp_path / "run", max_steps=12, every_steps=4))


def test_a_state_whose_hash_is_wrong_is_skipped_like_any_damaged_checkpoint(
    data: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit(small_job(data, tmp_path / "whole", max_steps=12, every_steps=4))
    folder = interrupted(data, tmp_path / "run")
    state = torch.load(folder / "state.pt", weights_only=True)
    state["optimizer"]["state"][0].update(exp_avg=torch.zeros(1))
    (folder / "state.pt").write_bytes(saved(state))
    fit(small_job(data, tmp_path / "run", max_steps=12, every_steps=4))
    assert f"skipping a damaged checkpoint: checkpoints/{folder.name}" in caplog.text
    assert published_weights(tmp_path / "run") == published_weights(tmp_path / "whole")


def test_a_row_that_waits_for_its_validation_has_the_facts_of_its_step_and_finite_means() -> None:
    row = {"step": 8, "epoch": 0, "samples": 64, "loss": 1.0, "lr": 1e-3, "beta": 1, "metrics": 2}
    assert is_row(row, 8)
    changes: list[dict[Any, Any]] = [{"step": 7}, {"step": 8.5}, {"step": torch.ones(2)}, {"epoch": -1}, {"samples": 0}, {5: 1.0}]
    changes += [{"loss": value} for value in (None, "1", torch.nan, torch.inf, 10**400, True, {}, torch.ones(2))]
    for change in changes:
        assert not is_row({**row, **change}, 8), change
    for wrong in (None, 1, [], {}, {"step": 8}, torch.ones(2)):
        assert not is_row(wrong, 8)


def test_a_checkpoint_beyond_the_last_step_is_refused(data: str, tmp_path: Path) -> None:
    interrupted(data, tmp_path / "run")
    run = tmp_path / "run"
    beyond = run / "checkpoints/step-00000099-aaaaaaaa"
    shutil.copytree(run / committed_checkpoints(open_store(run))[0][1], beyond)
    rewrite(beyond / "checkpoint.json", step=99)
    with pytest.raises(DataError, match=r"step-00000099-aaaaaaaa is of step 99, this run has steps 1 to 12"):
        fit(small_job(data, run, max_steps=12, every_steps=4))


def test_a_last_checkpoint_that_the_disk_damages_is_an_error_and_the_next_run_continues_before_it(
    data: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, job = tmp_path / "run", small_job(data, tmp_path / "run", max_steps=12, every_steps=4)
    fit(small_job(data, tmp_path / "whole", max_steps=12, every_steps=4))

    def damaged(ref: Any, metrics: Any) -> None:
        if ref.step == 12:
            path = run / ref.file("model.safetensors").name
            path.write_bytes(path.read_bytes()[:-1] + b"\x55")

    with pytest.raises(DataError, match=r"checkpoint of step 12.* cannot be read back .*continues from step 8"):
        fit(job, on_checkpoint=damaged)
    assert "skipping a damaged checkpoint: checkpoints/step-00000012" in caplog.text
    fit(job)
    assert published_weights(run) == published_weights(tmp_path / "whole")
    assert [row["step"] for row in losses(run)] == list(range(1, 13))


# what a job asks for


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VAESpec(latent_dim=10**12), r"VAESpec\.latent_dim is 1000000000000, expected >= 1 and <= 16777216"),
        (lambda: MLPSpec(hidden=(10**9,)), r"MLPSpec\.hidden is 1000000000, expected"),
        (lambda: MLPSpec(hidden=(1,) * 10**5), r"MLPSpec\.hidden has 100,000 numbers, expected at most 128"),
        (lambda: RecurrentSpec(layers=10**5), r"RecurrentSpec\.layers is 100000, expected"),
        (
            lambda: ResNetSpec(channels=(4,) * 40, blocks=40),
            r"ResNetSpec\.blocks is 40 in each of 40 stages, 1600 together: expected at most 128",
        ),
        (lambda: TrainSpec(global_batch=10**10), r"TrainSpec\.global_batch is 10000000000, expected >= 1 and <= 16777216"),
        (
            lambda: VAESpec(beta=1, capacity=1.0, capacity_steps=10**400),
            r"VAESpec\.capacity_steps is 1000.*0, expected a number of 64 bits",
        ),
    ],
)
def test_a_number_that_no_machine_can_hold_is_out_of_bounds(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_model_that_this_machine_cannot_hold_is_refused_in_a_dry_run_and_in_training(data: str, tmp_path: Path) -> None:
    width = 1 << 20  # whose square is 4 TiB
    job = small_job(data, tmp_path / "run", backbone=MLPSpec(hidden=(width, width)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for use in (lambda: Session(job).plan(), lambda: fit(job)):
        with pytest.raises(ConfigError, match=r"model\.kind=vae with backbone\.kind=mlp .* weights: training it takes .* GiB"):
            use()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("run.*.json"))


def test_a_step_that_this_machine_cannot_hold_is_refused_in_a_dry_run(data: str, tmp_path: Path) -> None:
    model = VAESpec(latent_dim=64, likelihood="bernoulli", num_samples=1 << 24)
    with pytest.raises(ConfigError, match=r"a step of 64 samples of shape .* takes at least .* GiB, and this process may use"):
        Session(small_job(data, tmp_path / "run", model=model)).plan()


def test_a_sequence_of_too_many_steps_is_refused_and_a_long_axis_costs_no_search() -> None:
    with pytest.raises(ConfigError, match=r"goes through time step by step, these samples have 16,777,216 .*expected at most 65,536"):
        ModelConfig(VAESpec(), RecurrentSpec(), TransformSpec(), (1 << 24, 2)).build()
    assert [smallest_side(axes) for axes in ((), (1,), (64,), (65,), (28, 28), (105, 105), (1 << 62,))] == [1, 1, 1, 2, 4, 14, 1 << 56]


def test_this_process_may_use_no_more_than_the_machine_has() -> None:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < machine_bytes() <= pages


# what is estimated


@pytest.mark.parametrize(("kind", "backbone"), list(itertools.product(MODELS.kinds(), BACKBONES.kinds())))
def test_the_shapes_that_are_estimated_are_those_of_the_model_and_draw_nothing(kind: str, backbone: str) -> None:
    categorical = {"likelihood": "categorical", "num_levels": 5}
    has_levels = "num_levels" in {field.name for field in dataclasses.fields(MODELS.spec_type(kind))}
    for shape, levels in itertools.product(((12,), (1, 8, 8), (3, 4, 4)), (False, True)):
        if levels and not has_levels:
            continue
        with contextlib.suppress(ConfigError):  # what does not go together is another test's
            spec, transform = MODELS.spec_type(kind)(**(categorical if levels else {})), TransformSpec(scale="none" if levels else "unit")
            config = ModelConfig(spec, BACKBONES.spec_type(backbone)(), transform, shape)
            drawn = torch.get_rng_state()
            estimated = config.shapes()
            assert torch.equal(drawn, torch.get_rng_state())
            real = config.build().state_dict()
            assert estimated is not None
            assert {name: (tensor.shape, tensor.dtype) for name, tensor in estimated.items()} == {
                name: (tensor.shape, tensor.dtype) for name, tensor in real.items()
            }


@pytest.mark.parametrize("name", NETS)
def test_a_config_comes_back_from_its_plain_data(name: str) -> None:
    config = config_of(name)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert list(flatten(config.to_dict()))


class _Tied(nn.Module):
    """Two layers with the same weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight


def test_tied_weights_are_written_and_two_values_for_them_are_refused(tmp_path: Path) -> None:
    store, model, config = open_store(tmp_path), _Tied(), config_of("vae on mlp")
    checkpoint = write_checkpoint(store, "checkpoints/step-00000001-aa", model, config, step=1, state={}, info={})
    other = _Tied()
    load_weights(other, store, checkpoint)
    assert torch.equal(other.second.weight, model.first.weight)
    folder = tmp_path / checkpoint.name
    tensors = load_safetensors((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors").write_bytes(save_safetensors({**tensors, "second.weight": tensors["second.weight"] + 1}))
    reseal(folder)
    newest = newest_checkpoint(store)
    assert newest is not None
    with pytest.raises(DataError, match=r"second\.weight and first\.weight are the same weights in the model, and differ in the file"):
        load_weights(_Tied(), store, newest)


def test_looking_at_the_size_of_a_usual_model_imports_no_compiler(tmp_path: Path) -> None:
    config = config_of("vae on mlp")
    write_checkpoint(open_store(tmp_path), "model", config.build(), config, step=1, state={}, info={})
    loads = "import sys; from aecore.checkpoint.weights import load_model; load_model(sys.argv[1])"
    run([sys.executable, "-P", "-c", f"{loads}; assert 'torch._dynamo' not in sys.modules", tmp_path / "model"])


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Linear(1 << 20, 1 << 20),
        lambda: nn.Linear(8, 8).requires_grad_(torch.randn(size=(1 << 20, 1 << 20)) is None),
        lambda: nn.Linear(8, 8).requires_grad_(torch.full((1 << 40,), 1.0) is None),
        lambda: nn.Sequential(*(nn.Linear(1 << 12, 1 << 12) for _ in range(1 << 8))),
        lambda: nn.Linear(8, 8).requires_grad_(torch.zeros(np.prod([1 << 20, 1 << 20])) is None),
        lambda: nn.Linear(8, 8).requires_grad_(torch.randn(np.int64(1 << 20), np.int64(1 << 20)) is None),
    ],
)
def test_looking_at_the_size_of_a_large_model_takes_no_memory(build: Callable[[], nn.Module]) -> None:
    drawn, before = torch.get_rng_state(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert shapes_of(build)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB
    assert torch.equal(drawn, torch.get_rng_state())
