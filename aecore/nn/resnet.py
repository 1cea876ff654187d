"""Residual backbone in 1, 2 or 3 dimensions (He et al. 2016, "Identity Mappings in Deep Residual Networks").

A stage halves every spatial axis as the `conv` backbone does (rounding up, and back to the exact odd or even size), then refines it
by `blocks` residual blocks: x + f(x), f = two 3-wide convolutions, each behind its normalisation and activation. The blocks run at the
smaller resolution, so they cost a quarter (2-D) of what they would before it. Legend: C channels, H W axes, N latents.
"""

import math
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn

from aecore.errors import ConfigError
from aecore.nn._backbone import Activation, Backbone, Norm, Output, activation, normalisation, output_layers
from aecore.nn._linear import Linear
from aecore.nn.conv import CONV, CONV_TRANSPOSE, halved, output_padding, with_channels
from aecore.registry import BACKBONES, LARGEST_SIZE, MOST_LAYERS, knob, spec


@spec
class ResNetSpec:
    """Stages of a strided convolution and residual blocks, and their mirror image."""

    kind: Literal["resnet"] = "resnet"
    channels: tuple[int, ...] = knob((32, 64), "output channels of the stages, each of which halves the image", ge=1, le=LARGEST_SIZE)
    blocks: int = knob(1, "residual blocks of a stage, in the encoder and in the decoder", ge=1, le=MOST_LAYERS)
    activation: Activation = knob("silu", "before each convolution of a block; smooth ones keep runs on other numbers of ranks equal")
    norm: Norm = knob("group", "before each activation; results with batch depend on the batch")
    dropout: float = knob(0.0, "share of a block's hidden values dropped in training", ge=0, le=0.95)
    output: Output = knob("identity", "the decoder's last step; sigmoid keeps it in [0, 1]")

    def __post_init__(self) -> None:
        if not self.channels:
            raise ConfigError("ResNetSpec.channels is empty, expected the channels of at least one stage, such as (32, 64)")
        stages, blocks = len(self.channels), self.blocks * len(self.channels)
        if blocks > MOST_LAYERS:
            raise ConfigError(
                f"ResNetSpec.blocks is {self.blocks} in each of {stages} stages, {blocks} together: expected at most {MOST_LAYERS}"
            )


@BACKBONES.register(ResNetSpec)
def build(resnet: ResNetSpec, input_shape: tuple[int, ...], latent_dim: int) -> Backbone:
    """Build for samples of `input_shape`: (n,), (C, L), (C, H, W) or (C, T, H, W)."""
    channels_first = with_channels(input_shape, "resnet")
    widths, sizes = (channels_first[0], *resnet.channels), halved(channels_first[1:], len(resnet.channels))
    num_features = widths[-1] * math.prod(sizes[-1])
    reshape = channels_first != input_shape
    encoder: list[nn.Module] = [nn.Unflatten(1, channels_first)] if reshape else []
    for before, after in pairwise(widths):
        encoder += [CONV[len(sizes[0])](before, after, 3, stride=2, padding=1), *_blocks(resnet, after, len(sizes[0]))]
    encoder += [*_ready(resnet, widths[-1], len(sizes[0])), nn.Flatten()]
    decoder: list[nn.Module] = [Linear(latent_dim, num_features), nn.Unflatten(1, (widths[-1], *sizes[-1]))]
    for stage in reversed(range(len(resnet.channels))):
        decoder += [*_blocks(resnet, widths[stage + 1], len(sizes[0])), *_ready(resnet, widths[stage + 1], len(sizes[0]))]
        padding = output_padding(sizes[stage])
        up = CONV_TRANSPOSE[len(sizes[0])](widths[stage + 1], widths[stage], 3, stride=2, padding=1, output_padding=padding)
        decoder.append(up)
    decoder += [nn.Flatten()] if reshape else []
    decoder += output_layers(resnet.output)
    return Backbone(
        nn.Sequential(*encoder),
        nn.Sequential(*decoder),
        num_features,
        bounded=resnet.output == "sigmoid",
        map_shape=(widths[-1], *sizes[-1]),
        map_decoder=nn.Sequential(*decoder[2:]),  # without the linear layer and its reshape
    )


class ResidualBlock(nn.Module):
    """x + f(x) of a map `[B, C, *axes]`; sizes and channels stay."""

    def __init__(self, resnet: ResNetSpec, channels: int, num_axes: int) -> None:
        super().__init__()
        first, second = (CONV[num_axes](channels, channels, 3, padding=1) for _ in range(2))
        drop = [nn.Dropout(resnet.dropout)] if resnet.dropout > 0 else []
        ready = [_ready(resnet, channels, num_axes) for _ in range(2)]
        self.residual = nn.Sequential(*ready[0], first, *ready[1], *drop, second)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the shape of `x`."""
        refined: Tensor = x + self.residual(x)
        return refined


def _blocks(resnet: ResNetSpec, channels: int, num_axes: int) -> list[nn.Module]:
    return [ResidualBlock(resnet, channels, num_axes) for _ in range(resnet.blocks)]


def _ready(resnet: ResNetSpec, channels: int, num_axes: int) -> list[nn.Module]:
    """Return the layers in front of a convolution: normalisation and activation."""
    return [*normalisation(resnet.norm, channels, num_axes), activation(resnet.activation)]
