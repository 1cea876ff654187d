import copy

import pytest
import torch
from torch import nn

from aecore.optim import FusedAdam

KINDS = pytest.mark.parametrize("decoupled", [False, True])


def nets() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Linear(3, 1, bias=False))
    return one, copy.deepcopy(one)


def reference(model: nn.Module, decoupled: bool) -> torch.optim.Optimizer:
    return (torch.optim.AdamW if decoupled else torch.optim.Adam)(model.parameters(), lr=1e-2, weight_decay=0.1, fused=True)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: range, frozen: tuple[int, ...] = ()) -> None:
    """Train on a batch of each number; in steps of the numbers `frozen` the first layer gets no gradient."""
    for number in numbers:
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + number)
        x = torch.randn(16, 5, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        if number in frozen:
            for parameter in model[0].parameters():
                parameter.grad = None
        optimizer.step()


def require_equal(one: nn.Module, other: nn.Module, ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    a, b = ours.state_dict(), theirs.state_dict()
    assert a["param_groups"] == b["param_groups"]
    assert a["state"].keys() == b["state"].keys()
    for number, state in a["state"].items():
        assert state.keys() == b["state"][number].keys()
        assert all(torch.equal(value, b["state"][number][name]) for name, value in state.items())


@KINDS
def test_weights_and_state_are_those_of_torch_to_the_last_bit(decoupled):
    one, other = nets()
    ours, theirs = FusedAdam(one.parameters(), weight_decay=0.1, decoupled=decoupled), reference(other, decoupled)
    for part in (range(1), range(1, 2), range(2, 20)):
        steps(one, ours, part)
        steps(other, theirs, part)
        require_equal(one, other, ours, theirs)


@KINDS
@pytest.mark.parametrize("frozen", [(0,), (5,), (0, 1, 2), (3, 4, 9)])
def test_steps_in_which_some_parameters_have_no_gradient_count_for_the_others_only(decoupled, frozen):
    one, other = nets()
    ours, theirs = FusedAdam(one.parameters(), weight_decay=0.1, decoupled=decoupled), reference(other, decoupled)
    steps(one, ours, range(12), frozen)
    steps(other, theirs, range(12), frozen)
    require_equal(one, other, ours, theirs)


@pytest.mark.parametrize("direction", ["ours to torch", "torch to ours", "ours to ours"])
def test_a_state_goes_on_in_torch_and_back(direction):
    one, other = nets()
    first = reference(one, False) if direction.startswith("torch") else FusedAdam(one.parameters(), weight_decay=0.1)
    theirs = reference(other, False)
    steps(one, first, range(5))
    steps(other, theirs, range(5))
    state = copy.deepcopy(first.state_dict())
    second = reference(one, False) if direction.endswith("torch") else FusedAdam(one.parameters(), weight_decay=0.1)
    second.load_state_dict(state)
    steps(one, second, range(5, 12))
    steps(other, theirs, range(5, 12))
    require_equal(one, other, second, theirs)


def test_a_state_dict_does_not_change_with_later_steps_more_than_that_of_torch():
    one, _ = nets()
    optimizer = FusedAdam(one.parameters())
    steps(one, optimizer, range(5))
    counts = [state["step"] for state in optimizer.state_dict()["state"].values()]
    assert len({count.data_ptr() for count in counts}) == len(counts)  # none is shared: torch would count it for each parameter
    steps(one, optimizer, range(5, 9))
    assert {float(state["step"]) for state in optimizer.state_dict()["state"].values()} == {9.0}


def test_a_copy_goes_on_by_itself():
    one, other = nets()
    ours, theirs = FusedAdam(one.parameters(), weight_decay=0.1), reference(other, False)
    steps(one, ours, range(5))
    steps(other, theirs, range(5))
    copied, optimizer = copy.deepcopy((one, ours))
    steps(copied, optimizer, range(5, 9))
    steps(one, ours, range(5, 9))
    steps(other, theirs, range(5, 9))
    require_equal(copied, other, optimizer, theirs)
    require_equal(one, other, ours, theirs)


def test_a_gradient_scaler_is_heard():
    one, other = nets()
    ours, theirs = FusedAdam(one.parameters(), 1e-2, weight_decay=0.1), reference(other, False)
    for model, optimizer in ((one, ours), (other, theirs)):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        for number in range(8):
            x = torch.randn(16, 5, generator=torch.Generator().manual_seed(number))
            loss = model(x).square().mean() * (torch.inf if number == 4 else 1.0)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    require_equal(one, other, ours, theirs)
    assert all(parameter.isfinite().all() for parameter in one.parameters())
