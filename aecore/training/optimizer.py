"""Optimizer and learning rate. The learning rate is a pure function of the step: there is no scheduler state to save or lose."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from aecore.errors import DataError
from aecore.registry import knob, shown, spec
from aecore.store import keep_torch_cache_private

_LARGEST_STEP = 1 << 24  # torch counts in float32, which stays there


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
    keep_torch_cache_private()
    cls = torch.optim.AdamW if optim.kind == "adamw" else torch.optim.Adam
    return cls(model.parameters(), lr=optim.lr, weight_decay=optim.weight_decay, fused=True)


def load_optimizer(optimizer: torch.optim.Optimizer, saved: Any, step: int, where: str) -> None:  # any: what a file holds
    """Give a fresh optimizer of `build_optimizer` the state `saved` that its `state_dict` had after `step` steps.

    torch believes what it is given, and its fused step reads and writes as many numbers as the weights have: a moment of another shape
    would be memory of something else.

    Raises
    ------
    DataError
        The entry of `where` that is missing, unknown, or not what this optimizer has for these parameters after these steps.
    """

    def require(fits: bool, entry: str, found: object, expected: str) -> None:
        if not fits:
            raise DataError(
                f"{where} does not fit this run: {entry} is {_described(found)}, expected {expected}; restore it from a copy, "
                "or move its checkpoint away: the same run continues from the one before"
            )

    require(isinstance(saved, dict) and saved.keys() == {"state", "param_groups"}, "optimizer", saved, "state and param_groups")
    own, groups, states = optimizer.state_dict()["param_groups"], saved["param_groups"], saved["state"]
    require(isinstance(groups, list) and len(groups) == len(own), "param_groups", groups, f"a list of {len(own)}")
    for settings, group in zip(own, groups, strict=True):
        require(isinstance(group, dict), "param_groups", group, "the settings of a group")
        for name, value in settings.items():  # the settings are the job's; those of a file of another torch may lack some
            if name != "lr" and name in group:
                require(_same(group[name], value), f"param_groups.{name}", group[name], repr(value))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    trained = {number: parameter for number, parameter in enumerate(parameters) if parameter.requires_grad}
    count = f"the numbers of {len(trained)} parameters"
    # a parameter of a user's net that never had a gradient has no entry; all of them have none only before the first step
    known = isinstance(states, dict) and states.keys() <= trained.keys() and (bool(states) or not step)
    require(known, "state", states, count)
    for number in states:
        parameter, entry, state = trained[number], f"state.{number}", states[number]
        require(isinstance(state, dict) and state.keys() == {"step", "exp_avg", "exp_avg_sq"}, entry, state, "step, exp_avg, exp_avg_sq")
        counted = torch.zeros((), dtype=torch.float32)
        for name, like in (("step", counted), ("exp_avg", parameter), ("exp_avg_sq", parameter)):
            require(_is_like(state[name], like), f"{entry}.{name}", state[name], _described(like))
            # the square of a large gradient overflows: Adam's step is 0 there, and the run goes on
            good = ~state[name].isnan() if name == "exp_avg_sq" else state[name].isfinite()
            require(bool(good.all()), f"{entry}.{name}", "not finite", "finite numbers")
        seen = float(state["step"])
        require(1 <= seen <= min(step, _LARGEST_STEP), f"{entry}.step", seen, f"1 to {step}, the steps of the checkpoint")
        require(not bool((state["exp_avg_sq"] < 0).any()), f"{entry}.exp_avg_sq", "negative", "means of squares")
    copies = {number: {name: value.clone() for name, value in states[number].items()} for number in states}  # no two share memory
    optimizer.load_state_dict({"state": copies, "param_groups": own})


def _is_like(value: object, like: Tensor) -> bool:
    """Return whether `value` is a plain tensor on the CPU with the shape and dtype of `like`."""
    if not isinstance(value, Tensor) or type(value) is not Tensor or value.layout != torch.strided or value.device.type != "cpu":
        return False
    return value.dtype == like.dtype and value.shape == like.shape


def _same(saved: object, own: object) -> bool:
    if isinstance(own, list | tuple):
        return type(saved) is type(own) and len(saved) == len(own) and all(map(_same, saved, own))
    return isinstance(saved, bool | int | float | None) and saved == own


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return shown(list(value) if isinstance(value, dict) else value)


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
