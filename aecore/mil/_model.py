"""`model.kind=mil_vae`: torchmil's autoencoder as the jobs train it, on single samples or on whole bags.

A dataset with groups gives bags in training: `batch.x [bags, N, ...]` with `batch.mask [bags, N]`. The loss is the mean over their
instances, so an instance counts the same in every bag and in validation, which scores instance by instance, as encoding does.
Legend: n rows (samples, or the instances of all bags of a batch), N instances of the longest bag, S samples, D latent.
"""

import dataclasses
from typing import ClassVar, Literal

import torch
from torch import Tensor

from aecore._base.batch import Batch
from aecore._base.trainable import Trainable
from aecore.errors import ConfigError, InputError, did_you_mean
from aecore.loss import LikelihoodType, LossResult, expected_value, log_likelihood
from aecore.loss.schedules import beta_at
from aecore.mil._mlp import ACTIVATIONS
from aecore.mil._vae import VariationalAutoEncoder, log_prior_ratio, reparameterized, require_samples
from aecore.nn.mlp import MLPSpec
from aecore.registry import LARGEST_SIZE, MODELS, knob, shown, spec
from aecore.variational._gaussian import VAEDecodeOutput, VAEEncodeOutput, VAEOutput


class MilVAE(Trainable):
    """A `VariationalAutoEncoder` with the calls of the jobs. State dict: that of the VAE, prefixed with `vae.`.

    The gaussian likelihood has all its constants and the decoder's own sigma; bernoulli takes the decoder's mean as logits and leaves its
    sigma unused.
    """

    train_inputs: ClassVar[tuple[str, ...]] = ("x", "mask")

    def __init__(self, vae: VariationalAutoEncoder, num_samples: int = 1) -> None:
        super().__init__()
        self.vae = vae
        self.num_samples = num_samples

    def _encode(self, x: Tensor, S: int = 1, sample: bool | None = None, eps: Tensor | None = None) -> VAEEncodeOutput:
        require_samples(S)
        mean, log_std = self.vae.get_raw_output_enc(x)
        log_std = log_std.expand_as(mean)
        if sample is False or (sample is None and not self.training):
            z = mean.unsqueeze(1).repeat(1, S, 1)
        else:
            z = reparameterized(mean, log_std, torch.randn(len(x), S, mean.shape[1], device=x.device) if eps is None else eps)
        return VAEEncodeOutput(z, mean, 2 * log_std)

    def _decode(self, z: Tensor) -> VAEDecodeOutput:
        if z.ndim != 3:
            raise InputError(f"z must have the shape [B, S, D], got {tuple(z.shape)}: for one latent per row use z.unsqueeze(1)")
        mean, _ = self.vae.decoded(z)
        return VAEDecodeOutput(mean.reshape(*z.shape[:2], *self.vae.input_shape))

    def forward(self, x: Tensor, S: int = 1, sample: bool | None = None, eps: Tensor | None = None) -> VAEOutput:
        """Encode single samples `x [B, ...]`, draw S latents of each (`eps [B, S, D]`) and decode their means, as `VAE.forward` does."""
        latent = self._encode(x, S, sample, eps)
        return VAEOutput(self._decode(latent.z).x_hat, latent.z, latent.mu, latent.log_var)

    def compute_loss(
        self,
        x: Tensor,
        output: VAEOutput,
        beta: float | Tensor = 1.0,
        likelihood: str | LikelihoodType = LikelihoodType.GAUSSIAN,
    ) -> LossResult:
        """Negative ELBO of single samples, a mean over S and then over the rows; the decoder's sigma is computed again from `output.z`."""
        return self._loss(self._log_px(x, output.z, likelihood).mean(1), self._kl(output.mu, output.log_var), None, beta)

    def noise_shape(self, num_samples: int | None = None) -> tuple[int, int]:
        """Return (S, D), for each sample or instance; S None is what the model trains with, in evaluation mode 1."""
        if num_samples is None:
            num_samples = self.num_samples if self.training else 1
        return (num_samples, self.vae.latent_dim)

    def loss(self, batch: Batch, *, eps: Tensor | None = None, beta: float | Tensor = 1.0, likelihood: str = "gaussian") -> LossResult:
        """Forward and loss, always sampled: of rows `x [n, ...]`, or, with a mask, of the instances of bags; a mean over n in both cases.

        `eps` is `[n, S, D]`: of bags, the noise of the instances bag by bag, none for padding. Values in padding have no effect.

        Raises
        ------
        InputError
            The shapes of `x` and `mask` do not fit each other.
        """
        num_samples = self.noise_shape()[0] if eps is None else eps.shape[1]
        x, valid = batch.x, None
        if batch.mask is not None:
            mask = _require_mask(x, batch.mask, self.vae.input_shape)
            x = torch.where(mask.reshape(*mask.shape, *(1 for _ in self.vae.input_shape)), x, 0.0).flatten(0, 1)
            eps, valid = None if eps is None else batch.placed(eps).flatten(0, 1), mask.flatten()
        latent = self._encode(x, num_samples, True, eps)
        return self._loss(self._log_px(x, latent.z, likelihood).mean(1), self._kl(latent.mu, latent.log_var), valid, beta)

    def _loss(self, log_px: Tensor, kl: Tensor, valid: Tensor | None, beta: float | Tensor) -> LossResult:
        log_px, kl = _mean(log_px, valid), _mean(kl, valid)
        elbo = log_px - beta * kl
        return LossResult(-elbo, {"elbo": elbo, "log_likelihood": log_px, "kl_divergence": kl})

    def _kl(self, mu: Tensor, log_var: Tensor) -> Tensor:
        return self.vae._kl_prior(mu, 0.5 * log_var)

    def _log_px(self, x: Tensor, z: Tensor, likelihood: str) -> Tensor:
        """Return log p(x|z) `[B, S]` of samples `[B, ...]` and latents `[B, S, D]`, summed over features."""
        if likelihood.lower() == "gaussian":
            return self.vae.log_px(x, z)
        mean, _ = self.vae.decoded(z)
        return log_likelihood(x.flatten(1).unsqueeze(1).expand_as(mean), mean, likelihood, full=True).sum(-1)

    @torch.inference_mode()
    def log_weights(self, batch: Batch, eps: Tensor, *, likelihood: str = "gaussian") -> Tensor:
        """Return log p(x|z) + log p(z) - log q(z|x), `[n, S]` float64, of rows `x [n, ...]` and noise `eps [n, S, D]`."""
        mean, log_std = self.vae.get_raw_output_enc(batch.x)
        z = reparameterized(mean, log_std, eps)
        if likelihood.lower() == "gaussian":
            return self.vae.log_weights(batch.x, z, mean, log_std)
        logits, _ = self.vae.decoded(z)
        log_px = log_likelihood(batch.x.flatten(1).unsqueeze(1).expand_as(logits), logits, likelihood, full=True).double().sum(-1)
        return log_px + log_prior_ratio(z, mean, log_std)

    @torch.inference_mode()
    def latents(self, batch: Batch) -> dict[str, Tensor]:
        """Return `{"mu": [n, D], "log_var": [n, D]}` of rows `x [n, ...]`, float32."""
        mean, log_std = self.vae.get_raw_output_enc(batch.x)
        return {"mu": mean.float(), "log_var": 2 * log_std.expand_as(mean).float()}

    @torch.inference_mode()
    def reconstruct(self, batch: Batch, *, likelihood: str = "gaussian") -> Tensor:
        """Return the expected inputs `[n, ...]` of rows `x [n, ...]` at z = mu, through a sigmoid if the likelihood is Bernoulli."""
        return self.decode_latents(self.vae.get_raw_output_enc(batch.x)[0], likelihood=likelihood)

    @torch.inference_mode()
    def decode_latents(self, z: Tensor, *, label: Tensor | None = None, likelihood: str = "gaussian") -> Tensor:
        """Return the expected inputs `[n, *shape]` of latents `z [n, D]` in data space, float32; `label` is not used."""
        mean, _ = self.vae.get_raw_output_dec(z)
        return expected_value(mean.reshape(len(z), *self.vae.input_shape), likelihood)


