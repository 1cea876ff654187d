"""The optimizer is torch's; states that the optimizer of earlier versions wrote go on in it."""

from typing import Any

import pytest
import torch
from torch import nn

from aecore.errors import DataError
from aecore.training.optimizer import OptimSpec, build_optimizer, load_optimizer

# After three steps of the net below with `FusedAdam` of 8c16698, and its weights two steps later
MOMENTS = {
    "adam": (("0x1.c4e0b2p+2", "-0x1.156ca4p+1"), ("0x1.5693a2p+1", "0x1.0433f6p-2"), ("0x1.063eacp+0",), ("0x1.762f5p-5",)),
    "adamw": (("0x1.c34a18p+2", "-0x1.1422b2p+1"), ("0x1.5465a0p+1", "0x1.022684p-2"), ("0x1.051654p+0",), ("0x1.73017ep-5",)),
}
WEIGHTS = {
    "adam": (("0x1.e3abaep-2", "-0x1.c79a98p-3"), ("0x1.877904p-4",)),
    "adamw": (("0x1.e22cc6p-2", "-0x1.c62a3p-3"), ("0x1.86131cp-4",)),
}
LATER = {
    "adam": (("0x1.d1a4bap-2", "-0x1.a3a2p-3"), ("0x1.37b5e2p-4",)),
    "adamw": (("0x1.cf3148p-2", "-0x1.a14f48p-3"), ("0x1.359330p-4",)),
}
KINDS = pytest.mark.parametrize("kind", ["adam", "adamw"])


def numbers(texts: tuple[str, ...]) -> torch.Tensor:
    return torch.tensor([float.fromhex(text) for text in texts])


def net(weights: tuple[tuple[str, ...], tuple[str, ...]]) -> nn.Linear:
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(numbers(weights[0]))
        model.bias.copy_(numbers(weights[1]))
    return model


def old_state(kind: str) -> dict[str, Any]:
    """What `FusedAdam.state_dict()` returned."""
    group = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-08, "weight_decay": 0.1, "amsgrad": False, "maximize": False, "foreach": None}
    group |= {"capturable": False, "differentiable": False, "fused": True, "decoupled_weight_decay": kind == "adamw", "params": [0, 1]}
    weight, weight_squares, bias, bias_squares = map(numbers, MOMENTS[kind])
    states = (
        {"step": torch.tensor(3.0), "exp_avg": weight[None], "exp_avg_sq": weight_squares[None]},
        {"step": torch.tensor(3.0), "exp_avg": bias, "exp_avg_sq": bias_squares},
    )
    return {"state": dict(enumerate(states)), "param_groups": [group]}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        x = torch.tensor([[1.0, 2.0], [3.0, -1.0]]) * step
        model(x).square().mean().backward()
        optimizer.step()


@KINDS
def test_a_state_of_an_earlier_version_goes_on_as_if_nothing_had_happened(kind):
    model = net(WEIGHTS[kind])
    optimizer = build_optimizer(OptimSpec(kind=kind, lr=1e-2, weight_decay=0.1), model)
    optimizer.load_state_dict(old_state(kind))
    train(model, optimizer, range(4, 6))
    for parameter, expected in zip(model.parameters(), LATER[kind], strict=True):
        torch.testing.assert_close(parameter.flatten(), numbers(expected), rtol=1e-6, atol=0)
    assert {float(state["step"]) for state in optimizer.state_dict()["state"].values()} == {5.0}


@KINDS
def test_the_state_that_is_written_is_that_of_earlier_versions(kind):
    model = net((("0x1p-1", "-0x1p-2"), ("0x1p-3",)))
    optimizer = build_optimizer(OptimSpec(kind=kind, lr=1e-2, weight_decay=0.1), model)
    train(model, optimizer, range(1, 4))
    found, expected = optimizer.state_dict(), old_state(kind)
    assert found["param_groups"] == expected["param_groups"]
    for number, state in expected["state"].items():
        assert found["state"][number].keys() == state.keys()
        for name, value in state.items():
            torch.testing.assert_close(found["state"][number][name], value, rtol=1e-6, atol=0)


def test_a_parameter_that_never_had_a_gradient_has_no_state_and_goes_on():
    net = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})

    def fresh() -> torch.optim.Optimizer:
        return build_optimizer(OptimSpec(), net)

    optimizer = fresh()
    net["used"](torch.ones(3, 2)).sum().backward()
    optimizer.step()
    state, again = optimizer.state_dict(), fresh()
    assert len(state["state"]) == 2
    load_optimizer(again, state, 1, "state.pt")
    assert again.state_dict()["state"].keys() == state["state"].keys()
    with pytest.raises(DataError, match=r"state\.pt does not fit this run: state"):
        load_optimizer(fresh(), {**state, "state": {}}, 1, "state.pt")
