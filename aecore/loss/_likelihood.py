r"""Observation models p(x | x_hat), always in float32 or better.

| name | x_hat | log p per element, `full` terms in brackets | mean |
|---|---|---|---|
| gaussian | mean | :math:`-\tfrac12 ((x - \hat x) / s)^2 - \log s \; [-\tfrac12 \log 2\pi]` | x_hat |
| laplace | median | :math:`-|x - \hat x| / s - \log s \; [-\log 2]` | x_hat |
| bernoulli | logits | :math:`x \log \sigma(\hat x) + (1 - x) \log (1 - \sigma(\hat x))`, x in [0, 1] | sigmoid |
| categorical | logits of K classes, on a last axis | :math:`\hat x_k - \log \sum_j e^{\hat x_j}`, x = k in 0..K-1 | mean class id |

Without `full` the constants that depend on nothing are left out, as the seeds have it; the scale s is no constant. Another likelihood
is one more row here, one function and one line of `_DENSITIES`. Legend: B batch, S Monte Carlo samples, K classes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor

from aecore.errors import did_you_mean
from aecore.loss._precision import at_least_float32, without_autocast


class LikelihoodType(StrEnum):
    """How the decoder's output is read: see the table of this module."""

    GAUSSIAN = "gaussian"
    BERNOULLI = "bernoulli"
    LAPLACE = "laplace"
    CATEGORICAL = "categorical"


LOGITS = frozenset({LikelihoodType.BERNOULLI, LikelihoodType.CATEGORICAL})  # these read the decoder's output as logits and have no scale
_NAMES = {str(member): member for member in LikelihoodType}


def parse_likelihood(likelihood: str | LikelihoodType) -> LikelihoodType:
    """Return the type of a name in any case; ValueError with the nearest known name for an unknown one."""
    known = _NAMES.get(likelihood.lower())
    if known is None:
        raise ValueError(f"{str(likelihood)!r} is not a valid LikelihoodType{did_you_mean(likelihood.lower(), _NAMES)}")
    return known


def log_likelihood(
    x: Tensor,
    x_hat: Tensor,
    likelihood: str | LikelihoodType = LikelihoodType.GAUSSIAN,
    *,
    scale: float | Tensor = 1.0,
    full: bool = False,
) -> Tensor:
    """Return the elementwise log p(x | x_hat), of the shape of `x`.

    Parameters
    ----------
    x, x_hat
        One shape; for categorical `x_hat` has one more axis at the end, of K logits, and `x` holds class ids of any dtype.
    likelihood
        Name in any case.
    scale
        Standard deviation of the Gaussian, mean deviation of the Laplace distribution; a scalar, in the units of x.
    full
        Add the normalising constants, so that the result is a log density (a log probability for bernoulli and categorical).

    Returns
    -------
    Tensor
        Float32 or better. What has no probability at all (a class id that is no whole number in 0..K-1) has -inf.

    Raises
    ------
    ValueError
        The shapes differ (nothing is broadcast), the likelihood is unknown, or a scale is not positive or not used.
    """
    name = parse_likelihood(likelihood)
    _require_scale(name, scale)
    _require_one_shape(name, x.shape, x_hat.shape)
    x, x_hat = _as_floats(x, x_hat)
    density = _DENSITIES[name]
    with without_autocast(x_hat):
        value = density.misfit(x, x_hat) * density.weight(scale)
        offset = density.offset(scale, full)
        return value if _is(offset, 0.0) else value + offset


def row_log_likelihood(
    x: Tensor, x_hat: Tensor, likelihood: str | LikelihoodType = LikelihoodType.GAUSSIAN, *, full: bool = False
) -> Tensor:
    """Return log p(x | x_hat) summed over all axes but the first: `[B]`, of arguments as `log_likelihood` takes them."""
    name = parse_likelihood(likelihood)
    _require_one_shape(name, x.shape, x_hat.shape)
    return _summed(name, *_as_floats(x, x_hat), 1, 1.0, full)


