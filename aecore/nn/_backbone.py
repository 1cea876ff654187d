"""What a backbone is, and the layers that backbones share. Legend: B batch, N latents, D latent, F features."""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from aecore.errors import ConfigError

Activation = Literal["relu", "leaky_relu", "silu", "tanh"]
Norm = Literal["group", "batch", "none"]
Output = Literal["identity", "sigmoid"]

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True, slots=True)
class Backbone:
    """An encoder and a decoder without the layer that makes the latent; the model adds that.

    Attributes
    ----------
    encoder
        `[B, *input_shape]` -> `[B, num_features]`.
    decoder
        `[N, latent_dim]` -> `[N, *input_shape]`.
    num_features
        F, width of the encoder's output.
    bounded
        The decoder's output is already squashed to [0, 1], so it cannot be read as logits.
    sequential
        The first axis of samples is time; the encoder also takes `lengths [B]`, the decoder the number of steps, and
        the build function `num_levels`: K for samples that are token ids, of which the decoder then gives K logits each.
    map_shape
        (C, *axes) of the features before the encoder flattened them; None where they never were a map.
    map_decoder
        The part of the decoder that takes such a map: `[N, *map_shape]` -> `[N, *input_shape]`; None without a map.
    """

    encoder: nn.Module
    decoder: nn.Module
    num_features: int
    bounded: bool = False
    sequential: bool = False
    map_shape: tuple[int, ...] | None = None
    map_decoder: nn.Module | None = None

    def check_likelihood(self, likelihood: str) -> None:
        """Raise ConfigError where the likelihood takes logits and the decoder ends in a sigmoid: it would be applied twice."""
        if self.bounded and likelihood == "bernoulli":
            raise ConfigError(
                "model.likelihood=bernoulli takes logits, but backbone.output=sigmoid squashes them: "
                "set backbone.output=identity, or model.likelihood=gaussian"
            )


def activation(name: Activation) -> nn.Module:
    """Return a new activation layer; leaky_relu has slope 0.2."""
    if name == "leaky_relu":
        return nn.LeakyReLU(0.2)
    return {"relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh}[name]()


def hidden(layer: nn.Module, channels: int, *, act: Activation, norm: Norm, dropout: float, num_axes: int = 0) -> list[nn.Module]:
    """Return `layer`, its normalisation, activation and dropout; `channels` out, `num_axes` spatial axes (0: vectors)."""
    layers = [layer, *normalisation(norm, channels, num_axes), activation(act)]
    if dropout > 0:
        layers.append(nn.Dropout(dropout))
    return layers


def normalisation(norm: Norm, channels: int, num_axes: int = 0) -> list[nn.Module]:
    """Return the layer that normalises `channels` of a map with `num_axes` spatial axes; none for `none`."""
    if norm == "group":
        return [nn.GroupNorm(num_groups(channels), channels)]
    return [_BATCH_NORMS[num_axes](channels)] if norm == "batch" else []


def num_groups(channels: int) -> int:
    """Return the largest divisor of `channels`, at most 8, that leaves 4 or more channels per group (else 1).

    A group of one channel on a 1x1 map would normalise its only value to zero.
    """
    return max((groups for groups in range(1, 9) if channels % groups == 0 and channels // groups >= 4), default=1)


def output_layers(output: Output) -> list[nn.Module]:
    """Return what follows the decoder's last linear map."""
    return [nn.Sigmoid()] if output == "sigmoid" else []
