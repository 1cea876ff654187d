"""The variational autoencoder of Kingma & Welling (2013). Legend: B batch, S samples, D latent, n rows."""

from typing import Literal

import torch
from torch import Tensor

from aecore.loss import expected_value
from aecore.registry import MODELS, spec
from aecore.variational._gaussian import GaussianVAE, VAEDecodeOutput, VAEEncodeOutput, VAEOutput
from aecore.variational._spec import VariationalSpec, build_nets


class VAE(GaussianVAE):
    r"""VAE of any encoder `[B, ...] -> [B, F]` and decoder `[N, D] -> [N, ...]`; the S axis is always there.

    .. math:: \mathcal{L}(x; \beta) = E_{q(z|x)}[\log p(x|z)] - \beta\, KL(q(z|x) \,\|\, N(0, I))

    `bound` has the other objectives, the scale of the likelihood and S; the default is the formula above, with one sample.

    >>> model = VAE(nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU()), nn.Linear(8, 784), latent_dim=8)
    >>> model.build(torch.zeros(1, 784))
    >>> model(torch.zeros(2, 784), S=3).x_hat.shape
    torch.Size([2, 3, 784])
    """

    def _encode(self, x: Tensor, S: int = 1, sample: bool | None = None, eps: Tensor | None = None) -> VAEEncodeOutput:
        return VAEEncodeOutput(*self.sampling_layer(self.encoder(x), S, sample, eps))

    def _decode(self, z: Tensor) -> VAEDecodeOutput:
        self._require_latents(z)
        return VAEDecodeOutput(self.decoder(z.flatten(0, 1)).unflatten(0, z.shape[:2]))

    def forward(self, x: Tensor, S: int = 1, sample: bool | None = None, eps: Tensor | None = None) -> VAEOutput:
        """Encode, draw S latents per input and decode them.

        Parameters
        ----------
        x
            Inputs `[B, ...]`.
        S
            Latents per input, at least 1.
        sample
            True draws, False takes z = mu; None draws in training mode and takes the mean in evaluation mode.
        eps
            Standard normal noise `[B, S, D]` to draw with; None takes it from torch's global generator.
        """
        latent = self._encode(x, S, sample, eps)
        return VAEOutput(self._decode(latent.z).x_hat, latent.z, latent.mu, latent.log_var)

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
