"""Serve all flows from this process: runs are started by cron, from Prefect's page, or by `prefect deployment run`.

Needs neither pool nor worker: right for one machine. Each recipe becomes one deployment per flow, with the recipe as its parameter;
the pipeline gets the schedule. Without PREFECT_API_URL a server is started for as long as we serve, on loopback, with its SQLite
file under PREFECT_HOME: the temporary server that a single flow gets has no scheduler, so cron ticks would never fire.
"""

import contextlib
import logging
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from aecore.errors import ClusterError
from pipelines.cluster.session import make_importable
from pipelines.config import Recipe
from pipelines.deploy.recipes import check, deployments, schedule
from pipelines.flows import require_server, set_defaults

logger = logging.getLogger(__name__)
SERVER_TIMEOUT_S = 120.0
PORT = 4200  # Prefect's own; another free one if it is taken


def serve(recipes: Sequence[Recipe], cron: str | None = None) -> None:
    """Serve until interrupted, which is no failure. `cron` overrides `schedule.cron`; ConfigError if a recipe could never run."""
    check(recipes, cron, "serve")
    set_defaults()
    for recipe in recipes:
        schedule(recipe, cron)  # refuses a wrong one before a server is started
    make_importable()  # scheduled runs are processes of their own
    with contextlib.ExitStack() as stack:
        if not os.environ.get("PREFECT_API_URL"):
            stack.enter_context(local_server())
        require_server()
        import prefect

        wanted: Sequence[Recipe | None] = recipes or [None]
        # Prefect's own handler of SIGTERM forgets to await it; the runner stops all the same
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "coroutine 'Runner.astop' was never awaited", RuntimeWarning)
        prefect.serve(*[deployment for recipe in wanted for deployment in deployments(recipe, cron)])


@contextlib.contextmanager
def local_server() -> Iterator[str]:
    """Start a Prefect server on loopback, set PREFECT_API_URL to it, end it at the end; yields the address of its page."""
    port = _free_port()
    page = f"http://127.0.0.1:{port}"
    log = Path(os.environ["PREFECT_HOME"]) / "server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
        environment = os.environ | {"PREFECT_SERVER_UI_API_URL": f"{page}/api"}  # the page asks port 4200 unless it is told otherwise
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        _wait_for(page, server, log)
        os.environ["PREFECT_API_URL"] = f"{page}/api"
        logger.warning("Prefect server at %s (its log: %s)", page, log)
        from prefect.settings import PREFECT_API_URL, temporary_settings

        with temporary_settings({PREFECT_API_URL: f"{page}/api"}):  # who imported prefect before has settings without it
            yield page
    finally:
        os.environ.pop("PREFECT_API_URL", None)
        server.terminate()
        try:
            server.wait(timeout=20)
        except subprocess.TimeoutExpired:
            server.kill()


def _wait_for(page: str, server: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + SERVER_TIMEOUT_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{page}/api/health", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise ClusterError(f"the Prefect server did not start in {SERVER_TIMEOUT_S:.0f} s, see {log}; or set PREFECT_API_URL to a running one")


def _free_port() -> int:
    for port in (PORT, 0):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    raise ClusterError("no free port on 127.0.0.1 for a Prefect server: set PREFECT_API_URL to a running one")
