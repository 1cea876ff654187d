"""What a model takes before it is built: the shapes of its weights, found on torch's meta device, against the memory of this machine.

A few numbers of a recipe or of a `config.json` from outside ask for any amount of memory. Nothing is allocated for what cannot be held.
The price: a model is built twice, the first time without memory: 20 ms for an MLP, and once in a process 0.9 s, since the first operation
on the meta device imports torch's compiler.
"""

import contextlib
import math
import os
import resource
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from aecore.errors import AecoreError, ConfigError

_CONTROL_GROUP = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
GIB = 1 << 30


def machine_bytes() -> int:
    """Return the memory that this process may use, in bytes: the machine's, or the limit of its control group or address space."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if address_space != resource.RLIM_INFINITY:
        limits.append(address_space)
    for name in _CONTROL_GROUP:
        with contextlib.suppress(OSError, ValueError):  # there is none, or it says "max"
            limits.append(int(Path(name).read_text()))
    return min(limits)


def require_memory(needed: int, what: str, remedy: str) -> None:
    """Raise ConfigError with both numbers if `what` takes more than the `needed` bytes of memory that this machine has."""
    if needed > (limit := machine_bytes()):
        raise ConfigError(f"{what} {needed / GIB:,.1f} GiB, and this process may use {limit / GIB:,.1f} GiB: {remedy}")


def shapes_of(build: Callable[[], nn.Module]) -> Mapping[str, Tensor] | None:
    """Return the state dict of what `build` makes, on torch's meta device: names, shapes and dtypes, no values and no memory.

    None for a model of which that cannot be said: building it looks at values, or leaves lazy layers.

    Raises
    ------
    RuntimeError, TypeError, ValueError
        As torch does for sizes that it cannot count.
    """
    try:
        with torch.device("meta"):
            state: Mapping[str, Tensor] = build().state_dict()
    except NotImplementedError:
        return None
    except (RuntimeError, TypeError) as error:  # TypeError: a numpy array is asked for
        if "meta" in str(error) or "device" in str(error):  # of what torch cannot do there
            return None
        raise
    return None if any(map(is_lazy, state.values())) else state


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
