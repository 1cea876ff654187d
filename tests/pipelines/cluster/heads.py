"""A Ray head as others start it: `ray start` on free ports, with a token of its own. It ends by the ids of its own processes only."""

import contextlib
import json
import os
import secrets
import shutil
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.processes import below, free_ports, started

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

    def ask(self, path: str, timeout_s: float = 60) -> Any:  # any: plain JSON
        """Ask the job server."""
        request = urllib.request.Request(f"{self.dashboard}{path}", headers={"Authorization": f"Bearer {self.token}"})
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=timeout_s) as answer:
            return json.load(answer)

    def processes(self, *words: str) -> list[str]:
        """Return the command lines of its processes that hold one of the words."""
        return [command for command in below(self.pid).values() if any(word in command for word in words)]


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
    log = Path(folder, "head.log")
    try:
        with started(command, env=environment, log=log, grace_s=3) as process:
            head = Head(f"{ip}:{port}", f"http://{ip}:{dashboard}", token, process.pid)
            process.wait_for(lambda: _answers(head), "the job server of the head answers")
            yield head
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _answers(head: Head) -> bool:
    with contextlib.suppress(OSError):
        return bool(head.ask("/api/version", 5))
    return False
