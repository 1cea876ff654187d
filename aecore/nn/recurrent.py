"""Recurrent backbone: sequences `[T, ...]` of numbers or of token ids, of one length or (with model.kind=rvae) of many.

Each step goes through one layer, a GRU or LSTM runs over the steps, and the decoder unrolls another from the latent; see
`aecore.nn._recurrence`. A vector `(n,)` is n steps of one number; an image `(C, H, W)` is read row by row with `time_axis: 1`.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from aecore.errors import ConfigError
from aecore.nn._backbone import Activation, Backbone, Output, activation, output_layers
from aecore.nn._linear import Linear
from aecore.nn._recurrence import AsShape, Cell, RecurrentDecoder, RecurrentEncoder, steps_of
from aecore.registry import BACKBONES, LARGEST_SIZE, MOST_LAYERS, knob, spec


@spec
class RecurrentSpec:
    """A layer per step and a GRU or LSTM over the steps, and one back."""

    kind: Literal["recurrent"] = "recurrent"
    cell: Cell = knob("gru", "what runs over time")
    width: int = knob(64, "values of a step and of a state", ge=1, le=LARGEST_SIZE)
    layers: int = knob(1, "recurrent layers, of the encoder and of the decoder", ge=1, le=MOST_LAYERS)
    bidirectional: bool = knob(True, "the encoder also runs backwards over time")
    time_axis: int = knob(0, "axis of a sample that is time; 1 reads an image (C, H, W) row by row", ge=0)
    activation: Activation = knob("tanh", "after the layers of single steps; the cells have their own")
    norm: Literal["layer", "none"] = knob("none", "over the values of a step, before the activation")
    dropout: float = knob(0.0, "share of values dropped in front of every recurrent layer and of the last one, in training", ge=0, le=0.95)
    output: Output = knob("identity", "the decoder's last step; sigmoid keeps it in [0, 1]")


@BACKBONES.register(RecurrentSpec)
def build(recurrent: RecurrentSpec, input_shape: tuple[int, ...], latent_dim: int, num_levels: int = 0) -> Backbone:
    """Build for sequences of `input_shape`; a first axis of 0 means any number of steps.

    With `num_levels` = K samples are token ids in 0..K-1, and the decoder gives K logits for each: `[N, *input_shape, K]`.
    """
    num_steps, inside = steps_of(input_shape, recurrent.time_axis, "recurrent")
    if num_levels and recurrent.output != "identity":
        raise ConfigError(
            f"model.likelihood=categorical takes logits, but backbone.output={recurrent.output} squashes them: use backbone.output=identity"
        )
    width, size, tokens = recurrent.width, math.prod(inside), num_levels
    into: list[nn.Module] = [TokenEmbedding(tokens, inside, width)] if tokens else [AsShape((size,)), Linear(size, width)]
    encoder = RecurrentEncoder(
        nn.Sequential(*into, *_ready(recurrent)),
        recurrent.cell,
        width,
        layers=recurrent.layers,
        bidirectional=recurrent.bidirectional,
        dropout=recurrent.dropout,
        time_axis=recurrent.time_axis,
    )
    out = [Linear(width, width), *_ready(recurrent), Linear(width, size * (tokens or 1))]
    out.append(AsShape((*inside, tokens) if tokens else inside))
    decoder = RecurrentDecoder(
        nn.Sequential(*out, *output_layers(recurrent.output)),
        recurrent.cell,
        width,
        latent_dim,
        num_steps or 1,
        layers=recurrent.layers,
        dropout=recurrent.dropout,
        time_axis=recurrent.time_axis,
    )
    bounded = recurrent.output == "sigmoid"
    return Backbone(encoder, decoder, encoder.num_features, bounded=bounded, sequential=recurrent.time_axis == 0)


class TokenEmbedding(nn.Module):
    """Ids of a step, `[M, *inside]` as floats, -> `[M, W]`: the sum of their vectors; each place of a step has its own."""

    def __init__(self, num_tokens: int, inside: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.num_tokens, self.places = num_tokens, math.prod(inside)
        self.vectors = nn.Embedding(self.places * num_tokens, width)

    def forward(self, ids: Tensor) -> Tensor:
        """Look the ids up; one outside 0 .. num_tokens - 1 would be another place's, which `require_samples` of the model refuses."""
        ids = ids.reshape(ids.shape[0], -1).long()
        rows = ids + self.num_tokens * torch.arange(self.places, device=ids.device)
        summed: Tensor = self.vectors(rows).sum(1)
        return summed


def _ready(recurrent: RecurrentSpec) -> list[nn.Module]:
    norm = [nn.LayerNorm(recurrent.width)] if recurrent.norm == "layer" else []
    return [*norm, activation(recurrent.activation)]
