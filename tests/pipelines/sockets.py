"""Who listens where, as the kernel tells it: tests look at the sockets of the processes that they started."""

import contextlib
import ipaddress
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple


class Listener(NamedTuple):
    address: ipaddress.IPv4Address | ipaddress.IPv6Address
    port: int
    command: str

    @property
    def is_loopback(self) -> bool:
        mapped = getattr(self.address, "ipv4_mapped", None)  # gRPC opens 127.0.0.1 as ::ffff:127.0.0.1
        return (mapped or self.address).is_loopback


def listeners(pids: Iterable[int]) -> Iterator[Listener]:
    """Yield the TCP sockets on which these processes listen."""
    owners: dict[str, int] = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    owners[os.readlink(descriptor)] = pid
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            row = line.split()
            pid = owners.get(f"socket:[{row[9]}]")
            if row[3] != "0A" or pid is None:
                continue
            text, _, port = row[1].partition(":")
            words = [bytes.fromhex(text)[at : at + 4][::-1] for at in range(0, len(text) // 2, 4)]
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
                yield Listener(ipaddress.ip_address(b"".join(words)), int(port, 16), command)
