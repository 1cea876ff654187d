"""The model of the jobs: bags with padding are their instances, one compiled graph, errors of its spec."""

import dataclasses

import pytest
import torch
from torch.distributions import Bernoulli, Independent, Normal

from aecore._base import Batch
from aecore.errors import ConfigError
from aecore.mil import MilVAE, MilVAESpec, VariationalAutoEncoderMIL
from aecore.nn.conv import ConvSpec
from aecore.nn.mlp import MLPSpec
from aecore.registry import MODELS
from aecore.variational.marginal import log_elbo, log_marginal

SHAPE, D, S = (2, 3), 4, 3
SIZES = torch.tensor([5, 1, 2])
MASK = torch.arange(5) < SIZES[:, None]
n = int(SIZES.sum())
LIKELIHOODS = pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])


@pytest.fixture(autouse=True)
def _a_fixed_seed():
    torch.manual_seed(0)


def make(**options) -> MilVAE:
    return MODELS.build(MilVAESpec(latent_dim=D, **options), MLPSpec(hidden=(8,)), SHAPE)


def bags_and_rows(padding: float = 0.0) -> tuple[Batch, Batch]:
    """The same instances as padded bags, and as single samples."""
    rows = torch.rand(n, *SHAPE)
    x = torch.full((*MASK.shape, *SHAPE), padding)
    x[MASK] = rows
    count = torch.arange(n)
    return Batch(x, count, count, n, mask=MASK), Batch(rows, count, count, n)


@LIKELIHOODS
@pytest.mark.parametrize("padding", [0.0, 1e9, float("nan")])
def test_the_loss_of_bags_is_the_mean_over_their_instances_whatever_the_padding(likelihood, padding):
    model, eps, found = make(covar_mode="diagonal"), torch.randn(n, S, D), []
    for batch in bags_and_rows(padding):
        model.zero_grad()
        result = model.loss(batch, eps=eps, beta=0.7, likelihood=likelihood)
        result.objective.backward()
        found.append([*result.tensors.values(), *(parameter.grad.clone() for parameter in model.parameters())])
    for bags, rows in zip(*found, strict=True):
        torch.testing.assert_close(bags, rows)


