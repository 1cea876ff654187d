"""Layers that turn features into a posterior and draw from it. Legend: B batch, S samples, D latent, F features.

Heads and sampling run outside autocast, in the dtype of their own weights (float32 unless the user converts the model).
"""

import warnings

import torch
from torch import Tensor, nn

from aecore.loss._precision import without_autocast
from aecore.nn._linear import LazyLinear

LOG_VAR_MIN, LOG_VAR_MAX = -30.0, 20.0


class FullyFactorizedGaussian(nn.Module):
    r"""Diagonal Gaussian posterior :math:`q(z|x) = N(\mu, \mathrm{diag}(\sigma^2))` with linear heads for mu and log sigma^2.

    log sigma^2 is clamped to [-30, 20], where its exponential and the KL stay finite in float32.
    """

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        if latent_dim < 1:
            raise ValueError(f"latent_dim must be >= 1, got {latent_dim}")
        self.latent_dim = latent_dim
        with warnings.catch_warnings():  # torch calls lazy modules "a new feature" since 1.8
            warnings.filterwarnings("ignore", message="Lazy modules are a new feature")
            self.mu = LazyLinear(latent_dim)
            self.log_var = LazyLinear(latent_dim)

    def get_params(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return `mu [B, D]` and the clamped `log_var [B, D]` of features `x [B, F]`; ValueError for another number of axes."""
        if x.ndim != 2:
            raise ValueError(
                f"FullyFactorizedGaussian takes features of shape [B, F], got {tuple(x.shape)}: "
                "the encoder must give one flat vector per sample, for example by ending with nn.Flatten()"
            )
        with without_autocast(x):
            mu = self.mu(x.to(self.mu.weight.dtype))
            log_var = self.log_var(x.to(self.log_var.weight.dtype))
            return mu, log_var.clamp(LOG_VAR_MIN, LOG_VAR_MAX)

    def reparametrize(self, mu: Tensor, log_var: Tensor, S: int = 1, eps: Tensor | None = None) -> Tensor:
        """Return `z = mu + exp(log_var / 2) * eps`, `[B, S, D]`, for `mu` and `log_var` of shape `[B, D]`.

        `eps` is standard normal noise `[B, S, D]`; None draws it by `randn_like`, so torch's seed reproduces it.

        Raises
        ------
        ValueError
            S < 1, or `eps` of another shape.
        """
        mu = _tile(mu, S)
        if eps is None:
            eps = torch.randn_like(mu, memory_format=torch.contiguous_format)
        elif eps.shape != mu.shape:
            raise ValueError(f"eps must have the shape [B, S, D] = {tuple(mu.shape)}, got {tuple(eps.shape)}")
        with without_autocast(mu):
            return torch.addcmul(mu, torch.exp(0.5 * log_var).unsqueeze(1).expand_as(mu), eps.to(mu.dtype))

    _reparametrize = reparametrize

    def forward(self, x: Tensor, S: int = 1, sample: bool | None = None, eps: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return `z [B, S, D]`, `mu [B, D]`, `log_var [B, D]` of features `x [B, F]`.

        `sample=None` follows the mode: draws in training, z = mu (tiled over S, `eps` unused) in evaluation; True and False decide.
        """
        mu, log_var = self.get_params(x)
        sample = self.training if sample is None else sample
        z = self.reparametrize(mu, log_var, S, eps) if sample else _tile(mu, S).clone()
        return z, mu, log_var


def _tile(mu: Tensor, S: int) -> Tensor:
    if S < 1:
        raise ValueError(f"S must be >= 1, got {S}: it is the number of latent samples per input")
    return mu.unsqueeze(1).expand(-1, S, -1)
