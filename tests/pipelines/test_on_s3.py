"""The command with everything in a bucket: Ray workers, the flow and its log, what `show` and `verify` say, and no credential anywhere."""

import contextlib
import hashlib
import json
import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from pipelines.recipe.recipe import load_recipe
from pipelines.steps.steps import shard
from tests.prefect_home import prefect_home
from tests.processes import AEPIPE, run
from tests.s3 import ACCESS_KEY, S3, SECRET_KEY

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = ("source.num_samples=512", "splits.by=hash", "splits.test=0.1", "shards.max_samples=100", "train.max_steps=12")
PER_PLACE = ("records/", "report/", "run.", "checkpoints/", "metrics/", "table.", ".tmp/")  # they hold times, addresses, names of attempts


def aepipe(*arguments: object, home: Path) -> tuple[Any, str]:
    """Run the command with `--json`; return its answer and everything that it printed."""
    environment = {**os.environ, "PREFECT_HOME": str(prefect_home(home / "prefect")), "TMPDIR": str(home)}
    command = [*AEPIPE, *map(str, arguments), "--json"]
    done = run(command, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout), done.stdout + done.stderr


def content(objects: dict[str, bytes]) -> dict[str, str]:
    kept = {name: data for name, data in objects.items() if not name.partition("/")[2].startswith(PER_PLACE)}
    return {name: hashlib.sha256(data).hexdigest() for name, data in kept.items()}


def recorded(database: Path) -> tuple[list[str], set[str]]:
    """Return the states of the flow runs in a Prefect server's database, and which steps have lines of their progress in its log."""
    with contextlib.closing(sqlite3.connect(database)) as connection:
        states = [name for (name,) in connection.execute("SELECT state_name FROM flow_run")]
        lines = [message for (message,) in connection.execute("SELECT message FROM log")]
    return states, {line.partition(": ")[0] for line in lines if ": " in line} & {"shard", "train", "encode"}


@pytest.mark.ray
@pytest.mark.prefect
@pytest.mark.slow
def test_a_pipeline_on_two_workers_with_everything_in_a_bucket(s3: S3, tmp_path: Path) -> None:
    sizes = ("cluster.num_workers=2", "cluster.resources_per_worker={CPU: 0.5}")
    home = tmp_path / "home"
    home.mkdir()
    in_bucket, printed = aepipe("run", "demo", f"out={s3.url}/out", *SMALL, *sizes, home=home)
    assert in_bucket["encode"]["rows"] == 512
    assert recorded(home / "prefect" / "prefect.db") == (["Completed"], {"shard", "train", "encode"}), "of the workers too"
    shard(load_recipe("demo", [f"out={tmp_path}/out/dataset", *SMALL, "cluster.num_workers=0"]))
    objects = s3.objects("out/")
    files = {path.relative_to(tmp_path / "out").as_posix(): path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    here = content(files)
    assert here and {name: value for name, value in content(objects).items() if name.startswith("dataset/")} == here, (
        "shards do not depend on workers or places"
    )

    shown, more = aepipe("show", f"{s3.url}/out", home=home)
    assert shown["kind"] == "root" and shown["table"]["rows"] == 512
    verified, most = aepipe("verify", f"{s3.url}/out", "--read-data", home=home)
    assert verified

    canaries = (SECRET_KEY.encode(), ACCESS_KEY.encode())
    everything = {"printed": (printed + more + most).encode(), **{f"s3 {name}": data for name, data in objects.items()}}
    everything |= {str(path): path.read_bytes() for path in home.rglob("*") if path.is_file()}
    everything |= {str(path): path.read_bytes() for path in Path(f"/tmp/aepipe-ray-{os.getuid()}").rglob("*") if path.is_file()}
    assert any("prefect.db" in name for name in everything) and any("session_" in name for name in everything)
    assert not [name for name, data in everything.items() if any(canary in data for canary in canaries)]
