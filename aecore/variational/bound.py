r"""From reconstructions and a posterior to the number that is minimised: ELBO, IWAE, and terms that replace the KL.

| setting | objective per sample, in training mode | paper |
|---|---|---|
| default | :math:`-E_q[\log p(x|z)] + \beta\, KL(q \| p)` | Kingma & Welling 2013; Higgins et al. 2017 |
| `free_bits` | :math:`\ldots + \beta \sum_d \max(\lambda, KL_d)` | Kingma et al. 2016 |
| `capacity` | :math:`\ldots + \beta\, |KL - C|`, C rising linearly | Burgess et al. 2018 |
| `objective="iwae"` | :math:`-\log \frac1S \sum_s w_s`, :math:`\log w = \log p(x|z) + \beta \log\frac{p(z)}{q(z|x)}` | Burda et al. 2015 |
| `scale="learned"` | as above with one learned scale of the likelihood | Rybkin et al. 2021, "sigma-VAE" |

In evaluation mode the objective is the negative ELBO whatever was trained, so that validation losses can be compared.
Legend: B batch, S samples, D latent.
"""

import math
from collections.abc import Callable
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aecore.errors import did_you_mean
from aecore.loss import LikelihoodType, LossResult, kl_divergence_diag_gaussian, log_density_diag_gaussian, sample_log_likelihood
from aecore.loss._precision import at_least_float32
from aecore.loss.regularizers import capacity, free_bits
from aecore.loss.schedules import linear_at

OBJECTIVES = ("elbo", "iwae")
LOG_SCALE_MIN = -6.0  # a scale below 0.0025 would let one perfectly drawn pixel outweigh everything else


class Reconstructed(Protocol):
    """The parts of a model's output that the objective reads: `x_hat [B, S, ...]`, `z [B, S, D]`, `mu [B, D]`, `log_var [B, D]`."""

    x_hat: Tensor
    z: Tensor
    mu: Tensor
    log_var: Tensor


