"""`aepipe serve` against a real Prefect server on SQLite: a cron tick fires, the scheduled pipeline completes, verbs report to it."""

import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.deploy.recipes import FLOWS
from tests.e2e.servers import Prefect, prefect_server
from tests.pipelines.shadows import folder_of_shadows, that_ran
from tests.prefect_home import prefect_home
from tests.processes import AEPIPE, Started, run, started, wait_until

SLOW = ("source.num_samples=600", "model.latent_dim=4", "backbone.hidden=[16]", "train.epochs=1000000")
TINY = ("source.num_samples=200", "splits.by=hash", "splits.test=0.2", "model.latent_dim=4", "backbone.hidden=[16]", "train.epochs=1")
HERE = "cluster.num_workers=0"
POLL_S = 1.0  # each look is a request or two that the server works for
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Prefect]:
    """Give a Prefect server of our own."""
    with prefect_server(tmp_path) as started_server:
        yield started_server


def look_at_the_page(server: Prefect, folder: Path) -> None:
    """Open Prefect's page of the runs in headless Chromium: it must name the flow, and the picture must show something."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no Chromium on this machine: all but Prefect's page was seen")
    picture = Path(os.environ.get("AECORE_PICTURES", folder)) / "prefect-runs.png"
    page = server.url.removesuffix("/api") + "/runs"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
    options += [
        "--disable-component-update",
        f"--user-data-dir={folder / 'browser'}",
        "--window-size=1280,900",
        "--virtual-time-budget=20000",
    ]
    shown = run([browser, *options, f"--screenshot={picture}", "--dump-dom", page], check=True).stdout
    assert "aepipe-pipeline" in shown
    from PIL import Image

    with Image.open(picture) as image:
        colours = image.convert("RGB").getcolors(1 << 24)
    assert colours is not None and len(colours) > 50, "the page is blank"


@pytest.mark.prefect
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_cron_tick_runs_the_pipeline_and_single_verbs_report(server: Prefect, tmp_path: Path) -> None:
    environment = os.environ | server.environment
    out, log = tmp_path / "out", tmp_path / "serve.log"
    with started(
        [*AEPIPE, "serve", "demo", f"out={out}", *TINY, HERE, "--cron", "* * * * *"],
        env=environment,
        log=log,
        grace_s=60,
    ) as serving:
        run([*AEPIPE, "shard", "sprites", tmp_path / "alone", *TINY[:3], HERE], env=environment, check=True)
        runs = server.runs(flows={"name": {"any_": ["aepipe-shard"]}})
        assert [run["state"]["type"] for run in runs] == ["COMPLETED"]

        def over() -> list[dict[str, Any]]:
            runs = server.runs(flows={"name": {"any_": ["aepipe-pipeline"]}})
            return [run for run in runs if run["state"]["type"] in ("COMPLETED", "FAILED", "CRASHED")]

        done = serving.wait_for(over, "a cron tick fired and its run is over", 240, POLL_S)
        assert done[0]["state"]["type"] == "COMPLETED", serving.out
        assert done[0]["auto_scheduled"]
        assert done[0]["parameters"]["recipe"]["out"] == str(out)
        assert (out / "table" / "table.000001.json").exists()
        served = {deployment["name"] for deployment in server.ask("deployments/filter")}
        assert served == {"demo"}
        assert len(server.ask("deployments/filter")) == len(FLOWS)
        look_at_the_page(server, tmp_path)
        serving.send(signal.SIGTERM)
        assert serving.finish(60).returncode == 0, serving.out
        assert "never awaited" not in serving.out


class Serving:
    """`aepipe serve` without PREFECT_API_URL, started in a folder; its server is the one that it starts."""

    def __init__(self, process: Started, home: Path) -> None:
        self.process, self._home = process, home

    def server(self) -> Prefect:
        """Wait until all deployments are there and return the server."""

        def ready() -> Prefect | None:
            record = self._home / "server.env"
            if not record.exists():
                return None
            lines = dict(line.split("=", 1) for line in record.read_text().splitlines())
            found = Prefect(lines["PREFECT_API_URL"], lines["PREFECT_API_AUTH_STRING"], self._home / "serve.log", self._home, csrf=True)
            try:
                return found if len(found.ask("deployments/filter")) == len(FLOWS) else None
            except OSError:  # the record of a server that was killed
                return None

        return self.process.wait_for(ready, "aepipe serve has made its deployments", 150, POLL_S)  # type: ignore[return-value]

    def kill(self) -> None:
        """End it, its server and its runs as a power cut does."""
        self.process.end(signal.SIGKILL)


@contextlib.contextmanager
def serving(cwd: Path, home: Path, *overrides: str) -> Iterator[Serving]:
    """Start `aepipe serve demo` in a folder, with a Prefect home of its own."""
    environment = os.environ | {"PREFECT_HOME": str(prefect_home(home))}
    for name in ("PYTHONSAFEPATH", "PREFECT_API_URL", "PREFECT_API_AUTH_STRING"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "pipelines.cli", "serve", "demo", *overrides, HERE]
    with started(command, env=environment, cwd=cwd, log=home / "serve.log", grace_s=60) as process:
        yield Serving(process, home)


@pytest.mark.prefect
@pytest.mark.slow
@pytest.mark.timeout(500)
def test_after_a_power_cut_a_run_starts_again_and_nothing_in_the_current_directory_is_imported(tmp_path: Path) -> None:
    here, home, deployment = folder_of_shadows(tmp_path / "here"), tmp_path / "prefect", "aepipe-pipeline/demo"
    with serving(here, home, "out=./out", *SLOW) as serve:
        server = serve.server()
        first = server.start(deployment)
        wait_until(lambda: server.state(first) == "Running", "the first run runs", every_s=POLL_S)
        second = server.start(deployment)
        wait_until(lambda: server.state(second) == "Cancelled", "a second run at the same time is refused", every_s=POLL_S)
        wait_until((here / "out" / "dataset" / "dataset.000001.json").exists, "it works in the user's folder")
        serve.kill()

    with serving(here, home, "out=./out", *SLOW) as serve:
        server = serve.server()
        wait_until(lambda: "Crashed" in server.states(first), "the dead run is marked", every_s=POLL_S)
        third = server.start(deployment)
        waits = ("Scheduled", "Late", "Pending", "Submitting")
        wait_until(lambda: server.state(third) not in waits, "the next run has begun or is refused", every_s=POLL_S)
        assert server.state(third) == "Running", serve.process.tail()
        serve.process.send(signal.SIGTERM)
        assert serve.process.finish(90).returncode == 0, serve.process.tail()
    assert that_ran(here) == set()
    assert not (home / "server.env").exists(), "its server has ended with it"
