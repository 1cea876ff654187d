"""The variational autoencoder of torchmil's API: MLPs, a Gaussian posterior, a Gaussian likelihood with a learned scale.

Legend: B instances, S (`n_samples`) latents per instance, D latent_dim, K importance samples; F features of an instance, flattened.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aecore.errors import InputError, did_you_mean
from aecore.loss import kl_divergence_diag_gaussian
from aecore.loss._precision import at_least_float32, without_autocast
from aecore.mil._mlp import MLP, require_layers

COVAR_MODES = ("single", "diagonal")
REDUCTIONS = ("sum", "mean", "none")
LOG_STD_MIN, LOG_STD_MAX = -15.0, 10.0  # where variances, precisions and the KL stay finite in float32
LOG_2PI = math.log(2 * math.pi)
CHUNK_VALUES = 1 << 22  # numbers of one layer's output that importance sampling computes at a time

Params = tuple[Tensor, Tensor]  # mean and log_std
WithParams = tuple[Tensor, Tensor, Tensor]  # samples, mean, log_std


class VariationalAutoEncoder(nn.Module):
    r"""VAE of vectors (or of samples of any shape, which are flattened) with a prior N(0, I).

    .. math:: q(z|x) = N(\mu(x), \sigma(x)^2 I), \quad p(x|z) = N(\mu(z), \sigma(z)^2 I)

    Parameters
    ----------
    input_shape
        Shape of one instance.
    layer_sizes
        Widths of the encoder; the last one is D. The decoder has them in reverse.
    activations
        One per layer of the encoder, after it; "None" is none. The decoder's hidden layer of a width has the activation of
        that width, its last layer has none. The activation of the last layer acts on mean and log_std alike.
    covar_mode
        "single": one log sigma per instance (and per latent, in the decoder); "diagonal": one for each dimension.
    jitter
        Added to every log sigma.

    Raises
    ------
    ValueError
        Unknown activation or covar_mode, another number of activations than layers, sizes below 1, negative jitter.

    >>> model = VariationalAutoEncoder((12,), [8, 4], ["relu", "None"])
    >>> model(torch.zeros(5, 12), n_samples=3).shape
    torch.Size([5, 3, 4])
    """

    def __init__(
        self,
        input_shape: tuple[int, ...] = (512,),
        layer_sizes: list[int] = [128, 64],  # noqa: B006  # the signature of the peer; read only
        activations: list[str] = ["relu", "None"],  # noqa: B006  # as above
        covar_mode: str = "single",
        jitter: float = 1e-7,
    ) -> None:
        super().__init__()
        require_layers(layer_sizes, activations)
        if covar_mode not in COVAR_MODES:
            raise ValueError(f"covar_mode is {covar_mode!r}{did_you_mean(str(covar_mode), COVAR_MODES)}")
        if not input_shape or min(input_shape) < 1:
            raise ValueError(f"input_shape is {tuple(input_shape)}, expected the shape of one instance, such as (512,)")
        if not 0 <= jitter < math.inf:
            raise ValueError(f"jitter is {jitter}, expected a finite number from 0")
        self.input_shape = tuple(input_shape)
        self.input_dim, self.latent_dim = math.prod(input_shape), layer_sizes[-1]
        self.covar_mode, self.jitter = covar_mode, jitter
        self._widest = max(self.input_dim, *layer_sizes)
        hidden, names = list(layer_sizes[:-1]), list(activations)
        self.encoder = MLP([self.input_dim, *hidden, self.latent_dim + self._num_scales(self.latent_dim)], names)
        back = [*reversed(hidden), self.input_dim + self._num_scales(self.input_dim)]
        self.decoder = MLP([self.latent_dim, *back], [*reversed(names[:-1]), "None"])

    def _num_scales(self, dim: int) -> int:
        return 1 if self.covar_mode == "single" else dim

    def get_reparameterized_samples(self, mean: Tensor, log_std: Tensor, n_samples: int = 1) -> Tensor:
        """Return S draws of N(mean, exp(log_std)^2), `[B, S, D]`, for `mean [B, D]` and `log_std [B, D]` or `[B, 1]`."""
        require_samples(n_samples)
        return reparameterized(mean, log_std, torch.randn(len(mean), n_samples, mean.shape[1], dtype=mean.dtype, device=mean.device))

    def get_raw_output_enc(self, X: Tensor) -> Params:
        """Return mean `[B, D]` and log_std `[B, D]` (covar_mode single: `[B, 1]`) of q(z|x) for `X [B, *input_shape]`."""
        return self._params(self.encoder(self._flat(X)), self.latent_dim)

    def get_raw_output_dec(self, samples: Tensor) -> Params:
        """Return mean `[N, F]` and log_std `[N, F]` (covar_mode single: `[N, 1]`) of p(x|z) for latents `samples [N, D]`."""
        if samples.ndim != 2 or samples.shape[1] != self.latent_dim:
            raise InputError(f"samples must have the shape [N, latent_dim] = [N, {self.latent_dim}], got {tuple(samples.shape)}")
        return self._params(self.decoder(samples), self.input_dim)

    def _params(self, raw: Tensor, dim: int) -> Params:
        mean, log_std = torch.split(raw, [dim, raw.shape[1] - dim], 1)  # slices of their own cost more in the backward pass
        return mean, (log_std + self.jitter).clamp(LOG_STD_MIN, LOG_STD_MAX)

    def _flat(self, X: Tensor) -> Tensor:
        if X.ndim != 1 + len(self.input_shape) or X.shape[1:] != self.input_shape:
            expected = ", ".join(map(str, ("B", *self.input_shape)))
            raise InputError(f"X must have the shape [B, *input_shape] = [{expected}], got {tuple(X.shape)}")
        return X.flatten(1)

    def forward(self, X: Tensor, n_samples: int = 1, return_mean_logstd: bool = False) -> Tensor | WithParams:
        """Return latents `[B, S, D]` of q(z|x), with `return_mean_logstd` also its mean and log_std `[B, D]`; only the encoder runs."""
        return self.get_posterior_samples(X, n_samples, return_mean_logstd)

    def get_posterior_samples(self, X: Tensor, n_samples: int = 1, return_mean_logstd: bool = False) -> Tensor | WithParams:
        """Return what `forward` returns."""
        found = self._posterior(X, n_samples)
        return found if return_mean_logstd else found[0]

    def _posterior(self, X: Tensor, n_samples: int) -> WithParams:
        """Return latents `[B, S, D]`, mean and log_std `[B, D]` of q(z|x) for instances `[B, *input_shape]`."""
        mean, log_std = self.get_raw_output_enc(X)
        return self.get_reparameterized_samples(mean, log_std, n_samples), mean, log_std.expand_as(mean)

    def complete_forward_samples(self, X: Tensor, n_samples: int = 1) -> Tensor:
        """Return reconstructions `[B, *input_shape]`: the decoder's mean, averaged over S latents of each instance."""
        mean, _ = self.decoded(self._posterior(X, n_samples)[0])
        return mean.mean(1).reshape(len(X), *self.input_shape)

    def compute_loss(
        self, X: Tensor, reduction: str = "mean", n_samples: int = 1, return_samples: bool = False
    ) -> dict[str, Tensor] | tuple[dict[str, Tensor], Tensor]:
        """Return `{"VaeELL": -E_q[log p(x|z)], "VaeKL": KL(q || N(0, I))}`; their sum is the negative ELBO, in nats with all constants.

        Parameters
        ----------
        X
            Instances `[B, *input_shape]`.
        reduction
            "mean" or "sum" over the instances, or "none": `[B]` each.
        n_samples
            S, over which the likelihood is averaged.
        return_samples
            Also return the latents `[B * S, D]`; those of instance i are the rows i * S to i * S + S - 1.
        """
        require_reduction(reduction)
        samples, mean, log_std = self._posterior(X, n_samples)
        found = {"VaeELL": -self.log_px(X, samples).mean(1), "VaeKL": self._kl_prior(mean, log_std)}
        loss = {name: reduced(values, reduction) for name, values in found.items()}
        return (loss, samples.flatten(0, 1)) if return_samples else loss

    def log_px(self, X: Tensor, samples: Tensor) -> Tensor:
        """Return log p(x|z) `[B, S]` of instances `X [B, *input_shape]` and latents `[B, S, D]`."""
        mean, log_std = self.decoded(samples)
        return self._diagonal_log_gaussian_pdf(self._flat(X).unsqueeze(1), mean, log_std)

    def decoded(self, samples: Tensor) -> Params:
        """Return mean `[B, S, F]` and log_std `[B, S, F]` or `[B, S, 1]` of p(x|z) for latents `[B, S, D]`."""
        mean, log_std = self.get_raw_output_dec(samples.flatten(0, 1))
        return mean.reshape(*samples.shape[:2], -1), log_std.reshape(*samples.shape[:2], -1)

    def _kl_prior(self, mean: Tensor, log_std: Tensor) -> Tensor:
        """Return KL(N(mean, exp(log_std)^2) || N(0, I)), `[B]`, of `mean [B, D]` and `log_std [B, D]` or `[B, 1]`."""
        return kl_divergence_diag_gaussian(mean, 2 * at_least_float32(log_std).expand_as(mean))

    def _diagonal_log_gaussian_pdf(self, inputs: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
        """Return log N(inputs; mean, exp(log_std)^2), `[B]`, of `inputs` and `mean` `[B, F]` and `log_std [B, F]` or `[B, 1]`.

        Axes before F broadcast.
        """
        inputs, mean, log_std = at_least_float32(inputs), at_least_float32(mean), at_least_float32(log_std)
        size = mean.shape[-1]
        with without_autocast(mean):
            if log_std.shape[-1] == 1:  # one for all features, which are then touched once each way
                log_std = log_std.squeeze(-1)
                mean, inputs = torch.broadcast_tensors(mean, inputs)  # type: ignore[no-untyped-call]  # torch
                squares = F.mse_loss(mean, inputs, reduction="none").sum(-1) * torch.exp(-2 * log_std)
                return -0.5 * torch.add(squares, log_std, alpha=2 * size) - 0.5 * size * LOG_2PI
            return -0.5 * (((inputs - mean) * torch.exp(-log_std)).square().sum(-1) + 2 * log_std.sum(-1) + size * LOG_2PI)

    @torch.no_grad()
    def log_marginal_likelihood_importance_sampling(self, X: Tensor, n_samples: int = 1) -> Tensor:
        r"""Return :math:`\log \frac{1}{K} \sum_k p(x|z_k) p(z_k) / q(z_k|x)`, `[B]` float64, with K = `n_samples` latents of q(z|x).

        The prior is N(0, I). Its expectation is below log p(x), by less the larger K is; it is exact for any K if q is the
        exact posterior. Memory does not grow with K. No gradients: it is an estimate for reports.
        """
        require_samples(n_samples)
        mean, log_std = self.get_raw_output_enc(X)
        total = torch.full((len(X),), -math.inf, dtype=torch.float64, device=mean.device)
        for size in _chunks(n_samples, max(1, CHUNK_VALUES // (self._widest * max(1, len(X))))):
            samples = self.get_reparameterized_samples(mean, log_std, size)
            total = torch.logaddexp(total, self.log_weights(X, samples, mean, log_std).logsumexp(1))
        return total - math.log(n_samples)

    def log_weights(self, X: Tensor, samples: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
        """Return log p(x|z) + log p(z) - log q(z|x), `[B, S]`, summed over features in float64."""
        recon, log_scale = (value.double() for value in self.decoded(samples))
        log_px = self._diagonal_log_gaussian_pdf(self._flat(X).unsqueeze(1).double(), recon, log_scale)
        return log_px + log_prior_ratio(samples, mean, log_std)


def log_prior_ratio(samples: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Return log N(z; 0, I) - log N(z; mean, exp(log_std)^2), `[B, S]` float64, of latents `[B, S, D]`; the constants cancel."""
    z, mean, log_std = samples.double(), mean.double().unsqueeze(1), log_std.double().unsqueeze(1).expand(-1, -1, samples.shape[2])
    return 0.5 * (((z - mean) * torch.exp(-log_std)).square() + 2 * log_std - z.square()).sum(-1)


def reparameterized(mean: Tensor, log_std: Tensor, eps: Tensor) -> Tensor:
    """Return `mean + exp(log_std) * eps`, `[B, S, D]`, for noise `eps [B, S, D]`."""
    with without_autocast(mean):
        return mean.unsqueeze(1) + torch.exp(log_std).unsqueeze(1) * eps.to(mean.dtype)


def reduced(values: Tensor, reduction: str) -> Tensor:
    """Return the sum or mean of values, or themselves for "none"."""
    return values if reduction == "none" else values.sum() if reduction == "sum" else values.mean()


def _chunks(total: int, size: int) -> Iterator[int]:
    for start in range(0, total, size):
        yield min(size, total - start)


def require_samples(n_samples: int) -> None:
    if n_samples < 1:
        raise ValueError(f"n_samples is {n_samples}, expected at least 1: it is the number of latents per instance")


def require_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}{did_you_mean(str(reduction), REDUCTIONS)}")