def _mean(values: Tensor, valid: Tensor | None) -> Tensor:
    """Return the mean of `values [n]`, over those that are `valid` if it is given; no branch on data, so it compiles."""
    return values.mean() if valid is None else torch.where(valid, values, 0.0).sum() / valid.sum()


def _require_mask(x: Tensor, mask: Tensor, input_shape: tuple[int, ...]) -> Tensor:
    if mask.ndim != 2 or x.shape != (*mask.shape, *input_shape):
        expected = f"x [bags, N, {', '.join(map(str, input_shape))}] and mask [bags, N]"
        raise InputError(f"a batch of bags has {expected}; got x {tuple(x.shape)} and mask {tuple(mask.shape)}")
    return mask.bool()


@spec
class MilVAESpec:
    """VAE of torchmil's form: MLPs (backbone.kind=mlp), a learned sigma of p(x|z); trains on whole bags where the data has groups."""

    columns: ClassVar[tuple[str, ...]] = ("mu", "log_var")
    kind: Literal["mil_vae"] = "mil_vae"
    latent_dim: int = knob(64, "size of the latent vector: the last of the layer sizes, after backbone.hidden", ge=1, le=LARGEST_SIZE)
    covar_mode: Literal["single", "diagonal"] = knob("single", "sigma of q(z|x) and p(x|z): one per sample, or one per dimension")
    jitter: float = knob(1e-7, "added to every log sigma", ge=0)
    last_activation: str = knob("None", "after the encoder's last layer, on mean and log sigma alike: None, tanh, ...")
    num_samples: int = knob(1, "latents per sample or instance that training draws; evaluation draws one", ge=1, le=LARGEST_SIZE)
    beta: float = knob(1.0, "weight of the KL divergence", ge=0)
    beta_warmup_steps: int = knob(0, "optimizer steps over which beta rises linearly from 0", ge=0)
    likelihood: Literal["gaussian", "bernoulli"] = knob("gaussian", "gaussian has a learned sigma; bernoulli takes logits and has none")

    def __post_init__(self) -> None:
        if self.last_activation not in ACTIVATIONS:
            known = did_you_mean(self.last_activation, ACTIVATIONS)
            raise ConfigError(f"MilVAESpec.last_activation is {shown(self.last_activation)}{known}")

    def beta_at(self, step: int) -> float:
        """Return the weight of the KL divergence at optimizer step 1, 2, ..."""
        return beta_at(self.beta, self.beta_warmup_steps, step)


