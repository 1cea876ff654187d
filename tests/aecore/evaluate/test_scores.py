"""evaluate: what it adds where labels, factors, a codebook or importance samples are asked for, and its warnings."""

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aecore._base.batch import Batch
from aecore.checkpoint.weights import load_model
from aecore.data.dataset import open_dataset
from aecore.data.format.transform import Transform
from aecore.data.read.loader import Loader
from aecore.data.sources.arrays import ArraysSpec
from aecore.data.sources.sprites import SpritesSpec
from aecore.data.write.job import shard_dataset
from aecore.data.write.plan import SplitSpec
from aecore.data.write.spec import ShardSpec
from aecore.errors import ConfigError, DataError
from aecore.evaluate import EvaluateSpec, evaluate_run
from aecore.evaluate._disentanglement import factor_vae_score, mig
from aecore.evaluate._evaluation import _Extra, _perplexity
from aecore.evaluate._probe import linear_probe, nearest_neighbours
from aecore.table.table import LatentTable
from aecore.vanilla import AE, AESpec
from aecore.variational import VAESpec
from aecore.variational.marginal import log_marginal
from tests.aecore.encoding import DIM, SIZE, ae_config, encode, model_config, saved_run
from tests.aecore.test_evaluate import wide
from tests.aecore.training import on_ranks


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    sprites, out = SpritesSpec(size=SIZE, positions=4), str(tmp_path_factory.mktemp("scores") / "dataset")
    shard_dataset(sprites, out, SplitSpec(by="hash", test=0.25), ShardSpec(max_samples=32))
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_run(tmp_path_factory.mktemp("scores") / "run", change=wide)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory, data: str, run: str) -> LatentTable:
    return encode(run, data, tmp_path_factory.mktemp("scores") / "table")


def arrays(folder: Path, x: np.ndarray, **more: np.ndarray) -> str:
    """Shard `x [n, F]` of a file as a dataset with the splits train and test."""
    np.savez(folder / "x.npz", x_train=x, x_test=x, **{f"{name}_{part}": v for name, v in more.items() for part in ("train", "test")})
    shard_dataset(ArraysSpec(url=str(folder / "x.npz")), str(folder / "dataset"), SplitSpec(), ShardSpec())
    return str(folder / "dataset")


def test_the_probes_are_those_of_the_latents_in_the_table(data: str, run: str, table: LatentTable) -> None:
    """The table is written by another path: shard by shard, through Parquet."""
    sides = [(part.numpy("mu"), part.arrow("label").to_numpy()) for part in (table.select("train"), table.select("test"))]
    found = evaluate_run(run, data, probe=True, neighbours=3).probe
    assert found is not None
    assert found["linear"] == linear_probe(*sides[0], *sides[1])
    assert found["knn"] == nearest_neighbours(*sides[0], *sides[1], 3)
    assert (found["train_samples"], found["classes"], found["column"], found["neighbours"]) == (len(sides[0][0]), 3, "mu", 3)


def test_factor_scores_are_those_of_all_samples_of_both_splits(data: str, run: str, table: LatentTable) -> None:
    found = evaluate_run(run, data, factors=True, dci=False).disentanglement
    assert found is not None
    names = ("scale", "shape", "x", "y")
    columns = [np.unique(table.arrow(f"factor_{name}").to_numpy(), return_inverse=True)[1] for name in names]
    assert tuple(found["factors"]) == names
    assert found["samples"] == 192
    assert found["mig"] == pytest.approx(mig(table.numpy("mu"), np.stack(columns, 1)), rel=1e-5)
    assert abs(found["factor_vae"] - factor_vae_score(table.numpy("mu"), np.stack(columns, 1), seed=7)) < 0.05
    assert found["dci"] is None


def test_dci_is_fitted_on_as_many_samples_as_asked_and_tested_on_half_as_many(data: str, run: str, table: LatentTable) -> None:
    pytest.importorskip("sklearn")
    found = evaluate_run(run, data, factors=True, factor_samples=100).disentanglement
    assert found is not None
    assert found["samples"] == 150
    assert {0.0 < found["dci"][name] < 1.0 for name in ("disentanglement", "completeness", "informativeness")} == {True}


def test_all_ranks_get_the_scores_of_one(data: str, run: str) -> None:
    alone = evaluate_run(run, data, probe=True, factors=True, dci=False, batch=7)
    ranks = on_ranks(functools.partial(evaluate_run, run, data, probe=True, factors=True, dci=False, batch=7), 2)
    assert [(one.probe, one.disentanglement) for one in ranks] == [(alone.probe, alone.disentanglement)] * 2


def test_a_plain_autoencoder_is_probed_by_its_z(tmp_path: Path, data: str) -> None:
    found = evaluate_run(saved_run(tmp_path / "ae", ae_config()), data, probe=True, factors=True, dci=False)
    assert found.probe is not None and found.probe["column"] == "z"
    assert found.disentanglement is not None


def test_nothing_more_is_computed_unless_it_is_asked_for(data: str, run: str) -> None:
    found = evaluate_run(run, data)
    assert (found.iwae, found.log_marginal, found.perplexity, found.probe, found.disentanglement) == (0, None, None, None, None)


def test_probing_the_split_that_was_fitted_is_warned_of(data: str, run: str) -> None:
    found = evaluate_run(run, data, probe=True, train_split="test")
    assert "fitted and scored on the same samples (split 'test')" in found.warnings[-1]
    assert found.probe is not None and found.probe["train_samples"] == found.num_samples


