"""PREFECT_HOME with a database that exists already: making one takes a Prefect server seven seconds of CPU."""

import fcntl
import os
import shutil
import sys
from pathlib import Path

from tests.processes import run

SHARED = "SHARED_BY_TESTS"  # a folder of one test run, for all its processes


def prefect_home(home: Path) -> Path:
    """Make `home`, with a database of its own that is a copy of one made once in a test run; return it."""
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    shared = Path(os.environ[SHARED]) / "prefect"
    shared.mkdir(exist_ok=True)
    with (shared / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "prefect.db").exists():
            made = shared / "made"
            command = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "-y"]
            run(command, cwd=shared, env={**os.environ, "PREFECT_HOME": str(made)}, check=True)
            (made / "prefect.db").rename(shared / "prefect.db")
    if not (home / "prefect.db").exists():
        shutil.copyfile(shared / "prefect.db", home / "prefect.db")
        (home / "prefect.db").chmod(0o600)
    return home
