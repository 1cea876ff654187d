"""`aepipe serve` against a real Prefect server on SQLite: a cron tick fires, the scheduled pipeline completes, verbs report to it."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.servers import Prefect, eventually
from tests.pipelines.processes import below
from tests.pipelines.shadows import folder_of_shadows, that_ran

SLOW = ("source.num_samples=600", "model.latent_dim=4", "backbone.hidden=[16]", "train.epochs=1000000")
TINY = ("source.num_samples=200", "splits.by=hash", "splits.test=0.2", "model.latent_dim=4", "backbone.hidden=[16]", "train.epochs=1")
HERE = "cluster.num_workers=0"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def ended(process: "subprocess.Popen[bytes]", how: signal.Signals = signal.SIGTERM) -> int:
    """End a process that this test started, and return its exit code."""
    if process.poll() is None:
        process.send_signal(how)
    try:
        return process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait(10)


def ask(api: str, path: str, **body: Any) -> Any:
    request = urllib.request.Request(f"{api}/{path}", json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as response:
        return json.load(response)


@pytest.fixture
def api(tmp_path: Path) -> Iterator[str]:
    """Give the API address of a Prefect server of our own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {"PREFECT_HOME": str(tmp_path / "server"), "PREFECT_SERVER_UI_API_URL": f"http://127.0.0.1:{port}/api"}
    with (tmp_path / "server.log").open("wb") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}/api"
    try:
        deadline = time.monotonic() + 90
        while True:
            assert server.poll() is None, (tmp_path / "server.log").read_text()
            assert time.monotonic() < deadline, "the server did not start"
            try:
                urllib.request.urlopen(f"{address}/health", timeout=2).close()
                break
            except OSError:
                time.sleep(0.3)
        yield address
    finally:
        ended(server)


