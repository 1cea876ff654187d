"""Trees of settings side by side: the fields in which they differ."""

from collections.abc import Mapping
from typing import Any

from aecore.registry import flatten


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return `dotted.field -> [value of a, value of b]` of every field that differs; None where one has no such field."""
    left, right = dict(flatten(a)), dict(flatten(b))
    names = [*left, *(name for name in right if name not in left)]
    return {name: [left.get(name), right.get(name)] for name in names if left.get(name) != right.get(name)}
