"""The flows: a real (temporary) Prefect server, the whole walk, what is recorded of it."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from aecore.errors import ConfigError
from pipelines.cli.main import main
from pipelines.flows import set_defaults
from pipelines.flows.server import temporary_server
from tests.pipelines.conftest import SMALL
from tests.processes import AEPIPE, run

TINY = (*SMALL, "train.epochs=2", "model.latent_dim=4", "backbone.hidden=[16]", "train.global_batch=32")


def newest_run(flow: str) -> tuple[Any, list[str], set[str]]:
    """Return the newest flow run of a flow, its log lines and the keys of its artifacts, as the server has them."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowFilter, FlowFilterName, LogFilter, LogFilterFlowRunId
    from prefect.client.schemas.sorting import FlowRunSort

    with temporary_server(), get_client(sync_client=True) as client:
        named = FlowFilter(name=FlowFilterName(any_=[flow]))
        found = client.read_flow_runs(flow_filter=named, sort=FlowRunSort.START_TIME_DESC, limit=20)
        run = next(run for run in found if run.start_time is not None)  # what a schedule plans comes first
        logs = client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run.id])), limit=200, offset=0)
        response = client._client.post("/artifacts/filter", json={"flow_runs": {"id": {"any_": [str(run.id)]}}})
        return run, [log.message for log in logs], {artifact["key"] for artifact in response.json()}


@pytest.fixture(autouse=True, scope="module")
def prefect_console() -> None:
    """Let Prefect take the standard error of the whole session, not the one that a test's `capsys` closes."""
    from prefect.logging.configuration import setup_logging

    setup_logging()


@pytest.mark.prefect
@pytest.mark.slow
def test_a_pipeline_runs_as_one_flow_and_leaves_its_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert main(["run", "demo", f"out={out}", *TINY, "cluster.num_workers=0", "--json"]) == 0
    output = capsys.readouterr()
    summaries = json.loads(output.out)
    assert list(summaries) == ["shard", "train", "encode", "evaluate"]
    assert summaries["encode"]["rows"] == sum(summaries["shard"]["samples"].values()) == 384
    assert summaries["encode"]["lineage"]["checkpoint"]["sha256"] == summaries["train"]["checkpoint_sha256"]
    assert main(["verify", out, "--read-data"]) == 0
    capsys.readouterr()

    run, _, artifacts = newest_run("aepipe-pipeline")
    assert run.state.is_completed()
    assert run.parameters["recipe"]["out"] == out
    assert artifacts >= {"aepipe-shard", "aepipe-train", "aepipe-encode", "aepipe-evaluate", "aepipe-pipeline"}

    assert main(["run", "demo", f"out={out}", *TINY, "cluster.num_workers=0", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert [again[name].pop("made") for name in ("train", "encode")] == [False, False]
    assert [summaries[name].pop("made") for name in ("train", "encode")] == [True, True]
    for summary in (*summaries.values(), *again.values()):
        summary.pop("seconds")
    assert again == summaries, "a second run finds everything done"


@pytest.mark.prefect
def test_an_error_in_a_flow_keeps_its_exit_code_and_is_not_tried_again(tmp_path: Path) -> None:
    (tmp_path / "raw\x1b[31m").mkdir()
    command = [*AEPIPE, "run", "mnist_vae", f"source.url={tmp_path}/raw\x1b[31m", f"out={tmp_path}/out"]
    with temporary_server() as server:
        done = run([*command, "cluster.num_workers=0"], env=os.environ | server.settings)
    assert done.returncode == 3
    assert "aepipe: source.url" in done.stderr
    assert r"raw\x1b[31m" in done.stderr and "\x1b" not in done.stderr, "also in what Prefect logs"
    assert "Traceback" not in done.stderr
    assert "AwaitingRetry" not in done.stderr


def test_the_defaults_leave_the_users_settings_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_HOME", "/somewhere/mine")
    monkeypatch.delenv("PREFECT_LOGGING_EXTRA_LOGGERS", raising=False)
    set_defaults()
    assert os.environ["PREFECT_HOME"] == "/somewhere/mine"
    assert os.environ["PREFECT_LOGGING_EXTRA_LOGGERS"] == "aecore,pipelines"


def test_a_home_of_prefect_may_begin_with_a_tilde_and_what_is_made_for_it_is_private(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    before = os.umask(0)
    try:
        for name in ("~/pf/deep/home", "~/pf/other", str(tmp_path / ".cache/aepipe/prefect")):
            monkeypatch.setenv("PREFECT_HOME", name)
            set_defaults()
            assert os.environ["PREFECT_HOME"] == os.path.expanduser(name)
    finally:
        os.umask(before)
    made = [path for path in tmp_path.rglob("*") if path.is_dir()]
    assert {path.stat().st_mode & 0o777 for path in made} == {0o700} and len(made) == 7
    for name in ("~nobody-of-that-name/pf", "~nobody-of-that-name"):
        monkeypatch.setenv("PREFECT_HOME", name)
        with pytest.raises(ConfigError, match="set PREFECT_HOME to a folder"):
            set_defaults()
