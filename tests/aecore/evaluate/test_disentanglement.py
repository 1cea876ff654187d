"""Scores of known factors, on hand-made representations whose scores are known."""

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest

from aecore.errors import ConfigError, DataError
from aecore.evaluate._disentanglement import DCI, dci, factor_vae_score, mig, mutual_information, require_scikit_learn

LEVELS = (3, 4, 8)
GRID = np.array(list(itertools.product(*map(range, LEVELS)))).repeat(8, axis=0)  # [768, 3]: every combination, eight times
ROWS = np.random.default_rng(0).permutation(len(GRID))
FACTORS = GRID[ROWS].astype(np.int64)


def perfect() -> np.ndarray:
    """One dimension for each factor, and one that holds nothing."""
    return np.column_stack([FACTORS, np.random.default_rng(1).normal(0, 0.01, len(FACTORS))]).astype(np.float32)


SQUARE = np.array(list(itertools.product(range(8), range(8)))).repeat(12, axis=0)[ROWS].astype(np.int64)  # two factors


def rotated() -> np.ndarray:
    """Both factors of SQUARE, turned by an eighth: each dimension holds as much of the one as of the other."""
    return (SQUARE @ np.array([[1, 1], [1, -1]]) / np.sqrt(2)).astype(np.float32)


def duplicated() -> np.ndarray:
    """Every factor in two dimensions: each dimension is pure, no factor has a dimension of its own."""
    return np.column_stack([FACTORS, FACTORS]).astype(np.float32)


def halves(latents: np.ndarray, factors: np.ndarray = FACTORS, seed: int = 0) -> DCI:
    half = len(latents) // 2
    return dci(latents[:half], factors[:half], latents[half:], factors[half:], seed)


def test_mutual_information_is_the_entropy_of_what_is_shared() -> None:
    a, b = FACTORS[:, 0], FACTORS[:, 1]
    assert mutual_information(a, a) == pytest.approx(math.log(3))
    assert mutual_information(a * 4 + b, b) == pytest.approx(math.log(4))
    assert mutual_information(a, b) == pytest.approx(0.0, abs=1e-12)


def test_mutual_information_is_that_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(0)
    a = generator.integers(0, 7, 500)
    b = (a + generator.integers(0, 3, 500)) % 5
    assert mutual_information(a, b) == pytest.approx(metrics.mutual_info_score(a, b), rel=1e-9)


def test_a_dimension_for_each_factor_has_the_full_gap() -> None:
    noise = mutual_information(np.digitize(perfect()[:, 3], np.histogram_bin_edges(perfect()[:, 3], 20)), FACTORS[:, 2])
    assert mig(perfect(), FACTORS) == pytest.approx(1.0, abs=noise)
    assert mig(FACTORS.astype(np.float32), FACTORS) == pytest.approx(1.0)


def test_a_rotation_has_little_gap_and_a_copy_or_a_constant_none() -> None:
    assert mig(rotated(), SQUARE) < 0.02
    assert mig(SQUARE.astype(np.float32), SQUARE) == pytest.approx(1.0)
    assert mig(duplicated(), FACTORS) == pytest.approx(0.0, abs=1e-12)
    assert mig(np.zeros((len(FACTORS), 4), np.float32), FACTORS) == 0.0


