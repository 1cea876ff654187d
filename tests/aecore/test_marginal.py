"""Importance-sampled log p(x) against the linear-Gaussian VAE, where it is known: log N(x; b, A A^T + s^2 I). Legend: n rows, K samples."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, MultivariateNormal, Normal

from aecore._base import Batch
from aecore.errors import ConfigError
from aecore.vanilla import AE
from aecore.variational import VAE, AdaGVAE
from aecore.variational.bound import VariationalObjective
from aecore.variational.marginal import BLOCK, log_elbo, log_marginal

N, FEATURES, LATENT, SCALE = 24, 6, 3, 0.6


def batch_of(x: Tensor) -> Batch:
    rows = torch.arange(len(x))
    return Batch(x, rows, rows, len(x))


def linear_gaussian(spread: float = 1.0, shift: float = 0.0) -> tuple[VAE, Tensor, Tensor]:
    """A VAE with x = A z + b + s * noise, whose columns of A are orthogonal so that the exact posterior is factorised; with A and b.

    `spread` times the exact standard deviation and `shift` off the exact mean make the posterior a wrong one.
    """
    generator = torch.Generator().manual_seed(5)
    basis = torch.linalg.qr(torch.randn(FEATURES, LATENT, generator=generator)).Q
    weight, bias = basis * torch.tensor([2.0, 1.0, 0.3]), torch.randn(FEATURES, generator=generator)
    model = VAE(nn.Identity(), nn.Linear(LATENT, FEATURES), LATENT, VariationalObjective(scale=SCALE))
    model.build(torch.zeros(1, FEATURES))
    variance = 1 / (1 + weight.square().sum(0) / SCALE**2)
    to_mean = variance.unsqueeze(1) * weight.T / SCALE**2
    heads = model.sampling_layer
    with torch.no_grad():
        model.decoder.weight.copy_(weight)
        model.decoder.bias.copy_(bias)
        heads.mu.weight.copy_(to_mean)
        heads.mu.bias.copy_(shift - to_mean @ bias)
        heads.log_var.weight.zero_()
        heads.log_var.bias.copy_(variance.log() + 2 * math.log(spread))
    return model.eval(), weight, bias


def drawn_and_exact(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Samples of the model's own p(x) and their log densities."""
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(N, LATENT, generator=generator) @ weight.T + bias + SCALE * torch.randn(N, FEATURES, generator=generator)
    covariance = weight.double() @ weight.double().T + SCALE**2 * torch.eye(FEATURES, dtype=torch.float64)
    return x, MultivariateNormal(bias.double(), covariance).log_prob(x.double())


def test_it_is_exact_within_two_hundredths_of_a_nat_at_20000_samples_and_not_above() -> None:
    model, weight, bias = linear_gaussian(spread=1.3, shift=0.2)
    x, exact = drawn_and_exact(weight, bias)
    num_samples = 20_000
    found = log_marginal(model, batch_of(x), num_samples=num_samples)
    assert found.dtype == torch.float64
    assert (found - exact).abs().max() < 0.02
    generator = torch.Generator().manual_seed(7)
    weights = model.log_weights(batch_of(x), torch.randn(N, 4_000, LATENT, generator=generator))
    relative = (weights - weights.logsumexp(1, keepdim=True) + math.log(weights.shape[1])).exp().std(1)
    assert (found < exact + 5 * relative / math.sqrt(num_samples)).all()
    assert (found.mean() - exact.mean()) < 3 * relative.mean() / math.sqrt(num_samples * N)


def test_the_exact_posterior_has_no_variance_at_all() -> None:
    model, weight, bias = linear_gaussian()
    x, exact = drawn_and_exact(weight, bias)
    for num_samples in (1, 2, BLOCK + 1):
        for seed in (0, 1):
            found = log_marginal(model, batch_of(x), num_samples=num_samples, seed=seed)
            torch.testing.assert_close(found, exact, atol=2e-5, rtol=0)
    model.double()
    torch.testing.assert_close(log_marginal(model, batch_of(x.double()), num_samples=3), exact, atol=2e-6, rtol=0)


def test_the_bound_rises_with_the_number_of_samples_and_ends_at_log_p() -> None:
    model, weight, bias = linear_gaussian(spread=1.3, shift=0.3)
    x, exact = drawn_and_exact(weight, bias)
    means = [float(log_marginal(model, batch_of(x), num_samples=k, seed=1).mean()) for k in (1, 5, 50, 2_000)]
    assert means == sorted(means)
    assert means[0] < exact.mean() - 0.1
    assert means[-1] == pytest.approx(float(exact.mean()), abs=0.02)


