"""Laws of the jobs over the registry: every kind trains from a recipe, on two ranks as on one, and becomes a table, with no line elsewhere.

Each kind takes the first of the tiny datasets below, and the first backbone, that it can be trained on. A model that needs other data
(bags, sequences) adds a dataset to `DATA`; one that needs other settings adds them to `SETTINGS`.
"""

import ast
import dataclasses
import functools
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from aecore.data.dataset import open_dataset
from aecore.errors import ConfigError, DataError
from aecore.registry import BACKBONES, MODELS, to_dict
from aecore.table.table import open_table
from aecore.table.verify import verify_table
from aecore.training.job import TrainJob
from aecore.training.loop import fit
from aecore.training.ranks import Rank
from aecore.training.session import Session
from pipelines.recipe.recipe import load_recipe
from pipelines.steps import steps
from tests.aecore.training import losses, on_ranks

ROOT = Path(__file__).resolve().parents[3]
ROWS = 33  # two steps of 16, and one of a single sample: the second rank has none
BETA = 4.0  # of those that have one: what a loss calls ELBO is then another number than the ELBO
SETTINGS: dict[str, dict[str, Any]] = {}  # by kind: more keys of the section `model`


def images(folder: Path) -> list[str]:
    """Sprites, with labels and factors."""
    return ["source.kind=sprites", "source.size=12", f"source.num_samples={ROWS}"]


def sequences(folder: Path) -> list[str]:
    """Arrays of 7 steps of 3 numbers."""
    np.savez(folder / "sequences.npz", x=np.random.default_rng(0).random((ROWS, 7, 3), np.float32))
    return ["source.kind=arrays", f"source.url={folder}/sequences.npz"]


DATA: dict[str, Callable[[Path], list[str]]] = {"images": images, "sequences": sequences}


@dataclasses.dataclass(frozen=True)
class Trained:
    """A kind, what it was trained on, and where its runs are."""

    kind: str
    backbone: str
    data: str
    one: str
    two: str


def keys(kind: str, backbone: str, data: str, out: str) -> list[str]:
    beta = {"beta": BETA} if "beta" in to_dict(MODELS.spec_type(kind)()) else {}
    model = {"kind": kind, "latent_dim": 4, **beta, **SETTINGS.get(kind, {})}
    small = ["train.global_batch=16", "train.lanes=4", "train.max_steps=5", "train.epochs=2", "cluster.num_workers=0"]
    return [f"model={model}", f"backbone={{kind: {backbone}}}", f"data={data}", f"out={out}", *small]


def job_of(kind: str, backbone: str, data: str, out: str) -> TrainJob:
    return steps.train_job_of(load_recipe(None, keys(kind, backbone, data, out)))


def fitting(kind: str, datasets: dict[str, str]) -> tuple[str, str]:
    """Return the first dataset and backbone on which a kind can be trained."""
    refusals = []
    for data in datasets.values():
        for backbone in sorted(BACKBONES.kinds(), key=lambda name: (name != "mlp", name)):
            try:
                with closing(Session(job_of(kind, backbone, data, "./unused"))) as session:
                    session.require_trainable()
            except (ConfigError, DataError) as refused:
                refusals.append(f"{Path(data).name}, {backbone}: {refused}")
            else:
                return data, backbone
    raise AssertionError(f"model.kind={kind} can be trained on none of the tiny datasets:\n" + "\n".join(refusals))


def fit_all(jobs: list[TrainJob], rank: Rank) -> None:
    for job in jobs:
        fit(job, rank=rank)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    """Every kind, trained by `aepipe train`'s step in this process, and by `fit` on two ranks that are started once."""
    folder, datasets = tmp_path_factory.mktemp("kinds"), {}
    for name, make in DATA.items():
        datasets[name] = str(folder / name)
        steps.shard(load_recipe(None, [*make(folder), f"out={folder}/{name}", "shards.max_samples=12", "cluster.num_workers=0"]))
    found, jobs = {}, []
    for kind in MODELS.kinds():
        data, backbone = fitting(kind, datasets)
        one, two = f"{folder}/one-{kind}", f"{folder}/two-{kind}"
        steps.train(load_recipe(None, keys(kind, backbone, data, one)))
        jobs.append(job_of(kind, backbone, data, two))
        found[kind] = Trained(kind, backbone, data, one, two)
    on_ranks(functools.partial(fit_all, jobs), 2)
    return found


@pytest.mark.parametrize("kind", MODELS.kinds())
def test_two_ranks_train_as_one(trained: dict[str, Trained], kind: str) -> None:
    run = trained[kind]
    one, two = losses(run.one), losses(run.two)
    assert min(row["samples"] for row in one) == 1, "in one step the second rank has no sample"
    for name in one[0]:
        np.testing.assert_allclose([row[name] for row in two], [row[name] for row in one], rtol=1e-4, atol=1e-6, err_msg=name)
    weights = load_file(f"{run.one}/model/model.safetensors")
    for name, tensor in load_file(f"{run.two}/model/model.safetensors").items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", MODELS.kinds())
def test_whatever_beta_is_the_elbo_of_a_row_is_log_likelihood_minus_kl_per_sample(trained: dict[str, Trained], kind: str) -> None:
    for row in losses(trained[kind].one):
        assert row["metrics"] == 2
        assert ("elbo" in row) == ({"mu", "log_var"} <= set(MODELS.spec_type(kind)().columns))
        if "elbo" in row:
            views = [end for end in ("", "_x1", "_x2") if f"kl_divergence{end}" in row]
            elbos = [row[f"log_likelihood{end}"] - row[f"kl_divergence{end}"] for end in views]
            assert row["elbo"] == pytest.approx(np.mean(elbos), rel=1e-6)
            betas = [row[f"log_likelihood{end}"] - BETA * row[f"kl_divergence{end}"] for end in views]
            assert row["loss"] == pytest.approx(-np.sum(betas), rel=1e-6), "the loss is what is minimised, of a pair the sum"


@pytest.mark.parametrize("kind", MODELS.kinds())
def test_every_kind_becomes_a_table_and_is_scored(trained: dict[str, Trained], kind: str, tmp_path: Path) -> None:
    run = trained[kind]
    places = [f"run={run.one}", f"data={run.data}", "cluster.num_workers=0"]
    made = steps.encode(load_recipe(None, [*places, f"out={tmp_path}/table", "encode.reconstruction=true", "encode.batch=8"]))
    assert set(MODELS.spec_type(kind)().columns) <= set(made["columns"])
    table = open_table(f"{tmp_path}/table")
    verify_table(table, read_data=True, dataset_url=run.data)
    assert table.num_rows == open_dataset(run.data).manifest.num_samples("train")
    scored = steps.evaluate(load_recipe(None, [*places, "evaluate.split=train"]))
    assert np.isfinite(scored["mse"])
    assert table.numpy("recon_error").mean() == pytest.approx(scored["mse"], rel=1e-4)


def test_no_job_knows_a_model() -> None:
    """Loader, trainer, encoder and the others reach models by the registry only."""
    packages = ("aecore.vanilla", "aecore.variational", "aecore.mil")
    rooms = {"vanilla", "variational", "mil", "mil.py"}
    for path in sorted((ROOT / "aecore").rglob("*.py")):
        if path.relative_to(ROOT / "aecore").parts[0] in rooms:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names = [name for name in names if name != "aecore.variational.marginal"]  # an estimator over any model with `log_weights`
            assert not [name for name in names if name.startswith(packages)], f"{path.name}:{node.lineno}"
