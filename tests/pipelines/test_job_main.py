"""What a job says, and how its watcher understands it."""

import json
import logging
import signal
from pathlib import Path

import pytest

from aecore.errors import DataError, Diverged, Interrupted, RunFailed, StoreError, from_json
from pipelines.cluster.jobs import Ended, JobStopped
from pipelines.recipe.recipe import load_recipe
from pipelines.steps import job_main
from pipelines.steps.submit import _summary


@pytest.fixture(autouse=True)
def own_loggers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the loggers back as they were: a job's log goes to its standard output."""
    for package in ("aecore", "pipelines"):
        monkeypatch.setattr(logging.getLogger(package), "handlers", [])
    monkeypatch.setattr(signal, "signal", lambda *_: None)


def test_a_step_in_a_job_prints_its_summary_as_the_last_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"out={tmp_path}/dataset", "source.kind=sprites", "source.num_samples=20", "cluster.num_workers=0", "cluster.kind=job"]
    *_, name, text = job_main.arguments("shard", load_recipe(None, [*words, "cluster.address=http://host:8265"]).tree)
    assert job_main.main([name, text]) == 0
    result = job_main.result_of(capsys.readouterr().out.splitlines()[-1])
    assert result is not None
    assert result["summary"]["samples"] == {"train": 20}

    broken = json.loads(text) | {"source": {"kind": "folder", "url": f"{tmp_path}/nowhere"}}
    assert job_main.main([name, json.dumps(broken)]) == DataError.exit_code
    result = job_main.result_of(capsys.readouterr().out.splitlines()[-1])
    assert result is not None
    error = from_json(result)
    assert type(error) is DataError
    assert "does not exist" in str(error)


def test_a_step_that_is_interrupted_in_a_job_ends_it_and_its_client_with_exit_code_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt("interrupted at step 3")

    monkeypatch.setitem(job_main.STEPS, "shard", interrupt)
    recipe = load_recipe(None, ["out=/x", "source.kind=sprites", "cluster.num_workers=0"])
    assert job_main.main(["shard", json.dumps(recipe.tree)]) == 130
    result = job_main.result_of(capsys.readouterr().out.splitlines()[-1])
    assert result is not None
    error = from_json(result)
    assert (type(error), error.exit_code, str(error)) == (Interrupted, 130, "interrupted at step 3")


def test_a_job_of_workers_uses_the_cluster_that_it_runs_on() -> None:
    tree = {"out": "/x", "cluster": {"kind": "job", "address": "http://host:8265", "python": "/p", "num_workers": 3}}
    *_, text = job_main.arguments("train", tree)
    assert json.loads(text)["cluster"] == {"kind": "address", "num_workers": 3}
    *_, text = job_main.arguments("train", {"cluster": {"kind": "job", "num_workers": 0}})
    assert json.loads(text)["cluster"] == {"kind": "local", "num_workers": 0}


@pytest.mark.parametrize(
    ("status", "exit_code", "result", "last", "expected", "message"),
    [
        ("FAILED", 4, {"error": "StoreError", "message": "no space"}, "", StoreError, r"no space \(Ray job a\)"),
        ("FAILED", 1, {"error": "Diverged", "message": "NaN"}, "", Diverged, "NaN"),
        ("FAILED", 130, {"error": "Interrupted", "message": "at step 3", "exit_code": 130}, "", Interrupted, "at step 3"),
        ("FAILED", 4, {"error": "Unknown", "message": "x"}, "", StoreError, "x"),
        ("FAILED", -9, {}, "", RunFailed, "was killed"),
        ("FAILED", 7, {}, "boom", RunFailed, "exit code 7: boom"),
        ("SUCCEEDED", 0, {}, "", RunFailed, "holds no result"),
        ("STOPPED", None, {"summary": {}}, "", JobStopped, "was stopped"),
    ],
)
def test_the_end_of_a_job_becomes_the_error_that_it_had(
    status: str, exit_code: int | None, result: dict[str, str], last: str, expected: type, message: str
) -> None:
    with pytest.raises(expected, match=message) as raised:
        _summary(Ended("a", status, exit_code, ""), result, last)
    assert type(raised.value) is expected


def test_a_result_that_was_cut_off_on_its_way_is_none() -> None:
    whole = job_main.RESULT + json.dumps({"summary": {"rows": 3}})
    assert job_main.result_of(whole) == {"summary": {"rows": 3}}
    assert all(job_main.result_of(whole[:end]) is None for end in range(len(whole)))
