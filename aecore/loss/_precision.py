"""float32 where half precision gives wrong results: KL divergences, sampling and sums of squares.

A KL computed in bfloat16 comes out as 0 or negative. Networks may run under autocast; what these two functions touch does not.
Double precision is left alone, so gradients can be checked in float64.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def at_least_float32(value: Tensor) -> Tensor:
    """Return `value`, as float32 if it is float16 or bfloat16."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def without_autocast(value: Tensor) -> AbstractContextManager[object]:
    """Return a context that switches autocast off on the device of `value`; one that does nothing, and costs nothing, where it is off."""
    if value.device.type == "meta" or not torch.is_autocast_enabled(value.device.type):
        return nullcontext()
    return torch.autocast(device_type=value.device.type, enabled=False)
