"""The library names situations, the command line names commands: `aecore` holds no command, and each hint of it has its words."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from aecore.artifact.kinds import KINDS
from aecore.errors import DataError, Hint
from pipelines.cli.main import main
from pipelines.steps.hints import HINTS, next_command

AECORE = Path(__file__).resolve().parents[2] / "aecore"


def nodes() -> Iterator[tuple[Path, ast.AST]]:
    for path in sorted(AECORE.rglob("*.py")):
        yield from ((path, node) for node in ast.walk(ast.parse(path.read_text())))


def test_no_message_of_the_library_names_a_command() -> None:
    found = list(nodes())
    docstrings = {
        id(node.body[0].value)
        for _, node in found
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and node.body and isinstance(node.body[0], ast.Expr)
    }
    strings = [(path, node) for path, node in found if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    assert len(strings) > 1000
    assert [f"{path}:{node.lineno}" for path, node in strings if id(node) not in docstrings and "aepipe" in node.value] == []


def test_every_hint_of_the_library_has_its_words_and_no_other_is_there() -> None:
    calls = [node for _, node in nodes() if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "Hint"]
    named = {call.args[0].value for call in calls if call.args and isinstance(call.args[0], ast.Constant)}
    assert {*named, *(f"is-{kind}" for kind in KINDS if kind != "root")} == {*HINTS}


def test_the_words_of_a_hint_need_no_value_but_a_url() -> None:
    for name in HINTS:
        assert "{" not in str(next_command(DataError("x", hint=Hint(name, {"url": "/data"}))))
    assert next_command(DataError("x")) is next_command(DataError("x", hint=Hint("of-a-newer-version"))) is None
    assert next_command(DataError("x", hint=Hint("no-dataset", {"address": "/data"}))) is None, "a value that this version does not know"


def test_the_command_line_prints_the_hint_after_the_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "demo", f"data={tmp_path}/none", f"out={tmp_path}/run", "cluster.num_workers=0"]) == 3
    error = capsys.readouterr().err
    assert error.startswith(f"aepipe: {tmp_path}/none holds no dataset: ")
    assert error.endswith(f"; {HINTS['no-dataset'].format(url=tmp_path / 'none')}\n")
