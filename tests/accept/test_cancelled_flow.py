"""A scheduled flow that watches a Ray job: cancelled, it takes its job along; started again, it completes."""

import json
import re
import signal
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.pipelines.cluster.heads import Head, ray_head
from tests.pipelines.conftest import SMALL
from tests.processes import Started, started

LONG = (*SMALL, "train.epochs=600", "model.latent_dim=4", "backbone.hidden=[16]", "train.global_batch=32", "checkpoint.every_steps=50")
WORKING = ("RayTrainWorker", "PartWorker", "pipelines.steps.job_main")


def ask(api: str, path: str, **body: Any) -> Any:
    request = urllib.request.Request(f"{api}/{path}", json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as response:
        return json.load(response)


def state(api: str, run: str) -> str:
    return str(ask(api, "flow_runs/filter", flow_runs={"id": {"any_": [run]}})[0]["state"]["type"])


@pytest.mark.accept
@pytest.mark.ray
@pytest.mark.prefect
@pytest.mark.timeout(1200)
def test_a_cancelled_flow_leaves_no_job_and_its_rerun_completes(tmp_path: Path) -> None:
    with ray_head() as head:
        log = tmp_path / "serve.log"
        words = ["demo", f"out={tmp_path}/out", *LONG, "cluster.num_workers=1", "cluster.kind=job", f"cluster.address={head.dashboard}"]
        environment = head.environment | {"PREFECT_HOME": str(tmp_path / "prefect")}
        command = [sys.executable, "-m", "pipelines.cli", "serve", *words]
        with started(command, env=environment, log=log, how=signal.SIGINT, grace_s=60) as serving:
            cancel_and_run_again(head, tmp_path, serving)


def cancel_and_run_again(head: Head, tmp_path: Path, serving: Started) -> None:
    serving.wait_for("aepipe-pipeline")
    found = re.search(r"Prefect server at (http://\S+)", serving.out)
    assert found is not None
    api = f"{found[1]}/api"
    deployment = ask(api, "deployments/filter", flows={"name": {"any_": ["aepipe-pipeline"]}})[0]["id"]

    first = ask(api, f"deployments/{deployment}/create_flow_run")["id"]
    serving.wait_for(lambda: list((tmp_path / "out" / "run").glob("checkpoints/*/checkpoint.json")), "training began")
    assert head.processes(*WORKING)
    ask(api, f"flow_runs/{first}/set_state", state={"type": "CANCELLING"})
    serving.wait_for(lambda: not head.processes(*WORKING), "no process is left of the cancelled run")
    serving.wait_for(lambda: state(api, first) == "CANCELLED", "the first run is cancelled")
    assert not (tmp_path / "out" / "table").exists()

    second = ask(api, f"deployments/{deployment}/create_flow_run")["id"]
    serving.wait_for(lambda: state(api, second) in ("COMPLETED", "FAILED", "CRASHED"), "the second run is over", 400)
    assert state(api, second) == "COMPLETED", serving.out
    assert (tmp_path / "out" / "table" / "table.000001.json").exists()
    artifacts = ask(api, "artifacts/filter", flow_runs={"id": {"any_": [second]}})
    assert {"aepipe-shard", "aepipe-train", "aepipe-encode", "aepipe-evaluate", "aepipe-pipeline"} <= {found["key"] for found in artifacts}
