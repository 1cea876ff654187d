"""Exact sums over a split: contiguous ranges cut on batch boundaries, the unwrapped model, one all-reduce, a count that must agree.

The ELBO is sampled (S = 1, beta 1) with noise from (seed, batch index), never taken at z = mu, which reads 5-6 nats too good on
MNIST. Samples are scored one by one, also by a model that trains on pairs: then it is the ELBO of the VAE inside, while the training
objective sums over both inputs of a pair.

The batch size is part of the definition of the noise, the number of ranks is not: any number of them gives the same means.

`require_finite_samples` looks for NaN in the samples themselves, once, when a loss that is not finite has stopped training.
"""

from collections.abc import Callable, Iterable
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from aecore._base.batch import Batch
from aecore._base.trainable import Trainable
from aecore.data.read.loader import Loader
from aecore.data.read.rows import SplitRows
from aecore.errors import ConfigError, DataError, Hint
from aecore.training.objective import Objective, noise_for
from aecore.training.ranks import Rank, all_sum

# a model, a scaled batch and its number in; out: name -> sums over its rows, any shape
Terms = Callable[[Trainable, Batch, int], dict[str, Tensor]]

_VERIFY = " (aecore.data.read.verify.verify_dataset)"  # for users of the library


def validate(objective: Objective, loader: Loader, *, seed: int, batch: int, rank: Rank) -> dict[str, float]:
    """Return `split_means` as floats: `loss` (at beta 1), the model's own terms, and `mse` at the posterior mean."""
    return {name: float(mean) for name, mean in split_means(objective, loader, seed=seed, batch=batch, rank=rank).items()}


def split_means(
    objective: Objective, loader: Loader, *, seed: int, batch: int, rank: Rank, extra: Terms | None = None
) -> dict[str, Tensor]:
    """Return the means over the loader's split (float64, on the CPU, the same on all ranks): those of `validate`, then `extra`.

    Every sample counts exactly once; DataError if the count is not the manifest's. `batch` is in samples per global batch.
    """
    if batch < 1:
        raise ConfigError(f"validation in batches of {batch} samples: expected at least 1")
    num_batches = -(-loader.num_samples // batch)
    first, last = rank.rank * num_batches // rank.world_size, (rank.rank + 1) * num_batches // rank.world_size
    weight = 1.0
    if first == last:  # more ranks than batches: this one still needs the names and shapes of the terms
        first, last, weight = 0, 1, 0.0
    with closing(loader.range_batches(first * batch, min(last * batch, loader.num_samples), batch)) as batches:
        sums = _sums(objective, enumerate(batches, first), seed, rank.device, extra)
    packed = all_sum(rank, torch.cat([value.flatten() for value in sums.values()]) * weight)
    totals = dict(zip(sums, torch.split(packed, [value.numel() for value in sums.values()]), strict=True))
    if (count := int(totals.pop("count"))) != loader.num_samples:
        dataset, split = loader.rows.dataset.url, loader.rows.split
        raise DataError(
            f"{count} samples of split {split!r} were read, the manifest of {dataset} says {loader.num_samples}: "
            f"verify it with read_data{_VERIFY}",
            hint=Hint("damaged-dataset", {"url": dataset, "python": _VERIFY}),
        )
    return {name: total.reshape(sums[name].shape) / loader.num_samples for name, total in totals.items()}


@torch.no_grad()
def _sums(objective: Objective, batches: Iterable[tuple[int, Batch]], seed: int, device: str, extra: Terms | None) -> dict[str, Tensor]:
    """Return the float64 sums over numbered stored batches, on `device`; no batch waits for the sums of the one before."""
    was_training = objective.training
    objective.eval()
    sums: dict[str, Tensor] = {}
    try:
        for number, stored in batches:
            objective.model.require_samples(stored)
            ready = objective.transform(objective.transform.draw(stored.to(device), seed, number))
            terms = _terms(objective, ready, noise_for(objective.model, ready, seed, number))
            if extra is not None:
                terms |= extra(objective.model, ready, number)
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value.to(device, torch.float64)
    finally:
        objective.train(was_training)
    return sums


def _terms(objective: Objective, ready: Batch, eps: Tensor | None) -> dict[str, Tensor]:
    """Return sums over the rows of a scaled batch: how many, the loss at beta 1 and its terms, squared error per element at z = mu."""
    result = objective.model.loss(ready, eps=eps, beta=1.0, likelihood=objective.likelihood)
    error = objective.model.reconstruct(ready, likelihood=objective.likelihood) - ready.x
    return {
        "count": ready.x.new_full((), len(ready), dtype=torch.float64),
        **{name: mean.double() * len(ready) for name, mean in result.reported.items()},
        "mse": ready.mean_per_row(error.double().square()).sum(),
    }


def require_finite_samples(batches: Iterable[Batch], rows: SplitRows) -> None:
    """Raise DataError naming the first sample of these batches that holds NaN or infinity; `rows` is the split they were read from."""
    for batch in batches:
        instances = batch.x if batch.mask is None else batch.x[batch.mask.bool()]
        values = instances[: len(batch.ordinals)].flatten(1)
        wrong = (~torch.isfinite(values)).sum(1)
        bad = wrong.nonzero().flatten()
        if len(bad):
            ordinal, count = int(batch.ordinals[bad[0]]), int(wrong[bad[0]])
            raise DataError(
                f"{rows.dataset.url}: sample {_key(rows, ordinal)!r} (ordinal {ordinal} of split {rows.split!r}) holds NaN or infinity in "
                f"{count:,} of {values.shape[1]:,} values, as {len(bad):,} of {len(values):,} samples of its batch do: no loss of it is "
                "finite. Repair or leave out such samples and shard into another dataset; shards.check=decode puts them into the quarantine"
            )


def _key(rows: SplitRows, ordinal: int) -> str:
    for number in range(len(rows.shards)):
        index: Any = rows.index(number)  # any: pyarrow's stubs know no type of a column of a file
        found = (index["ordinal"].to_numpy() == ordinal).nonzero()[0]
        if len(found):
            return str(index["key"][int(found[0])].as_py())
    raise DataError(
        f"{rows.dataset.url}: split {rows.split!r} has no sample of ordinal {ordinal}: verify it{_VERIFY}",
        hint=Hint("damaged-dataset", {"url": rows.dataset.url, "python": _VERIFY}),
    )
