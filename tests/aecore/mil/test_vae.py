"""The VAE of instances: shapes, closed forms, exact log p(x) of a linear Gaussian model, options that are honoured."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

from aecore.mil import VariationalAutoEncoder

B, F, D, S = 5, 12, 4, 3
MODES = pytest.mark.parametrize("covar_mode", ["single", "diagonal"])


@pytest.fixture(autouse=True)
def _a_fixed_seed():
    torch.manual_seed(0)


def small(covar_mode: str = "diagonal", **options) -> VariationalAutoEncoder:
    return VariationalAutoEncoder(**{"input_shape": (F,), "layer_sizes": [8, D], "covar_mode": covar_mode, **options})


@MODES
def test_shapes_are_those_of_the_documentation(covar_mode):
    model, x = small(covar_mode), torch.randn(B, F)
    scales = {"single": (1, 1), "diagonal": (D, F)}[covar_mode]
    mean, log_std = model.get_raw_output_enc(x)
    assert (mean.shape, log_std.shape) == ((B, D), (B, scales[0]))
    assert model.get_reparameterized_samples(mean, log_std, S).shape == (B, S, D)
    recon, log_scale = model.get_raw_output_dec(mean)
    assert (recon.shape, log_scale.shape) == ((B, F), (B, scales[1]))
    assert model(x).shape == (B, 1, D)
    for call in (model, model.get_posterior_samples):
        assert [part.shape for part in call(x, n_samples=S, return_mean_logstd=True)] == [(B, S, D), (B, D), (B, D)]
    assert model.complete_forward_samples(x).shape == model.complete_forward_samples(x, n_samples=S).shape == (B, F)
    assert model.log_marginal_likelihood_importance_sampling(x, n_samples=7).shape == (B,)
    loss, samples = model.compute_loss(x, n_samples=S, return_samples=True)
    assert samples.shape == (B * S, D)
    assert list(loss) == ["VaeELL", "VaeKL"]
    assert all(value.shape == () for value in loss.values())
    assert all(value.shape == (B,) for value in model.compute_loss(x, reduction="none").values())


@MODES
def test_densities_and_divergences_are_those_of_torch_distributions(covar_mode):
    model, x = small(covar_mode), torch.randn(B, F)
    mean, log_std = model.get_raw_output_enc(x)
    q = Independent(Normal(mean, log_std.exp().expand_as(mean)), 1)
    prior = Independent(Normal(torch.zeros(D), torch.ones(D)), 1)
    torch.testing.assert_close(model._kl_prior(mean, log_std), kl_divergence(q, prior))
    recon, log_scale = model.get_raw_output_dec(mean)
    expected = Independent(Normal(recon, log_scale.exp().expand_as(recon)), 1).log_prob(x)
    torch.testing.assert_close(model._diagonal_log_gaussian_pdf(x, recon, log_scale), expected)


@MODES
def test_the_loss_is_the_negative_elbo_and_its_reductions_agree(covar_mode):
    model, x, losses = small(covar_mode), torch.randn(B, F), {}
    for reduction in ("none", "sum", "mean"):
        torch.manual_seed(1)
        losses[reduction], samples = model.compute_loss(x, reduction, S, True)
    recon, log_scale = model.get_raw_output_dec(samples)
    log_px = Independent(Normal(recon, log_scale.exp().expand_as(recon)), 1).log_prob(x.repeat_interleave(S, 0))
    torch.testing.assert_close(losses["none"]["VaeELL"], -log_px.reshape(B, S).mean(1))
    for name, values in losses["none"].items():
        torch.testing.assert_close(losses["sum"][name], values.sum())
        torch.testing.assert_close(losses["mean"][name], values.mean())


def test_latents_of_an_instance_lie_side_by_side():
    model, x = small(), 10 * torch.randn(B, F)
    with torch.no_grad():
        model.encoder.net[2].weight[D:] = 0.0
        model.encoder.net[2].bias[D:] = -12.0  # hardly any noise: a sample is the mean of its instance
    mean, _ = model.get_raw_output_enc(x)
    _, samples = model.compute_loss(x, n_samples=S, return_samples=True)
    torch.testing.assert_close(samples, mean.repeat_interleave(S, 0), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(model(x, S), mean.unsqueeze(1).expand(-1, S, -1), atol=1e-3, rtol=1e-3)


def test_samples_have_the_mean_and_the_scale_that_were_asked_for():
    model, mean, log_std = small(), torch.tensor([[1.0, -2.0, 0.0, 3.0]]), torch.tensor([[0.0, 1.0, -1.0, -3.0]])
    drawn = model.get_reparameterized_samples(mean, log_std, 50_000)[0]
    torch.testing.assert_close(drawn.mean(0), mean[0], atol=0.06, rtol=0)
    torch.testing.assert_close(drawn.std(0), log_std[0].exp(), atol=0, rtol=0.02)
    single = model.get_reparameterized_samples(mean, torch.tensor([[-3.0]]), 50_000)[0]
    torch.testing.assert_close(single.std(0), torch.full((D,), math.exp(-3)), atol=0, rtol=0.02)


def test_inputs_of_several_axes_come_back_in_their_shape():
    model, x = small(input_shape=(3, 2, 2)), torch.randn(B, 3, 2, 2)
    assert model.complete_forward_samples(x).shape == (B, 3, 2, 2)
    assert model.get_raw_output_dec(torch.zeros(B, D))[0].shape == (B, 12)
    assert model(x, S).shape == (B, S, D)
    flat = small()
    flat.load_state_dict(model.state_dict())
    for reduction in ("mean", "none"):
        torch.manual_seed(2)
        ours = model.compute_loss(x, reduction)
        torch.manual_seed(2)
        assert all(torch.equal(ours[name], value) for name, value in flat.compute_loss(x.flatten(1), reduction).items())


@pytest.mark.parametrize(("name", "layer"), [("None", nn.Identity), ("relu", nn.ReLU), ("tanh", nn.Tanh), ("silu", nn.SiLU)])
def test_activations_are_those_that_were_asked_for(name, layer):
    model, x = small(layer_sizes=[8, 6, D], activations=["tanh", name, "None"]), torch.randn(B, F)
    first, second, last = (model.encoder.net[place] for place in (0, 2, 4))
    torch.testing.assert_close(model.encoder(x), last(layer()(second(torch.tanh(first(x))))))
    z = torch.randn(B, D)
    first, second, last = (model.decoder.net[place] for place in (0, 2, 4))
    torch.testing.assert_close(model.decoder(z), last(torch.tanh(second(layer()(first(z))))), msg="the decoder mirrors the encoder")


def test_the_activation_of_the_last_layer_acts_on_its_output():
    model = small(activations=["relu", "sigmoid"])
    mean, log_std = model.get_raw_output_enc(100 * torch.randn(B, F))
    assert ((mean >= 0) & (mean <= 1) & (log_std >= 0) & (log_std <= 1 + 1e-6)).all()
    assert model.get_raw_output_dec(100 * torch.randn(B, D))[0].abs().max() > 1, "the decoder's last layer has none"


def test_without_activations_the_model_is_linear():
    model = small(activations=["None", "None"])
    x = torch.randn(B, F)
    torch.testing.assert_close(model.encoder(2 * x) - model.encoder(x), model.encoder(x) - model.encoder(0 * x), atol=1e-5, rtol=1e-4)


@MODES
def test_jitter_is_added_to_log_sigma(covar_mode):
    plain, shifted, x = small(covar_mode, jitter=0.0), small(covar_mode, jitter=0.25), torch.randn(B, F)
    shifted.load_state_dict(plain.state_dict())
    torch.testing.assert_close(shifted.get_raw_output_enc(x)[1], plain.get_raw_output_enc(x)[1] + 0.25)
    torch.testing.assert_close(shifted.get_raw_output_dec(torch.zeros(1, D))[1], plain.get_raw_output_dec(torch.zeros(1, D))[1] + 0.25)
    assert torch.equal(shifted.get_raw_output_enc(x)[0], plain.get_raw_output_enc(x)[0])


# ------------------------------------------------------------------------------------------------ log p(x) by importance sampling


def linear_gaussian(exact_posterior: bool, wrong: float = 0.0) -> tuple[VariationalAutoEncoder, MultivariateNormal]:
    """Return a float64 model x = A z + b + s e and its p(x) = N(b, A A^T + s^2 I); A^T A is diagonal, so q can be the exact posterior."""
    F, D, s = 6, 3, 0.5
    A = torch.linalg.qr(torch.randn(F, D, dtype=torch.float64))[0] * torch.tensor([1.5, 1.0, 0.5], dtype=torch.float64)
    b = torch.randn(F, dtype=torch.float64)
    model = VariationalAutoEncoder((F,), [D], ["None"], "diagonal", jitter=0.0).double()
    precision = (A.T @ A).diagonal() / s**2 + 1
    with torch.no_grad():
        decoder, encoder = model.decoder.net[0], model.encoder.net[0]
        decoder.weight.copy_(torch.cat([A, torch.zeros_like(A)]))
        decoder.bias.copy_(torch.cat([b, torch.full((F,), math.log(s), dtype=torch.float64)]))
        gain = (A / s**2 / precision).T
        encoder.weight.copy_(torch.cat([gain, torch.zeros_like(gain)]))
        encoder.bias.copy_(torch.cat([-gain @ b, -0.5 * precision.log()]))
        if not exact_posterior:
            encoder.bias.add_(wrong)
    return model, MultivariateNormal(b, A @ A.T + s**2 * torch.eye(F, dtype=torch.float64))


def test_importance_sampling_is_exact_and_has_no_variance_where_q_is_the_posterior():
    model, exact = linear_gaussian(True)
    x = exact.sample((20,))
    for num_samples in (1, 2, 50):
        found = model.log_marginal_likelihood_importance_sampling(x, num_samples)
        torch.testing.assert_close(found, exact.log_prob(x), atol=1e-9, rtol=0)


def test_importance_sampling_comes_within_two_hundredths_of_a_nat_of_the_exact_log_likelihood():
    model, exact = linear_gaussian(False, wrong=0.2)
    x = exact.sample((20,))
    truth = exact.log_prob(x)
    found = model.log_marginal_likelihood_importance_sampling(x, 20_000)
    assert found.dtype == torch.float64
    assert (found - truth).abs().max() <= 0.02
    one = torch.stack([model.log_marginal_likelihood_importance_sampling(x, 1) for _ in range(200)])
    assert (one.mean(0) < truth).all(), "one sample gives the ELBO, which is a lower bound"


def test_the_prior_is_a_unit_gaussian_and_the_estimate_is_not_above_the_exact_value_by_more_than_its_error():
    model, exact = linear_gaussian(False, wrong=0.3)
    x = exact.sample((8,))
    weights = torch.stack([model.log_marginal_likelihood_importance_sampling(x, 1) for _ in range(4000)]).sub(exact.log_prob(x)).exp()
    error = weights.std(0) / math.sqrt(len(weights))
    assert ((weights.mean(0) - 1).abs() < 5 * error).all(), "weights are unbiased: their mean is p(x)"


def test_a_float32_model_gives_the_same_up_to_its_own_rounding():
    model, exact = linear_gaussian(True)
    x = exact.sample((20,)).float()
    found = model.float().log_marginal_likelihood_importance_sampling(x, 100)
    torch.testing.assert_close(found, exact.log_prob(x.double()), atol=1e-4, rtol=0)


def test_memory_of_importance_sampling_does_not_grow_with_the_number_of_samples(monkeypatch):
    from aecore.mil import _vae

    monkeypatch.setattr(_vae, "CHUNK_VALUES", 1000)
    model, x, rows = small(), torch.randn(B, F), []
    model.decoder.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    model.log_marginal_likelihood_importance_sampling(x, 100)
    assert (sum(rows), max(rows)) == (B * 100, B * (1000 // (F * B)))


# ------------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activations": ["relu"]}, "activations has 1 names .relu., layer_sizes has 2 sizes: give one activation per layer"),
        ({"activations": ["rleu", "None"]}, "unknown activation 'rleu' .did you mean 'relu'"),
        ({"activations": ["relu", None]}, "unknown activation None"),
        ({"covar_mode": "diag"}, "covar_mode is 'diag' .did you mean 'diagonal'"),
        ({"layer_sizes": [], "activations": []}, "layer_sizes is .., expected widths of at least 1"),
        ({"layer_sizes": [8, 0]}, "layer_sizes is .8, 0., expected widths"),
        ({"input_shape": ()}, "input_shape is .., expected the shape of one instance"),
        ({"jitter": -1.0}, "jitter is -1.0, expected a finite number from 0"),
        ({"jitter": math.nan}, "jitter is nan"),
    ],
)
def test_impossible_models_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_wrong_shapes_and_choices_are_refused_with_what_was_expected():
    model, x = small(), torch.randn(B, F)
    for call in (model, model.get_raw_output_enc, model.compute_loss, model.complete_forward_samples):
        with pytest.raises(ValueError, match=r"X must have the shape \[B, \*input_shape\] = \[B, 12\], got \(5, 11\)"):
            call(x[:, 1:])
    with pytest.raises(ValueError, match=r"= \[B, 12\], got \(2, 5, 12\)"):
        model(torch.zeros(2, 5, 12))
    with pytest.raises(ValueError, match=r"samples must have the shape \[N, latent_dim\] = \[N, 4\], got \(5, 3, 4\)"):
        model.get_raw_output_dec(torch.zeros(5, 3, 4))
    for call in (model, model.compute_loss, model.log_marginal_likelihood_importance_sampling, model.complete_forward_samples):
        with pytest.raises(ValueError, match="n_samples is 0, expected at least 1"):
            call(x, n_samples=0)
    with pytest.raises(ValueError, match="reduction is 'summ' .did you mean 'sum'"):
        model.compute_loss(x, reduction="summ")
