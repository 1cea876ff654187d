"""A scheduled flow that watches a Ray job: cancelled, it takes its job along; started again, it completes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.pipelines.cluster.heads import Head, ray_head
from tests.pipelines.conftest import SMALL

LONG = (*SMALL, "train.epochs=600", "model.latent_dim=4", "backbone.hidden=[16]", "train.global_batch=32", "checkpoint.every_steps=50")
WORKING = ("RayTrainWorker", "PartWorker", "pipelines.driver")


def ask(api: str, path: str, **body: Any) -> Any:
    request = urllib.request.Request(f"{api}/{path}", json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as response:
        return json.load(response)


def until(what: Callable[[], Any], timeout_s: float, about: Callable[[], str]) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := what()):
        assert time.monotonic() < deadline, about()
        time.sleep(0.3)
    return found


def state(api: str, run: str) -> str:
    return str(ask(api, "flow_runs/filter", flow_runs={"id": {"any_": [run]}})[0]["state"]["type"])


@pytest.mark.accept
@pytest.mark.ray
@pytest.mark.prefect
@pytest.mark.timeout(600)
def test_a_cancelled_flow_leaves_no_job_and_its_rerun_completes(tmp_path: Path) -> None:
    with ray_head() as head:
        log = tmp_path / "serve.log"
        words = ["demo", f"out={tmp_path}/out", *LONG, "cluster.num_workers=1", "cluster.kind=job", f"cluster.address={head.dashboard}"]
        with log.open("wb") as file:
            serving = subprocess.Popen(
                [sys.executable, "-m", "pipelines.cli", "serve", *words],
                env=head.environment | {"PREFECT_HOME": str(tmp_path / "prefect")},
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        try:
            cancel_and_run_again(head, tmp_path, log)
        finally:
            os.killpg(serving.pid, signal.SIGINT)
            serving.wait(60)


def cancel_and_run_again(head: Head, tmp_path: Path, log: Path) -> None:
    until(lambda: "aepipe-pipeline" in log.read_text(), 120, log.read_text)
    found = re.search(r"Prefect server at (http://\S+)", log.read_text())
    assert found is not None
    api = f"{found[1]}/api"
    deployment = ask(api, "deployments/filter", flows={"name": {"any_": ["aepipe-pipeline"]}})[0]["id"]

    first = ask(api, f"deployments/{deployment}/create_flow_run")["id"]
    until(lambda: list((tmp_path / "out" / "run").glob("checkpoints/*/checkpoint.json")), 120, log.read_text)
    assert head.processes(*WORKING)
    ask(api, f"flow_runs/{first}/set_state", state={"type": "CANCELLING"})
    until(lambda: not head.processes(*WORKING), 60, lambda: f"{head.processes(*WORKING)}\n{log.read_text()}")
    until(lambda: state(api, first) == "CANCELLED", 60, log.read_text)
    assert not (tmp_path / "out" / "table").exists()

    second = ask(api, f"deployments/{deployment}/create_flow_run")["id"]
    until(lambda: state(api, second) in ("COMPLETED", "FAILED", "CRASHED"), 240, log.read_text)
    assert state(api, second) == "COMPLETED", log.read_text()
    assert (tmp_path / "out" / "table" / "table.000001.json").exists()
    artifacts = ask(api, "artifacts/filter", flow_runs={"id": {"any_": [second]}})
    assert {"aepipe-shard", "aepipe-train", "aepipe-encode", "aepipe-evaluate", "aepipe-pipeline"} <= {found["key"] for found in artifacts}
