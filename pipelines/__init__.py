"""Runs the jobs of `aecore`: command line, Prefect flows, Ray. Decides where they run and what happens when they fail."""

import sys

# `python -m pipelines.NAME` puts the current directory first on the path: a `./token.py` of the user would be imported instead of
# Python's own. It is removed before anything else is imported, unless it holds these packages themselves.
if sys.argv[:1] == ["-m"] and not sys.flags.safe_path and sys.path and not __file__.startswith(f"{sys.path[0]}/pipelines/"):
    del sys.path[0]
