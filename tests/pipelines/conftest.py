"""One local Ray, and small artefacts that only readers use."""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.cluster.session import connect, disconnect
from pipelines.recipe.recipe import ClusterSpec
from tests.leftovers import collect_in_silence
from tests.processes import below

SMALL = ("source.num_samples=384", "splits.by=hash", "splits.test=0.1", "shards.max_samples=100")


@pytest.fixture(scope="package")  # an idle Ray works too
def two_workers() -> Iterator[ClusterSpec]:
    """Give a cluster section for two workers of a local Ray that fits on any machine."""
    cluster = ClusterSpec(num_workers=2, resources_per_worker={"CPU": min(1.0, (os.cpu_count() or 1) / 2)})
    _connect_patiently(cluster)
    yield cluster
    disconnect()


def _connect_patiently(cluster: ClusterSpec, tries: int = 4) -> None:
    """Start the local Ray, again where its processes were not up in the 30 s that Ray 2.60 allows them (no setting: `node.py`)."""
    import ray

    while True:
        before = set(below())
        try:
            return connect(cluster)
        except Exception as error:
            tries -= 1
            if not tries or "timed out during startup" not in str(error):
                raise
        ray.shutdown()
        for pid in set(below()) - before:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        collect_in_silence()


@pytest.fixture(scope="session")
def sprites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a dataset of 384 sprites in five shards (train and test); tests only read it."""
    from pipelines.recipe.recipe import load_recipe
    from pipelines.steps.steps import shard

    out = tmp_path_factory.mktemp("sprites") / "dataset"
    shard(load_recipe(None, [f"out={out}", "source.kind=sprites", *SMALL, "cluster.num_workers=0"]))
    return out
