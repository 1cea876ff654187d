"""Losses against torch.distributions and closed forms."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Bernoulli, Normal, kl_divergence

from aecore.loss import LikelihoodType, LossResult, expected_value, kl_divergence_diag_gaussian, log_likelihood, sample_log_likelihood
from aecore.loss.schedules import beta_at

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
    with pytest.raises(ValueError, match="'poisson'.*gaussian, bernoulli"):
        log_likelihood(torch.zeros(1), torch.zeros(1), "poisson")


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


def test_beta_rises_linearly_and_stays() -> None:
    assert [beta_at(4.0, 4, step) for step in range(6)] == [0.0, 1.0, 2.0, 3.0, 4.0, 4.0]
    assert beta_at(0.5, 0, 0) == 0.5
