"""The fields in which two trees of settings differ."""

from collections.abc import Mapping
from typing import Any

from aecore.registry import flatten


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return `dotted.field -> [value of a, value of b]` of every field that differs; None where the field is missing."""
    left, right = dict(flatten(a)), dict(flatten(b))
    names = [*left, *(name for name in right if name not in left)]
    return {name: [left.get(name), right.get(name)] for name in names if left.get(name) != right.get(name)}