def test_the_elbo_of_each_row_is_its_closed_form_and_never_above_the_bound() -> None:
    model, weight, bias = linear_gaussian(spread=1.5)
    x, _ = drawn_and_exact(weight, bias)
    batch = batch_of(x)
    q = model.encode(x, sample=False)
    kl = 0.5 * (q.log_var.exp() + q.mu.square() - 1 - q.log_var).sum(1)
    mean = q.mu @ weight.T + bias
    spread = (q.log_var.exp() * weight.square().sum(0)).sum(1) / SCALE**2
    expected = Normal(mean, SCALE).log_prob(x).sum(1) - 0.5 * spread - kl
    found = log_elbo(model, batch, num_samples=5_000)
    torch.testing.assert_close(found, expected.double(), atol=0.1, rtol=0)
    assert (found <= log_marginal(model, batch, num_samples=5_000)).all()
    torch.testing.assert_close(log_elbo(model, batch), log_marginal(model, batch, num_samples=1))


@pytest.mark.parametrize("chunk", [1, 7, 64, 100_000])
def test_chunks_change_nothing_but_rounding(chunk: int) -> None:
    model, weight, bias = linear_gaussian(spread=1.2)
    x, _ = drawn_and_exact(weight, bias)
    whole = log_marginal(model, batch_of(x[:5]), num_samples=BLOCK + 9)
    torch.testing.assert_close(log_marginal(model, batch_of(x[:5]), num_samples=BLOCK + 9, chunk=chunk), whole, atol=1e-5, rtol=0)


def test_rows_have_the_same_noise_on_any_number_of_ranks() -> None:
    model, weight, bias = linear_gaussian(spread=1.2)
    x, _ = drawn_and_exact(weight, bias)
    whole = log_marginal(model, batch_of(x), num_samples=9, seed=3, index=2)
    rows = torch.arange(10, N)
    part = log_marginal(model, Batch(x[10:], rows, rows, N), num_samples=9, seed=3, index=2)
    torch.testing.assert_close(part, whole[10:], atol=1e-5, rtol=0)
    assert not torch.allclose(log_marginal(model, batch_of(x), num_samples=9, seed=3, index=1), whole)
    empty = torch.zeros(0, dtype=torch.int64)  # a rank without a sample: one repeated row, counted 0
    assert log_marginal(model, Batch(x[:1], empty, empty, N), num_samples=2).shape == (1,)


def test_weights_of_images_are_the_densities_of_torch_distributions() -> None:
    torch.manual_seed(0)
    model = VAE(nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh()), nn.Sequential(nn.Linear(2, 12), nn.Unflatten(1, (1, 3, 4))), 2)
    x, eps = torch.randint(0, 2, (5, 1, 3, 4)).float(), torch.randn(5, 4, 2)
    model.build(x)
    found = model.log_weights(batch_of(x), eps, likelihood="bernoulli")
    output = model(x, S=4, sample=True, eps=eps)
    q = Normal(output.mu.unsqueeze(1), (output.log_var / 2).exp().unsqueeze(1))
    log_px = Bernoulli(logits=output.x_hat).log_prob(x.unsqueeze(1).expand_as(output.x_hat)).sum((2, 3, 4))
    expected = log_px + (Normal(0.0, 1.0).log_prob(output.z) - q.log_prob(output.z)).sum(2)
    assert (found.shape, found.dtype, found.requires_grad) == ((5, 4), torch.float64, False)
    torch.testing.assert_close(found, expected.double(), atol=1e-4, rtol=1e-5)


def test_single_inputs_of_an_adagvae_are_those_of_its_vae() -> None:
    model, weight, bias = linear_gaussian(spread=1.2)
    batch = batch_of(drawn_and_exact(weight, bias)[0])
    found = log_marginal(AdaGVAE(model).eval(), batch, num_samples=5)
    assert torch.equal(found, log_marginal(model, batch, num_samples=5))


def test_mistakes_are_named() -> None:
    model, weight, bias = linear_gaussian()
    batch = batch_of(drawn_and_exact(weight, bias)[0])
    with pytest.raises(ValueError, match="num_samples must be >= 1, got 0"):
        log_marginal(model, batch, num_samples=0)
    with pytest.raises(ValueError, match="num_samples must be >= 1, got -3"):
        log_elbo(model, batch, num_samples=-3)
    with pytest.raises(ValueError, match="chunk must be >= 1, got 0"):
        log_marginal(model, batch, num_samples=1, chunk=0)
    with pytest.raises(ValueError, match="'gausian'.*did you mean 'gaussian'"):
        log_marginal(model, batch, num_samples=1, likelihood="gausian")
    with pytest.raises(ValueError, match=r"eps must have the shape \[n, S, D\] = \[24, S, 3\], got \(24, 3\)"):
        model.log_weights(batch, torch.zeros(24, 3))
    with pytest.raises(ConfigError, match="AE has no posterior"):
        log_marginal(AE(nn.Linear(FEATURES, 2), nn.Linear(2, FEATURES)), batch, num_samples=2)


def test_not_finite_inputs_give_a_number_that_is_not_finite_in_their_row_only() -> None:
    model, weight, bias = linear_gaussian()
    x, exact = drawn_and_exact(weight, bias)
    x[3, 2] = torch.nan
    found = log_marginal(model, batch_of(x), num_samples=2)
    assert found.isnan().nonzero().flatten().tolist() == [3]
    torch.testing.assert_close(found[4:], exact[4:], atol=1e-4, rtol=0)
