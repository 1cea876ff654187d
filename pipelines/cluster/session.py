"""Connects to a running Ray (`cluster.address`, RAY_ADDRESS) or starts a local one: once per process, for all steps.

A cluster that this process did not start is never shut down. Requested resources are compared with those of the cluster BEFORE
anything is placed, and every wait ends after `cluster.timeout_s`: Ray itself would wait forever, silently. A local Ray listens on
127.0.0.1 only, without metrics ports, with its own token, which is kept in this process's environment only. Processes that are started
here import nothing from the current directory: they have another working directory, and neither is on their path.
"""

import contextlib
import functools
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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from aecore.data.manifest import TAR_PREFIXES
from aecore.errors import ClusterError, ConfigError
from pipelines.cluster.alive import CHECK_S, forget_processes, require_alive, watch_processes
from pipelines.cluster.interrupt import patience
from pipelines.cluster.leftovers import clear_leftovers, make_session_root, note_driver
from pipelines.recipe.recipe import ClusterSpec

logger = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 128 << 20  # tasks and records only; samples never pass through it
LOOPBACK = "127.0.0.1"
END_S = 15.0  # for the processes of a local Ray to end
STARTS = 3  # of a local Ray; each may take the 30 s that Ray allows its processes
LOOK_S = 10.0  # between checks of the nodes while work is done
_SETTINGS = {
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # `uv run` would upload the source tree to every worker
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # the default, 2 s, costs every short run three seconds
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
}
PASSED_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_DEBUG", TAR_PREFIXES)  # to other machines; they hold no secrets
_PATHS = ("AECORE_CACHE", "XDG_CACHE_HOME", "PREFECT_HOME", "RAY_TMPDIR", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_CA_BUNDLE")
_LOCAL_SETTINGS = {
    # Ray's metrics ports require no token; one of them stays closed only with an invalid port number
    "RAY_enable_metrics_collection": "0",
    "DASHBOARD_METRIC_PORT": "-1",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
}


class _Connection:
    """The cluster that `connect` connected this process to: an address, or LOCAL; None if `connect` did not."""

    LOCAL = "a local Ray"
    address: str | None = None
    patience = contextlib.ExitStack()  # from the start of Ray to its end


def cluster_address(cluster: ClusterSpec) -> tuple[str, str] | None:
    """Return the address of the running cluster to use and its origin (`cluster.address` or `RAY_ADDRESS`); None: a local Ray.

    ConfigError if `kind=address` has none, or for the address of a job server.
    """
    if cluster.kind == "job":
        raise ConfigError("cluster.kind=job runs as a Ray job (aepipe submit, or a flow), not inside of a step: set another kind")
    if cluster.address is not None:
        return cluster.address, "cluster.address"
    address = os.environ.get("RAY_ADDRESS")
    if address and address.startswith(("http://", "https://")):
        raise ConfigError(f"RAY_ADDRESS={address} is a job server: set cluster.kind=job, or RAY_ADDRESS to the cluster's own host:port")
    if address and address != "local":
        return address, "RAY_ADDRESS"
    if cluster.kind == "address":
        raise ConfigError(
            "cluster.kind=address, and no address: add cluster.address=host:6379 (auto: the Ray of this machine), or set RAY_ADDRESS"
        )
    return None


def connect(cluster: ClusterSpec) -> None:
    """Connect this process to Ray if it is not connected; ClusterError if that fails or takes too long."""
    found = cluster_address(cluster)
    address, name = found or (_Connection.LOCAL, "")
    for key, value in (_SETTINGS if found else _SETTINGS | _local_token()).items():
        os.environ.setdefault(key, value)
    if not found:
        os.environ["RAY_TMPDIR"] = str(make_session_root())
    import ray

    if ray.is_initialized():
        if _Connection.address in (None, address):
            return
        disconnect()
    _Connection.patience.enter_context(patience(END_S))
    started = time.perf_counter()
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        if found:
            _require_reachable(address, cluster.timeout_s)
            with allow_loopback(address):
                ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, **_job_options(address))
        else:
            _start_local(ray)
    except Exception as error:
        if not (isinstance(error, (OSError, RuntimeError, ValueError)) or _came_up_late(error)):
            raise
        raise ClusterError(_cannot_connect(error, address, name)) from error
    _Connection.address = address
    watch_processes(ray)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray replaced it by one that ends the process without cleaning up
    how, seconds = "connected to" if found else "started", time.perf_counter() - started
    logger.info("%s Ray in %.1f s: %s", how, seconds, _totals(ray))


