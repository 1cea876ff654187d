"""What a model is made of, as plain data: the `config.json` of a checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aecore._base.trainable import ModelSpec, Trainable
from aecore.data.format.transform import TransformSpec
from aecore.errors import ConfigError
from aecore.registry import BACKBONES, MODELS, Registry, absent_values, from_dict, to_dict


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Everything that is needed to rebuild a model; `input_shape` is `(C, H, W)`, `(F,)` or any other shape of the data.

    A first axis of 0 means sequences of any number of steps.
    """

    model: ModelSpec
    backbone: Any  # any: the spec class registered for its kind
    transform: TransformSpec
    input_shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.model.likelihood == "categorical" and self.transform.scale != "none":
            raise ConfigError(
                f"model.likelihood=categorical scores class ids, and transform.scale={self.transform.scale} would change them: "
                "use transform.scale=none"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that decide weights and latents, later fields only if they differ from the old behaviour."""
        return {
            "model": to_dict(self.model, identity_only=True),
            "backbone": to_dict(self.backbone, identity_only=True),
            "transform": to_dict(self.transform, identity_only=True),
            "input_shape": list(self.input_shape),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "ModelConfig":
        """Read the plain data back; an unknown kind or key is a ConfigError. A later field that is absent means what older versions did."""
        return cls(
            MODELS.from_dict(_whole(MODELS, data["model"])),
            BACKBONES.from_dict(_whole(BACKBONES, data["backbone"])),
            from_dict(TransformSpec, {**absent_values(TransformSpec), **data["transform"]}),
            tuple(data["input_shape"]),
        )

    def build(self) -> Trainable:
        """Build the model with fresh weights (drawn from torch's global generator)."""
        model: Trainable = MODELS.build(self.model, self.backbone, self.input_shape)
        return model


def _whole(parts: Registry, data: Mapping[str, Any]) -> Mapping[str, Any]:
    return {**absent_values(parts.spec_type(data["kind"])), **data} if "kind" in data else data
