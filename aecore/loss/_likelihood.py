"""Observation models p(x | x_hat), elementwise and without normalising constants, always in float32 or better.

Legend: B batch, S Monte Carlo samples.
"""

from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor

from aecore.precision import at_least_float32, without_autocast


class LikelihoodType(StrEnum):
    """How the decoder's output is read: the mean of a unit Gaussian, or the logits of Bernoulli variables."""

    GAUSSIAN = "gaussian"
    BERNOULLI = "bernoulli"


def _parse(likelihood: str | LikelihoodType) -> str:
    name = likelihood.lower()
    if name not in ("gaussian", "bernoulli"):
        raise ValueError(f"{likelihood!r} is not a valid LikelihoodType (known: {', '.join(LikelihoodType)})")
    return name


def log_likelihood(x: Tensor, x_hat: Tensor, likelihood: str | LikelihoodType = LikelihoodType.GAUSSIAN) -> Tensor:
    r"""Elementwise log p(x | x_hat), the shape of `x`.

    Gaussian: :math:`-\tfrac12 (x - \hat x)^2` (unit variance, the constant left out).
    Bernoulli: :math:`x \log \sigma(\hat x) + (1 - x) \log (1 - \sigma(\hat x))`, with `x_hat` the logits and x in [0, 1].

    Raises:
        ValueError: the shapes differ (nothing is broadcast), or the likelihood is unknown. Strings are case-insensitive.
    """
    name = _parse(likelihood)
    if x.shape != x_hat.shape:
        raise ValueError(f"x and x_hat must have the same shape, got {tuple(x.shape)} and {tuple(x_hat.shape)}")
    x_hat = at_least_float32(x_hat)
    x = at_least_float32(x) if x.is_floating_point() else x.to(x_hat.dtype)
    with without_autocast(x_hat):
        if name == "bernoulli":
            return -F.binary_cross_entropy_with_logits(x_hat, x, reduction="none")
        return -0.5 * (x - x_hat).square()


def sample_log_likelihood(x: Tensor, x_hat: Tensor, likelihood: str | LikelihoodType = LikelihoodType.GAUSSIAN) -> Tensor:
    """log p(x | x_hat) summed over features: `[B, S]` for `x [B, ...]` and `x_hat [B, S, ...]`.

    Raises:
        ValueError: `x_hat` is not `[B, S, *x.shape[1:]]`; a missing S axis is never inferred.
    """
    if x_hat.ndim != x.ndim + 1 or x_hat.shape[0] != x.shape[0] or x_hat.shape[2:] != x.shape[1:] or x_hat.shape[1] < 1:
        expected = f"[{', '.join(map(str, (x.shape[0], 'S', *x.shape[1:])))}]"
        raise ValueError(
            f"x_hat must have the shape [B, S, *x.shape[1:]] = {expected} with S >= 1, got {tuple(x_hat.shape)}: "
            "the decoder's output for one latent must have the shape of one input"
        )
    per_element = log_likelihood(x.unsqueeze(1).expand(x_hat.shape), x_hat, likelihood)
    return per_element.reshape(*x_hat.shape[:2], -1).sum(-1)


def expected_value(x_hat: Tensor, likelihood: str | LikelihoodType = LikelihoodType.GAUSSIAN) -> Tensor:
    """E[x | x_hat] in data space, float32: `x_hat` itself for Gaussian, its sigmoid for Bernoulli."""
    x_hat = x_hat.float()
    return torch.sigmoid(x_hat) if _parse(likelihood) == "bernoulli" else x_hat
