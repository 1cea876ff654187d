"""The sparse autoencoder: both penalties against their formulas, over ranks, and that latents become sparse."""

import functools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, kl_divergence

from aecore._base import Batch
from aecore.checkpoint.weights import load_model
from aecore.data.dataset import open_dataset
from aecore.data.format.transform import Transform, TransformSpec
from aecore.data.read.loader import Loader
from aecore.errors import ConfigError
from aecore.nn.mlp import MLPSpec
from aecore.registry import MODELS
from aecore.training.loop import fit
from aecore.training.ranks import Rank
from aecore.vanilla import SparseAE, SparseAESpec
from tests.aecore.training import fit_on, losses, on_ranks, small_job, sprites_dataset


def batch_of(x: Tensor, positions: Tensor | None = None, num_global: int | None = None) -> Batch:
    rows = torch.arange(len(x)) if positions is None else positions
    return Batch(x, rows, rows, len(x) if num_global is None else num_global)


def small(penalty: str = "l1", weight: float = 0.5, rho: float = 0.1) -> SparseAE:
    torch.manual_seed(0)
    unit = nn.ReLU() if penalty == "l1" else nn.Sigmoid()
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), unit)
    return SparseAE(encoder, nn.Sequential(nn.Linear(6, 12), nn.Unflatten(1, (1, 3, 4))), weight, penalty, rho)


def test_the_l1_penalty_is_summed_over_latents_and_averaged_over_the_batch() -> None:
    model, x = small(), torch.rand(5, 1, 3, 4)
    output = model(x)
    result = model.compute_loss(x, output, beta=3.0)
    likelihood = -0.5 * (output.x_hat - x).square().sum() / 5
    torch.testing.assert_close(result.objective, -likelihood + 3.0 * 0.5 * output.z.sum() / 5)
    assert result.diagnostics["sparsity"] == pytest.approx(output.z.sum().item() / 5)
    assert result.diagnostics["mean_activation"] == pytest.approx(output.z.mean().item())
    assert result.diagnostics["active_share"] == pytest.approx((output.z > 0).float().mean().item())
    assert result.diagnostics["log_likelihood"] == pytest.approx(likelihood.item())


@pytest.mark.parametrize("training", [True, False])
def test_the_kl_penalty_is_the_divergence_of_bernoulli_variables(training: bool) -> None:
    model, x = small("kl", rho=0.2).train(training), torch.rand(5, 1, 3, 4)
    output = model(x)
    expected = kl_divergence(Bernoulli(torch.tensor(0.2)), Bernoulli(output.z.mean(0))).sum()
    result = model.compute_loss(x, output)
    torch.testing.assert_close(result.objective, -result.tensors["log_likelihood"] + 0.5 * expected)
    expected_gradient = torch.autograd.grad(expected, model.encoder[1].weight, retain_graph=True)[0]
    sparsity = (result.objective + model.compute_loss(x, output).tensors["log_likelihood"]) / 0.5
    plain = torch.autograd.grad(-0.5 * (output.x_hat - x).square().sum() / 5, model.encoder[1].weight, retain_graph=True)[0]
    gradient = torch.autograd.grad(sparsity, model.encoder[1].weight)[0]
    torch.testing.assert_close(gradient + plain / 0.5, expected_gradient)


def test_the_divergence_is_finite_at_activations_of_zero_and_one() -> None:
    model = SparseAE(nn.Identity(), nn.Identity(), penalty="kl")
    x = torch.stack([torch.zeros(4), torch.ones(4)], 1)
    result = model.compute_loss(x, model(x))
    assert math.isfinite(result.diagnostics["sparsity"])
    assert result.diagnostics["sparsity"] > 5


def _gradients(cut: list[int], rank: Rank = Rank()) -> tuple[float, list[Tensor]]:  # noqa: B008  # frozen
    """Return objective and gradients of a global batch of 10 rows, of which this rank has a part; weighted and summed as fit does."""
    model = small("kl")
    x = torch.rand(10, 1, 3, 4, generator=torch.Generator().manual_seed(0))
    rows = torch.arange(10)[cut[rank.rank] : cut[rank.rank + 1]]
    result = model.loss(batch_of(x[rows] if len(rows) else x[:1], rows, 10))
    (result.objective * len(rows) / 10).backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    if rank.world_size > 1:
        for gradient in gradients:
            torch.distributed.all_reduce(gradient)
    return result.diagnostics["sparsity"], gradients


@pytest.mark.parametrize("cut", [[0, 5, 10], [0, 3, 10], [0, 0, 10]], ids=str)
def test_the_kl_penalty_is_of_the_whole_batch_on_any_rank(cut: list[int]) -> None:
    sparsity, gradients = _gradients([0, 10])
    for other, theirs in on_ranks(functools.partial(_gradients, cut), 2):
        assert other == pytest.approx(sparsity, rel=1e-5)
        for ours, gradient in zip(gradients, theirs, strict=True):
            torch.testing.assert_close(gradient, ours, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return sprites_dataset(tmp_path_factory.mktemp("sae") / "sprites", val=0.1)


def test_two_ranks_train_the_kl_penalty_as_one(data: str, tmp_path) -> None:
    spec = SparseAESpec(latent_dim=8, penalty="kl", sparsity_weight=2.0)
    for world_size in (1, 2):
        fit_on(small_job(data, tmp_path / str(world_size), max_steps=8, model=spec, val_split="val"), world_size)
    one, two = (losses(tmp_path / str(world_size)) for world_size in (1, 2))
    for name in ("loss", "sparsity", "mean_activation"):
        np.testing.assert_allclose([row[name] for row in two], [row[name] for row in one], rtol=1e-4, err_msg=name)
    assert two[-1]["validation"] == pytest.approx(one[-1]["validation"], rel=1e-4)


def latents(run: str, data: str) -> Tensor:
    with Loader(open_dataset(data), "val", transform=TransformSpec()) as loader:
        batch = Transform(TransformSpec())(next(loader.range_batches(0, 256, 256)))
    return load_model(run).model.latents(batch)["z"]


def test_more_weight_makes_sparser_latents(data: str, tmp_path) -> None:
    active = []
    for weight in (0.0, 0.3):
        spec = SparseAESpec(latent_dim=32, sparsity_weight=weight)
        run = fit(small_job(data, tmp_path / str(weight), epochs=4, model=spec, backbone=MLPSpec(hidden=(64,)))).url
        active.append((latents(run, data) > 0).float().mean().item())
    assert active[1] < 0.6 * active[0]


def test_the_kl_penalty_brings_mean_activations_to_rho(data: str, tmp_path) -> None:
    spec = SparseAESpec(latent_dim=32, penalty="kl", sparsity_weight=5.0, rho=0.1)
    run = fit(small_job(data, tmp_path / "run", epochs=6, model=spec, backbone=MLPSpec(hidden=(64,)))).url
    z = latents(run, data)
    assert 0 < z.min() <= z.max() < 1
    assert z.mean().item() == pytest.approx(0.1, abs=0.03)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalty": "l2"}, "got 'l2'"),
        ({"rho": 0.0}, "0 < rho < 1"),
        ({"rho": 1.0}, "0 < rho < 1"),
        ({"sparsity_weight": -1.0}, "got -1.0"),
    ],
)
def test_settings_that_cannot_work_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseAE(nn.Identity(), nn.Identity(), **options)
    with pytest.raises(ConfigError):
        MODELS.from_dict({"kind": "sae", **options})
