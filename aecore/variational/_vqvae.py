"""The vector-quantised autoencoder of van den Oord et al. (2017). Legend: B batch, E embedding, P positions, C channels, n rows."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from aecore._base.base import ModelOutput
from aecore._base.batch import Batch
from aecore._base.trainable import Trainable
from aecore.errors import DataError
from aecore.loss import LikelihoodType, LossResult, expected_value, row_log_likelihood
from aecore.nn import Backbone
from aecore.nn._linear import Linear
from aecore.registry import BACKBONES, LARGEST_SIZE, MODELS, knob, spec
from aecore.variational._codebook import VectorQuantizer, perplexity


@dataclass(slots=True, eq=False)
class VQVAEEncodeOutput(ModelOutput):
    """Quantised latent `z [B, E, ...]`, its `codes [B, ...]` int32, and the encoder's output `z_e [B, E, ...]` before it was quantised."""

    z: Tensor
    codes: Tensor
    z_e: Tensor


@dataclass(slots=True, eq=False)
class VQVAEDecodeOutput(ModelOutput):
    """Reconstruction `x_hat [B, ...]`."""

    x_hat: Tensor


@dataclass(slots=True, eq=False)
class VQVAEOutput(ModelOutput):
    """Reconstruction `x_hat [B, ...]`, and what `VQVAEEncodeOutput` has."""

    x_hat: Tensor
    z: Tensor
    codes: Tensor
    z_e: Tensor


class VQVAE(Trainable):
    r"""Autoencoder whose latent is a grid of codes: encoder `[B, ...] -> [B, E, ...]`, codebook, decoder `[B, E, ...] -> [B, ...]`.

    .. math:: -\log p(x|z_q) + c\,\|z_e - \mathrm{sg}(z_q)\|^2 \ (+\ \|\mathrm{sg}(z_e) - z_q\|^2)

    In training mode `compute_loss` also moves the codebook (see `VectorQuantizer`); in evaluation mode nothing changes.

    >>> encoder = nn.Sequential(nn.Conv2d(1, 32, 4, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 4, 2, 1))
    >>> decoder = nn.Sequential(nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(32, 1, 4, 2, 1))
    >>> model = VQVAE(encoder, decoder, VectorQuantizer(num_embeddings=512, embedding_dim=64))
    >>> codes = model.encode(torch.zeros(2, 1, 28, 28)).codes
    >>> model.decode(codes)
    VQVAEDecodeOutput(x_hat=Tensor(shape=(2, 1, 28, 28), dtype=torch.float32))

    Parameters
    ----------
    code_shape
        Axes of one sample's codes, such as (7, 7); only `decode_latents` asks, to give flat codes their shape back.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, quantizer: VectorQuantizer, code_shape: tuple[int, ...] = (-1,)) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.quantizer = quantizer
        self.code_shape = code_shape

    def _encode(self, x: Tensor) -> VQVAEEncodeOutput:
        z_e = self.encoder(x)
        codes = self.quantizer.nearest(z_e)
        return VQVAEEncodeOutput(self.quantizer.straight_through(z_e, codes), codes, z_e)

    def _decode(self, z: Tensor) -> VQVAEDecodeOutput:
        """Decode a latent `[B, E, ...]`, or codes `[B, ...]` (any integer type)."""
        return VQVAEDecodeOutput(self.decoder(z if z.is_floating_point() else self.quantizer.embed(z)))

    def forward(self, x: Tensor) -> VQVAEOutput:
        """Return reconstruction, latent and codes of `x [B, ...]`."""
        latent = self._encode(x)
        return VQVAEOutput(self._decode(latent.z).x_hat, latent.z, latent.codes, latent.z_e)

    def compute_loss(
        self,
        x: Tensor,
        output: VQVAEOutput,
        beta: float | Tensor = 1.0,
        likelihood: str | LikelihoodType = LikelihoodType.GAUSSIAN,
        *,
        positions: Tensor | None = None,
        num_global: int | None = None,
    ) -> LossResult:
        """Negative log-likelihood (summed over features) and distances (over E and positions), means over the batch.

        `beta` multiplies the commitment. In training mode the codebook is moved by this batch; `positions` and `num_global` say which
        part of a global batch it is (see `VectorQuantizer.update`). Diagnostics: `log_likelihood`, `commitment` (without its weight),
        `perplexity`: how many codes this batch uses, in training over all ranks.

        Raises
        ------
        ValueError
            `output.x_hat` and `x` differ in shape.
        """
        log_px = row_log_likelihood(x, output.x_hat, likelihood).mean()
        commitment, codebook = self.quantizer.losses(output.z_e, output.codes)
        objective = -log_px + beta * self.quantizer.commitment_cost * commitment + codebook
        if self.training:
            used = self.quantizer.update(output.z_e, output.codes, positions, num_global)
        else:
            used = self.quantizer.count(output.codes)
        return LossResult(objective, {"log_likelihood": log_px, "commitment": commitment, "perplexity": perplexity(used)})

    def noise_shape(self, num_samples: int = 1) -> None:
        """None: nothing is drawn."""

    def loss(self, batch: Batch, *, eps: Tensor | None = None, beta: float | Tensor = 1.0, likelihood: str = "gaussian") -> LossResult:
        """Forward and loss of `batch.x`; there is no noise, so `eps` changes nothing."""
        output = self(batch.x)
        return self.compute_loss(batch.x, output, beta, likelihood, positions=batch.positions, num_global=batch.num_global)

    @torch.inference_mode()
    def latents(self, batch: Batch) -> dict[str, Tensor]:
        """Return `{"codes": [n, P]}`, flattened, int32; -1 where the encoder's output is not finite."""
        latent = self._encode(batch.x)
        codes = torch.where(latent.z_e.isfinite().all(1), latent.codes, -1)
        return {"codes": codes.reshape(len(codes), -1)}

    @torch.inference_mode()
    def embedding(self, batch: Batch) -> Tensor:
        """Return the codebook's vectors at all positions, one after the other, `[n, E * P]`."""
        return self.quantizer.embed(self._encode(batch.x).codes).flatten(1).float()

    @torch.inference_mode()
    def reconstruct(self, batch: Batch, *, likelihood: str = "gaussian") -> Tensor:
        """Return the expected inputs `[n, ...]`: the decoder's output, through a sigmoid if the likelihood is Bernoulli."""
        return expected_value(self(batch.x).x_hat, likelihood)

    @torch.inference_mode()
    def decode_latents(self, z: Tensor, *, label: Tensor | None = None, likelihood: str = "gaussian") -> Tensor:
        """Return the expected inputs `[n, ...]` of flat codes `z [n, P]`, as the column `codes` holds them.

        Raises
        ------
        DataError
            A code that the codebook does not have.
        """
        lowest, highest, known = int(z.min()), int(z.max()), self.quantizer.num_embeddings
        if lowest < 0 or highest >= known:
            raise DataError(
                f"codes from {lowest} to {highest}, and this codebook has 0 to {known - 1}: decode the `codes` column of a table "
                "that this model made"
            )
        return expected_value(self._decode(z.long().reshape(len(z), *self.code_shape)).x_hat, likelihood)