def _cannot_connect(error: Exception, address: str, name: str) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    if lines and lines[0].startswith("Version mismatch"):
        return f"{address} ({name}): {' '.join(lines)}; install the cluster's versions of Ray and Python here"
    why = lines[0] if lines else type(error).__name__
    if not name:
        return f"cannot start a local Ray: {why}; or set cluster.num_workers=0 to work in this process"
    other = "unset RAY_ADDRESS" if name == "RAY_ADDRESS" else "set cluster.kind=local and cluster.address=null"
    return (
        f"cannot reach the Ray cluster at {name}={address}: {why}; check the address (and RAY_AUTH_MODE / RAY_AUTH_TOKEN), "
        f"or {other} to start one here, or set cluster.num_workers=0 to work in this process"
    )


def _start_local(ray: Any) -> None:
    clear_leftovers(Path(os.environ["RAY_TMPDIR"]))
    make_importable()
    for start in range(1, STARTS + 1):
        # Ray's processes keep the working directory and the environment that they are started in
        surroundings = (contextlib.chdir("/"), _temporary_defaults(_LOCAL_SETTINGS), _keep_loopback_address(), _only_what_is_used())
        try:
            with contextlib.ExitStack() as stack:
                for each in (*surroundings, _ended_if_it_fails()):
                    stack.enter_context(each)
                ray.init(
                    address="local",
                    include_dashboard=False,
                    object_store_memory=OBJECT_STORE_BYTES,
                    log_to_driver=False,
                    logging_level=logging.WARNING,
                    configure_logging=True,
                    job_config=_job_config(),
                    _node_ip_address=LOOPBACK,
                )
            break
        except Exception as error:
            if start == STARTS or not _came_up_late(error):
                raise
            logger.warning("a local Ray was not up after 30 s: this machine is busy; start %d of %d", start + 1, STARTS)
    with contextlib.suppress(OSError):  # without a note the folder is only kept
        note_driver(Path(ray._private.worker.global_worker.node.get_session_dir_path()))


def _came_up_late(error: Exception) -> bool:
    """Return whether Ray gave up on processes that it had started: a bare Exception after 30 s (Ray 2.60, `Node.__init__`)."""
    return type(error) is Exception


@contextlib.contextmanager
def _ended_if_it_fails() -> Iterator[None]:
    """End the processes of a Ray that does not come up; `ray.init` (2.60) leaves them until this process ends."""
    node: Any = importlib.import_module("ray._private.node")  # any: a class of it is replaced
    before, begun = node.Node, []

    class Node(before):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **options: Any) -> None:
            begun.append(self)
            super().__init__(*args, **options)

    node.Node = Node
    try:
        yield
    except BaseException:
        for each in begun:
            each.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
        raise
    finally:
        node.Node = before


@contextlib.contextmanager
def _temporary_defaults(settings: Mapping[str, str]) -> Iterator[None]:
    """Set variables that are not set, and unset them at the end: the next Ray may be a cluster of several machines."""
    missing = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)


@contextlib.contextmanager
def _keep_loopback_address() -> Iterator[None]:
    """Keep Ray from replacing 127.0.0.1 by the machine's external address, with which it listens on all interfaces."""
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextlib.contextmanager
def _only_what_is_used() -> Iterator[None]:
    """Keep `ray.init` from starting its autoscaler, which can add no node here, and its log monitor, whose lines no driver of ours reads.

    They take a second of CPU of the seven of a start. `ray start` has options for it, `ray.init` (2.60) has none.
    """
    parameter: Any = importlib.import_module("ray._private.parameter")  # any: a class of it is replaced
    before = parameter.RayParams
    parameter.RayParams = functools.partial(before, no_monitor=True, include_log_monitor=False)
    try:
        yield
    finally:
        parameter.RayParams = before


@contextlib.contextmanager
def allow_loopback(address: str) -> Iterator[None]:
    """Let `ray.init` connect to a Ray that listens on loopback only; no effect for one that also has an external address."""
    import ray

    host, _, port = address.rpartition(":")
    with contextlib.ExitStack() as stack:
        if host in (LOOPBACK, "localhost") and port.isdigit():
            try:
                socket.create_connection((ray.util.get_node_ip_address(), int(port)), timeout=2).close()
            except OSError:
                stack.enter_context(_keep_loopback_address())
        yield


