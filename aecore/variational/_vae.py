"""The variational autoencoder of Kingma & Welling (2013). Legend: B batch, S samples, D latent, n rows."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from aecore._base.base import ModelOutput
from aecore._base.batch import Batch
from aecore._base.trainable import Trainable
from aecore.loss import LikelihoodType, LossResult, expected_value
from aecore.registry import MODELS, spec
from aecore.variational._spec import VariationalSpec, build_nets
from aecore.variational.bound import Bound
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


class VAE(Trainable):
    r"""VAE of any encoder `[B, ...] -> [B, F]` and decoder `[N, D] -> [N, ...]`; the S axis is always there.

    .. math:: \mathcal{L}(x; \beta) = E_{q(z|x)}[\log p(x|z)] - \beta\, KL(q(z|x) \,\|\, N(0, I))

    `bound` has the other objectives, the scale of the likelihood and S; the default is the formula above, with one sample.

    >>> model = VAE(nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU()), nn.Linear(8, 784), latent_dim=8)
    >>> model.build(torch.zeros(1, 784))
    >>> model(torch.zeros(2, 784), S=3).x_hat.shape
    torch.Size([2, 3, 784])
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, latent_dim: int, bound: Bound | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.latent_dim = latent_dim
        self.sampling_layer = FullyFactorizedGaussian(latent_dim)
        self.bound = bound or Bound()

    def _encode(self, x: Tensor, S: int = 1, sample: bool | None = None, eps: Tensor | None = None) -> VAEEncodeOutput:
        return VAEEncodeOutput(*self.sampling_layer(self.encoder(x), S, sample, eps))

    def _decode(self, z: Tensor) -> VAEDecodeOutput:
        if z.ndim != 3 or z.shape[2] != self.latent_dim:
            raise ValueError(
                f"z must have the shape [B, S, D] with D = {self.latent_dim}, got {tuple(z.shape)}: "
                "for one latent per row use z.unsqueeze(1), or call model.decoder(z) directly"
            )
        return VAEDecodeOutput(self.decoder(z.flatten(0, 1)).unflatten(0, z.shape[:2]))

    def forward(self, x: Tensor, S: int = 1, sample: bool | None = None, eps: Tensor | None = None) -> VAEOutput:
        """Encode, draw S latents per input and decode them.

        Args:
            x: inputs `[B, ...]`.
            S: latents per input, at least 1.
            sample: True draws, False takes z = mu; None draws in training mode and takes the mean in evaluation mode.
            eps: standard normal noise `[B, S, D]` to draw with; None takes it from torch's global generator.
        """
        latent = self._encode(x, S, sample, eps)
        return VAEOutput(self._decode(latent.z).x_hat, latent.z, latent.mu, latent.log_var)

    def compute_loss(
        self,
        x: Tensor,
        output: VAEOutput,
        beta: float | Tensor = 1.0,
        likelihood: str | LikelihoodType = LikelihoodType.GAUSSIAN,
    ) -> LossResult:
        """Negative ELBO: the likelihood summed over features, mean over S, then mean over the batch.

        Diagnostics: `elbo` (with `beta`), `log_likelihood`, `kl_divergence` (without `beta`). In training mode the objective is that
        of `bound`, which may add to them.

        Raises:
            ValueError: `output.x_hat` is not `[B, S, *x.shape[1:]]`.
        """
        result: LossResult = self.bound(x, output, beta, likelihood)
        return result

    def noise_shape(self, num_samples: int | None = None) -> tuple[int, int]:
        """Return (S, D); S None is what the bound trains with, in evaluation mode 1."""
        if num_samples is None:
            num_samples = self.bound.num_samples if self.training else 1
        return (num_samples, self.latent_dim)

    def at_step(self, step: int) -> None:
        """Tell the bound, whose capacity may rise."""
        self.bound.at_step(step)

    def loss(self, batch: Batch, *, eps: Tensor | None = None, beta: float | Tensor = 1.0, likelihood: str = "gaussian") -> LossResult:
        """Forward and loss of `batch.x`, always sampled, with noise `eps [n, S, D]`; None draws as many latents as `noise_shape` says."""
        output = self(batch.x, S=self.noise_shape()[0] if eps is None else eps.shape[1], sample=True, eps=eps)
        return self.compute_loss(batch.x, output, beta, likelihood)

    @torch.inference_mode()
    def log_weights(self, batch: Batch, eps: Tensor, *, likelihood: str = "gaussian") -> Tensor:
        """Return log p(x|z) + log p(z) - log q(z|x), `[n, S]` float64, of the latents that `eps [n, S, D]` draws."""
        q = self._encode(batch.x, sample=False)
        return self.bound.log_weights(batch.x, q.mu, q.log_var, eps, lambda z: self._decode(z).x_hat, likelihood)

    @torch.inference_mode()
    def latents(self, batch: Batch) -> dict[str, Tensor]:
        """Return `{"mu": [n, D], "log_var": [n, D]}`, float32."""
        latent = self._encode(batch.x, sample=False)
        return {"mu": latent.mu.float(), "log_var": latent.log_var.float()}

    @torch.inference_mode()
    def reconstruct(self, batch: Batch, *, likelihood: str = "gaussian") -> Tensor:
        """Return the expected inputs `[n, ...]` at z = mu, see `expected_value`."""
        return expected_value(self(batch.x, sample=False).x_hat.squeeze(1), likelihood)

    @torch.inference_mode()
    def decode_latents(self, z: Tensor, *, label: Tensor | None = None, likelihood: str = "gaussian") -> Tensor:
        """Return the expected inputs `[n, ...]` of latents `z [n, D]`, whatever their label."""
        return expected_value(self._decode(z.unsqueeze(1)).x_hat.squeeze(1), likelihood)


@spec
class VAESpec(VariationalSpec):
    """Variational autoencoder of a backbone; beta other than 1 makes it a beta-VAE, objective=iwae an IWAE."""

    kind: Literal["vae"] = "vae"

    def __post_init__(self) -> None:
        self.check()


@MODELS.register(VAESpec)
def build(model: VAESpec, backbone: object, input_shape: tuple[int, ...]) -> VAE:
    """Build the model of two specs for samples of `input_shape`; weights come from torch's global generator."""
    nets = build_nets(model, backbone, input_shape, model.latent_dim)
    vae = VAE(nets.encoder, nets.decoder, model.latent_dim, model.bound())
    vae.build(torch.zeros(1, *input_shape))
    return vae
