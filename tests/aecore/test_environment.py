"""The table of environment variables: right values are read, wrong ones refused by name, unknown names warned about once."""

import ast
import logging
import os
import re
from pathlib import Path

import pytest

from aecore.errors import ConfigError
from aecore.store import check_environment, environment_value
from aecore.store._environment import ROLES, VARIABLES
from tests.chaos.work import WORKS

ROOT = Path(__file__).resolve().parent.parent.parent
WRONG = {
    "AECORE_ACCEPT": ["yes"],
    "AECORE_APT": ["no"],
    "AECORE_CACHE": ["s3://bucket/cache", "~nobody-of-that-name/c"],
    "AECORE_CACHE_BYTES": ["banana", "-1", "0", "16GiB", "1e9", "\u00b2", "1_000"],
    "AECORE_DATA": ["https://host/images"],
    "AECORE_FAULT": ["bogus", "record", "record.linked:", "record.linked:0", "record.linked:x", "record.removed", "recrod.linked"],
    "AECORE_LINEAR": ["mkl"],
    "AECORE_NATIVE": ["maybe", "2", "false"],
    "AECORE_TAR_PREFIXES": ["http://host/tars", "s3://bucket, gs://other"],
}
RIGHT = {
    "AECORE_CACHE": ("~/c", os.path.expanduser("~/c")),
    "AECORE_CACHE_BYTES": ("1000", 1000),
    "AECORE_FAULT": ("record.linked:3", ("record.linked", 3)),
    "AECORE_LINEAR": ("torch", "torch"),
    "AECORE_NATIVE": ("0", "0"),
    "AECORE_TAR_PREFIXES": ("s3://bucket/a, /data ,", ["s3://bucket/a", "/data"]),
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in WRONG.items() for text in texts])
def test_a_wrong_value_is_refused_with_the_name_and_what_is_expected(name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, text)
    for ask in (check_environment, lambda: environment_value(name)):
        with pytest.raises(ConfigError, match=f"{name} is {re.escape(repr(text))}, expected {re.escape(VARIABLES[name].takes)}"):
            ask()


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_value_is_read_and_an_empty_one_is_none(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, expected = RIGHT[name]
    monkeypatch.setenv(name, text)
    check_environment()
    assert environment_value(name) == expected
    monkeypatch.setenv(name, "")
    assert environment_value(name) is None


def test_an_unknown_name_is_one_warning_with_the_nearest_one(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("AECORE_CASHE", "x")
    with caplog.at_level(logging.WARNING):
        check_environment()
    (warning,) = (record for record in caplog.records if "CASHE" in record.getMessage())
    assert "AECORE_CASHE is not read by anything (did you mean 'AECORE_CACHE'?" in warning.getMessage()


def test_the_table_the_manual_and_the_code_have_the_same_names() -> None:
    lines = [line for line in (ROOT / "infra/README.md").read_text().splitlines() if line.startswith("| `AECORE_")]
    manual = {name for line in lines for name in re.findall(r"`(AECORE_[A-Z_]+)", line.split("|")[1])}
    files = [path for folder in ("aecore", "pipelines", "infra") for path in (ROOT / folder).rglob("*.py")]
    code = {name for path in files for name in re.findall(r"AECORE_[A-Z][A-Z_]*\b", path.read_text())}
    assert manual == set(VARIABLES)
    assert code == set(VARIABLES)


def test_every_kind_of_file_that_is_committed_can_be_named_as_a_fault() -> None:
    literal = set()
    for path in (ROOT / "aecore").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "role" and isinstance(node.value, ast.Constant):
                literal.add(node.value.value)
    assert literal and literal <= set(ROLES)
    assert {kind for work in WORKS for kind in work.points} <= set(ROLES)
