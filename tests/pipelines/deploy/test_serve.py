"""The Prefect servers that `aepipe serve` and `aepipe run` start: safe from other users of the machine."""

import base64
import contextlib
import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from aecore.errors import StoreError
from pipelines.cluster.process import is_alive, process_name
from pipelines.flows import server as server_module
from pipelines.flows.server import PROCESS, Server, lasting_server, temporary_server
from tests.pipelines.sockets import listeners
from tests.prefect_home import prefect_home
from tests.processes import below, wait_until

pytestmark = [pytest.mark.prefect, pytest.mark.slow]


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home for all servers of this module."""
    return prefect_home(tmp_path_factory.mktemp("module") / "prefect")


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, database: Path) -> Iterator[Path]:
    """A PREFECT_HOME of its own, and no server that the environment names."""
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(database))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setattr(server_module, "PORT", probe.getsockname()[1])
    from prefect.settings import temporary_settings

    with monkeypatch.context() as own, temporary_settings():  # a server that outlives another one leaves its address in both
        own.setattr(server_module._Temporary, "server", None)  # that of other tests has another home
        for name in ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING"):
            own.setenv(name, "")  # so that its absence is restored, whatever the test leaves
            os.environ.pop(name)
        yield database


class Stranger(http.server.BaseHTTPRequestHandler):
    """Says yes to everything, and remembers what it was asked."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(f"{self.command} {self.path} {self.headers.get('Authorization')}")
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'"3.8.8"')

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def stranger() -> Iterator[list[str]]:
    """Give the requests to another program on the default port."""
    handler = type("Handler", (Stranger,), {"asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", server_module.PORT), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield handler.asked
        server.shutdown()


def status(page: str, path: str, *, auth: str | None = None, method: str = "POST", **headers: str) -> tuple[int, str | None]:
    """Return how the server answers, and which other page may read the answer."""
    if auth is not None:
        headers["Authorization"] = f"Basic {base64.b64encode(auth.encode()).decode()}"
    request = urllib.request.Request(f"{page}/api/{path}", b"{}", {"content-type": "application/json", **headers}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.headers.get("access-control-allow-origin")
    except urllib.error.HTTPError as error:
        return error.code, error.headers.get("access-control-allow-origin")


@pytest.fixture
def no_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("no_umask")
def test_the_server_of_serve_is_the_one_that_prefect_talks_to_and_nobody_else_reads_or_changes_anything(home: Path) -> None:
    for name in ("prefect.db", "server.log"):  # of a version that let everybody read them
        (home / name).touch()
        (home / name).chmod(0o666)
    with lasting_server() as (server, is_new):
        assert is_new
        prefect_talks_to(server)
        assert f"PREFECT_API_AUTH_STRING={server.auth}\n" in (home / "server.env").read_text()
        with temporary_server() as temporary:
            for one in (server, temporary):
                changes_nothing_without_its_password(one)
                assert status(one.page, "csrf-token?client=x", auth=one.auth, method="GET")[0] == 200
            written = [path for path in home.rglob("*") if path.is_file()]
            assert {"prefect.db", "server.env", "server.log", "server.lock"} <= {path.name for path in written}
            assert [path for path in written if path.stat().st_mode & 0o077] == []
            assert (home / "empty").stat().st_mode & 0o777 == 0o700
    assert "PREFECT_API_URL" not in os.environ
    assert "PREFECT_API_AUTH_STRING" not in os.environ
    assert not (home / "server.env").exists()
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", server_module.PORT), timeout=2)


def prefect_talks_to(server: Server) -> None:
    """Assert that Prefect's client and the page ask this server, which is on the default port."""
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL

    assert server.page.endswith(f":{server_module.PORT}")
    assert PREFECT_API_URL.value() == os.environ["PREFECT_API_URL"] == f"{server.page}/api"
    with get_client(sync_client=True) as client:
        assert str(client.api_url).rstrip("/") == f"{server.page}/api"
        assert client.api_healthcheck() is None
        assert client.read_flow_runs() == []
    with urllib.request.urlopen(f"{server.page}/ui-settings", timeout=20) as answer:
        assert f"{server.page}/api".encode() in answer.read(), "the page asks its own server"


def changes_nothing_without_its_password(server: Server) -> None:
    """Assert what a server answers to strangers, where it listens, and that its password is on no command line."""
    for path in ("deployments/", "deployments/filter", "flow_runs/filter", "admin/database/clear"):
        assert status(server.page, path)[0] in (401, 403), path  # the missing token or the missing password, what is looked at first
        assert status(server.page, path, auth="admin:wrong")[0] in (401, 403), path
    for auth in (None, "admin:wrong"):
        assert status(server.page, "csrf-token?client=x", auth=auth, method="GET")[0] == 401, "no token without the password"
        assert status(server.page, "deployments/filter", auth=auth, method="GET")[0] == 401
    with_token = {"prefect-csrf-token": "x", "prefect-csrf-client": "x"}
    assert status(server.page, "deployments/filter", auth=server.auth)[0] == 403, "the page of another site has no token"
    assert status(server.page, "deployments/filter", auth=server.auth, **with_token)[0] == 403
    assert status(server.page, "deployments/filter", origin="http://evil.example")[1] is None
    process = int(server.process.partition(":")[0])
    found = list(listeners({process, *below(process)}))  # other tests of this process may have a Ray on another address
    assert {one.port for one in found} >= {int(server.page.rpartition(":")[2])}
    assert all(one.is_loopback for one in found), found
    secret = server.auth.partition(":")[2]
    assert not [command for command in below().values() if secret in command], "ps shows it to everybody"


@pytest.mark.parametrize("spoil", ["a link", "a folder that all can write"])
def test_no_server_is_started_in_a_home_that_others_could_have_filled(spoil: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    if spoil == "a link":
        (tmp_path / "elsewhere").chmod(0o777)
        (tmp_path / "home").symlink_to(tmp_path / "elsewhere")
    else:
        (tmp_path / "home").mkdir()
        (tmp_path / "home").chmod(0o777)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "home"))
    with pytest.raises(StoreError, match="set PREFECT_HOME to a folder of your own"), lasting_server():
        pass
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_stranger_on_the_port_gets_no_request_and_no_deployment(
    home: Path, stranger: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with lasting_server() as (server, is_new):
        assert is_new
        port = int(server.page.rpartition(":")[2])
        assert port != server_module.PORT
        assert f"port {server_module.PORT} is taken by another program: using port {port}" in caplog.text
        assert str(home / "server.env") in caplog.text, "how to log in"
        assert server.auth not in caplog.text
        assert server.answers(10)
    assert stranger == []


def test_a_stranger_on_the_port_of_a_dead_server_never_sees_its_password(home: Path, stranger: list[str]) -> None:
    page = f"http://127.0.0.1:{server_module.PORT}"
    for process in (process_name(os.getppid()), "4194305:1", f"{os.getpid()}:1"):
        (home / "server.env").write_text(f"PREFECT_API_URL={page}/api\nPREFECT_API_AUTH_STRING=admin:old\n{PROCESS}={process}\n")
        (home / "server.env").chmod(0o600)
        assert server_module._recorded(home / "server.env") is None
    assert stranger == []


def test_a_process_that_has_just_ended_listens_nowhere() -> None:
    assert server_module._listens("4194305:1", server_module.PORT) is False, "no such pid: its /proc is gone, as it is when it ends"


def test_a_second_serve_uses_the_server_of_the_first_and_may_outlive_it() -> None:
    with contextlib.ExitStack() as second:
        with lasting_server() as (server, _):
            joined, is_new = second.enter_context(lasting_server())
            assert not is_new
            assert joined == server
        assert joined.answers(10), "the first one has left"
    wait_until(lambda: not joined.answers(1), "the server ends with its last user", 30)


def test_a_server_ends_with_its_user_even_when_that_is_killed() -> None:
    program = """
import os
from pipelines.flows.server import temporary_server
with temporary_server() as server:
    print(server.process, flush=True)
    os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    wait_until(lambda: not is_alive(done.stdout.strip()), "the server is gone", 60)
