"""A proxy on loopback that spoils what passes between a client and an S3 server, by rule.

    with FaultProxy(port) as proxy:
        proxy.add("PUT .*train-000000.tar", "status", status=503, code="SlowDown", times=2)

A rule spoils the requests whose first line matches, `times` of them (None: all): `status` answers by itself, `reset` drops the
connection, `delay` waits before it passes the request on, `cut` ends the answer's body early, `lost_ack` lets the server work and
drops its answer, `flip` changes one bit of the answer's body (another one each time, unless `bit` says which), with `alternate` of every
other one, `flip_sent` one bit of the request's body, `twice` sends the request two times and passes the second answer on. `headers` replace
those of all answers to GET (None: leave it out). `log` holds the first line of every request and what was done to it, `heads` all lines.
"""

import asyncio
import re
import threading
import weakref
from dataclasses import dataclass
from types import TracebackType

BUFFER = 1 << 16


@dataclass
class Rule:
    match: str
    do: str
    times: int | None = 1
    status: int = 503
    code: str = "ServiceUnavailable"
    seconds: float = 0.0
    after: int = 0  # bytes of the body before it is cut
    bit: int | None = None  # of the body, to flip
    alternate: bool = False
    matched: int = 0


class FaultProxy:
    def __init__(self, upstream_port: int, *, delay_s: float = 0.0) -> None:
        self.upstream_port = upstream_port
        self.delay_s = delay_s  # of every request
        self.rules: list[Rule] = []
        self.log: list[tuple[str, str]] = []
        self.heads: list[str] = []
        self._delayed = self.most_delayed = 0  # requests that a rule delays: now, and most at once
        self.headers: dict[str, str | None] = {}
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._transports: weakref.WeakSet[asyncio.WriteTransport] = weakref.WeakSet()  # a writer goes before what it has to send
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fault-proxy", daemon=True)
        self.port = 0

    def add(self, match: str, do: str, **options: object) -> None:
        with self._lock:
            self.rules.append(Rule(match, do, **options))  # type: ignore[arg-type]

    def seen(self, match: str) -> int:
        return sum(1 for line, _ in list(self.log) if re.search(match, line))

    def clear(self) -> None:
        with self._lock:
            self.rules.clear()
            self.log.clear()
            self.heads.clear()
            self.headers.clear()

    def __enter__(self) -> "FaultProxy":
        self._thread.start()
        assert self._started.wait(60), "the proxy did not start"
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(60)
        assert not self._thread.is_alive(), "the proxy did not end"

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._connection, "127.0.0.1", 0, limit=1 << 20))
        self.port = server.sockets[0].getsockname()[1]
        self._started.set()
        self._loop.run_forever()
        self._loop.run_until_complete(self._end(server))
        self._loop.close()

    async def _end(self, server: asyncio.Server) -> None:
        """End all connections, whatever they have to send, and one that has just come, which takes some turns of the loop to become one."""
        server.close()
        for _ in range(3):
            for _ in range(10):
                await asyncio.sleep(0)
            connections = asyncio.all_tasks() - {asyncio.current_task()}
            for task in connections:
                task.cancel()
            await asyncio.gather(*connections, return_exceptions=True)
            for transport in list(self._transports):
                transport.abort()  # one that is closed would still wait for bytes to go
        await asyncio.sleep(0)  # the turn in which those that were aborted last close their sockets

    def _rule_for(self, line: str) -> Rule | None:
        with self._lock:
            for rule in self.rules:
                if rule.times != 0 and re.search(rule.match, line):
                    rule.matched += 1
                    if rule.alternate and rule.matched % 2 == 0:
                        return None
                    if rule.times is not None:
                        rule.times -= 1
                    return rule
        return None

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream: asyncio.StreamWriter | None = None
        try:
            self._transports.add(writer.transport)
            answers, upstream = await asyncio.open_connection("127.0.0.1", self.upstream_port, limit=1 << 20)
            self._transports.add(upstream.transport)
            while await self._exchange(reader, writer, answers, upstream):
                pass
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            writer.close()
            if upstream is not None:
                upstream.close()

    async def _exchange(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answers: asyncio.StreamReader, upstream: asyncio.StreamWriter
    ) -> bool:
        """Pass one request and its answer on; return whether the connection goes on."""
        head = await reader.readuntil(b"\r\n\r\n")
        line = head.split(b"\r\n", 1)[0].decode("latin1")
        rule = self._rule_for(line)
        do = rule.do if rule else ""
        self.log.append((line, do))
        self.heads.append(head.decode("latin1"))
        if re.search(rb"(?i)\r\nexpect: *100-continue", head):
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            head = re.sub(rb"(?i)\r\nexpect:[^\r]*", b"", head)
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        if rule and do == "delay":
            self._delayed += 1
            self.most_delayed = max(self.most_delayed, self._delayed)
            try:
                await asyncio.sleep(rule.seconds)
            finally:
                self._delayed -= 1
        if do == "reset":
            writer.transport.abort()
            return False
        if rule and do == "status":
            await _pass_body(head, reader, None)
            writer.write(_answer(rule))
            await writer.drain()
            return True
        upstream.write(head)
        if rule and do in ("flip_sent", "twice"):
            body = bytearray(await reader.readexactly(_length(head)))
            if do == "twice":
                upstream.write(body)
                first = await _answer_to(answers)
                await _pass_body(first, answers, None, _has_body(line, first))
                upstream.write(head)
            else:
                _flip(body, rule)
            upstream.write(body)
        else:
            await _pass_body(head, reader, upstream)
        answer = await _answer_to(answers)
        has_body = _has_body(line, answer)
        if do == "lost_ack":
            await _pass_body(answer, answers, None, has_body)
            writer.transport.abort()
            return False
        if line.startswith("GET"):
            answer = _with_headers(answer, self.headers)
        writer.write(answer)
        if rule and do == "flip" and has_body:
            body = bytearray(await answers.readexactly(_length(answer)))
            _flip(body, rule)
            writer.write(body)
            await writer.drain()
            return True
        if rule and do == "cut":
            writer.write(await answers.readexactly(rule.after))
            await writer.drain()
            writer.transport.abort() if rule.seconds else writer.close()
            return False
        await _pass_body(answer, answers, writer, has_body)
        return True


