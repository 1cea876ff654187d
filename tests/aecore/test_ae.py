"""The plain autoencoder: the seed's snippets, the loss, the data-space reconstruction."""

import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aecore._base import Batch
from aecore.errors import ConfigError
from aecore.nn.mlp import MLPSpec
from aecore.registry import BACKBONES, MODELS
from aecore.vanilla import AE, AEDecodeOutput, AEEncodeOutput, AEOutput, AESpec


def batch_of(x: Tensor) -> Batch:
    return Batch(x, torch.arange(len(x)), torch.arange(len(x)), len(x))


def small() -> AE:
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    return AE(encoder, nn.Sequential(nn.Linear(4, 12), nn.Unflatten(1, (1, 3, 4))))


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_documented_training_and_inference_snippet() -> None:
    encoder_nn, decoder_nn = nn.Sequential(nn.Flatten(), nn.LazyLinear(4)), nn.Linear(4, 12)
    sample_input = x_batch = torch.rand(2, 12)

    model = AE(encoder=encoder_nn, decoder=decoder_nn)
    model.build(sample_input)
    output = model(x_batch)
    loss_result = model.compute_loss(x_batch, output, likelihood="bernoulli")
    loss_result.objective.backward()
    logged = {name: val for name, val in loss_result.diagnostics.items()}  # noqa: C416  # as documented
    z = model.encode(x_batch).z
    x_reconstructed = model.decode(z).x_hat

    assert logged == {"log_likelihood": -loss_result.objective.item()}
    assert torch.equal(x_reconstructed, output.x_hat)


def test_outputs_are_typed_and_readable() -> None:
    model, x = small(), torch.rand(2, 1, 3, 4)
    assert isinstance(model(x), AEOutput)
    assert isinstance(model.encode(x), AEEncodeOutput)
    assert isinstance(model.decode(torch.zeros(2, 4)), AEDecodeOutput)
    x_hat, z = "Tensor(shape=(2, 1, 3, 4), dtype=torch.float32)", "Tensor(shape=(2, 4), dtype=torch.float32)"
    assert repr(model(x)) == f"AEOutput(x_hat={x_hat}, z={z})"


def test_loss_is_summed_over_features_and_averaged_over_the_batch() -> None:
    model, x = small(), torch.rand(5, 1, 3, 4)
    output = model(x)
    gaussian = 0.5 * F.mse_loss(output.x_hat, x, reduction="sum") / 5
    bernoulli = F.binary_cross_entropy_with_logits(output.x_hat, x, reduction="sum") / 5
    torch.testing.assert_close(model.compute_loss(x, output).objective, gaussian)
    torch.testing.assert_close(model.compute_loss(x, output, "bernoulli").objective, bernoulli)


def test_loss_refuses_a_reconstruction_of_another_shape() -> None:
    model, x = small(), torch.rand(5, 1, 3, 4)
    with pytest.raises(ValueError, match="same shape"):
        model.compute_loss(x[:1], model(x))


def test_latents_of_any_shape_are_flattened() -> None:
    conv = AE(nn.Conv2d(1, 2, 2, stride=2), nn.ConvTranspose2d(2, 1, 2, stride=2))
    x = torch.rand(3, 1, 4, 4)
    assert conv(x).z.shape == (3, 2, 2, 2)
    torch.testing.assert_close(conv.latents(batch_of(x))["z"], conv(x).z.detach().reshape(3, 8))


def test_reconstruction_is_in_data_space() -> None:
    model, x = small(), torch.rand(3, 1, 3, 4)
    batch = batch_of(x)
    torch.testing.assert_close(model.reconstruct(batch), model(x).x_hat.detach())
    torch.testing.assert_close(model.reconstruct(batch, likelihood="bernoulli"), torch.sigmoid(model(x).x_hat.detach()))


def test_noise_and_beta_change_nothing() -> None:
    model, batch = small(), batch_of(torch.rand(3, 1, 3, 4))
    assert model.noise_shape() is None
    assert torch.equal(model.loss(batch).objective, model.loss(batch, beta=7.0).objective)


def test_spec_builds_the_tutorials_symmetric_network_on_a_sigmoid() -> None:
    backbone = MLPSpec(hidden=(256, 128, 64), output="sigmoid")
    model = MODELS.build(AESpec(latent_dim=32), backbone, (784,))
    widths = [(layer.in_features, layer.out_features) for layer in model.modules() if isinstance(layer, nn.Linear)]
    assert widths == [(784, 256), (256, 128), (128, 64), (64, 32), (32, 64), (64, 128), (128, 256), (256, 784)]
    x_hat = model(torch.randn(4, 784)).x_hat
    assert ((x_hat > 0) & (x_hat < 1)).all()


@pytest.mark.parametrize("kind", MODELS.kinds())
def test_a_sigmoid_output_under_a_likelihood_of_logits_is_refused(kind: str) -> None:
    """On every backbone; the ones that a kind takes at all say what to set."""
    spec, messages = MODELS.from_dict({"kind": kind, "likelihood": "bernoulli"}), []
    for backbone in BACKBONES.kinds():
        with pytest.raises(ConfigError) as refused:
            MODELS.build(spec, BACKBONES.from_dict({"kind": backbone, "output": "sigmoid"}), (5, 3))
        messages.append(str(refused.value))
    assert [message for message in messages if re.search(r"backbone.output(.|\n)*identity", message)], messages
