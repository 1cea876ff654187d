"""Checks the machine: the compiled loops, cores, memory, shared memory, disk and limits that the workers need."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from aecore.errors import ClusterError, ConfigError, counted
from aecore.native import available, processor, why_not
from aecore.native.memory import free_bytes
from pipelines.doctor._check import Check, Finding, failed, ok, skipped, warning
from pipelines.recipe.recipe import ClusterSpec

GB = 1 << 30
WORKER_BYTES = GB // 2  # a process with torch and Ray
SHM_BYTES = 128 << 20  # the object store of a local Ray
TEMPORARY_BYTES = GB
OPEN_FILES = 1024


def machine_checks(cluster: ClusterSpec) -> list[Check]:
    return [
        Check("compiled loops", compiled_loops, ConfigError),
        Check("linear layers", linear_layers, ConfigError, timeout_s=120),
        Check("cores", lambda: cores(cluster), ClusterError),
        Check("memory", lambda: memory(cluster), ClusterError),
        Check("temporary disk", temporary_disk, ClusterError),
        Check("open files", open_files, ClusterError),
    ]


def compiled_loops() -> Finding:
    """Report whether the compiled loops of aecore/native are used; without them sharding is slower."""
    if available():
        return ok("compiled loops", f"shards are read, hashed and packed by compiled code ({processor().name}, SHA instructions)")
    return skipped("compiled loops", f"shards are read, hashed and packed in Python ({why_not()})")


def linear_layers() -> Finding:
    """Report which matrix product models use on this processor, and why."""
    from aecore.nn import linear_path

    return ok("linear layers", f"on CPUs {linear_path()} [{processor().name}]")


def cores(cluster: ClusterSpec) -> Iterator[Finding]:
    """Compare the threads of all local workers with the cores."""
    number = len(os.sched_getaffinity(0))
    share = _quota()
    usable = min(number, share) if share else number
    limit = f" (a quota allows {share:.1f})" if share and share < number else ""
    threads = max(cluster.num_workers, 1) * cluster.threads_per_worker
    cores = counted(number, "core", "cores")
    if threads > usable and not os.environ.get("RAY_ADDRESS"):
        asked = f"{counted(cluster.num_workers, 'worker', 'workers')} with {counted(cluster.threads_per_worker, 'thread', 'threads')}"
        yield warning("cores", f"{cores}{limit} for {asked}", "lower cluster.num_workers or cluster.threads_per_worker")
    else:
        yield ok("cores", f"{cores}{limit}, {counted(threads, 'thread', 'threads')} asked for")


def _quota() -> float | None:
    """Return the CPU quota of the container in cores, None without a limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else float(quota) / float(period)


def memory(cluster: ClusterSpec) -> Iterator[Finding]:
    """Compare free memory, and shared memory for Ray's object store, with the minimum that the workers need."""
    free, needed = free_bytes(), max(cluster.num_workers, 1) * WORKER_BYTES
    message = f"{free / GB:.1f} GB free, {max(cluster.num_workers, 1)} workers take {needed / GB:.1f} GB before any data"
    here = not os.environ.get("RAY_ADDRESS")
    if free < needed and here:
        yield failed("memory", message, "lower cluster.num_workers, or free memory")
    else:
        yield ok("memory", message)
    shared = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    if shared < SHM_BYTES and cluster.num_workers and here:
        message = f"/dev/shm has {shared / 1e6:.0f} MB, Ray's object store takes {SHM_BYTES / 1e6:.0f} MB: it falls back to the slower disk"
        yield warning("shared memory", message, "give the container more, for example docker run --shm-size=1g")
    else:
        yield ok("shared memory", f"/dev/shm has {shared / GB:.1f} GB")


def temporary_disk() -> Finding:
    folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    message = f"{folder} has {free / GB:.1f} GB free (Ray's sessions, files on their way to a bucket)"
    if free < TEMPORARY_BYTES:
        return warning("temporary disk", message, "free space there, or set TMPDIR and RAY_TMPDIR to a larger disk")
    return ok("temporary disk", message)


def open_files() -> Finding:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < OPEN_FILES:
        return warning("open files", f"a process may open {soft} files (at most {hard})", f"ulimit -n {OPEN_FILES} or more")
    return ok("open files", f"a process may open {soft} files")