async def _answer_to(answers: asyncio.StreamReader) -> bytes:
    """Return the head of the server's answer to a request."""
    head = await answers.readuntil(b"\r\n\r\n")
    while head.startswith(b"HTTP/1.1 100"):
        head = await answers.readuntil(b"\r\n\r\n")
    return head


def _has_body(line: str, answer: bytes) -> bool:
    return not line.startswith("HEAD") and not re.match(rb"HTTP/1.1 (204|304)", answer)


def _flip(body: bytearray, rule: Rule) -> None:
    """Change one bit; a body without bytes stays as it is."""
    if body:
        bit = rule.matched * 7919 % (8 * len(body)) if rule.bit is None else rule.bit
        body[bit // 8] ^= 1 << bit % 8


def _answer(rule: Rule) -> bytes:
    body = f"<?xml version='1.0'?><Error><Code>{rule.code}</Code><Message>injected</Message></Error>".encode()
    return f"HTTP/1.1 {rule.status} X\r\ncontent-type: application/xml\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


def _with_headers(head: bytes, headers: dict[str, str | None]) -> bytes:
    for name, value in headers.items():
        head = re.sub(rb"(?i)\r\n%b:[^\r]*" % name.encode(), b"", head)
        if value is not None:
            head = head[:-2] + f"{name}: {value}\r\n\r\n".encode()
    return head


def _length(head: bytes) -> int:
    match = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
    return int(match[1]) if match else 0


async def _pass_body(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter | None, has_body: bool = True) -> None:
    """Pass the body that `head` announces on to `writer` (None: drop it)."""
    if not has_body:
        return
    if re.search(rb"(?i)\r\ntransfer-encoding: *chunked", head):
        while True:
            size = await reader.readline()
            chunk = await reader.readexactly(int(size.split(b";")[0], 16) + 2)
            if writer:
                writer.write(size + chunk)
                await writer.drain()
            if len(chunk) == 2:
                return
    left = _length(head)
    while left:
        piece = await reader.read(min(left, BUFFER))
        if not piece:
            raise ConnectionError("the other side closed early")
        left -= len(piece)
        if writer:
            writer.write(piece)
            await writer.drain()
