"""How cleanly latent dimensions hold known factors, with the settings of disentanglement_lib (Locatello et al. 2019).

MIG (Chen et al. 2018), DCI (Eastwood & Williams 2018, by gradient-boosted trees), FactorVAE score (Kim & Mnih 2018). All are in [0, 1]
and are 0 for a constant representation. Legend: n rows, D latent, F factors; factors are `[n, F]` integers, their levels.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aecore.errors import ConfigError, DataError

Int64s = NDArray[np.int64]
Floats = NDArray[np.floating]
NUM_BINS = 20
BATCH, NUM_TRAIN, NUM_EVAL = 64, 10_000, 5_000  # of the FactorVAE score: rows per vote, votes
PRUNE_BELOW = 0.05  # dimensions with a smaller standard deviation have no vote


@dataclass(frozen=True, slots=True)
class DCI:
    """Disentanglement (one factor per dimension), completeness (one dimension per factor), accuracy of the trees on unseen rows."""

    disentanglement: float
    completeness: float
    informativeness: float


def mig(latents: Floats, factors: Int64s, bins: int = NUM_BINS) -> float:
    """Mutual information gap: per factor, what its best dimension knows more of it than the second best, over the factor's entropy.

    Latents `[n, D]` are cut into `bins` of equal width per dimension; a mean over the factors that vary.
    """
    codes = [_binned(column, bins) for column in latents.T]
    gaps = []
    for factor in factors.T:
        entropy = mutual_information(factor, factor)
        if entropy > 0:
            best, second = sorted([0.0, 0.0, *(mutual_information(code, factor) for code in codes)], reverse=True)[:2]
            gaps.append((best - second) / entropy)
    return float(np.mean(gaps)) if gaps else 0.0


def _binned(column: Floats, bins: int) -> Int64s:
    edges = np.histogram_bin_edges(column.astype(np.float64), bins)
    return np.clip(np.searchsorted(edges, column, side="right") - 1, 0, bins - 1).astype(np.int64)


def mutual_information(a: Int64s, b: Int64s) -> float:
    """Return the mutual information in nats of two columns of small integers, from their counts."""
    width = int(b.max()) + 1
    joint = np.bincount(a * width + b, minlength=(int(a.max()) + 1) * width).reshape(-1, width) / len(a)
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    return max(float((joint[seen] * np.log(joint[seen] / independent[seen])).sum()), 0.0)


def require_scikit_learn() -> None:
    """Raise ConfigError if scikit-learn is not installed, with how to install it or do without."""
    try:
        import sklearn  # noqa: F401  # only whether it is there
    except ImportError as missing:
        raise ConfigError(
            f"DCI needs scikit-learn ({missing}): install it with `pip install 'aecore[report]'`, or set evaluate.dci=false"
        ) from missing


def dci(train: Floats, train_factors: Int64s, test: Floats, test_factors: Int64s, seed: int = 0) -> DCI:
    """Fit boosted trees from `train [n, D]` to each factor and score how their importances are spread over dimensions and factors.

    Raises
    ------
    ConfigError
        Scikit-learn is not installed.
    DataError
        A factor has only one value in `train`.
    """
    require_scikit_learn()
    from sklearn.ensemble import GradientBoostingClassifier

    importances, accuracies = [], []
    for factor, truth in zip(train_factors.T, test_factors.T, strict=True):
        if len(np.unique(factor)) < 2:
            raise DataError(
                f"DCI fits trees to each factor, and one has a single value in {len(factor)} samples: give more of them "
                "(evaluate.factor_samples, a larger split), or leave DCI out with evaluate.dci=false"
            )
        trees = GradientBoostingClassifier(random_state=seed).fit(train, factor)
        importances.append(np.abs(trees.feature_importances_))
        accuracies.append(float((trees.predict(test) == truth).mean()))
    matrix = np.stack(importances, axis=1)  # [D, F]
    return DCI(_disentanglement(matrix), _disentanglement(matrix.T), float(np.mean(accuracies)))


def _disentanglement(matrix: NDArray[np.float64]) -> float:
    """Return the mean over rows, by their share of the sum, of one minus the normalised entropy of a row; 0 if all is zero."""
    if not matrix.sum() or matrix.shape[1] == 1:
        return 0.0 if not matrix.sum() else 1.0
    shares = matrix + 1e-11
    shares /= shares.sum(1, keepdims=True)
    per_row = 1.0 + (shares * np.log(shares)).sum(1) / np.log(matrix.shape[1])
    return float((per_row * matrix.sum(1)).sum() / matrix.sum())


def factor_vae_score(latents: Floats, factors: Int64s, seed: int = 0) -> float:
    """Accuracy with which the dimension of least variance among rows that share one factor tells which factor it is.

    Rows `[n, D]` that share a level are drawn with replacement: on a full grid, as if the other factors were drawn freely.
    """
    deviations = latents.std(0, ddof=1, dtype=np.float64)
    active = deviations >= PRUNE_BELOW
    if not active.any():
        return 0.0
    scaled = latents[:, active].astype(np.float64) / deviations[active]
    generator = np.random.default_rng(seed)
    votes = np.zeros((scaled.shape[1], factors.shape[1]), np.int64)
    np.add.at(votes, _votes(scaled, factors, NUM_TRAIN, generator), 1)
    argmin, factor = _votes(scaled, factors, NUM_EVAL, generator)
    return float((votes.argmax(1)[argmin] == factor).mean())


def _votes(scaled: NDArray[np.float64], factors: Int64s, num: int, generator: np.random.Generator) -> tuple[Int64s, Int64s]:
    """Return, for `num` batches that each share one factor, the dimension of least variance and the factor."""
    factor = generator.integers(0, factors.shape[1], num)
    level = factors[generator.integers(0, len(factors), num), factor]
    dimension = np.empty(num, np.int64)
    for number in range(factors.shape[1]):
        order = np.argsort(factors[:, number], kind="stable")
        levels, starts, counts = np.unique(factors[order, number], return_index=True, return_counts=True)
        batches = np.flatnonzero(factor == number)
        place = np.searchsorted(levels, level[batches])
        drawn = starts[place][:, None] + generator.integers(0, counts[place][:, None], (len(batches), BATCH))
        for chunk in np.array_split(np.arange(len(batches)), max(1, len(batches) // 512)):
            dimension[batches[chunk]] = scaled[order[drawn[chunk]]].var(1, ddof=1).argmin(1)
    return dimension, factor
