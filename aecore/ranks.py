"""Who this process is among the ranks of a run, and the few collectives that the jobs need.

With one rank nothing here touches torch.distributed; with more the default process group must exist (gloo or nccl).
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from aecore.errors import Diverged, RunFailed


@dataclass(frozen=True, slots=True)
class Rank:
    """Number `index` of `world` processes, working on `device`."""

    index: int = 0
    world: int = 1
    device: str = "cpu"


def all_sum(rank: Rank, values: Tensor) -> Tensor:
    """Return the sum of `values` over all ranks (float64, on the CPU)."""
    total = values.to(rank.device, torch.float64)
    if rank.world > 1:
        dist.all_reduce(total)
    return total.cpu()


def from_rank_zero(rank: Rank, value: str | None) -> str | None:
    """Return rank 0's `value` on every rank."""
    box = [value]
    if rank.world > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def require_equal_parameters(rank: Rank, model: nn.Module, step: int) -> None:
    """RunFailed if the parameters differ between ranks, Diverged if they are not finite: a model that must not be saved."""
    with torch.no_grad():
        sums = torch.stack([parameter.double().sum() for parameter in model.parameters()]).sum().reshape(1)
    lowest, highest = sums.clone(), sums.clone()
    if rank.world > 1:
        dist.all_reduce(lowest, dist.ReduceOp.MIN)
        dist.all_reduce(highest, dist.ReduceOp.MAX)
    if not bool(torch.isfinite(sums)):
        raise Diverged(
            f"weights are not finite after step {step}: the checkpoints before it are kept; "
            "lower optim.lr or set optim.clip, and write to another out"
        )
    if not torch.equal(lowest, highest):
        raise RunFailed(
            f"ranks hold different weights after step {step} (sums {lowest.item():.9g} and "
            f"{highest.item():.9g}): gradients were not synchronised"
        )
