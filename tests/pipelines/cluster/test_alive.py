"""A driver below which Ray's own processes end says so, before Ray's library ends it without a word."""

import os
import re
import signal
from pathlib import Path

import pytest

from aecore.errors import ClusterError
from tests.processes import AEPIPE, below, started

SLOW = ("source.size=64", "source.num_samples=3000", "shards.max_samples=200", "splits.by=none", "cluster.num_workers=1")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(("title", "name"), [("raylet", "raylet|.* agent"), ("ray::DashboardAgent", "dashboard agent")])
def test_a_driver_says_what_of_its_ray_has_died_and_what_to_do(tmp_path: Path, title: str, name: str) -> None:
    out = tmp_path / "out"
    with started([*AEPIPE, "shard", "sprites", out, *SLOW]) as process:
        process.wait_for("shard: 1 of 15 shards")
        (victim,) = (pid for pid, words in below(process.pid).items() if os.path.basename(words.split(" ")[0]) == title)
        os.kill(victim, signal.SIGKILL)
        done = process.finish(120)
    assert done.returncode == ClusterError.exit_code, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("aepipe: "))
    assert re.search(rf"the ({name}) of Ray \(process \d+\) ended while it was used", line) and "run the same command again" in line
    assert "Traceback" not in done.stderr
    assert os.listdir(out / "records") and not (out / "dataset.000001.json").exists()
