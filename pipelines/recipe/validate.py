"""Turns plain JSON into a frozen spec, with errors that name the dotted path of every wrong value. The only module with pydantic.

pydantic checks the types, strictly (the string "8" is not a number), and refuses unknown keys; bounds are checked by the spec itself.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from types import UnionType
from typing import (
    Any,
    NotRequired,  # pydantic refuses those of `typing` before Python 3.12
    Union,
    get_args,
    get_origin,
)

import pydantic
from typing_extensions import TypedDict

from aecore.errors import ConfigError, did_you_mean
from aecore.registry import field_types

EXAMPLES = {"source.url": "/data/images"}


class MissingKey(ConfigError):
    """A key without a default is not set."""


def build_spec(section: str, cls: type, values: Mapping[str, Any], others: Callable[[], Mapping[str, str]] = dict) -> Any:
    """Return the spec `cls` of a section; MissingKey if the only problem is missing keys, ConfigError for any other.

    `others` returns which keys belong to other kinds of the section, and to which, for the error.
    """
    try:
        return cls(**_types(cls).validate_json(json.dumps(values), strict=True))
    except pydantic.ValidationError as error:
        problems = error.errors(include_url=False)
        kind_of_error = MissingKey if all(problem["type"] == "missing" for problem in problems) else ConfigError
        raise kind_of_error("\n".join(_message(section, cls, problem, others) for problem in _joined(cls, problems))) from None
    except ConfigError as error:
        raise ConfigError(str(error).replace(f"{cls.__name__}.", f"{section}.")) from None


@functools.cache
def _types(cls: type) -> pydantic.TypeAdapter[Any]:
    """Return the validator of the types; bounds are checked by the spec itself, since pydantic would apply `ge` to whole tuples."""
    hints = field_types(cls)
    required = {field.name for field in dataclasses.fields(cls) if field.default is field.default_factory is dataclasses.MISSING}
    fields = {name: hint if name in required else NotRequired[hint] for name, hint in hints.items()}
    make: Any = TypedDict  # any: a type checker wants the fields written out
    shape = make(cls.__name__, fields)
    shape.__pydantic_config__ = pydantic.ConfigDict(extra="forbid")
    return pydantic.TypeAdapter(shape)


def _joined(cls: type, problems: Sequence[Any]) -> list[Any]:
    """Return the problems, with those of one union field (`int | Literal["random"]`) merged: pydantic reports one per type."""
    joined: dict[tuple[Any, ...], Any] = {}
    for problem in problems:
        hint = field_types(cls).get(problem["loc"][0]) if problem["loc"] else None
        several = get_origin(hint) in (Union, UnionType) and len([kind for kind in get_args(hint) if kind is not type(None)]) > 1
        loc = problem["loc"][:1] if several else problem["loc"]
        before = f"{joined[loc]['msg']} or " if loc in joined else ""
        joined[loc] = {**problem, "loc": loc, "msg": before + problem["msg"].removeprefix("Input should be ")}
    return list(joined.values())


def _message(section: str, cls: type, problem: Any, others: Callable[[], Mapping[str, str]]) -> str:
    path = ".".join([section, *map(str, problem["loc"])])
    fields = {field.name: field for field in dataclasses.fields(cls)}
    key = str(problem["loc"][0]) if problem["loc"] else ""
    if problem["type"] == "extra_forbidden" and (kinds := others().get(key)):
        here = f"{section}.kind={fields['kind'].default}"
        return f"unknown key {path!r} of {here}: it belongs to {kinds}; leave it out, or set that kind"
    if problem["type"] == "extra_forbidden":
        return f"unknown key {path!r}{did_you_mean(path.removeprefix(f'{section}.'), fields, prefix=f'{section}.')}"
    if problem["type"] == "missing":
        return f"{path} is missing: add {path}={EXAMPLES.get(path, '...')} ({fields[key].metadata.get('help', '')})"
    value, expected = problem["input"], problem["msg"].removeprefix("Input should be ")
    quotes = "; in a recipe, text that begins with # needs quotes" if value is None and problem["type"] == "string_type" else ""
    return f"{path} is {value!r} ({type(value).__name__}), expected {expected} ({fields[key].metadata.get('help', '')}){quotes}"
