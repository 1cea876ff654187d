"""A Ray head as others start it: `ray start` on free ports, with a token of its own. It ends by the ids of its own processes only."""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.pipelines.processes import below

READY_S = 60
RAY = str(Path(sys.executable).with_name("ray"))


@dataclass(frozen=True)
class Head:
    """A running head; `token` is what it wants of its clients."""

    address: str
    dashboard: str
    token: str
    pid: int

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}

    def processes(self, *words: str) -> list[str]:
        """Return the command lines of its processes that hold one of the words."""
        return [command for command in below(self.pid).values() if any(word in command for word in words)]


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@contextlib.contextmanager
def ray_head(num_cpus: int = 4, before: Sequence[str] = (), ip: str = "127.0.0.1") -> Iterator[Head]:
    """Start a head, wait for its job server, end it. `before`: words in front of the command; `ip`: its address."""
    folder, token = tempfile.mkdtemp(prefix="aeh", dir="/tmp"), secrets.token_hex(24)  # short: sockets lie in it
    port, dashboard, agent, client, metrics = free_ports(5)
    options = {
        "node-ip-address": ip, "port": port, "dashboard-host": ip, "dashboard-port": dashboard, "dashboard-agent-listen-port": agent,
        "ray-client-server-port": client, "metrics-export-port": metrics, "temp-dir": folder, "num-cpus": num_cpus,
        "include-dashboard": "true", "object-store-memory": 80 << 20,
    }  # fmt: skip
    command = [
        *before,
        RAY,
        "start",
        "--head",
        "--block",
        "--disable-usage-stats",
        *(f"--{name}={value}" for name, value in options.items()),
    ]
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    with Path(folder, "head.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    head = Head(f"{ip}:{port}", f"http://{ip}:{dashboard}", token, process.pid)
    try:
        _wait_for(head, process, Path(folder, "head.log"))
        yield head
    finally:
        end(process)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for(head: Head, process: "subprocess.Popen[bytes]", log: Path) -> None:
    request = urllib.request.Request(f"{head.dashboard}/api/version", headers={"Authorization": f"Bearer {head.token}"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + READY_S
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, f"the head did not start in {READY_S} s: {log.read_text()}"
        with contextlib.suppress(OSError):
            opener.open(request, timeout=2).close()
            return
        time.sleep(0.2)


def end(process: "subprocess.Popen[bytes]") -> None:
    """End a process that we started and all that it started."""
    started = below(process.pid)
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(3)
    for pid in (process.pid, *started):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait(10)