class _WorkerSysPath(list[str]):
    """First entries of the workers' sys.path, to which Ray adds the folder of the script and the current directory, in this order."""

    def extend(self, folders: Iterable[str]) -> None:
        entries, here = list(folders), str(Path.cwd())
        if here in entries:  # leaves out its last occurrence
            del entries[len(entries) - 1 - entries[::-1].index(here)]
        super().extend(entries)


def _job_options(address: str) -> dict[str, Any]:
    """Return the options of `ray.init` for the job; none for Ray Client, whose server, which need not have our packages, unpickles them."""
    if address.startswith("ray://"):
        return {}
    config, passed = _job_config(), passed_variables()
    if passed:  # inside of a Ray job, its own environment replaces this
        config.set_runtime_env({"env_vars": passed})
    return {"job_config": config}


def passed_variables() -> dict[str, str]:
    """Return what goes from this environment into the processes of a cluster that others started."""
    return {name: os.environ[name] for name in PASSED_VARIABLES if name in os.environ}


def _job_config() -> Any:
    """Return a job config with which workers import nothing from the current directory of this process."""
    from ray.job_config import JobConfig

    config = JobConfig()
    config._py_driver_sys_path = _WorkerSysPath()  # not the argument: Ray replaces an empty one by a plain list
    return config


def _local_token() -> dict[str, str]:
    """Return a token for a local Ray, unless the user configured one. Ray reads it once, at its import."""
    if "ray" in sys.modules or any(name.startswith("RAY_AUTH_") for name in os.environ):
        return {}
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def disconnect() -> None:
    """Disconnect from the cluster; one that `connect` started ends, any other goes on."""
    forget_processes()
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        ray.shutdown()
    _Connection.address = None
    _Connection.patience.close()


def is_local() -> bool:
    """Return whether this process is connected to a Ray that `connect` started."""
    return _Connection.address == _Connection.LOCAL


def make_importable() -> None:
    """Prepare the environment for child processes with another working directory.

    They import the same packages and nothing from their working directory; paths in the environment become absolute.
    """
    paths = {name: os.path.abspath(os.environ[name]) for name in _PATHS if os.environ.get(name, "")[:1] not in ("", "~")}
    os.environ.update(paths | import_environment())


