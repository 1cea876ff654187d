"""Another valid value for any knob of a spec, found from its type, bounds and help: a law over all knobs covers a new one with its file."""

import dataclasses
import re
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from aecore.errors import ConfigError
from aecore.registry import field_types

Values = dict[str, Any]


def changes(cls: type) -> Iterator[tuple[dataclasses.Field[Any], Values, Values]]:
    """Yield for every knob of a spec class the knob and two sets of values, both valid, that differ in this knob alone.

    The first set is empty (the defaults) unless the knob only has another value where another knob has; `kind` is left out.
    """
    for field in dataclasses.fields(cls):
        if field.name != "kind":
            yield field, *_pair(cls, field)


def _pair(cls: type, field: dataclasses.Field[Any]) -> tuple[Values, Values]:
    others = [other for other in dataclasses.fields(cls) if other.name not in ("kind", field.name)]
    for context in ({}, *({other.name: value} for other in others for value in _candidates(cls, other))):
        sets = [context, *(context | {field.name: value} for value in _candidates(cls, field))]
        valid = [(values, getattr(built, field.name)) for values in sets if (built := _built(cls, values)) is not None]
        for values, value in valid[1:]:
            if value != valid[0][1]:
                return valid[0][0], values
    raise AssertionError(f"no other valid value found for {cls.__name__}.{field.name}: add a candidate to tests/knobs.py")


def _built(cls: type, values: Values) -> Any:
    try:
        return cls(**values)
    except ConfigError:
        return None


def _candidates(cls: type, field: dataclasses.Field[Any]) -> list[Any]:
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    bounds = [field.metadata[name] for name in ("ge", "gt", "le") if field.metadata.get(name) is not None]
    words = re.findall(r"\w[\w/]*", str(field.metadata.get("help", "")))  # a text that takes a few words only says them in its help
    return list(_of_type(field_types(cls)[field.name], default, bounds, words))


def _of_type(hint: Any, default: Any, bounds: list[float], words: list[str]) -> Iterator[Any]:
    origin, parts = get_origin(hint), [part for part in get_args(hint) if part is not Ellipsis]
    if origin in (Union, UnionType):
        for part in parts:
            yield from _of_type(part, default, bounds, words)
    elif origin is Literal:
        yield from parts
    elif origin is tuple:
        if Ellipsis not in get_args(hint):  # of one length
            yield from (tuple(range(first, first + len(parts))) for first in range(2))
            return
        known = default if isinstance(default, tuple) else ()
        for value in _of_type(parts[0], known[0] if known else None, bounds, words):
            yield from ((value,), (*known, value), (value,) * 2)
    elif origin is dict:
        yield from ({"x": value} for value in _of_type(parts[1], None, bounds, words))
    elif hint is bool:
        yield from (True, False)
    elif hint in (int, float):
        yield from _numbers(hint, [number for number in (default, *bounds) if isinstance(number, int | float)])
    elif hint is str:
        yield from ("x", "png", "black", *words, "regex:x")
    else:
        assert hint is NoneType, f"no values known for the type {hint}: add them to tests/knobs.py"
        yield None


def _numbers(kind: type, near: list[float]) -> Iterator[Any]:
    for number in (*near, 0, 1, 10):
        for value in (number * 2, number + 1, number - 1, number / 2, number + 0.25, number - 0.25):
            if kind is float or value == int(value):
                yield kind(value)
