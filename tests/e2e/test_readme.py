"""The commands and snippets of README and guides run as they are written: page after page, in one folder.

A page continues where the pages before it ended, so a guide may use what the README made.
"""

import contextlib
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.aecore.data.test_external_tars import samples, write_tar
from tests.e2e.servers import prefect_server
from tests.processes import WARM, run, started
from tests.warm import template

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = ("README.md", "pipelines/README.md", "aecore/README.md")  # those of infra/ and the benchmarks need other machines
EXTENDS = "aecore/README.md"  # writes new parts into the packages: its commands run in new interpreters, on a copy
SERVED = "pipelines/README.md"  # its flows run on one Prefect server, where PREFECT_API_URL is; each flow of README.md starts its own
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FILE = re.compile(r"# (aecore/[\w/]+\.py)\n")

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.prefect]


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; `line` is that of its fence."""

    page: str
    line: int
    language: str
    text: str


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text()
    return [Block(page, text.count("\n", 0, match.start()) + 1, match[1], match[2]) for match in BLOCK.finditer(text)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a few photos, arrays and tars of others, a copy of the packages for new parts, `aepipe` on the path."""
    place = tmp_path_factory.mktemp("readme")
    for package in ("aecore", "pipelines"):
        shutil.copytree(ROOT / package, place / "code" / package, ignore=shutil.ignore_patterns("__pycache__"))
    generator = np.random.default_rng(0)
    for number in range(40):
        folder = place / "photos" / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 255, (40 + number % 3, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03d}.jpg")
    digits = generator.integers(0, 255, (40, 8, 8), dtype=np.uint8)
    np.savez(place / "digits.npz", images=digits, labels=np.arange(40) % 10)
    for shard in range(2):
        write_tar(place / f"external/train-{shard:05d}.tar", samples(20 * shard, 20))
    new, warm = place / "new" / "aepipe", place / "warm" / "aepipe"
    for command in (new, warm):
        command.parent.mkdir()
    new.write_text(f'#!/bin/sh\nexec {sys.executable} -W ignore -m pipelines.cli "$@"\n')
    new.chmod(0o755)
    template(os.environ).write_script(warm, ["-m", "pipelines.cli"])
    return place


def environment(place: Path, commands: str, **more: str) -> dict[str, str]:
    """Return the environment where `aepipe` runs in `new` interpreters, or in forks of a `warm` one."""
    return {**os.environ, "PATH": f"{place / commands}:{Path(sys.executable).parent}:{os.environ['PATH']}", **more}


def execute(block: Block, place: Path, **more: str) -> None:
    """Run a block; AssertionError with its output if a command of it fails."""
    env = environment(place, "new", PYTHONPATH=str(place / "code")) if block.page == EXTENDS else environment(place, "warm", **more)
    if block.language == "python" and (file := FILE.match(block.text)):
        (place / "code" / file[1]).write_text(block.text)
    elif block.language == "python":
        run([*WARM, "-c", block.text] if block.page != EXTENDS else [sys.executable, "-c", block.text], cwd=place, env=env, check=True)
    elif block.text.startswith("aepipe serve"):
        serve(block.text.strip(), environment(place, "new", **more), place)
    else:
        run(["bash", "-euo", "pipefail", "-c", block.text], cwd=place, env=env, timeout_s=900, check=True)


def serve(text: str, env: dict[str, str], place: Path) -> None:
    """Start `aepipe serve ...`, wait until it serves, and interrupt it: it must end by itself."""
    with started(["bash", "-c", f"exec {text}"], cwd=place, env=env) as process:
        process.wait_for("aepipe-pipeline")
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does: the whole group
        assert process.finish().returncode in (0, 130, -signal.SIGINT), process.tail()


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", PAGES)
def test_every_command_and_snippet_of_a_page_runs(page: str, place: Path, tmp_path: Path) -> None:
    assert blocks(page), "nothing was found to run"
    with contextlib.ExitStack() as stack:
        more = stack.enter_context(prefect_server(tmp_path)).environment if page == SERVED else {}
        for block in blocks(page):
            begun = time.monotonic()
            try:
                execute(block, place, **more)
            except AssertionError as error:
                raise AssertionError(f"{block.page}:{block.line} fails as it is written: {error}") from None
            print(f"{time.monotonic() - begun:5.1f} s  {block.page}:{block.line}")  # `-s` shows where the time goes
    assert list(place.glob("**/table.000001.json"))


def test_a_command_that_fails_fails_its_page(tmp_path: Path) -> None:
    block = Block("page.md", 7, "bash", "true\nls /nowhere/at/all\ntrue\n")
    with pytest.raises(AssertionError, match="No such file"):
        execute(block, tmp_path)
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        execute(Block("page.md", 9, "python", "1 / 0\n"), tmp_path)
