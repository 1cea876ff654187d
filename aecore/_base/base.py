"""The abstract autoencoder and its typed outputs.

A model is written as `_encode`, `_decode`, `forward` and `compute_loss`, all with gradients. `encode` and `decode` are the same
without gradients; neither changes the train/eval mode, so what dropout or sampling do there is the caller's choice.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from aecore.loss import LossResult


class ModelOutput(ABC):  # noqa: B024  # a base only: nothing to implement
    """Base of output dataclasses: `@dataclass(slots=True, eq=False)` subclasses of it print tensors by shape and dtype only."""

    __slots__ = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:  # any: handed on
        super().__init_subclass__(**kwargs)
        if "__repr__" not in cls.__dict__:  # else the dataclass decorator would generate one that prints every value
            cls.__repr__ = ModelOutput.__repr__  # type: ignore[method-assign]  # same signature

    def __repr__(self) -> str:
        fields = dataclasses.fields(self)  # type: ignore[arg-type]  # subclasses are dataclasses
        inside = ", ".join(f"{field.name}={_describe(getattr(self, field.name))}" for field in fields)
        return f"{type(self).__name__}({inside})"


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"Tensor(shape={tuple(value.shape)}, dtype={value.dtype})"
    return repr(value)


class BaseAutoencoder(nn.Module, ABC):
    """Interface of all autoencoders. Arguments beyond `x`, `z` and `output` belong to the subclass and are passed on.

    Call `build` once before training, before `load_state_dict` and before wrapping the model in DDP: it gives lazy layers their sizes.
    """

    # any in the signatures below: subclasses decide what they take (one tensor, a pair) and which ModelOutput they return
    @abstractmethod
    def _encode(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Map inputs `[B, ...]` to an output with at least the latent `z`."""

    @abstractmethod
    def _decode(self, z: Any, *args: Any, **kwargs: Any) -> Any:
        """Map latents to an output with at least the reconstruction `x_hat`."""

    @abstractmethod
    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Encode and decode; the output holds all that `compute_loss` needs."""

    @abstractmethod
    def compute_loss(self, x: Any, output: Any, *args: Any, **kwargs: Any) -> LossResult:
        """Return the loss of `output = model(x)` against the inputs `x`."""

    def encode(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Run `_encode` under `torch.inference_mode()`, in whichever of train and eval mode the model is."""
        return self._infer(self._encode, x, *args, **kwargs)

    def decode(self, z: Any, *args: Any, **kwargs: Any) -> Any:
        """Run `_decode` under `torch.inference_mode()`, in whichever of train and eval mode the model is."""
        return self._infer(self._decode, z, *args, **kwargs)

    def build(self, input_sample: Any, *args: Any, **kwargs: Any) -> None:
        """Materialise lazy layers by one forward pass in eval mode, without gradients; modes are restored, also on failure.

        `input_sample` is a batch `[B, ...]`, or what else `forward` takes; only its shape matters.
        """
        _materialise(self, self.__call__, input_sample, *args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:  # any: torch's own types
        """Load weights as `nn.Module.load_state_dict` does and return its missing and unexpected keys.

        Raises
        ------
        RuntimeError
            As torch does, or if lazy layers are still without weights afterwards.
        """
        result = super().load_state_dict(state_dict, strict=strict, assign=assign)
        lazy = _lazy_layers(self)
        if lazy:
            raise RuntimeError(f"Call build() before load_state_dict() so that lazy layers know their sizes; without weights: {lazy}")
        return result

    def _infer(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if _lazy_layers(self):  # parameters born under inference_mode could never be trained
            _materialise(self, function, *args, **kwargs)
        with torch.inference_mode():
            return function(*args, **kwargs)


def _lazy_layers(model: nn.Module) -> str:
    """Return "name (class), ..." of the lazy layers that have no weights yet; empty if all have."""
    return ", ".join(
        f"{name} ({type(module).__name__})"
        for name, module in model.named_modules()
        if any(is_lazy(tensor) for tensor in chain(module.parameters(recurse=False), module.buffers(recurse=False)))
    )


def _materialise(model: nn.Module, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    with _eval_mode(model), torch.inference_mode(False), torch.no_grad():
        function(*args, **kwargs)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
