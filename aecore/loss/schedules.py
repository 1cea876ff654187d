"""Weights of loss terms as pure functions of the optimizer step, so that a resumed run continues them exactly."""


def beta_at(beta: float, warmup_steps: int, step: int) -> float:
    """Return the weight of the KL at `step` (from 0): a line from 0 to `beta` over `warmup_steps`, then constant.

    Give it to a compiled model as a 0-dim tensor: `torch.compile` compiles again for every new Python float.
    """
    if step >= warmup_steps:
        return beta
    return beta * step / warmup_steps
