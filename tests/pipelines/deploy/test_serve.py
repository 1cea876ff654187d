"""The Prefect server that `aepipe serve` starts where none is named."""

import os
from pathlib import Path

import pytest

from pipelines.deploy.serve import local_server

pytestmark = pytest.mark.prefect


def test_a_server_of_our_own_is_the_one_that_prefect_talks_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL

    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    with local_server() as page:
        assert PREFECT_API_URL.value() == os.environ["PREFECT_API_URL"] == f"{page}/api"
        with get_client(sync_client=True) as client:
            assert str(client.api_url).rstrip("/") == f"{page}/api"
            assert client.api_healthcheck() is None
    assert "PREFECT_API_URL" not in os.environ