def test_the_objective_is_the_negative_elbo_of_the_class_of_bags():
    model, (bags, _) = make(covar_mode="diagonal"), bags_and_rows()
    with torch.no_grad():
        last = model.vae.encoder.net[2]
        last.weight[D:], last.bias[D:] = 0.0, -14.0  # no noise to speak of
    peer = VariationalAutoEncoderMIL(SHAPE, [8, D], ["silu", "None"], "diagonal")
    peer.load_state_dict(model.vae.state_dict())
    expected = peer.compute_loss(bags.x, bags.mask)
    found = model.loss(bags, eps=torch.randn(n, 1, D)).tensors
    torch.testing.assert_close(found["log_likelihood"], -expected["VaeELL"].detach(), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(found["kl_divergence"], expected["VaeKL"].detach())


def test_noise_belongs_to_instances_and_not_to_places():
    """Wider padding moves every instance to another place; each keeps its noise."""
    model, (bags, _) = make(), bags_and_rows()
    wider = dataclasses.replace(
        bags,
        x=torch.nn.functional.pad(bags.x, (0, 0, 0, 0, 0, 4)),
        mask=torch.nn.functional.pad(bags.mask, (0, 4)),
    )
    eps = torch.randn(n, S, D)
    torch.testing.assert_close(model.loss(wider, eps=eps).objective, model.loss(bags, eps=eps).objective)
    assert not torch.allclose(model.loss(bags, eps=eps.flip(0)).objective, model.loss(bags, eps=eps).objective)


def test_training_draws_as_many_latents_as_the_spec_says_and_evaluation_one():
    model, (bags, rows) = make(num_samples=7), bags_and_rows()
    assert (model.noise_shape(), model.noise_shape(2), model.eval().noise_shape()) == ((7, D), (2, D), (1, D))
    drawn = []
    model.vae.decoder.register_forward_hook(lambda module, inputs, output: drawn.append(len(inputs[0])))
    for batch in (bags, rows):
        model.train().loss(batch)
        model.eval().loss(batch)
    assert drawn == [MASK.numel() * 7, MASK.numel(), n * 7, n]


def test_without_noise_given_the_model_draws_its_own():
    model, (bags, rows) = make(), bags_and_rows()
    for batch in (bags, rows):
        assert model.loss(batch).objective != model.loss(batch).objective


def test_forward_and_loss_of_bags_compile_to_one_graph():
    model, (bags, _), graphs = make(), bags_and_rows(), 0
    eps = torch.randn(n, 1, D)

    def count(module, inputs):
        nonlocal graphs
        graphs += 1
        return module

    torch._dynamo.reset()
    compiled = torch.compile(lambda beta: model.loss(bags, eps=eps, beta=beta), backend=count, fullgraph=True)
    for beta in (torch.tensor(0.5), torch.tensor(2.0)):
        torch.testing.assert_close(compiled(beta).objective, model.loss(bags, eps=eps, beta=beta).objective)
    assert graphs == 1


def test_bf16_autocast_of_bags_stays_close():
    model, (bags, _) = make(), bags_and_rows()
    eps = torch.randn(n, 1, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model.loss(bags, eps=eps).objective
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, model.loss(bags, eps=eps).objective, rtol=0.02, atol=0.02)


@LIKELIHOODS
def test_log_weights_are_those_of_torch_distributions(likelihood):
    model, (_, rows) = make(covar_mode="diagonal"), bags_and_rows()
    eps = torch.randn(n, S, D)
    found = model.log_weights(rows, eps, likelihood=likelihood)
    assert (found.shape, found.dtype) == ((n, S), torch.float64)
    mean, log_std = model.vae.get_raw_output_enc(rows.x)
    q = Independent(Normal(mean.unsqueeze(1), log_std.exp().unsqueeze(1)), 1)
    z = mean.unsqueeze(1) + log_std.exp().unsqueeze(1) * eps
    recon, log_scale = (value.reshape(n, S, -1) for value in model.vae.get_raw_output_dec(z.flatten(0, 1)))
    observed = Normal(recon, log_scale.exp()) if likelihood == "gaussian" else Bernoulli(logits=recon, validate_args=False)
    p = Independent(observed, 1)
    prior = Independent(Normal(torch.zeros(D), torch.ones(D)), 1)
    expected = p.log_prob(rows.x.flatten(1).unsqueeze(1)) + prior.log_prob(z) - q.log_prob(z)
    torch.testing.assert_close(found, expected.double(), atol=1e-4, rtol=1e-5)


@LIKELIHOODS
def test_latents_decode_to_the_reconstruction(likelihood):
    model, (_, rows) = make().eval(), bags_and_rows()
    latents = model.latents(rows)
    assert {name: value.shape for name, value in latents.items()} == {"mu": (n, D), "log_var": (n, D)}
    found = model.decode_latents(latents["mu"], likelihood=likelihood)
    assert torch.equal(found, model.reconstruct(rows, likelihood=likelihood))
    assert found.shape == (n, *SHAPE)
    torch.testing.assert_close(model(rows.x).x_hat[:, 0], model.decode_latents(latents["mu"]))
    assert model(rows.x, S=3).z.shape == (n, 3, D)


def test_bags_that_do_not_fit_their_mask_are_refused():
    model, (bags, _) = make(), bags_and_rows()
    with pytest.raises(ValueError, match=r"x \[bags, N, 2, 3\] and mask \[bags, N\]; got x \(3, 5, 2, 3\) and mask \(3, 4\)"):
        model.loss(dataclasses.replace(bags, mask=MASK[:, 1:]))
    with pytest.raises(ValueError, match=r"z must have the shape \[B, S, D\], got \(3, 4\)"):
        model.decode(torch.zeros(3, D))
    with pytest.raises(ValueError, match="n_samples is 0"):
        model(torch.zeros(2, *SHAPE), S=0)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (ConvSpec(), "model.kind=mil_vae consists of MLPs, backbone.kind is conv: use backbone.kind=mlp, or model.kind=vae"),
        (MLPSpec(dropout=0.1), "backbone.dropout is 0.1, .* leave it at 0.0, or use model.kind=vae"),
        (MLPSpec(norm="batch"), "backbone.norm is batch"),
        (MLPSpec(output="sigmoid"), "backbone.output is sigmoid"),
    ],
)
def test_backbones_that_the_model_does_not_have_are_refused(backbone, message):
    with pytest.raises(ConfigError, match=message):
        MODELS.build(MilVAESpec(), backbone, SHAPE)


def test_an_unknown_activation_is_refused_with_the_nearest_one():
    with pytest.raises(ConfigError, match="MilVAESpec.last_activation is 'tahn' .did you mean 'tanh'"):
        MilVAESpec(last_activation="tahn")
    assert isinstance(make(last_activation="tanh").vae.encoder.net[3], torch.nn.Tanh)


def test_the_estimators_of_the_library_take_the_model():
    model, (_, rows) = make(covar_mode="diagonal").eval(), bags_and_rows()
    found = log_marginal(model, rows, num_samples=3000)
    expected = model.vae.log_marginal_likelihood_importance_sampling(rows.x, 3000)
    torch.testing.assert_close(found, expected, atol=0.25, rtol=0)
    assert log_elbo(model, rows, num_samples=3000).mean() < found.mean()
