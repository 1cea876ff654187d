"""Convolutional backbone in 1, 2 or 3 dimensions: each stage halves every spatial axis (rounding up), the decoder doubles it back.

Kernel 3, stride 2, padding 1 takes n to ceil(n / 2), for every n >= 1; the transposed convolution's output padding gives back the odd or
even n, so 105x105 comes back as 105x105. A vector `(n,)` is one channel of length n. Legend: C channels, H W axes, N latents.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal

from torch import nn

from aecore.errors import ConfigError
from aecore.nn._backbone import Activation, Backbone, Norm, Output, activation, hidden, output_layers
from aecore.nn._linear import Linear
from aecore.registry import BACKBONES, LARGEST_SIZE, knob, spec

CONV: dict[int, Callable[..., nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
CONV_TRANSPOSE: dict[int, Callable[..., nn.Module]] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
CONV_AXES = (2, 3, 4)  # with the channels


@spec
class ConvSpec:
    """Strided convolutions and their mirror image."""

    kind: Literal["conv"] = "conv"
    channels: tuple[int, ...] = knob((32, 64), "output channels of the stages, each of which halves the image", ge=1, le=LARGEST_SIZE)
    activation: Activation = knob("silu", "after each hidden layer; smooth ones keep runs on other numbers of ranks equal")
    norm: Norm = knob("group", "before each activation; results with batch depend on the batch")
    dropout: float = knob(0.0, "share of hidden values dropped in training", ge=0, le=0.95)
    output: Output = knob("identity", "the decoder's last step; sigmoid keeps it in [0, 1]")

    def __post_init__(self) -> None:
        if not self.channels:
            raise ConfigError("ConvSpec.channels is empty, expected the channels of at least one stage, such as (32, 64)")


@BACKBONES.register(ConvSpec)
def build(conv: ConvSpec, input_shape: tuple[int, ...], latent_dim: int) -> Backbone:
    """Build for samples of `input_shape`: (n,), (C, L), (C, H, W) or (C, T, H, W)."""
    channels_first = with_channels(input_shape, "conv")
    widths, sizes = (channels_first[0], *conv.channels), halved(channels_first[1:], len(conv.channels))
    num_features = widths[-1] * math.prod(sizes[-1])
    reshape = channels_first != input_shape
    encoder: list[nn.Module] = [nn.Unflatten(1, channels_first)] if reshape else []
    encoder += [*_encoder(conv, widths, len(sizes[0])), nn.Flatten()]
    decoder: list[nn.Module] = [Linear(latent_dim, num_features), activation(conv.activation), nn.Unflatten(1, (widths[-1], *sizes[-1]))]
    decoder += _decoder(conv, widths, sizes)
    decoder += [nn.Flatten()] if reshape else []
    decoder += output_layers(conv.output)
    return Backbone(
        nn.Sequential(*encoder),
        nn.Sequential(*decoder),
        num_features,
        bounded=conv.output == "sigmoid",
        map_shape=(widths[-1], *sizes[-1]),
        map_decoder=nn.Sequential(decoder[1], *decoder[3:]),  # without the linear layer and its reshape
    )


def with_channels(input_shape: tuple[int, ...], kind: str) -> tuple[int, ...]:
    """Return the shape with its channels first, (1, n) for a vector; ConfigError unless it has 1 to 3 axes behind the channels."""
    channels_first = (1, *input_shape) if len(input_shape) == 1 else input_shape
    if len(channels_first) not in CONV_AXES:
        raise ConfigError(f"backbone.kind={kind} takes samples with 1 to 4 axes, these have the shape {input_shape}: use backbone.kind=mlp")
    return channels_first


def halved(size: tuple[int, ...], stages: int) -> list[tuple[int, ...]]:
    """Return the sizes before the first stage and after each: every axis halves, rounding up."""
    sizes = [size]
    for _ in range(stages):
        sizes.append(tuple((n + 1) // 2 for n in sizes[-1]))
    return sizes


def output_padding(target: tuple[int, ...]) -> tuple[int, ...]:
    """Return what a transposed convolution has to add so that it gives the axes `target`: 0 where they are odd, 1 where even."""
    return tuple(n - (2 * ((n + 1) // 2) - 1) for n in target)


def _encoder(conv: ConvSpec, widths: tuple[int, ...], num_axes: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layer = CONV[num_axes](before, after, 3, stride=2, padding=1, bias=conv.norm != "batch")
        layers += hidden(layer, after, act=conv.activation, norm=conv.norm, dropout=conv.dropout, num_axes=num_axes)
    return layers


def _decoder(conv: ConvSpec, widths: tuple[int, ...], sizes: list[tuple[int, ...]]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for stage in reversed(range(len(conv.channels))):
        target, last, num_axes = sizes[stage], stage == 0, len(sizes[stage])
        padding = output_padding(target)
        after, bias = widths[stage], last or conv.norm != "batch"
        layer = CONV_TRANSPOSE[num_axes](widths[stage + 1], after, 3, stride=2, padding=1, output_padding=padding, bias=bias)
        layers += [layer] if last else hidden(layer, after, act=conv.activation, norm=conv.norm, dropout=conv.dropout, num_axes=num_axes)
    return layers
