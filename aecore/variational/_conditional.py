"""The conditional VAE of Sohn et al. (2015): posterior and decoder are told the class. Legend: B batch, S samples, D latent, n rows.

The class id goes in as a one-hot vector beside the encoder's features and beside the latent, so z is left with what the class does not say.
"""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from aecore._base.batch import Batch
from aecore._base.trainable import Trainable
from aecore.errors import InputError
from aecore.loss import LikelihoodType, LossResult, expected_value
from aecore.registry import MODELS, knob, spec
from aecore.variational._spec import VariationalSpec, build_nets
from aecore.variational._vae import VAEDecodeOutput, VAEEncodeOutput, VAEOutput
from aecore.variational.bound import Bound
from aecore.variational.stochastic_layers import FullyFactorizedGaussian


class ConditionalVAE(Trainable):
    r"""VAE given a class y of `num_classes`: encoder `[B, ...] -> [B, F]`, decoder `[N, D + num_classes] -> [N, ...]`.

    .. math:: \mathcal{L}(x; \beta) = E_{q(z|x,y)}[\log p(x|z,y)] - \beta\, KL(q(z|x,y) \,\|\, N(0, I))

    Labels are class ids `[B]`, whole numbers in 0..num_classes-1. `bound` has the objectives and options of `VAE`.

    >>> model = ConditionalVAE(nn.Linear(12, 8), nn.Linear(4 + 3, 12), latent_dim=4, num_classes=3)
    >>> model.build(torch.zeros(1, 12))
    >>> model(torch.zeros(2, 12), torch.tensor([0, 2]), S=5).x_hat.shape
    torch.Size([2, 5, 12])
    """

    train_inputs: ClassVar[tuple[str, ...]] = ("x", "label")
    encode_inputs: ClassVar[tuple[str, ...]] = ("x", "label")
    num_classes: int

    def __init__(self, encoder: nn.Module, decoder: nn.Module, latent_dim: int, num_classes: int, bound: Bound | None = None) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be >= 1, got {num_classes}")
        self.encoder = encoder
        self.decoder = decoder
        self.latent_dim = latent_dim
        self.num_classes = num_classes
        self.sampling_layer = FullyFactorizedGaussian(latent_dim)
        self.bound = bound or Bound()

    def build(self, input_sample: Any, label: Tensor | None = None) -> None:  # any: as the base has it
        """Materialise lazy layers with one input batch `[B, ...]`; labels are zeros unless given."""
        super().build(input_sample, torch.zeros(len(input_sample), dtype=torch.int64) if label is None else label)

    def _encode(
        self, x: Tensor, label: Tensor | None = None, S: int = 1, sample: bool | None = None, eps: Tensor | None = None
    ) -> VAEEncodeOutput:
        features = self.encoder(x)
        if features.ndim == 2:  # else the sampling layer says what is wrong
            features = torch.cat([features, self._one_hot(label, features)], 1)
        return VAEEncodeOutput(*self.sampling_layer(features, S, sample, eps))

    def _decode(self, z: Tensor, label: Tensor | None = None) -> VAEDecodeOutput:
        if z.ndim != 3 or z.shape[2] != self.latent_dim:
            raise ValueError(
                f"z must have the shape [B, S, D] with D = {self.latent_dim}, got {tuple(z.shape)}: "
                "for one latent per row use z.unsqueeze(1), or call model.decode_latents(z, label=...)"
            )
        hot = self._one_hot(label, z[:, 0]).unsqueeze(1).expand(-1, z.shape[1], -1)
        code = torch.cat([z, hot], 2)
        return VAEDecodeOutput(self.decoder(code.flatten(0, 1)).unflatten(0, z.shape[:2]))

    def _one_hot(self, label: Tensor | None, like: Tensor) -> Tensor:
        """Return `[B, num_classes]` in the dtype and on the device of `like [B, ...]`; InputError for labels that name no class.

        On a GPU, or while compiling, labels are not looked at (that would wait for the device): a wrong one becomes NaN, which the
        loss shows.
        """
        wanted = f"ConditionalVAE takes one class id in 0..{self.num_classes - 1} per input"
        if label is None:
            raise InputError(f"{wanted}, and there are no labels: give label=, or shard the data in class folders")
        if label.shape != like.shape[:1] or label.is_floating_point() or label.is_complex():
            raise InputError(f"{wanted}, an integer tensor of shape {tuple(like.shape[:1])}; got {label.dtype} {tuple(label.shape)}")
        label = label.to(like.device)
        known = (label >= 0) & (label < self.num_classes)
        if not torch.compiler.is_compiling() and label.device.type == "cpu" and not known.all():
            wrong = sorted(set(label[~known].tolist()))
            none = " (-1 is a sample without a label)" if -1 in wrong else ""
            raise InputError(f"{wanted}, got {', '.join(map(str, wrong[:5]))}{none}: set num_classes to the number of classes of the data")
        hot = label.unsqueeze(1) == torch.arange(self.num_classes, device=like.device)
        return torch.where(known.unsqueeze(1), hot.to(like.dtype), torch.nan)

    def forward(
        self, x: Tensor, label: Tensor | None = None, S: int = 1, sample: bool | None = None, eps: Tensor | None = None
    ) -> VAEOutput:
        """Encode inputs `[B, ...]` of classes `label [B]`, draw S latents each and decode them; `sample` and `eps` as for `VAE`.

        Raises:
            InputError: no labels, one that names no class, or a wrong shape.
        """
        latent = self._encode(x, label, S, sample, eps)
        return VAEOutput(self._decode(latent.z, label).x_hat, latent.z, latent.mu, latent.log_var)

    def compute_loss(
        self,
        x: Tensor,
        output: VAEOutput,
        beta: float | Tensor = 1.0,
        likelihood: str | LikelihoodType = LikelihoodType.GAUSSIAN,
    ) -> LossResult:
        """Negative ELBO given the labels, with the diagnostics and errors of `VAE.compute_loss`."""
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
        """Forward and loss of `batch.x` given `batch.label`, always sampled, with noise `eps [n, S, D]`; None draws its own."""
        output = self(batch.x, batch.label, S=self.noise_shape()[0] if eps is None else eps.shape[1], sample=True, eps=eps)
        return self.compute_loss(batch.x, output, beta, likelihood)

    @torch.inference_mode()
    def log_weights(self, batch: Batch, eps: Tensor, *, likelihood: str = "gaussian") -> Tensor:
        """Return log p(x|z,y) + log p(z) - log q(z|x,y), `[n, S]` float64, of the latents that `eps [n, S, D]` draws."""
        q = self._encode(batch.x, batch.label, sample=False)
        return self.bound.log_weights(batch.x, q.mu, q.log_var, eps, lambda z: self._decode(z, batch.label).x_hat, likelihood)

    @torch.inference_mode()
    def latents(self, batch: Batch) -> dict[str, Tensor]:
        """Return `{"mu": [n, D], "log_var": [n, D]}`, float32."""
        latent = self._encode(batch.x, batch.label, sample=False)
        return {"mu": latent.mu.float(), "log_var": latent.log_var.float()}

    @torch.inference_mode()
    def reconstruct(self, batch: Batch, *, likelihood: str = "gaussian") -> Tensor:
        """Return the expected inputs `[n, ...]` at z = mu given the labels, see `expected_value`."""
        return expected_value(self(batch.x, batch.label, sample=False).x_hat.squeeze(1), likelihood)

    @torch.inference_mode()
    def decode_latents(self, z: Tensor, *, label: Tensor | None = None, likelihood: str = "gaussian") -> Tensor:
        """Return the expected inputs `[n, ...]` of latents `z [n, D]` and classes `label [n]`, float32, in data space."""
        return expected_value(self._decode(z.unsqueeze(1), label).x_hat.squeeze(1), likelihood)


@spec
class ConditionalVAESpec(VariationalSpec):
    """Conditional VAE of a backbone: it is told the class of every sample, in training, encoding and generation."""

    kind: Literal["cvae"] = "cvae"
    num_classes: int = knob(10, "classes of the data", ge=1)

    def __post_init__(self) -> None:
        self.check()


@MODELS.register(ConditionalVAESpec)
def build(model: ConditionalVAESpec, backbone: object, input_shape: tuple[int, ...]) -> ConditionalVAE:
    """Build the model of two specs for samples of `input_shape`; weights come from torch's global generator."""
    nets = build_nets(model, backbone, input_shape, model.latent_dim + model.num_classes)
    cvae = ConditionalVAE(nets.encoder, nets.decoder, model.latent_dim, model.num_classes, model.bound())
    cvae.build(torch.zeros(1, *input_shape))
    return cvae
