"""Watches the processes of Ray below this one, and says which of them ended.

Ray's library ends a driver whose raylet is gone, from a thread of C++, with status 1 and no message: after ten seconds if the raylet was
killed, within half a second if it ended because one of its agents did. So the waits of a driver look at the raylet, and at the GCS where it
is on this machine (`require_alive`), and a thread waits for the end of an agent, after which nothing but a last line is possible.
"""

import atexit
import contextlib
import os
import select
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aecore.errors import ClusterError
from pipelines.cluster.interrupt import leave

CHECK_S = 1.0  # between two looks
_PROGRAMS = ("raylet", "gcs_server")
_AGENTS = {  # part of a command line -> what it is: a child of the raylet, which ends when one of them does
    "ray::DashboardAgent": "dashboard agent",
    "ray::RuntimeEnvAgent": "runtime environment agent",
    "dashboard/agent.py": "dashboard agent",  # before it has named itself
    "runtime_env/agent/main.py": "runtime environment agent",
}


@dataclass(frozen=True, slots=True)
class _Process:
    """One process: what it is, where its log is, and whether the driver still has time when it has ended."""

    name: str
    log: Path
    is_agent: bool = False

    def error(self) -> ClusterError:
        return ClusterError(
            f"the {self.name} ended while it was used (killed, out of memory, or the cluster was stopped; its log: {self.log}): what is "
            "finished is kept; look for the reason, then run the same command again, or set cluster.num_workers=0 to work without Ray"
        )


_watched: dict[int, _Process] = {}  # by descriptor of the process
_wakes: list[int] = []  # closing it ends the thread


def watch_processes(ray: Any) -> None:
    """Watch the raylet of the cluster that `ray` is connected to, its agents, and the GCS if it is on this machine."""
    forget_processes()
    node = ray._private.worker._global_node  # no public name; None for a client of a server (`ray://`), which has no raylet
    if node is None:
        return
    session = node.get_session_dir_path()
    for pid, words in _processes():
        program = os.path.basename(words[0])
        if program in _PROGRAMS and any(f"{session}/" in word for word in words):
            _watch(pid, _Process(f"{program} of Ray (process {pid})", Path(session, "logs", f"{program}.out")))
            for child, name in _agents(pid) if program == "raylet" else ():
                _watch(child, _Process(f"{name} of Ray (process {child})", Path(session, "logs"), is_agent=True))
    if _watched:
        atexit.unregister(forget_processes)
        atexit.register(forget_processes)  # runs before Ray's own, which ends a local Ray
        stopped, wake = os.pipe2(os.O_CLOEXEC)
        _wakes.append(wake)
        threading.Thread(target=_wait_for_agents, args=(dict(_watched), stopped), name="aepipe-ray-agents", daemon=True).start()


def forget_processes() -> None:
    """Stop watching, before Ray is left."""
    while _wakes:
        os.close(_wakes.pop())  # ends the thread
    while _watched:
        os.close(_watched.popitem()[0])


def require_alive() -> None:
    """ClusterError that names what has ended, if one of the watched processes has."""
    looking = select.poll()
    for descriptor in _watched:
        looking.register(descriptor, select.POLLIN)
    for descriptor, _ in looking.poll(0):
        raise _watched[descriptor].error()


def _wait_for_agents(watched: dict[int, _Process], stopped: int) -> None:
    waiting = select.poll()
    waiting.register(stopped, select.POLLIN)
    for descriptor, process in watched.items():
        if process.is_agent:
            waiting.register(descriptor, select.POLLIN)
    ready = [descriptor for descriptor, _ in waiting.poll()]
    os.close(stopped)
    if stopped not in ready:
        leave(watched[ready[0]].error())


def _watch(pid: int, process: _Process) -> None:
    with contextlib.suppress(OSError):  # it has ended meanwhile: Ray says so to the connection
        _watched[os.pidfd_open(pid)] = process


def _agents(raylet: int) -> list[tuple[int, str]]:
    found = []
    for pid, words in _processes():
        name = next((name for part, name in _AGENTS.items() if any(part in word for word in words)), None)
        with contextlib.suppress(OSError):
            if name is not None and int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) == raylet:
                found.append((pid, name))
    return found


def _processes() -> list[tuple[int, list[str]]]:
    """Return pid and words of the command line of all processes."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                found.append((int(folder.name), (folder / "cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")))
    return found
