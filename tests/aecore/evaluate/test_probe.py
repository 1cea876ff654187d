"""Linear probe and nearest neighbours: against scikit-learn and by hand."""

import numpy as np
import pytest

from aecore.evaluate._probe import linear_probe, nearest_neighbours


def blobs(seed: int, n: int = 300, spread: float = 1.6) -> tuple[np.ndarray, np.ndarray]:
    """Four overlapping classes in three dimensions of very different scale; class numbers with gaps."""
    generator = np.random.default_rng(seed)
    kind = generator.integers(0, 4, n)
    centres = np.array([[0, 0, 0], [2, 0, 1], [0, 2, -1], [2, 2, 3]], float)
    return ((centres[kind] + generator.normal(0, spread, (n, 3))) * [1, 100, 0.01]).astype(np.float32), kind * 3 + 1


def test_separable_classes_are_read_without_an_error_and_noise_by_chance() -> None:
    train, test = blobs(0, spread=0.1), blobs(1, spread=0.1)
    assert linear_probe(*train, *test) == 1.0
    assert nearest_neighbours(train[0] / [1, 100, 0.01], train[1], test[0] / [1, 100, 0.01], test[1]) == 1.0
    noise = np.random.default_rng(2).normal(size=(300, 3)).astype(np.float32)
    assert 0.1 < linear_probe(noise, train[1], noise[::-1].copy(), test[1]) < 0.42


def test_the_probe_is_the_logistic_regression_of_scikit_learn() -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    (train, labels), (test, truth) = blobs(0), blobs(1, n=2000)
    scaler = preprocessing.StandardScaler().fit(train)
    reference = linear.LogisticRegression(C=1.0, tol=1e-9, max_iter=10_000).fit(scaler.transform(train), labels)
    assert linear_probe(train, labels, test, truth) == pytest.approx(reference.score(scaler.transform(test), truth), abs=5e-4)


@pytest.mark.parametrize("k", [1, 5, 8])
def test_neighbours_vote_as_those_of_scikit_learn(k: int) -> None:
    neighbors = pytest.importorskip("sklearn.neighbors")
    (train, labels), (test, truth) = blobs(0), blobs(1, n=1100)  # more than are looked at at once
    reference = neighbors.KNeighborsClassifier(k, algorithm="brute").fit(train, labels)
    assert nearest_neighbours(train, labels, test, truth, k) == pytest.approx(reference.score(test, truth), abs=1e-9)


def test_the_majority_decides_and_equal_votes_go_to_the_smallest_label() -> None:
    train = np.array([[0.0], [1.0], [2.0], [9.0]], np.float32)
    labels, test = np.array([7, 3, 3, 9]), np.array([[0.1]], np.float32)
    assert nearest_neighbours(train, labels, test, np.array([7]), 1) == 1.0
    assert nearest_neighbours(train, labels, test, np.array([3]), 3) == 1.0
    assert nearest_neighbours(train, labels, test, np.array([3]), 2) == 1.0  # one vote each
    assert nearest_neighbours(train, labels, test, np.array([3]), 50) == 1.0  # all there are


def test_scale_does_not_matter_to_the_probe_and_a_constant_dimension_does_no_harm() -> None:
    (train, labels), (test, truth) = blobs(0), blobs(1)
    scaled = linear_probe(1000 * train - 5, labels, 1000 * test - 5, truth)
    constant = [np.column_stack([part, np.full(len(part), 3.0)]).astype(np.float32) for part in (train, test)]
    assert linear_probe(train, labels, test, truth) == pytest.approx(scaled, abs=0.004)
    assert linear_probe(constant[0], labels, constant[1], truth) == linear_probe(train, labels, test, truth)


def test_a_class_that_was_not_fitted_counts_as_an_error() -> None:
    (train, labels), (test, truth) = blobs(0, spread=0.1), blobs(1, spread=0.1)
    known = labels != 1
    expected = float((truth != 1).mean())
    assert linear_probe(train[known], labels[known], test, truth) == pytest.approx(expected)


def test_the_same_arrays_give_the_same_number_and_gradients_may_be_off() -> None:
    import torch

    (train, labels), (test, truth) = blobs(0), blobs(1)
    first = linear_probe(train, labels, test, truth)
    with torch.inference_mode():
        assert linear_probe(train, labels, test, truth) == first
