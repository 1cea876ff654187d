"""What a model takes before it is built: the shapes of its weights against the memory of this machine.

A few numbers of a recipe or of a `config.json` from outside ask for any amount of memory. Nothing is allocated for what cannot be held.
The price: a model is built twice. The first time it may allocate `TRIED`, which is 20 ms for an MLP; a larger one is built on torch's meta
device instead, whose first operation imports torch's compiler (0.9 s once in a process).
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from aecore.errors import AecoreError, ConfigError
from aecore.native.memory import machine_bytes

GIB = 1 << 30
TRIED = 256 << 20  # bytes that building a model may allocate before it goes on without memory
_SIZED = {torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn, torch.full}  # take a size, as one sequence or as numbers


def require_memory(needed: int, what: str, remedy: str) -> None:
    """Raise ConfigError with both numbers if `what` takes more than the `needed` bytes of memory that this machine has."""
    if needed > (limit := machine_bytes()):
        raise ConfigError(f"{what} {needed / GIB:,.1f} GiB, and this process may use {limit / GIB:,.1f} GiB: {remedy}")


def shapes_of(build: Callable[[], nn.Module]) -> Mapping[str, Tensor] | None:
    """Return the state dict of what `build` makes, for its names, shapes and dtypes: of a large model without values and memory.

    None for a model of which that cannot be said: building it leaves lazy layers, or looks at values and takes more than `TRIED`.

    Raises
    ------
    RuntimeError, TypeError, ValueError
        As torch does for sizes that it cannot count.
    """
    state: Mapping[str, Tensor]
    try:
        try:
            with torch.random.fork_rng(devices=[]), _Allocated(TRIED):
                state = build().state_dict()
        except _TooLarge:
            with torch.device("meta"):
                state = build().state_dict()
    except NotImplementedError:
        return None
    except (RuntimeError, TypeError) as error:  # TypeError: a numpy array is asked for
        if "meta" in str(error) or "device" in str(error):  # of what torch cannot do there
            return None
        raise
    return None if any(map(is_lazy, state.values())) else state


class _TooLarge(Exception):
    """More would be allocated than was allowed."""


class _Allocated(TorchFunctionMode):
    """Add up what torch's functions allocate and raise _TooLarge at the bound: before it happens where a function takes a size."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._left = most

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # any: torch's interface
        if function in _SIZED:
            size = kwargs["size"] if kwargs and "size" in kwargs else args[0] if isinstance(args[0], tuple | list) else args
            self._take(8 * math.prod(map(int, size)))
            return function(*args, **kwargs or {})
        result = function(*args, **kwargs or {})
        if isinstance(result, Tensor) and not any(result is each for each in args):
            self._take(result.nbytes)
        return result

    def _take(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise _TooLarge


def bytes_of(tensors: Mapping[str, Tensor]) -> int:
    """Return the size of all values; an estimate from above where weights are tied."""
    return sum(math.prod(tensor.shape) * tensor.element_size() for tensor in tensors.values())


@contextlib.contextmanager
def buildable(what: str) -> Iterator[None]:
    """Turn what torch raises about sizes that it cannot count or allocate, or that do not fit each other, into a ConfigError."""
    try:
        yield
    except AecoreError:
        raise
    except (RuntimeError, ValueError, ArithmeticError, IndexError, TypeError, MemoryError) as error:
        if isinstance(error, TypeError) and "verflow" not in str(error):  # a mistake in the code of a model
            raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ConfigError(f"{what} cannot be built: {reason}; change model.* or backbone.*") from error
