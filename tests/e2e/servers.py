"""Servers of our own for tests: PostgreSQL, Prefect on it with a password and CSRF protection, a Prefect worker.

PostgreSQL is the system's (Prefect needs its extension pg_trgm, which the wheels of PostgreSQL leave out) and refuses to run as root:
as root it runs as `nobody`, in a separate folder in /tmp. Only processes that were started here are ended, by their ids.
"""

import base64
import contextlib
import json
import os
import pwd
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.prefect_home import prefect_home
from tests.processes import WARM, Started, free_port, run, started

ROOT = Path(__file__).resolve().parent.parent.parent


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
        command = [programs / "postgres", "-D", home / "data", "-h", "127.0.0.1", "-p", str(port), "-k", home, "-c", "fsync=off"]
        # SIGINT is "fast": it does not wait for its clients
        with started(command, cwd="/", log=home / "log", how=signal.SIGINT, grace_s=30, **as_user) as server:
            ready = [programs / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port)]
            server.wait_for(lambda: subprocess.run(ready, check=False).returncode == 0, "PostgreSQL is ready")
            yield Postgres(programs, port, password)


@dataclass(frozen=True)
class Prefect:
    """A Prefect server, and how a client's environment looks."""

    url: str
    auth: str = field(repr=False)
    log: Path
    home: Path
    csrf: bool

    @property
    def environment(self) -> dict[str, str]:
        auth = {"PREFECT_API_AUTH_STRING": self.auth} if self.auth else {}
        return {"PREFECT_API_URL": self.url, "PREFECT_HOME": str(self.home / "client"), **auth}

    @property
    def _login(self) -> dict[str, str]:
        return {"authorization": f"Basic {base64.b64encode(self.auth.encode()).decode()}"} if self.auth else {}

    def ask(self, path: str, **body: Any) -> Any:
        """Ask the API as a client with the password and CSRF token that it wants."""
        headers = {**self._login, "content-type": "application/json"}
        if self.csrf:
            token = _read(f"{self.url}/csrf-token?client=tests", self._login)["token"]
            headers |= {"prefect-csrf-token": token, "prefect-csrf-client": "tests"}
        return _read(f"{self.url}/{path}", headers, json.dumps(body).encode())

    def runs(self, **filters: Any) -> list[dict[str, Any]]:
        return self.ask("flow_runs/filter", sort="START_TIME_ASC", **filters)

    def states(self, run_id: str) -> list[str]:
        """Return the names of all states of a flow run, the first one first."""
        states = _read(f"{self.url}/flow_run_states/?flow_run_id={run_id}", self._login)
        return [state["name"] for state in sorted(states, key=lambda state: state["timestamp"])]

    def state(self, run_id: str) -> str:
        return self.states(run_id)[-1]

    def start(self, deployment: str, **settings: Any) -> str:
        """Start a run of the deployment `flow/name` and return its id."""
        flow, _, name = deployment.partition("/")
        (found,) = self.ask("deployments/filter", flows={"name": {"any_": [flow]}}, deployments={"name": {"any_": [name]}})
        return str(self.ask(f"deployments/{found['id']}/create_flow_run", **settings)["id"])

    def run(self, *command: object, env: dict[str, str] | None = None, check: bool = True) -> "subprocess.CompletedProcess[str]":
        """Run a module of ours or Prefect's as a client of this server, from the project's root."""
        python = WARM if command[0] == "pipelines.cli" else (sys.executable,)
        return run([*python, "-m", *command], cwd=ROOT, env=os.environ | self.environment | (env or {}), check=check)


def _read(url: str, headers: dict[str, str], body: bytes | None = None) -> Any:
    """Ask as Prefect's own client does: a server on SQLite answers 503 while another connection writes, and has done nothing then."""
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=60) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code != 503 or time.monotonic() > deadline:
                raise
        time.sleep(1)


@contextlib.contextmanager
def prefect_server(home: Path, auth: str = "", settings: Mapping[str, str] | None = None) -> Iterator[Prefect]:
    """Start a Prefect server on SQLite, with a password if `auth` is one (`user:password`), and wait until it answers."""
    port = free_port()
    environment = os.environ | {
        "PREFECT_HOME": str(prefect_home(home / "server")),
        "PREFECT_SERVER_UI_API_URL": f"http://127.0.0.1:{port}/api",
        **({"PREFECT_SERVER_API_AUTH_STRING": auth, "PREFECT_API_AUTH_STRING": auth} if auth else {}),
        **(settings or {}),
    }
    (home / "client").mkdir(parents=True)
    csrf = environment.get("PREFECT_SERVER_CSRF_PROTECTION_ENABLED") == "true"
    made = Prefect(f"http://127.0.0.1:{port}/api", auth, home / "server.log", home, csrf)
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", port]
    with started(command, env=environment, log=made.log, grace_s=30) as server:
        server.wait_for(lambda: _answers(f"{made.url}/health"), "the Prefect server answers")
        yield made


def _answers(url: str) -> bool:
    """Return whether a server answers, a refusal included."""
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except urllib.error.HTTPError as refusal:
        refusal.close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def prefect_worker(server: Prefect, pool: str, log: Path, env: dict[str, str] | None = None) -> Iterator[Started]:
    """Start a Prefect worker of a pool, the leader of a process group of its own."""
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--type", "process"]
    with started(command, env=os.environ | server.environment | (env or {}), cwd=log.parent, log=log, grace_s=30) as worker:
        yield worker