def test_data_without_labels_or_factors_are_refused(tmp_path: Path) -> None:
    bare = arrays(tmp_path, np.random.default_rng(0).random((40, 6)).astype(np.float32))
    run = saved_run(tmp_path / "run", model_config(shape=(6,)))
    with pytest.raises(DataError, match="has no labels, which evaluate.probe reads"):
        evaluate_run(run, bare, probe=True)
    with pytest.raises(DataError, match=r"no factor_\* column that varies \(it has: none\)"):
        evaluate_run(run, bare, factors=True, dci=False)
    with pytest.raises(DataError, match="no split 'dev'"):
        evaluate_run(run, bare, factors=True, dci=False, train_split="dev")


def test_a_factor_of_many_levels_is_cut_and_said(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((300, 2)).astype(np.float32)
    data = arrays(tmp_path, np.repeat(values, 3, 1), factor_fine=values[:, 0], factor_coarse=(values[:, 1] > 0.5).astype(np.int64))
    found = evaluate_run(saved_run(tmp_path / "run", model_config(shape=(6,)), wide), data, factors=True, dci=False)
    assert found.disentanglement is not None
    assert found.disentanglement["factors"] == ["coarse", "fine"]
    assert "more than 100 levels" in found.warnings[-1] and found.warnings[-1].endswith(": fine")


def test_the_bound_on_log_px_is_the_mean_over_the_split_whatever_the_ranks(data: str, run: str) -> None:
    found = evaluate_run(run, data, iwae=20, batch=1000, seed=3)
    loaded = load_model(run)
    with Loader(open_dataset(data), "test") as loader:
        batch = Transform(loaded.config.transform)(loader.take(np.arange(found.num_samples)))
    with torch.no_grad():
        rows = log_marginal(loaded.model, batch, num_samples=20, seed=3, index=0, likelihood="gaussian")
    assert found.log_marginal == pytest.approx(float(rows.mean()), rel=1e-9)
    assert found.iwae == 20
    constants = 0.5 * 144 * math.log(2 * math.pi)  # the ELBO has none of them
    assert found.elbo is not None and found.elbo - constants < found.log_marginal
    cut = evaluate_run(run, data, iwae=20, batch=7, seed=3)
    ranks = on_ranks(functools.partial(evaluate_run, run, data, iwae=20, batch=7, seed=3), 2)
    assert [one.log_marginal for one in ranks] == pytest.approx([cut.log_marginal] * 2, rel=1e-9)


def test_importance_samples_of_a_model_without_a_posterior_are_refused(tmp_path: Path, data: str) -> None:
    with pytest.raises(ConfigError, match="evaluate.iwae=10 and model.kind=ae has no posterior"):
        evaluate_run(saved_run(tmp_path / "ae", ae_config()), data, iwae=10)


class Coded(AE):
    """Chooses one of three entries twice for each row, by the row's first value."""

    def latents(self, batch: Batch) -> dict[str, torch.Tensor]:
        code = batch.x.flatten(1)[:, :1].round().int()
        return {"codes": torch.cat([code, code], 1)}


def test_the_perplexity_of_a_codebook_counts_the_whole_split() -> None:
    model, extra = Coded(torch.nn.Identity(), torch.nn.Identity()), _Extra(EvaluateSpec(), "gaussian")
    counts = torch.zeros(1, dtype=torch.float64)
    for values in ([0.0, 0, 0, 2], [2.0, 2, 2, 0]):
        x, rows = torch.tensor(values)[:, None], torch.arange(4)
        terms = extra(model, Batch(x, rows, rows, 4), 0)
        assert "latent_dim" not in terms
        counts = counts + terms["codes"]
    assert counts[:3].tolist() == [8, 0, 8]
    assert _perplexity(counts / 8) == pytest.approx(2.0)
    assert _perplexity(torch.tensor([1.0, 2.0, 1.0])) == pytest.approx(math.exp(1.5 * math.log(2)))


def test_a_codebook_that_is_too_large_to_count_is_refused() -> None:
    model, x = Coded(torch.nn.Identity(), torch.nn.Identity()), torch.full((1, 1), 70_000.0)
    rows = torch.arange(1)
    with pytest.raises(DataError, match="entry 70000 of its codebook"):
        _Extra(EvaluateSpec(), "gaussian")(model, Batch(x, rows, rows, 1), 0)


@pytest.mark.parametrize(("scale", "warned"), [(1.0, False), (200.0, True)])
def test_a_unit_gaussian_on_unnormalised_input_is_warned_of(tmp_path: Path, scale: float, warned: bool) -> None:
    x = (np.random.default_rng(0).normal(5, 1, (60, 6)) * scale).astype(np.float32)
    found = evaluate_run(saved_run(tmp_path / "run", model_config(shape=(6,)), wide), arrays(tmp_path, x))
    assert any("input is not normalised (its values deviate by" in warning for warning in found.warnings) == warned


@pytest.mark.parametrize(("dim", "warned"), [(5, False), (6, True), (9, True)])
@pytest.mark.parametrize("spec", [VAESpec, AESpec])
def test_a_latent_as_large_as_the_input_is_warned_of(tmp_path: Path, spec: Any, dim: int, warned: bool) -> None:
    data = arrays(tmp_path, np.random.default_rng(0).random((30, 6)).astype(np.float32))
    found = evaluate_run(saved_run(tmp_path / "run", model_config(spec(latent_dim=dim), shape=(6,))), data)
    assert any(f"the latent has {dim} dimensions and the input 6 values" in warning for warning in found.warnings) == warned


def test_the_numbers_carry_the_lineage_of_checkpoint_and_data(data: str, run: str) -> None:
    found = evaluate_run(run, data, probe=True).to_dict()
    assert found["lineage"]["checkpoint"]["sha256"] == load_model(run).sha256
    assert found["lineage"]["dataset"]["sha256"] == open_dataset(data).manifest.dataset_sha256
    assert len(found["kl_per_dimension"]) == DIM
