"""One local Ray and one Prefect home for all tests of the pipelines."""

import os
from collections.abc import Iterator

import pytest

from pipelines.cluster.session import connect, disconnect
from pipelines.config import ClusterSpec


@pytest.fixture(scope="session", autouse=True)
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep Prefect's database out of the user's home, and servers and clusters of the user out of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(tmp_path_factory.mktemp("prefect")))
        for name in ("PREFECT_API_URL", "RAY_ADDRESS"):
            patch.delenv(name, raising=False)
        patch.setenv("RAY_AUTH_MODE", "disabled")
        yield


@pytest.fixture(scope="session")
def two_workers() -> Iterator[ClusterSpec]:
    """Give a cluster section for two workers of a local Ray that fits on any machine."""
    cluster = ClusterSpec(num_workers=2, resources_per_worker={"CPU": min(1.0, (os.cpu_count() or 1) / 2)})
    connect(cluster)
    yield cluster
    disconnect()
