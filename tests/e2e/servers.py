"""Servers of our own for tests: PostgreSQL, Prefect on it with a password and CSRF protection, a Prefect worker.

PostgreSQL is the system's (Prefect needs its extension pg_trgm, which the wheels of PostgreSQL leave out) and refuses to run as root:
as root it runs as `nobody`, in a folder of its own in /tmp. Everything is ended by its process, and only what was started here.
"""

import base64
import contextlib
import json
import os
import pwd
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ended(process: "subprocess.Popen[bytes]", how: signal.Signals = signal.SIGTERM, timeout_s: float = 30) -> int:
    """End a process that a test started, and return its exit code."""
    if process.poll() is None:
        process.send_signal(how)
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait(10)


def eventually(what: str, found: Callable[[], Any], timeout_s: float, every_s: float = 0.3) -> Any:
    """Return the first true answer of `found`; AssertionError that says `what` did not happen in time."""
    deadline = time.monotonic() + timeout_s
    while not (answer := found()):
        assert time.monotonic() < deadline, f"not in {timeout_s:.0f} s: {what}"
        time.sleep(every_s)
    return answer


@dataclass(frozen=True)
class Postgres:
    """A PostgreSQL with one user, who needs the password."""

    programs: Path
    port: int
    password: str = field(repr=False)

    @property
    def url(self) -> str:
        return f"postgresql+asyncpg://prefect:{self.password}@127.0.0.1:{self.port}/postgres"

    def dump(self) -> str:
        """Return all of its tables as SQL text."""
        command = [self.programs / "pg_dumpall", "-h", "127.0.0.1", "-p", str(self.port), "-U", "prefect"]
        return subprocess.run(command, env={"PGPASSWORD": self.password}, capture_output=True, text=True, check=True).stdout


def postgres_programs() -> Path:
    """Return the folder of PostgreSQL's programs; a skip where there are none with the extension that Prefect needs."""
    for programs in sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name), reverse=True):
        extension = Path("/usr/share/postgresql") / programs.parent.name / "extension" / "pg_trgm.control"
        if extension.exists() and (programs / "initdb").exists():
            return programs
    pytest.skip("no PostgreSQL with pg_trgm on this machine (Debian: sudo apt-get install postgresql)")


@contextlib.contextmanager
def postgres(password: str) -> Iterator[Postgres]:
    """Start a PostgreSQL on loopback; its data are removed at the end."""
    programs = postgres_programs()
    with tempfile.TemporaryDirectory(prefix="aepipe-pg-", ignore_cleanup_errors=True) as name:
        home, as_user = Path(name), dict[str, Any]()
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            as_user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            os.chown(home, nobody.pw_uid, nobody.pw_gid)
        secret = home / "password"
        secret.write_text(password)
        if as_user:
            os.chown(secret, as_user["user"], as_user["group"])
        secret.chmod(0o600)
        init = [programs / "initdb", "-D", home / "data", "-U", "prefect", "--pwfile", secret, "--auth=scram-sha-256"]
        subprocess.run([*init, "--encoding=utf8", "--locale=C", "--no-sync"], cwd="/", check=True, capture_output=True, **as_user)
        port = free_port()
        with (home / "log").open("wb") as log:
            command = [programs / "postgres", "-D", home / "data", "-h", "127.0.0.1", "-p", str(port), "-k", home, "-c", "fsync=off"]
            server = subprocess.Popen(command, cwd="/", stdout=log, stderr=log, **as_user)
        try:
            ready = [programs / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port)]
            eventually("PostgreSQL is ready", lambda: subprocess.run(ready, check=False).returncode == 0, 30, 0.1)
            yield Postgres(programs, port, password)
        finally:
            ended(server, signal.SIGINT)  # "fast": it does not wait for its clients


