"""Clusters that others started: used, limited in time, never shut down."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from aecore.errors import ConfigError
from pipelines.cluster.session import cluster_address, local_paths
from pipelines.config import ClusterSpec
from tests.processes import Started, run, started

SPRITES = ("source.num_samples=60", "shards.max_samples=20", "cluster.num_workers=2", "cluster.timeout_s=60")
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
    command = [sys.executable, "-m", "pipelines.cli", "shard", "sprites", out, *SPRITES]
    return run(command, env=os.environ | {"RAY_ADDRESS": address})


@pytest.mark.ray
@pytest.mark.slow
def test_a_cluster_of_others_is_used_and_left_running(other_cluster: Other, tmp_path: Path) -> None:
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
    assert other_cluster.order(2) == "alive"


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
