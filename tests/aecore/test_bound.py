"""Objectives of the VAE, not the ELBO: IWAE, free bits, capacity, learned scale; their knobs. Legend: B batch, S samples, D latent."""

import contextlib
import logging
import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Normal

from aecore._base import Batch
from aecore.data.format.transform import TransformSpec
from aecore.data.sources.arrays import ArraysSpec
from aecore.data.write.job import shard_dataset
from aecore.data.write.plan import SplitSpec
from aecore.data.write.spec import ShardSpec
from aecore.errors import ConfigError, DataError, Diverged
from aecore.evaluate import evaluate_run
from aecore.loss import kl_divergence_diag_gaussian, log_likelihood, sample_log_likelihood
from aecore.nn.conv import ConvSpec
from aecore.nn.mlp import MLPSpec
from aecore.registry import MODELS, to_dict
from aecore.training.loop import fit
from aecore.training.optimizer import OptimSpec
from aecore.variational import VAE, VAESpec
from aecore.variational.bound import LOG_SCALE_MIN, VariationalObjective
from tests.aecore.training import fit_on, losses, published_weights, small_job, sprites_dataset

B, S, D = 6, 5, 3


def batch_of(x: Tensor) -> Batch:
    rows = torch.arange(len(x))
    return Batch(x, rows, rows, len(x))


def vae(bound: VariationalObjective | None = None) -> VAE:
    torch.manual_seed(0)
    model = VAE(nn.Sequential(nn.Linear(12, 8), nn.Tanh()), nn.Linear(D, 12), D, bound)
    model.build(torch.zeros(1, 12))
    return model


@pytest.fixture
def batch() -> Batch:
    return batch_of(torch.rand(B, 12, generator=torch.Generator().manual_seed(1)).round())


@pytest.fixture
def eps() -> Tensor:
    return torch.randn(B, S, D, generator=torch.Generator().manual_seed(2))


def test_iwae_is_the_log_of_the_mean_weight(batch: Batch, eps: Tensor) -> None:
    model = vae(VariationalObjective(objective="iwae", num_samples=S))
    result = model.loss(batch, eps=eps, likelihood="bernoulli")
    output = model(batch.x, S=S, eps=eps)
    q = Normal(output.mu.unsqueeze(1), (output.log_var / 2).exp().unsqueeze(1))
    log_px = Bernoulli(logits=output.x_hat).log_prob(batch.x.unsqueeze(1).expand_as(output.x_hat)).sum(2)
    weights = log_px + (Normal(0.0, 1.0).log_prob(output.z) - q.log_prob(output.z)).sum(2)
    torch.testing.assert_close(result.objective, -(weights.logsumexp(1) - math.log(S)).mean())
    torch.testing.assert_close(weights.detach().double(), model.log_weights(batch, eps, likelihood="bernoulli"), atol=1e-4, rtol=1e-5)
    assert list(result.diagnostics) == ["iwae", "elbo", "log_likelihood", "kl_divergence"]
    assert result.diagnostics["iwae"] == pytest.approx(-result.objective.item())


def test_the_iwae_that_is_reported_is_a_bound_of_log_p_whatever_beta_weighs(batch: Batch, eps: Tensor) -> None:
    model = vae(VariationalObjective(objective="iwae", num_samples=S))
    plain, weighted = (model.loss(batch, eps=eps, beta=beta, likelihood="bernoulli") for beta in (1.0, 4.0))
    assert weighted.objective.item() != pytest.approx(plain.objective.item(), rel=1e-3)
    assert weighted.reported["iwae"].item() == pytest.approx(plain.reported["iwae"].item(), rel=1e-6)
    assert weighted.reported["elbo"].item() == pytest.approx(plain.diagnostics["elbo"], rel=1e-6)
    assert weighted.diagnostics["elbo"] != pytest.approx(plain.diagnostics["elbo"], rel=1e-3), "the diagnostics keep beta in it"


