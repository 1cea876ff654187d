"""Transformer backbone: patches of a sample are tokens (Dosovitskiy et al. 2021), pre-norm blocks, learned positions.

Every axis behind the channels is cut into patches of one side; what the last patch lacks is filled with zeros and cut off again, so any
size comes back exactly. Attention costs the square of the number of patches: by default the side is chosen so that there are at most 64.
Features are all tokens side by side, so no patch is averaged away before the latent; a vector `(n,)` is one channel of length n.
Legend: B batch, N latents, T tokens, W width.
"""

import math
from bisect import bisect_left
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aecore.errors import ConfigError
from aecore.nn._backbone import Activation, Backbone, Output, activation, output_layers
from aecore.nn._linear import Linear
from aecore.registry import BACKBONES, LARGEST_SIZE, MOST_LAYERS, knob, spec

MOST_TOKENS = 64


@spec
class AttentionSpec:
    """Transformer blocks over the patches of a sample, and the same number of them back."""

    kind: Literal["attention"] = "attention"
    patch: int = knob(
        0, "side of a patch along every axis behind the channels; 0: the smallest that gives at most 64 patches", ge=0, le=LARGEST_SIZE
    )
    width: int = knob(32, "values of a token; a multiple of heads", ge=1, le=LARGEST_SIZE)
    depth: int = knob(2, "transformer blocks of the encoder, and of the decoder", ge=1, le=MOST_LAYERS)
    heads: int = knob(4, "attention heads of a block", ge=1, le=LARGEST_SIZE)
    activation: Activation = knob("silu", "between the two layers behind each attention")
    norm: Literal["layer", "none"] = knob("layer", "over the values of a token, before attention, before its layers and at the end")
    dropout: float = knob(0.0, "share of what a block adds to its tokens that is dropped in training", ge=0, le=0.95)
    output: Output = knob("identity", "the decoder's last step; sigmoid keeps it in [0, 1]")

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ConfigError(f"AttentionSpec.width is {self.width}, expected a multiple of heads={self.heads}")


@BACKBONES.register(AttentionSpec)
def build(attention: AttentionSpec, input_shape: tuple[int, ...], latent_dim: int) -> Backbone:
    """Build for samples of `input_shape`: (n,) or (C, ...) with any number of axes behind the channels."""
    if not input_shape:
        raise ConfigError("backbone.kind=attention takes samples with at least 1 axis, these are single numbers: use backbone.kind=mlp")
    patches = Patches(input_shape, attention.patch)
    width, tokens = attention.width, patches.num_tokens
    encoder = [patches, Linear(patches.values, width), Positions(tokens, width), *_blocks(attention), nn.Flatten()]
    start = [Linear(latent_dim, tokens * width, bias=False), nn.Unflatten(1, (tokens, width)), Positions(tokens, width)]
    decoder = [*start, *_blocks(attention), Linear(width, patches.values), Pixels(patches), *output_layers(attention.output)]
    return Backbone(nn.Sequential(*encoder), nn.Sequential(*decoder), tokens * width, bounded=attention.output == "sigmoid")


def smallest_side(axes: tuple[int, ...]) -> int:
    """Return the smallest side of patches of which there are at most `MOST_TOKENS`."""
    sides = range(1, max(axes, default=1) + 1)  # the last one gives a single patch
    return 1 + bisect_left(sides, True, key=lambda side: math.prod(-(-n // side) for n in axes) <= MOST_TOKENS)


class Patches(nn.Module):
    """`[B, *input_shape]` -> `[B, T, values]`: the values of each patch, all channels; the ends are filled with zeros."""

    def __init__(self, input_shape: tuple[int, ...], side: int = 0) -> None:
        super().__init__()
        self.input_shape = input_shape
        self.channels, *axes = (1, *input_shape) if len(input_shape) == 1 else input_shape
        self.axes = tuple(axes)
        self.side = side or smallest_side(self.axes)
        self.counts = tuple(-(-n // self.side) for n in self.axes)
        self.num_tokens = math.prod(self.counts)
        self.values = self.channels * self.side ** len(axes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the patches in the order of their axes."""
        fill = [pad for n, count in zip(reversed(self.axes), reversed(self.counts), strict=True) for pad in (0, count * self.side - n)]
        cut = F.pad(x.reshape(-1, self.channels, *self.axes), fill)
        cut = cut.reshape(-1, self.channels, *(size for count in self.counts for size in (count, self.side)))
        places, insides = range(2, cut.ndim, 2), range(3, cut.ndim, 2)
        return cut.permute(0, *places, 1, *insides).reshape(-1, self.num_tokens, self.values)


class Pixels(nn.Module):
    """The way back from `Patches`: `[N, T, values]` -> `[N, *input_shape]`."""

    def __init__(self, patches: Patches) -> None:
        super().__init__()
        self.input_shape, self.channels, self.axes = patches.input_shape, patches.channels, patches.axes
        self.side, self.counts = patches.side, patches.counts

    def forward(self, tokens: Tensor) -> Tensor:
        """Put the patches together and cut off what they filled."""
        num_axes = len(self.axes)
        parts = tokens.reshape(-1, *self.counts, self.channels, *[self.side] * num_axes)
        order = [axis for place in range(num_axes) for axis in (1 + place, 2 + num_axes + place)]
        whole = parts.permute(0, 1 + num_axes, *order).reshape(-1, self.channels, *(count * self.side for count in self.counts))
        for axis, size in enumerate(self.axes, start=2):
            whole = whole.narrow(axis, 0, size)
        return whole.reshape(-1, *self.input_shape)


class Positions(nn.Module):
    """Adds one learned vector to each token: attention alone ignores the order of tokens."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(0.02 * torch.randn(tokens, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return `[B, T, W]`."""
        return tokens + self.positions


class Block(nn.Module):
    """Self-attention and two layers, each added to what came in (pre-norm, Xiong et al. 2020). `[B, T, W]` -> `[B, T, W]`."""

    def __init__(self, attention: AttentionSpec) -> None:
        super().__init__()
        width, self.heads = attention.width, attention.heads
        self.before_attention, self.before_layers = _norm(attention), _norm(attention)
        self.queries_keys_values = Linear(width, 3 * width, bias=False)  # a bias of the keys would cancel in the softmax
        self.gathered = Linear(width, width)
        self.layers = nn.Sequential(Linear(width, 4 * width), activation(attention.activation), Linear(4 * width, width))
        self.dropout = nn.Dropout(attention.dropout) if attention.dropout > 0 else nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        """Let each token look at all of them."""
        tokens = tokens + self.dropout(self._attend(self.before_attention(tokens)))
        added: Tensor = self.dropout(self.layers(self.before_layers(tokens)))
        return tokens + added

    def _attend(self, tokens: Tensor) -> Tensor:
        heads = self.queries_keys_values(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(heads[0], heads[1], heads[2])
        gathered: Tensor = self.gathered(seen.transpose(1, 2).flatten(2))
        return gathered


def _blocks(attention: AttentionSpec) -> list[nn.Module]:
    return [*(Block(attention) for _ in range(attention.depth)), _norm(attention)]


def _norm(attention: AttentionSpec) -> nn.Module:
    return nn.LayerNorm(attention.width) if attention.norm == "layer" else nn.Identity()
