"""Which flow runs have a process on this machine: `aepipe serve` leaves those of another one alone."""

import contextlib
import os
import signal
import subprocess
import sys
import uuid

import pytest

from pipelines.deploy.crash_restart import run_ids_with_process
from tests.processes import Started, started

pytestmark = pytest.mark.prefect
WAIT = "import sys; print('ready', flush=True); sys.stdin.read()"


def test_a_run_has_a_process_while_its_engine_lives_whatever_else_has_its_environment() -> None:
    engine, other = str(uuid.uuid4()), str(uuid.uuid4())

    def waiting(word: str, run: str) -> "contextlib.AbstractContextManager[Started]":
        return started([sys.executable, "-c", WAIT, word], env=os.environ | {"PREFECT__FLOW_RUN_ID": run}, stdin=subprocess.PIPE)

    with waiting("prefect.engine", engine) as first, waiting("raylet", other) as second:
        for process in (first, second):
            process.wait_for("ready")
        found = run_ids_with_process()
        assert (engine in found, other in found) == (True, False)
        first.end(signal.SIGKILL)
        assert engine not in run_ids_with_process()
