"""Turns a YAML file and dotted overrides into one plain tree (dicts, lists, scalars). It validates nothing and imports no part.

It reads with a `yaml.SafeLoader`, so a file can hold data only. Two traps of YAML 1.1 are avoided: `1e-3` is a number, and a
duplicate key in a section is refused instead of the last one winning silently.
"""

import copy
import importlib.resources
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from aecore.errors import ConfigError, did_you_mean

Tree = dict[str, Any]


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `1e-3` as a float and refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} occurs twice in one section", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = copy.deepcopy(yaml.SafeLoader.yaml_implicit_resolvers)
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))


def parse_yaml(text: str, where: str) -> Any:
    """Return the data of a YAML text as plain JSON types; ConfigError with line and column if it is not YAML."""
    try:
        return json.loads(json.dumps(yaml.load(text, _Loader), default=str))  # noqa: S506  a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {error}") from None
    except (ValueError, TypeError, RecursionError) as error:  # an alias inside its own anchor, a date as a key, an impossible date
        raise ConfigError(f"{where} is YAML, but not plain data (keys of text, no alias inside its own anchor): {error}") from None


def shipped_recipes() -> dict[str, str]:
    """Return name -> text of the recipes that come with the package."""
    folder = importlib.resources.files("pipelines") / "recipes"
    return {entry.name.removesuffix(".yaml"): entry.read_text() for entry in folder.iterdir() if entry.name.endswith(".yaml")}


def read_recipe(name: str) -> Tree:
    """Return the tree of a recipe file, or of a shipped recipe by its name; ConfigError that names the most similar ones."""
    path = Path(name).expanduser()
    if path.is_file():
        try:
            text, where = path.read_text(), str(path)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the recipe {name}: {error}") from None
    else:
        shipped = shipped_recipes()
        if name not in shipped:
            raise ConfigError(f"no recipe {name!r}: neither a file nor a shipped recipe{did_you_mean(name, shipped)}")
        text, where = shipped[name], f"recipe {name}"
    data = parse_yaml(text, where)
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{where} holds {type(data).__name__}, expected sections like `train:` (a YAML mapping)")
    return data


def parse_override(text: str) -> tuple[tuple[str, ...], Any]:
    """Return path and value of `key.path=value`; the value is read as YAML (`1e-3`, `true`, `[1, 2]`, `null`, text)."""
    key, equals, value = text.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path):
        raise ConfigError(f"{text!r} is not an override: write key.path=value, for example train.epochs=3")
    if path in (("data",), ("run",), ("out",), ("name",)):
        return path, value
    try:
        return path, parse_yaml(value, key)
    except ConfigError:
        return path, value  # a path or URL with special characters of YAML


def require_no_broken_yaml(key: str, value: Any) -> None:
    """ConfigError with the message of YAML if a value looks like `{...}` or `[...]` but is not valid YAML."""
    if isinstance(value, str) and value.startswith(("{", "[")):
        parse_yaml(value, f"the value of {key}")


def apply_overrides(tree: Mapping[str, Any], overrides: Iterable[str]) -> Tree:
    """Return a copy of `tree` with `key.path=value` applied in order; ConfigError if a path leads through a plain value."""
    out: Tree = copy.deepcopy(dict(tree))
    for text in overrides:
        path, value = parse_override(text)
        node = out
        for depth, part in enumerate(path[:-1]):
            child = node.get(part)
            if child is None:
                child = node[part] = {}
            if not isinstance(child, dict):
                above = ".".join(path[: depth + 1])
                raise ConfigError(f"{text!r} sets a key below {above}, but {above} is {child!r}, not a section")
            node = child
        node[path[-1]] = value
    return out


def value_at(tree: Mapping[str, Any], key: str) -> Any:
    """Return the value of a dotted key, None where the tree does not have it."""
    value: Any = tree
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
