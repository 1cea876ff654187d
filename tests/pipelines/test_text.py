"""Summaries as text: what people read."""

from pipelines.cli import text

EVALUATED = {"step": "evaluate", "split": "test", "dataset": "/x", "num_samples": 3, "elbo": -2.0, "seconds": 1.25}


def test_the_seconds_stand_before_the_warnings() -> None:
    assert text.of_step(EVALUATED | {"warnings": ["odd"]}) == "test of /x: num_samples 3, elbo -2 (1.2 s)\nwarning: odd"
    assert text.of_step(EVALUATED) == "test of /x: num_samples 3, elbo -2 (1.2 s)"


def test_trees_in_lists_are_indented_too() -> None:
    assert text.of_tree({"a": [{"b": 1}]}) == "a:\n  b: 1"
    assert text.of_tree({"a": [{"b": 1}, {"b": 2}]}) == "a:\n  1:\n    b: 1\n  2:\n    b: 2"
    assert text.of_tree({"a": []}) == "a: []"
