"""The words `key.path=value` of a command line: told apart from the others, and refused where they would be lost.

An override that a verb would not read, or that contradicts an argument, is an error: nobody wants to find out after the run.
What an override does to a recipe is told in `tree.py`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from aecore.errors import ConfigError
from aecore.registry import flatten

OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.\w+)*=")


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the arguments and the overrides, which may stand anywhere between them."""
    return [word for word in words if not OVERRIDE.match(word)], [word for word in words if OVERRIDE.match(word)]


def refuse(verb: str, overrides: Sequence[str], why: str) -> None:
    """ConfigError if there are overrides: the verb would not read them, `why` says so."""
    if overrides:
        raise ConfigError(
            f"`aepipe {verb}` {why}, so {' '.join(map(repr, overrides))} would change nothing: leave it out "
            f"(options: aepipe {verb} --help; a path with '=' in it is written with ./ in front)"
        )


def require_no_conflict(base: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """ConfigError if an override gives another value than the argument that stands for the same key (`base`: the arguments)."""
    from aecore.store import absolute_url
    from pipelines.recipe.yaml import apply_overrides, value_at

    tree = apply_overrides(base, overrides)
    for key, given in flatten(base):
        value = value_at(tree, key)
        same = value == given or (not key.endswith(".kind") and bool(value) and absolute_url(str(value)) == absolute_url(given))
        if not same:
            raise ConfigError(
                f"{key} is given twice: {given!r} as an argument and {value!r} as an override ({key}=...): leave out one of them"
            )
