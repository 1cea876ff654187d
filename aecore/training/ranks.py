"""The rank of this process in a run, and the few collectives that the jobs need.

With one rank nothing here touches torch.distributed; with more the default process group must exist (gloo or nccl).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from aecore.errors import Diverged, RunFailed


@dataclass(frozen=True, slots=True)
class Rank:
    """Number `rank` of `world_size` processes, working on `device`."""

    rank: int = 0
    world_size: int = 1
    device: str = "cpu"


def all_sum(rank: Rank, values: Tensor) -> Tensor:
    """Return the sum of `values` over all ranks (float64, on the CPU)."""
    total = values.to(rank.device, torch.float64)
    if rank.world_size > 1:
        dist.all_reduce(total)
    return total.cpu()


def from_rank_zero(rank: Rank, value: str | None) -> str | None:
    """Return rank 0's `value` on every rank."""
    box = [value]
    if rank.world_size > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def buffers_from_rank_zero(rank: Rank, model: nn.Module) -> None:
    """Give every rank the buffers of rank 0: running statistics are of the samples that a rank saw, so they differ.

    A checkpoint holds rank 0's model, so all ranks have to validate that one.
    """
    if rank.world_size == 1:
        return
    with torch.no_grad():
        for buffer in model.buffers():
            values = buffer.contiguous()
            dist.broadcast(values, src=0)
            buffer.copy_(values)


def require_equal_parameters(rank: Rank, model: nn.Module, step: int) -> None:
    """Raise RunFailed if parameters or buffers differ between ranks, Diverged if a parameter is not finite: such a model is not saved."""
    with torch.no_grad():
        sums = torch.stack([_total(model.parameters()), _total(value.nan_to_num() for value in model.buffers())])
        sums = sums.to(rank.device)
    lowest, highest = sums.clone(), sums.clone()
    if rank.world_size > 1:
        dist.all_reduce(lowest, dist.ReduceOp.MIN)
        dist.all_reduce(highest, dist.ReduceOp.MAX)
    if not bool(torch.isfinite(sums[0])):
        raise Diverged(
            f"weights are not finite after step {step}: the checkpoints before it are kept; "
            "lower optim.lr or set optim.clip, and write to another out"
        )
    if not torch.equal(lowest, highest):
        raise RunFailed(
            f"ranks hold different weights or buffers after step {step} (sums of weights {lowest[0]:.9g} and {highest[0]:.9g}, "
            f"of buffers {lowest[1]:.9g} and {highest[1]:.9g}): gradients or running statistics were not synchronised"
        )


def _total(tensors: Iterable[Tensor]) -> Tensor:
    """Return the sum of all values, float64; 0 of nothing."""
    sums = [tensor.double().sum() for tensor in tensors]
    return torch.stack(sums).sum().cpu() if sums else torch.zeros((), dtype=torch.float64)
