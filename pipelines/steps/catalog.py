"""The output of `aepipe list`: registered parts and sections of a recipe with their knobs, shipped recipes."""

import dataclasses
import itertools
import re
import types
from typing import Any, Literal, Union, get_args, get_origin

from aecore.registry import BACKBONES, BOUNDS, MODELS, SOURCES, Registry, field_types
from pipelines.recipe.recipe import SECTIONS, section_type
from pipelines.recipe.yaml import Tree, shipped_recipes

_REGISTRIES = {"models": MODELS, "backbones": BACKBONES, "sources": SOURCES}


def parts(what: str) -> Tree:
    """Return name -> about (and knobs) of all models, backbones, sources, sections or recipes."""
    if what == "recipes":
        return {name: {"about": _header(text)} for name, text in sorted(shipped_recipes().items())}
    if what == "sections":
        return {name: _section(name) for name in SECTIONS}
    registry: Registry = _REGISTRIES[what]
    return {kind: _part(registry.spec_type(kind)) for kind in registry.kinds()}


def _section(name: str) -> Tree:
    """Return the purpose of a section, the verbs that read it, and its knobs; those of a model, backbone or source depend on its kind."""
    from pipelines.steps.steps import STEPS

    of_verbs = {"sample": ["sample"], "decode": ["decode"], "refresh": ["run"], "schedule": ["serve", "deploy"]}
    parts, readers = SECTIONS[name], {**of_verbs, "cluster": [*STEPS]}
    if isinstance(parts, Registry):
        section = {"about": f"kind and knobs of the {parts.noun}, see `aepipe list {name}s`", "knobs": {}}
    else:
        section = _part(section_type(name))
    return {**section, "steps": [*readers.get(name, ()), *(step for step, entry in STEPS.items() if name in entry.sections)]}


def _part(cls: type) -> Tree:
    hints = field_types(cls)
    fields = [field for field in dataclasses.fields(cls) if get_origin(hint := hints[field.name]) is not Literal or len(get_args(hint)) > 1]
    knobs = {field.name: _knob(field, hints[field.name]) for field in fields}
    return {"about": (cls.__doc__ or "").strip().splitlines()[0], "knobs": knobs}


def _knob(field: dataclasses.Field[Any], hint: Any) -> Tree:  # any: a type
    """Return default, meaning, type, choices and bounds of a knob."""
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    bounds = {name: field.metadata[name] for name in BOUNDS if field.metadata.get(name) is not None}
    choices = [choice for part in (hint, *get_args(hint)) if get_origin(part) is Literal for choice in get_args(part)]
    return {
        "default": list(default) if isinstance(default, tuple) else default,
        "help": field.metadata.get("help", ""),
        "type": _type_name(hint),
        **({"choices": choices} if choices else {}),
        **bounds,
    }


def _type_name(hint: Any) -> str:  # any: a type
    """Return a type in words: `int`, `str or null`, `gaussian or bernoulli`, `list of int`."""
    origin, parts = get_origin(hint), [part for part in get_args(hint) if part is not Ellipsis]
    if origin is Literal:
        return " or ".join(map(str, parts))
    if origin in (Union, types.UnionType):
        return " or ".join(map(_type_name, parts))
    if origin is tuple:
        return f"list of {_type_name(parts[0])}"
    if origin is dict:
        return f"map of {_type_name(parts[0])} to {_type_name(parts[1])}"
    return "null" if hint is type(None) else str(getattr(hint, "__name__", hint))


def _header(text: str) -> str:
    """Return the first sentence of the comment at the top of a recipe."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), text.lstrip().splitlines())
    comment = " ".join(line.removeprefix("#").strip() for line in lines)
    return re.split(r"(?<=\.)(?<!\bal\.)\s", comment, maxsplit=1)[0]
