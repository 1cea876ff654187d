"""Optimizer and learning rate. The learning rate is a pure function of the step: there is no scheduler state to save or lose."""

import math
from typing import Literal

import torch
from torch import nn

from aecore.registry import knob, spec


@spec
class OptimSpec:
    """Adam (Kingma and Ba 2015) or AdamW (Loshchilov and Hutter 2019), fused, with a constant or one-cycle learning rate."""

    kind: Literal["adam", "adamw"] = knob("adam", "adam or adamw")
    lr: float = knob(1e-3, "learning rate; the peak of the one-cycle schedule", gt=0)
    schedule: Literal["constant", "one_cycle"] = knob("constant", "constant, or one_cycle: cosine up over 30 % of the steps, cosine down")
    clip: float = knob(0.0, "largest norm of the whole gradient; 0: no clipping", ge=0)
    weight_decay: float = knob(0.0, "weight decay (decoupled with adamw)", ge=0)


def build_optimizer(optim: OptimSpec, model: nn.Module) -> torch.optim.Optimizer:
    """Return the fused optimizer over all parameters of `model`."""
    cls = torch.optim.AdamW if optim.kind == "adamw" else torch.optim.Adam
    return cls(model.parameters(), lr=optim.lr, weight_decay=optim.weight_decay, fused=True)


def lr_at(optim: OptimSpec, step: int, total_steps: int) -> float:
    """Return the learning rate of step 1..total_steps.

    one_cycle: Smith and Topin 2018, from lr/25 to lr over the first 30 %, then down to lr/250,000, both by a cosine (the
    numbers of torch's OneCycleLR).
    """
    if optim.schedule == "constant":
        return optim.lr
    done, last = step - 1, max(total_steps - 1, 1)
    peak = max(0.3 * total_steps - 1, 0.0)
    if done <= peak:
        start, end, share = optim.lr / 25, optim.lr, done / peak if peak else 1.0
    else:
        start, end, share = optim.lr, optim.lr / 250_000, (done - peak) / (last - peak)
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr
