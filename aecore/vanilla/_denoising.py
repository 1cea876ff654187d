"""The denoising autoencoder of Vincent et al. (2008): the clean input from a corrupted one. Legend: B batch, S draws, n rows."""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from aecore._base.batch import Batch
from aecore.errors import ConfigError
from aecore.loss import LossResult, sample_log_likelihood
from aecore.nn._linear import Linear
from aecore.registry import BACKBONES, LARGEST_SIZE, MODELS, knob, spec
from aecore.vanilla._autoencoder import AE, AEOutput

Noise = Literal["gaussian", "mask", "salt_pepper"]
RANGES: dict[str, tuple[float, float] | None] = {"unit": (0.0, 1.0), "symmetric": (-1.0, 1.0), "none": None}


class DenoisingAE(AE):
    r"""Autoencoder that reads a corrupted :math:`\tilde x` and is scored against x.

    gaussian: :math:`\tilde x = \mathrm{clamp}(x + f \epsilon)`; mask: each value is 0 with probability f; salt_pepper: each value is the
    lowest or the highest of the range, each with probability f / 2. In evaluation mode nothing is corrupted unless `add_noise=True`.

    >>> model = DenoisingAE(nn.Linear(784, 64), nn.Sequential(nn.Linear(64, 784), nn.Sigmoid()), noise_factor=0.5)
    >>> x = torch.rand(8, 784)
    >>> denoised = model(model.add_noise(x), add_noise=False).x_hat

    Parameters
    ----------
    noise_factor
        F; a standard deviation for gaussian noise, else a share in [0, 1].
    clamp
        Range of the values, to which gaussian noise is clamped; None does not clamp (salt_pepper needs a range).
    input_shape
        Shape of one sample, for the trainer that draws the noise; None: `loss` draws its own.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        noise_factor: float = 0.3,
        noise: Noise = "gaussian",
        clamp: tuple[float, float] | None = (0.0, 1.0),
        input_shape: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(encoder, decoder)
        _check(noise_factor, noise, clamp)
        self.noise_factor = noise_factor
        self.noise = noise
        self.clamp = clamp
        self.input_shape = input_shape

    def add_noise(self, x: Tensor, eps: Tensor | None = None) -> Tensor:
        """Return `x` corrupted by standard normal noise `eps` of its shape; None draws it from torch's global generator.

        Raises
        ------
        ValueError
            `eps` of another shape.
        """
        if eps is None:
            eps = torch.randn_like(x)
        elif eps.shape != x.shape:
            raise ValueError(f"eps must have the shape of x, {tuple(x.shape)}, got {tuple(eps.shape)}")
        if self.noise == "gaussian":
            noisy = x + self.noise_factor * eps.to(x.dtype)
            return noisy if self.clamp is None else noisy.clamp(*self.clamp)
        uniform = torch.special.ndtr(eps)
        if self.noise == "mask":
            return torch.where(uniform < self.noise_factor, torch.zeros_like(x), x)
        assert self.clamp is not None
        lowest, highest = (torch.full_like(x, value) for value in self.clamp)
        peppered = torch.where(uniform < self.noise_factor / 2, lowest, x)
        return torch.where(uniform > 1 - self.noise_factor / 2, highest, peppered)

    def forward(self, x: Tensor, add_noise: bool | None = None, eps: Tensor | None = None) -> AEOutput:
        """Return reconstruction and latent of `x [B, ...]`, corrupted first if `add_noise`; None: in training mode only."""
        noisy = self.training if add_noise is None else add_noise
        return super().forward(self.add_noise(x, eps) if noisy else x)

    def noise_shape(self, num_samples: int = 1) -> tuple[int, ...] | None:
        """Return (S, *input_shape); None if the shape of the inputs is not known."""
        return None if self.input_shape is None else (num_samples, *self.input_shape)

    def loss(self, batch: Batch, *, eps: Tensor | None = None, beta: float | Tensor = 1.0, likelihood: str = "gaussian") -> LossResult:
        """Score the reconstruction of corrupted inputs against `batch.x`; there is no KL, so `beta` changes nothing.

        `eps` is `[n, S, *input_shape]` (None: one corruption per row). In evaluation mode nothing is corrupted and `eps` is not read.
        """
        x = batch.x
        if not self.training:
            return self.compute_loss(x, self(x), likelihood)
        draws = 1 if eps is None else eps.shape[1]
        repeated = x.unsqueeze(1).expand(len(x), draws, *x.shape[1:]).flatten(0, 1)
        x_hat = self(repeated, True, None if eps is None else eps.flatten(0, 1)).x_hat
        mean = sample_log_likelihood(x, x_hat.unflatten(0, (len(x), draws)), likelihood).mean(1).mean()
        return LossResult(-mean, {"log_likelihood": mean})


def _check(noise_factor: float, noise: str, clamp: tuple[float, float] | None) -> None:
    if noise not in ("gaussian", "mask", "salt_pepper"):
        raise ValueError(f"noise must be 'gaussian', 'mask' or 'salt_pepper', got {noise!r}")
    if noise_factor < 0 or (noise != "gaussian" and noise_factor > 1):
        limit = ">= 0" if noise == "gaussian" else f"a share in [0, 1] for {noise} noise"
        raise ValueError(f"noise_factor must be {limit}, got {noise_factor}")
    if noise == "salt_pepper" and clamp is None:
        raise ValueError("salt_pepper noise sets values to the ends of a range: give clamp=(lowest, highest)")


@spec
class DenoisingAESpec:
    """Denoising autoencoder of a backbone and a linear bottleneck: trained on corrupted inputs, scored against the clean ones."""

    columns: ClassVar[tuple[str, ...]] = ("z",)
    kind: Literal["dae"] = "dae"
    latent_dim: int = knob(64, "size of the latent vector", ge=1, le=LARGEST_SIZE)
    noise: Noise = knob("gaussian", "gaussian; mask: values set to 0; salt_pepper: values set to the ends of the range")
    noise_factor: float = knob(
        0.3, "standard deviation of the gaussian noise, or the share of values that mask and salt_pepper change", ge=0
    )
    clamp: Literal["unit", "symmetric", "none"] = knob("unit", "range of the values: [0, 1], [-1, 1] (as transform.scale), or none")
    likelihood: Literal["gaussian", "bernoulli"] = knob("gaussian", "how the decoder's output is scored; bernoulli takes logits")

    def __post_init__(self) -> None:
        """ConfigError for noise that cannot be made."""
        try:
            _check(self.noise_factor, self.noise, RANGES[self.clamp])
        except ValueError as error:
            raise ConfigError(f"DenoisingAESpec: {error}") from None

    def beta_at(self, step: int) -> float:
        """Return 1: there is no regularizer to weigh."""
        return 1.0


@MODELS.register(DenoisingAESpec)
def build(model: DenoisingAESpec, backbone: object, input_shape: tuple[int, ...]) -> DenoisingAE:
    """Build the model of two specs for samples of `input_shape`; weights come from torch's global generator."""
    nets = BACKBONES.build(backbone, input_shape, model.latent_dim)
    nets.check_likelihood(model.likelihood)
    encoder = nn.Sequential(nets.encoder, Linear(nets.num_features, model.latent_dim))
    dae = DenoisingAE(encoder, nets.decoder, model.noise_factor, model.noise, RANGES[model.clamp], tuple(input_shape))
    dae.build(torch.zeros(1, *input_shape))
    return dae