class VariationalObjective(nn.Module):
    """The objective of a VAE with a Gaussian posterior and the prior N(0, I).

    Without a learned scale it has no parameters and adds nothing to a state dict.

    Parameters
    ----------
    objective
        `elbo`, with the KL in closed form, or `iwae`, the importance-weighted bound of all S samples.
    num_samples
        Latents per input that a trainer draws, S; evaluation draws one.
    scale
        Of a gaussian or laplace likelihood in the units of x; `learned` makes it a parameter, 1 at first.
    free_bits
        Nats that a latent dimension may cost without being pushed down; 0: off.
    capacity
        Nats C that the KL is pulled to, 0: off. beta weighs the distance, so give it a large one.
    capacity_steps
        Training steps over which C rises from 0, see `at_step`; 0: C from the first.
    """

    capacity_now: Tensor

    def __init__(
        self,
        *,
        objective: str = "elbo",
        num_samples: int = 1,
        scale: float | Literal["learned"] = 1.0,
        free_bits: float = 0.0,
        capacity: float = 0.0,
        capacity_steps: int = 0,
    ) -> None:
        super().__init__()
        if objective not in OBJECTIVES:
            raise ValueError(f"objective is {objective!r}{did_you_mean(objective, OBJECTIVES)}")
        if num_samples < 1:
            raise ValueError(f"num_samples must be >= 1, got {num_samples}: it is the number of latent samples per input")
        if isinstance(scale, str) and scale != "learned":
            raise ValueError(f"scale is {scale!r}, expected a positive number or 'learned'")
        if min(free_bits, capacity, capacity_steps) < 0:
            raise ValueError(f"free_bits, capacity and capacity_steps must be >= 0, got {free_bits}, {capacity}, {capacity_steps}")
        if (clash := clashing(objective, free_bits, capacity)) is not None:
            raise ValueError(clash)
        self.objective = objective
        self.num_samples = num_samples
        self.free_bits = free_bits
        self.capacity = capacity
        self.capacity_steps = capacity_steps
        self.fixed_scale = None if isinstance(scale, str) else float(scale)
        if self.fixed_scale is None:
            self.log_scale = nn.Parameter(torch.zeros(()))
        self.register_buffer("capacity_now", torch.tensor(linear_at(capacity, capacity_steps, 0)), persistent=False)

    def at_step(self, step: int) -> None:
        """Move C to where it is at training step 1, 2, ..."""
        if self.capacity:
            self.capacity_now.fill_(linear_at(self.capacity, self.capacity_steps, step))

    @property
    def scale(self) -> float | Tensor:
        """The scale of the likelihood: a float, or a 0-dim tensor with a gradient if it is learned (smoothly kept above 0.0025)."""
        if self.fixed_scale is not None:
            return self.fixed_scale
        return torch.exp(LOG_SCALE_MIN + F.softplus(at_least_float32(self.log_scale) - LOG_SCALE_MIN))

    def forward(
        self, x: Tensor, output: Reconstructed, beta: float | Tensor, likelihood: str | LikelihoodType, valid: Tensor | None = None
    ) -> LossResult:
        """Return the objective with `elbo` (with `beta`), `log_likelihood` and `kl_divergence`, means over the batch.

        In training mode also `iwae` (the importance-weighted bound itself, at beta 1), or `kl_penalty` (the term that replaces the KL) and
        `capacity`; with a learned scale `scale`.
        `valid` says which elements of `x` count, see `sample_log_likelihood`; None: all.
        """
        log_px = sample_log_likelihood(x, output.x_hat, likelihood, scale=self.scale, valid=valid)
        per_dimension = kl_divergence_diag_gaussian(output.mu, output.log_var, reduce_sum=False)
        mean_log_px, kl = log_px.mean(), per_dimension.sum() / len(per_dimension)
        elbo = mean_log_px - beta * kl
        terms: dict[str, Tensor | float] = {"elbo": elbo, "log_likelihood": mean_log_px, "kl_divergence": kl}
        if self.fixed_scale is None:
            terms["scale"] = self.scale
        if self.training and self.objective == "iwae":
            ratio = log_density_diag_gaussian(output.z) - log_density_diag_gaussian(output.z, output.mu, output.log_var)
            with torch.no_grad():
                at_beta_1 = _log_mean_weight(log_px + ratio)
            return LossResult(-_log_mean_weight(log_px + beta * ratio), {"iwae": at_beta_1, **terms})
        if self.training and (self.free_bits or self.capacity):
            replaced = capacity(per_dimension, self.capacity_now) if self.capacity else free_bits(per_dimension, self.free_bits)
            penalty = replaced.mean()
            extra = {"capacity": self.capacity_now.clone()} if self.capacity else {}
            return LossResult(beta * penalty - mean_log_px, {"kl_penalty": penalty, **extra, **terms})
        return LossResult(-elbo, terms)

    def log_weights(
        self,
        x: Tensor,
        mu: Tensor,
        log_var: Tensor,
        eps: Tensor,
        decode: Callable[[Tensor], Tensor],
        likelihood: str | LikelihoodType,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Return log p(x|z) + log p(z) - log q(z|x) with all constants, `[n, S]` float64, of z = mu + exp(log_var / 2) * eps.

        `decode` maps `z [n, S, D]`, in the dtype of `mu`, to `x_hat [n, S, ...]`. The noise is used as it is, never got back from z,
        and the terms of the latent are float64: a posterior that is exact then gives equal weights.

        Raises
        ------
        ValueError
            `eps` is not `[n, S, D]`.
        """
        if eps.ndim != 3 or (eps.shape[0], eps.shape[2]) != mu.shape:
            raise ValueError(f"eps must have the shape [n, S, D] = [{mu.shape[0]}, S, {mu.shape[1]}], got {tuple(eps.shape)}")
        noise, spread = eps.double(), log_var.double().unsqueeze(1)
        z = (mu.double().unsqueeze(1) + torch.exp(0.5 * spread) * noise).to(mu.dtype)
        log_px = sample_log_likelihood(x, decode(z), likelihood, scale=self.scale, full=True, dtype=torch.float64, valid=valid)
        return log_px + 0.5 * (noise.square() + spread - z.double().square()).sum(-1)


def _log_mean_weight(log_weights: Tensor) -> Tensor:
    """Return the mean over rows of the log of the mean weight, of `[B, S]`."""
    return (torch.logsumexp(log_weights, 1) - math.log(log_weights.shape[1])).mean()


def clashing(objective: str, free_bits: float, capacity: float) -> str | None:
    """Return why these settings exclude each other, None if they do not."""
    if free_bits and capacity:
        return f"free_bits is {free_bits} and capacity {capacity}: both replace the KL, set one of them to 0"
    if objective == "iwae" and (free_bits or capacity):
        setting = f"free_bits={free_bits}" if free_bits else f"capacity={capacity}"
        return f"{setting} replaces the KL, which objective=iwae does not have: leave it out, or use objective=elbo"
    return None
