"""Log densities of diagonal Gaussians, always in float32 or better. Legend: B batch, S samples, D latent."""

import math

import torch
from torch import Tensor

from aecore.loss._precision import at_least_float32, without_autocast


def log_density_diag_gaussian(z: Tensor, mu: Tensor | None = None, log_var: Tensor | None = None) -> Tensor:
    r"""Return log N(z; mu, exp(log_var)) with its constants, summed over the last axis: `[B, S]` for `z [B, S, D]`, `mu`, `log_var [B, D]`.

    .. math:: -\tfrac12 \sum_d \left((z_d - \mu_d)^2 e^{-\log\sigma_d^2} + \log\sigma_d^2 + \log 2\pi\right)

    None counts as zeros, so that both None is the prior N(0, I).

    Raises
    ------
    ValueError
        `mu` or `log_var` is not `[B, D]`.
    """
    wanted = (z.shape[0], z.shape[-1])
    for name, value in (("mu", mu), ("log_var", log_var)):
        if value is not None and value.shape != wanted:
            raise ValueError(f"{name} must have the shape [B, D] = {wanted} of z {tuple(z.shape)}, got {tuple(value.shape)}")
    z = at_least_float32(z)
    with without_autocast(z):
        delta = z if mu is None else z - at_least_float32(mu).unsqueeze(1)
        exponent = delta.square()
        if log_var is not None:
            log_var = at_least_float32(log_var).unsqueeze(1)
            exponent = exponent * torch.exp(-log_var) + log_var
        return -0.5 * (exponent.sum(-1) + z.shape[-1] * math.log(2 * math.pi))
