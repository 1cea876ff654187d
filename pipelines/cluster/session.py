"""Connect to the Ray of RAY_ADDRESS, or start a local one: once per process, for all stages.

A cluster that we did not start is never shut down. What a job needs is compared with what the cluster has BEFORE anything is
placed, and every wait ends after `cluster.timeout_s`: Ray itself would wait for ever, silently. A local Ray listens on loopback
with a token of its own that lives in this process's environment only.
"""

import importlib.util
import logging
import math
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aecore.errors import ClusterError, ConfigError
from pipelines.config import ClusterSpec

logger = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 128 << 20  # tasks and records only; samples never pass through it
_SETTINGS = {
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # `uv run` would upload the source tree to every worker
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # default 2 s: three seconds of every short run
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
}


def connect(cluster: ClusterSpec) -> None:
    """Make sure that this process is connected to Ray; ClusterError if that fails or takes too long."""
    address = os.environ.get("RAY_ADDRESS")
    for name, value in (_SETTINGS if address else _SETTINGS | _own_token() | _own_folder()).items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        return
    started = time.perf_counter()
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        if address:
            _require_reachable(address, cluster.timeout_s)
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        else:
            _start_local(ray)
    except (ConnectionError, RuntimeError, TimeoutError, ValueError) as error:
        where = f"the Ray cluster at RAY_ADDRESS={address}" if address else "a local Ray"
        why = str(error).strip().splitlines()[0]
        raise ClusterError(
            f"cannot {'reach' if address else 'start'} {where}: {why}; check the address (and RAY_AUTH_MODE / RAY_AUTH_TOKEN), "
            "or unset RAY_ADDRESS to start one here, or set cluster.num_workers=0 to work in this process"
        ) from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray put its own there, which ends the process where Prefect or we would clean up
    logger.info("%s Ray in %.1f s: %s", "connected to" if address else "started", time.perf_counter() - started, _says(_totals(ray)))


def _start_local(ray: Any) -> None:
    make_importable()
    ray.init(
        address="local",
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level=logging.WARNING,
        configure_logging=True,
    )


def _own_token() -> dict[str, str]:
    """Return a token for a Ray of ours, unless the user set one up. Ray reads it at its import, and not again."""
    if "ray" in sys.modules or any(name.startswith("RAY_AUTH_") for name in os.environ):
        return {}
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def _own_folder() -> dict[str, str]:
    """Return a folder for the sessions of our Rays. In Ray's own, /tmp/ray, the address of a cluster that died may lie: every
    TorchTrainer.fit then ends 12 s later, since its clean-up asks there which cluster is running. Short: sockets lie in it."""
    folder = Path("/tmp", f"aepipe-ray-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    return {"RAY_TMPDIR": str(folder)} if folder.stat().st_uid == os.getuid() else {}


def disconnect() -> None:
    """End our work and leave the cluster; one that `connect` started ends with it, any other goes on."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        ray.shutdown()


def make_importable() -> None:
    """Let workers import what we import: they have another working directory, so the folder of our packages goes into PYTHONPATH."""
    roots = []
    for package in ("aecore", "pipelines"):
        found = importlib.util.find_spec(package)
        if found is not None and found.origin is not None:
            roots.append(str(Path(found.origin).parent.parent))
    known = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([*roots, *known]))


def _require_reachable(address: str, timeout_s: float) -> None:
    """Try the port of `host:port` first: ray.init waits for minutes at an address where nothing listens."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # "auto" and the like: Ray's own look-up, which fails at once
    try:
        with socket.create_connection((host, int(port)), timeout=min(timeout_s, 10.0)):
            pass
    except OSError as error:
        raise ConnectionError(f"nothing answers at {address} ({error})") from None


def worker_resources(cluster: ClusterSpec) -> dict[str, float]:
    """Return what one worker reserves: `resources_per_worker` on top of its threads as CPUs and its GPU."""
    resources = {"CPU": float(cluster.threads_per_worker)}
    if cluster.use_gpu:
        resources["GPU"] = 1.0
    return resources | dict(cluster.resources_per_worker or {})


def require_resources(cluster: ClusterSpec, num_workers: int) -> None:
    """ClusterError unless the cluster has room for `cluster.num_workers` workers at all, and for `num_workers` of them now or
    within `cluster.timeout_s` (other work may hold it)."""
    import ray

    need = worker_resources(cluster)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(fits(node, need) for node in nodes)
    if room < cluster.num_workers:
        raise ClusterError(
            f"cluster.num_workers={cluster.num_workers} workers of {_says(need)} each do not fit: the cluster has {_says(_totals(ray))} on "
            f"{len(nodes)} node(s), room for {room}; {_smaller(nodes, need, room)}"
        )
    deadline = time.monotonic() + cluster.timeout_s
    while fits(ray.available_resources(), need) < num_workers:
        if time.monotonic() > deadline:
            raise ClusterError(
                f"waited {cluster.timeout_s:.0f} s for {num_workers} workers of {_says(need)} each: free are "
                f"{_says(ray.available_resources())} (other work holds the rest); "
                "wait for it, ask for fewer workers, or raise cluster.timeout_s"
            )
        time.sleep(0.2)


def _smaller(nodes: Sequence[Mapping[str, float]], need: Mapping[str, float], room: int) -> str:
    """Return what to ask for instead: fewer workers, a smaller share, or none of what no node has."""
    missing = [name for name in need if need[name] > 0 and not any(node.get(name) for node in nodes)]
    if "GPU" in missing:
        return "no node has a GPU: set cluster.use_gpu=false, or connect to a cluster with GPUs (RAY_ADDRESS)"
    if missing:
        return f"no node has {', '.join(missing)}: correct cluster.resources_per_worker"
    share = "a smaller share for each, for example 'cluster.resources_per_worker={CPU: 0.5}'"
    without = ", or cluster.use_gpu=false" if "GPU" in need else ""
    fewer = f"set cluster.num_workers={room} or less, or {share}" if room else f"ask for {share}, or fewer cluster.threads_per_worker"
    return fewer + without


def require_local_urls_fit(*urls: str) -> None:
    """ClusterError if a local path would be read or written on several nodes: each would see its own disk."""
    import ray

    nodes = sum(1 for node in ray.nodes() if node["Alive"])
    local = [url for url in urls if "://" not in url]
    if nodes > 1 and local:
        raise ClusterError(
            f"{local[0]} is a path on this machine, and the Ray cluster has {nodes} nodes, each with its own disk: "
            "use a storage that all of them see, or unset RAY_ADDRESS to work on this machine alone"
        )


def require_gpu_is_there(cluster: ClusterSpec) -> None:
    """ConfigError if GPUs are asked for without workers on a machine that has none."""
    import torch

    if cluster.use_gpu and not torch.cuda.is_available():
        raise ConfigError("cluster.use_gpu=true, and torch sees no GPU here: set cluster.use_gpu=false, or install the CUDA build of torch")


def fits(have: Mapping[str, float], need: Mapping[str, float]) -> int:
    """Return how many workers of `need` a node (or what is free) has room for."""
    return min((math.floor(have.get(name, 0.0) / amount + 1e-9) for name, amount in need.items() if amount > 0), default=1 << 30)


def _totals(ray: Any) -> dict[str, float]:
    return {name: amount for name, amount in sorted(ray.cluster_resources().items()) if name in ("CPU", "GPU")}


def _says(resources: Mapping[str, float]) -> str:
    shown = {name: amount for name, amount in resources.items() if ":" not in name and name not in ("memory", "object_store_memory")}
    return ", ".join(f"{amount:g} {name}" for name, amount in shown.items()) or "nothing"
