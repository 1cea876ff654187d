"""What ends the start of our own Prefect server is said in one line, with the exit code of its kind."""

import os
import signal
from pathlib import Path

import pytest

from aecore.errors import AecoreError, ClusterError, ServiceLost, StoreError
from pipelines.flows import server as module
from pipelines.flows.server import Server, temporary_server
from tests.pipelines.conftest import SMALL
from tests.prefect_home import prefect_home
from tests.processes import AEPIPE, run

TRACEBACK = """\
Traceback (most recent call last):
  File "x.py", line 1, in f
{error}
[SQL: BEGIN IMMEDIATE]
(Background on this error at: https://sqlalche.me/e/20/e3q8)

ERROR:    Application startup failed. Exiting.
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made = tmp_path / "home"
    made.mkdir(mode=0o700)
    monkeypatch.setenv("PREFECT_HOME", str(made))
    return made


@pytest.mark.parametrize(
    ("error", "status", "kind", "words"),
    [
        (
            "sqlalchemy.exc.OperationalError: (sqlite3.OperationalError) database is locked",
            3,
            StoreError,
            "database cannot be used (sqlalchemy.exc.OperationalError: (sqlite3.OperationalError) database is locked); end what else uses",
        ),
        ("sqlite3.DatabaseError: file is not a database", 3, StoreError, "(sqlite3.DatabaseError: file is not a database)"),
        ("OSError: [Errno 12] Cannot allocate memory", 1, ClusterError, "not enough memory here (OSError: [Errno 12] Cannot allocate"),
        ("MemoryError", 1, ClusterError, "not enough memory here (MemoryError)"),
        ("", -signal.SIGKILL, ClusterError, "not enough memory here (it was killed)"),
        ("OSError: [Errno 98] Address already in use", 1, ClusterError, "started (OSError: [Errno 98] Address already in use), see "),
        ("ModuleNotFoundError: No module named '\x1b[31m'", 1, ClusterError, r"No module named '\x1b[31m')"),
        ("", None, ClusterError, "did not start in 120 s, see "),
    ],
)
def test_the_reason_is_that_of_the_servers_log(home: Path, error: str, status: int | None, kind: type[AecoreError], words: str) -> None:
    log = home / "run.log"
    log.write_text(TRACEBACK.format(error=error) if error else "")
    said = module._not_started(status, log)
    assert type(said) is kind and words in str(said) and str(home) in str(said) + str(log)
    assert "\n" not in str(said)


def test_a_server_that_loses_its_room_while_it_is_used_is_a_fault_of_the_disk(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running = Server("http://127.0.0.1:1", "admin:x", "0:0")
    monkeypatch.setattr(module._Temporary, "server", running)
    monkeypatch.setattr(module, "is_alive", lambda process: True)
    monkeypatch.setattr(Server, "answers", lambda self, timeout_s: True)
    lost = ServiceLost("http://127.0.0.1:1/api/logs answered 500")
    with pytest.raises(ServiceLost), temporary_server():
        raise lost
    monkeypatch.setattr(module, "_home", lambda: Path("/proc/self"))  # no file can be made there
    with (
        pytest.raises(StoreError, match="the Prefect server stopped working: its files in PREFECT_HOME=/proc/self cannot be written"),
        temporary_server(),
    ):
        raise lost
    with pytest.raises(ZeroDivisionError), temporary_server():
        raise ZeroDivisionError


@pytest.mark.prefect
@pytest.mark.slow
def test_a_pipeline_whose_server_has_no_room_says_so(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk: no file of the server can grow."""
    home = prefect_home(tmp_path / "home")
    command = [*AEPIPE, "run", "demo", f"out={tmp_path}/out", *SMALL, "cluster.num_workers=0"]
    done = run(["sh", "-c", 'ulimit -f 128; exec "$@"', "sh", *command], env={**os.environ, "PREFECT_HOME": str(home)})
    assert done.returncode == 4, done.stderr[-3000:]
    assert f"its files in PREFECT_HOME={home} cannot be written (File too large)" in done.stderr
    assert "raise the limit of file sizes (ulimit -f)" in done.stderr and "Traceback" not in done.stderr
    assert not list(home.glob("room-*"))


@pytest.mark.prefect
@pytest.mark.long
def test_a_pipeline_whose_servers_database_is_damaged_says_so(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    (home / "prefect.db").write_bytes(b"x" * 8192)
    command = [*AEPIPE, "run", "demo", f"out={tmp_path}/out", *SMALL, "cluster.num_workers=0"]
    done = run(command, env={**os.environ, "PREFECT_HOME": str(home)})
    assert done.returncode == 4, done.stderr[-3000:]
    assert "file is not a database" in done.stderr and f"PREFECT_HOME={home}" in done.stderr and "Traceback" not in done.stderr
