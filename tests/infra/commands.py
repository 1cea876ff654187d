"""The commands that stand in infra/'s files, and whether the programs that they call would understand them. Nothing is run."""

import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
INFRA = ROOT / "infra"
PROGRAMS = ("aepipe", "prefect", "ray")


def commands() -> Iterator[tuple[str, list[str]]]:
    """Yield (where, words) of every command of aepipe, prefect and ray in compose file, units, README and comments."""
    for name, service in yaml.safe_load((INFRA / "compose.yaml").read_text())["services"].items():
        yield from _found(f"compose.yaml:{name}", _words_of(service))
        check = service.get("healthcheck", {}).get("test", [])
        yield from _found(f"compose.yaml:{name}:healthcheck", [check[1:]] if check[:1] == ["CMD"] else _lines("\n".join(check[1:])))
    for path in sorted((INFRA / "systemd").glob("*.service")):
        yield from _found(path.name, [shlex.split(line) for line in re.findall(r"^ExecStart=(.*)$", path.read_text(), re.MULTILINE)])
    for path in (INFRA / "README.md", INFRA / "prefect.yaml", ROOT / "README.md"):
        yield from _found(path.name, _lines("\n".join(re.findall(r"^(?:#| ) {3}(\S.*)$", path.read_text(), re.MULTILINE))))


def _words_of(service: dict[str, Any]) -> list[list[str]]:
    entrypoint, command = service.get("entrypoint"), [str(word) for word in service.get("command", [])]
    if entrypoint is None:
        return [["aepipe", *command]] if service["image"].startswith("aepipe:") else []
    return _lines("\n".join(command)) if entrypoint[0] == "/bin/sh" else [[*entrypoint, *command]]


def _lines(text: str) -> list[list[str]]:
    """Split shell lines into the words of their commands; comments end a line, `&&` and `|` a command."""
    found = []
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        for part in re.split(r"&&|\|\||\||;", line):
            try:
                found.append(shlex.split(part, comments=True))
            except ValueError:
                continue  # prose with an apostrophe
    return found


def _found(where: str, candidates: Sequence[Sequence[str]]) -> Iterator[tuple[str, list[str]]]:
    for words in candidates:
        rest = [word for word in words if word not in ("exec", "sudo")]
        while rest and re.fullmatch(r"[A-Z_]+=.*", rest[0]):
            rest = rest[1:]
        if rest and Path(rest[0]).name in PROGRAMS:
            end = next((place for place, word in enumerate(rest) if word in (">", ">>", "<", "&")), len(rest))
            yield where, [Path(rest[0]).name, *rest[1:end]]


def understand(words: Sequence[str]) -> None:
    """Let the program's own parser read the words; an error or SystemExit if it does not know them."""
    program, arguments = words[0], [re.sub(r"\$\{(\w+):-([^}]*)\}", r"\2", word) for word in words[1:]]
    if program == "aepipe":
        from pipelines.cli import overrides
        from pipelines.cli.verbs import VERBS

        VERBS.parse(overrides.split(arguments)[0])
    elif program == "ray":
        from ray.scripts.scripts import cli

        command: Any = cli
        while hasattr(command, "resolve_command"):  # a group: `ray job submit`
            with command.make_context("ray", arguments, resilient_parsing=False) as context:
                rest = [*context._protected_args, *context.args] if hasattr(context, "_protected_args") else context.args
                _, command, arguments = command.resolve_command(context, rest)
        command.make_context("ray", list(arguments))
    else:
        from prefect.cli._app import _app  # what `prefect` itself calls runs the command; this one only parses

        session = [word for word in arguments if word in ("--prompt", "--no-prompt")]
        _app.parse_args([word for word in arguments if word not in session], exit_on_error=False, print_error=False)
