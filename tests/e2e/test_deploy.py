"""Deployments on a Prefect server with PostgreSQL, a password and CSRF protection: cron, killed and cancelled runs, no secrets left."""

import contextlib
import json
import os
import secrets
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipelines.deploy.recipes import FLOWS
from pipelines.flows.factory import CRASH_RESTARTED
from tests.canary import find_canary
from tests.e2e.servers import ROOT, Postgres, Prefect, postgres, prefect_server, prefect_worker
from tests.processes import Started, below, wait_until

pytestmark = [pytest.mark.prefect, pytest.mark.slow, pytest.mark.timeout(1200)]

CANARIES = {name: f"cAnArY{secrets.token_hex(12)}" for name in ("database", "prefect", "key", "secret", "endpoint")}
STORAGE = {
    "AWS_ACCESS_KEY_ID": CANARIES["key"],
    "AWS_SECRET_ACCESS_KEY": CANARIES["secret"],
    "AWS_ENDPOINT_URL": f"http://someone:{CANARIES['endpoint']}@127.0.0.1:9",
}
TINY = ("source.num_samples=2000", "splits.by=hash", "splits.test=0.2", "model.latent_dim=4", "backbone.hidden=[64]")
HERE = "cluster.num_workers=0"
ON_RAY = ("cluster.num_workers=2", "cluster.resources_per_worker={CPU: 0.5}")
OVER = ("Completed", "Failed", "Cancelled")
POLL_S = 1.0  # each look is a request or two that the server works for
SERVER = {  # as infra/ does it: CSRF protection, leases that outlive a restart
    "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
}


@dataclass(frozen=True)
class Site:
    """A place as infra/ describes it: database, server, and a folder of the worker."""

    database: Postgres
    server: Prefect
    folder: Path
    ray: Path

    def worker(self) -> "contextlib.AbstractContextManager[Started]":
        env = STORAGE | {"RAY_TMPDIR": str(self.ray)}
        return prefect_worker(self.server, "aepipe", self.folder / "worker.log", env)

    def deploy(self, *arguments: str, code: int = 0) -> str:
        """Run `aepipe deploy` and return what it says."""
        done = self.server.run("pipelines.cli", "deploy", *arguments, check=False)
        assert done.returncode == code, done.stderr[-3000:]
        return done.stderr if code else done.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    with (
        tempfile.TemporaryDirectory(prefix="aeq-", dir="/tmp", ignore_cleanup_errors=True) as ray,  # short: sockets lie in it
        postgres(CANARIES["database"]) as database,
        prefect_server(folder, f"admin:{CANARIES['prefect']}", SERVER | {"PREFECT_API_DATABASE_CONNECTION_URL": database.url}) as server,
    ):
        yield Site(database, server, folder, Path(ray))


@pytest.fixture(scope="module")
def nightly(site: Site) -> Iterator[Started]:
    """Deploy infra/prefect.yaml, but without Ray, with a tick within two minutes, and start a worker: the tick comes during other tests.

    Flows on Ray, and what they leave of secrets: tests/pipelines/test_on_s3.py; below a worker: the tests for `make accept`.
    """
    site.deploy()
    asked = (ROOT / "infra/prefect.yaml").read_text()
    assert asked.count("{num_workers: 2}") == 1
    (site.folder / "prefect.yaml").write_text(asked.replace("{num_workers: 2}", "{num_workers: 0}"))
    soon = time.gmtime(time.time() + 100).tm_min
    env = {"AEPIPE_OUT": str(site.folder / "nightly"), "AEPIPE_CRON": f"{soon},{(soon + 4) % 60} * * * *"}
    printed = site.server.run("prefect", "--no-prompt", "deploy", "--prefect-file", site.folder / "prefect.yaml", "--all", env=env).stdout
    assert printed.count("successfully created") == len(FLOWS), printed
    with site.worker() as worker:
        yield worker


def engine_of(worker: Started, run_id: str) -> int:
    """Return the pid of the process of a flow run."""
    for pid in below(worker.pid):
        with contextlib.suppress(OSError):
            if f"PREFECT__FLOW_RUN_ID={run_id}" in Path(f"/proc/{pid}/environ").read_text() and "prefect" in _cmdline(pid):
                return pid
    raise AssertionError(f"no process of run {run_id} below the worker")