def sample_log_likelihood(
    x: Tensor,
    x_hat: Tensor,
    likelihood: str | LikelihoodType = LikelihoodType.GAUSSIAN,
    *,
    scale: float | Tensor = 1.0,
    full: bool = False,
    dtype: torch.dtype | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Return log p(x | x_hat) summed over features: `[B, S]` for `x [B, ...]` and `x_hat [B, S, ...]` (categorical: `[B, S, ..., K]`).

    `dtype` is that of the sum: float64 where thousands of features must add up to a hundredth of a nat. `valid`, bool of the shape of `x`,
    says which features count: those behind the end of a sequence do not.

    Raises
    ------
    ValueError
        `x_hat` is not `[B, S, *x.shape[1:]]`; a missing S axis is never inferred. Else as `log_likelihood`.
    """
    name = parse_likelihood(likelihood)
    classes = x_hat.shape[-1:] if name is LikelihoodType.CATEGORICAL else ()
    wanted = (*x.shape[1:], *classes)
    _require_scale(name, scale)
    if x_hat.ndim != len(wanted) + 2 or x_hat.shape[0] != x.shape[0] or x_hat.shape[2:] != wanted or x_hat.shape[1] < 1:
        last = ("K",) if classes else ()
        expected = f"[{', '.join(map(str, (x.shape[0], 'S', *x.shape[1:], *last)))}]"
        raise ValueError(
            f"x_hat must have the shape [B, S, *x.shape[1:]{', K' if classes else ''}] = {expected} with S >= 1, got {tuple(x_hat.shape)}: "
            f"the decoder's output for one latent must have the shape of one input{', with K logits per element' if classes else ''}"
        )
    x, x_hat = _as_floats(x, x_hat)
    tiled = x.unsqueeze(1).expand(*x_hat.shape[:2], *x.shape[1:])
    return _summed(name, tiled, x_hat, 2, scale, full, dtype, None if valid is None else valid.unsqueeze(1))


def _summed(
    name: LikelihoodType,
    x: Tensor,
    x_hat: Tensor,
    kept: int,
    scale: float | Tensor,
    full: bool,
    dtype: torch.dtype | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Return log p summed over all but the first `kept` axes. Weight and offset come after the sum: they are the same for all elements."""
    density = _DENSITIES[name]
    with without_autocast(x_hat):
        misfit = density.misfit(x, x_hat)
        if valid is not None:
            misfit = torch.where(valid, misfit, 0.0)
        value = misfit.reshape(*misfit.shape[:kept], -1).sum(-1, dtype=dtype) * density.weight(scale)
        offset = density.offset(scale, full)
        if _is(offset, 0.0):
            return value
        count = math.prod(x.shape[kept:]) if valid is None else valid.flatten(kept).sum(-1)
        return value + offset * count


def _as_floats(x: Tensor, x_hat: Tensor) -> tuple[Tensor, Tensor]:
    x_hat = at_least_float32(x_hat)
    return at_least_float32(x) if x.is_floating_point() else x.to(x_hat.dtype), x_hat


def expected_value(x_hat: Tensor, likelihood: str | LikelihoodType = LikelihoodType.GAUSSIAN) -> Tensor:
    """Return E[x | x_hat] in data space, float32: the column `mean` of this module's table; categorical drops the last axis."""
    x_hat, name = x_hat.float(), parse_likelihood(likelihood)
    if name is LikelihoodType.CATEGORICAL:
        return x_hat.softmax(-1) @ torch.arange(x_hat.shape[-1], dtype=x_hat.dtype, device=x_hat.device)
    return torch.sigmoid(x_hat) if name is LikelihoodType.BERNOULLI else x_hat


@dataclass(frozen=True, slots=True)
class _Density:
    """log p = factor * misfit(x, x_hat) / s ** power - log s, and `constant` in full; without a scale power is 0."""

    misfit: Callable[[Tensor, Tensor], Tensor]
    factor: float
    power: int = 0
    constant: float = 0.0

    def weight(self, scale: float | Tensor) -> float | Tensor:
        """Return what the misfit is multiplied by."""
        return self.factor if _is(scale, 1.0) else self.factor / scale**self.power

    def offset(self, scale: float | Tensor, full: bool) -> float | Tensor:
        """Return what is added for every element."""
        constant = self.constant if full else 0.0
        return constant if _is(scale, 1.0) else constant - _log(scale)


def _class_entropy(x: Tensor, logits: Tensor) -> Tensor:
    num_classes, ids = logits.shape[-1], x.long()
    possible = (x == ids) & (ids >= 0) & (ids < num_classes)
    picked = logits.log_softmax(-1).gather(-1, ids.clamp(0, num_classes - 1).unsqueeze(-1)).squeeze(-1)
    return -picked.masked_fill(~possible, -math.inf)


_DENSITIES = {
    LikelihoodType.GAUSSIAN: _Density(  # mse_loss, forward and backward, takes a third of the time of (x - x_hat).square()
        lambda x, x_hat: F.mse_loss(x_hat, x, reduction="none"), -0.5, 2, -0.5 * math.log(2 * math.pi)
    ),
    LikelihoodType.LAPLACE: _Density(lambda x, x_hat: (x - x_hat).abs(), -1.0, 1, -math.log(2)),
    LikelihoodType.BERNOULLI: _Density(lambda x, logits: F.binary_cross_entropy_with_logits(logits, x, reduction="none"), -1.0),
    LikelihoodType.CATEGORICAL: _Density(_class_entropy, -1.0),
}


def _is(value: float | Tensor, number: float) -> bool:
    return not isinstance(value, Tensor) and value == number


def _log(scale: float | Tensor) -> float | Tensor:
    return scale.log() if isinstance(scale, Tensor) else math.log(scale)


def _require_scale(name: LikelihoodType, scale: float | Tensor) -> None:
    if _is(scale, 1.0):
        return
    if name in LOGITS:
        raise ValueError(f"the {name} likelihood has no scale, got {scale}: leave it out, or use gaussian or laplace")
    if isinstance(scale, Tensor):
        if scale.ndim:
            raise ValueError(f"scale must be a number or a tensor without axes, got the shape {tuple(scale.shape)}")
    elif not 0 < scale < math.inf:
        raise ValueError(f"scale must be positive and finite, got {scale}")


def _require_one_shape(name: LikelihoodType, x: torch.Size, x_hat: torch.Size) -> None:
    if name is LikelihoodType.CATEGORICAL:
        if len(x_hat) != len(x) + 1 or x_hat[:-1] != x or x_hat[-1] < 1:
            raise ValueError(f"x_hat of the categorical likelihood must have the shape [*x.shape, K] = {(*x, 'K')}, got {tuple(x_hat)}")
    elif x != x_hat:
        raise ValueError(f"x and x_hat must have the same shape, got {tuple(x)} and {tuple(x_hat)}")
