"""Hybrid backbone for videos `[T, C, H, W]` or `[T, H, W]`: convolutions in each frame, a GRU or LSTM over time.

The nets of a frame are those of the `conv` backbone, so any size of frame comes back exactly; time is `aecore.nn._recurrence`, so with
model.kind=rvae videos may differ in length. Convolutions in space and time at once are the `conv` backbone's, on `(C, T, H, W)`.
"""

from typing import Literal

from torch import nn

from aecore.errors import ConfigError
from aecore.nn._backbone import Activation, Backbone, Output, activation
from aecore.nn._linear import Linear
from aecore.nn._recurrence import AsShape, Cell, RecurrentDecoder, RecurrentEncoder, steps_of
from aecore.nn.conv import ConvSpec
from aecore.registry import BACKBONES, LARGEST_SIZE, MOST_LAYERS, knob, spec


@spec
class HybridSpec:
    """Strided convolutions per frame, a recurrent net over the frames, and both back."""

    kind: Literal["hybrid"] = "hybrid"
    channels: tuple[int, ...] = knob((16, 32), "output channels of the convolutions, each of which halves the frame", ge=1, le=LARGEST_SIZE)
    cell: Cell = knob("gru", "what runs over time")
    width: int = knob(64, "values of a frame between the convolutions and the recurrent layers, and of a state", ge=1, le=LARGEST_SIZE)
    layers: int = knob(1, "recurrent layers, of the encoder and of the decoder", ge=1, le=MOST_LAYERS)
    bidirectional: bool = knob(True, "the encoder also runs backwards over time")
    activation: Activation = knob("silu", "after each hidden layer of a frame")
    norm: Literal["group", "none"] = knob("group", "of the convolutions; no batch normalisation, which would see the padding")
    dropout: float = knob(0.0, "share of hidden values dropped in training", ge=0, le=0.95)
    output: Output = knob("identity", "the decoder's last step; sigmoid keeps it in [0, 1]")


@BACKBONES.register(HybridSpec)
def build(hybrid: HybridSpec, input_shape: tuple[int, ...], latent_dim: int, num_levels: int = 0) -> Backbone:
    """Build for videos of `input_shape`: (T, C, H, W), or (T, H, W) of one channel; a first axis of 0 means any number of frames."""
    if len(input_shape) not in (3, 4):
        raise ConfigError(
            f"backbone.kind=hybrid takes videos (T, C, H, W) or (T, H, W), these samples have the shape {input_shape}: "
            "use backbone.kind=recurrent for other sequences"
        )
    if num_levels:
        raise ConfigError("model.likelihood=categorical needs token ids and backbone.kind=recurrent: videos are scored as values")
    num_steps, frame = steps_of(input_shape, 0, "hybrid")
    channels_first = (1, *frame) if len(frame) == 2 else frame
    conv = ConvSpec(channels=hybrid.channels, activation=hybrid.activation, norm=hybrid.norm, dropout=hybrid.dropout, output=hybrid.output)
    nets = BACKBONES.build(conv, channels_first, hybrid.width)
    into = nn.Sequential(AsShape(channels_first), nets.encoder, Linear(nets.num_features, hybrid.width), activation(hybrid.activation))
    cell, width, layers, dropout = hybrid.cell, hybrid.width, hybrid.layers, hybrid.dropout
    encoder = RecurrentEncoder(into, cell, width, layers=layers, bidirectional=hybrid.bidirectional, dropout=dropout)
    back = nn.Sequential(nets.decoder, AsShape(frame))
    decoder = RecurrentDecoder(back, cell, width, latent_dim, num_steps or 1, layers=layers, dropout=dropout)
    return Backbone(encoder, decoder, encoder.num_features, bounded=nets.bounded, sequential=True)
