"""What a model is made of, as plain data: the `config.json` of a checkpoint."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from aecore._base.trainable import ModelSpec, Trainable
from aecore.checkpoint.limits import buildable, bytes_of, require_memory, shapes_of
from aecore.data.format.transform import TransformSpec
from aecore.errors import ConfigError
from aecore.registry import BACKBONES, LARGEST_SIZE, MODELS, absent_values, from_dict, shown, to_dict

MOST_AXES = 8  # of a sample


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Everything that is needed to rebuild a model; `input_shape` is `(C, H, W)`, `(F,)` or any other shape of the data.

    A first axis of 0 means sequences of any number of steps. `classes` are the names of the labels that the model takes, in order; None if
    it takes none, or was trained by a version that did not record them.
    """

    model: ModelSpec
    backbone: Any  # any: the spec class registered for its kind
    transform: TransformSpec
    input_shape: tuple[int, ...]
    classes: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.model.likelihood == "categorical" and self.transform.scale != "none":
            raise ConfigError(
                f"model.likelihood=categorical scores class ids, and transform.scale={self.transform.scale} would change them: "
                "use transform.scale=none"
            )

    @property
    def channels(self) -> int | None:
        """The channels of the images that the model takes; None if samples may be something else than images."""
        return self.input_shape[0] if len(self.input_shape) == 3 else None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that decide weights and latents, later fields only if they differ from the old behaviour."""
        return {
            "model": to_dict(self.model, identity_only=True),
            "backbone": to_dict(self.backbone, identity_only=True),
            "transform": to_dict(self.transform, identity_only=True),
            "input_shape": list(self.input_shape),
            **({} if self.classes is None else {"classes": list(self.classes)}),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "ModelConfig":
        """Read the plain data back. A later field that is absent means what older versions did.

        Raises
        ------
        ConfigError
            An unknown kind or key, a missing key, a wrong type, a number out of bounds.
        """
        model: ModelSpec = _read(MODELS.spec_type_of(data["model"]), data["model"])
        backbone = _read(BACKBONES.spec_type_of(data["backbone"]), data["backbone"])
        shape = _shape(data["input_shape"], model.kind)
        return cls(model, backbone, _read(TransformSpec, data["transform"]), shape, _classes(data.get("classes"), model))

    def shapes(self) -> Mapping[str, Tensor] | None:
        """Return the model's state dict for its names, shapes and dtypes: of a large model without values and memory.

        None for a large model whose building looks at values: nothing is known of it before it is built.

        Raises
        ------
        ConfigError
            A model that cannot be built.
        """
        with buildable(self._name):
            return shapes_of(lambda: MODELS.build(self.model, self.backbone, self.input_shape))

    def build(self, *, copies: int = 1) -> Trainable:
        """Build the model with fresh weights (drawn from torch's global generator).

        Raises
        ------
        ConfigError
            A model that cannot be built, or of which this machine cannot hold `copies` (training needs gradients and moments as well).
        """
        shapes = self.shapes()
        if shapes is not None:
            sample = 4 * math.prod(size or 1 for size in self.input_shape)
            numbers = sum(math.prod(tensor.shape) for tensor in shapes.values())
            what = f"{self._name} has {numbers:,} weights: {'it takes' if copies == 1 else 'training it takes'}"
            require_memory(copies * bytes_of(shapes) + sample, what, "choose smaller sizes in model.* and backbone.*, or a larger machine")
        with buildable(self._name):
            model: Trainable = MODELS.build(self.model, self.backbone, self.input_shape)
        return model

    @property
    def _name(self) -> str:
        return f"model.kind={self.model.kind} with backbone.kind={self.backbone.kind} for samples of shape {self.input_shape}"


def _read(part: type, data: Any) -> Any:  # any: what should be a mapping; an instance of `part`
    """Return a spec of its recorded fields and the later ones that are absent; ConfigError if others are missing."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{part.__name__} is {shown(data)}, expected an object of its fields")
    whole = {**absent_values(part), **data}
    missing = [field.name for field in dataclasses.fields(part) if field.metadata.get("identity", True) and field.name not in whole]
    if missing:
        raise ConfigError(f"{part.__name__} lacks {', '.join(missing)}: restore it from a copy")
    return from_dict(part, whole)


def _classes(data: Any, model: ModelSpec) -> tuple[str, ...] | None:  # any: what should be a list of names
    """Return the recorded class names, None if there are none; ConfigError unless they are different texts, as many as the model takes."""
    if data is None:
        return None
    most = to_dict(model).get("num_classes", LARGEST_SIZE)
    if not isinstance(data, list) or not all(type(name) is str for name in data) or len(set(data)) < len(data) or len(data) > most:
        raise ConfigError(f"classes is {shown(data)}, expected a list of up to {most:,} different names")
    return tuple(data)


def _shape(data: Any, kind: str) -> tuple[int, ...]:  # any: what should be a list of sizes
    sizes = isinstance(data, list | tuple) and all(type(size) is int and 0 <= size <= LARGEST_SIZE for size in data)
    if not sizes or len(data) > MOST_AXES or 0 in data[1:]:
        raise ConfigError(
            f"input_shape is {shown(data)}, expected a list of up to {MOST_AXES} sizes from 1 to {LARGEST_SIZE:,} "
            "(the first may be 0: sequences of any length)"
        )
    built = MODELS.built_type(kind)
    if 0 in data and isinstance(built, type) and issubclass(built, Trainable) and "lengths" not in built.train_inputs:
        raise ConfigError(f"input_shape is {shown(data)}, sequences of any length, and model.kind={kind} takes samples of one size")
    return tuple(data)
