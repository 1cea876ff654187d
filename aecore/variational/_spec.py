"""The knobs that all VAEs of a backbone share, and the networks that follow from them. Legend: N latents, K levels."""

from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from aecore.errors import ConfigError
from aecore.loss import LOGITS
from aecore.loss.schedules import cyclic_at, linear_at
from aecore.nn import Backbone
from aecore.registry import BACKBONES, LARGEST_SIZE, knob, spec
from aecore.variational.bound import VariationalObjective, clashing


@spec
class VariationalSpec:
    """Base of specs; a subclass adds `kind` and, if it has knobs that can clash, calls `check` at the end of its own check."""

    columns: ClassVar[tuple[str, ...]] = ("mu", "log_var")
    latent_dim: int = knob(20, "size of the latent vector", ge=1, le=LARGEST_SIZE)
    beta: float = knob(1.0, "weight of the KL divergence (with capacity: of the distance to it)", ge=0)
    beta_schedule: Literal["linear", "constant", "cyclic"] = knob(
        "linear", "linear: from 0 over beta_warmup_steps; cyclic: again and again, every beta_cycle_steps; constant: beta at once"
    )
    beta_warmup_steps: int = knob(0, "optimizer steps over which beta rises linearly from 0; cyclic with 0: half of a cycle", ge=0)
    beta_cycle_steps: int = knob(0, "cyclic: optimizer steps of a cycle", ge=0)
    likelihood: Literal["gaussian", "bernoulli", "laplace", "categorical"] = knob(
        "gaussian", "how the decoder's output is scored; bernoulli and categorical take logits"
    )
    scale: float | Literal["learned"] = knob(
        1.0, "gaussian, laplace: scale of the likelihood in units of the scaled data, or learned", gt=0
    )
    num_levels: int = knob(0, "categorical: the data are whole numbers below it (transform.scale=none)", ge=0, le=LARGEST_SIZE)
    objective: Literal["elbo", "iwae"] = knob("elbo", "what training maximises: elbo, or the importance-weighted bound of num_samples")
    num_samples: int = knob(1, "latents per input that training draws; evaluation draws one", ge=1, le=LARGEST_SIZE)
    free_bits: float = knob(0.0, "nats that each latent dimension may cost without being pushed down; 0: off", ge=0)
    capacity: float = knob(0.0, "nats that the KL divergence is pulled to with weight beta; 0: off", ge=0)
    capacity_steps: int = knob(0, "optimizer steps over which the capacity rises linearly from 0; 0: at once", ge=0)

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise ConfigError for knobs that exclude each other or would have no effect."""
        name = type(self).__name__
        if (clash := clashing(self.objective, self.free_bits, self.capacity)) is not None:
            raise ConfigError(f"{name}.{clash}")
        if self.capacity_steps and not self.capacity:
            raise ConfigError(
                f"{name}.capacity_steps is {self.capacity_steps}, but there is no {name}.capacity to rise to: set it, or leave it"
            )
        if isinstance(self.scale, str) and self.scale != "learned":
            raise ConfigError(f"{name}.scale is {self.scale!r}, expected a positive number or 'learned'")
        if self.scale != 1.0 and self.likelihood in LOGITS:
            raise ConfigError(f"{name}.scale is {self.scale}, which {name}.likelihood={self.likelihood} does not have: leave it out")
        if (self.num_levels >= 2) != (self.likelihood == "categorical") or self.num_levels == 1:
            raise ConfigError(
                f"{name}.num_levels is {self.num_levels} and {name}.likelihood {self.likelihood}: "
                "categorical needs at least 2 levels (256 for 8-bit images), no other likelihood has any"
            )
        self._check_schedule(name)

    def _check_schedule(self, name: str) -> None:
        rise, cycle = self.beta_warmup_steps, self.beta_cycle_steps
        if self.beta_schedule == "constant" and rise:
            raise ConfigError(f"{name}.beta_warmup_steps is {rise}, but {name}.beta_schedule=constant does not rise: use linear or cyclic")
        if self.beta_schedule != "cyclic" and cycle:
            raise ConfigError(f"{name}.beta_cycle_steps is {cycle}, which only {name}.beta_schedule=cyclic reads: set it, or leave it out")
        if self.beta_schedule == "cyclic" and (cycle < 2 or rise > cycle):
            raise ConfigError(
                f"{name}.beta_schedule=cyclic with {name}.beta_cycle_steps {cycle} and {name}.beta_warmup_steps {rise}: "
                "a cycle needs at least 2 steps and as many as its rise"
            )

    def beta_at(self, step: int) -> float:
        """Return the weight of the KL divergence at optimizer step 1, 2, ..."""
        if self.beta_schedule == "cyclic":
            return cyclic_at(self.beta, self.beta_cycle_steps, self.beta_warmup_steps or self.beta_cycle_steps // 2, step)
        return linear_at(self.beta, self.beta_warmup_steps, step)

    def bound(self) -> VariationalObjective:
        """Return a new objective of these knobs."""
        return VariationalObjective(
            objective=self.objective,
            num_samples=self.num_samples,
            scale=self.scale,
            free_bits=self.free_bits,
            capacity=self.capacity,
            capacity_steps=self.capacity_steps,
        )


def build_nets(model: VariationalSpec, backbone: Any, input_shape: tuple[int, ...], code_dim: int) -> Backbone:  # any: a registered spec
    """Return the networks of a backbone for codes of `code_dim`; with levels the decoder gives K logits per element, on a last axis.

    The K logits are made as K times as many channels (of a vector: as K channels), so every backbone can do it.
    """
    nets: Backbone = BACKBONES.build(backbone, input_shape, code_dim)
    nets.check_likelihood(model.likelihood)
    if not model.num_levels:
        return nets
    if nets.bounded:
        raise ConfigError(
            "model.likelihood=categorical takes logits, but backbone.output=sigmoid squashes them: use backbone.output=identity"
        )
    channels = () if len(input_shape) == 1 else input_shape[:1]
    wide = (model.num_levels * channels[0], *input_shape[1:]) if channels else (model.num_levels, *input_shape)
    decoder = BACKBONES.build(backbone, wide, code_dim).decoder
    encoder = nn.Sequential(_Divided(model.num_levels - 1), nets.encoder)
    return Backbone(encoder, nn.Sequential(decoder, _LevelsLast(model.num_levels, channels)), nets.num_features)


class _Divided(nn.Module):
    """Scales levels to numbers in [0, 1]."""

    def __init__(self, largest: int) -> None:
        super().__init__()
        self.largest = largest

    def forward(self, x: Tensor) -> Tensor:
        return x / self.largest


class _LevelsLast(nn.Module):
    """`[N, K * C, ...]` -> `[N, C, ..., K]`; of vectors `[N, K, n]` -> `[N, n, K]`."""

    def __init__(self, num_levels: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.num_levels = num_levels
        self.channels = channels

    def forward(self, logits: Tensor) -> Tensor:
        return logits.reshape(len(logits), self.num_levels, *self.channels, *logits.shape[2:]).movedim(1, -1)
