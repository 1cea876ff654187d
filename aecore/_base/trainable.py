"""The interface of models that training and encoding use; they never look at a model's type. Legend: n rows, S samples, D latent."""

from abc import abstractmethod
from collections.abc import Iterable
from typing import ClassVar, Protocol

from torch import Tensor

from aecore._base.base import BaseAutoencoder
from aecore._base.batch import Batch
from aecore.errors import ConfigError
from aecore.loss import LossResult


class Trainable(BaseAutoencoder):
    """An autoencoder that the jobs can train and encode with. `batch.x` is float and on the model's device.

    Attributes
    ----------
    train_inputs, encode_inputs
        Names of the `Batch` fields that `loss` (in training mode) and `latents` read.
    num_classes
        Labels that it takes are in 0..num_classes-1; None if it takes none, or any.
    """

    train_inputs: ClassVar[tuple[str, ...]] = ("x",)
    encode_inputs: ClassVar[tuple[str, ...]] = ("x",)
    num_classes: int | None = None

    def require_samples(self, batch: Batch) -> None:
        """Raise DataError for samples that the model cannot take. `batch` is as the loader gives it: stored values, on the CPU.

        By default all are taken; a model overrides it for what a shape does not say, such as ids outside its vocabulary.
        """

    @abstractmethod
    def noise_shape(self, num_samples: int = 1) -> tuple[int, ...] | None:
        """Shape of the noise that `loss` takes for one input, such as (S, D), S first; None if it takes none.

        Asked without a number a model may say how many samples it trains with; in evaluation mode that is one.
        """

    def at_step(self, step: int) -> None:
        """Set the number 1, 2, ... of the next training step, for terms other than beta that change with it."""

    @abstractmethod
    def loss(self, batch: Batch, *, eps: Tensor | None = None, beta: float | Tensor = 1.0, likelihood: str = "gaussian") -> LossResult:
        """Forward and loss of one batch; means over its n rows.

        `eps` is standard normal noise `[n, *noise_shape(S)]`, or `[n, 2, *noise_shape(S)]` for a batch with `x_pair`; None draws it from
        torch's global generator. In evaluation mode every model takes single samples.
        """

    @abstractmethod
    def latents(self, batch: Batch) -> dict[str, Tensor]:
        """Columns of the latent table: name -> `[n, D]` float32, without sampling, under `torch.inference_mode()`."""

    def embedding(self, batch: Batch) -> Tensor:
        """Return one point per sample, `[n, D]` float32, for probes, factor scores and maps; under inference mode.

        By default the first column of `latents` that is no `log_var`. A model whose latents are ids overrides it.
        """
        latents = self.latents(batch)
        return latents[latent_column(latents)].float()

    @abstractmethod
    def reconstruct(self, batch: Batch, *, likelihood: str = "gaussian") -> Tensor:
        """Return the expected inputs in data space `[n, *shape]`, float32, without sampling, under `torch.inference_mode()`."""

    def log_weights(self, batch: Batch, eps: Tensor, *, likelihood: str = "gaussian") -> Tensor:
        """Log importance weights log p(x|z) + log p(z) - log q(z|x), all constants included, `[n, S]` float64, under inference mode.

        `eps` is `[n, *noise_shape(S)]`. Their logsumexp over S minus log S is a bound of log p(x), see `aecore.variational.marginal`.

        Raises
        ------
        ConfigError
            The model has no posterior.
        """
        raise ConfigError(f"{type(self).__name__} has no posterior, so log p(x) cannot be estimated: use a model of the VAE family")

    def decode_latents(self, z: Tensor, *, label: Tensor | None = None, likelihood: str = "gaussian") -> Tensor:
        """Return the expected inputs in data space `[n, *shape]`, float32, of latents `z [n, D]` of `latents`, under inference mode.

        `label` is `[n]` int64 for a conditional model (`"label"` is one of its `encode_inputs`); the others ignore it.

        Raises
        ------
        ConfigError
            The model cannot decode latents alone.
        """
        raise ConfigError(f"{type(self).__name__} does not decode latents alone: use a model that implements decode_latents")

    def add_noise(self, x: Tensor, eps: Tensor | None = None) -> Tensor:
        """Return the inputs that the encoder gets in training: `x` itself, or corrupted by standard normal noise `eps` of its shape."""
        return x


def has_posterior(columns: Iterable[str]) -> bool:
    """Return whether a model with these columns (or latents by name) has a posterior N(mu, exp(log_var)), and so the prior N(0, I)."""
    return {"mu", "log_var"} <= set(columns)


def latent_column(columns: Iterable[str]) -> str:
    """Return the column that is the latent itself, which `decode_latents` takes: the first that is no variance."""
    return next(name for name in columns if name != "log_var")


class ModelSpec(Protocol):
    """The interface of a model's spec that training uses."""

    @property
    def kind(self) -> str:
        """Name in the registry."""
        ...

    @property
    def likelihood(self) -> str:
        """Name of log p(x|z)."""
        ...

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of what `latents` returns; see `has_posterior` and `latent_column`."""
        ...

    def beta_at(self, step: int) -> float:
        """Return the weight of the regularizer at optimizer step 1, 2, ...; 1 for a model without one."""
        ...
