"""The process of a local Prefect server: `python -P -m pipelines.flows.server_process SOCKET LOCK RECORD`.

It inherits the listening socket of its parent, and ends when no process holds the lock any more. Without a record it is a temporary
server: no page, no scheduler, and the lock file, which is also its log, is removed at the end.
"""

import fcntl
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

END_S = 15.0


def main(descriptor: str, lock: str, record: str) -> None:
    """Serve until no process uses the server."""
    import uvicorn
    from prefect.server.api.server import create_app

    app = create_app(final=True, ephemeral=not record)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="on", timeout_graceful_shutdown=5))
    threading.Thread(target=_end_when_unused, args=(server, Path(lock), Path(record or lock)), daemon=True).start()
    server.run(sockets=[socket.socket(fileno=int(descriptor))])


def _end_when_unused(server: Any, lock: Path, remove: Path) -> None:
    """Wait until the last user has released the lock, remove the record, and end; new users meanwhile wait for the lock."""
    held = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    fcntl.flock(held, fcntl.LOCK_EX)
    remove.unlink(missing_ok=True)
    server.should_exit = True
    time.sleep(END_S)
    os._exit(0)  # Prefect did not shut down in time


if __name__ == "__main__":
    main(*sys.argv[1:])
