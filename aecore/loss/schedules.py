"""Weights of loss terms as pure functions of the optimizer step 1, 2, ..., so that a resumed run continues them exactly.

Give them to a compiled model as a 0-dim tensor: `torch.compile` compiles again for every new Python float.
"""


def linear_at(value: float, num_steps: int, step: int) -> float:
    """Return a line from 0 at step 0 to `value` at step `num_steps`, then constant; `value` at once if `num_steps` is 0."""
    if step >= num_steps:
        return value
    return value * step / num_steps


def cyclic_at(value: float, cycle_steps: int, rise_steps: int, step: int) -> float:
    """Return cycles of `cycle_steps` steps: in each a line from 0 to `value` over `rise_steps`, then constant (Fu et al. 2019).

    Step 1 is the first of a cycle and has `value / rise_steps`; step 0, before the first, has 0.
    """
    return linear_at(value, rise_steps, (step - 1) % cycle_steps + 1 if step > 0 else 0)


def beta_at(beta: float, warmup_steps: int, step: int) -> float:
    """Return the weight of the KL at `step`: a line from 0 to `beta` over `warmup_steps`, then constant."""
    return linear_at(beta, warmup_steps, step)
