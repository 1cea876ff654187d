"""Objective: a batch in, the loss out. The one module that DistributedDataParallel wraps.

Forward and loss are in ONE module on purpose: calling parts of a wrapped model around the wrapper trains without gradient
synchronisation and without an error.
"""

from torch import Tensor, nn

from aecore._base.batch import Batch
from aecore._base.noise import step_noise
from aecore._base.trainable import Trainable
from aecore.data.format.transform import Transform
from aecore.loss import LossResult


class Objective(nn.Module):
    """Transform, forward pass and loss of one model.

    Parameters
    ----------
    model
        Any registered model; it is asked for `loss(batch, eps=..., beta=...)` and `noise_shape()` only.
    transform
        Stored dtype -> float, on the batch's device.
    likelihood
        Name of log p(x|z), see `aecore.loss.log_likelihood`.
    """

    def __init__(self, model: Trainable, transform: Transform, likelihood: str) -> None:
        super().__init__()
        self.model = model
        self.transform = transform
        self.likelihood = likelihood

    def forward(self, batch: Batch, eps: Tensor | None, beta: Tensor | float) -> LossResult:
        """Return the loss, a mean over the rows of `batch`; `eps` is this batch's slice of the global noise."""
        return self.model.loss(self.transform(batch), eps=eps, beta=beta, likelihood=self.likelihood)


def noise_for(model: Trainable, batch: Batch, seed: int, index: int) -> Tensor | None:
    """Return the noise of `batch`'s rows `[n, S, D]` on its device: drawn for the whole global batch from (seed, index), then sliced.

    `[n, 2, S, D]` for a batch of pairs. None if the model takes none. A rank without a sample (no positions, one repeated row) gets
    the noise of row 0.
    """
    shape = model.noise_shape()
    if shape is None:
        return None
    views = () if batch.x_pair is None else (2,)
    noise = step_noise(seed, index, (batch.num_global, *views, *shape))
    rows = noise[batch.positions] if len(batch.positions) else noise[:1]
    return rows.to(batch.x.device)
