"""Cleaning up after the work: what was committed stays a success, and a first error stays the error, whatever cleaning up meets.

What could not be cleaned up is logged: at worst a temporary file stays, which `gc` or the next process removes, or a descriptor.
"""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)


def discard(path: Path) -> None:
    """Remove a temporary file if it is there; never raises an OSError."""
    with logged(f"remove the temporary file {path}"):
        path.unlink(missing_ok=True)


def close_read(descriptor: int) -> None:
    """Close a descriptor that was only read from; never raises an OSError."""
    with logged("close a file that was read"):
        os.close(descriptor)


@contextlib.contextmanager
def logged(doing: str) -> Iterator[None]:
    """Log an OSError of the `with` block instead of raising it."""
    try:
        yield
    except OSError as error:
        logger.warning("cannot %s: %s", doing, error)
