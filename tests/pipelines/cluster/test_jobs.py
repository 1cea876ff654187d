"""The same recipe here, on a cluster that runs, and as a Ray job of it; a job is there once, can be stopped, and says what went wrong."""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from aecore.errors import ClusterError, ConfigError
from pipelines.cluster.job_client import is_this_machine, job_address
from pipelines.cluster.jobs import JobServer
from pipelines.cluster.train import GRACE_S
from pipelines.recipe.recipe import ClusterSpec, load_recipe
from pipelines.steps.pipeline import run_stages
from pipelines.steps.steps import STEPS
from pipelines.steps.submit import job_of
from tests.pipelines.cluster.heads import Head
from tests.pipelines.conftest import SMALL
from tests.processes import AEPIPE, WARM, Started, run, started, wait_until

TINY = (*SMALL, "train.epochs=60", "model.latent_dim=4", "backbone.hidden=[16]", "train.global_batch=32", "checkpoint.every_steps=50")
STAGES = """
import json, sys
from pipelines.recipe.recipe import load_recipe
from pipelines.steps.pipeline import run_stages
from pipelines.steps.steps import STEPS
print(json.dumps(run_stages(load_recipe("demo", sys.argv[1:]), lambda name, part: STEPS[name](part))))
"""
ALLOWED = """
import os, sys
from pipelines.cluster.session import connect, disconnect
from pipelines.recipe.recipe import ClusterSpec
connect(ClusterSpec(kind="address", address=sys.argv[1]))
import ray
print("allowed", ray.get(ray.remote(num_cpus=0)(lambda: os.environ.get("AECORE_TAR_PREFIXES")).remote()), flush=True)
disconnect()
"""
AS_JOB = """
import sys
from pipelines.cluster.jobs import JobServer, JobSpec
from pipelines.recipe.recipe import ClusterSpec
server = JobServer(ClusterSpec(kind="job", address=sys.argv[1]))
job, _ = server.submit(JobSpec("allowed", ("-c", sys.argv[2], sys.argv[3])))
print(server.follow(job, print).status)
"""
WORKING = ("RayTrainWorker", "PartWorker", "pipelines.steps.job_main")


def submit(head: Head, *words: str, **environment: str) -> "contextlib.AbstractContextManager[Started]":
    return started([*AEPIPE, "submit", *words, f"cluster.address={head.dashboard}"], env=head.environment | environment)


def finished(client: Started) -> tuple[int, str, str]:
    done = client.finish()
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


def submitted(head: Head, *words: str, **environment: str) -> tuple[int, str, str]:
    with submit(head, *words, **environment) as client:
        return finished(client)


def job_ids(head: Head, key: str) -> list[str]:
    return sorted(job["submission_id"] for job in head.ask("/api/jobs/") if (job["submission_id"] or "").startswith(key))


