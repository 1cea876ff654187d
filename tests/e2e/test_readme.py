"""The README's commands and snippets run as they stand, one after the other, in one folder."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.aecore.data.test_foreign import samples, write_tar

ROOT = Path(__file__).resolve().parent.parent.parent
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FILE = re.compile(r"# (aecore/[\w/]+\.py)\n")
READY_S = 120

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.prefect]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a few photos, arrays and tars of others, a copy of the packages for new parts, `aepipe` on the path."""
    for package in ("aecore", "pipelines"):
        shutil.copytree(ROOT / package, tmp_path / "code" / package, ignore=shutil.ignore_patterns("__pycache__"))
    generator = np.random.default_rng(0)
    for number in range(40):
        folder = tmp_path / "photos" / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 255, (40 + number % 3, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03d}.jpg")
    digits = generator.integers(0, 255, (40, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "digits.npz", images=digits, labels=np.arange(40) % 10)
    for shard in range(2):
        write_tar(tmp_path / f"theirs/train-{shard:05d}.tar", samples(20 * shard, 20))
    command = tmp_path / "bin" / "aepipe"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -W ignore -m pipelines.cli "$@"\n')
    command.chmod(0o755)
    return tmp_path


def environment(place: Path) -> dict[str, str]:
    return {**os.environ, "PATH": f"{place / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(place / "code")}


def run(command: list[str], place: Path) -> None:
    done = subprocess.run(command, cwd=place, env=environment(place), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def serve_until_ready(text: str, place: Path) -> None:
    """Start `aepipe serve ...`, wait until it serves, and interrupt it: it must end by itself."""
    log = place / "serve.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            ["bash", "-c", f"exec {text}"], cwd=place, env=environment(place), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    deadline = time.monotonic() + READY_S
    try:
        while "aepipe-pipeline" not in log.read_text():
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, f"not serving after {READY_S} s:\n{log.read_text()[-3000:]}"
            time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) in (0, 130, -signal.SIGINT), log.read_text()[-3000:]
    finally:
        process.terminate()  # else its server would outlive a test that failed
        process.wait(60)


@pytest.mark.timeout(600)
def test_every_command_and_snippet_of_the_readme_runs(place):
    blocks = BLOCK.findall((ROOT / "README.md").read_text())
    assert len(blocks) > 10
    for language, text in blocks:
        if language == "python" and (file := FILE.match(text)):
            (place / "code" / file[1]).write_text(text)
        elif language == "python":
            run([sys.executable, "-c", text], place)
        elif text.startswith("aepipe serve"):
            serve_until_ready(text.strip(), place)
        else:
            run(["bash", "-euo", "pipefail", "-c", text], place)
    assert (place / "out/table/table.000001.json").exists()
    assert (place / "stripes/table/table.000001.json").exists()
