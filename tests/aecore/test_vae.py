"""The VAE: the seed's snippets, sampling, the ELBO, its numerics. Legend: B batch, S samples, D latent."""

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Normal, kl_divergence

import aecore.variational
from aecore._base import Batch
from aecore.variational import VAE, VAEDecodeOutput, VAEEncodeOutput, VAEOutput
from aecore.variational.stochastic_layers import FullyFactorizedGaussian

B, S, D = 4, 5, 3


def batch_of(x: Tensor) -> Batch:
    return Batch(x, torch.arange(len(x)), torch.arange(len(x)), len(x))


@pytest.fixture
def x() -> Tensor:
    return torch.rand(B, 1, 2, 6)


@pytest.fixture
def model(x: Tensor) -> VAE:
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh())
    vae = VAE(encoder, nn.Sequential(nn.Linear(D, 12), nn.Unflatten(1, (1, 2, 6))), latent_dim=D)
    vae.build(x)
    return vae


def test_documented_training_and_prior_sampling_snippet() -> None:
    encoder_nn, decoder_nn, latent_dim, n_samples = nn.Linear(12, 8), nn.Linear(64, 12), 64, 7
    x_batch = torch.rand(2, 12)

    model = VAE(encoder=encoder_nn, decoder=decoder_nn, latent_dim=64)
    model.build(x_batch)
    output = model(x_batch, S=5)
    loss_result = model.compute_loss(x_batch, output, beta=1.0, likelihood="gaussian")
    loss_result.objective.backward()
    with torch.no_grad():
        z_prior = torch.randn(n_samples, latent_dim)
        x_samples = model.decoder(z_prior)

    assert output.z.shape == (2, 5, 64)
    assert x_samples.shape == (7, 12)
    assert list(loss_result.diagnostics) == ["elbo", "log_likelihood", "kl_divergence"]
    assert all(isinstance(value, float) for value in loss_result.diagnostics.values())


@pytest.mark.parametrize("num_samples", [1, S])
@pytest.mark.parametrize("training", [True, False])
def test_the_sample_axis_is_always_there(model: VAE, x: Tensor, training: bool, num_samples: int) -> None:
    output = model.train(training)(x, S=num_samples)
    assert isinstance(output, VAEOutput)
    shapes = {name: getattr(output, name).shape for name in ("x_hat", "z", "mu", "log_var")}
    assert shapes == {"x_hat": (B, num_samples, 1, 2, 6), "z": (B, num_samples, D), "mu": (B, D), "log_var": (B, D)}
    encoded = model.encode(x, S=num_samples)
    assert isinstance(encoded, VAEEncodeOutput)
    assert isinstance(model.decode(encoded.z), VAEDecodeOutput)
    assert model.decode(encoded.z).x_hat.shape == output.x_hat.shape


@pytest.mark.parametrize("call", [VAE.__call__, VAE.encode])
def test_sampling_follows_the_mode_unless_told(model: VAE, x: Tensor, call: object) -> None:
    def sampled(training: bool, **kwargs: bool) -> bool:
        model.train(training)
        output = call(model, x, S=S, **kwargs)  # type: ignore[operator]  # one of two methods
        at_mean = torch.equal(output.z, output.mu.unsqueeze(1).expand(-1, S, -1))
        return not at_mean

    assert sampled(True)
    assert not sampled(False)
    assert not sampled(True, sample=False)
    assert sampled(False, sample=True)


def test_a_seed_reproduces_and_noise_can_be_given(model: VAE, x: Tensor) -> None:
    torch.manual_seed(3)
    z = model(x, S=S).z
    torch.manual_seed(3)
    eps = torch.randn_like(z)
    output = model(x, S=S, eps=eps)
    torch.testing.assert_close(output.z, z)
    torch.testing.assert_close(output.z, output.mu.unsqueeze(1) + (0.5 * output.log_var).exp().unsqueeze(1) * eps)


def test_samples_have_the_mean_and_spread_of_the_posterior() -> None:
    layer = FullyFactorizedGaussian(2)
    mu, log_var = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.0, -2.0]])
    torch.manual_seed(0)
    z = layer.reparametrize(mu, log_var, S=40_000)[0]
    torch.testing.assert_close(z.mean(0), mu[0], atol=0.03, rtol=0)
    torch.testing.assert_close(z.std(0), (log_var[0] / 2).exp(), atol=0.03, rtol=0)


def test_gradients_reach_mean_and_variance_through_the_samples() -> None:
    layer, mu, log_var = FullyFactorizedGaussian(2), torch.zeros(1, 2, requires_grad=True), torch.zeros(1, 2, requires_grad=True)
    eps = torch.tensor([[[1.0, -3.0]]])
    layer._reparametrize(mu, log_var, eps=eps).sum().backward()
    torch.testing.assert_close(mu.grad, torch.ones(1, 2))
    torch.testing.assert_close(log_var.grad, 0.5 * eps[0])


def test_wrong_sampling_arguments_are_refused(model: VAE, x: Tensor) -> None:
    for sample in (True, False):
        with pytest.raises(ValueError, match="S must be >= 1, got 0"):
            model(x, S=0, sample=sample)
    with pytest.raises(ValueError, match=r"eps must have the shape \[B, S, D\] = \(4, 2, 3\), got \(4, 3\)"):
        model(x, S=2, eps=torch.zeros(B, D))
    with pytest.raises(ValueError, match="latent_dim"):
        FullyFactorizedGaussian(0)