def _cmdline(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def trains(out: Path) -> bool:
    return any((out / "run" / "metrics").glob("*.jsonl"))


def test_deploying_again_changes_nothing_and_takes_an_old_schedule_away(site: Site, nightly: object) -> None:
    out = f"out={site.folder / 'again'}"
    command = ("demo", "name=again", out, *TINY, HERE)
    planned = json.loads(site.deploy(*command, "--cron", "0 3 * * *", "--dry-run", "--json"))
    assert [made["made"] for made in planned["deployments"]] == ["new"] * len(FLOWS)
    names = {"name": {"any_": ["again"]}}
    assert site.server.ask("deployments/filter", deployments=names) == []

    first = json.loads(site.deploy(*command, "--cron", "0 3 * * *", "--json"))
    assert first["pool"] == {"name": "aepipe", "type": "process", "made": "kept"}
    before = site.server.ask("deployments/filter", deployments=names)
    (pipeline,) = [one for one in before if one["schedules"]]
    assert [plan["schedule"]["cron"] for plan in pipeline["schedules"]] == ["0 3 * * *"]
    assert pipeline["parameters"]["recipe"]["out"] == str(site.folder / "again")
    assert pipeline["work_pool_name"] == "aepipe"
    assert "aepipe-pipeline/again: updated, 0 3 * * * (UTC)" in site.deploy(*command, "--cron", "0 3 * * *")
    assert "aepipe-pipeline/again: updated\n" in site.deploy(*command)
    after = site.server.ask("deployments/filter", deployments=names)
    assert {one["id"] for one in after} == {one["id"] for one in before}
    assert not any(one["schedules"] for one in after)
    assert len(site.server.ask("automations/filter")) == 2


def test_a_deployment_that_cannot_work_is_refused_with_what_to_do(site: Site, nightly: object) -> None:
    server = site.server
    server.run("prefect", "work-pool", "create", "boxes", "--type", "docker")
    message = site.deploy("demo", f"out={site.folder / 'x'}", "--pool", "boxes", code=2)
    assert "the work pool 'boxes' is of type 'docker', expected 'process': choose another with --pool NAME" in message
    wrong = server.run("pipelines.cli", "deploy", env={"PREFECT_API_AUTH_STRING": "admin:wrong"}, check=False)
    assert (wrong.returncode, "answered 401 Unauthorized" in wrong.stderr) == (5, True), wrong.stderr


def test_a_run_that_always_crashes_fails_in_the_end(site: Site, nightly: object) -> None:
    site.deploy("demo", "name=cursed", f"out={site.folder / 'cursed'}", *TINY, HERE)
    deployment = "aepipe-shard/cursed"
    later = {"type": "SCHEDULED", "state_details": {"scheduled_time": "2999-01-01T00:00:00Z"}}
    runs = {crashes: site.server.start(deployment, state=later) for crashes in (2, 3)}
    for crashes, run in runs.items():
        states = [{"type": "CRASHED"}, later | {"message": CRASH_RESTARTED}] * crashes
        for state in [
            {"type": "CRASHED"},
            later,
            *states[:-1],
            {"type": "SCHEDULED", "message": CRASH_RESTARTED},
        ]:  # the first one was answered by hand
            site.server.ask(f"flow_runs/{run}/set_state", state=state, force=True)
        wait_until(lambda run=run: site.server.state(run) in OVER, "the run is over", 240, POLL_S)
    assert [site.server.state(run) for run in runs.values()] == ["Completed", "Failed"]
    (failed,) = site.server.runs(flow_runs={"id": {"any_": [runs[3]]}})
    assert "the process of this run died 3 times in a row" in failed["state"]["message"]


def test_a_run_whose_process_is_killed_goes_on_by_itself(site: Site, nightly: Started) -> None:
    out = site.folder / "doomed"
    site.deploy("demo", "name=doomed", f"out={out}", *TINY, "train.epochs=100", "checkpoint.every_steps=100", HERE)
    run = site.server.start("aepipe-pipeline/doomed")
    wait_until(lambda: trains(out), "the run trains", 240, 0.1)
    os.kill(engine_of(nightly, run), signal.SIGKILL)
    wait_until(lambda: site.server.state(run) in OVER, "the killed run is over", 400, POLL_S)
    states = site.server.states(run)
    assert states[-1] == "Completed", states
    assert [state for state in states if state in ("Running", "Crashed", "AwaitingRetry")] == [
        "Running",
        "Crashed",
        "AwaitingRetry",
        "Running",
    ]
    site.server.run("pipelines.cli", "verify", out, "--read-data")


def test_a_cron_tick_of_prefect_yaml_runs_the_pipeline_and_leaves_no_secret(site: Site, nightly: object) -> None:
    def first() -> list[dict]:
        runs = site.server.runs(flow_runs={"tags": {"all_": ["auto-scheduled"]}})
        return [run for run in runs if run["state"]["name"] in ("Completed", "Failed", "Crashed")]  # a tick that met another is cancelled

    run = wait_until(first, "a cron tick fired and its run is over", 400, POLL_S)[0]
    assert run["state"]["name"] == "Completed", (site.folder / "worker.log").read_text()[-5000:]
    assert run["auto_scheduled"]
    out = site.folder / "nightly"
    assert run["parameters"]["recipe"]["out"] == str(out)
    site.server.run("pipelines.cli", "verify", out, "--read-data")

    lines = [line["message"] for line in site.server.ask("logs/filter", logs={"flow_run_id": {"any_": [run["id"]]}})]
    assert any(line.startswith("epoch 4: ") for line in lines), lines
    artifacts = site.server.ask("artifacts/filter", artifacts={"flow_run_id": {"any_": [run["id"]]}})
    assert len(artifacts) >= 5
    dump = site.database.dump()
    assert run["id"] in dump
    assert find_canary(CANARIES.values(), site.folder, site.ray, texts={"database": dump, "artifacts": json.dumps(artifacts)}) == []


@pytest.mark.accept
@pytest.mark.ray
def test_a_run_goes_on_when_its_worker_was_killed_with_it(site: Site) -> None:
    out = site.folder / "lost"
    site.deploy("demo", "name=lost", f"out={out}", *TINY, "train.epochs=60", "checkpoint.every_steps=100", *ON_RAY)
    with site.worker() as worker:
        run = site.server.start("aepipe-pipeline/lost")
        wait_until(lambda: trains(out), "the run trains", 240, 0.1)
        processes = [worker.pid, *below(worker.pid)]
        for pid in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert site.server.state(run) == "Running"  # no process is left that could change it
    with site.worker():
        wait_until(lambda: site.server.state(run) in OVER, "the lost run is over", 400, POLL_S)
    states = site.server.states(run)
    assert states[-1] == "Completed", states
    assert states.count("Crashed") == 1
    site.server.run("pipelines.cli", "verify", out, "--read-data")


@pytest.mark.accept
@pytest.mark.ray
def test_a_cancelled_run_leaves_no_process_and_its_rerun_completes(site: Site) -> None:
    out = site.folder / "cancelled"
    site.deploy("demo", "name=cancelled", f"out={out}", *TINY, "train.epochs=150", "checkpoint.every_steps=100", *ON_RAY)
    with site.worker() as worker:
        run = site.server.start("aepipe-pipeline/cancelled")
        wait_until(lambda: trains(out), "the run trains", 240, 0.1)
        started = below(worker.pid)
        assert any("raylet" in command for command in started.values())
        site.server.run("prefect", "flow-run", "cancel", run)
        wait_until(lambda: site.server.state(run) == "Cancelled", "the run is cancelled", 240, POLL_S)
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in started), "its processes are gone", 120, 0.1)
        assert not below(worker.pid)
        again = site.server.start("aepipe-pipeline/cancelled")
        wait_until(lambda: site.server.state(again) in OVER, "the second run is over", 400, POLL_S)
        assert site.server.state(again) == "Completed"
        assert worker.end() == 0
    assert site.server.state(run) == "Cancelled"
    assert find_canary(CANARIES.values(), site.folder, site.ray) == [], "with what a Ray below a worker wrote"
    site.server.run("pipelines.cli", "verify", out, "--read-data")
