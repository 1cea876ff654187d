"""Who runs the jobs of `aecore`, where, and what happens when they fail: command line, Prefect flows, Ray."""

import sys


def _drop_current_directory() -> None:
    """Take the current directory off the path where Python put it there for `python -m pipelines.NAME`, before anything else is imported.

    A `./token.py` of the user would be imported instead of Python's own. A folder that holds these packages themselves stays.
    """
    if sys.argv[:1] == ["-m"] and not sys.flags.safe_path and sys.path and not __file__.startswith(f"{sys.path[0]}/pipelines/"):
        del sys.path[0]


_drop_current_directory()