def test_an_encoder_that_does_not_flatten_is_told_so() -> None:
    with pytest.raises(ValueError, match=r"\[B, F\].*\(2, 1, 4\).*nn.Flatten"):
        VAE(nn.Linear(6, 4), nn.Linear(2, 6), latent_dim=2).build(torch.zeros(2, 1, 6))


@pytest.mark.parametrize("shape", [(B, D), (B, S, D + 1), (1, B, S, D)])
def test_decode_takes_latents_with_a_sample_axis_only(model: VAE, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"unsqueeze\(1\)"):
        model.decode(torch.zeros(shape))


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_loss_is_the_negative_elbo_of_torch_distributions(model: VAE, x: Tensor, likelihood: str) -> None:
    output = model(x, S=S)
    if likelihood == "bernoulli":
        log_px = Bernoulli(logits=output.x_hat, validate_args=False).log_prob(x.unsqueeze(1))
    else:
        log_px = Normal(output.x_hat, 1.0).log_prob(x.unsqueeze(1)) - Normal(0.0, 1.0).log_prob(torch.tensor(0.0))
    log_px = log_px.flatten(2).sum(-1).mean(1).mean()
    kl = kl_divergence(Normal(output.mu, (output.log_var / 2).exp()), Normal(0.0, 1.0)).sum(-1).mean()
    result = model.compute_loss(x, output, beta=3.0, likelihood=likelihood)
    torch.testing.assert_close(result.objective, 3 * kl - log_px)
    expected = {"elbo": (log_px - 3 * kl).item(), "log_likelihood": log_px.item(), "kl_divergence": kl.item()}
    assert dict(result.diagnostics) == pytest.approx(expected, rel=1e-5)
    assert model.compute_loss(x, output, likelihood=likelihood).objective.item() == pytest.approx((kl - log_px).item(), rel=1e-5)


def test_beta_may_be_a_tensor(model: VAE, x: Tensor) -> None:
    output = model(x)
    assert torch.equal(model.compute_loss(x, output, torch.tensor(4.0)).objective, model.compute_loss(x, output, 4.0).objective)


def test_loss_refuses_a_reconstruction_without_sample_axis(model: VAE, x: Tensor) -> None:
    output = model(x)
    output.x_hat = output.x_hat.squeeze(1)
    with pytest.raises(ValueError, match=r"\[4, S, 1, 2, 6\]"):
        model.compute_loss(x, output)


def test_training_loss_is_sampled_in_evaluation_mode_too(model: VAE, x: Tensor) -> None:
    eps = torch.randn(B, *model.noise_shape(2))
    output = model.eval()(x, S=2, sample=True, eps=eps)
    expected = model.compute_loss(x, output, 2.0, "bernoulli").objective
    assert torch.equal(model.loss(batch_of(x), eps=eps, beta=2.0, likelihood="bernoulli").objective, expected)
    assert not torch.equal(model.loss(batch_of(x)).objective, model.loss(batch_of(x)).objective)


def test_latents_and_reconstructions_are_those_of_the_mean(model: VAE, x: Tensor) -> None:
    output, batch = model.eval()(x), batch_of(x)
    model.train()
    torch.testing.assert_close(model.latents(batch), {"mu": output.mu.detach(), "log_var": output.log_var.detach()})
    torch.testing.assert_close(model.reconstruct(batch, likelihood="bernoulli"), output.x_hat.detach().sigmoid().squeeze(1))


def test_log_variance_is_clamped_where_its_exponential_stays_finite(model: VAE, x: Tensor) -> None:
    for bias, limit in ((1e6, 20.0), (-1e6, -30.0)):
        nn.init.constant_(model.sampling_layer.log_var.bias, bias)
        output = model(x)
        assert (output.log_var == limit).all()
        assert model.compute_loss(x, output).objective.isfinite()


def test_heads_and_samples_stay_float32_under_autocast(model: VAE, x: Tensor) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(x)
        loss = model.compute_loss(x, output)
    assert (output.x_hat.dtype, output.z.dtype, output.mu.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert loss.objective.dtype == torch.float32
    features = model.encoder(x).bfloat16()
    torch.testing.assert_close(model.sampling_layer.get_params(features)[0], model.sampling_layer.mu(features.float()))


def test_gradient_of_the_loss_is_exact_in_float64(model: VAE, x: Tensor) -> None:
    model.double()
    eps, parameters = torch.randn(B, 2, D).double(), list(model.parameters())

    def objective(*_: Tensor) -> Tensor:
        return model.loss(batch_of(x.double()), eps=eps, beta=0.7, likelihood="bernoulli").objective

    assert torch.autograd.gradcheck(objective, parameters)


def test_state_dict_has_the_documented_parameter_names(model: VAE) -> None:
    heads = {"sampling_layer.mu.weight", "sampling_layer.mu.bias", "sampling_layer.log_var.weight", "sampling_layer.log_var.bias"}
    assert {name for name in model.state_dict() if not name.startswith(("encoder.", "decoder."))} == heads


def test_the_sampling_layer_is_public_in_one_place_only() -> None:
    assert "FullyFactorizedGaussian" not in vars(aecore.variational)
    assert (
        repr(model_output := VAEDecodeOutput(torch.zeros(1, 1, 2))) == "VAEDecodeOutput(x_hat=Tensor(shape=(1, 1, 2), dtype=torch.float32))"
    )
    assert not hasattr(model_output, "__dict__")
