"""Separates the overrides `key.path=value` from the other arguments, and refuses those that would have no effect.

An override that a verb would not read, or that contradicts an argument, is an error before the run starts.
`recipe/yaml.py` applies overrides to a recipe.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from aecore.errors import ConfigError
from aecore.registry import flatten

OF_A_RUN = ("model", "backbone", "transform")  # sections that a checkpoint holds
OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.\w+)*=")


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the arguments and the overrides, which may be mixed in any order."""
    return [word for word in words if not OVERRIDE.match(word)], [word for word in words if OVERRIDE.match(word)]


def refuse(verb: str, overrides: Sequence[str], why: str) -> None:
    """ConfigError if there are overrides, which the verb would not read; `why` is the reason."""
    if overrides:
        raise ConfigError(
            f"`aepipe {verb}` {why}, so {' '.join(map(repr, overrides))} would change nothing: leave it out "
            f"(options: aepipe {verb} --help; a path with '=' in it is written with ./ in front)"
        )


def require_not_of_run(verb: str, overrides: Sequence[str]) -> None:
    """ConfigError for overrides of what a trained run fixes: a verb that uses the run would not read them."""
    fixed = [text for text in overrides if re.split("[.=]", text)[0] in OF_A_RUN]
    if fixed:
        raise ConfigError(
            f"`aepipe {verb}` takes {', '.join(OF_A_RUN[:-1])} and {OF_A_RUN[-1]} of the run as it was trained, so "
            f"{' '.join(map(repr, fixed))} would change nothing: leave it out, or train another run with it"
        )


def require_no_conflict(base: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """ConfigError if an override contradicts an argument; `base` maps the keys that arguments set to their values."""
    from aecore.store import absolute_url
    from pipelines.recipe.yaml import apply_overrides, value_at

    tree = apply_overrides(base, overrides)
    for key, given in flatten(base):
        value = value_at(tree, key)
        is_address = isinstance(given, str) and not key.endswith(".kind")
        same = value == given or (is_address and bool(value) and absolute_url(str(value)) == absolute_url(given))
        if not same:
            raise ConfigError(
                f"{key} is given twice: {given!r} as an argument and {value!r} as an override ({key}=...): leave out one of them"
            )