@MODELS.register(MilVAESpec)
def build(model: MilVAESpec, backbone: object, input_shape: tuple[int, ...]) -> MilVAE:
    """Build the model of two specs for samples of `input_shape`; weights come from torch's global generator.

    Raises
    ------
    ConfigError
        A backbone that is no plain MLP.
    """
    mlp = _require_plain_mlp(backbone)
    sizes, names = [*mlp.hidden, model.latent_dim], [*(mlp.activation for _ in mlp.hidden), model.last_activation]
    return MilVAE(VariationalAutoEncoder(input_shape, sizes, names, model.covar_mode, model.jitter), model.num_samples)


def _require_plain_mlp(backbone: object) -> MLPSpec:
    if not isinstance(backbone, MLPSpec):
        kind = getattr(backbone, "kind", type(backbone).__name__)
        raise ConfigError(f"model.kind=mil_vae consists of MLPs, backbone.kind is {kind}: use backbone.kind=mlp, or model.kind=vae")
    if backbone.activation not in ACTIVATIONS:
        raise ConfigError(f"backbone.activation is {backbone.activation!r}, model.kind=mil_vae takes one of {', '.join(ACTIVATIONS)}")
    plain = MLPSpec(hidden=backbone.hidden, activation=backbone.activation)
    for field in dataclasses.fields(backbone):
        value, expected = getattr(backbone, field.name), getattr(plain, field.name)
        if value != expected:
            raise ConfigError(
                f"backbone.{field.name} is {value}, and the MLPs of model.kind=mil_vae know no such option: "
                f"leave it at {expected}, or use model.kind=vae"
            )
    return backbone
