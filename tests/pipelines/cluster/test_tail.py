"""The log of a job while it is written: every line once, whatever breaks in between."""

from collections.abc import AsyncIterator

from pipelines.cluster.tail import LogTail

LOG = "2026 INFO x.py:1 -- Runtime env is setting up.\nRunning entrypoint for job a: python\nfirst\nsecond \u00e9\n\nlast without end"


class Breaks:
    """Sends the log from its start at every connection, and breaks the first two in the middle of a line."""

    def __init__(self) -> None:
        self.connections = 0

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        self.connections += 1
        end = {1: LOG.index("first") + 3, 2: LOG.index("second") + 2}.get(self.connections, len(LOG))
        for start in range(0, end, 7):
            yield LOG[start : min(start + 7, end)]
        if end < len(LOG):
            raise RuntimeError("WebSocket connection closed unexpectedly")


def test_a_connection_that_breaks_is_made_again_and_no_line_is_lost_or_said_twice() -> None:
    client, lines = Breaks(), list[str]()
    with LogTail(client, "a") as tail:
        tail.deliver_rest(lines.append)
    assert client.connections == 3
    assert lines == ["first", "second \u00e9", "", "last without end"]


class Waits:
    """Never sends anything."""

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        import asyncio

        await asyncio.sleep(3600)
        yield ""


def test_leaving_does_not_wait_for_a_log_that_says_nothing() -> None:
    with LogTail(Waits(), "a") as tail:
        tail.deliver(lambda line: None, 0.2)
    assert not tail._thread.is_alive()
