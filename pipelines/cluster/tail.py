"""Follows the log of a Ray job: a thread holds the connection, the caller takes the lines.

A broken connection is opened again; the server then sends everything from the start, and what was received before is skipped.
"""

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

logger = logging.getLogger(__name__)
AGAIN_S, REST_S = 1.0, 10.0
_RAY_LINES = (" -- Runtime env is setting up.", "Running entrypoint for job ")  # lines that Ray adds to the log of every job


class LogTail:
    """Follows the log of one job from entering the context to leaving it."""

    def __init__(self, client: Any, job_id: str) -> None:
        self._client, self._job_id = client, job_id
        self._chunks: queue.Queue[str | None] = queue.Queue()
        self._open, self._ended = "", False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=f"log of {job_id}", daemon=True)

    def __enter__(self) -> "LogTail":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended already
            self._loop.call_soon_threadsafe(lambda: [task.cancel() for task in asyncio.all_tasks(self._loop)])
        self._thread.join(REST_S)

    def deliver(self, on_line: Callable[[str], None], wait_s: float) -> None:
        """Pass the lines of the next `wait_s` seconds to `on_line`."""
        deadline = time.monotonic() + wait_s
        while (left := deadline - time.monotonic()) > 0:
            if self._ended:
                time.sleep(left)
                return
            with contextlib.suppress(queue.Empty):
                self._take(self._chunks.get(timeout=left), on_line)

    def deliver_rest(self, on_line: Callable[[str], None]) -> None:
        """Pass the rest of an ended job's log to `on_line`; the server closes the connection after the last line."""
        deadline = time.monotonic() + REST_S
        while not self._ended and time.monotonic() < deadline:
            with contextlib.suppress(queue.Empty):
                self._take(self._chunks.get(timeout=0.1), on_line)
        self._take("\n" if self._open else "", on_line)

    def _take(self, chunk: str | None, on_line: Callable[[str], None]) -> None:
        self._ended = self._ended or chunk is None
        *lines, self._open = (self._open + (chunk or "")).split("\n")
        for line in lines:
            if not any(mark in line for mark in _RAY_LINES):
                on_line(line)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._follow())
        except (asyncio.CancelledError, Exception) as error:  # the job is followed without its lines
            logger.debug("stopped following the log of %s: %r", self._job_id, error)
        finally:
            self._chunks.put(None)
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()

    async def _follow(self) -> None:
        import aiohttp

        seen = 0
        while True:
            skip = seen
            try:
                chunks: AsyncIterator[str] = self._client.tail_job_logs(self._job_id)
                async for chunk in chunks:
                    new = chunk[skip:]
                    skip = max(0, skip - len(chunk))
                    seen += len(new)
                    self._chunks.put(new)
                return
            except (aiohttp.ClientError, OSError, RuntimeError) as error:
                logger.debug("lost the connection to the log of %s: %s", self._job_id, error)
                await asyncio.sleep(AGAIN_S)
