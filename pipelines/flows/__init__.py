"""Prefect flows of the steps: with `deploy`, the only packages that import prefect.

Parameters and results are plain JSON (a recipe's tree, a summary): no sample bytes, no credentials. Defaults of Prefect's settings
are set here, before its first import: a separate home, so that another program's Prefect is not affected, and no telemetry.
"""

import os
import urllib.error
import urllib.request
from pathlib import Path

from aecore.errors import ClusterError, ConfigError, read_error
from aecore.store import make_private, name_torch_cache
from pipelines.cluster.job_client import refuse_secrets

_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
SETTINGS = {
    "PREFECT_HOME": str(_CACHE / "aepipe" / "prefect"),
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",  # seconds, the shortest that Prefect takes; `deploy/crash_restart.py` waits for three
    "PREFECT_LOGGING_EXTRA_LOGGERS": "aecore,pipelines",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",  # threads log outside of a run, which would be a warning per line
    "PREFECT_SERVER_EPHEMERAL_ENABLED": "false",  # Prefect's own temporary server has no password: `server.py` starts one that has
    "PYTHONSAFEPATH": "1",  # the processes of runs import nothing from their working directory
}


def set_defaults() -> None:
    """Set the variables of SETTINGS that the environment does not set."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    home = os.path.expanduser(os.environ["PREFECT_HOME"])
    if home.startswith("~"):
        raise ConfigError(
            f"PREFECT_HOME is {home}, and there is no such home directory here: set PREFECT_HOME to a folder that exists, or HOME"
        )
    if home != os.environ["PREFECT_HOME"]:
        os.environ["PREFECT_HOME"] = home  # one path for Prefect, our server and their processes
    try:  # Prefect creates only the last level, and hangs if it cannot
        make_private(Path(home))
    except OSError as error:
        raise read_error(f"cannot make PREFECT_HOME={home}, or a folder above it; set it to a folder of your own", error) from error


def require_server(timeout_s: float = 10.0) -> None:
    """ClusterError if PREFECT_API_URL is set and nothing answers there; Prefect itself would show a traceback.

    ConfigError if it holds a password, which Prefect would print.
    """
    url = os.environ.get("PREFECT_API_URL")
    if not url:
        return
    try:
        refuse_secrets("PREFECT_API_URL", url, "a password goes into PREFECT_API_AUTH_STRING=user:password")
        urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=timeout_s).close()
    except urllib.error.HTTPError:
        return  # it answers; Prefect handles a missing password
    except (OSError, ValueError) as error:
        raise ClusterError(
            f"no Prefect server answers at PREFECT_API_URL={url} ({error}): start it, correct the address, or unset it to work without one"
        ) from error


set_defaults()
name_torch_cache()  # here begins the process of a flow run