@dataclass(frozen=True)
class Prefect:
    """A Prefect server, and how a client's environment looks."""

    url: str
    auth: str = field(repr=False)
    log: Path
    home: Path

    @property
    def environment(self) -> dict[str, str]:
        return {"PREFECT_API_URL": self.url, "PREFECT_API_AUTH_STRING": self.auth, "PREFECT_HOME": str(self.home / "client")}

    def ask(self, path: str, **body: Any) -> Any:
        """Ask the API as a client with password and CSRF token."""
        login = {"authorization": f"Basic {base64.b64encode(self.auth.encode()).decode()}"}
        token = _read(f"{self.url}/csrf-token?client=tests", login)["token"]
        headers = {**login, "content-type": "application/json", "prefect-csrf-token": token, "prefect-csrf-client": "tests"}
        return _read(f"{self.url}/{path}", headers, json.dumps(body).encode())

    def runs(self, **filters: Any) -> list[dict[str, Any]]:
        return self.ask("flow_runs/filter", sort="START_TIME_ASC", **filters)

    def states(self, run_id: str) -> list[str]:
        """Return the names of all states of a flow run, the first one first."""
        login = {"authorization": f"Basic {base64.b64encode(self.auth.encode()).decode()}"}
        states = _read(f"{self.url}/flow_run_states/?flow_run_id={run_id}", login)
        return [state["name"] for state in sorted(states, key=lambda state: state["timestamp"])]

    def state(self, run_id: str) -> str:
        return self.states(run_id)[-1]

    def start(self, deployment: str, **settings: Any) -> str:
        """Start a run of the deployment `flow/name` and return its id."""
        flow, _, name = deployment.partition("/")
        (found,) = self.ask("deployments/filter", flows={"name": {"any_": [flow]}}, deployments={"name": {"any_": [name]}})
        return str(self.ask(f"deployments/{found['id']}/create_flow_run", **settings)["id"])

    def run(self, *command: object, env: dict[str, str] | None = None, check: bool = True) -> "subprocess.CompletedProcess[str]":
        """Run a command as a client of this server, from the project's root."""
        environment = os.environ | self.environment | (env or {})
        done = subprocess.run(
            [sys.executable, "-m", *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0 or not check, f"{command}: {done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done


def _read(url: str, headers: dict[str, str], body: bytes | None = None) -> Any:
    with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=20) as answer:
        return json.load(answer)


@contextlib.contextmanager
def prefect_server(database: str, auth: str, home: Path) -> Iterator[Prefect]:
    """Start a Prefect server as infra/ does: basic auth and CSRF protection on, leases that outlive a restart."""
    port = free_port()
    settings = {
        "PREFECT_HOME": str(home / "server"),
        "PREFECT_API_DATABASE_CONNECTION_URL": database,
        "PREFECT_SERVER_API_AUTH_STRING": auth,
        "PREFECT_API_AUTH_STRING": auth,
        "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "PREFECT_SERVER_UI_API_URL": f"http://127.0.0.1:{port}/api",
    }
    (home / "server").mkdir(parents=True)
    (home / "client").mkdir(parents=True)
    made = Prefect(f"http://127.0.0.1:{port}/api", auth, home / "server.log", home)
    with made.log.open("wb") as log:
        command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
        server = subprocess.Popen(command, env=os.environ | settings, stdout=log, stderr=log)

    def answers() -> bool:
        assert server.poll() is None, made.log.read_text()[-5000:]
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{made.url}/health", timeout=2).close()
            return True
        return False

    try:
        eventually("the Prefect server answers", answers, 120)
        yield made
    finally:
        ended(server)


@contextlib.contextmanager
def prefect_worker(server: Prefect, pool: str, log: Path, env: dict[str, str] | None = None) -> Iterator["subprocess.Popen[bytes]"]:
    """Start a Prefect worker of a pool, the leader of a process group of its own."""
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--type", "process"]
    with log.open("ab") as output:
        worker = subprocess.Popen(
            command, env=os.environ | server.environment | (env or {}), stdout=output, stderr=output, cwd=log.parent, start_new_session=True
        )
    try:
        yield worker
    finally:
        ended(worker)
