"""How much memory this process may use: the machine's, or the limit of its control group (a container) or of its address space."""

import contextlib
import os
import resource
from pathlib import Path

_GROUPS = (  # limit and use of a control group, of version 2 and of version 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def machine_bytes() -> int:
    """Return the memory that this process may use, in bytes."""
    limits = [_PAGE_BYTES * os.sysconf("SC_PHYS_PAGES")]
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if address_space != resource.RLIM_INFINITY:
        limits.append(address_space)
    return min([*limits, *(limit for limit, _ in _groups())])


def free_bytes() -> int:
    """Return the memory that is free for this process, in bytes. What the file cache takes is free; of a container's limit it is in use."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line)
    free = int(lines["MemAvailable"].split()[0]) * 1024
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if address_space != resource.RLIM_INFINITY:
        free = min(free, address_space - _PAGE_BYTES * int(Path("/proc/self/statm").read_text().split()[0]))
    return max(0, min([free, *(limit - used for limit, used in _groups())]))


def _groups() -> list[tuple[int, int]]:
    """Return limit and use of each control group that has a limit."""
    found = []
    for limit, used in _GROUPS:
        with contextlib.suppress(OSError, ValueError):  # there is none, or it says "max"
            found.append((int(Path(limit).read_text()), int(Path(used).read_text())))
    return found


_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
