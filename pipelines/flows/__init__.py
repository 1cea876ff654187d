"""Prefect flows around the steps: the only package that imports prefect.

Parameters and results are plain JSON (a recipe's tree, a summary): no sample bytes, no credentials. Prefect's settings are given
their defaults here, before its first import: a home of our own, so that another program's Prefect is left alone, and no telemetry.
"""

import os
from pathlib import Path

_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
SETTINGS = {
    "PREFECT_HOME": str(_CACHE / "aepipe" / "prefect"),
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "aecore,pipelines",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
}


def set_defaults() -> None:
    """Set what the environment does not say already."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    Path(os.environ["PREFECT_HOME"]).mkdir(parents=True, exist_ok=True)  # Prefect makes the last level only, and hangs if it cannot


set_defaults()
