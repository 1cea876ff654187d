"""Calls to an S3 service through s3fs: retried in bounded time, many at once, errors that name the remedy.

Credentials, region and endpoint come from the usual places: `AWS_*` variables, or a profile of `~/.aws`. They stay inside botocore's
session: nothing here keeps, pickles or prints them. The retries of s3fs and of botocore multiply (26 requests at a permanent 503); both
are off, and `retried` is the only place that retries.
"""

import asyncio
import atexit
import contextlib
import errno
import functools
import itertools
import os
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import urlsplit
from weakref import WeakSet

from aecore.errors import MASK, AecoreError, ConfigError, StoreError
from aecore.store._again import pauses

if TYPE_CHECKING:
    from s3fs import S3FileSystem

T = TypeVar("T")
ATTEMPTS, BUDGET_S = 6, 60.0  # the last attempt begins within the budget
FIRST_PAUSE_S = 0.2
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 5, 30
REST_S, CLOSE_S = 2.0, 10.0  # what was cancelled may clean up so long; a client that closes is waited for
LOOPS = 4  # one event loop carries a quarter of a network of 10 Gbit/s
_RETRIED_CODES = frozenset(
    {
        "BadDigest",
        "ConditionalRequestConflict",
        "IncompleteBody",
        "InternalError",
        "OperationAborted",
        "RequestTimeout",
        "ServiceUnavailable",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "XAmzContentSHA256Mismatch",
    }
)
past_proxies = ContextVar("past_proxies", default=False)  # whether this task's downloads ask for no answer that a proxy has kept
_clients: dict[tuple[int, str | None, bool], "Client"] = {}
_making = threading.Lock()


class ShortBody(OSError):
    """A response that ended before its Content-Length."""


