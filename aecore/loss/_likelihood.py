r"""Observation models p(x | x_hat), always in float32 or better.

| name | x_hat | log p per element, `full` terms in brackets | mean |
|---|---|---|---|
| gaussian | mean | :math:`-\tfrac12 ((x - \hat x) / s)^2 - \log s \; [-\tfrac12 \log 2\pi]` | x_hat |
| laplace | median | :math:`-|x - \hat x| / s - \log s \; [-\log 2]` | x_hat |
| bernoulli | logits | :math:`x \log \sigma(\hat x) + (1 - x) \log (1 - \sigma(\hat x))`, x in [0, 1] | sigmoid |
| categorical | logits of K classes, on a last axis | :math:`\hat x_k - \log \sum_j e^{\hat x_j}`, x = k in 0..K-1 | mean class id |

Without `full` the constants that depend on nothing are left out, as the seeds have it; the scale s is no constant. Another likelihood
is one more row here, one function and one line of `_ELEMENTWISE`. Legend: B batch, S Monte Carlo samples, K classes.
"""

import math
from collections.abc import Callable
from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor

from aecore.errors import did_you_mean
from aecore.precision import at_least_float32, without_autocast


class LikelihoodType(StrEnum):
    """How the decoder's output is read: see the table of this module."""

    GAUSSIAN = "gaussian"
    BERNOULLI = "bernoulli"
    LAPLACE = "laplace"
    CATEGORICAL = "categorical"


LOGITS = frozenset({LikelihoodType.BERNOULLI, LikelihoodType.CATEGORICAL})  # these read the decoder's output as logits and have no scale
_NAMES = {str(member): member for member in LikelihoodType}
_CONSTANTS = {LikelihoodType.GAUSSIAN: -0.5 * math.log(2 * math.pi), LikelihoodType.LAPLACE: -math.log(2)}


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
    """Elementwise log p(x | x_hat), the shape of `x`.

    Args:
        x, x_hat: one shape; for categorical `x_hat` has one more axis at the end, of K logits, and `x` holds class ids of any dtype.
        likelihood: name in any case.
        scale: standard deviation of the Gaussian, mean deviation of the Laplace distribution; a scalar, in the units of x.
        full: add the normalising constants, so that the result is a log density (a log probability for bernoulli and categorical).

    Returns:
        float32 or better. What has no probability at all (a class id that is no whole number in 0..K-1) has -inf.

    Raises:
        ValueError: the shapes differ (nothing is broadcast), the likelihood is unknown, or a scale is not positive or not used.
    """
    name = parse_likelihood(likelihood)
    _require_scale(name, scale)
    _require_one_shape(name, x.shape, x_hat.shape)
    x_hat = at_least_float32(x_hat)
    x = at_least_float32(x) if x.is_floating_point() else x.to(x_hat.dtype)
    with without_autocast(x_hat):
        value = _ELEMENTWISE[name](x, x_hat, scale)
        return value + _CONSTANTS[name] if full and name in _CONSTANTS else value


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
    """log p(x | x_hat) summed over features: `[B, S]` for `x [B, ...]` and `x_hat [B, S, ...]` (categorical: `[B, S, ..., K]`).

    `dtype` is that of the sum: float64 where thousands of features must add up to a hundredth of a nat. `valid`, bool of the shape of `x`,
    says which features count: those behind the end of a sequence do not.

    Raises:
        ValueError: `x_hat` is not `[B, S, *x.shape[1:]]`; a missing S axis is never inferred. Else as `log_likelihood`.
    """
    classes = x_hat.shape[-1:] if parse_likelihood(likelihood) is LikelihoodType.CATEGORICAL else ()
    wanted = (*x.shape[1:], *classes)
    if x_hat.ndim != len(wanted) + 2 or x_hat.shape[0] != x.shape[0] or x_hat.shape[2:] != wanted or x_hat.shape[1] < 1:
        last = ("K",) if classes else ()
        expected = f"[{', '.join(map(str, (x.shape[0], 'S', *x.shape[1:], *last)))}]"
        raise ValueError(
            f"x_hat must have the shape [B, S, *x.shape[1:]{', K' if classes else ''}] = {expected} with S >= 1, got {tuple(x_hat.shape)}: "
            f"the decoder's output for one latent must have the shape of one input{', with K logits per element' if classes else ''}"
        )
    tiled = x.unsqueeze(1).expand(*x_hat.shape[:2], *x.shape[1:])
    per_element = log_likelihood(tiled, x_hat, likelihood, scale=scale, full=full)
    if valid is not None:
        per_element = torch.where(valid.unsqueeze(1), per_element, 0.0)
    return per_element.reshape(*x_hat.shape[:2], -1).sum(-1, dtype=dtype)


def expected_value(x_hat: Tensor, likelihood: str | LikelihoodType = LikelihoodType.GAUSSIAN) -> Tensor:
    """E[x | x_hat] in data space, float32: the column `mean` of this module's table; categorical drops the last axis."""
    x_hat, name = x_hat.float(), parse_likelihood(likelihood)
    if name is LikelihoodType.CATEGORICAL:
        return x_hat.softmax(-1) @ torch.arange(x_hat.shape[-1], dtype=x_hat.dtype, device=x_hat.device)
    return torch.sigmoid(x_hat) if name is LikelihoodType.BERNOULLI else x_hat


def _gaussian(x: Tensor, x_hat: Tensor, scale: float | Tensor) -> Tensor:
    if _is_one(scale):
        return -0.5 * (x - x_hat).square()
    return -0.5 * ((x - x_hat) / scale).square() - _log(scale)


def _laplace(x: Tensor, x_hat: Tensor, scale: float | Tensor) -> Tensor:
    if _is_one(scale):
        return -(x - x_hat).abs()
    return -(x - x_hat).abs() / scale - _log(scale)


def _bernoulli(x: Tensor, logits: Tensor, scale: float | Tensor) -> Tensor:
    return -F.binary_cross_entropy_with_logits(logits, x, reduction="none")


def _categorical(x: Tensor, logits: Tensor, scale: float | Tensor) -> Tensor:
    num_classes, ids = logits.shape[-1], x.long()
    possible = (x == ids) & (ids >= 0) & (ids < num_classes)
    picked = logits.log_softmax(-1).gather(-1, ids.clamp(0, num_classes - 1).unsqueeze(-1)).squeeze(-1)
    return picked.masked_fill(~possible, -math.inf)


_ELEMENTWISE: dict[LikelihoodType, Callable[[Tensor, Tensor, float | Tensor], Tensor]] = {
    LikelihoodType.GAUSSIAN: _gaussian,
    LikelihoodType.BERNOULLI: _bernoulli,
    LikelihoodType.LAPLACE: _laplace,
    LikelihoodType.CATEGORICAL: _categorical,
}


def _is_one(scale: float | Tensor) -> bool:
    return not isinstance(scale, Tensor) and scale == 1.0


def _log(scale: float | Tensor) -> float | Tensor:
    return scale.log() if isinstance(scale, Tensor) else math.log(scale)


def _require_scale(name: LikelihoodType, scale: float | Tensor) -> None:
    if _is_one(scale):
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
