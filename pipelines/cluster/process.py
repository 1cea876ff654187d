"""Names processes so that another one with the same number is not taken for them."""

from pathlib import Path


def process_name(pid: int) -> str:
    """Return `PID:START`, with the start of the process in ticks, since a pid alone may be reused."""
    return f"{pid}:{Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]}"


def is_alive(process: str) -> bool:
    """Return whether the process of this name (see `process_name`) runs."""
    try:
        return process_name(int(process.partition(":")[0])) == process
    except (OSError, ValueError, IndexError):
        return False