@spec
class VQVAESpec:
    """Vector-quantised autoencoder of a backbone: integer codes, one per position of its feature map."""

    columns: ClassVar[tuple[str, ...]] = ("codes",)
    kind: Literal["vqvae"] = "vqvae"
    latent_dim: int = knob(
        16, "codes per sample, for a backbone without a feature map (mlp); a map has one per position", ge=1, le=LARGEST_SIZE
    )
    num_embeddings: int = knob(512, "vectors in the codebook", ge=2, le=LARGEST_SIZE)
    embedding_dim: int = knob(64, "size of each vector", ge=1, le=LARGEST_SIZE)
    commitment_cost: float = knob(0.25, "weight of the distance between the encoder's output and its code", ge=0)
    codebook: Literal["ema", "loss"] = knob("ema", "how the codebook follows the encoder: moving averages, or a loss term")
    decay: float = knob(0.99, "of the moving averages, per step", ge=0, le=0.99999)
    reset_below: float = knob(
        0.05, "codes used less than this share of the mean are replaced by a vector of the batch; 0: never", ge=0, le=0.9
    )
    likelihood: Literal["gaussian", "bernoulli"] = knob("gaussian", "how the decoder's output is scored; bernoulli takes logits")

    def beta_at(self, step: int) -> float:
        """Return 1: the commitment has its own weight."""
        return 1.0


@MODELS.register(VQVAESpec)
def build(model: VQVAESpec, backbone: object, input_shape: tuple[int, ...]) -> VQVAE:
    """Build the model of two specs for samples of `input_shape`; weights come from torch's global generator."""
    nets: Backbone = BACKBONES.build(backbone, input_shape, 1)  # if it has a map, its own first linear layer is not used
    nets.check_likelihood(model.likelihood)
    if nets.map_shape is None or nets.map_decoder is None:
        nets = BACKBONES.build(backbone, input_shape, model.latent_dim * model.embedding_dim)
        encoder, decoder = _of_vectors(model, nets)
    else:
        encoder, decoder = _of_maps(model.embedding_dim, nets.encoder, nets.map_decoder, nets.map_shape)
    quantizer = VectorQuantizer(
        model.num_embeddings,
        model.embedding_dim,
        model.commitment_cost,
        codebook=model.codebook,
        decay=model.decay,
        reset_below=model.reset_below,
    )
    vqvae = VQVAE(encoder, decoder, quantizer)
    vqvae.build(torch.zeros(1, *input_shape))
    return vqvae


def _of_vectors(model: VQVAESpec, nets: Backbone) -> tuple[nn.Module, nn.Module]:
    """Return nets through `[B, E, P]` with P = latent_dim, by linear maps."""
    size = model.latent_dim * model.embedding_dim
    split = nn.Unflatten(1, (model.embedding_dim, model.latent_dim))
    return nn.Sequential(nets.encoder, Linear(nets.num_features, size), split), nn.Sequential(nn.Flatten(), nets.decoder)


def _of_maps(size: int, encoder: nn.Module, decoder: nn.Module, map_shape: tuple[int, ...]) -> tuple[nn.Module, nn.Module]:
    """Return nets through `[B, E, P]`, P positions of a map `(C, *axes)` in row-major order, by convolutions of one position."""
    channels, axes = map_shape[0], map_shape[1:]
    into = nn.Sequential(encoder, nn.Unflatten(1, (channels, -1)), nn.Conv1d(channels, size, 1))
    return into, nn.Sequential(nn.Conv1d(size, channels, 1), nn.Unflatten(2, axes), decoder)
