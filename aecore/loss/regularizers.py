r"""Terms that replace the plain KL divergence in a training objective.

To add a term (as `free_bits` and `capacity` do):

1. a function here: tensors per sample in, `[B]` out, which the objective weighs by beta and averages over the batch;
2. a field of `aecore.variational.bound.VariationalObjective`, which calls it in training mode, and a knob of `VariationalSpec`;
3. a value that changes with the step is a pure function of it (`schedules.py`), handed to the model by `Trainable.at_step`.

A term is a function of ONE sample, never of a batch's mean: then the objective of a global batch is the mean over its parts, the same
on any number of ranks. That is the reading of the papers' formulas; some published codes take the mean first.
Legend: B batch, D latent.
"""

from torch import Tensor


def free_bits(kl: Tensor, nats: float) -> Tensor:
    r""":math:`\sum_d \max(\lambda, KL_d)`, `[B]` for `kl [B, D]` (Kingma et al. 2016, with groups of one dimension).

    Below `nats` a dimension costs its minimum and has no gradient, so nothing pushes it into collapse.
    """
    return kl.clamp(min=nats).sum(-1)


def capacity(kl: Tensor, nats: float | Tensor) -> Tensor:
    r""":math:`|\sum_d KL_d - C|`, `[B]` for `kl [B, D]`; beta is the paper's gamma (Burgess et al. 2018, "Understanding disentangling").

    C = 0 is the plain KL.
    """
    return (kl.sum(-1) - nats).abs()
