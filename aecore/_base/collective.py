"""The one collective of models: sums over ranks of what training updates without gradients (codebooks, mean activations)."""

import torch.distributed as dist
from torch import Tensor


def sum_over_ranks(values: Tensor) -> Tensor:
    """Return the sum of `values` over all ranks, without a gradient; a copy of them where torch.distributed is not initialised.

    Every rank has to call it, in the same order, with the same shape and dtype: so call it in training mode only, once per step. In
    evaluation ranks score batches of their own, and one more on one rank would wait for ever.
    """
    total = values.detach().clone()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total)
    return total
