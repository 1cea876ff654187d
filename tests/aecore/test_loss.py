"""Losses against torch.distributions and closed forms."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Bernoulli, Categorical, Laplace, Normal, kl_divergence

from aecore.loss import (
    LikelihoodType,
    LossResult,
    expected_value,
    kl_divergence_diag_gaussian,
    log_density_diag_gaussian,
    log_likelihood,
    sample_log_likelihood,
)
from aecore.loss.regularizers import capacity, free_bits
from aecore.loss.schedules import beta_at, cyclic_at, linear_at

HALF = (torch.bfloat16, torch.float16)


def test_gaussian_log_likelihood_is_the_unit_normal_without_its_constant() -> None:
    x, x_hat = torch.randn(4, 3, 2), torch.randn(4, 3, 2)
    expected = Normal(x_hat, 1.0).log_prob(x) - Normal(0.0, 1.0).log_prob(torch.tensor(0.0))
    torch.testing.assert_close(log_likelihood(x, x_hat), expected)


def test_bernoulli_log_likelihood_takes_logits() -> None:
    x, logits = torch.rand(4, 5), 5 * torch.randn(4, 5)
    expected = Bernoulli(logits=logits, validate_args=False).log_prob(x)
    torch.testing.assert_close(log_likelihood(x, logits, "bernoulli"), expected)


def test_bernoulli_log_likelihood_is_finite_for_extreme_logits() -> None:
    x, logits = torch.tensor([0.0, 1.0]), torch.tensor([1e4, -1e4])
    torch.testing.assert_close(log_likelihood(x, logits, "bernoulli"), torch.tensor([-1e4, -1e4]))


@pytest.mark.parametrize("name", ["bernoulli", "BERNOULLI", "Bernoulli", LikelihoodType.BERNOULLI])
def test_likelihoods_are_named_in_any_case(name: str) -> None:
    x = torch.rand(3)
    assert torch.equal(log_likelihood(x, x, name), log_likelihood(x, x, LikelihoodType.BERNOULLI))


def test_an_unknown_likelihood_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'poisson'.*known: bernoulli, categorical, gaussian, laplace"):
        log_likelihood(torch.zeros(1), torch.zeros(1), "poisson")
    with pytest.raises(ValueError, match="'Bernouli'.*did you mean 'bernoulli'"):
        expected_value(torch.zeros(1), "Bernouli")


def test_log_likelihood_does_not_broadcast() -> None:
    with pytest.raises(ValueError, match=r"same shape.*\(3, 2\).*\(1, 2\)"):
        log_likelihood(torch.zeros(3, 2), torch.zeros(1, 2))


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, *HALF, torch.float64])
def test_targets_of_other_dtypes_score_like_their_float_values(dtype: torch.dtype, likelihood: str) -> None:
    x, x_hat = torch.randint(0, 2, (6, 4)).to(dtype), torch.randn(6, 4)
    torch.testing.assert_close(log_likelihood(x, x_hat, likelihood).float(), log_likelihood(x.float(), x_hat, likelihood))


@pytest.mark.parametrize("dtype", HALF)
def test_losses_of_half_precision_tensors_are_computed_in_float32(dtype: torch.dtype) -> None:
    mu, log_var = 1e-3 * torch.randn(64, 8).to(dtype), 1e-3 * torch.randn(64, 8).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kl, ll = kl_divergence_diag_gaussian(mu, log_var), log_likelihood(mu, log_var, "bernoulli")
    assert (kl.dtype, ll.dtype) == (torch.float32, torch.float32)
    expected = kl_divergence(Normal(mu.double(), (0.5 * log_var.double()).exp()), Normal(0.0, 1.0)).sum(-1)
    torch.testing.assert_close(kl.double(), expected, rtol=1e-4, atol=1e-10)
    assert (kl > 0).all()


def test_sample_log_likelihood_sums_features_for_every_sample() -> None:
    x, x_hat = torch.rand(2, 3, 4), torch.randn(2, 5, 3, 4)
    expected = torch.stack([log_likelihood(x, x_hat[:, s], "bernoulli").sum((1, 2)) for s in range(5)], dim=1)
    torch.testing.assert_close(sample_log_likelihood(x, x_hat, "bernoulli"), expected)


@pytest.mark.parametrize("shape", [(2, 3), (3, 1, 3), (2, 1, 4), (2, 0, 3), (2, 1, 3, 1)])
def test_sample_log_likelihood_never_infers_the_sample_axis(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\[B, S, \*x.shape\[1:\]\] = \[2, S, 3\]"):
        sample_log_likelihood(torch.zeros(2, 3), torch.zeros(shape))


def test_expected_values_are_the_means_of_the_distributions() -> None:
    x_hat = torch.randn(5)
    torch.testing.assert_close(expected_value(x_hat, "bernoulli"), Bernoulli(logits=x_hat).mean)
    torch.testing.assert_close(expected_value(x_hat), Normal(x_hat, 1.0).mean)
    assert expected_value(x_hat.bfloat16(), "bernoulli").dtype == torch.float32


@pytest.mark.parametrize("scale", [1.0, 0.3, torch.tensor(2.5)])
@pytest.mark.parametrize(("name", "family"), [("gaussian", Normal), ("laplace", Laplace)])
def test_full_densities_of_a_scale_are_those_of_torch_distributions(name: str, family: type, scale: float | torch.Tensor) -> None:
    x, x_hat = torch.randn(4, 3), torch.randn(4, 3)
    full = log_likelihood(x, x_hat, name, scale=scale, full=True)
    torch.testing.assert_close(full, family(x_hat, scale).log_prob(x))
    left_out = family(torch.tensor(0.0), 1.0).log_prob(torch.tensor(0.0))  # depends on nothing, so it is the only part left out
    torch.testing.assert_close(log_likelihood(x, x_hat, name, scale=scale), full - left_out)


def test_the_density_of_a_scale_is_normalised() -> None:
    x = torch.linspace(-60, 60, 240_001, dtype=torch.float64)
    for name in ("gaussian", "laplace"):
        density = log_likelihood(x, torch.full_like(x, 0.7), name, scale=2.0, full=True).exp()
        assert float(torch.trapezoid(density, x)) == pytest.approx(1.0, abs=1e-6)


def test_discrete_likelihoods_have_no_constant_to_add() -> None:
    bits, logits = torch.randint(0, 2, (6,)), torch.randn(6)
    torch.testing.assert_close(log_likelihood(bits, logits, "bernoulli", full=True), Bernoulli(logits=logits).log_prob(bits.float()))
    ids, of_classes = torch.randint(0, 5, (2, 3)), torch.randn(2, 3, 5)
    torch.testing.assert_close(log_likelihood(ids, of_classes, "categorical", full=True), Categorical(logits=of_classes).log_prob(ids))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32, torch.bfloat16])
def test_categorical_takes_class_ids_of_any_dtype(dtype: torch.dtype) -> None:
    ids, logits = torch.randint(0, 7, (2, 4)), torch.randn(2, 3, 4, 7)
    expected = Categorical(logits=logits).log_prob(ids.unsqueeze(1).expand(2, 3, 4)).sum(-1)
    torch.testing.assert_close(sample_log_likelihood(ids.to(dtype), logits, "categorical"), expected)


@pytest.mark.parametrize("impossible", [-1.0, 7.0, 0.5, float("nan")])
def test_what_is_no_class_has_no_probability_and_spoils_nothing_else(impossible: float) -> None:
    x = torch.tensor([3.0, impossible])
    found = log_likelihood(x, torch.zeros(2, 7), "categorical")
    torch.testing.assert_close(found[0], -torch.tensor(7.0).log())
    assert found[1] == -torch.inf


@pytest.mark.parametrize("name", ["gaussian", "laplace", "bernoulli"])
def test_nan_in_the_input_is_seen_in_the_loss(name: str) -> None:
    x = torch.tensor([[0.5, float("nan")]])
    assert sample_log_likelihood(x, torch.zeros(1, 1, 2), name).isnan().all()


@pytest.mark.parametrize("shape", [(2, 1, 3), (2, 3, 7), (2, 0, 3, 7), (2, 1, 4, 7), (3, 1, 3, 7)])
def test_categorical_wants_an_axis_of_logits(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\[2, S, 3, K\].*got.*K logits per element"):
        sample_log_likelihood(torch.zeros(2, 3), torch.zeros(shape), "categorical")
    with pytest.raises(ValueError, match=r"\[\*x.shape, K\]"):
        log_likelihood(torch.zeros(2, 3), torch.zeros(2, 3), "categorical")


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), torch.ones(2)])
def test_a_scale_is_one_positive_number(scale: float | torch.Tensor) -> None:
    with pytest.raises(ValueError, match="scale must be"):
        log_likelihood(torch.zeros(2), torch.zeros(2), "gaussian", scale=scale)


@pytest.mark.parametrize("name", ["bernoulli", "categorical"])
def test_discrete_likelihoods_have_no_scale(name: str) -> None:
    with pytest.raises(ValueError, match=f"the {name} likelihood has no scale, got 0.5"):
        log_likelihood(torch.zeros(2), torch.zeros(2), name, scale=0.5)


def test_gradients_of_all_likelihoods_are_exact() -> None:
    x, ids = torch.rand(2, 3, dtype=torch.float64), torch.tensor([[0, 1, 2], [2, 1, 0]])
    x_hat = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    for name in ("gaussian", "laplace"):
        assert torch.autograd.gradcheck(lambda a, s, name=name: log_likelihood(x, a, name, scale=s), (x_hat, scale))
    assert torch.autograd.gradcheck(lambda a: log_likelihood(x, a, "bernoulli"), x_hat)
    assert torch.autograd.gradcheck(lambda a: log_likelihood(ids, a, "categorical"), logits)


def test_a_sum_in_float64_keeps_the_digits_that_float32_loses() -> None:
    x, x_hat = torch.full((1, 1_000_001), 1e-3), torch.zeros(1, 1, 1_000_001)
    x[0, 0] = 4e3
    exact = -0.5 * (x.double().square()).sum()
    assert sample_log_likelihood(x, x_hat, dtype=torch.float64).item() == pytest.approx(exact.item(), rel=1e-12)
    assert sample_log_likelihood(x, x_hat).dtype == torch.float32


def test_expected_values_of_other_likelihoods() -> None:
    logits = torch.randn(2, 4, 6)
    mean = (Categorical(logits=logits).probs * torch.arange(6.0)).sum(-1)
    torch.testing.assert_close(expected_value(logits.bfloat16().float(), "categorical"), mean, atol=0.05, rtol=0)
    torch.testing.assert_close(expected_value(logits, "categorical"), mean)
    torch.testing.assert_close(expected_value(logits, "laplace"), Laplace(logits, 1.0).mean)


@settings(max_examples=30)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(0, 10_000))
def test_log_densities_equal_torch_distributions(rows: int, samples: int, dim: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, samples, dim, generator=generator, dtype=torch.float64)
    mu, log_var = torch.randn(2, rows, dim, generator=generator, dtype=torch.float64)
    expected = Normal(mu.unsqueeze(1), (log_var / 2).exp().unsqueeze(1)).log_prob(z).sum(-1)
    torch.testing.assert_close(log_density_diag_gaussian(z, mu, log_var), expected)
    torch.testing.assert_close(log_density_diag_gaussian(z), Normal(0.0, 1.0).log_prob(z).sum(-1))


def test_a_log_density_never_broadcasts_a_posterior() -> None:
    with pytest.raises(ValueError, match=r"mu must have the shape \[B, D\] = \(2, 3\)"):
        log_density_diag_gaussian(torch.zeros(2, 5, 3), torch.zeros(1, 3))


floats = st.floats(-8, 8)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(floats, floats, floats, floats), min_size=1, max_size=6))
def test_kl_equals_torch_distributions(rows: list[tuple[float, float, float, float]]) -> None:
    mu_q, log_var_q, mu_p, log_var_p = torch.tensor(rows, dtype=torch.float64).unsqueeze(0).unbind(-1)
    q, p = Normal(mu_q, (log_var_q / 2).exp()), Normal(mu_p, (log_var_p / 2).exp())
    per_dimension = kl_divergence_diag_gaussian(mu_q, log_var_q, mu_p, log_var_p, reduce_sum=False)
    torch.testing.assert_close(per_dimension, kl_divergence(q, p), rtol=1e-6, atol=1e-9)
    prior = Normal(torch.zeros_like(mu_q), torch.ones_like(mu_q))
    torch.testing.assert_close(kl_divergence_diag_gaussian(mu_q, log_var_q), kl_divergence(q, prior).sum(-1), rtol=1e-6, atol=1e-9)


def test_kl_of_a_distribution_with_itself_is_zero_and_never_negative() -> None:
    mu, log_var = 1e-4 * torch.randn(10_000, 1), 1e-4 * torch.randn(10_000, 1)
    assert (kl_divergence_diag_gaussian(mu, log_var) >= 0).all()
    assert not kl_divergence_diag_gaussian(mu, log_var, mu, log_var).any()


def test_kl_is_finite_at_the_limits_of_the_clamped_log_variance() -> None:
    kl = kl_divergence_diag_gaussian(torch.zeros(2, 1), torch.tensor([[-30.0], [20.0]]))
    torch.testing.assert_close(kl, torch.tensor([14.5, 0.5 * (torch.e**20 - 21)]))


def test_a_missing_half_of_the_prior_counts_as_zeros_and_the_prior_broadcasts() -> None:
    mu, log_var, mu_p = torch.randn(3, 2), torch.randn(3, 2), torch.randn(2)
    full = kl_divergence_diag_gaussian(mu, log_var, mu_p.expand(3, 2), torch.zeros(3, 2))
    torch.testing.assert_close(kl_divergence_diag_gaussian(mu, log_var, mu_p), full)


@pytest.mark.parametrize("shapes", [((3, 2), (2, 2)), ((3, 2), (2,)), ((2,), (2,), (3, 2)), ((3, 2), (3, 2), (3, 3))])
def test_kl_refuses_shapes_that_do_not_fit(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match="one shape"):
        kl_divergence_diag_gaussian(*(torch.zeros(shape) for shape in shapes))


def test_diagnostics_are_a_mapping_of_floats_over_detached_tensors() -> None:
    weight = torch.tensor(2.0, requires_grad=True)
    result = LossResult(weight * 3, {"loss": weight * 3, "given": 0.1})
    assert dict(result.diagnostics) == {"loss": 6.0, "given": 0.1}
    assert all(type(value) is float for value in result.diagnostics.values())
    assert not result.tensors["loss"].requires_grad
    assert repr(result.diagnostics) == "{'loss': 6.0, 'given': 0.1}"
    assert repr(result) == "LossResult(objective=Tensor(shape=(), dtype=torch.float32), diagnostics=[loss, given])"
    result.objective.backward()
    assert weight.grad == 3


def test_nothing_is_converted_before_a_value_is_read() -> None:
    meta = torch.zeros((), device="meta")  # has no value: any conversion raises
    result = LossResult(meta, {"elbo": meta, "kl": meta})
    assert list(result.diagnostics) == ["elbo", "kl"]
    assert "elbo" in repr(result)
    with pytest.raises((RuntimeError, NotImplementedError)):
        result.diagnostics["elbo"]


def test_beta_cycles_rise_linearly_and_stay_in_each_cycle() -> None:
    cycle = [1.0, 2.0, 2.0, 2.0]
    assert [cyclic_at(2.0, 4, 2, step) for step in range(13)] == [0.0, *cycle, *cycle, *cycle]
    assert [linear_at(3.0, 0, step) for step in range(3)] == [3.0, 3.0, 3.0]


def test_free_bits_cost_their_minimum_without_a_gradient() -> None:
    kl = torch.tensor([[0.1, 2.0], [0.5, 0.0]], requires_grad=True)
    term = free_bits(kl, 0.5)
    torch.testing.assert_close(term, torch.tensor([2.5, 1.0]))
    term.sum().backward()
    assert kl.grad[0].tolist() == [0.0, 1.0]
    assert kl.grad[1, 1] == 0


def test_capacity_pulls_the_kl_of_each_sample_to_its_target() -> None:
    kl = torch.tensor([[1.0, 2.0], [4.0, 4.0]], requires_grad=True)
    term = capacity(kl, 5.0)
    torch.testing.assert_close(term, torch.tensor([2.0, 3.0]))
    term.sum().backward()
    assert kl.grad.tolist() == [[-1.0, -1.0], [1.0, 1.0]]
    torch.testing.assert_close(capacity(kl, 0.0), kl.sum(1))


def test_beta_rises_linearly_and_stays() -> None:
    assert [beta_at(4.0, 4, step) for step in range(6)] == [0.0, 1.0, 2.0, 3.0, 4.0, 4.0]
    assert beta_at(0.5, 0, 0) == 0.5
