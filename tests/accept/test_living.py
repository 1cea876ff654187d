"""Real MNIST as a folder of PNGs that changes under a pipeline: after each run the table is that of a fresh chain, row by row."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from aecore.data.dataset import open_dataset
from aecore.table.table import open_table
from tests.pipelines.changing import change_files, columns, pictures, require_rows_of_files
from tests.processes import AEPIPE, run

pytestmark = [pytest.mark.accept, pytest.mark.prefect]
RECIPE = ("mnist_vae", "train.epochs=1", "cluster.num_workers=0")
SEED = 16


def aepipe(*arguments: object) -> dict[str, Any]:
    """Run `aepipe ... --json`, which must succeed, and return its answer."""
    done = run([*AEPIPE, *arguments, "--json"], env={**os.environ}, timeout_s=3000.0)
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def require_fresh(folder: Path, root: Path, table: str, run_folder: str, scratch: Path) -> int:
    """Compare a table with the files themselves, and with a fresh chain of the same model; return its rows."""
    found = require_rows_of_files(folder, open_table(str(root / table)))
    aepipe("shard", folder, scratch / "dataset", "--recipe", "mnist_vae", "cluster.num_workers=0")
    aepipe("encode", root / run_folder, scratch / "dataset", scratch / "table", "--recipe", "mnist_vae", "cluster.num_workers=0")
    assert open_dataset(str(root / "dataset")).manifest.content_sha256 == open_dataset(str(scratch / "dataset")).manifest.content_sha256
    fresh = columns(open_table(str(scratch / "table")))
    assert found.column_names == fresh.column_names
    for name in fresh.column_names:
        assert found[name].combine_chunks().cast(fresh[name].type).equals(fresh[name].combine_chunks()), name
    return len(found)


def test_the_pipeline_follows_real_mnist_and_its_table_is_that_of_a_fresh_chain(real_mnist: Path, tmp_path: Path) -> None:
    folder, root = Path(shutil.copytree(real_mnist, tmp_path / "mnist")), tmp_path / "root"
    damaged = {path: path.read_bytes() for path in pictures(folder, "train")[::20_000][:3]}
    for path in damaged:
        path.write_bytes(b"no picture")
    tick = ("run", *RECIPE, f"source.url={folder}", f"out={root}")
    seconds = {}
    begun = time.monotonic()
    first = aepipe(*tick)
    seconds["first"] = time.monotonic() - begun
    assert (first["shard"]["quarantined"], first["encode"]["rows"]) == (3, 69_997)

    change_files(folder, relabelled=1_000, deleted=500, replaced=200, seed=SEED, spared={*damaged})
    for path, data in damaged.items():
        path.write_bytes(data)
    begun = time.monotonic()
    second = aepipe(*tick)
    seconds["second"] = time.monotonic() - begun
    assert second["train"]["run"] == f"{root}/run" and not second["train"]["made"] and second["shard"]["generation"] == 2
    assert require_fresh(folder, root, "table", "run", tmp_path / "fresh-2") == 69_500
    again = aepipe(*tick)
    assert not again["encode"]["made"] and again["shard"]["generation"] == 2

    change_files(folder, relabelled=1_000, deleted=500, replaced=200, seed=SEED + 1)
    begun = time.monotonic()
    third = aepipe(*tick, "refresh.policy=continue")
    seconds["third"] = time.monotonic() - begun
    assert third["train"]["run"] == f"{root}/run-g000003" and third["encode"]["table"] == f"{root}/table-g000003"
    assert third["evaluate"]["elbo"] > second["evaluate"]["elbo"], "an epoch more"
    assert require_fresh(folder, root, "table-g000003", "run-g000003", tmp_path / "fresh-3") == 69_000
    assert len(open_table(str(root / "table"))) == 69_500
    aepipe("verify", root, "--read-data")
    elbo = [answer["evaluate"]["elbo"] for answer in (first, second, third)]
    print({"seconds": seconds, "elbo": elbo, "new parts": sorted(path.name for path in root.glob("table/data/*/*-t*.parquet"))})