def look_at_the_page(api: str, folder: Path) -> None:
    """Open Prefect's page of the runs in headless Chromium: it must name the flow, and the picture must show something."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no Chromium on this machine: all but Prefect's page was seen")
    picture = Path(os.environ.get("AECORE_PICTURES", folder)) / "prefect-runs.png"
    page = api.removesuffix("/api") + "/runs"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
    options += [
        "--disable-component-update",
        f"--user-data-dir={folder / 'browser'}",
        "--window-size=1280,900",
        "--virtual-time-budget=20000",
    ]
    subprocess.run([browser, *options, f"--screenshot={picture}", page], capture_output=True, timeout=90, check=True)
    shown = subprocess.run([browser, *options, "--dump-dom", page], capture_output=True, text=True, timeout=90, check=True).stdout
    assert "aepipe-pipeline" in shown
    from PIL import Image

    with Image.open(picture) as image:
        colours = image.convert("RGB").getcolors(1 << 24)
    assert colours is not None and len(colours) > 50, "the page is blank"


@pytest.mark.prefect
@pytest.mark.slow
def test_a_cron_tick_runs_the_pipeline_and_single_verbs_report(api: str, tmp_path: Path) -> None:
    environment = os.environ | {"PREFECT_API_URL": api, "PREFECT_HOME": str(tmp_path / "client")}
    aepipe = [sys.executable, "-m", "pipelines.cli"]
    out = tmp_path / "out"
    with (tmp_path / "serve.log").open("wb") as log:
        command = [*aepipe, "serve", "demo", f"out={out}", *TINY, HERE, "--cron", "* * * * *"]
        serving = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        verb = [*aepipe, "shard", "sprites", str(tmp_path / "alone"), *TINY[:3], HERE]
        subprocess.run(verb, env=environment, check=True, capture_output=True, timeout=90)
        runs = ask(api, "flow_runs/filter", flows={"name": {"any_": ["aepipe-shard"]}})
        assert [run["state"]["type"] for run in runs] == ["COMPLETED"]

        deadline, done = time.monotonic() + 130, []
        while not done and time.monotonic() < deadline:
            assert serving.poll() is None, (tmp_path / "serve.log").read_text()
            runs = ask(api, "flow_runs/filter", flows={"name": {"any_": ["aepipe-pipeline"]}})
            done = [run for run in runs if run["state"]["type"] in ("COMPLETED", "FAILED", "CRASHED")]
            time.sleep(0.5)
        log_text = (tmp_path / "serve.log").read_text()
        assert done, f"no cron tick fired: {log_text}"
        assert done[0]["state"]["type"] == "COMPLETED", log_text
        assert done[0]["auto_scheduled"]
        assert done[0]["parameters"]["recipe"]["out"] == str(out)
        assert (out / "table" / "table.000001.json").exists()
        served = {deployment["name"] for deployment in ask(api, "deployments/filter")}
        assert served == {"demo"}
        assert len(ask(api, "deployments/filter")) == 5
        look_at_the_page(api, tmp_path)
    finally:
        code = ended(serving, signal.SIGTERM)
    assert code == 0, (tmp_path / "serve.log").read_text()
    assert "never awaited" not in (tmp_path / "serve.log").read_text()


class Serving:
    """`aepipe serve` without PREFECT_API_URL, started in a folder; its server is the one that it starts."""

    def __init__(self, cwd: Path, home: Path, *overrides: str) -> None:
        self.log = home / "serve.log"
        home.mkdir(parents=True, exist_ok=True)
        self._record = home / "server.env"
        environment = os.environ | {"PREFECT_HOME": str(home)}
        for name in ("PYTHONSAFEPATH", "PREFECT_API_URL", "PREFECT_API_AUTH_STRING"):
            environment.pop(name, None)
        command = [sys.executable, "-m", "pipelines.cli", "serve", "demo", *overrides, HERE]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, env=environment, cwd=cwd, stdout=log, stderr=log)

    def server(self) -> Prefect:
        """Wait until the five deployments are there and return the server."""

        def ready() -> Prefect | None:
            assert self.process.poll() is None, self.log.read_text()
            if not self._record.exists():
                return None
            lines = dict(line.split("=", 1) for line in self._record.read_text().splitlines())
            found = Prefect(lines["PREFECT_API_URL"], lines["PREFECT_API_AUTH_STRING"], self.log, self.log.parent)
            try:
                return found if len(found.ask("deployments/filter")) == 5 else None
            except OSError:  # the record of a server that was killed
                return None

        return eventually("aepipe serve has made its deployments", ready, 150)

    def kill(self) -> None:
        """End it, its server and its runs as a power cut does."""
        pids = [self.process.pid, *below(self.process.pid)]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        self.process.wait(10)


@pytest.mark.prefect
@pytest.mark.slow
@pytest.mark.timeout(500)
def test_after_a_power_cut_a_run_starts_again_and_nothing_in_the_current_directory_is_imported(tmp_path: Path) -> None:
    here, home, deployment = folder_of_shadows(tmp_path / "here"), tmp_path / "prefect", "aepipe-pipeline/demo"
    serving = Serving(here, home, "out=./out", *SLOW)
    try:
        server = serving.server()
        first = server.start(deployment)
        eventually("the first run runs", lambda: server.state(first) == "Running", 120)
        second = server.start(deployment)
        eventually("a run beside it is refused", lambda: server.state(second) == "Cancelled", 60)
        eventually("it works in the user's folder", lambda: (here / "out" / "dataset" / "dataset.000001.json").exists(), 120)
    finally:
        serving.kill()

    serving = Serving(here, home, "out=./out", *SLOW)
    try:
        server = serving.server()
        eventually("the dead run is marked", lambda: server.states(first)[-2:] == ["Running", "Crashed"], 90)
        third = server.start(deployment)
        waits = ("Scheduled", "Late", "Pending", "Submitting")
        eventually("the next run has begun or is refused", lambda: server.state(third) not in waits, 120)
        assert server.state(third) == "Running", serving.log.read_text()[-3000:]
    finally:
        code = ended(serving.process, signal.SIGTERM)
    assert code == 0, serving.log.read_text()[-3000:]
    assert that_ran(here) == set()
    assert not (home / "server.env").exists(), "its server has ended with it"
