"""Fully connected backbone: flattens any input, the decoder mirrors the hidden sizes."""

import math
from itertools import pairwise
from typing import Literal

from torch import nn

from aecore.nn._backbone import Activation, Backbone, Norm, Output, hidden, output_layers
from aecore.nn._linear import Linear
from aecore.registry import BACKBONES, LARGEST_SIZE, knob, spec


@spec
class MLPSpec:
    """Fully connected encoder and its mirror image."""

    kind: Literal["mlp"] = "mlp"
    hidden: tuple[int, ...] = knob((256, 256), "widths of the encoder's layers; the decoder has them in reverse", ge=1, le=LARGEST_SIZE)
    activation: Activation = knob("silu", "after each hidden layer; smooth ones keep runs on other numbers of ranks equal")
    norm: Norm = knob("none", "before each activation; results with batch depend on the batch")
    dropout: float = knob(0.0, "share of hidden units dropped in training", ge=0, le=0.95)
    output: Output = knob("identity", "the decoder's last step; sigmoid keeps it in [0, 1]")


@BACKBONES.register(MLPSpec)
def build(mlp: MLPSpec, input_shape: tuple[int, ...], latent_dim: int) -> Backbone:
    """Build for samples of `input_shape`, which come back in that shape."""
    size = math.prod(input_shape)
    encoder = [nn.Flatten(), *_stack(mlp, (size, *mlp.hidden))]
    widths = (latent_dim, *reversed(mlp.hidden))
    decoder = [*_stack(mlp, widths), Linear(widths[-1], size), nn.Unflatten(1, input_shape), *output_layers(mlp.output)]
    num_features = mlp.hidden[-1] if mlp.hidden else size
    return Backbone(nn.Sequential(*encoder), nn.Sequential(*decoder), num_features, bounded=mlp.output == "sigmoid")


def _stack(mlp: MLPSpec, widths: tuple[int, ...]) -> list[nn.Module]:
    bias = mlp.norm != "batch"  # batch norm would subtract it again
    return [
        layer
        for before, after in pairwise(widths)
        for layer in hidden(Linear(before, after, bias=bias), after, act=mlp.activation, norm=mlp.norm, dropout=mlp.dropout)
    ]
