"""Nodes that die and do not come back: their parts are made elsewhere, or the run ends and says why."""

import os
import sys
import tempfile
from pathlib import Path

import pytest

from tests.accept.test_acceptance import ROOT
from tests.processes import run

pytestmark = [pytest.mark.accept, pytest.mark.timeout(300)]
SCRIPT = """
import functools, sys, threading, time
from pathlib import Path
from ray.cluster_utils import Cluster
from aecore.errors import ClusterError
from aecore.artifact.fanout import collect
from aecore.artifact.commit import PartRecord
from pipelines.cluster.fanout import ray_fan_out
from pipelines.cluster.session import disconnect
from pipelines.recipe.recipe import ClusterSpec
from tests.pipelines.cluster.test_fanout import Job

folder = Path(sys.argv[1])

class Slow:
    def __init__(self, folder):
        self.folder = folder

    def __call__(self, task):
        (self.folder / f"{task.stem}-{time.monotonic_ns()}").touch()
        time.sleep(2)
        return lambda: PartRecord(task.stem, (), 1)

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": 80 << 20})
nodes = [cluster.add_node(num_cpus=1, object_store_memory=80 << 20) for _ in range(2)]

def lose(node, begun):
    while len(list(folder.iterdir())) < begun:
        time.sleep(0.1)
    cluster.remove_node(node, allow_graceful=False)

def run(names, num_workers, begun):
    losing = threading.Thread(target=lose, args=(nodes.pop(), begun))
    losing.start()
    spec = ClusterSpec(kind="address", address=cluster.address, num_workers=num_workers, timeout_s=8)
    records = collect(ray_fan_out(spec), functools.partial(Slow, folder), [Job(name) for name in names])
    losing.join()
    return [record.part for record in records]

print("RESULT", run("abcd", 2, 2), flush=True)
try:
    print("RESULT", run("ef", 1, len(list(folder.iterdir())) + 1), flush=True)
except ClusterError as error:
    print("RESULT", error, flush=True)
disconnect()
cluster.shutdown()
"""


def test_parts_of_a_lost_node_are_made_on_the_others_and_without_any_the_run_ends(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as short:
        done = run([sys.executable, "-c", SCRIPT, tmp_path], env=os.environ | {"RAY_TMPDIR": short, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-3000:]
    made, lost = (line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT "))
    assert made == "['a', 'b', 'c', 'd']"
    assert lost.startswith("the cluster has lost its nodes: for 8 s none of 1 could hold a worker of 1 CPU")
    tries = [len(list(tmp_path.glob(f"{name}-*"))) for name in "abcd"]
    assert sorted(tries)[:3] == [1, 1, 1], "only what the lost node was making is made again"
