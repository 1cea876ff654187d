"""Checks the Ray cluster of the recipe or of RAY_ADDRESS: reachable, accepts the token, has the required resources."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from aecore.errors import ClusterError, counted
from pipelines.cluster.leftovers import leftovers, session_root
from pipelines.cluster.session import fits, format_resources, import_environment, worker_resources
from pipelines.doctor._check import Check, Finding, failed, ok, skipped, warning
from pipelines.recipe.recipe import ClusterSpec

CONNECT_S, PROBE_S = 5.0, 45.0
START = "start it (`ray start --head`), correct the address, or unset RAY_ADDRESS to use a local Ray"


def ray_checks(cluster: ClusterSpec) -> list[Check]:
    return [Check("ray", lambda: ray(cluster), ClusterError, timeout_s=CONNECT_S + PROBE_S + 10)]


def leftover_checks() -> list[Check]:
    return [Check("ray: leftovers", left_behind, ClusterError)]


def address_of(cluster: ClusterSpec) -> str | None:
    """Return the address of a running cluster, None for a local Ray."""
    return getattr(cluster, "address", None) or os.environ.get("RAY_ADDRESS") or None


def ray(cluster: ClusterSpec) -> Iterator[Finding]:
    """Connect to the address, then query the cluster in a subprocess, since Ray itself may wait for minutes."""
    address = address_of(cluster)
    if address is None:
        yield skipped("ray", "RAY_ADDRESS is not set: a local Ray is started when there is work for it")
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
        except OSError as error:
            yield failed("ray", f"nothing answers at {address} ({error})", START)
            return
    answer = _probe(address)
    if isinstance(answer, Finding):
        yield answer
        return
    nodes = counted(len(answer["nodes"]), "node", "nodes")
    message = f"Ray {answer['version']} at {address}, {nodes}, free: {format_resources(answer['free'])}"
    yield ok("ray", message)
    need = worker_resources(cluster)
    room = sum(fits(node, need) for node in answer["nodes"])
    message = f"room for {counted(room, 'worker', 'workers')} of {format_resources(need)} each, the recipe asks for {cluster.num_workers}"
    if room < cluster.num_workers:
        remedy = f"set cluster.num_workers={room} or less, or lower cluster.resources_per_worker"
        yield failed("ray: resources", message, remedy)
    elif room == cluster.num_workers and len(answer["nodes"]) > 1:
        yield warning("ray: resources", message, "the loss of one node would leave too little: add a node, or ask for fewer workers")
    else:
        yield ok("ray: resources", message)


def left_behind() -> Iterator[Finding]:
    """Look for processes and folders of local Rays whose drivers have ended."""
    root = session_root()
    found = leftovers(root)
    for left in found:
        if left.pids:
            count = counted(len(left.pids), "process", "processes")
            message = f"{count} outlived the driver of a local Ray ({left.folder.name}, started {left.age} ago)"
            yield warning("ray: leftovers", message, f"end them: {left.remedy}")
    idle = [left for left in found if not left.pids]
    unknown = [left for left in idle if not left.is_noted]
    if unknown:
        folders = counted(len(unknown), "session folder", "session folders")
        message = f"{folders} of unknown origin in {root}/ray, the oldest {unknown[0].age} ago"
        yield warning("ray: leftovers", message, "remove those that no Ray in another container uses")
    if not unknown and len(idle) == len(found):
        yield ok(
            "ray: leftovers",
            f"{counted(len(idle), 'session folder', 'session folders')} of ended runs below {root}: the next run keeps the newest one",
        )


def _probe(address: str) -> dict[str, Any] | Finding:  # any: plain JSON
    command = [sys.executable, "-P", "-W", "ignore", "-m", "pipelines.cluster.probe", address]
    try:
        done = subprocess.run(command, env=os.environ | import_environment(), capture_output=True, text=True, timeout=PROBE_S)
    except subprocess.TimeoutExpired:
        return failed("ray", f"{address} accepted the connection and did not answer as Ray within {PROBE_S:.0f} s", START)
    if done.returncode == 0:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    why = lines[-1].strip()[:300] if lines else f"exit code {done.returncode}"
    token = any(word in done.stderr.lower() for word in ("token", "unauthenticated", "authentication"))
    remedy = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the cluster's token" if token else START
    return failed("ray", f"cannot connect to {address}: {why}", remedy)
