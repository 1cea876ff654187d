"""A cluster of two machines: two network namespaces of this one with a bridge, a Ray node in each; each has a folder of its own."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from aecore.checkpoint.files import newest_checkpoint
from aecore.store import open_store
from aecore.training.metrics import read_rows
from pipelines.recipe.recipe import load_recipe
from pipelines.steps.pipeline import run_stages
from pipelines.steps.steps import STEPS
from tests.pipelines.cluster.heads import RAY, Head, ray_head
from tests.pipelines.conftest import SMALL
from tests.processes import run, started

TINY = (*SMALL, "train.epochs=3", "model.latent_dim=4", "backbone.hidden=[16]", "train.global_batch=32", "checkpoint.every_steps=10")
NET, BRIDGE, SPACES = "10.213.77", "aebr7", ("aens71", "aens72")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


@contextlib.contextmanager
def two_machines() -> Iterator[tuple[str, str]]:
    """Make two network namespaces that see each other and this machine; gives their addresses."""
    if os.getuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    try:
        ip("link", "add", BRIDGE, "type", "bridge")
        ip("addr", "add", f"{NET}.1/24", "dev", BRIDGE)
        ip("link", "set", BRIDGE, "up")
        for number, space in enumerate(SPACES, 1):
            ip("netns", "add", space)
            ip("link", "add", f"aev7{number}", "type", "veth", "peer", "name", "eth0", "netns", space)
            ip("link", "set", f"aev7{number}", "master", BRIDGE, "up")
            ip("-n", space, "addr", "add", f"{NET}.1{number}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "eth0", "up")
            ip("-n", space, "link", "set", "lo", "up")
    except subprocess.CalledProcessError as error:
        remove()
        pytest.skip(f"no network namespaces here: {error.stderr.decode()}")
    try:
        yield f"{NET}.11", f"{NET}.12"
    finally:
        remove()


def remove() -> None:
    for words in (*(("netns", "del", space) for space in SPACES), ("link", "del", BRIDGE)):
        subprocess.run(["ip", *words], check=False, capture_output=True)


def inside(space: str, private: Path) -> list[str]:
    """Return the words that run a command in a namespace where the folder `private` is another, empty one."""
    return ["ip", "netns", "exec", space, "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(private)]


@contextlib.contextmanager
def cluster(monkeypatch: pytest.MonkeyPatch, private: Path) -> Iterator[Head]:
    """Start a head in one namespace and a second node in the other, one CPU each."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    monkeypatch.setenv("TMPDIR", str(private))  # where a driver puts what only its own node needs to see
    with two_machines() as (first, second), ray_head(1, inside(SPACES[0], private), first) as head:
        folder = Path(f"/tmp/aen{os.getpid()}")
        options = [f"--address={head.address}", f"--node-ip-address={second}", "--num-cpus=1", f"--object-store-memory={80 << 20}"]
        command = [*inside(SPACES[1], private), RAY, "start", "--block", "--disable-usage-stats", f"--temp-dir={folder}", *options]
        try:
            with started(command, env=head.environment, grace_s=3):
                yield head
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def losses(run: Path) -> list[float]:
    store = open_store(str(run))
    newest = newest_checkpoint(store)
    assert newest is not None
    return [row["loss"] for row in read_rows(store, newest.metrics)]


@pytest.mark.accept
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_job_trains_over_two_nodes_and_a_path_of_this_machine_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private, shared, alone = tmp_path / "private", tmp_path / "shared", tmp_path / "alone"
    private.mkdir()
    run_stages(load_recipe("demo", [f"out={alone}", *TINY, "cluster.num_workers=0"]), lambda name, part: STEPS[name](part))
    with cluster(monkeypatch, private) as head:
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        command = [sys.executable, "-m", "pipelines.cli", "submit", "demo", f"out={shared}", *TINY, f"cluster.address={head.dashboard}"]
        command += ["cluster.num_workers=2", f"cluster.python={sys.executable}", "--json"]
        refused = run(command, env=head.environment)
        assert refused.returncode == 5
        assert f"the job runs on {NET}.11, which has its own disk" in refused.stderr
        command.append(f"cluster.shared_paths=[{tmp_path}]")
        done = run(command, env=head.environment, timeout_s=400)
        assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["encode"]["rows"] == 384
    assert "2 CPU" in done.stderr, "both nodes were there, with one CPU each, so each had one of the two workers"
    assert losses(shared / "run") == pytest.approx(losses(alone / "run"), rel=1e-5)
    dataset = [{path.name: path.read_bytes() for path in root.glob("dataset/**/*.tar")} for root in (shared, alone)]
    assert dataset[0] == dataset[1]
