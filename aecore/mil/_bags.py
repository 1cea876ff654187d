"""The variational autoencoder of torchmil's API for bags: each instance by itself, padding masked out.

Legend: B bags, N instances of the longest bag, S (`n_samples`) latents per instance, D latent_dim.
"""

import torch
from torch import Tensor

from aecore.errors import InputError
from aecore.mil._vae import VariationalAutoEncoder, WithParams, reduced, require_reduction


class VariationalAutoEncoderMIL(VariationalAutoEncoder):
    """VAE of the instances of bags `[B, N, *input_shape]`; constructor and methods that are not here are those of the VAE of instances.

    A mask `[B, N]` is True (or 1) for instances and False (or 0) for padding, which changes nothing: neither a loss nor a gradient,
    whatever its values.

    >>> model = VariationalAutoEncoderMIL((12,), [8, 4], ["relu", "None"])
    >>> model(torch.zeros(2, 5, 12), n_samples=3).shape
    torch.Size([2, 5, 3, 4])
    """

    def forward(self, X: Tensor, n_samples: int = 1, return_mean_logstd: bool = False) -> Tensor | WithParams:
        """Return latents `[B, N, S, D]` of q(z|x), with `return_mean_logstd` also its mean and log_std `[B, N, D]`."""
        shape = self._bag_shape(X)
        samples, mean, log_std = (value.reshape(*shape, *value.shape[1:]) for value in self._posterior(X.flatten(0, 1), n_samples))
        return (samples, mean, log_std) if return_mean_logstd else samples

    def log_marginal_likelihood_importance_sampling(  # type: ignore[override]  # the signature of the peer
        self, X: Tensor, mask: Tensor | None = None, n_samples: int = 1
    ) -> Tensor:
        """Return the estimate of log p(x) of every instance, `[B, N]` float64; 0 where the mask is 0 (those are not computed)."""
        shape = self._bag_shape(X)
        if mask is None:
            return super().log_marginal_likelihood_importance_sampling(X.flatten(0, 1), n_samples).reshape(shape)
        valid = self._valid(X, mask)
        found = torch.zeros(shape, dtype=torch.float64, device=X.device)
        found[valid] = super().log_marginal_likelihood_importance_sampling(X[valid], n_samples)
        return found

    def compute_loss(  # type: ignore[override]  # the signature of the peer
        self, X: Tensor, mask: Tensor | None = None, reduction: str = "mean", n_samples: int = 1, return_samples: bool = False
    ) -> dict[str, Tensor] | tuple[dict[str, Tensor], Tensor]:
        """Return `{"VaeELL": -E_q[log p(x|z)], "VaeKL": KL(q || N(0, I))}` of the instances that the mask leaves.

        Parameters
        ----------
        X
            Bags `[B, N, *input_shape]`.
        mask
            `[B, N]` of True and False or 1 and 0; None: no padding.
        reduction
            "sum": over all instances of all bags; "mean": that divided by their number, so an instance counts the same in
            every bag; "none": `[B, N]`, 0 for padding.
        n_samples
            S, over which the likelihood is averaged.
        return_samples
            Also return the latents `[B, N, S, D]`, 0 for padding.

        Raises
        ------
        InputError
            A mask of another shape or with other values, or a bag without an instance.
        """
        require_reduction(reduction)
        shape = self._bag_shape(X)
        valid = torch.ones(shape, dtype=torch.bool, device=X.device) if mask is None else self._valid(X, mask)
        instances = X[valid]
        samples, mean, log_std = self._posterior(instances, n_samples)
        found = {"VaeELL": -self.log_px(instances, samples).mean(1), "VaeKL": self._kl_prior(mean, log_std)}
        if reduction == "none":
            loss = {name: _padded(values, valid) for name, values in found.items()}
        else:
            loss = {name: reduced(values, reduction) for name, values in found.items()}
        return (loss, _padded(samples, valid)) if return_samples else loss

    def complete_forward_samples(self, X: Tensor) -> Tensor:  # type: ignore[override]  # the signature of the peer
        """Return reconstructions `[B, N, *input_shape]`: the decoder's mean at one latent of each instance."""
        self._bag_shape(X)
        samples = self._posterior(X.flatten(0, 1), 1)[0]
        mean, _ = self.get_raw_output_dec(samples.flatten(0, 1))
        return mean.reshape(X.shape)

    def _bag_shape(self, X: Tensor) -> tuple[int, int]:
        if X.ndim != 2 + len(self.input_shape) or X.shape[2:] != self.input_shape:
            expected = ", ".join(map(str, ("B", "N", *self.input_shape)))
            raise InputError(f"X must be bags of the shape [B, N, *input_shape] = [{expected}], got {tuple(X.shape)}")
        return X.shape[0], X.shape[1]

    def _valid(self, X: Tensor, mask: Tensor) -> Tensor:
        if mask.shape != X.shape[:2]:
            raise InputError(f"mask must have the shape [B, N] = {tuple(X.shape[:2])} of the bags, got {tuple(mask.shape)}")
        valid = mask.to(X.device).bool()
        if not torch.equal(valid.to(mask.dtype), mask.to(X.device)):
            raise InputError("mask has values other than 0 and 1: give True or 1 for an instance, False or 0 for padding")
        empty = (~valid.any(1)).nonzero().flatten().tolist()
        if empty:
            raise InputError(
                f"{len(empty)} of {len(valid)} bags have no instance, their mask is all 0 (the first is bag {empty[0]}): leave them out"
            )
        return valid


def _padded(values: Tensor, valid: Tensor) -> Tensor:
    """Return rows `[n, ...]` of the valid instances as bags `[B, N, ...]`, 0 elsewhere."""
    out = values.new_zeros((*valid.shape, *values.shape[1:]))
    out[valid] = values
    return out
