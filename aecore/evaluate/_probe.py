"""What a simple classifier reads from latents: multinomial logistic regression, and nearest neighbours.

Both are deterministic: the first is convex and solved to its optimum, the second has nothing to fit. Legend: n rows, D latent, K classes.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aecore.store import keep_torch_cache_private

Int64s = NDArray[np.int64]
Floats = NDArray[np.floating]
MAX_ITERATIONS = 500
ROWS_AT_ONCE = 512  # queries whose distances to all fitted rows are in memory at once


def linear_probe(train: Floats, train_labels: Int64s, test: Floats, test_labels: Int64s) -> float:
    r"""Accuracy on `test [m, D]` of the logistic regression that is fitted on `train [n, D]`.

    Latents are standardised by the moments of `train` (a constant dimension becomes 0). It minimises
    :math:`\sum_i -\log p(y_i | z_i) + \tfrac12 \|W\|^2`, the biases free; a class that `train` does not have is never predicted.
    """
    classes, targets = np.unique(train_labels, return_inverse=True)
    mean, deviation = train.mean(0, dtype=np.float64), train.std(0, dtype=np.float64)
    scale = np.divide(1.0, deviation, out=np.zeros_like(deviation), where=deviation > 1e-12)
    with torch.inference_mode(False):  # else the tensors could not have gradients
        weights, biases = _logistic_regression(_standardised(train, mean, scale), torch.from_numpy(targets), len(classes))
    predicted = (_standardised(test, mean, scale) @ weights + biases).argmax(1).numpy()
    return float((classes[predicted] == test_labels).mean())


def _standardised(values: Floats, mean: NDArray[np.float64], scale: NDArray[np.float64]) -> Tensor:
    return torch.from_numpy((values.astype(np.float64) - mean) * scale)


def _logistic_regression(z: Tensor, targets: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return weights `[D, K]` and biases `[K]` at the optimum, by L-BFGS on all rows in float64, from zeros."""
    weights = torch.zeros(z.shape[1], num_classes, dtype=torch.float64, requires_grad=True)
    biases = torch.zeros(num_classes, dtype=torch.float64, requires_grad=True)
    keep_torch_cache_private()
    solver = torch.optim.LBFGS(
        [weights, biases], max_iter=MAX_ITERATIONS, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        solver.zero_grad()
        loss = torch.nn.functional.cross_entropy(z @ weights + biases, targets) + 0.5 * weights.square().sum() / len(z)
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own
        return loss

    with torch.enable_grad():
        solver.step(objective)  # type: ignore[no-untyped-call]  # torch's own
    return weights.detach(), biases.detach()


def nearest_neighbours(train: Floats, train_labels: Int64s, test: Floats, test_labels: Int64s, k: int = 5) -> float:
    """Accuracy of the majority of the k nearest of `train [n, D]` (Euclidean, not standardised) for each of `test [m, D]`.

    Equal votes go to the smallest label. All rows vote where there are fewer than k.
    """
    classes, targets = np.unique(train_labels, return_inverse=True)
    known = torch.from_numpy(train.astype(np.float64))
    squares, votes_of, right = known.square().sum(1), torch.from_numpy(targets), 0
    for start in range(0, len(test), ROWS_AT_ONCE):
        queries = torch.from_numpy(test[start : start + ROWS_AT_ONCE].astype(np.float64))
        distances = torch.addmm(squares, queries, known.T, alpha=-2.0)  # without |query|^2, which orders nothing
        nearest = votes_of[distances.topk(min(k, len(known)), largest=False).indices]
        votes = torch.zeros(len(queries), len(classes), dtype=torch.int64).scatter_add_(1, nearest, torch.ones_like(nearest))
        predicted = classes[votes.numpy().argmax(1)]
        right += int((predicted == test_labels[start : start + ROWS_AT_ONCE]).sum())
    return right / len(test)
