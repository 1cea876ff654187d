"""`make quick` runs what its list names."""

from pathlib import Path

import pytest

from tests.quick import QUICK

TESTS = Path(__file__).resolve().parent


def test_every_file_that_quick_names_exists_and_every_word_leaves_a_test_out() -> None:
    for name, words in QUICK.items():
        files = list(TESTS.rglob(name))
        assert files, f"{name} of tests/quick.py is no file: put the new name there"
        for word in words:
            assert any(word in path.read_text() for path in files), f"{word!r} leaves out no test of {name}"


@pytest.mark.parametrize("name", ["quick", "long", "accept"])
def test_a_job_of_chosen_tests_has_a_line_of_help(name: str) -> None:
    root = TESTS.parent
    assert f'"{name}": {name}' in (root / "infra" / "bootstrap.py").read_text()
    assert f"make {name}" in (root / "Makefile").read_text() and f"make {name}" in (root / "CONTRIBUTING.md").read_text()
