"""Which flow runs have a process on this machine: `aepipe serve` leaves those of another one alone."""

import os
import subprocess
import sys
import uuid

import pytest

from pipelines.deploy.crash_restart import run_ids_with_process

pytestmark = pytest.mark.prefect
WAIT = "import sys; print('ready', flush=True); sys.stdin.read()"


def test_a_run_has_a_process_while_its_engine_lives_whatever_else_has_its_environment() -> None:
    engine, other = str(uuid.uuid4()), str(uuid.uuid4())

    def started(word: str, run: str) -> "subprocess.Popen[bytes]":
        environment = os.environ | {"PREFECT__FLOW_RUN_ID": run}
        return subprocess.Popen([sys.executable, "-c", WAIT, word], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    with started("prefect.engine", engine) as first, started("raylet", other) as second:
        for process in (first, second):
            assert process.stdout is not None
            process.stdout.readline()
        found = run_ids_with_process()
        assert (engine in found, other in found) == (True, False)
        first.kill()
        first.wait(10)
        assert engine not in run_ids_with_process()
        second.kill()
