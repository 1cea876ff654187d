"""The one batch type: loaders yield it, a model's `loss` and `latents` take it."""

import dataclasses
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """The part of one global batch that one rank works on; n rows, possibly all of it.

    Attributes
    ----------
    x
        `[n, ...]` samples in the stored dtype (uint8 images as `[n, C, H, W]`) until a transform makes them float.
    ordinals
        `[n]` int64, planned position of each sample in its split; keys are looked up in the index, not carried.
    positions
        `[n]` int64, position of each row in the global batch; noise drawn for the whole batch is sliced by it.
    num_global
        Rows of the global batch over all ranks.
    x_pair, label, mask, lengths
        Second view, class ids, valid instances, sequence lengths; None where the data have none.

    A batch of bags has a `mask [bags, N]`, N instances in the longest bag: then `x` is `[bags, N, ...]` and `label [bags, N]`, padded
    with 0 and -1; `ordinals`, `positions` and `num_global` are of the instances, bag by bag, without padding. So noise is drawn per
    instance, and a mean over instances has the weight `len(positions)`.
    """

    x: Tensor
    ordinals: Tensor
    positions: Tensor
    num_global: int
    x_pair: Tensor | None = None
    label: Tensor | None = None
    mask: Tensor | None = None
    lengths: Tensor | None = None

    @classmethod
    def blank(cls, input_shape: tuple[int, ...], device: torch.device | str = "cpu") -> "Batch":
        """Return one row of zeros of class 0 (one step of a sequence of any length), to find out the shapes of a model's outputs."""
        one = torch.zeros(1, dtype=torch.int64)
        label = one.to(device)
        x = torch.zeros(1, *(size or 1 for size in input_shape), device=device)
        return cls(x, one, one, 1, label=label, lengths=label + 1 if 0 in input_shape else None)

    def mean_per_row(self, values: Tensor) -> Tensor:
        """Return the means `[n]` of values `[n, T, ...]`, or of values like `x`; steps beyond a sequence's end do not count."""
        if self.lengths is None:
            return values.flatten(1).mean(1)
        valid = torch.arange(values.shape[1], device=values.device) < self.lengths[:, None]
        steps = values.flatten(2).mean(2) if values.ndim > 2 else values
        return torch.where(valid, steps, 0).sum(1) / self.lengths

    def __len__(self) -> int:
        return int(self.x.shape[0])

    def split(self, rows: int) -> "list[Batch]":
        """Return the batch in pieces of `rows` rows, the last one shorter; all count as parts of the same global batch."""
        assert self.mask is None, "a batch of bags has no rows of its own"
        if len(self) <= rows:
            return [self]
        columns = (self.x, self.ordinals, self.positions, self.x_pair, self.label, self.lengths)
        pieces = [() if column is None else torch.split(column, rows) for column in columns]
        return [
            Batch(x, ordinals, positions, self.num_global, x_pair, label, None, lengths)
            for x, ordinals, positions, x_pair, label, lengths in itertools.zip_longest(*pieces)
        ]

    def padded(self, rows: int) -> "Batch":
        """Return the batch with its last row repeated until it has `rows` rows; `num_global` stays."""
        return self.take(torch.arange(rows).clamp(max=len(self) - 1))

    def take(self, rows: Tensor) -> "Batch":
        """Return these rows `[n]` int64 of the batch, in this order; `num_global` stays."""
        assert self.mask is None, "a batch of bags has no rows of its own"
        columns = (self.x, self.ordinals, self.positions, self.x_pair, self.label, self.lengths)
        x, ordinals, positions, x_pair, label, lengths = (None if each is None else each[rows.to(each.device)] for each in columns)
        assert x is not None and ordinals is not None and positions is not None
        return Batch(x, ordinals, positions, self.num_global, x_pair, label, None, lengths)

    def with_steps(self, steps: int) -> "Batch":
        """Return a batch of sequences `[n, T, ...]` with T = `steps`, at least the longest of them; more are filled with zeros."""
        missing = max(0, steps - self.x.shape[1])
        x = torch.cat([self.x[:, :steps], self.x.new_zeros(len(self), missing, *self.x.shape[2:])], 1)
        return dataclasses.replace(self, x=x)

    def placed(self, rows: Tensor) -> Tensor:
        """Return values of rows `[n, ...]` in the layout of `x`: unchanged, or of instances as bags `[bags, N, ...]` with 0 for padding."""
        if self.mask is None:
            return rows
        mask = self.mask.to(rows.device).bool()
        places = mask.reshape(*mask.shape, *(1 for _ in rows.shape[1:]))
        return rows.new_zeros(*mask.shape, *rows.shape[1:]).masked_scatter(places, rows)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """Return the batch with its sample tensors on `device` (ordinals and positions stay where they are)."""

        def move(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.to(device, non_blocking=non_blocking)

        x = self.x.to(device, non_blocking=non_blocking)
        return Batch(
            x, self.ordinals, self.positions, self.num_global, move(self.x_pair), move(self.label), move(self.mask), move(self.lengths)
        )
