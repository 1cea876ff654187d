"""Turns a YAML file and dotted overrides into one plain tree (dicts, lists, scalars). It validates nothing and imports no part.

It reads with a `yaml.SafeLoader`, so a file can hold data only, and that in bounds: its size, nodes and depth are limited, and anchors and
aliases, with which a hundred bytes become a billion nodes, are refused. So is what YAML 1.1 reads as something else than it looks like:
`1:30` (90), `010` (8), `yes` and `no` (booleans), keys that are no text, a key twice in a section. `1e-3` is a number, a date is text.
"""

import copy
import importlib.resources
import json
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from aecore.errors import ConfigError, did_you_mean

Tree = dict[str, Any]
MAX_BYTES, MAX_NODES, MAX_DEPTH = 1 << 18, 10_000, 32  # the longest shipped recipe has 3 kB and 100 nodes
_TAG = "tag:yaml.org,2002:"
_COMMENT = re.compile(r"(?:^|\s)#")
_SHOWN = 200  # characters of an override that an error shows in quotes
_PLAIN_ITEM = re.compile(r"[\w./+-][\w./ +-]*")
_ENDS = (yaml.StreamEndToken, yaml.BlockEndToken, yaml.DocumentEndToken)  # that have no text, or none of a value
_PLAIN = ("null", "bool", "int", "float", "str", "seq", "map")


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `1e-3` as a float and a date as text, and ends at an anchor, an alias, too many nodes or too deep ones."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._nodes = self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:  # any: a number or a node
        event: Any = self.peek_event()  # any: the stubs do not know which events begin a node
        self._nodes, self._depth = self._nodes + 1, self._depth + 1
        why = ""
        if event.anchor is not None:
            why = f"the anchor or alias {event.anchor!r} is not read: write the value out where it is used"
        elif self._nodes > MAX_NODES:
            why = f"it has more than {MAX_NODES} values: leave out what is no recipe"
        elif self._depth > MAX_DEPTH:
            why = f"it is nested more than {MAX_DEPTH} levels deep: leave out what is no recipe"
        if why:
            raise yaml.composer.ComposerError(None, None, why, event.start_mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag != f"{_TAG}timestamp"]
    for first, found in copy.deepcopy(yaml.SafeLoader.yaml_implicit_resolvers).items()
}
_Loader.add_implicit_resolver(f"{_TAG}float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))


def parse_yaml(text: str, where: str) -> Any:
    """Return the data of a YAML text as plain JSON types; ConfigError with the line if it is not YAML, or not what it looks like."""
    try:
        return _data(text, where)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {error}") from None


def _data(text: str, where: str) -> Any:
    """Return the data of a YAML text; YAMLError if it is not YAML, ConfigError if it is too long, or not what it looks like."""
    _require_short(len(text), where)
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        _require_plain(loader, root, lambda node: f"{where}, line {node.start_mark.line + 1}" if "\n" in text.strip() else where)
        return json.loads(json.dumps(loader.construct_document(root)))
    except (ValueError, TypeError, LookupError) as error:  # `!!int x`, a number of 5,000 digits
        raise ConfigError(f"{where} is YAML, but not plain data: {error}") from None
    finally:
        loader.dispose()


def _require_short(size: int, where: str) -> None:
    if size > MAX_BYTES:
        raise ConfigError(f"{where} has more than {MAX_BYTES} bytes, which no recipe has: check the address")


def _require_plain(loader: _Loader, root: yaml.Node, at: Callable[[yaml.Node], str]) -> None:
    """Raise ConfigError, which names the place of a node by `at`, unless all keys are text and all values are what they look like."""
    left = [root]
    while left:
        node = left.pop()
        kind = node.tag.removeprefix(_TAG)
        if kind not in _PLAIN:
            raise yaml.constructor.ConstructorError(None, None, f"a value of the tag {node.tag!r} is not read", node.start_mark)
        if isinstance(node, yaml.MappingNode):
            _require_keys(node, at)
            left += [value for _, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            left += node.value
        elif isinstance(node, yaml.ScalarNode) and node.style is None and (why := _surprise(kind, node.value)):
            value = json.dumps(loader.construct_object(node))
            raise ConfigError(f"{at(node)}: {node.value} is {value} in YAML 1.1 ({why}): write {value}, or put it in quotes if it is text")


def _require_keys(section: yaml.MappingNode, at: Callable[[yaml.Node], str]) -> None:
    seen: set[str] = set()
    for node, _ in section.value:
        if node.tag != f"{_TAG}str":
            shown, kind = str(node.value)[:80], node.tag.removeprefix(_TAG)
            raise ConfigError(f"{at(node)}: the key {shown} is not text but of type {kind} in YAML 1.1: write a name, or put it in quotes")
        if node.value in seen:
            raise ConfigError(f"{at(node)}: the key {node.value!r} occurs twice in one section: leave out one of them")
        seen.add(node.value)


def _surprise(kind: str, text: str) -> str:
    """Return why a plain scalar is not what it looks like; "" if it is."""
    if kind in ("int", "float") and ":" in text:
        return "digits to base 60"
    if kind == "int" and re.fullmatch(r"[-+]?0[0-7_]+", text):
        return "octal digits"
    return "a boolean" if kind == "bool" and text.lower() not in ("true", "false") else ""


def shipped_recipes() -> dict[str, str]:
    """Return name -> text of the recipes that come with the package."""
    folder = importlib.resources.files("pipelines") / "recipes"
    return {entry.name.removesuffix(".yaml"): entry.read_text() for entry in folder.iterdir() if entry.name.endswith(".yaml")}


def read_recipe(name: str) -> Tree:
    """Return the tree of a recipe file, or of a shipped recipe by its name; ConfigError that names the most similar ones."""
    path = Path(name).expanduser()
    if path.is_file():
        try:
            with path.open("rb") as file:
                content, where = file.read(MAX_BYTES + 1), str(path)
            _require_short(len(content), where)
            text = content.decode()
        except UnicodeDecodeError as error:
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
    """Return path and value of `key.path=value`; the value is read as YAML (`1e-3`, `true`, `[1, 2]`, `null`, text).

    It is one value, without comments: `#204080` and `photos #3` are text, and a comment after a value in quotes or brackets is an error.
    What begins like a list or section has to be one. A text of several lines is a piece of a YAML file, comments included.
    """
    key, equals, value = text.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path):
        raise ConfigError(f"{text!r} is not an override: write key.path=value, for example train.epochs=3")
    if len(path) > MAX_DEPTH:
        raise ConfigError(f"the key {key[:80]}... has {len(path)} parts, expected at most {MAX_DEPTH}: check the override")
    if path in (("data",), ("run",), ("out",), ("name",)):
        return path, value
    plain = value.strip()
    if _COMMENT.search(plain) and "\n" not in plain and not plain.startswith(("'", '"', "[", "{")):
        return path, plain  # YAML would read the rest of it as a comment
    try:
        found = _data(value, key)
    except ConfigError as error:
        if "in quotes" not in str(error):
            raise
        raise ConfigError(f"{error}; quotes of a value need quotes of the shell around them: '{key}=\"{value}\"'") from None
    except yaml.YAMLError as error:
        if not plain.startswith(("[", "{")):
            return path, value  # a path or URL with special characters of YAML
        example = f", for example {_quoted(key, plain)}" if len(plain) <= _SHOWN else ""
        raise ConfigError(f"the value of {key} is not valid YAML: {error}; put text with special characters in quotes{example}") from None
    if "\n" not in plain and (comment := _comment(plain)):
        raise ConfigError(f"the value of {key} has a comment ({comment[:_SHOWN]!r}): leave it out, or put all of the value in quotes")
    return path, found


def _comment(text: str) -> str:
    """Return what YAML leaves out at the end of a text as a comment, "" if it reads all of it."""
    read = max((token.end_mark.index for token in yaml.scan(text, yaml.SafeLoader) if not isinstance(token, _ENDS)), default=0)
    return text[read:].strip()


def _quoted(key: str, value: str) -> str:
    """Return an override with text, or the texts of a list, in quotes, as a shell takes it."""
    items = [item.strip() for item in value[1:-1].split(",")]
    is_list = value[0] == "[" and value[-1] == "]" and not set(value[1:-1]) & set("[]{}\"'")
    shown = [item if _PLAIN_ITEM.fullmatch(item) else json.dumps(item, ensure_ascii=False) for item in items]
    text = f"[{', '.join(shown)}]" if is_list else json.dumps(value, ensure_ascii=False)
    return shlex.quote(f"{key}={text}")


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
