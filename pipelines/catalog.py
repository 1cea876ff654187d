"""What there is to choose from: registered parts with their knobs, shipped recipes."""

import dataclasses
import itertools
import re
from typing import Any

from aecore.registry import BACKBONES, MODELS, SOURCES, Registry
from pipelines.tree import Tree, shipped_recipes

_REGISTRIES = {"models": MODELS, "backbones": BACKBONES, "sources": SOURCES}


def parts(what: str) -> Tree:
    """Return name -> about (and knobs) of all models, backbones, sources or recipes."""
    if what == "recipes":
        return {name: {"about": _header(text)} for name, text in sorted(shipped_recipes().items())}
    registry: Registry = _REGISTRIES[what]
    return {kind: _part(registry.spec_type(kind)) for kind in registry.kinds()}


def _part(cls: type) -> Tree:
    about = (cls.__doc__ or "").strip().splitlines()[0]
    knobs = {field.name: _knob(field) for field in dataclasses.fields(cls) if field.name != "kind"}
    return {"about": about, "knobs": knobs}


def _knob(field: dataclasses.Field[Any]) -> Tree:
    default = field.default if field.default is not dataclasses.MISSING else None
    return {"default": list(default) if isinstance(default, tuple) else default, "help": field.metadata.get("help", "")}


def _header(text: str) -> str:
    """Return the first sentence of the comment that a recipe begins with."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), text.lstrip().splitlines())
    said = " ".join(line.removeprefix("#").strip() for line in lines)
    return re.split(r"(?<=\.)(?<!\bal\.)\s", said, maxsplit=1)[0]
