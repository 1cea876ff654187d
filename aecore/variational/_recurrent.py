"""The VAE of sequences: one latent for a whole sequence of any length. Legend: B batch, S samples, D latent, T steps, K levels, n rows.

p(x|z) is the product over the valid steps (`RecurrentDecoder` says why): a Gaussian, Laplace or Bernoulli of every value, or a categorical
of every token id. Steps behind a sequence's end are zeros in `x` and count nowhere: neither loss nor latents of a sample depend on
what it is batched with. Lengths themselves are not modelled: who generates says how many steps; texts end with a token of their own.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from aecore._base.batch import Batch
from aecore.errors import ConfigError, DataError, InputError
from aecore.loss import expected_value
from aecore.registry import BACKBONES, LARGEST_SIZE, MODELS, knob, spec
from aecore.variational._gaussian import GaussianVAE, VAEDecodeOutput, VAEEncodeOutput, VAEOutput
from aecore.variational._spec import VariationalSpec
from aecore.variational.bound import VariationalObjective


class RecurrentVAE(GaussianVAE):
    r"""VAE of sequences `[B, T, ...]` with `lengths [B]` (None: all T steps).

    .. math:: \mathcal{L} = E_{q(z|x)}\Big[\sum_{t < length} \log p(x_t|z)\Big] - \beta\, KL(q(z|x) \,\|\, N(0, I))

    Parameters
    ----------
    encoder
        `(x [B, T, ...], lengths)` -> `[B, F]`.
    decoder
        `(z [N, D], T)` -> `[N, T, ...]`, for token ids the logits `[N, T, ..., K]`.
    latent_dim
        D.
    bound
        The objective, by default the ELBO.
    num_levels
        K for token ids; 0: the values of a step are numbers.
    sample_steps
        Steps that `decode_latents` gives.
    """

    train_inputs: ClassVar[tuple[str, ...]] = ("x", "lengths")
    encode_inputs: ClassVar[tuple[str, ...]] = ("x", "lengths")

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        latent_dim: int,
        bound: VariationalObjective | None = None,
        *,
        num_levels: int = 0,
        sample_steps: int = 64,
    ) -> None:
        super().__init__(encoder, decoder, latent_dim, bound)
        self.num_levels, self.sample_steps = num_levels, sample_steps

    def _encode(
        self, x: Tensor, lengths: Tensor | None = None, S: int = 1, sample: bool | None = None, eps: Tensor | None = None
    ) -> VAEEncodeOutput:
        _require_lengths(x, lengths)
        return VAEEncodeOutput(*self.sampling_layer(self.encoder(x, lengths), S, sample, eps))

    def _decode(self, z: Tensor, num_steps: int | None = None) -> VAEDecodeOutput:
        self._require_latents(z)
        steps = self.sample_steps if num_steps is None else num_steps
        return VAEDecodeOutput(self.decoder(z.flatten(0, 1), steps).unflatten(0, z.shape[:2]))

    def forward(
        self, x: Tensor, lengths: Tensor | None = None, S: int = 1, sample: bool | None = None, eps: Tensor | None = None
    ) -> VAEOutput:
        """Encode, draw S latents per sequence (see `VAE.forward`) and decode each to as many steps as `x` has.

        Raises
        ------
        InputError
            `lengths` is not `[B]` int64, or one is 0 or beyond T (looked at where that costs no wait: on the CPU).
        """
        latent = self._encode(x, lengths, S, sample, eps)
        return VAEOutput(self._decode(latent.z, x.shape[1]).x_hat, latent.z, latent.mu, latent.log_var)

    def condition(self, batch: Batch) -> tuple[Tensor | None]:
        """Return the lengths."""
        return (batch.lengths,)

    def decode_condition(self, batch: Batch) -> tuple[int]:
        """Return T."""
        return (batch.x.shape[1],)

    def valid(self, batch: Batch) -> Tensor | None:
        """Return which values are in valid steps."""
        return valid_steps(batch.x, batch.lengths)

    def require_samples(self, batch: Batch) -> None:
        """Raise DataError that names a sample whose token ids are no whole numbers in 0 .. K - 1."""
        if not self.num_levels:
            return
        x = batch.x.flatten(1)
        if x.is_floating_point():
            raise DataError(f"model.likelihood=categorical takes token ids: the samples are {batch.x.dtype}, store them as integers")
        bad = ((x < 0) | (x >= self.num_levels)).any(1)
        if bad.any():
            row = int(bad.nonzero()[0])
            ordinal = f"sample {int(batch.ordinals[row])} (ordinal)" if len(batch.ordinals) else "a sample"
            found = f"{int(x[row].min())} to {int(x[row].max())}"
            raise DataError(
                f"{ordinal} holds token ids from {found}, the vocabulary has 0 to {self.num_levels - 1}: "
                "set model.num_levels to the largest id + 1"
            )

    @torch.inference_mode()
    def reconstruct(self, batch: Batch, *, likelihood: str = "gaussian") -> Tensor:
        """Return the expected sequences `[n, T, ...]` at z = mu, zeros behind their ends; of token ids the most probable ones."""
        x_hat = self._expected(self(batch.x, batch.lengths, sample=False).x_hat.squeeze(1), likelihood)
        valid = self.valid(batch)
        return x_hat if valid is None else torch.where(valid, x_hat, 0.0)

    @torch.inference_mode()
    def decode_latents(
        self, z: Tensor, *, label: Tensor | None = None, likelihood: str = "gaussian", num_steps: int | None = None
    ) -> Tensor:
        """Return the expected sequences `[n, T, ...]`, float32, of latents `z [n, D]`; T is `num_steps`, by default `sample_steps`.

        Of token ids the most probable ones. ConfigError for labels, of which this model knows none.
        """
        if label is not None:
            raise ConfigError("model.kind=rvae is not conditional: it was given labels; leave them out, or use model.kind=cvae")
        return self._expected(self._decode(z.unsqueeze(1), num_steps).x_hat.squeeze(1), likelihood)

    def _expected(self, x_hat: Tensor, likelihood: str) -> Tensor:
        return x_hat.argmax(-1).float() if self.num_levels else expected_value(x_hat, likelihood)


def valid_steps(x: Tensor, lengths: Tensor | None) -> Tensor | None:
    """Return which values of `x` are in valid steps, of the shape of `x`; None if all are."""
    if lengths is None:
        return None
    valid = torch.arange(x.shape[1], device=x.device) < lengths.unsqueeze(1)
    return valid.view(*valid.shape, *[1] * (x.ndim - 2)).expand(x.shape)


def _require_lengths(x: Tensor, lengths: Tensor | None) -> None:
    if lengths is None:
        return
    if lengths.shape != x.shape[:1] or lengths.dtype != torch.int64:
        raise InputError(f"lengths must be int64 of shape [B] = {tuple(x.shape[:1])}, got {lengths.dtype} of shape {tuple(lengths.shape)}")
    if lengths.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if len(lengths) and not 1 <= int(lengths.min()) <= int(lengths.max()) <= x.shape[1]:
        found = f"{int(lengths.min())} to {int(lengths.max())}"
        raise InputError(f"lengths must be from 1 to T = {x.shape[1]}, got {found}: leave empty sequences out")


@spec
class RecurrentVAESpec(VariationalSpec):
    """VAE of whole sequences with a backbone over time (recurrent, hybrid); categorical takes token ids below num_levels."""

    kind: Literal["rvae"] = "rvae"
    sample_steps: int = knob(64, "steps of a generated sequence, where those of the data vary", ge=1, le=LARGEST_SIZE)

    def __post_init__(self) -> None:
        self.check()


@MODELS.register(RecurrentVAESpec)
def build(model: RecurrentVAESpec, backbone: object, input_shape: tuple[int, ...]) -> RecurrentVAE:
    """Build the model of two specs for sequences of `input_shape`, whose first axis may be 0: any number of steps.

    Raises ConfigError for a backbone that takes no lengths; weights come from torch's global generator.
    """
    nets = BACKBONES.build(backbone, input_shape, model.latent_dim)
    if not nets.sequential:
        raise ConfigError(
            f"model.kind=rvae needs a backbone that runs over the first axis of samples, {type(backbone).__name__} as it is set does not: "
            "use backbone.kind=recurrent (with backbone.time_axis=0) or backbone.kind=hybrid"
        )
    nets.check_likelihood(model.likelihood)
    levels, steps = model.num_levels, input_shape[0] or model.sample_steps
    if levels:
        nets = BACKBONES.build(backbone, input_shape, model.latent_dim, num_levels=levels)
    rvae = RecurrentVAE(nets.encoder, nets.decoder, model.latent_dim, model.bound(), num_levels=levels, sample_steps=steps)
    rvae.build(torch.zeros(1, *(size or 1 for size in input_shape)))
    return rvae
