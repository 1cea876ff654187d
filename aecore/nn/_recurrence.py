"""GRU and LSTM layers over padded sequences, and the encoder and decoder made of them; a step net of each defines what a step is.

Steps behind a sequence's end change nothing: the encoder takes each direction's state at the last valid step, and runs backwards over a
copy that is reversed within its length. So nothing is packed, and forward and loss stay one `torch.compile` graph (which `nn.GRU` is
not; `torch.gru`, the function below it, is). The decoder is unrolled from z alone, see `RecurrentDecoder`.
Legend: B batch, N latents, T steps, W width of a step, D latent, L layers.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from aecore.errors import ConfigError
from aecore.nn._linear import Linear

Cell = Literal["gru", "lstm"]
_GATES = {"gru": 3, "lstm": 4}
MOST_STEPS = 1 << 16  # of a sequence whose length is fixed: they are computed one after the other


class Recurrence(nn.Module):
    """One layer in one direction: `[B, T, W]` and the first state `[B, W]` -> the states `[B, T, W]`."""

    def __init__(self, cell: Cell, width_in: int, width: int) -> None:
        super().__init__()
        self.cell = cell
        rows, bound = _GATES[cell] * width, 1 / math.sqrt(width)  # as torch's own layers
        shapes = {"weight_ih": (rows, width_in), "weight_hh": (rows, width), "bias_ih": (rows,), "bias_hh": (rows,)}
        self.weights = nn.ParameterDict({name: torch.empty(shape).uniform_(-bound, bound) for name, shape in shapes.items()})

    def forward(self, steps: Tensor, first: Tensor) -> Tensor:
        """Return the state after every step."""
        if steps.device.type == "meta":  # only the shape is asked for, and torch would go through every step
            return steps.new_empty(*steps.shape[:2], first.shape[1])
        state = first.unsqueeze(0).to(steps.dtype).contiguous()
        weights = [self.weights[name] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        if self.cell == "gru":
            return torch.gru(steps, state, weights, True, 1, 0.0, self.training, False, True)[0]
        return torch.lstm(steps, [state, torch.zeros_like(state)], weights, True, 1, 0.0, self.training, False, True)[0]


class RecurrentEncoder(nn.Module):
    """Sequences `[B, T, ...]` -> features `[B, F]`: the top layer's state after the last valid step, of each direction.

    Parameters
    ----------
    step
        Net of single steps, `[M, ...]` -> `[M, W]`.
    cell, width, layers, bidirectional
        What runs over time.
    dropout
        Share of values dropped in front of every layer in training.
    time_axis
        Axis of a sample that is time.
    """

    def __init__(
        self, step: nn.Module, cell: Cell, width: int, *, layers: int, bidirectional: bool, dropout: float, time_axis: int = 0
    ) -> None:
        super().__init__()
        self.step, self.time_axis = step, time_axis
        directions = 2 if bidirectional else 1
        widths = [width, *[directions * width] * (layers - 1)]
        self.forwards = nn.ModuleList(Recurrence(cell, size, width) for size in widths)
        self.backwards = nn.ModuleList(Recurrence(cell, size, width) for size in (widths if bidirectional else ()))
        self.first = nn.Parameter(0.1 * torch.randn(layers, directions, 1, width))  # learned first states
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.num_features = directions * width

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Encode `x`; `lengths [B]` int64 says how many steps of each are valid (at least 1), None: all."""
        steps = _per_step(self.step, x.movedim(1 + self.time_axis, 1))
        for number, layer in enumerate(self.forwards):
            steps, first = self.dropout(steps), self.first[number].expand(-1, len(steps), -1)
            states = [layer(steps, first[0])]
            if len(self.backwards):
                states.append(self.backwards[number](reverse(steps, lengths), first[1]))
            if number + 1 < len(self.forwards):
                steps = torch.cat([states[0], *(reverse(back, lengths) for back in states[1:])], 2)
        return torch.cat([at_last(each, lengths) for each in states], 1)


