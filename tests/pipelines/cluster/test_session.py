"""Clusters that others started: used, limited in time, never shut down."""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from aecore.errors import ConfigError
from pipelines.cluster import session
from pipelines.cluster.session import cluster_address, import_environment, local_paths
from pipelines.doctor import _ray
from pipelines.doctor._check import run_checks
from pipelines.recipe.recipe import ClusterSpec
from tests.pipelines.shadows import folder_of_shadows, that_ran
from tests.processes import AEPIPE, Started, below, run, started

SPRITES = ("source.num_samples=60", "shards.max_samples=20", "cluster.num_workers=1", "cluster.timeout_s=60")
CLUSTER = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False, "object_store_memory": 80 << 20})
second = cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
print(cluster.address, flush=True)
sys.stdin.readline()
cluster.remove_node(second)
cluster.wait_for_nodes()
print("one node", flush=True)
sys.stdin.readline()
print("dead" if cluster.head_node.dead_processes() else "alive", flush=True)
cluster.shutdown()
"""

LOCAL = """
import os, sys
from pipelines.cluster.session import connect, disconnect
from pipelines.recipe.recipe import ClusterSpec
connect(ClusterSpec(num_workers=1))
import ray
modes = ray.get(ray.remote(num_cpus=0)(lambda: os.environ.get("RAY_AUTH_MODE")).remote()), os.environ["RAY_AUTH_MODE"]
print(*modes, os.environ["RAY_AUTH_TOKEN"], ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.readline()
disconnect()
"""
CLIENT = """
import sys
from pipelines.cluster.session import connect, disconnect
from pipelines.recipe.recipe import ClusterSpec
connect(ClusterSpec(kind="address", address=sys.argv[1]))
print("connected")
disconnect()
"""


@dataclass
class Other:
    """A Ray of two nodes on this machine that another process started."""

    process: Started

    def says(self, number: int) -> str:
        """Return line `number` of what it has printed, when it is there."""
        self.process.wait_for(lambda: self.process.out.count("\n") > number, f"line {number} of the cluster")
        return self.process.out.splitlines()[number]

    def order(self, number: int) -> str:
        """Let it go on, and return the line that it prints then."""
        orders = self.process.process.stdin
        assert orders is not None
        orders.write(b"\n")
        orders.flush()
        return self.says(number)


@pytest.fixture
def other_cluster() -> Iterator[Other]:
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:  # short: sockets lie in it
        environment = os.environ | {"RAY_TMPDIR": folder}
        with started([sys.executable, "-c", CLUSTER], env=environment, stdin=subprocess.PIPE) as process:
            yield Other(process)
            assert process.process.stdin is not None
            process.process.stdin.close()  # whatever it waits for: it goes on, and shuts its cluster down
            assert process.finish().returncode == 0


def shard(out: Path, address: str) -> "subprocess.CompletedProcess[str]":
    command = [*AEPIPE, "shard", "sprites", out, *SPRITES]
    return run(command, env=os.environ | {"RAY_ADDRESS": address})


@pytest.mark.ray
@pytest.mark.slow
def test_a_cluster_of_others_is_used_and_left_running_and_the_doctor_compares_it_with_what_the_recipe_asks_for(
    other_cluster: Other, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = other_cluster.says(0)
    refused = shard(tmp_path / "out", address)
    assert refused.returncode == 5, refused.stderr
    assert "the Ray cluster has 2 nodes, each with its own disk" in refused.stderr
    assert not list((tmp_path / "out").glob("dataset.*"))

    assert other_cluster.order(1) == "one node"
    done = shard(tmp_path / "out", address)
    assert done.returncode == 0, done.stderr
    assert "connected to Ray" in done.stderr
    assert "3 shards" in done.stdout
    doctor_compares(address, monkeypatch)
    assert other_cluster.order(2) == "alive"


def doctor_compares(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setenv("RAY_ADDRESS", address)
    found = {finding.name: finding for finding in run_checks(_ray.ray_checks(ClusterSpec(num_workers=2)))}
    assert {name: finding.state for name, finding in found.items()} == {"ray": "ok", "ray: resources": "ok"}, found
    assert f"Ray {ray.__version__} at " in found["ray"].message
    (_, short) = run_checks(_ray.ray_checks(ClusterSpec(num_workers=3000)))
    assert (short.state, short.exit_code) == ("failed", 5)
    assert "the recipe asks for 3000" in short.message


def test_a_cluster_without_an_address_and_a_job_server_as_one_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no address: add cluster.address=host:6379"):
        cluster_address(ClusterSpec(kind="address"))
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    with pytest.raises(ConfigError, match="RAY_ADDRESS=http://head:8265 is a job server: set cluster.kind=job"):
        cluster_address(ClusterSpec())
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert cluster_address(ClusterSpec()) == cluster_address(ClusterSpec(kind="address")) == ("head:6379", "RAY_ADDRESS")
    assert cluster_address(ClusterSpec(kind="address", address="auto")) == ("auto", "cluster.address")


def test_a_path_is_local_unless_it_lies_in_a_folder_that_all_nodes_see() -> None:
    shared = ClusterSpec(shared_paths=("/mnt/all",))
    urls = ("/mnt/all/out", "/mnt/alllocal", "/tmp/x", "s3://bucket/x", "")
    assert local_paths(shared, *urls) == ["/mnt/alllocal", "/tmp/x"]


@pytest.mark.ray
def test_an_address_where_nothing_listens_is_a_cluster_error(tmp_path: Path) -> None:
    done = shard(tmp_path / "out", "127.0.0.1:1")
    assert done.returncode == 5
    assert "cannot reach the Ray cluster at RAY_ADDRESS=127.0.0.1:1: nothing answers" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.ray
@pytest.mark.parametrize(("scheme", "with_config"), [("ray://", False), ("", True)])
def test_a_server_of_ray_clients_gets_no_job_config_for_which_it_would_import_ours(
    scheme: str, with_config: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    calls: list[dict[str, object]] = []
    monkeypatch.setattr(ray, "init", lambda **options: calls.append(options))
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "cluster_resources", dict)
    monkeypatch.setattr(session._Connection, "address", None)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"{scheme}127.0.0.1:{listening.getsockname()[1]}"
        session.connect(ClusterSpec(kind="address", address=address))
    assert [(call["address"], "job_config" in call) for call in calls] == [(address, with_config)]


@pytest.mark.ray
@pytest.mark.slow
def test_a_local_ray_has_a_token_of_its_own_without_which_no_client_connects() -> None:
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:  # short: sockets lie in it
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_")}
        environment |= {"RAY_TMPDIR": folder, "HOME": folder}
        with started([sys.executable, "-c", LOCAL], env=environment, stdin=subprocess.PIPE) as process:
            local = Other(process)
            *modes, token, address = local.says(0).split()
            assert (modes, len(token)) == (["token", "token"], 64)
            assert not [command for command in below(process.pid).values() if "monitor" in command], "nothing here reads what they say"
            clients = {
                "with it": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token},
                "another": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64},
                "none": {"RAY_AUTH_MODE": "disabled"},
            }
            with contextlib.ExitStack() as stack:
                command = [sys.executable, "-c", CLIENT, address]
                running = {name: stack.enter_context(started(command, env=environment | own)) for name, own in clients.items()}
                ended = {name: client.finish() for name, client in running.items()}
            assert ended["with it"].stdout == "connected\n", ended["with it"].stderr
            for name in ("another", "none"):
                assert ended[name].stdout == "", f"{name}: connected"
                assert "InvalidAuthToken" in ended[name].stderr and "cannot reach the Ray cluster" in ended[name].stderr
            assert not Path(folder, ".ray").exists(), "Ray's own token would be kept in a file"
            assert process.process.stdin is not None
            process.process.stdin.close()
            assert process.finish().returncode == 0


@pytest.mark.ray
@pytest.mark.slow
def test_nothing_in_the_current_directory_is_imported_by_a_verb_or_its_ray_workers(tmp_path: Path) -> None:
    here = folder_of_shadows(tmp_path / "here")
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:  # short: sockets lie in it
        environment = os.environ | {"RAY_TMPDIR": folder}
        environment.pop("PYTHONSAFEPATH", None)
        command = [sys.executable, "-m", "pipelines.cli", "shard", "sprites", "./out", *SPRITES, "cluster.resources_per_worker={CPU: 0.5}"]
        done = subprocess.run(command, env=environment, cwd=here, capture_output=True, text=True, timeout=200, check=False)
    assert that_ran(here) == set(), done.stderr[-3000:]
    assert done.returncode == 0, done.stderr[-3000:]
    assert (here / "out" / "dataset.000001.json").exists(), "a relative path is one of the user's directory"


def test_what_is_started_from_here_finds_our_packages_and_nothing_in_its_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here = folder_of_shadows(tmp_path / "here")
    monkeypatch.setenv("PYTHONPATH", ":" + os.environ["PYTHONPATH"])  # an empty part is the current directory
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    program = "import json, logging, random, token, numpy, aecore.errors, pipelines.recipe.recipe"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=here, env=os.environ | import_environment(), capture_output=True, text=True, check=False
    )
    assert (done.returncode, that_ran(here)) == (0, set()), done.stderr
