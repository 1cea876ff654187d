"""The conditional VAE of Sohn et al. (2015): posterior and decoder depend on the class. Legend: B batch, S samples, D latent, n rows.

The class id is appended as a one-hot vector to the encoder's features and to the latent, so z encodes what the class does not.
"""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from aecore._base.batch import Batch
from aecore.errors import InputError
from aecore.loss import expected_value
from aecore.registry import LARGEST_SIZE, MODELS, knob, spec
from aecore.variational._gaussian import GaussianVAE, VAEDecodeOutput, VAEEncodeOutput, VAEOutput
from aecore.variational._spec import VariationalSpec, build_nets
from aecore.variational.bound import VariationalObjective


class ConditionalVAE(GaussianVAE):
    r"""VAE conditioned on a class y of `num_classes`: encoder `[B, ...] -> [B, F]`, decoder `[N, D + num_classes] -> [N, ...]`.

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

    def __init__(
        self, encoder: nn.Module, decoder: nn.Module, latent_dim: int, num_classes: int, bound: VariationalObjective | None = None
    ) -> None:
        super().__init__(encoder, decoder, latent_dim, bound)
        if num_classes < 1:
            raise ValueError(f"num_classes must be >= 1, got {num_classes}")
        self.num_classes = num_classes

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
        self._require_latents(z, "model.decode_latents(z, label=...)")
        hot = self._one_hot(label, z[:, 0]).unsqueeze(1).expand(-1, z.shape[1], -1)
        code = torch.cat([z, hot], 2)
        return VAEDecodeOutput(self.decoder(code.flatten(0, 1)).unflatten(0, z.shape[:2]))

    def _one_hot(self, label: Tensor | None, like: Tensor) -> Tensor:
        """Return `[B, num_classes]` in the dtype and on the device of `like [B, ...]`; InputError for labels that name no class.

        On a GPU, or while compiling, labels are not checked (that would wait for the device): a wrong one becomes NaN, which the
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

        Raises
        ------
        InputError
            No labels, one that names no class, or a wrong shape.
        """
        latent = self._encode(x, label, S, sample, eps)
        return VAEOutput(self._decode(latent.z, label).x_hat, latent.z, latent.mu, latent.log_var)

    def condition(self, batch: Batch) -> tuple[Tensor | None]:
        """Return the labels."""
        return (batch.label,)

    @torch.inference_mode()
    def decode_latents(self, z: Tensor, *, label: Tensor | None = None, likelihood: str = "gaussian") -> Tensor:
        """Return the expected inputs `[n, ...]` of latents `z [n, D]` and classes `label [n]`, float32, in data space."""
        return expected_value(self._decode(z.unsqueeze(1), label).x_hat.squeeze(1), likelihood)


@spec
class ConditionalVAESpec(VariationalSpec):
    """Conditional VAE of a backbone: it needs the class of every sample, in training, encoding and generation."""

    kind: Literal["cvae"] = "cvae"
    num_classes: int = knob(10, "classes of the data", ge=1, le=LARGEST_SIZE)

    def __post_init__(self) -> None:
        self.check()


@MODELS.register(ConditionalVAESpec)
def build(model: ConditionalVAESpec, backbone: object, input_shape: tuple[int, ...]) -> ConditionalVAE:
    """Build the model of two specs for samples of `input_shape`; weights come from torch's global generator."""
    nets = build_nets(model, backbone, input_shape, model.latent_dim + model.num_classes)
    cvae = ConditionalVAE(nets.encoder, nets.decoder, model.latent_dim, model.num_classes, model.bound())
    cvae.build(torch.zeros(1, *input_shape))
    return cvae
