"""Predicates over index columns: what they choose, what is refused, and that nothing is executed."""

import itertools
from typing import Any

import pyarrow as pa
import pytest

from aecore.data.read.where import parse_where
from aecore.errors import ConfigError

INDEX = pa.table(
    {
        "label_name": pa.array(["cat", "dog", None, "it's"]).dictionary_encode(),
        "width": pa.array([64, None, 10, 70], pa.int32()),
        "score": pa.array([1.5, float("nan"), None, 3.0]),
        "good": pa.array([True, False, None, True]),
        "sha256": pa.array(["a", "b", "c", "d"]),
        "my column": pa.array([1, 2, 3, 4]),
    }
)


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ('label_name in ("cat", "dog") and width >= 64', [0]),
        ("label_name IN ('cat','dog') AND width>=64", [0]),
        ("not width >= 64", [2]),
        ("width < 64", [2]),
        ("not (width = 3 or label_name = 'cat')", [3]),
        ("width is null", [1]),
        ("score IS NOT NULL", [0, 3]),
        ("not score is null", [0, 3]),
        ("label_name = 'it''s'", [3]),
        ('label_name == "it\'s"', [3]),
        ("label_name not in ['cat',]", [1, 3]),
        ("not label_name in ('cat')", [1, 3]),
        ("score > 1", [0, 3]),
        ("not score > 2", [0]),
        ("score != 1.5", [3]),
        ("64 <= width", [0, 3]),
        ("width <> score", [0, 3]),
        ("good = true", [0, 3]),
        ("good != TRUE or width = 10", [1, 2]),
        ("sample_sha256 in ('b', 'd')", [1, 3]),
        ("`my column` >= 3", [2, 3]),
        ("width > -1e2 and width < 1.0E2 and not not width != 64", [2, 3]),
        ("unknown is null and width = 10", [2]),
        ("unknown = 3 or not unknown = 3 or width = 10", [2]),
        (" or ".join(f"width = {number}" for number in range(3000)), [0, 2, 3]),
    ],
)
def test_rows_that_are_chosen(text: str, rows: list[int]) -> None:
    assert parse_where(text).mask(INDEX).nonzero()[0].tolist() == rows


def test_and_or_not_with_missing_values_are_those_of_three_valued_logic() -> None:
    values = (True, False, None)
    cases = list(itertools.product(values, values))
    index = pa.table({"a": pa.array([a for a, _ in cases]), "b": pa.array([b for _, b in cases])})
    is_a, is_b = "a = true", "b = true"

    def known(value: Any) -> bool:
        return value is True

    def both(a: Any, b: Any) -> Any:
        return False if a is False or b is False else None if a is None or b is None else True

    def either(a: Any, b: Any) -> Any:
        return True if a is True or b is True else None if a is None or b is None else False

    for text, right in (
        (f"{is_a} and {is_b}", lambda a, b: known(both(a, b))),
        (f"{is_a} or {is_b}", lambda a, b: known(either(a, b))),
        (f"not ({is_a} and {is_b})", lambda a, b: both(a, b) is False),
        (f"not ({is_a} or {is_b})", lambda a, b: either(a, b) is False),
        ("a = b", lambda a, b: a is not None and a is b),
        ("not a = b", lambda a, b: None not in (a, b) and a is not b),
    ):
        assert parse_where(text).mask(index).tolist() == [right(a, b) for a, b in cases], text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "cannot be read at its end: expected the name of a column"),
        ("width", "expected a comparison"),
        ("width >", "expected the name of a column or a literal"),
        ("width = 3 extra", "cannot be read at 'extra'"),
        ("__import__('os').system('true') = 0", "cannot be read at"),
        ("width.real = 3", "cannot be read at '.real = 3'"),
        ("width + 1 = 3", r"cannot be read at '\+ 1 = 3'"),
        ("width = null", "cannot be read at 'null'"),
        ("1 = 1", "compares two literals"),
        ("3 in (3)", "expected the name of a column before"),
        ("width in ()", "expected the name of a column or a literal"),
        ("width in (score)", "expected a number, a quoted text"),
        ("width in 3", "expected a list in parentheses"),
        ("width not 3", "expected `in`"),
        ("width is 3", "expected `null`"),
        ("((width = 1)", r"expected `\)`"),
        ("0 < width < 10", "cannot be read at '< 10'"),
        ("width = 99999999999999999999", "expected one of 64 bits"),
        ("width in (1, 'a')", "literals of several types"),
        ("width = 'wide'", "does not fit the types of the columns .*width: int32"),
        ("label_name > 3", "does not fit the types of the columns .*label_name: string"),
        ("(" * 100 + "width = 1" + ")" * 100, "more than 64 levels"),
        ("not " * 100 + "width = 1", "more than 64 levels"),
        (" or ".join(["width = 1"] * 5000), "more than 4,096 comparisons"),
        ("width = 1" + " " * 70000, "has 70,009 characters"),
    ],
)
def test_what_is_no_predicate_is_refused_and_the_place_is_shown(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_where(text).mask(INDEX)
