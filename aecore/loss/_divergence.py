"""KL divergences in closed form, always in float32 or better."""

import torch
from torch import Tensor

from aecore.loss._precision import at_least_float32, without_autocast


def kl_divergence_diag_gaussian(
    mu_q: Tensor,
    log_var_q: Tensor,
    mu_p: Tensor | None = None,
    log_var_p: Tensor | None = None,
    reduce_sum: bool = True,
) -> Tensor:
    r"""KL(q || p) of diagonal Gaussians, `[B]` for inputs `[B, D]`, or `[B, D]` per dimension if not `reduce_sum`.

    .. math:: \tfrac12 \left(e^d - 1 - d + (\mu_q - \mu_p)^2 e^{-\log\sigma_p^2}\right), \quad d = \log\sigma_q^2 - \log\sigma_p^2

    The prior p is N(0, I) where `mu_p` and `log_var_p` are None (a missing half counts as zeros). `expm1(d) - d` keeps the digits of
    a small KL, where `exp(d) - 1 - d` cancels.

    Raises
    ------
    ValueError
        `mu_q` and `log_var_q` differ in shape, or the prior's does not broadcast to it.
    """
    mu_q, log_var_q = at_least_float32(mu_q), at_least_float32(log_var_q)
    prior = [at_least_float32(value) for value in (mu_p, log_var_p) if value is not None]
    if mu_q.shape != log_var_q.shape or not all(_broadcasts(value, mu_q) for value in prior):
        shapes = ", ".join(str(tuple(value.shape)) for value in (mu_q, log_var_q, *prior))
        raise ValueError(f"mu and log_var of q must have one shape, to which those of p broadcast; got {shapes}")
    with without_autocast(mu_q):
        delta = mu_q if mu_p is None else mu_q - at_least_float32(mu_p)
        squares = delta.square()
        d = log_var_q
        if log_var_p is not None:
            log_var_p = at_least_float32(log_var_p)
            squares = squares * torch.exp(-log_var_p)
            d = log_var_q - log_var_p
        kl = 0.5 * (torch.expm1(d) - d + squares)
        return kl.sum(-1) if reduce_sum else kl


def _broadcasts(value: Tensor, to: Tensor) -> bool:
    sizes = zip(reversed(value.shape), reversed(to.shape), strict=False)
    return value.ndim <= to.ndim and all(size in (1, target) for size, target in sizes)
