"""Prints the resources of a running Ray cluster: `python -P -m pipelines.cluster.probe ADDRESS`, a process that can be killed."""

import json
import logging
import os
import sys


def main(address: str) -> None:
    """Connect, print version, nodes and free resources as JSON, disconnect."""
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    from pipelines.cluster.session import allow_loopback

    with allow_loopback(address):
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    sys.stdout.write(json.dumps({"version": ray.__version__, "nodes": nodes, "free": ray.available_resources()}) + "\n")
    ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
