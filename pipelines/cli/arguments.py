"""The definition of a verb: its name, its arguments, and the function that runs it.

A verb is registered in `verbs.py` and gets its help, `--json`, `--debug` and, if it writes, `--dry-run` from here.
Nothing heavy is imported: every `aepipe --help` passes through this module.
"""

import argparse
import contextlib
import importlib.metadata
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

from aecore.errors import ConfigError, similar

Args = argparse.Namespace
RECIPE_NOTE = "key.path=value sets any key of the recipe; `aepipe list sections` shows them all"
_KEY = re.compile(r"[A-Za-z_]\w*(\.\w+)+")


class Result(NamedTuple):
    """The result of a verb: plain JSON data, the function that formats it as text, and the exit code."""

    data: Any
    as_text: Callable[[Any], str]
    exit_code: int = 0


class Argument(NamedTuple):
    """One argument of a verb: its name and the keyword arguments of `add_argument`."""

    name: str
    settings: dict[str, Any]


Run = Callable[[Args], Result | None]


@dataclass(frozen=True)
class Verb:
    """A verb; `reads_recipe` is whether it accepts overrides `key.path=value`."""

    name: str
    about: str
    arguments: tuple[Argument, ...]
    run: Run
    writes: bool
    reads_recipe: bool


def argument(name: str, about: str | None = None, **settings: Any) -> Argument:
    """Return an argument. A name without dashes is positional, shown in capitals unless it has choices."""
    if not name.startswith("-") and "choices" not in settings:
        settings.setdefault("metavar", name.upper())
    return Argument(name, {"help": about, **settings})


class _Parser(argparse.ArgumentParser):
    """A parser that raises usage errors as ConfigError, with the usage of the verb."""

    def error(self, message: str) -> NoReturn:
        found = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
        near = similar(found[1], re.findall(r"[\w-]+", found[2])) if found else []
        guess = f": did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{message}{guess}\n{self.format_usage().rstrip()}")


class _Version(argparse.Action):
    """`--version`: reads the metadata of the installed package only when it is used."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        with contextlib.suppress(OSError):  # nobody reads it
            sys.stdout.write(f"aepipe {importlib.metadata.version('aecore')}\n")
        parser.exit()


class Verbs:
    """The verbs of a command, in the order in which its help lists them."""

    def __init__(self) -> None:
        self._verbs: dict[str, Verb] = {}

    def __iter__(self) -> Iterator[Verb]:
        return iter(self._verbs.values())

    def register(self, name: str, about: str, *arguments: Argument, writes: bool = False, recipe: bool = True) -> Callable[[Run], Run]:
        """Return a decorator that registers a function as a verb; it gets the parsed arguments, including `overrides`."""

        def add(run: Run) -> Run:
            self._verbs[name] = Verb(name, about, arguments, run, writes, recipe)
            return run

        return add

    def parse(self, words: Sequence[str]) -> Args:
        """Return the parsed arguments with the verb as `verb`; ConfigError for a usage error, SystemExit for help and version."""
        parser = _Parser(prog="aepipe", description="Turn raw data into a table of latents.", epilog=RECIPE_NOTE)
        parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
        parsers = parser.add_subparsers(required=True, metavar="VERB")
        for verb in self:
            epilog = RECIPE_NOTE if verb.reads_recipe else None
            sub = parsers.add_parser(verb.name, help=verb.about, description=verb.about, epilog=epilog, allow_abbrev=False)
            sub.set_defaults(verb=verb, dry_run=False)
            sub.add_argument("--json", action="store_true", help="print the result as JSON")
            sub.add_argument("--debug", action="store_true", help="log everything, show tracebacks")
            if verb.writes:
                sub.add_argument("--dry-run", action="store_true", help="check everything and show what would be done, without writing")
            for name, settings in verb.arguments:
                sub.add_argument(name, **settings)
            if verb.reads_recipe:
                sub.usage = sub.format_usage().removeprefix("usage: ").rstrip().replace("%", "%%") + " [key=value ...]"
        args, unknown = parser.parse_known_args(words)
        several = vars(args).get("src")
        if isinstance(several, list) and len(several) > 1:  # of several words, one that is a key without its value
            unknown += [word for word in (*several[1:], args.dataset) if _KEY.fullmatch(word) and not os.path.exists(word)]
        if unknown:
            sub = parsers.choices[args.verb.name]
            sub.error("; ".join(_unknown_argument(word, sub.format_help(), args.verb) for word in unknown))
        return args


def _unknown_argument(word: str, help: str, verb: Verb) -> str:
    """Return the message about an argument that the verb does not take."""
    if word.startswith("-"):
        near = similar(word.partition("=")[0], set(re.findall(r"--[a-z-]+", help)))
        return f"`aepipe {verb.name}` has no option {word}" + (f": did you mean {near[0]}?" if near else "")
    if verb.reads_recipe and _KEY.fullmatch(word):
        return f"{word} sets nothing: write key=value, as in {word}=..."
    return f"`aepipe {verb.name}` takes no argument {word!r}"