class Answered(StoreError):
    """The service answered with a code that a caller may expect: the object is missing, the name is taken."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.missing = code in ("404", "NoSuchKey", "NotFound")
        self.taken = code in ("412", "PreconditionFailed")
        self.code = code


class _Session(NamedTuple):
    """An event loop in a thread of its own, the connections that live there, and their sockets."""

    loop: asyncio.AbstractEventLoop
    thread: threading.Thread
    filesystem: "S3FileSystem"
    sockets: WeakSet[socket.socket]

    def end(self, closed: Future[None]) -> None:
        """Wait until the connections are closed, then end the loop and its thread."""
        try:
            closed.result(CLOSE_S)
        finally:
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join(CLOSE_S)


class Client:
    """Sessions of one profile; made once per process (see `client`)."""

    def __init__(self, profile: str | None, unsigned: bool = False) -> None:
        self.profile, self.unsigned = profile, unsigned
        self._sessions: list[_Session] = []
        self._next = 0
        self._lock = threading.Lock()

    def submit(self, work: "Callable[[S3FileSystem], Coroutine[Any, Any, T]]") -> Future[T]:
        """Start `work(filesystem)` in one of the client's event loops."""
        session = self._session()
        return asyncio.run_coroutine_threadsafe(work(session.filesystem), session.loop)

    def run(self, work: "Callable[[S3FileSystem], Coroutine[Any, Any, T]]") -> T:
        """Return the result of `work(filesystem)`; KeyboardInterrupt cancels it."""
        future = self.submit(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def call(self, url: str, doing: str, method: str, **arguments: Any) -> Any:  # any: S3's responses are plain dicts
        """Return the response of one S3 call, retried where that can help."""
        return self.run(lambda filesystem: retried(lambda: filesystem._call_s3(method, **arguments), url, doing))

    def _session(self) -> _Session:
        with self._lock:
            if len(self._sessions) < LOOPS:
                self._sessions.append(self._connected())
            self._next = (self._next + 1) % len(self._sessions)
            return self._sessions[self._next]

    def close(self) -> None:
        """Cancel the requests that still run and close all connections; a later call opens new ones."""
        with self._lock:
            sessions, self._sessions = self._sessions, []
        with contextlib.ExitStack() as stack:  # one that fails keeps none of the others open
            for session in sessions:
                closing = asyncio.run_coroutine_threadsafe(_close(session.filesystem, session.sockets), session.loop)
                stack.callback(session.end, closing)

    def _connected(self) -> _Session:
        from aiobotocore.session import AioSession
        from botocore.exceptions import ProfileNotFound
        from s3fs import S3FileSystem

        session = AioSession(profile=self.profile)
        with contextlib.suppress(ProfileNotFound):  # the first call says so
            session.register_component("data_loader", _descriptions(session.get_config_variable("data_path")))
        session.register("request-created.s3", _refuse_password)
        session.register("before-send.s3.GetObject", _ask_past_proxies)
        loop, sockets = asyncio.new_event_loop(), WeakSet[socket.socket]()
        thread = threading.Thread(target=_serve, args=(loop,), name="aecore-s3", daemon=True)
        thread.start()
        filesystem = S3FileSystem(
            session=session,
            loop=loop,
            asynchronous=True,
            skip_instance_cache=True,
            use_listings_cache=False,
            anon=self.unsigned,
            s3_additional_kwargs={"RequestPayer": "requester"} if _pays() else {},
            config_kwargs={
                "retries": {"total_max_attempts": 1},
                "connect_timeout": CONNECT_TIMEOUT_S,
                "read_timeout": READ_TIMEOUT_S,
                "max_pool_connections": 64,
                "connector_args": {"socket_factory": functools.partial(_opened, sockets)},
                "request_checksum_calculation": "when_required",  # services other than Amazon's know no checksum trailers
                "response_checksum_validation": "when_required",
            },
        )
        filesystem.retries = 1
        return _Session(loop, thread, filesystem, sockets)


@functools.cache
def _descriptions(folders: str | None) -> Any:  # any: botocore's loader
    """Return what botocore knows of its services, for all sessions: each would parse the megabyte of JSON for itself (60 ms of 70)."""
    from botocore.loaders import create_loader

    return create_loader(folders)


def client(profile: str | None, *, unsigned: bool = False) -> Client:
    """Return this process's client of a profile (None: the default credentials); a forked child makes its own, threads end at a fork.

    An `unsigned` one sends no credentials: public buckets answer it.
    """
    with _making:
        return _clients.setdefault((os.getpid(), profile, unsigned), Client(profile, unsigned))


def unsigned(profile: str | None) -> bool:
    """Return whether external files are read without a signature: AWS_NO_SIGN_REQUEST asks for it, or there are no credentials."""
    if os.environ.get("AWS_NO_SIGN_REQUEST", "").lower() in ("1", "true", "yes", "on"):
        return True
    if profile is not None or os.environ.get("AWS_ACCESS_KEY_ID"):
        return False
    return not _has_credentials(os.getpid())


@functools.cache
def _has_credentials(pid: int) -> bool:
    """Return whether botocore finds default credentials; asked once, since it may ask a service of the machine's provider."""
    from botocore.session import Session

    return Session().get_credentials() is not None


def _pays() -> bool:
    """Return whether requests say that whoever makes them pays: buckets of others that ask for it refuse all other ones."""
    return os.environ.get("AWS_REQUEST_PAYER", "").lower() == "requester"


def _refuse_password(request: Any, **_: object) -> None:  # any: botocore's request
    """ConfigError for an endpoint with a user name or password: no request with one can be signed, however often it is made."""
    parts = urlsplit(request.url)
    if parts.username is not None:
        raise ConfigError(
            f"the endpoint {parts.scheme}://{MASK}@{parts.netloc.rpartition('@')[2]} has a user name or a password before the @, expected "
            "a host: write AWS_ENDPOINT_URL (or the profile's endpoint_url) without it, and the keys into AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY or a profile of ~/.aws"
        )


def _ask_past_proxies(request: Any, **_: object) -> None:  # any: as above
    """Add the header after the request was signed: a proxy may change it."""
    if past_proxies.get():
        request.headers["Cache-Control"] = "no-cache"


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


def _opened(sockets: WeakSet[socket.socket], address: tuple[Any, ...]) -> socket.socket:  # any: family, type, protocol, name, address
    """Return a new socket for a connection to an address, which is then one of `sockets`."""
    made = socket.socket(*address[:3])
    sockets.add(made)
    return made


async def _close(filesystem: "S3FileSystem", sockets: WeakSet[socket.socket]) -> None:
    """End what runs in this loop and every connection, whatever it still has to send.

    A connection that is closed, as that of a cancelled request is, first sends what it was given, and aiohttp forgets it at once: at a
    service that reads nothing any more it would never end, and its socket would stay open without an owner. So sockets are shut down.
    """
    running = asyncio.all_tasks() - {asyncio.current_task()}
    for task in running:
        if not task.cancelling():  # what was cancelled before may be aborting an upload
            task.cancel()
    if running:
        _, left = await asyncio.wait(running, timeout=REST_S)
        for task in left:
            task.cancel()
    for opened in list(sockets):
        with contextlib.suppress(OSError):  # it is closed, or no connection yet
            opened.shutdown(socket.SHUT_RDWR)
    client = getattr(filesystem, "_s3creator", None)
    if client is not None:
        await client.__aexit__(None, None, None)
    until = time.monotonic() + REST_S
    while any(opened.fileno() != -1 for opened in list(sockets)) and time.monotonic() < until:
        await asyncio.sleep(0)  # a turn of the loop, in which transports whose connection has ended close their sockets
    await asyncio.get_running_loop().shutdown_asyncgens()


@atexit.register
def close_clients() -> None:
    """Close the connections of this process."""
    with _making:
        mine = [key for key in _clients if key[0] == os.getpid()]
        for key in mine:
            with contextlib.suppress(Exception):  # the service may be gone, and nothing is lost
                _clients.pop(key).close()


async def retried(work: Callable[[], Awaitable[T]], url: str, doing: str) -> T:
    """Await `work()` until it succeeds, fails permanently, or attempts or time are used up.

    Raises
    ------
    Answered
        The service answered with a code that a caller may expect.
    StoreError
        Anything else; the message names the remedy.
    """
    started, waits = time.monotonic(), pauses(ATTEMPTS, FIRST_PAUSE_S, 2)
    for attempt in itertools.count(1):
        try:
            return await work()
        except AecoreError:
            raise
        except Exception as error:
            if not _passing(error):
                raise store_error(error, url, doing) from error
            wait = next(waits, None)
            if wait is None or time.monotonic() - started > BUDGET_S:
                raise store_error(error, url, doing, attempt, time.monotonic() - started) from error
        await asyncio.sleep(wait)
    raise AssertionError("not reached")


def code_of(error: BaseException | None) -> str:
    """Return S3's code of an error (`PreconditionFailed`, `404`) or ""; s3fs translates errors, so their causes are searched too."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            code = str(response.get("Error", {}).get("Code", ""))
            return code or str(response.get("ResponseMetadata", {}).get("HTTPStatusCode", ""))
        error = error.__cause__
    return ""


def _status(error: BaseException | None) -> int:
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        error = error.__cause__
    return 0


def _passing(error: Exception) -> bool:
    from aiohttp import ClientError
    from botocore import exceptions

    if code := code_of(error):
        return code in _RETRIED_CODES or _status(error) in (429, 500, 502, 503, 504)
    return isinstance(error, (*_not_reached(), exceptions.ResponseStreamingError, ClientError, ShortBody))


def _not_reached() -> tuple[type[Exception], ...]:
    """Return the errors of a service that does not answer: all of botocore's but a refused certificate, which stays refused."""
    from botocore import exceptions

    connecting = (exceptions.ConnectTimeoutError, exceptions.EndpointConnectionError, exceptions.ProxyConnectionError)
    return (exceptions.HTTPClientError, *connecting, ConnectionError, TimeoutError)


_EXPECTED = frozenset({"PreconditionFailed", "412", "NoSuchKey", "404", "NotFound", "NoSuchUpload"})
_REMEDIES = {
    "NoSuchBucket": "there is no such bucket at {endpoint}: create it, or check the URL and the endpoint (AWS_ENDPOINT_URL)",
    "InvalidBucketName": "the bucket's name is not a valid one: check the URL",
    "InvalidAccessKeyId": "the service does not know the access key: check the credentials{profile} and the endpoint {endpoint}",
    "SignatureDoesNotMatch": "the secret key is wrong: check the credentials{profile}",
    "AccessDenied": "the credentials{profile} may not do this: ask for the right to read, list and write below this URL. A public bucket "
    "is read without them (AWS_NO_SIGN_REQUEST=true), one whose requesters pay with AWS_REQUEST_PAYER=requester",
    "ExpiredToken": "the session token has expired: get new credentials{profile} and run the same command again",
    "InvalidToken": "the session token is not valid: get new credentials{profile} and run the same command again",
    "RequestTimeTooSkewed": "this machine's clock is wrong by minutes: set it",
    "NotImplemented": "the service at {endpoint} does not know a call that is needed: {doing} needs conditional creates (If-None-Match)",
}
_REMEDIES |= {"403": _REMEDIES["AccessDenied"], "Forbidden": _REMEDIES["AccessDenied"], "ExpiredTokenException": _REMEDIES["ExpiredToken"]}


def store_error(error: Exception, url: str, doing: str, attempts: int = 0, seconds: float = 0.0) -> AecoreError:
    """Return the error to raise, with a message that names the remedy."""
    from botocore import exceptions

    if isinstance(error, AecoreError):
        return error
    code = code_of(error)
    if code in _EXPECTED:
        return Answered(f"cannot {doing} {url}: the service answered {code}", code)
    where = {"endpoint": endpoint(), "profile": _profile(url), "doing": doing}
    tried = f" (tried {attempts} times in {seconds:.0f} s)" if attempts else ""
    if code in _REMEDIES:
        why = f"{_REMEDIES[code].format(**where)} [{code}]"
    elif code:
        why = f"the service answered {code}: run the same command again when it is well"
    elif isinstance(error, (exceptions.NoCredentialsError, exceptions.PartialCredentialsError)):
        why = (
            "no credentials were found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or name a profile of ~/.aws "
            "in the URL (s3://profile@bucket/...)"
        )
    elif isinstance(error, exceptions.ProfileNotFound):
        why = "there is no such profile in ~/.aws/config or ~/.aws/credentials: check the name before the @"
    elif isinstance(error, _not_reached()):
        why = f"nothing answers at {where['endpoint']}: check AWS_ENDPOINT_URL (or the profile's endpoint_url) and the network"
    elif isinstance(error, (ValueError, exceptions.BotoCoreError)):
        why = f"{type(error).__name__}: check AWS_ENDPOINT_URL, AWS_REGION and the profile"
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        why = f"{error.strerror} on this machine: set AECORE_CACHE and TMPDIR to folders with room, then run the same command again"
    else:
        why = f"{type(error).__name__}: run the same command again"
    return StoreError(f"cannot {doing} {url}{tried}: {why}")


def endpoint() -> str:
    """Return the host and port of the endpoint in the environment, without anything that could be a secret."""
    text = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    parts = urlsplit(text)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}" if parts.netloc else "the endpoint of the profile or of Amazon"


def _profile(url: str) -> str:
    name, at, _ = url.removeprefix("s3://").partition("/")[0].rpartition("@")
    return f" of the profile {name!r}" if at else ""
