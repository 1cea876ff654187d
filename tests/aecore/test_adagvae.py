"""AdaGVAE: the documented snippets, what is shared and how it is averaged, its numerics. Legend: B batch, S samples, D latent."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from aecore._base import BaseAutoencoder, Batch
from aecore.checkpoint.weights import load_model, weights_of
from aecore.nn.mlp import MLPSpec
from aecore.registry import MODELS
from aecore.variational import VAE, AdaGVAE, AdaGVAEOutput, AdaGVAESpec, VAEOutput
from tests.aecore.encoding import SHAPE, model_config, saved_run

B, S, D = 6, 5, 4


def make(averaging: str = "gvae", divergence: str = "kl") -> AdaGVAE:
    vae = VAE(nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh()), nn.Linear(D, 12), latent_dim=D)
    model = AdaGVAE(vae, averaging, divergence)
    model.build(torch.zeros(1, 12))
    with torch.no_grad():  # posteriors far from each other, of different widths
        vae.sampling_layer.mu.weight.mul_(4)
        vae.sampling_layer.log_var.weight.mul_(4)
    return model


@pytest.fixture
def model() -> AdaGVAE:
    torch.manual_seed(0)
    return make()


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.rand(B, 12), torch.rand(B, 12)


def batch_of(x: Tensor, x2: Tensor | None = None) -> Batch:
    return Batch(x, torch.arange(len(x)), torch.arange(len(x)), len(x), x_pair=x2)


def test_documented_training_and_inference_snippets() -> None:
    encoder_nn, decoder_nn = nn.Linear(12, 8), nn.Linear(64, 12)
    x1_batch, x2_batch, sample_input = torch.rand(2, 12), torch.rand(2, 12), torch.rand(2, 12)
    x = x1_batch

    vae = VAE(encoder=encoder_nn, decoder=decoder_nn, latent_dim=64)
    model = AdaGVAE(vae=vae)
    model.build(sample_input)
    output = model((x1_batch, x2_batch), S=5)
    loss_result = model.compute_loss((x1_batch, x2_batch), output, beta=4.0, likelihood="bernoulli")
    loss_result.objective.backward()
    z = model.vae.encode(x).z
    x_reconstructed = model.vae.decode(z).x_hat

    assert isinstance(output, AdaGVAEOutput)
    assert isinstance(output.output1, VAEOutput)
    assert output.output2.x_hat.shape == (2, 5, 12)
    assert x_reconstructed.shape == (2, 1, 12)
    logged = {name: val for name, val in loss_result.diagnostics.items()}  # noqa: C416  # as documented
    assert list(logged) == ["elbo", "log_likelihood_x1", "log_likelihood_x2", "kl_divergence_x1", "kl_divergence_x2"]
    assert all(isinstance(value, float) for value in logged.values())
    assert "output1=VAEOutput(x_hat=Tensor(shape=(2, 5, 12)" in repr(output)


def test_it_is_an_autoencoder_that_encodes_and_decodes_by_its_vae(model: AdaGVAE, pair: tuple[Tensor, Tensor]) -> None:
    assert isinstance(model, BaseAutoencoder)
    model.eval()
    z = model.encode(pair[0], S=3).z
    assert torch.equal(z, model.vae.encode(pair[0], S=3).z)
    assert torch.equal(model.decode(z).x_hat, model.vae.decode(z).x_hat)
    assert all(name.startswith("vae.") for name in model.state_dict())
    assert {name.removeprefix("vae.") for name in model.state_dict()} == set(model.vae.state_dict())


@pytest.mark.parametrize("sample", [torch.zeros(2, 12), (torch.zeros(2, 12), torch.zeros(2, 12))], ids=["one", "pair"])
def test_build_takes_one_input_or_a_pair_and_restores_the_modes(sample: object) -> None:
    model = AdaGVAE(VAE(nn.LazyLinear(8), nn.LazyLinear(12), latent_dim=D))
    model.vae.decoder.eval()
    model.build(sample)
    assert not any(isinstance(parameter, nn.UninitializedParameter) for parameter in model.parameters())
    assert [model.training, model.vae.training, model.vae.decoder.training] == [True, True, False]


def slow_adapt(model: AdaGVAE, pair: tuple[Tensor, Tensor]) -> list[list[list[tuple[float, float]]]]:
    """Mean and standard deviation per view, row and dimension, one number at a time, with torch.distributions in float64."""
    views = [[parameter.double() for parameter in model.vae.sampling_layer.get_params(model.vae.encoder(x))] for x in pair]
    found: list[list[list[tuple[float, float]]]] = [[], []]
    for row in range(len(pair[0])):
        q = [[Normal(mu[row, d], (log_var[row, d] / 2).exp()) for d in range(D)] for mu, log_var in views]
        delta = [float(kl_divergence(q[0][d], q[1][d])) for d in range(D)]
        if model.divergence == "symmetric":
            delta = [(delta[d] + float(kl_divergence(q[1][d], q[0][d]))) / 2 for d in range(D)]
        tau = (max(delta) + min(delta)) / 2
        for view in range(2):
            found[view].append([])
            for d in range(D):
                one, two = ((float(each[d].mean), float(each[d].variance)) for each in q)
                if delta[d] >= tau:
                    mean, variance = (one, two)[view]
                elif model.averaging == "gvae":
                    mean, variance = (one[0] + two[0]) / 2, (one[1] + two[1]) / 2
                else:
                    variance = 2 / (1 / one[1] + 1 / two[1])
                    mean = (one[0] / one[1] + two[0] / two[1]) * variance / 2
                found[view][-1].append((mean, math.sqrt(variance)))
    return found


@pytest.mark.parametrize("averaging", ["gvae", "mlvae"])
@pytest.mark.parametrize("divergence", ["kl", "symmetric"])
@torch.no_grad()
def test_close_dimensions_are_averaged_and_the_others_kept(pair: tuple[Tensor, Tensor], averaging: str, divergence: str) -> None:
    torch.manual_seed(3)
    model = make(averaging, divergence)
    output = model(pair)
    for view, expected in zip((output.output1, output.output2), slow_adapt(model, pair), strict=True):
        found = torch.stack([view.mu, (view.log_var / 2).exp()], dim=-1)
        torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-5)
    shared = (output.output1.mu == output.output2.mu).sum(1)
    assert ((shared >= 1) & (shared < D)).all(), "the smallest divergence is below tau, the largest is not"


def test_the_two_divergences_share_other_dimensions(pair: tuple[Tensor, Tensor]) -> None:
    shared = []
    for divergence in ("kl", "symmetric"):
        torch.manual_seed(0)
        output = make(divergence=divergence)((pair[0].repeat(20, 1) * torch.rand(20 * B, 1), pair[1].repeat(20, 1)))
        shared.append(output.output1.mu == output.output2.mu)
    assert (shared[0] != shared[1]).any()


def test_an_input_paired_with_itself_keeps_its_posterior(model: AdaGVAE, pair: tuple[Tensor, Tensor]) -> None:
    x = pair[0]
    for averaging in ("gvae", "mlvae"):
        model.averaging = averaging
        output, plain = model((x, x)).output1, model.vae(x)
        torch.testing.assert_close((output.mu, output.log_var), (plain.mu, plain.log_var))


def test_evaluation_mode_is_two_plain_vae_passes(model: AdaGVAE, pair: tuple[Tensor, Tensor]) -> None:
    output = model.eval()(pair, S=2)
    for found, x in zip((output.output1, output.output2), pair, strict=True):
        expected = model.vae(x, S=2)
        assert all(torch.equal(getattr(found, name), getattr(expected, name)) for name in ("x_hat", "z", "mu", "log_var"))
        assert torch.equal(found.z[:, 1], found.mu)


def test_samples_are_the_adapted_posterior_with_the_given_noise(model: AdaGVAE, pair: tuple[Tensor, Tensor]) -> None:
    eps = torch.randn(B, 2, S, D)
    output = model(pair, S=S, eps=eps)
    for view, noise in ((output.output1, eps[:, 0]), (output.output2, eps[:, 1])):
        torch.testing.assert_close(view.z, view.mu[:, None] + (view.log_var / 2).exp()[:, None] * noise)
    means = model(pair, S=S, sample=False).output2
    assert torch.equal(means.z, means.mu[:, None].expand(-1, S, -1))
    torch.manual_seed(5)
    first = model(pair, S=2).output2.z
    torch.manual_seed(5)
    assert torch.equal(first, model(pair, S=2).output2.z)


def test_objective_is_the_sum_of_both_negative_elbos(model: AdaGVAE, pair: tuple[Tensor, Tensor]) -> None:
    output = model(pair, S=S)
    result = model.compute_loss(pair, output, beta=4.0, likelihood="bernoulli")
    each = [model.vae.compute_loss(x, out, 4.0, "bernoulli") for x, out in zip(pair, (output.output1, output.output2), strict=True)]
    torch.testing.assert_close(result.objective, each[0].objective + each[1].objective)
    assert result.diagnostics["elbo"] == pytest.approx(-result.objective.item())
    for name in ("log_likelihood", "kl_divergence"):
        for view in (1, 2):
            assert result.diagnostics[f"{name}_x{view}"] == each[view - 1].diagnostics[name]


def test_a_batch_of_pairs_is_scored_like_compute_loss_and_single_inputs_like_the_vae(model: AdaGVAE, pair: tuple[Tensor, Tensor]) -> None:
    eps = torch.randn(B, 2, 1, D)
    found = model.loss(batch_of(*pair), eps=eps, beta=2.0)
    assert torch.equal(found.objective, model.compute_loss(pair, model(pair, eps=eps), 2.0).objective)
    single = model.eval().loss(batch_of(pair[0]), eps=eps[:, 0])
    expected = model.vae.loss(batch_of(pair[0]), eps=eps[:, 0])
    assert torch.equal(single.objective, expected.objective)
    assert list(single.diagnostics) == ["elbo", "log_likelihood", "kl_divergence"]


OPTIONS = [
    {"objective": "iwae", "num_samples": 3},
    {"free_bits": 0.5},
    {"capacity": 2.0, "beta": 10.0, "capacity_steps": 4},
    {"likelihood": "gaussian", "scale": "learned"},
    {"likelihood": "laplace", "num_samples": 2},
    {"likelihood": "categorical", "num_levels": 4},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_has_the_objectives_and_likelihoods_of_the_vae(options: dict, pair: tuple[Tensor, Tensor]) -> None:
    spec = MODELS.from_dict({"kind": "adagvae", "latent_dim": D, **options})
    model = MODELS.build(spec, MLPSpec(hidden=(8,)), (12,))
    likelihood = {"likelihood": spec.likelihood, "beta": spec.beta}
    x1, x2 = (pair[0] * 4).floor(), (pair[1] * 4).floor()
    model.at_step(2)
    eps = torch.randn(B, 2, *model.noise_shape())
    assert eps.shape[2] == spec.num_samples
    result = model.loss(batch_of(x1, x2), eps=eps, **likelihood)
    output = model((x1, x2), S=spec.num_samples, sample=True, eps=eps)
    each = [model.vae.compute_loss(x, part, **likelihood) for x, part in ((x1, output.output1), (x2, output.output2))]
    torch.testing.assert_close(result.objective, each[0].objective + each[1].objective)
    assert {name.removesuffix("_x1") for name in result.tensors if name.endswith("_x1")} == set(each[0].tensors) - {"elbo"}
    result.objective.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_gradients_are_right_in_float64(pair: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(0)
    for averaging in ("gvae", "mlvae"):
        model = make(averaging).double()
        eps = torch.randn(B, 2, 2, D, dtype=torch.float64)

        def objective(x1: Tensor, x2: Tensor, model: AdaGVAE = model, eps: Tensor = eps) -> Tensor:
            return model.compute_loss((x1, x2), model((x1, x2), S=2, eps=eps), 2.0).objective

        assert torch.autograd.gradcheck(objective, [x.double().requires_grad_() for x in pair])


def test_extreme_variances_stay_finite_with_gradients(model: AdaGVAE, pair: tuple[Tensor, Tensor]) -> None:
    for averaging in ("gvae", "mlvae"):
        model.averaging = averaging
        with torch.no_grad():
            model.vae.sampling_layer.log_var.weight.mul_(1e4)
        model.zero_grad()
        model.loss(batch_of(*pair), eps=torch.zeros(B, 2, 1, D)).objective.backward()
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_wrong_arguments_are_refused_with_what_to_do(model: AdaGVAE, pair: tuple[Tensor, Tensor]) -> None:
    x1, x2 = pair
    with pytest.raises(ValueError, match=r"takes a pair \(x1, x2\) of tensors, got a tensor of shape \(6, 12\): for single inputs use"):
        model(x1)
    with pytest.raises(ValueError, match=r"same shape, got \(6, 12\) and \(5, 12\)"):
        model((x1, x2[:5]))
    with pytest.raises(ValueError, match=r"\[B, 2, S, D\], got \(6, 1, 4\)"):
        model(pair, eps=torch.zeros(B, 1, D))
    with pytest.raises(ValueError, match=r"S must be >= 1, got 0"):
        model(pair, S=0)
    with pytest.raises(ValueError, match=r"trains on pairs and batch\.x_pair is None"):
        model.loss(batch_of(x1))
    with pytest.raises(ValueError, match=r"averaging is 'mean', expected one of gvae, mlvae"):
        AdaGVAE(model.vae, averaging="mean")
    with pytest.raises(ValueError, match=r"divergence is 'js', expected one of kl, symmetric"):
        AdaGVAE(model.vae, divergence="js")


def test_a_checkpoint_brings_back_options_and_weights(tmp_path) -> None:
    config = model_config(AdaGVAESpec(latent_dim=D, averaging="mlvae", divergence="symmetric"))
    model = load_model(saved_run(tmp_path / "run", config)).model
    assert isinstance(model, AdaGVAE)
    assert (model.averaging, model.divergence, model.training) == ("mlvae", "symmetric", False)
    again = MODELS.build(config.model, MLPSpec(hidden=(16,)), SHAPE)
    again.load_state_dict(weights_of(model))
    x = torch.rand(2, *SHAPE)
    assert torch.equal(again.encode(x, sample=False).mu, model.encode(x).mu)
