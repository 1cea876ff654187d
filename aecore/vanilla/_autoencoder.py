"""The plain autoencoder: z = f(x), x_hat = g(z). Legend: B batch, D latent, n rows."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from aecore._base.base import ModelOutput
from aecore._base.batch import Batch
from aecore._base.trainable import Trainable
from aecore.loss import LikelihoodType, LossResult, expected_value, row_log_likelihood
from aecore.nn._linear import Linear
from aecore.registry import BACKBONES, LARGEST_SIZE, MODELS, knob, spec


@dataclass(slots=True, eq=False)
class AEEncodeOutput(ModelOutput):
    """Latent `z`, of any shape `[B, ...]`."""

    z: Tensor


@dataclass(slots=True, eq=False)
class AEDecodeOutput(ModelOutput):
    """Reconstruction `x_hat [B, ...]`."""

    x_hat: Tensor


@dataclass(slots=True, eq=False)
class AEOutput(ModelOutput):
    """Reconstruction `x_hat [B, ...]` and latent `z [B, ...]`."""

    x_hat: Tensor
    z: Tensor


class AE(Trainable):
    """Autoencoder of any two modules.

    >>> model = AE(nn.Sequential(nn.Flatten(), nn.Linear(784, 8)), nn.Sequential(nn.Linear(8, 784), nn.Unflatten(1, (1, 28, 28))))
    >>> model(torch.zeros(2, 1, 28, 28))
    AEOutput(x_hat=Tensor(shape=(2, 1, 28, 28), dtype=torch.float32), z=Tensor(shape=(2, 8), dtype=torch.float32))
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def _encode(self, x: Tensor) -> AEEncodeOutput:
        return AEEncodeOutput(self.encoder(x))

    def _decode(self, z: Tensor) -> AEDecodeOutput:
        return AEDecodeOutput(self.decoder(z))

    def forward(self, x: Tensor) -> AEOutput:
        """Return reconstruction and latent of `x [B, ...]`."""
        z = self._encode(x).z
        return AEOutput(self._decode(z).x_hat, z)

    def compute_loss(self, x: Tensor, output: AEOutput, likelihood: str | LikelihoodType = LikelihoodType.GAUSSIAN) -> LossResult:
        """Negative log-likelihood, summed over features, mean over the batch; diagnostics: `log_likelihood`.

        Raises
        ------
        ValueError
            `output.x_hat` and `x` differ in shape.
        """
        mean = row_log_likelihood(x, output.x_hat, likelihood).mean()
        return LossResult(-mean, {"log_likelihood": mean})

    def noise_shape(self, num_samples: int = 1) -> tuple[int, ...] | None:
        """None: nothing is drawn."""
        return None

    def loss(self, batch: Batch, *, eps: Tensor | None = None, beta: float | Tensor = 1.0, likelihood: str = "gaussian") -> LossResult:
        """Forward and loss of `batch.x`; there is no KL and no noise, so `eps` and `beta` change nothing."""
        return self.compute_loss(batch.x, self(batch.x), likelihood)

    @torch.inference_mode()
    def latents(self, batch: Batch) -> dict[str, Tensor]:
        """Return `{"z": [n, D]}`, flattened, float32."""
        return {"z": self._encode(batch.x).z.flatten(1).float()}

    @torch.inference_mode()
    def reconstruct(self, batch: Batch, *, likelihood: str = "gaussian") -> Tensor:
        """Return the expected inputs `[n, ...]`: the decoder's output, through a sigmoid if the likelihood is Bernoulli."""
        return expected_value(self._decode(self._encode(batch.x).z).x_hat, likelihood)

    @torch.inference_mode()
    def decode_latents(self, z: Tensor, *, label: Tensor | None = None, likelihood: str = "gaussian") -> Tensor:
        """Return the expected inputs `[n, ...]` of latents `z [n, D]`, whatever their label."""
        return expected_value(self._decode(z).x_hat, likelihood)


@spec
class AESpec:
    """Autoencoder of a backbone and a linear bottleneck."""

    columns: ClassVar[tuple[str, ...]] = ("z",)
    kind: Literal["ae"] = "ae"
    latent_dim: int = knob(32, "size of the latent vector", ge=1, le=LARGEST_SIZE)
    likelihood: Literal["gaussian", "bernoulli", "laplace"] = knob("gaussian", "how the decoder's output is scored; bernoulli takes logits")

    def beta_at(self, step: int) -> float:
        """Return 1: there is no regularizer to weigh."""
        return 1.0


@MODELS.register(AESpec)
def build(model: AESpec, backbone: object, input_shape: tuple[int, ...]) -> AE:
    """Build the model of two specs for samples of `input_shape`; weights come from torch's global generator."""
    nets = BACKBONES.build(backbone, input_shape, model.latent_dim)
    nets.check_likelihood(model.likelihood)
    ae = AE(nn.Sequential(nets.encoder, Linear(nets.num_features, model.latent_dim)), nets.decoder)
    ae.build(torch.zeros(1, *input_shape))
    return ae