class RecurrentDecoder(nn.Module):
    """Latents `[N, D]` -> sequences `[N, T, ...]`: z is the first state and, with a sine code of the time, the input of every step.

    Unrolled from z alone, not fed with the true earlier steps (Bowman et al. 2016 feed them, with words dropped). Then p(x|z) is the
    product over the steps, so the mean of x given z is what the decoder gives, generating needs no loop over samples, training
    and generation are the same computation, and the decoder cannot explain the data without z: the latents are what this package is for.
    Its price: text is less fluent than from a decoder that reads its own words.

    Parameters
    ----------
    step
        Net of single steps, `[M, W]` -> `[M, ...]`.
    num_steps
        T where `forward` gets no `num_steps`.
    """

    def __init__(
        self,
        step: nn.Module,
        cell: Cell,
        width: int,
        latent_dim: int,
        num_steps: int,
        *,
        layers: int,
        dropout: float,
        time_axis: int = 0,
    ) -> None:
        super().__init__()
        self.step, self.num_steps, self.time_axis, self.num_layers = step, num_steps, time_axis, layers
        self.first = Linear(latent_dim, layers * width)
        self.input = Linear(latent_dim, width)
        self.layers = nn.ModuleList(Recurrence(cell, width, width) for _ in range(layers))
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()

    def forward(self, z: Tensor, num_steps: int | None = None) -> Tensor:
        """Decode `z` to `num_steps` steps."""
        first = torch.tanh(self.first(z)).reshape(len(z), self.num_layers, -1)
        inputs = self.input(z)
        code = time_code(self.num_steps if num_steps is None else num_steps, inputs.shape[1], inputs.device)
        steps = inputs.unsqueeze(1) + code.to(inputs.dtype)
        for number, layer in enumerate(self.layers):
            steps = layer(self.dropout(steps), first[:, number])
        return _per_step(self.step, self.dropout(steps)).movedim(1, 1 + self.time_axis)


class AsShape(nn.Module):
    """Gives each sample another shape of the same size: a number its axis, a gray frame its channel, and back."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        """Return `[M, *shape]`."""
        return x.reshape(-1, *self.shape)


def at_last(states: Tensor, lengths: Tensor | None) -> Tensor:
    """Return the state `[B, W]` of the last valid step of `[B, T, W]`."""
    if lengths is None:
        return states[:, -1]
    return states.gather(1, (lengths - 1).view(-1, 1, 1).expand(-1, 1, states.shape[2])).squeeze(1)


def reverse(steps: Tensor, lengths: Tensor | None) -> Tensor:
    """Return `[B, T, W]` with the valid steps of each row in reverse; those behind its end stay where they are."""
    if lengths is None:
        return steps.flip(1)
    places = torch.arange(steps.shape[1], device=steps.device).expand(steps.shape[:2])
    back = lengths.unsqueeze(1) - 1 - places
    return steps.gather(1, torch.where(back >= 0, back, places).unsqueeze(2).expand_as(steps))


def time_code(num_steps: int, width: int, device: torch.device) -> Tensor:
    """Return sines and cosines of the step's number at wave lengths from 2 pi to 20,000 pi (Vaswani et al. 2017), `[T, W]`."""
    half = (width + 1) // 2
    rates = torch.exp(torch.arange(half, device=device) * (-math.log(10_000.0) / max(half - 1, 1)))
    angles = torch.arange(num_steps, device=device).unsqueeze(1) * rates
    return torch.stack([angles.sin(), angles.cos()], 2).flatten(1)[:, :width]


def steps_of(input_shape: tuple[int, ...], time_axis: int, kind: str) -> tuple[int, tuple[int, ...]]:
    """Return the number of steps (0: varying) and the shape of one step; a vector `(n,)` is n steps of one number, of shape ().

    Raises ConfigError if there is no such axis, if it is too long, or if sequences vary in length and time is not their first axis.
    """
    if time_axis >= len(input_shape):
        raise ConfigError(f"backbone.kind={kind} takes samples with an axis {time_axis} for time, these have the shape {input_shape}")
    if 0 in input_shape and time_axis != 0:
        raise ConfigError(f"sequences of different lengths have their time first, backbone.time_axis is {time_axis}: set it to 0")
    if input_shape[time_axis] > MOST_STEPS:
        raise ConfigError(
            f"backbone.kind={kind} goes through time step by step, these samples have {input_shape[time_axis]:,} (shape {input_shape}), "
            f"expected at most {MOST_STEPS:,}: cut or subsample them, or use backbone.kind=conv"
        )
    return input_shape[time_axis], (*input_shape[:time_axis], *input_shape[time_axis + 1 :])


def _per_step(net: nn.Module, steps: Tensor) -> Tensor:
    """Apply a net of single samples to every step of `[B, T, ...]`."""
    out: Tensor = net(steps.flatten(0, 1)).unflatten(0, steps.shape[:2])
    return out