def parts(out: Path) -> dict[str, str]:
    files = sorted((out / "table" / "data").glob("**/*.parquet"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Give the hashes of the table that this process makes of the recipe."""
    out = tmp_path_factory.mktemp("here")
    run_stages(load_recipe("demo", [f"out={out}", *TINY, "cluster.num_workers=0"]), lambda name, part: STEPS[name](part))
    return parts(out)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_job_is_there_once_can_be_stopped_and_makes_the_table_that_is_made_here(head: Head, here: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("demo", f"out={out}", *TINY, "cluster.num_workers=1")
    slow = (*words, "checkpoint.every_steps=1")  # the same job; it has far to go when the client that stops it has started
    with submit(head, *slow, "--no-wait", "--json") as one, submit(head, *slow, "--no-wait", "--json") as other:
        ids = {json.loads(text)["job"] for code, text, _ in (finished(one), finished(other)) if code == 0}
    assert len(ids) == 1, "two clients at once, one job"
    key = ids.pop()
    assert job_ids(head, key) == [key]

    with submit(head, *words, "--json") as watching, submit(head, *words, "--json") as leaving:
        leaving.wait_for("train: ", "a line of the job: it watches")  # a signal before it watches ends it without a word of the job
        leaving.send(signal.SIGINT)
        code, _, err = finished(leaving)
        assert code == 130
        assert f"stopped watching; Ray job {key} goes on" in err
        assert head.processes("pipelines.steps.job_main")

        watching.wait_for("train: ", "a line of the job: it watches")
        watching.wait_for(lambda: list((out / "run").glob("checkpoints/*/checkpoint.json")), "training began")
        code, text, _ = submitted(head, *words, "--stop", "--json")
        assert (code, json.loads(text)["status"]) == (0, "STOPPED")
        code, _, err = finished(watching)
    assert code == 130
    assert f"joined Ray job {key}" in err
    assert f"Ray job {key} was stopped" in err
    wait_until(lambda: not head.processes(*WORKING), lambda: f"no process is left of the stopped job: {head.processes(*WORKING)}")
    assert not (out / "table" / "table.000001.json").exists()

    code, text, err = submitted(head, *words, "--json")
    assert code == 0, err
    summaries = json.loads(text)
    assert list(summaries) == ["shard", "train", "encode", "evaluate"]
    assert summaries["encode"]["rows"] == 384
    assert "train: 660 of 660 steps" in err, "its progress comes back"
    assert job_ids(head, key) == [key, f"{key}-2"]
    assert parts(out) == here


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.long  # a job works the same way on its head's cluster (above); from outside: test_session.py
def test_a_cluster_that_is_named_makes_the_table_that_is_made_here(head: Head, here: dict[str, str], tmp_path: Path) -> None:
    where = ["cluster.kind=address", f"cluster.address={head.address}", "cluster.num_workers=1"]
    command = [*WARM, "-c", STAGES, f"out={tmp_path}", *TINY, *where]
    done = run(command, env=head.environment)
    assert done.returncode == 0, done.stderr
    assert list(json.loads(done.stdout.splitlines()[-1])) == ["shard", "train", "encode", "evaluate"]
    assert parts(tmp_path) == here


@pytest.mark.ray
@pytest.mark.slow
def test_the_error_that_ends_a_job_comes_back_with_its_exit_code(head: Head, tmp_path: Path) -> None:
    small = ("demo", f"out={tmp_path}/out", *TINY)
    with (
        submit(head, "mnist_vae", f"source.url={tmp_path}/nowhere", f"out={tmp_path}/bad", "cluster.num_workers=0") as missing,
        submit(head, *small, "cluster.num_workers=12") as large,
        submit(head, *small, "train.seed=1", "cluster.num_workers=0", "cluster.python=/nowhere/python") as python,
        submit(head, *small, "train.seed=2", RAY_AUTH_TOKEN="0" * 48) as stranger,
    ):
        ended = {number: finished(client) for number, client in {3: missing, 5: large, -5: python, -55: stranger}.items()}
    assert [code for code, _, _ in ended.values()] == [3, 5, 5, 5], ended
    assert f"aepipe: source.url {tmp_path}/nowhere does not exist" in ended[3][2]
    assert "cluster.num_workers=12 workers of 1 CPU each do not fit: the cluster has 4 CPU" in ended[5][2]
    assert "cannot run aecore" in ended[-5][2] and "cluster.python" in ended[-5][2]
    assert "refuses this client" in ended[-55][2] and "RAY_AUTH_TOKEN" in ended[-55][2]
    assert not list(tmp_path.glob("*/dataset/dataset.*"))


@pytest.mark.ray
@pytest.mark.slow
def test_another_version_of_ray_is_named(head: Head, tmp_path: Path) -> None:
    older = "import ray, sys; ray.__version__ = '2.50.0'; from pipelines.cli.main import main; sys.exit(main(sys.argv[1:]))"
    words = ["shard", "sprites", str(tmp_path / "out"), *SMALL[:1], "cluster.kind=address", f"cluster.address={head.address}"]
    done = run([*WARM, "-c", older, *words], env=head.environment)
    assert done.returncode == 5, done.stderr
    assert "Version mismatch" in done.stderr and "Ray: 2.50.0" in done.stderr and "install the cluster's versions" in done.stderr
    words = ["submit", "demo", f"out={tmp_path}/out", "--stop", f"cluster.address={head.dashboard}"]
    done = run([*WARM, "-c", older, *words], env=head.environment)
    assert done.returncode == 0, done.stderr
    assert "this is 2.50.0: cluster.python must have" in done.stderr
    assert "nothing is running" in done.stdout


@pytest.mark.ray
def test_no_job_server_is_a_cluster_error_in_bounded_time() -> None:
    with pytest.raises(ClusterError, match=r"no job server answers at http://127.0.0.1:1 .*check the address"):
        JobServer(ClusterSpec(kind="job", address="http://127.0.0.1:1"))


def spec_of(*overrides: str) -> Any:
    return job_of("pipeline", load_recipe("demo", ["cluster.kind=job", "cluster.address=http://127.0.0.1:8265", *overrides]))


@pytest.mark.ray
@pytest.mark.slow
def test_the_tars_that_a_user_allows_are_allowed_in_a_job_and_on_all_workers(head: Head) -> None:
    environment = head.environment | {"AECORE_TAR_PREFIXES": "s3://theirs/one"}
    here = run([*WARM, "-c", ALLOWED, head.address], env=environment)
    as_job = run([*WARM, "-c", AS_JOB, head.dashboard, ALLOWED, head.address], env=environment)
    assert (here.stdout, as_job.stdout.splitlines()[-1]) == ("allowed s3://theirs/one\n", "SUCCEEDED"), (here.stderr, as_job.stderr)
    assert "allowed s3://theirs/one" in as_job.stdout.splitlines()


def test_the_key_of_a_job_is_what_it_makes(tmp_path: Path) -> None:
    out = f"out={tmp_path}/out"
    key = spec_of(out).key
    same = [("cluster.num_workers=7",), ("name=other",), ("checkpoint.every_steps=5",), ("schedule.cron=0 3 * * *",)]
    assert {spec_of(out, *more).key for more in same} == {key}
    other = [("train.epochs=5",), ("encode.batch=7",), ("evaluate.seed=3",), (f"data={tmp_path}/data",)]
    assert len({key, spec_of(f"out={tmp_path}/2").key, *(spec_of(out, *more).key for more in other)}) == 6


def test_no_secret_of_the_environment_is_in_a_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN", "PREFECT_API_KEY", "AWS_ENDPOINT_URL", "HOME_MADE"):
        monkeypatch.setenv(name, "canary-7f3a")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    server = object.__new__(JobServer)  # what it says of a job, without a server
    server._cluster, server._host = ClusterSpec(kind="job", address="http://127.0.0.1:8265"), "127.0.0.1"
    job = spec_of(f"out={tmp_path}/it's $(out)")
    assert "canary-7f3a" not in json.dumps([server.environment(), server.entrypoint(job), job.metadata, job.arguments])
    assert server.environment()["GLOO_SOCKET_IFNAME"] == "eth7"


@pytest.mark.parametrize("host", ["127.0.0.1", "192.0.2.77"])
def test_a_job_that_is_stopped_has_time_to_write_its_checkpoint(host: str) -> None:
    server = object.__new__(JobServer)
    server._cluster, server._host = ClusterSpec(kind="job", address=f"http://{host}:8265"), host
    assert int(server.environment()["RAY_JOB_STOP_WAIT_TIME_S"]) >= GRACE_S + 5, "Ray kills the job then; its default is 3 s"


def test_the_entrypoint_is_one_command_whatever_is_in_the_recipe(tmp_path: Path) -> None:
    server = object.__new__(JobServer)
    server._cluster, server._host = ClusterSpec(kind="job", address="http://127.0.0.1:8265", python="/bin/echo"), "127.0.0.1"
    job = spec_of(f'out={tmp_path}/it\'s "$(touch {tmp_path}/no)"; exit 3')
    printed = subprocess.run(server.entrypoint(job), shell=True, capture_output=True, text=True, check=True).stdout
    assert printed.rstrip("\n") == " ".join(job.arguments)
    assert not (tmp_path / "no").exists()
    assert json.loads(job.arguments[-1])["out"].endswith("; exit 3")


def test_a_local_path_is_refused_for_a_head_elsewhere(tmp_path: Path) -> None:
    server = object.__new__(JobServer)
    server._cluster, server._host = ClusterSpec(kind="job", address="http://192.0.2.77:8265"), "192.0.2.77"
    assert not is_this_machine("192.0.2.77")
    assert is_this_machine("127.0.0.1")
    with pytest.raises(ClusterError, match=r"is a path on this machine, and the job runs on 192.0.2.77.*cluster.shared_paths"):
        server._require_urls_fit(spec_of(f"out={tmp_path}/out"))
    server._cluster = ClusterSpec(kind="job", address="http://192.0.2.77:8265", shared_paths=(str(tmp_path),))
    server._require_urls_fit(spec_of(f"out={tmp_path}/out"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["cluster.kind=adress"], "expected 'local', 'address' or 'job'"),
        (["cluster.address=host:6379"], "add cluster.kind=address"),
        (["cluster.address=http://host:8265"], "add cluster.kind=job"),
        (["cluster.kind=address", "cluster.address=http://host:8265"], "set cluster.kind=job"),
        (["cluster.kind=job", "cluster.address=host:6379"], r"write cluster.address=http://host:8265"),
        (["cluster.kind=address", "cluster.num_workers=0"], "set cluster.num_workers=1 or more, or cluster.kind=local"),
        (["cluster.kind=job", "cluster.num_workers=0", "cluster.use_gpu=true"], "set cluster.num_workers=1 or more"),
        (["cluster.python=/usr/bin/python3"], "add cluster.kind=job"),
        (["cluster.shared_paths=[mnt]"], "expected folders as absolute paths"),
    ],
)
def test_a_combination_that_means_nothing_is_refused_with_the_fix(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe("demo", ["out=./out", *overrides])


def test_the_address_of_the_job_server_is_the_recipes_then_that_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="add cluster.address=http://host:8265"):
        job_address(ClusterSpec(kind="job"))
    monkeypatch.setenv("RAY_ADDRESS", "http://ray:8265")
    assert job_address(ClusterSpec(kind="job")) == "http://ray:8265"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://api:8265/")
    assert job_address(ClusterSpec(kind="job")) == "http://api:8265"
    assert job_address(ClusterSpec(kind="job", address="https://mine:8265")) == "https://mine:8265"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://me:secret@api:8265")
    with pytest.raises(ConfigError, match="RAY_AUTH_TOKEN") as refused:
        job_address(ClusterSpec(kind="job"))
    assert "secret" not in str(refused.value)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "api:6379")
    with pytest.raises(ConfigError, match="not the address of a job server"):
        job_address(ClusterSpec(kind="job"))
    assert os.environ["RAY_API_SERVER_ADDRESS"] == "api:6379"