def test_the_gap_of_a_dimension_that_knows_half_is_what_entropies_say() -> None:
    """The dimension holds x // 2 of 8 levels (log 4 of log 8 nats), another one x itself: the gap is log 2 / log 8."""
    x = FACTORS[:, 2:]
    assert mig(np.column_stack([x // 2, x]).astype(np.float32), x) == pytest.approx(math.log(2) / math.log(8))


def test_a_factor_that_does_not_vary_is_left_out() -> None:
    constant = np.column_stack([FACTORS, np.zeros(len(FACTORS), np.int64)])
    assert mig(FACTORS.astype(np.float32), constant) == pytest.approx(1.0)
    assert mig(np.zeros((8, 2), np.float32), np.zeros((8, 1), np.int64)) == 0.0


def test_bins_are_those_of_the_reference_implementation() -> None:
    """Equal width between the extremes, the right end belongs to the last bin: `np.digitize` on the left edges, as its authors write."""
    latents = np.random.default_rng(3).normal(size=(1000, 2)).astype(np.float64)
    factors = (latents[:, :1] > 0).astype(np.int64)
    codes = [np.digitize(column, np.histogram(column, 20)[1][:-1]) for column in latents.T]
    both = sorted((mutual_information(code, factors[:, 0]) for code in codes), reverse=True)
    assert mig(latents, factors) == pytest.approx((both[0] - both[1]) / mutual_information(factors[:, 0], factors[:, 0]))


def test_boosted_trees_find_one_dimension_for_each_factor() -> None:
    pytest.importorskip("sklearn")
    scores = halves(perfect())
    assert scores.disentanglement > 0.99
    assert scores.completeness > 0.99
    assert scores.informativeness == 1.0


def test_boosted_trees_on_rotated_or_shared_or_constant_dimensions() -> None:
    pytest.importorskip("sklearn")
    turned = halves(rotated(), SQUARE)
    assert (turned.disentanglement, turned.completeness) == pytest.approx((0.0, 0.0), abs=0.05)
    assert turned.informativeness > 0.95
    constant = halves(np.zeros((len(FACTORS), 2), np.float32))
    assert (constant.disentanglement, constant.completeness) == (0.0, 0.0)
    assert constant.informativeness < 0.35  # the mean of 1/3, 1/4 and 1/8, as far as the draw is even


def test_one_dimension_that_holds_all_factors_is_complete_and_not_disentangled() -> None:
    pytest.importorskip("sklearn")
    code = (FACTORS[:, 0] * 32 + FACTORS[:, 1] * 8 + FACTORS[:, 2]).astype(np.float32)
    scores = halves(np.column_stack([code, np.zeros(len(code), np.float32)]))
    assert scores.completeness == pytest.approx(1.0, abs=1e-6)
    assert scores.disentanglement < 0.05
    assert scores.informativeness > 0.9


def test_dci_weighs_entropies_as_its_formula_does() -> None:
    """Against scipy's entropy on a matrix of importances, with the weights that the paper gives."""
    stats = pytest.importorskip("scipy.stats")
    from aecore.evaluate._disentanglement import _disentanglement

    matrix = np.random.default_rng(0).random((5, 3))
    per_code = 1 - stats.entropy(matrix.T + 1e-11, base=3)
    per_factor = 1 - stats.entropy(matrix + 1e-11, base=5)
    assert _disentanglement(matrix) == pytest.approx(float((per_code * matrix.sum(1)).sum() / matrix.sum()))
    assert _disentanglement(matrix.T) == pytest.approx(float((per_factor * matrix.sum(0)).sum() / matrix.sum()))


def test_the_factor_vae_score_of_pure_dimensions_is_one_and_of_a_constant_zero() -> None:
    assert factor_vae_score(perfect(), FACTORS) == 1.0
    assert factor_vae_score(duplicated(), FACTORS) == 1.0  # it asks only that a dimension tells the factor
    assert factor_vae_score(np.zeros((len(FACTORS), 4), np.float32), FACTORS) == 0.0


def test_the_factor_vae_score_of_noise_and_of_a_rotation_is_chance() -> None:
    noise = np.random.default_rng(5).normal(size=FACTORS.shape).astype(np.float32)
    assert factor_vae_score(noise, FACTORS) == pytest.approx(1 / 3, abs=0.06)
    assert factor_vae_score(rotated(), SQUARE) == pytest.approx(1 / 2, abs=0.06)


def test_a_dimension_that_hardly_varies_has_no_vote() -> None:
    """Without pruning the small dimension, whose variance relative to its own is no smaller than the others', would vote too."""
    small = np.column_stack([FACTORS, 0.04 * FACTORS[:, 0] / FACTORS[:, 0].std()]).astype(np.float32)
    assert factor_vae_score(small, FACTORS) == factor_vae_score(FACTORS.astype(np.float32), FACTORS)
    assert factor_vae_score(small[:, 3:], FACTORS) == 0.0


def test_scores_repeat_with_their_seed() -> None:
    assert factor_vae_score(rotated(), SQUARE, seed=1) == factor_vae_score(rotated(), SQUARE, seed=1)
    assert factor_vae_score(rotated(), SQUARE, seed=1) != factor_vae_score(rotated(), SQUARE, seed=2)


def test_trees_need_a_factor_that_varies() -> None:
    latents, factors = np.random.default_rng(0).random((50, 2)), np.zeros((50, 1), np.int64)
    with pytest.raises(DataError, match="one has a single value in 50 samples"):
        dci(latents, factors, latents, factors)


def test_dci_repeats_with_its_seed() -> None:
    pytest.importorskip("sklearn")
    assert halves(rotated(), SQUARE, seed=1) == halves(rotated(), SQUARE, seed=1)


def test_without_scikit_learn_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ConfigError, match=r"pip install 'aecore\[report\]'.*evaluate.dci=false"):
        require_scikit_learn()


def test_nothing_of_scikit_learn_is_imported_before_it_is_needed() -> None:
    code = "import sys, aecore.evaluate; print([n for n in ('sklearn', 'scipy', 'matplotlib') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