def test_iwae_of_one_sample_is_the_sampled_elbo_and_more_samples_bound_tighter(batch: Batch) -> None:
    model = vae(VariationalObjective(objective="iwae", num_samples=64))
    eps = torch.randn(B, 64, D, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        of = {count: float(model.loss(batch, eps=eps[:, :count]).objective) for count in (1, 64)}
        singles = torch.stack([model.loss(batch, eps=eps[:, s : s + 1]).objective for s in range(64)])
        analytic = float(vae().loss(batch, eps=eps).objective)
    assert of[64] < singles.mean()  # Jensen, for the same noise
    assert float(singles.mean()) == pytest.approx(analytic, abs=0.3)  # the KL in closed form is what the ratio estimates
    assert of[1] == pytest.approx(float(singles[0]))


def test_evaluation_is_the_elbo_of_one_sample_whatever_was_trained(batch: Batch, eps: Tensor) -> None:
    plain = vae().eval()
    for bound in (
        VariationalObjective(objective="iwae", num_samples=7),
        VariationalObjective(free_bits=3.0),
        VariationalObjective(capacity=20.0),
    ):
        model = vae(bound).eval()
        model.load_state_dict(plain.state_dict())
        found, expected = (net.loss(batch, eps=eps[:, :1], likelihood="bernoulli") for net in (model, plain))
        assert torch.equal(found.objective, expected.objective)
        assert list(found.tensors) == ["elbo", "log_likelihood", "kl_divergence"]
        assert not torch.equal(model.train().loss(batch, eps=eps[:, :1], likelihood="bernoulli").objective, expected.objective)


def test_a_model_asks_for_its_samples_in_training_and_for_one_in_evaluation(batch: Batch) -> None:
    model = vae(VariationalObjective(num_samples=4))
    assert (model.noise_shape(), model.noise_shape(2), model.eval().noise_shape()) == ((4, D), (2, D), (1, D))
    torch.manual_seed(3)
    drawn = model.train().loss(batch).objective
    torch.manual_seed(3)
    assert torch.equal(drawn, model.loss(batch, eps=torch.randn(B, 4, D)).objective)


def test_free_bits_leave_dimensions_below_them_alone(batch: Batch, eps: Tensor) -> None:
    model = vae(VariationalObjective(free_bits=0.05))
    result = model.loss(batch, eps=eps, beta=2.0)
    q = model(batch.x, sample=False)
    per_dimension = kl_divergence_diag_gaussian(q.mu, q.log_var, reduce_sum=False)
    assert (per_dimension < 0.05).any() and (per_dimension > 0.05).any()
    penalty = per_dimension.clamp(min=0.05).sum(1).mean()
    log_px = result.tensors["log_likelihood"]
    torch.testing.assert_close(result.objective, 2.0 * penalty - log_px)
    assert result.diagnostics["kl_penalty"] == pytest.approx(penalty.item())
    assert result.diagnostics["elbo"] == pytest.approx((log_px - 2.0 * per_dimension.sum(1).mean()).item(), rel=1e-5)  # the true one


def test_capacity_is_a_pure_function_of_the_step(batch: Batch, eps: Tensor) -> None:
    model = vae(VariationalObjective(capacity=10.0, capacity_steps=4))
    kl = model.eval().loss(batch, eps=eps).tensors["kl_divergence"]
    q = model.encode(batch.x, sample=False)
    each = kl_divergence_diag_gaussian(q.mu, q.log_var)
    model.train()
    for step, target in ((2, 5.0), (1, 2.5), (4, 10.0), (400, 10.0)):
        model.at_step(step)
        result = model.loss(batch, eps=eps, beta=100.0)
        assert result.diagnostics["capacity"] == target
        expected = 100.0 * (each - target).abs().mean() - result.tensors["log_likelihood"]
        torch.testing.assert_close(result.objective.detach(), expected)
    assert "bound.capacity_now" not in model.state_dict()
    assert result.tensors["kl_divergence"] == kl


def test_a_learned_scale_finds_the_spread_of_the_residuals() -> None:
    model = vae(VariationalObjective(scale="learned"))
    x = torch.randn(400, 12) * 0.25
    with torch.no_grad():
        output = model(x, sample=False)
    output.x_hat = torch.zeros(400, 1, 12)
    optimizer = torch.optim.Adam([model.bound.log_scale], lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        model.compute_loss(x, output).objective.backward()
        optimizer.step()
    assert model.bound.scale.item() == pytest.approx(x.square().mean().sqrt().item(), rel=0.01)
    result = model.compute_loss(x, output)
    assert result.diagnostics["scale"] == pytest.approx(model.bound.scale.item())
    nn.init.constant_(model.bound.log_scale, -1e3)  # perfect reconstructions would drive it to 0
    assert model.bound.scale.item() == pytest.approx(math.exp(LOG_SCALE_MIN))
    assert model.compute_loss(x, output).objective.isfinite()


def test_a_fixed_scale_weighs_the_likelihood(batch: Batch, eps: Tensor) -> None:
    result = vae(VariationalObjective(scale=0.5)).loss(batch, eps=eps)
    output = vae()(batch.x, S=S, eps=eps)
    expected = Normal(output.x_hat, 0.5).log_prob(batch.x.unsqueeze(1)).sum(2).mean() + 12 * 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(result.tensors["log_likelihood"], expected.detach())


def test_a_scale_is_saved_only_if_it_is_learned() -> None:
    assert vae().state_dict().keys() == vae(VariationalObjective(scale=0.3, capacity=3.0)).state_dict().keys()
    assert vae(VariationalObjective(scale="learned")).state_dict().keys() - vae().state_dict().keys() == {"bound.log_scale"}


@pytest.mark.parametrize(
    "bound",
    [{"objective": "iwae", "num_samples": S}, {"free_bits": 0.1}, {"capacity": 5.0, "capacity_steps": 10}, {"scale": "learned"}],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_every_objective_compiles_to_one_graph_at_all_steps(batch: Batch, eps: Tensor, bound: dict[str, Any]) -> None:
    model, graphs = vae(VariationalObjective(**bound)), 0

    def count(module: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        nonlocal graphs
        graphs += 1
        return module

    torch._dynamo.reset()
    compiled = torch.compile(lambda beta: model.loss(batch, eps=eps, beta=beta), backend=count, fullgraph=True)
    for step in (1, 5, 9):
        model.at_step(step)
        beta = torch.tensor(0.1 * step)
        torch.testing.assert_close(compiled(beta).objective, model.loss(batch, eps=eps, beta=beta).objective)
    assert graphs == 1


@pytest.mark.parametrize(
    "bound", [{"objective": "iwae", "num_samples": S}, {"free_bits": 0.1}, {"capacity": 5.0}, {"scale": "learned"}], ids=str
)
def test_gradients_of_every_objective_are_exact_in_float64(batch: Batch, eps: Tensor, bound: dict[str, Any]) -> None:
    model = vae(VariationalObjective(**bound)).double()
    double = batch_of(batch.x.double())

    def objective(*_: Tensor) -> Tensor:
        return model.loss(double, eps=eps.double(), beta=0.7).objective

    assert torch.autograd.gradcheck(objective, list(model.parameters()), atol=1e-4)


@pytest.mark.parametrize("backbone", [MLPSpec(hidden=(16,)), ConvSpec(channels=(8,))], ids=lambda spec: spec.kind)
@pytest.mark.parametrize("shape", [(2, 5, 5), (7,)], ids=str)
def test_a_categorical_vae_gives_logits_of_every_level(shape: tuple[int, ...], backbone: object) -> None:
    spec = VAESpec(latent_dim=D, likelihood="categorical", num_levels=4)
    model = MODELS.build(spec, backbone, shape)
    x = torch.randint(0, 4, (B, *shape)).float()
    batch = batch_of(x)
    output = model(x, S=2)
    assert output.x_hat.shape == (B, 2, *shape, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for step in range(150):
        result = model.loss(batch, eps=torch.randn(B, 1, D, generator=torch.Generator().manual_seed(step)), likelihood="categorical")
        optimizer.zero_grad()
        result.objective.backward()
        optimizer.step()
        losses.append(result.objective.item())
    assert losses[-1] < 0.8 * losses[0]
    reconstruction = model.eval().reconstruct(batch, likelihood="categorical")
    assert reconstruction.shape == x.shape
    assert (reconstruction - x).abs().mean() < 0.9 * (x.mean() - x).abs().mean()  # levels, in data space
    best = model(x).x_hat.squeeze(1)
    torch.testing.assert_close(
        sample_log_likelihood(x, best.unsqueeze(1), "categorical").squeeze(1), log_likelihood(x, best, "categorical").flatten(1).sum(1)
    )


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"objective": "iwea"}, "objective is 'iwea'.*did you mean 'iwae'"),
        ({"beta_schedule": "cylic"}, "beta_schedule is 'cylic'.*did you mean 'cyclic'"),
        ({"likelihood": "gausian"}, "likelihood is 'gausian'.*did you mean 'gaussian'"),
        ({"latent_dim": 0}, "latent_dim is 0, expected >= 1"),
        ({"num_samples": 0}, "num_samples is 0, expected >= 1"),
        ({"scale": 0.0}, "scale is 0.0, expected > 0"),
        ({"scale": "learnt"}, "scale is 'learnt', expected a positive number or 'learned'"),
        ({"scale": 0.1, "likelihood": "bernoulli"}, "scale is 0.1, which VAESpec.likelihood=bernoulli does not have"),
        ({"free_bits": 0.1, "capacity": 3.0}, "free_bits is 0.1 and capacity 3.0: both replace the KL"),
        ({"free_bits": 0.1, "objective": "iwae"}, "free_bits=0.1 replaces the KL, which objective=iwae does not have"),
        ({"capacity_steps": 10}, "capacity_steps is 10, but there is no VAESpec.capacity"),
        ({"likelihood": "categorical"}, "num_levels is 0.*categorical needs at least 2 levels"),
        ({"num_levels": 256}, "num_levels is 256 and VAESpec.likelihood gaussian"),
        ({"beta_schedule": "constant", "beta_warmup_steps": 5}, "beta_warmup_steps is 5, but VAESpec.beta_schedule=constant"),
        ({"beta_cycle_steps": 5}, "beta_cycle_steps is 5, which only VAESpec.beta_schedule=cyclic reads"),
        ({"beta_schedule": "cyclic"}, "a cycle needs at least 2 steps"),
        ({"beta_schedule": "cyclic", "beta_cycle_steps": 5, "beta_warmup_steps": 6}, "as many as its rise"),
    ],
    ids=str,
)
def test_knobs_that_cannot_work_are_refused(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VAESpec(**knobs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"objective": "iwea"}, "did you mean 'iwae'"),
        ({"num_samples": 0}, "num_samples must be >= 1, got 0"),
        ({"scale": "learnt"}, "scale is 'learnt'"),
        ({"free_bits": -1.0}, "must be >= 0"),
        ({"free_bits": 1.0, "capacity": 1.0}, "both replace the KL"),
    ],
    ids=str,
)
def test_a_bound_in_python_refuses_the_same(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VariationalObjective(**arguments)


def test_logits_of_levels_are_not_squashed() -> None:
    with pytest.raises(ConfigError, match="backbone.output=sigmoid squashes them"):
        MODELS.build(VAESpec(likelihood="categorical", num_levels=4), MLPSpec(output="sigmoid"), (3,))


def test_schedules_of_beta_are_pure_functions_of_the_step() -> None:
    cyclic = VAESpec(beta=2.0, beta_schedule="cyclic", beta_cycle_steps=4)
    assert [cyclic.beta_at(step) for step in (1, 2, 3, 4, 5, 6, 1)] == [1.0, 2.0, 2.0, 2.0, 1.0, 2.0, 1.0]
    rising = VAESpec(beta=2.0, beta_schedule="cyclic", beta_cycle_steps=4, beta_warmup_steps=4)
    assert [rising.beta_at(step) for step in range(1, 6)] == [0.5, 1.0, 1.5, 2.0, 0.5]
    assert [VAESpec(beta=2.0, beta_warmup_steps=4).beta_at(step) for step in (1, 4, 9)] == [0.5, 2.0, 2.0]
    assert VAESpec(beta=2.0, beta_schedule="constant").beta_at(1) == 2.0


def test_the_knobs_of_a_spec_reach_the_model() -> None:
    spec = VAESpec(objective="iwae", num_samples=5, scale="learned")
    bound = MODELS.build(spec, MLPSpec(hidden=(8,)), (4,)).bound
    assert (bound.objective, bound.num_samples, bound.fixed_scale) == ("iwae", 5, None)
    bound = MODELS.build(VAESpec(capacity=25.0, capacity_steps=7, scale=0.5), MLPSpec(hidden=(8,)), (4,)).bound
    assert (bound.capacity, bound.capacity_steps, bound.fixed_scale) == (25.0, 7, 0.5)
    assert MODELS.from_dict(to_dict(spec)) == spec


TRAINED = [
    VAESpec(latent_dim=4, likelihood="bernoulli", objective="iwae", num_samples=5),
    VAESpec(latent_dim=4, likelihood="bernoulli", num_samples=3, beta_schedule="cyclic", beta_cycle_steps=10, free_bits=0.1),
    VAESpec(latent_dim=4, likelihood="bernoulli", capacity=6.0, capacity_steps=20, beta=10.0),
    VAESpec(latent_dim=4, scale="learned"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return sprites_dataset(tmp_path_factory.mktemp("bound") / "sprites", val=0.1)


@pytest.mark.parametrize("spec", TRAINED, ids=["iwae", "free bits", "capacity", "learned scale"])
def test_every_objective_trains_alike_on_any_number_of_ranks_and_is_validated_as_the_elbo(data: str, tmp_path: Path, spec: VAESpec) -> None:
    for world_size in (1, 2):
        fit_on(small_job(data, tmp_path / str(world_size), epochs=2, val_split="val", model=spec), world_size)
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    for name in one[0].keys() - {"step", "epoch", "validation"}:
        np.testing.assert_allclose([row[name] for row in two], [row[name] for row in one], rtol=2e-5, err_msg=name)
    validation = one[-1]["validation"]
    assert validation["loss"] == pytest.approx(-validation["elbo"])
    assert validation["elbo"] == pytest.approx(validation["log_likelihood"] - validation["kl_divergence"])
    assert [row["beta"] for row in one] == [spec.beta_at(row["step"]) for row in one]
    assert one[-1]["log_likelihood"] > one[0]["log_likelihood"]
    found = evaluate_run(str(tmp_path / "1"), data, "val")  # loads what was published
    assert found.elbo == pytest.approx(validation["elbo"], rel=0.1)
    if spec.objective == "iwae":
        assert all(row["loss"] == pytest.approx(-row["iwae"]) for row in one)
        assert one[-1]["iwae"] > one[-1]["elbo"]
    if spec.capacity:
        assert [row["capacity"] for row in one[:3]] == pytest.approx([0.3, 0.6, 0.9])
        assert one[-1]["kl_divergence"] == pytest.approx(6.0, abs=2.0)
    if spec.scale == "learned":
        assert one[-1]["scale"] < 0.95 * one[0]["scale"]


def test_a_killed_run_goes_on_with_its_samples_and_its_capacity(data: str, tmp_path: Path) -> None:
    spec = VAESpec(latent_dim=4, likelihood="bernoulli", num_samples=2, capacity=6.0, capacity_steps=40, beta=10.0)
    options: dict[str, Any] = {"model": spec, "epochs": 1, "every_steps": 15}
    fit(small_job(data, tmp_path / "whole", **options))
    job = small_job(data, tmp_path / "cut", **options)
    pid = os.fork()
    if pid == 0:
        os.environ["AECORE_FAULT"] = "checkpoint.linked:2"
        logging.disable(logging.CRITICAL)
        with contextlib.suppress(BaseException):
            fit(job)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    fit(job)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert published_weights(tmp_path / "cut") == published_weights(tmp_path / "whole")


def test_black_and_white_training_images_are_the_same_on_any_number_of_ranks(data: str, tmp_path: Path) -> None:
    spec = VAESpec(latent_dim=4, likelihood="bernoulli", objective="iwae", num_samples=2)
    for world_size in (1, 2):
        fit_on(
            small_job(data, tmp_path / str(world_size), val_split="val", model=spec, transform=TransformSpec(binarize="dynamic")),
            world_size,
        )
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    np.testing.assert_allclose([row["loss"] for row in two], [row["loss"] for row in one], rtol=2e-5)
    assert two[-1]["validation"]["elbo"] == pytest.approx(one[-1]["validation"]["elbo"], rel=1e-5)
    fit(small_job(data, tmp_path / "grey", val_split="val", model=spec))
    assert losses(tmp_path / "grey")[0]["loss"] != one[0]["loss"]
    assert evaluate_run(str(tmp_path / "1"), data, "val", seed=1) == evaluate_run(str(tmp_path / "1"), data, "val", seed=1)


def arrays_dataset(folder: Path, values: np.ndarray) -> str:
    np.save(folder / "values.npy", values)
    shard_dataset(ArraysSpec(url=str(folder / "values.npy")), str(folder / "data"), SplitSpec(by="none"), ShardSpec())
    return str(folder / "data")


def test_a_run_on_nan_stops_and_says_where(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((64, 6), dtype=np.float32)
    values[40, 3] = np.nan
    data = arrays_dataset(tmp_path, values)
    with pytest.raises(DataError, match=r"sample 'values/000000040' \(ordinal \d+ of split 'train'\) holds NaN .* in 1 of 6 values"):
        fit(small_job(data, tmp_path / "run", model=VAESpec(latent_dim=2), global_batch=16, epochs=2))


@pytest.mark.parametrize(("levels", "fails"), [(8, False), (7, True)])
def test_a_categorical_run_takes_whole_numbers_below_its_levels_and_stops_at_others(tmp_path: Path, levels: int, fails: bool) -> None:
    values = np.tile(np.arange(64, dtype=np.uint8)[:, None] % 8, (1, 6))
    job = small_job(
        arrays_dataset(tmp_path, values),
        tmp_path / "run",
        model=VAESpec(latent_dim=2, likelihood="categorical", num_levels=levels),
        transform=TransformSpec(scale="none"),
        optim=OptimSpec(lr=1e-2),
        global_batch=16,
        epochs=20,
    )
    if fails:  # an outcome that the likelihood does not have is infinitely unlikely
        with pytest.raises(Diverged, match="the loss is inf at step 1"):
            fit(job)
    else:
        fit(job)
        rows = losses(job.out)
        assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
        assert evaluate_run(job.out, job.data, "train").mse < 0.7 * values.var()  # in levels
