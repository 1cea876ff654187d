"""The adaptive group VAE of Locatello et al. (2020), "Weakly-Supervised Disentanglement Without Compromises".

Two inputs that share some unknown factors are encoded; latent dimensions in which their posteriors are close are taken as shared and
averaged. That happens in training only: a trained model encodes single inputs, by the VAE that it wraps.
Legend: B batch, S samples, D latent, n rows.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from aecore._base.base import ModelOutput
from aecore._base.batch import Batch
from aecore._base.trainable import Trainable
from aecore.loss import LikelihoodType, LossResult, kl_divergence_diag_gaussian
from aecore.loss._precision import at_least_float32, without_autocast
from aecore.registry import LARGEST_SIZE, MODELS, knob, spec
from aecore.variational._gaussian import VAEDecodeOutput, VAEEncodeOutput, VAEOutput
from aecore.variational._spec import VariationalSpec, build_nets
from aecore.variational._vae import VAE

AVERAGINGS = ("gvae", "mlvae")
DIVERGENCES = ("kl", "symmetric")
Posterior = tuple[Tensor, Tensor]  # mu and log_var, [B, D] each


@dataclass(slots=True, eq=False)
class AdaGVAEOutput(ModelOutput):
    """One `VAEOutput` per input of the pair; in training their posteriors are the adapted ones."""

    output1: VAEOutput
    output2: VAEOutput


class AdaGVAE(Trainable):
    r"""A VAE trained on pairs whose close posterior dimensions are averaged. State dict: that of the VAE, prefixed with `vae.`.

    Per pair and dimension :math:`\delta_d = KL(q_1 \| q_2)`; dimensions with :math:`\delta_d < (\max_d \delta_d + \min_d \delta_d) / 2`
    are shared. The objective of a pair is the sum of both negative ELBOs, so it is about twice that of one input.

    Parameters
    ----------
    vae
        Encodes and decodes; also the model for single inputs.
    averaging
        Of a shared dimension. `gvae`: mean of the means and of the variances (Hosoya 2019). `mlvae`: normalised geometric
        mean of the posteriors, that is precision-weighted mean and harmonic mean of the variances (Bouchacourt et al. 2018).
    divergence
        `kl` as above, or `symmetric`: the mean of KL(q1 || q2) and KL(q2 || q1).

    >>> model = AdaGVAE(VAE(nn.Linear(12, 8), nn.Linear(4, 12), latent_dim=4))
    >>> model.build(torch.zeros(1, 12))
    >>> model((torch.zeros(2, 12), torch.ones(2, 12)), S=3).output2.z.shape
    torch.Size([2, 3, 4])
    """

    train_inputs: ClassVar[tuple[str, ...]] = ("x", "x_pair")

    def __init__(self, vae: VAE, averaging: str = "gvae", divergence: str = "kl") -> None:
        super().__init__()
        for name, value, known in (("averaging", averaging, AVERAGINGS), ("divergence", divergence, DIVERGENCES)):
            if value not in known:
                raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}")
        self.vae = vae
        self.averaging = averaging
        self.divergence = divergence

    def build(self, input_sample: Any) -> None:  # any: a tensor or a pair of them
        """Materialise lazy layers with one input batch `[B, ...]` or a pair of them; modes are restored, also on failure."""
        if isinstance(input_sample, Tensor):
            self.vae.build(input_sample)
        else:
            super().build(input_sample)

    def _encode(self, x: Tensor, S: int = 1, sample: bool | None = None, eps: Tensor | None = None) -> VAEEncodeOutput:
        return self.vae._encode(x, S, sample, eps)

    def _decode(self, z: Tensor) -> VAEDecodeOutput:
        return self.vae._decode(z)

    def forward(self, pair: tuple[Tensor, Tensor], S: int = 1, sample: bool | None = None, eps: Tensor | None = None) -> AdaGVAEOutput:
        """Encode both inputs, average what they share (training mode only), draw S latents of each and decode them.

        Parameters
        ----------
        pair
            Inputs `x1` and `x2`, both `[B, ...]`.
        S
            Latents per input, at least 1.
        sample
            True draws, False takes z = mu; None draws in training mode and takes the mean in evaluation mode.
        eps
            Standard normal noise `[B, 2, S, D]`, of x1 and x2; None takes it from torch's global generator.

        Raises
        ------
        ValueError
            Not a pair, two shapes, or `eps` of another shape.
        """
        x1, x2 = _require_pair(pair)
        if eps is not None and (eps.ndim != 4 or eps.shape[1] != 2):
            raise ValueError(f"the noise of a pair must have the shape [B, 2, S, D], got {tuple(eps.shape)}")
        eps1, eps2 = (None, None) if eps is None else (eps[:, 0], eps[:, 1])
        if not self.training:
            return AdaGVAEOutput(self.vae(x1, S, sample, eps1), self.vae(x2, S, sample, eps2))
        q1, q2 = self._adapt(self._posterior(x1), self._posterior(x2))
        drawn = sample is None or sample
        return AdaGVAEOutput(self._decoded(q1, S, drawn, eps1), self._decoded(q2, S, drawn, eps2))

    def _posterior(self, x: Tensor) -> Posterior:
        return self.vae.sampling_layer.get_params(self.vae.encoder(x))

    def _decoded(self, q: Posterior, S: int, drawn: bool, eps: Tensor | None) -> VAEOutput:
        mu, log_var = q
        noise = eps if drawn else mu.new_zeros(len(mu), S, mu.shape[1])
        z = self.vae.sampling_layer.reparametrize(mu, log_var, S, noise)
        return VAEOutput(self.vae._decode(z).x_hat, z, mu, log_var)

    def _adapt(self, q1: Posterior, q2: Posterior) -> tuple[Posterior, Posterior]:
        """Return both posteriors with their shared dimensions averaged; which are shared has no gradient."""
        with torch.no_grad():
            delta = kl_divergence_diag_gaussian(*q1, *q2, reduce_sum=False)
            if self.divergence == "symmetric":
                delta = (delta + kl_divergence_diag_gaussian(*q2, *q1, reduce_sum=False)) / 2
            tau = (delta.amax(1, keepdim=True) + delta.amin(1, keepdim=True)) / 2
            shared = delta < tau
        average = _average_gvae if self.averaging == "gvae" else _average_mlvae
        with without_autocast(q1[0]):
            mu, log_var = average(*map(at_least_float32, (*q1, *q2)))
            return (
                (torch.where(shared, mu, q1[0]), torch.where(shared, log_var, q1[1])),
                (torch.where(shared, mu, q2[0]), torch.where(shared, log_var, q2[1])),
            )

    def compute_loss(
        self,
        pair: tuple[Tensor, Tensor],
        output: AdaGVAEOutput,
        beta: float | Tensor = 1.0,
        likelihood: str | LikelihoodType = LikelihoodType.GAUSSIAN,
    ) -> LossResult:
        """Sum of the negative ELBOs of both inputs, each as `VAE.compute_loss` has it.

        Diagnostics: `elbo` (of the pair, with `beta`), `log_likelihood_x1`, `log_likelihood_x2`, `kl_divergence_x1`, `kl_divergence_x2`,
        and the further terms of the VAE's objective, of both inputs.

        Raises
        ------
        ValueError
            Not a pair, two shapes, or an `x_hat` that is not `[B, S, *x.shape[1:]]`.
        """
        x1, x2 = _require_pair(pair)
        first = self.vae.compute_loss(x1, output.output1, beta, likelihood)
        second = self.vae.compute_loss(x2, output.output2, beta, likelihood)
        names = [name for name in first.tensors if name != "elbo"]
        terms = {f"{name}_x{view}": part.tensors[name] for name in names for view, part in ((1, first), (2, second))}
        elbo = first.tensors["elbo"] + second.tensors["elbo"]
        return LossResult(first.objective + second.objective, {"elbo": elbo, **terms})

    def noise_shape(self, num_samples: int | None = None) -> tuple[int, int]:
        """Return (S, D), for each input of a pair; S None is the VAE's `num_samples`, in evaluation mode 1."""
        return self.vae.noise_shape(num_samples)

    def at_step(self, step: int) -> None:
        """Set the training step of the VAE's objective, whose capacity may rise."""
        self.vae.at_step(step)

    def loss(self, batch: Batch, *, eps: Tensor | None = None, beta: float | Tensor = 1.0, likelihood: str = "gaussian") -> LossResult:
        """Forward and loss of the pairs `(batch.x, batch.x_pair)`, always sampled; `eps` is `[n, 2, S, D]`, None draws its own.

        In evaluation mode a batch without `x_pair` is scored as the VAE of single inputs, with its terms and `eps [n, S, D]`: so are
        validation and evaluation.

        Raises
        ------
        ValueError
            A batch without `x_pair` in training mode.
        """
        if batch.x_pair is None:
            if self.training:
                raise ValueError("AdaGVAE trains on pairs and batch.x_pair is None: give the Loader pairs=PairSpec(), or call .vae.loss")
            return self.vae.loss(batch, eps=eps, beta=beta, likelihood=likelihood)
        pair = (batch.x, batch.x_pair)
        output = self(pair, S=self.noise_shape()[0] if eps is None else eps.shape[-2], sample=True, eps=eps)
        return self.compute_loss(pair, output, beta, likelihood)

    def log_weights(self, batch: Batch, eps: Tensor, *, likelihood: str = "gaussian") -> Tensor:
        """Return the log importance weights `[n, S]` of `batch.x` under the VAE, float64."""
        return self.vae.log_weights(batch, eps, likelihood=likelihood)

    def latents(self, batch: Batch) -> dict[str, Tensor]:
        """Return `{"mu": [n, D], "log_var": [n, D]}` of `batch.x`, float32."""
        return self.vae.latents(batch)

    def reconstruct(self, batch: Batch, *, likelihood: str = "gaussian") -> Tensor:
        """Return the expected inputs `[n, ...]` of `batch.x` at z = mu, through a sigmoid if the likelihood is Bernoulli."""
        return self.vae.reconstruct(batch, likelihood=likelihood)

    def decode_latents(self, z: Tensor, *, label: Tensor | None = None, likelihood: str = "gaussian") -> Tensor:
        """Return the expected inputs `[n, ...]` of latents `z [n, D]`, whatever their label."""
        return self.vae.decode_latents(z, likelihood=likelihood)


