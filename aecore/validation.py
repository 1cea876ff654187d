"""Exact sums over a split: contiguous ranges cut on batch boundaries, the unwrapped model, one all-reduce, a count that must agree.

The ELBO is sampled (S = 1, beta 1) with noise from (seed, batch index), never taken at z = mu, which reads 5-6 nats too good on
MNIST. The batch size is part of the definition of the noise, not of who computes it: any number of ranks gives the same numbers.
"""

import torch
from torch import Tensor

from aecore._base.batch import Batch
from aecore.data.loader import Loader
from aecore.errors import DataError
from aecore.objective import Objective, noise_for
from aecore.ranks import Rank, all_sum


def validate(objective: Objective, loader: Loader, *, seed: int, batch: int, rank: Rank) -> dict[str, float]:
    """Return the means over the loader's split: `loss` (at beta 1), the model's own terms, and `mse` at the posterior mean.

    Every sample counts exactly once; DataError if the count is not the manifest's. `batch` is in samples per global batch.
    """
    num_batches = -(-loader.num_samples // batch)
    first, last = rank.index * num_batches // rank.world, (rank.index + 1) * num_batches // rank.world
    weight = 1.0
    if first == last:  # more ranks than batches: this one still has to know the names of the terms
        first, last, weight = 0, 1, 0.0
    names, total = _sums(objective, loader, range(first, last), seed, batch, rank)
    everything = all_sum(rank, total * weight)
    if int(everything[0]) != loader.num_samples:
        raise DataError(
            f"validation read {int(everything[0])} samples, the manifest says {loader.num_samples}: run `aepipe verify` on the dataset"
        )
    return {name: value / loader.num_samples for name, value in zip(names, everything[1:].tolist(), strict=True)}


@torch.no_grad()
def _sums(objective: Objective, loader: Loader, batches: range, seed: int, batch: int, rank: Rank) -> tuple[list[str], Tensor]:
    """Return the names of the terms, and `[1 + terms]` sums: the count first."""
    was_training = objective.training
    objective.eval()
    names: list[str] = []
    sums = []
    try:
        rows = loader.range_batches(batches.start * batch, min(batches.stop * batch, loader.num_samples), batch)
        for number, one in zip(batches, rows, strict=True):
            moved = one.to(rank.device)
            result = objective(moved, noise_for(objective.model, moved, seed, number), 1.0)
            means = {"loss": result.objective, **result.tensors, "mse": _mse(objective, moved)}
            names = list(means)
            values = torch.stack([mean.double() for mean in means.values()])
            sums.append(torch.cat([values.new_ones(1), values]) * len(one))
    finally:
        objective.train(was_training)
    return names, torch.stack(sums).sum(0)


def _mse(objective: Objective, batch: Batch) -> Tensor:
    """Return the mean squared error of the reconstruction at the posterior mean, per element of the (scaled) data."""
    ready = objective.transform(batch)
    difference = objective.model.reconstruct(ready, likelihood=objective.likelihood) - ready.x.float()
    return difference.square().mean()
