"""What a verb of the command line is: its name, its arguments, and the function that runs it.

A verb is registered in one place (`verbs.py`) and from there on has its help, `--json`, `--debug` and, if it writes, `--dry-run`.
Nothing is run and nothing heavy is imported here: every `aepipe --help` passes through.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

Args = argparse.Namespace
RECIPE_NOTE = "key.path=value sets any key of a recipe"


class Result(NamedTuple):
    """What a verb found or made: plain JSON, the function that says it to people, and the exit code that it ends with."""

    data: Any
    as_text: Callable[[Any], str]
    exit_code: int = 0


class Argument(NamedTuple):
    """One argument of a verb, as `argparse` wants it."""

    name: str
    settings: dict[str, Any]


Run = Callable[[Args], Result | None]


@dataclass(frozen=True)
class Verb:
    """A verb; `reads_recipe` says whether `key.path=value` means something to it."""

    name: str
    about: str
    arguments: tuple[Argument, ...]
    run: Run
    writes: bool
    reads_recipe: bool


def argument(name: str, about: str | None = None, **settings: Any) -> Argument:
    """Return an argument; one without dashes is positional, and shown in capitals unless its choices are."""
    if not name.startswith("-") and "choices" not in settings:
        settings.setdefault("metavar", name.upper())
    return Argument(name, {"help": about, **settings})


class Verbs:
    """The verbs of a command, in the order in which its help lists them."""

    def __init__(self) -> None:
        self._verbs: dict[str, Verb] = {}

    def __iter__(self) -> Iterator[Verb]:
        return iter(self._verbs.values())

    def register(self, name: str, about: str, *arguments: Argument, writes: bool = False, recipe: bool = True) -> Callable[[Run], Run]:
        """Return a decorator that makes a function a verb; it gets the parsed arguments, with `overrides` beside them."""

        def add(run: Run) -> Run:
            self._verbs[name] = Verb(name, about, arguments, run, writes, recipe)
            return run

        return add

    def parse(self, words: Sequence[str]) -> Args:
        """Return the arguments of the verb that is named, as `verb` (SystemExit for a usage error or for help)."""
        parser = argparse.ArgumentParser(prog="aepipe", description="Raw data to a table of latents.", epilog=RECIPE_NOTE)
        parsers = parser.add_subparsers(required=True, metavar="VERB")
        for verb in self:
            epilog = RECIPE_NOTE if verb.reads_recipe else None
            sub = parsers.add_parser(verb.name, help=verb.about, description=verb.about, epilog=epilog)
            sub.set_defaults(verb=verb, dry_run=False)
            sub.add_argument("--json", action="store_true", help="print the result as JSON")
            sub.add_argument("--debug", action="store_true", help="log everything, show tracebacks")
            if verb.writes:
                sub.add_argument("--dry-run", action="store_true", help="check and say what would be done; write nothing")
            for name, settings in verb.arguments:
                sub.add_argument(name, **settings)
        return parser.parse_args(words)
