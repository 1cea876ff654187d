"""Trees of settings side by side: the fields in which they differ."""

from collections.abc import Iterator, Mapping
from typing import Any


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return `dotted.field -> [value of a, value of b]` of every field that differs; None where one has no such field."""
    left, right = dict(_flat(a)), dict(_flat(b))
    names = [*left, *(name for name in right if name not in left)]
    return {name: [left.get(name), right.get(name)] for name in names if left.get(name) != right.get(name)}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value