def import_environment() -> dict[str, str]:
    """Return the environment in which a child interpreter imports our packages, and nothing from its working directory."""
    roots = []
    for package in ("aecore", "pipelines"):
        found = importlib.util.find_spec(package)
        if found is not None and found.origin is not None:
            roots.append(str(Path(found.origin).parent.parent))
    # an empty entry would be the current directory
    known = [os.path.abspath(part) for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    return {"PYTHONPATH": os.pathsep.join(dict.fromkeys([*roots, *known])), "PYTHONSAFEPATH": "1"}


def _require_reachable(address: str, timeout_s: float) -> None:
    """ConnectionError if nothing listens at `host:port`, where ray.init would wait for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # `auto` and the like: Ray's own look-up fails at once
    try:
        with socket.create_connection((host, int(port)), timeout=min(timeout_s, 10.0)):
            pass
    except OSError as error:
        raise ConnectionError(f"nothing answers at {address} ({error})") from None


def worker_resources(cluster: ClusterSpec) -> dict[str, float]:
    """Return the resources of one worker: its threads as CPUs and its GPU, overridden by `resources_per_worker`."""
    resources = {"CPU": float(cluster.threads_per_worker)}
    if cluster.use_gpu:
        resources["GPU"] = 1.0
    return resources | dict(cluster.resources_per_worker or {})


def require_resources(cluster: ClusterSpec, num_workers: int) -> None:
    """Wait until the cluster has free resources for `num_workers` workers.

    ClusterError if it is too small for `cluster.num_workers`, or if they are not free within `cluster.timeout_s`.
    """
    import ray

    need = worker_resources(cluster)
    nodes = _nodes(ray)
    room = sum(fits(node, need) for node in nodes)
    if room < cluster.num_workers:
        raise ClusterError(
            f"cluster.num_workers={cluster.num_workers} workers of {format_resources(need)} each do not fit: "
            f"the cluster has {_totals(ray)} on {len(nodes)} node(s), room for {room}; {_suggest_fit(nodes, need, room)}"
        )
    deadline = time.monotonic() + cluster.timeout_s
    while fits(ray.available_resources(), need) < num_workers:
        if time.monotonic() > deadline:
            raise ClusterError(
                f"waited {cluster.timeout_s:.0f} s for {num_workers} workers of {format_resources(need)} each: free are "
                f"{format_resources(ray.available_resources())} (other work holds the rest); "
                "wait for it, ask for fewer workers, or raise cluster.timeout_s"
            )
        time.sleep(0.2)


def wait_for_one(refs: Sequence[Any], cluster: ClusterSpec) -> Any:  # any: Ray's object refs
    """Return the first of `refs` that is done.

    ClusterError if Ray's own processes here have ended, or if for `cluster.timeout_s` no node has room for a worker (nodes were lost).
    """
    import ray

    need, seen = worker_resources(cluster), time.monotonic()
    looked = seen
    while True:
        require_alive()
        done, _ = ray.wait(list(refs), num_returns=1, timeout=CHECK_S)
        if done:
            require_alive()  # else it is the error of a worker that ended with its node
            return done[0]
        if time.monotonic() - looked < min(LOOK_S, cluster.timeout_s):
            continue
        looked = time.monotonic()
        if any(fits(node, need) for node in _nodes(ray)):
            seen = time.monotonic()
        elif time.monotonic() - seen > cluster.timeout_s:
            raise ClusterError(
                f"the cluster has lost its nodes: for {cluster.timeout_s:.0f} s none of {len(_nodes(ray))} could hold a worker of "
                f"{format_resources(need)}; what is finished is kept, run the same command again when they are back"
            )


def _nodes(ray: Any) -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _suggest_fit(nodes: Sequence[Mapping[str, float]], need: Mapping[str, float], room: int) -> str:
    """Return a remedy: fewer workers, fewer resources per worker, or none of a resource that no node has."""
    missing = [name for name in need if need[name] > 0 and not any(node.get(name) for node in nodes)]
    if "GPU" in missing:
        return "no node has a GPU: set cluster.use_gpu=false, or connect to a cluster with GPUs (RAY_ADDRESS)"
    if missing:
        return f"no node has {', '.join(missing)}: correct cluster.resources_per_worker"
    share = "fewer resources for each, for example 'cluster.resources_per_worker={CPU: 0.5}'"
    without = ", or cluster.use_gpu=false" if "GPU" in need else ""
    fewer = f"set cluster.num_workers={room} or less, or {share}" if room else f"ask for {share}, or fewer cluster.threads_per_worker"
    return fewer + without


def require_local_urls_fit(cluster: ClusterSpec, *urls: str) -> None:
    """ClusterError for a local path outside of `cluster.shared_paths` on several nodes, each of which has its own disk."""
    nodes, local = num_nodes(), local_paths(cluster, *urls)
    if nodes > 1 and local:
        raise ClusterError(
            f"{local[0]} is a path on this machine, and the Ray cluster has {nodes} nodes, each with its own disk: "
            "use a storage that all of them see (a folder that they share: name it in cluster.shared_paths), "
            "or set cluster.kind=local and unset RAY_ADDRESS to work on this machine alone"
        )


def num_nodes() -> int:
    """Return the number of nodes that are alive."""
    import ray

    return sum(1 for node in ray.nodes() if node["Alive"])


def local_paths(cluster: ClusterSpec, *urls: str) -> list[str]:
    """Return those addresses that are paths outside of `cluster.shared_paths`."""
    paths = [url for url in urls if url and "://" not in url]
    return [path for path in paths if not any(Path(path).is_relative_to(shared) for shared in cluster.shared_paths)]


def require_gpu_is_there(cluster: ClusterSpec) -> None:
    """ConfigError if this process has to use a GPU and torch sees none."""
    import torch

    if cluster.use_gpu and not torch.cuda.is_available():
        raise ConfigError("cluster.use_gpu=true, and torch sees no GPU here: set cluster.use_gpu=false, or install the CUDA build of torch")


def fits(have: Mapping[str, float], need: Mapping[str, float]) -> int:
    """Return how many workers with resources `need` fit into `have`."""
    return min((math.floor(have.get(name, 0.0) / amount + 1e-9) for name, amount in need.items() if amount > 0), default=1 << 30)


def _totals(ray: Any) -> str:
    return format_resources({name: amount for name, amount in ray.cluster_resources().items() if name in ("CPU", "GPU")})


def format_resources(resources: Mapping[str, float]) -> str:
    """Return resources as text, for example `2 CPU, 1 GPU`, without memory and names of nodes."""
    shown = {name: amount for name, amount in resources.items() if ":" not in name and name not in ("memory", "object_store_memory")}
    return ", ".join(f"{amount:g} {name}" for name, amount in sorted(shown.items())) or "nothing"
