"""The VAE of sequences: what fills up a batch changes nothing, losses against torch.distributions, what is refused."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Normal, kl_divergence

from aecore._base import Batch
from aecore.errors import ConfigError, DataError
from aecore.nn._recurrence import Recurrence, RecurrentEncoder, at_last, reverse, time_code
from aecore.nn.hybrid import HybridSpec
from aecore.nn.mlp import MLPSpec
from aecore.nn.recurrent import RecurrentSpec
from aecore.registry import MODELS
from aecore.variational import RecurrentVAE, RecurrentVAESpec
from aecore.variational.marginal import log_marginal

LENGTHS = (7, 1, 4, 3)
VOCAB = 5
KINDS = ["gaussian", "bernoulli", "categorical", "video"]


def batch_of(x: Tensor, lengths: Tensor | None) -> Batch:
    rows = torch.arange(len(x))
    return Batch(x, rows, rows, len(x), lengths=lengths)


def sequences(kind: str, fill: float = 0.0) -> Batch:
    """Four sequences of 7, 1, 4 and 3 steps; the padding is `fill`."""
    torch.manual_seed(1)
    values = {
        "gaussian": torch.randn(4, 7, 3),
        "bernoulli": torch.rand(4, 7, 2),
        "categorical": torch.randint(VOCAB, (4, 7)).float(),
        "video": torch.rand(4, 7, 2, 9, 6),
    }[kind]
    lengths = torch.tensor(LENGTHS)
    behind = torch.arange(7) >= lengths[:, None]
    return batch_of(values.masked_fill(behind.view(4, 7, *[1] * (values.ndim - 2)), fill), lengths)


def make(kind: str, **backbone: Any) -> tuple[RecurrentVAE, str]:
    torch.manual_seed(0)
    likelihood = "gaussian" if kind == "video" else kind
    net = HybridSpec(channels=(4, 8), width=8, **backbone) if kind == "video" else RecurrentSpec(
        width=8, **backbone
    )  # fmt: skip
    shape = (0, *sequences(kind).x.shape[2:])
    levels = VOCAB if kind == "categorical" else 0
    model: RecurrentVAE = MODELS.build(RecurrentVAESpec(latent_dim=3, likelihood=likelihood, num_levels=levels), net, shape)
    return model, likelihood


def alone(batch: Batch, row: int) -> Batch:
    """One sequence as a batch of its own length, without anything that fills it up."""
    return batch_of(batch.x[row : row + 1, : LENGTHS[row]], None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("net", [{}, {"cell": "lstm", "layers": 2}, {"bidirectional": False, "layers": 2}], ids=str)
def test_nothing_depends_on_what_a_sequence_is_batched_with(kind: str, net: dict[str, Any]) -> None:
    model, likelihood = make(kind, **net)
    batch, other = sequences(kind), sequences(kind, fill=1.0)
    eps = torch.randn(4, 2, 3)
    losses = [model.loss(alone(batch, row), eps=eps[row : row + 1], likelihood=likelihood).objective for row in range(4)]
    for filled in (batch, other):
        together = model.loss(filled, eps=eps, likelihood=likelihood)
        torch.testing.assert_close(together.objective, torch.stack(losses).mean())
    latents, shown = model.latents(batch), model.eval().reconstruct(other, likelihood=likelihood)
    for row, length in enumerate(LENGTHS):
        for name, latent in model.latents(alone(batch, row)).items():
            torch.testing.assert_close(latents[name][row : row + 1], latent)
        torch.testing.assert_close(shown[row : row + 1, :length], model.reconstruct(alone(batch, row), likelihood=likelihood))
        assert not shown[row, length:].any()
    changed = dataclasses.replace(batch, x=batch.x + 1 if kind != "categorical" else (batch.x + 1) % VOCAB)
    assert not torch.allclose(model.latents(changed)["mu"], latents["mu"])


@pytest.mark.parametrize("kind", KINDS)
def test_what_fills_up_a_batch_has_no_gradient(kind: str) -> None:
    model, likelihood = make(kind)
    batch = sequences(kind)
    x = batch.x.clone().requires_grad_(kind != "categorical")
    model.loss(dataclasses.replace(batch, x=x), eps=torch.randn(4, 1, 3), likelihood=likelihood).objective.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    if x.grad is not None:
        for row, length in enumerate(LENGTHS):
            assert not x.grad[row, length:].any()
            assert x.grad[row, :length].any()


@pytest.mark.parametrize("kind", KINDS)
def test_elbo_is_that_of_torch_distributions(kind: str) -> None:
    model, likelihood = make(kind)
    batch, eps = sequences(kind), torch.randn(4, 2, 3)
    result = model.loss(batch, eps=eps, likelihood=likelihood, beta=0.5)
    output = model(batch.x, batch.lengths, S=2, sample=True, eps=eps)
    posterior = Normal(output.mu, (0.5 * output.log_var).exp())
    kl = kl_divergence(posterior, Normal(0.0, 1.0)).sum(1)
    log_px = torch.zeros(4, 2)
    for row, length in enumerate(LENGTHS):
        x, x_hat = batch.x[row, :length], output.x_hat[row, :, :length]
        if likelihood == "gaussian":
            each = Normal(x_hat, 1.0).log_prob(x) - Normal(0.0, 1.0).log_prob(torch.zeros(()))
        elif likelihood == "bernoulli":
            each = Bernoulli(logits=x_hat, validate_args=False).log_prob(x)
        else:
            each = Categorical(logits=x_hat).log_prob(x)
        log_px[row] = each.flatten(1).sum(1)
    torch.testing.assert_close(result.tensors["log_likelihood"], log_px.mean())
    torch.testing.assert_close(result.tensors["kl_divergence"], kl.mean())
    torch.testing.assert_close(result.objective, 0.5 * kl.mean() - log_px.mean())
    assert result.tensors["elbo"] == -result.objective


@pytest.mark.parametrize("kind", KINDS)
def test_log_weights_hold_every_constant(kind: str) -> None:
    model, likelihood = make(kind)
    batch, eps = sequences(kind), torch.randn(4, 3, 3)
    output = model(batch.x, batch.lengths, S=3, sample=True, eps=eps)
    expected = Normal(0.0, 1.0).log_prob(output.z).sum(2)
    expected = expected - Normal(output.mu, (0.5 * output.log_var).exp()).log_prob(output.z.transpose(0, 1)).sum(2).T
    for row, length in enumerate(LENGTHS):
        x, x_hat = batch.x[row, :length].expand(3, -1, *batch.x.shape[2:]), output.x_hat[row, :, :length]
        density = {"gaussian": Normal(x_hat, 1.0), "bernoulli": Bernoulli(logits=x_hat, validate_args=False)}.get(likelihood)
        density = Categorical(logits=x_hat) if density is None else density
        expected[row] += density.log_prob(x).flatten(1).sum(1)
    found = model.log_weights(batch, eps, likelihood=likelihood)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=() if kind in ("gaussian", "video") else pytest.mark.long) for kind in KINDS])
def test_forward_and_loss_with_lengths_compile_to_one_graph(kind: str) -> None:
    model, likelihood = make(kind, layers=2)
    batch, eps = sequences(kind), torch.randn(4, 1, 3)
    graphs = 0

    def count(module: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        nonlocal graphs
        graphs += 1
        return module

    torch._dynamo.reset()
    compiled = torch.compile(lambda beta: model.loss(batch, eps=eps, beta=beta, likelihood=likelihood), backend=count, fullgraph=True)
    for beta in (torch.tensor(0.5), torch.tensor(2.0)):
        expected = model.loss(batch, eps=eps, beta=beta, likelihood=likelihood).objective
        torch.testing.assert_close(compiled(beta).objective, expected)
    assert graphs == 1


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_autocast_stays_near_the_full_precision(kind: str) -> None:
    model, likelihood = make(kind)
    batch, eps = sequences(kind), torch.randn(4, 1, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model.loss(batch, eps=eps, likelihood=likelihood)
    half.objective.backward()
    assert half.objective.dtype == torch.float32
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    torch.testing.assert_close(half.objective, model.loss(batch, eps=eps, likelihood=likelihood).objective, rtol=0.03, atol=0)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_a_layer_is_that_of_torch(cell: str) -> None:
    layer = Recurrence(cell, 3, 5)
    peer = {"gru": nn.GRU, "lstm": nn.LSTM}[cell](3, 5, batch_first=True)
    peer.load_state_dict({f"{name}_l0": value for name, value in layer.weights.items()})
    steps, first = torch.randn(2, 6, 3), torch.randn(2, 5)
    state = first.unsqueeze(0) if cell == "gru" else (first.unsqueeze(0), torch.zeros(1, 2, 5))
    torch.testing.assert_close(layer(steps, first), peer(steps, state)[0])


def test_an_encoder_of_two_directions_is_that_of_packed_sequences() -> None:
    encoder = RecurrentEncoder(nn.Identity(), "gru", 4, layers=2, bidirectional=True, dropout=0.0)
    nn.init.zeros_(encoder.first)
    peer = nn.GRU(4, 4, num_layers=2, bidirectional=True, batch_first=True)
    weights = {}
    for number in range(2):
        for suffix, layer in (("", encoder.forwards[number]), ("_reverse", encoder.backwards[number])):
            weights |= {f"{name}_l{number}{suffix}": value for name, value in layer.weights.items()}
    peer.load_state_dict(weights)
    x, lengths = torch.randn(4, 7, 4), torch.tensor(LENGTHS)
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    top = peer(packed)[1][-2:]
    torch.testing.assert_close(encoder(x, lengths), torch.cat([top[0], top[1]], 1))


def test_reverse_and_last_stay_within_the_length() -> None:
    steps = torch.arange(1, 9.0).reshape(2, 4, 1)
    lengths = torch.tensor([3, 1])
    assert reverse(steps, lengths).squeeze(2).tolist() == [[3, 2, 1, 4], [5, 6, 7, 8]]
    assert reverse(steps, None).squeeze(2).tolist() == [[4, 3, 2, 1], [8, 7, 6, 5]]
    assert at_last(steps, lengths).squeeze(1).tolist() == [3, 5]
    assert at_last(steps, None).squeeze(1).tolist() == [4, 8]


@pytest.mark.parametrize("width", [1, 2, 7, 8])
def test_every_step_has_a_time_code_of_its_own(width: int) -> None:
    code = time_code(9, width, torch.device("cpu"))
    assert code.shape == (9, width)
    assert code.abs().max() <= 1
    assert torch.cdist(code, code).fill_diagonal_(1).min() > 0.01


def test_generated_sequences_have_the_steps_that_are_asked_for() -> None:
    for kind, inside in (("gaussian", (3,)), ("categorical", ()), ("video", (2, 9, 6))):
        model, likelihood = make(kind)
        z = torch.randn(2, 3)
        assert model.decode_latents(z, likelihood=likelihood).shape == (2, 64, *inside)
        made = model.decode_latents(z, likelihood=likelihood, num_steps=5)
        assert (made.shape, made.dtype) == ((2, 5, *inside), torch.float32)
        torch.testing.assert_close(made, model.decode_latents(z, likelihood=likelihood, num_steps=9)[:, :5])
        if kind == "categorical":
            assert set(made.unique().tolist()) <= set(range(VOCAB))
    with pytest.raises(ConfigError, match="not conditional"):
        model.decode_latents(z, label=torch.zeros(2, dtype=torch.int64))


def test_fixed_sequences_are_generated_as_long_as_they_are() -> None:
    model = MODELS.build(RecurrentVAESpec(latent_dim=3), RecurrentSpec(width=8), (9, 2))
    assert model.decode_latents(torch.zeros(1, 3)).shape == (1, 9, 2)


def test_many_tokens_per_step_have_vectors_of_their_own() -> None:
    model = MODELS.build(RecurrentVAESpec(latent_dim=3, likelihood="categorical", num_levels=VOCAB), RecurrentSpec(width=8), (0, 2))
    ids = torch.tensor([[[0.0, 1.0]], [[1.0, 0.0]]])
    assert not torch.allclose(*model.latents(batch_of(ids, torch.ones(2, dtype=torch.int64)))["mu"])
    assert model(ids).x_hat.shape == (2, 1, 1, 2, VOCAB)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (torch.tensor([7, 0, 4, 3]), "lengths must be from 1 to T = 7, got 0 to 7: leave empty sequences out"),
        (torch.tensor([8, 1, 4, 3]), "from 1 to T = 7, got 1 to 8"),
        (torch.tensor([7, 1, 4]), r"int64 of shape \[B\] = \(4,\), got torch.int64 of shape \(3,\)"),
        (torch.tensor([7.0, 1, 4, 3]), "got torch.float32"),
    ],
)
def test_lengths_that_cannot_be_are_refused(lengths: Tensor, message: str) -> None:
    model, _ = make("gaussian")
    with pytest.raises(ValueError, match=message):
        model(sequences("gaussian").x, lengths)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (
            torch.tensor([[1, 2], [3, 5]]),
            r"sample 1 \(ordinal\) holds token ids from 3 to 5, the vocabulary has 0 to 4: set model.num_levels",
        ),
        (torch.tensor([[-1, 2], [3, 4]]), "sample 0 .* from -1 to 2"),
        (torch.tensor([[1.0, 2.0]]), "the samples are torch.float32, store them as integers"),
    ],
)
def test_ids_outside_the_vocabulary_are_named(ids: Tensor, message: str) -> None:
    model, _ = make("categorical")
    with pytest.raises(DataError, match=message):
        model.require_samples(batch_of(ids, None))
    model.require_samples(batch_of(torch.tensor([[0, 4]], dtype=torch.uint8), None))


@pytest.mark.parametrize(
    ("model", "net", "shape", "message"),
    [
        ({}, MLPSpec(), (5, 2), "runs over the first axis of samples, MLPSpec as it is set does not"),
        ({}, RecurrentSpec(time_axis=1), (1, 5, 2), r"with backbone.time_axis=0"),
        ({}, RecurrentSpec(time_axis=1), (0, 2), "time first, backbone.time_axis is 1"),
        ({}, RecurrentSpec(time_axis=2), (5, 2), r"an axis 2 for time, these have the shape \(5, 2\)"),
        ({}, HybridSpec(), (0, 2), r"takes videos \(T, C, H, W\) or \(T, H, W\), these samples have the shape \(0, 2\)"),
        ({"likelihood": "categorical", "num_levels": 3}, RecurrentSpec(output="sigmoid"), (0,), "categorical takes logits"),
        ({"likelihood": "categorical", "num_levels": 3}, HybridSpec(), (0, 2, 9, 6), "needs token ids and backbone.kind=recurrent"),
        ({"likelihood": "bernoulli"}, RecurrentSpec(output="sigmoid"), (0, 1), "takes logits"),
    ],
)
def test_combinations_that_cannot_work_are_refused(model: dict[str, Any], net: object, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MODELS.build(RecurrentVAESpec(latent_dim=3, **model), net, shape)


@pytest.mark.parametrize(
    "knobs",
    [{"objective": "iwae", "num_samples": 3}, {"free_bits": 0.5}, {"scale": "learned"}, {"likelihood": "laplace", "scale": 0.5}],
    ids=str,
)
def test_every_objective_sees_valid_steps_alone(knobs: dict[str, Any]) -> None:
    torch.manual_seed(0)
    spec = RecurrentVAESpec(latent_dim=3, **knobs)
    model = MODELS.build(spec, RecurrentSpec(width=8), (0, 3))
    batch, other = sequences("gaussian"), sequences("gaussian", fill=9.0)
    eps = torch.randn(4, *model.noise_shape())
    one, two = (model.loss(each, eps=eps, likelihood=spec.likelihood).objective for each in (batch, other))
    torch.testing.assert_close(one, two)
    torch.testing.assert_close(*(model.log_weights(each, eps, likelihood=spec.likelihood) for each in (batch, other)))


def test_log_p_of_a_sequence_does_not_depend_on_its_batch() -> None:
    model, _ = make("gaussian")
    batch = sequences("gaussian")
    found = log_marginal(model, batch, num_samples=20)
    short = batch_of(batch.x[:, :4], torch.tensor([4, 1, 4, 3]))
    torch.testing.assert_close(found[1:], log_marginal(model, short, num_samples=20)[1:])