def _require_pair(pair: Any) -> tuple[Tensor, Tensor]:  # any: what a caller gave
    if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(isinstance(x, Tensor) for x in pair):
        got = f"a tensor of shape {tuple(pair.shape)}" if isinstance(pair, Tensor) else type(pair).__name__
        raise ValueError(f"AdaGVAE takes a pair (x1, x2) of tensors, got {got}: for single inputs use model.encode(x) or model.vae(x)")
    x1, x2 = pair
    if x1.shape != x2.shape:
        raise ValueError(f"x1 and x2 must have the same shape, got {tuple(x1.shape)} and {tuple(x2.shape)}")
    return x1, x2


def _average_gvae(mu1: Tensor, log_var1: Tensor, mu2: Tensor, log_var2: Tensor) -> Posterior:
    """Mean of the means and of the variances, the latter without leaving logarithms."""
    return (mu1 + mu2) / 2, torch.logaddexp(log_var1, log_var2) - math.log(2)


def _average_mlvae(mu1: Tensor, log_var1: Tensor, mu2: Tensor, log_var2: Tensor) -> Posterior:
    """Precision-weighted mean and harmonic mean of the variances."""
    share = torch.sigmoid(log_var2 - log_var1)  # precision of q1 over the sum of both
    return torch.lerp(mu2, mu1, share), math.log(2) - torch.logaddexp(-log_var1, -log_var2)


@spec
class AdaGVAESpec(VariationalSpec):
    """Adaptive group VAE of a backbone: a VAE trained on pairs that share factors (see `pairs.*`), for disentangled latents."""

    kind: Literal["adagvae"] = "adagvae"
    latent_dim: int = knob(10, "size of the latent vector", ge=1, le=LARGEST_SIZE)
    averaging: Literal["gvae", "mlvae"] = knob("gvae", "of shared dimensions: gvae averages mean and variance, mlvae by precision")
    divergence: Literal["kl", "symmetric"] = knob("kl", "by which shared dimensions are found: KL(q1|q2), or the mean of both directions")

    def __post_init__(self) -> None:
        self.check()


@MODELS.register(AdaGVAESpec)
def build(model: AdaGVAESpec, backbone: object, input_shape: tuple[int, ...]) -> AdaGVAE:
    """Build the model of two specs for samples of `input_shape`; weights come from torch's global generator."""
    nets = build_nets(model, backbone, input_shape, model.latent_dim)
    adagvae = AdaGVAE(VAE(nets.encoder, nets.decoder, model.latent_dim, model.bound()), model.averaging, model.divergence)
    adagvae.build(torch.zeros(1, *input_shape))
    return adagvae
