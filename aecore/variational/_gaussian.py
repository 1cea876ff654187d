"""What all VAEs with a Gaussian posterior share: their outputs, and the calls of the jobs.

Legend: B batch, S samples, D latent, n rows.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aecore._base.base import ModelOutput
from aecore._base.batch import Batch
from aecore._base.trainable import Trainable
from aecore.loss import LikelihoodType, LossResult, expected_value
from aecore.variational.bound import VariationalObjective
from aecore.variational.stochastic_layers import FullyFactorizedGaussian


@dataclass(slots=True, eq=False)
class VAEEncodeOutput(ModelOutput):
    """Samples `z [B, S, D]` of the posterior and its parameters `mu [B, D]`, `log_var [B, D]`."""

    z: Tensor
    mu: Tensor
    log_var: Tensor


@dataclass(slots=True, eq=False)
class VAEDecodeOutput(ModelOutput):
    """Reconstructions `x_hat [B, S, ...]`."""

    x_hat: Tensor


@dataclass(slots=True, eq=False)
class VAEOutput(ModelOutput):
    """Reconstructions `x_hat [B, S, ...]`, samples `z [B, S, D]`, posterior `mu [B, D]`, `log_var [B, D]`."""

    x_hat: Tensor
    z: Tensor
    mu: Tensor
    log_var: Tensor


class GaussianVAE(Trainable):
    """A posterior N(mu, exp(log_var)), the prior N(0, I) and a `VariationalObjective`; a subclass has `_encode`, `_decode` and `forward`.

    What these take after `x` and `z` (a label, lengths) is what `condition` and `decode_condition` read from a batch.

    Parameters
    ----------
    encoder
        Gives features `[B, F]`, of which the sampling layer makes `mu` and `log_var`.
    decoder
        Maps latents to `x_hat`.
    latent_dim
        D.
    bound
        The objective, the scale of the likelihood and S; by default the ELBO, with one sample.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, latent_dim: int, bound: VariationalObjective | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.latent_dim = latent_dim
        self.sampling_layer = FullyFactorizedGaussian(latent_dim)
        self.bound = bound or VariationalObjective()

    def condition(self, batch: Batch) -> tuple[Any, ...]:  # any: what the subclass takes
        """Return what `_encode` and `forward` take after `x`."""
        return ()

    def decode_condition(self, batch: Batch) -> tuple[Any, ...]:  # any: what the subclass takes
        """Return what `_decode` takes after `z`; by default the same."""
        return self.condition(batch)

    def valid(self, batch: Batch) -> Tensor | None:
        """Return which values of `batch.x` count, bool of its shape; None: all."""
        return None

    def compute_loss(
        self,
        x: Tensor,
        output: VAEOutput,
        beta: float | Tensor = 1.0,
        likelihood: str | LikelihoodType = LikelihoodType.GAUSSIAN,
        valid: Tensor | None = None,
    ) -> LossResult:
        """Negative ELBO: the likelihood summed over features (those that are `valid`), mean over S, then mean over the batch.

        Diagnostics: `elbo` (with `beta`), `log_likelihood`, `kl_divergence` (without `beta`). In training mode the objective is that
        of `bound`, which may add to them.

        Raises
        ------
        ValueError
            `output.x_hat` is not `[B, S, *x.shape[1:]]`.
        """
        result: LossResult = self.bound(x, output, beta, likelihood, valid)
        return result

    def noise_shape(self, num_samples: int | None = None) -> tuple[int, int]:
        """Return (S, D); S None is the objective's `num_samples`, in evaluation mode 1."""
        if num_samples is None:
            num_samples = self.bound.num_samples if self.training else 1
        return (num_samples, self.latent_dim)

    def at_step(self, step: int) -> None:
        """Set the training step of the objective, whose capacity may rise."""
        self.bound.at_step(step)

    def loss(self, batch: Batch, *, eps: Tensor | None = None, beta: float | Tensor = 1.0, likelihood: str = "gaussian") -> LossResult:
        """Forward and loss of `batch`, always sampled, with noise `eps [n, S, D]`; None draws as many latents as `noise_shape` says."""
        num_samples = self.noise_shape()[0] if eps is None else eps.shape[1]
        output = self(batch.x, *self.condition(batch), S=num_samples, sample=True, eps=eps)
        return self.compute_loss(batch.x, output, beta, likelihood, self.valid(batch))

    @torch.inference_mode()
    def log_weights(self, batch: Batch, eps: Tensor, *, likelihood: str = "gaussian") -> Tensor:
        """Return log p(x|z) + log p(z) - log q(z|x), `[n, S]` float64, of the latents that `eps [n, S, D]` draws."""
        q, condition = self._encode(batch.x, *self.condition(batch), sample=False), self.decode_condition(batch)
        return self.bound.log_weights(
            batch.x, q.mu, q.log_var, eps, lambda z: self._decode(z, *condition).x_hat, likelihood, self.valid(batch)
        )

    @torch.inference_mode()
    def latents(self, batch: Batch) -> dict[str, Tensor]:
        """Return `{"mu": [n, D], "log_var": [n, D]}`, float32."""
        latent = self._encode(batch.x, *self.condition(batch), sample=False)
        return {"mu": latent.mu.float(), "log_var": latent.log_var.float()}

    @torch.inference_mode()
    def reconstruct(self, batch: Batch, *, likelihood: str = "gaussian") -> Tensor:
        """Return the expected inputs `[n, ...]` at z = mu, see `expected_value`."""
        return expected_value(self(batch.x, *self.condition(batch), sample=False).x_hat.squeeze(1), likelihood)

    def _require_latents(self, z: Tensor, instead: str = "model.decoder(z) directly") -> None:
        if z.ndim != 3 or z.shape[2] != self.latent_dim:
            raise ValueError(
                f"z must have the shape [B, S, D] with D = {self.latent_dim}, got {tuple(z.shape)}: "
                f"for one latent per row use z.unsqueeze(1), or call {instead}"
            )
