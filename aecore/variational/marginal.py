r"""Estimates of log p(x) by importance sampling from the posterior, in float64.

.. math:: \log p(x) \ge E\Big[\log \tfrac1K \sum_{k=1}^K w_k\Big], \quad w_k = \frac{p(x|z_k)\, p(z_k)}{q(z_k|x)}, \quad z_k \sim q(z|x)

(Burda et al. 2015.) The bound rises with K and is log p(x) in the limit; K = 1 is the ELBO. The noise of a row depends on (seed, index,
K, its position in the global batch) alone: neither on the chunks nor on the number of ranks. So several models with one seed share
their noise, and their difference has less of it. The price: noise is drawn on the CPU, K x D numbers per row.
Legend: n rows, K samples, D latent.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from aecore._base.batch import Batch
from aecore._base.noise import seed_of, step_noise
from aecore._base.trainable import Trainable

BLOCK = 64  # samples of K whose noise is drawn at once; part of what the numbers are


def log_marginal(
    model: Trainable,
    batch: Batch,
    *,
    num_samples: int,
    seed: int = 0,
    index: int = 0,
    likelihood: str = "gaussian",
    chunk: int = 4096,
) -> Tensor:
    """Return the importance-sampled log p(x) of every row, `[n]` float64 in nats, with all constants.

    Parameters
    ----------
    model
        One with a posterior (`Trainable.log_weights`), in the mode that it shall be used in.
    batch
        Transformed samples on the model's device.
    num_samples
        K.
    seed, index
        Of the noise; `index` is the number of the batch in its split.
    likelihood
        Name of log p(x|z).
    chunk
        Latents decoded at once; memory grows with it, the result changes by rounding only.

    Raises
    ------
    ValueError
        K or `chunk` is below 1.
    ConfigError
        The model has no posterior.
    """
    total = torch.full((len(batch),), -torch.inf, dtype=torch.float64, device=batch.x.device)
    for rows, weights in _log_weights(model, batch, num_samples, seed, index, likelihood, chunk):
        total[rows] = torch.logaddexp(total[rows], weights.logsumexp(1))
    return total - math.log(num_samples)


def log_elbo(
    model: Trainable,
    batch: Batch,
    *,
    num_samples: int = 1,
    seed: int = 0,
    index: int = 0,
    likelihood: str = "gaussian",
    chunk: int = 4096,
) -> Tensor:
    """Return the ELBO of every row, the mean of its K log weights, `[n]` float64 in nats; arguments and errors as `log_marginal`.

    Its expectation does not depend on K, only its spread does. With one noise it never exceeds `log_marginal`.
    """
    total = torch.zeros(len(batch), dtype=torch.float64, device=batch.x.device)
    for rows, weights in _log_weights(model, batch, num_samples, seed, index, likelihood, chunk):
        total[rows] += weights.sum(1)
    return total / num_samples


def _log_weights(
    model: Trainable, batch: Batch, num_samples: int, seed: int, index: int, likelihood: str, chunk: int
) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of rows with some of their log weights `[rows, k]` float64, at most `chunk` of them, until every row had K."""
    if num_samples < 1:
        raise ValueError(f"num_samples must be >= 1, got {num_samples}: it is K, the number of importance samples per input")
    if chunk < 1:
        raise ValueError(f"chunk must be >= 1, got {chunk}: it is the number of latents that are decoded at once")
    for number, first in enumerate(range(0, num_samples, BLOCK)):
        size = min(BLOCK, num_samples - first)
        noise = _noise(model, batch, size, seed_of("marginal", seed, number), index)
        samples = min(size, chunk)
        for begin in range(0, len(batch), max(1, chunk // samples)):
            rows = slice(begin, min(begin + max(1, chunk // samples), len(batch)))
            part = _rows_of(batch, rows)
            for start in range(0, size, samples):
                yield rows, model.log_weights(part, noise[rows, start : start + samples].to(batch.x.device), likelihood=likelihood)


def _noise(model: Trainable, batch: Batch, num_samples: int, seed: int, index: int) -> Tensor:
    """Return noise `[n, num_samples, ...]`, drawn for the whole global batch; zeros for a model that takes none."""
    shape = model.noise_shape(num_samples)
    if shape is None:
        return torch.zeros(len(batch), num_samples)
    noise = step_noise(seed, index, (batch.num_global, *shape))
    return noise[batch.positions] if len(batch.positions) else noise[:1]


def _rows_of(batch: Batch, rows: slice) -> Batch:
    """Return some rows of a batch; `num_global` stays."""
    columns = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    parts: dict[str, Any] = {name: column[rows] for name, column in columns.items() if isinstance(column, Tensor)}  # any: for `replace`
    return dataclasses.replace(batch, **parts)
