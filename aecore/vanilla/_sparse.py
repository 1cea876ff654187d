"""The sparse autoencoder: few latents are active for any one input. Legend: B batch, D latent, n rows."""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from aecore._base.batch import Batch
from aecore._base.collective import sum_over_ranks
from aecore.loss import LikelihoodType, LossResult
from aecore.loss._precision import at_least_float32, without_autocast
from aecore.nn._linear import Linear
from aecore.registry import BACKBONES, LARGEST_SIZE, MODELS, knob, spec
from aecore.vanilla._autoencoder import AE, AEOutput

SMALLEST = 1e-6  # mean activations are kept this far from 0 and 1, where the divergence is infinite


class SparseAE(AE):
    r"""Autoencoder with a price on active latents: :math:`-\log p(x|z) + \beta\,w\,\Omega(z)`.

    l1: :math:`\Omega = \sum_j |z_j|`, mean over the batch. kl (Ng 2011): :math:`\sum_j KL(\rho \,\|\, \hat\rho_j)` between Bernoulli
    variables, with :math:`\hat\rho_j` the mean of z_j over the batch; z must be in (0, 1), so end the encoder with `nn.Sigmoid()`.
    The mean is that of the global batch: in training it is summed over ranks if torch.distributed is initialised.

    >>> encoder = nn.Sequential(nn.Linear(784, 64), nn.ReLU())
    >>> model = SparseAE(encoder, nn.Sequential(nn.Linear(64, 784), nn.Sigmoid()), sparsity_weight=1e-3)
    >>> list(model.compute_loss(torch.zeros(2, 784), model(torch.zeros(2, 784))).tensors)
    ['log_likelihood', 'sparsity', 'mean_activation', 'active_share']
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        sparsity_weight: float = 1e-3,
        penalty: Literal["l1", "kl"] = "l1",
        rho: float = 0.05,
    ) -> None:
        super().__init__(encoder, decoder)
        if penalty not in ("l1", "kl"):
            raise ValueError(f"penalty must be 'l1' or 'kl', got {penalty!r}")
        if not 0 < rho < 1 or sparsity_weight < 0:
            raise ValueError(f"expected sparsity_weight >= 0 and 0 < rho < 1, got {sparsity_weight} and {rho}")
        self.sparsity_weight = sparsity_weight
        self.penalty = penalty
        self.rho = rho

    def compute_loss(
        self,
        x: Tensor,
        output: AEOutput,
        likelihood: str | LikelihoodType = LikelihoodType.GAUSSIAN,
        beta: float | Tensor = 1.0,
        *,
        counts: bool = True,
    ) -> LossResult:
        """Negative log-likelihood (summed over features, mean over the batch) plus `beta * sparsity_weight * sparsity`.

        Diagnostics: `log_likelihood`, `sparsity` (without its weights), `mean_activation` (of |z|), `active_share` (of latents that are
        not 0). `counts=False` leaves the rows out of the batch's mean activations: a rank without a sample.

        Raises
        ------
        ValueError
            `output.x_hat` and `x` differ in shape.
        """
        plain = super().compute_loss(x, output, likelihood)
        with without_autocast(output.z):
            z = at_least_float32(output.z).flatten(1)
            sparsity = z.abs().sum(1).mean() if self.penalty == "l1" else self._divergence(z, counts)
        activity = {"mean_activation": z.detach().abs().mean(), "active_share": (z.detach() != 0).float().mean()}
        objective = plain.objective + beta * self.sparsity_weight * sparsity
        return LossResult(objective, {**plain.tensors, "sparsity": sparsity, **activity})

    def _divergence(self, z: Tensor, counts: bool) -> Tensor:
        """Return KL(rho || mean activation) summed over latents; its value is the global batch's, its gradient this rank's part of it."""
        mean = z.mean(0)
        if self.training:
            part = torch.cat([z.detach().double().sum(0), z.new_full((1,), len(z), dtype=torch.float64)])
            total = sum_over_ranks(part if counts else torch.zeros_like(part))
            mean = mean + ((total[:-1] / total[-1]).to(mean.dtype) - mean.detach())
        mean = mean.clamp(SMALLEST, 1 - SMALLEST)
        rho = torch.full_like(mean, self.rho)
        return (torch.xlogy(rho, rho / mean) + torch.xlogy(1 - rho, (1 - rho) / (1 - mean))).sum()

    def loss(self, batch: Batch, *, eps: Tensor | None = None, beta: float | Tensor = 1.0, likelihood: str = "gaussian") -> LossResult:
        """Forward and loss of `batch.x`; there is no noise, so `eps` changes nothing; `beta` multiplies the sparsity's weight."""
        return self.compute_loss(batch.x, self(batch.x), likelihood, beta, counts=len(batch.positions) > 0)


@spec
class SparseAESpec:
    """Sparse autoencoder of a backbone and a bottleneck of rectified (l1) or squashed (kl) linear units."""

    columns: ClassVar[tuple[str, ...]] = ("z",)
    kind: Literal["sae"] = "sae"
    latent_dim: int = knob(64, "size of the latent vector", ge=1, le=LARGEST_SIZE)
    sparsity_weight: float = knob(1e-3, "weight of the penalty, against a likelihood summed over features", ge=0)
    penalty: Literal["l1", "kl"] = knob(
        "l1", "l1: sum of |z|, through a ReLU; kl: divergence of mean activations from rho, through a sigmoid"
    )
    rho: float = knob(0.05, "kl: the share of inputs for which a latent should be active", gt=0, le=0.99)
    likelihood: Literal["gaussian", "bernoulli"] = knob("gaussian", "how the decoder's output is scored; bernoulli takes logits")

    def beta_at(self, step: int) -> float:
        """Return 1: the penalty has its own weight."""
        return 1.0


@MODELS.register(SparseAESpec)
def build(model: SparseAESpec, backbone: object, input_shape: tuple[int, ...]) -> SparseAE:
    """Build the model of two specs for samples of `input_shape`; weights come from torch's global generator."""
    nets = BACKBONES.build(backbone, input_shape, model.latent_dim)
    nets.check_likelihood(model.likelihood)
    unit = nn.ReLU() if model.penalty == "l1" else nn.Sigmoid()
    encoder = nn.Sequential(nets.encoder, Linear(nets.num_features, model.latent_dim), unit)
    sae = SparseAE(encoder, nets.decoder, model.sparsity_weight, model.penalty, model.rho)
    sae.build(torch.zeros(1, *input_shape))
    return sae
