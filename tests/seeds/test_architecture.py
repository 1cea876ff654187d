"""What the page "Architecture & Design" of PyAutoencoder shows its readers, section by section, with the imports changed."""

import dataclasses
import inspect

import pytest
import torch
from torch import Tensor, nn

from aecore.loss import LossResult
from aecore.variational import AdaGVAE

B, FEATURES = 6, 12


def my_custom_network(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 16), nn.ReLU(), nn.Linear(16, outputs))


@pytest.fixture
def x_batch() -> Tensor:
    return torch.rand(B, FEATURES, generator=torch.Generator().manual_seed(0))


def test_vanilla_autoencoder_training_and_inference(x_batch: Tensor) -> None:
    from aecore.vanilla import AE

    model = AE(encoder=my_custom_network(FEATURES, 4), decoder=my_custom_network(4, FEATURES))
    model.build(x_batch)
    output = model(x_batch)
    loss_result = model.compute_loss(x_batch, output, likelihood="bernoulli")
    loss_result.objective.backward()
    z = model.encode(x_batch).z
    x_reconstructed = model.decode(z).x_hat

    assert [field.name for field in dataclasses.fields(output)] == ["x_hat", "z"]
    torch.testing.assert_close(x_reconstructed, output.x_hat.detach())
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert loss_result.objective.item() == pytest.approx(nn.BCEWithLogitsLoss(reduction="sum")(output.x_hat, x_batch).item() / B)


def test_variational_autoencoder_training_and_prior_sampling(x_batch: Tensor) -> None:
    from aecore.variational import VAE

    n_samples, latent_dim = 9, 64
    model = VAE(encoder=my_custom_network(FEATURES, 20), decoder=my_custom_network(64, FEATURES), latent_dim=64)
    model.build(x_batch)
    output = model(x_batch, S=5)
    loss_result = model.compute_loss(x_batch, output, beta=1.0, likelihood="gaussian")
    loss_result.objective.backward()
    with torch.no_grad():
        z_prior = torch.randn(n_samples, latent_dim)
        x_samples = model.decoder(z_prior)

    assert [field.name for field in dataclasses.fields(output)] == ["x_hat", "z", "mu", "log_var"]
    shapes = [tuple(getattr(output, field.name).shape) for field in dataclasses.fields(output)]
    assert shapes == [(B, 5, FEATURES), (B, 5, 64), (B, 64), (B, 64)]
    assert x_samples.shape == (n_samples, FEATURES)


def test_training_samples_and_evaluation_takes_the_mean(x_batch: Tensor) -> None:
    from aecore.variational import VAE

    model = VAE(encoder=my_custom_network(FEATURES, 20), decoder=my_custom_network(3, FEATURES), latent_dim=3)
    model.build(x_batch)
    model.train()
    assert model(x_batch, S=4).z.std(1).min() > 0
    model.eval()
    first, second = model(x_batch), model(x_batch)
    assert torch.equal(first.x_hat, second.x_hat)
    assert torch.equal(first.z.squeeze(1), first.mu)
    assert first.log_var.shape == (B, 3)


def test_adaptive_group_vae_training_and_inference(x_batch: Tensor) -> None:
    from aecore.variational import VAE, AdaGVAE

    x1_batch, x2_batch = x_batch, x_batch.flip(0)
    vae = VAE(encoder=my_custom_network(FEATURES, 20), decoder=my_custom_network(64, FEATURES), latent_dim=64)
    model = AdaGVAE(vae=vae)
    model.build(x_batch)
    output = model((x1_batch, x2_batch), S=5)
    loss_result = model.compute_loss((x1_batch, x2_batch), output, beta=4.0, likelihood="bernoulli")
    loss_result.objective.backward()
    z = model.vae.encode(x_batch).z
    x_reconstructed = model.vae.decode(z).x_hat

    assert [field.name for field in dataclasses.fields(output)] == ["output1", "output2"]
    assert output.output1.x_hat.shape == (*x_reconstructed.shape[:1], 5, FEATURES)
    terms = ["elbo", "log_likelihood_x1", "log_likelihood_x2", "kl_divergence_x1", "kl_divergence_x2"]
    assert list(loss_result.diagnostics) == terms
    d = loss_result.diagnostics
    expected = d["log_likelihood_x1"] + d["log_likelihood_x2"] - 4.0 * (d["kl_divergence_x1"] + d["kl_divergence_x2"])
    assert loss_result.objective.item() == pytest.approx(-expected, rel=1e-5)


def test_the_shared_dimensions_are_those_below_the_midpoint_of_the_divergences(x_batch: Tensor) -> None:
    from aecore.variational import VAE

    model = AdaGVAE(vae=VAE(encoder=nn.Linear(FEATURES, 8), decoder=nn.Linear(5, FEATURES), latent_dim=5))
    model.build(x_batch)
    pair = (x_batch, x_batch.flip(0))
    q1, q2 = (model.vae.encode(x, sample=False) for x in pair)
    v1, v2 = q1.log_var.exp(), q2.log_var.exp()
    kl = 0.5 * ((v1 + (q1.mu - q2.mu) ** 2) / v2 - 1 - (v1 / v2).log())
    tau = 0.5 * (kl.max(1, keepdim=True).values + kl.min(1, keepdim=True).values)
    output = model(pair)
    shared = output.output1.mu == output.output2.mu
    assert torch.equal(shared, kl < tau)


def test_losses_and_their_diagnostics(x_batch: Tensor) -> None:
    from aecore.variational import VAE

    model = VAE(encoder=my_custom_network(FEATURES, 20), decoder=my_custom_network(3, FEATURES), latent_dim=3)
    model.build(x_batch)
    output = model(x_batch, S=5)
    logged = {}
    loss_result = model.compute_loss(x_batch, output)
    loss_result.objective.backward()
    for name, val in loss_result.diagnostics.items():
        logged[name] = val

    assert isinstance(loss_result, LossResult)
    assert loss_result.objective.shape == ()
    assert all(type(val) is float for val in logged.values())
    reconstruction = (-0.5 * (x_batch.unsqueeze(1) - output.x_hat) ** 2).sum(2).mean()
    kl = (0.5 * (output.log_var.exp() + output.mu**2 - 1 - output.log_var)).sum(1).mean()
    for beta in (0.5, 1.0, 4.0):
        result = model.compute_loss(x_batch, output, beta=beta)
        torch.testing.assert_close(result.objective, -(reconstruction - beta * kl))
        assert result.diagnostics["elbo"] == pytest.approx(-result.objective.item())
    assert logged["kl_divergence"] == pytest.approx(kl.item(), rel=1e-5)


def test_all_architectures_follow_the_same_pattern() -> None:
    from aecore._base.base import BaseAutoencoder
    from aecore.vanilla import AE
    from aecore.variational import VAE

    for model in (AE, VAE, AdaGVAE):
        assert issubclass(model, BaseAutoencoder)
        assert list(inspect.signature(model.compute_loss).parameters)[2] == "output"
        for name in ("build", "encode", "decode", "compute_loss", "load_state_dict"):
            assert callable(getattr(model, name))
