"""One Ray head with a job server for all tests that need one."""

from collections.abc import Iterator

import pytest

from tests.pipelines.cluster.heads import Head, ray_head


@pytest.fixture(scope="package")  # an idle Ray works too
def head() -> Iterator[Head]:
    """Give a head on this machine with four logical CPUs and a token of its own."""
    with ray_head() as started:
        yield started
