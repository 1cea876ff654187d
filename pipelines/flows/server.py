"""The Prefect servers that `pipelines` starts: a lasting one for `aepipe serve`, a temporary one for `aepipe run`.

A client that can change a deployment can run code as its owner. So a server listens on 127.0.0.1 only, on a socket that is bound before
it starts: no other process can answer on its port. Every request needs a random password of this server; it is in the environment of
our processes and, for a lasting server, in `server.env` of PREFECT_HOME (readable by its owner only), never on a command line.
Nobody else can read what a server writes either: parameters and logs of all runs are in its database.
A server ends when the last process that uses it has released its lock, however that process ended.
"""

import atexit
import base64
import contextlib
import errno
import fcntl
import logging
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aecore.errors import AecoreError, ClusterError, ServiceLost, StoreError, printable
from aecore.store import named_folder, private_folder
from pipelines.cluster.interrupt import patience
from pipelines.cluster.outside import known_error
from pipelines.cluster.process import is_alive, process_name
from pipelines.cluster.session import LOOPBACK, import_environment

logger = logging.getLogger(__name__)
START_S, END_S = 120.0, 20.0
FLOW_END_S = 60.0  # for a flow to end after a signal: its jobs are stopped, its state is reported, its server ends
PORT = 4200  # Prefect's default; any free one if it is taken
PROCESS = "AEPIPE_SERVER_PROCESS"
ROOM_BYTES = 4 << 20  # written to see whether there is room: four times a new database of Prefect
_TAIL_BYTES = 1 << 16
_ERROR = re.compile(r"(?m)^(?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*(?:Error|Exception)\b: .*|^.*(?:[Kk]illed|MemoryError).*$")
_OF_DATABASE = re.compile(r"(?i)sqlite3?\.|sqlalchemy|asyncpg|database")
_NO_MEMORY = re.compile(r"(?i)MemoryError|cannot allocate memory|can't start new thread|out of memory")
_left_running: "list[subprocess.Popen[bytes]]" = []


@dataclass(frozen=True)
class Server:
    """A server that was started here: the address of its page, its password, its process."""

    page: str
    auth: str = field(repr=False)
    process: str  # see `process_name`

    @property
    def settings(self) -> dict[str, str]:
        """Return the environment of a client."""
        return {"PREFECT_API_URL": f"{self.page}/api", "PREFECT_API_AUTH_STRING": self.auth}

    def answers(self, timeout_s: float) -> bool:
        """Return whether it accepts the password."""
        login = base64.b64encode(self.auth.encode()).decode()
        request = urllib.request.Request(f"{self.page}/api/admin/version", headers={"Authorization": f"Basic {login}"})
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            direct.open(request, timeout=timeout_s).close()
        except (urllib.error.URLError, OSError):
            return False
        return True


def with_server(flow: Callable[..., Any]) -> Callable[..., Any]:
    """Return a flow that runs on the server of PREFECT_API_URL, or else on a temporary one."""

    def run(*arguments: Any, **options: Any) -> Any:
        from prefect.settings import PREFECT_API_URL

        with patience(FLOW_END_S), contextlib.nullcontext() if PREFECT_API_URL.value() else temporary_server():
            return flow(*arguments, **options)

    return run


@contextlib.contextmanager
def lasting_server() -> Iterator[tuple[Server, bool]]:
    """Use the lasting server of PREFECT_HOME, or start it; yields it and whether it was started.

    While it is used, PREFECT_API_URL and PREFECT_API_AUTH_STRING of this process name it.

    Raises
    ------
    ClusterError
        It does not start.
    """
    home = _home()
    record, log = home / "server.env", home / "server.log"
    with contextlib.ExitStack() as stack:
        with _locked(home / "server.start.lock", fcntl.LOCK_EX):
            used = stack.enter_context(contextlib.ExitStack())
            used.enter_context(_locked(home / "server.lock", fcntl.LOCK_SH))  # waits for a server that is ending
            server, child = _recorded(record), None
            if server is None:
                server, child = _start(_bound(PORT), home / "server.lock", log, record)
        stack.callback(_wait_for_end, used, record, child)
        logger.warning(
            "Prefect's page: %s (password: the value of PREFECT_API_AUTH_STRING in %s; log: %s)%s",
            server.page,
            record,
            log,
            "" if child else ": using the server that is running",
        )
        stack.enter_context(_environment(server.settings))
        with _settings(server):
            yield server, child is not None


@contextlib.contextmanager
def temporary_server() -> Iterator[Server]:
    """Use this process's temporary server, which is started the first time and ends with the process: no page, no scheduler.

    Raises
    ------
    StoreError
        PREFECT_HOME has no room for its files, or its database cannot be used: at the start, or later.
    ClusterError
        It does not start for another reason.
    """
    server = _Temporary.server
    if server is None or not is_alive(server.process) or not server.answers(10):
        server = _Temporary.server = _start_temporary()
    with _settings(server, has_page=False):
        try:
            yield server
        except Exception as error:  # a server without room answers with status 500, or not any more
            if isinstance(known_error(error), ServiceLost) and (refused := _refused_in(_home())):
                raise _no_room("stopped working", refused) from error
            raise


def empty_folder() -> Path:
    """Return an empty working directory: Prefect imports flows from it first, even with PYTHONSAFEPATH."""
    return private_folder(_home() / "empty", "remove it")


def _home() -> Path:
    return named_folder(Path(os.environ["PREFECT_HOME"]).absolute(), "set PREFECT_HOME to a folder of your own")


class _Temporary:
    server: Server | None = None


def _start_temporary() -> Server:
    lock = _home() / f"run-{secrets.token_hex(6)}.log"
    used = contextlib.ExitStack()
    used.enter_context(_locked(lock, fcntl.LOCK_SH))
    server, child = _start(_bound(0), lock, lock, None)
    atexit.register(_wait_for_end, used, None, child)
    return server


def _start(listening: socket.socket, lock: Path, log: Path, record: Path | None) -> tuple[Server, "subprocess.Popen[bytes]"]:
    """Start a server on a bound socket and wait until it answers; without a `record` it is a temporary one."""
    page, auth = f"http://{LOOPBACK}:{listening.getsockname()[1]}", f"admin:{secrets.token_urlsafe(32)}"
    environment = os.environ | import_environment() | _safe_settings(page, auth, has_page=record is not None)
    environment["PREFECT_HOME"] = str(_home())
    environment.pop("PREFECT_API_URL", None)
    command = [sys.executable, "-P", "-m", "pipelines.flows.server_process", str(listening.fileno()), str(lock), str(record or "")]
    for database in _home().glob("prefect.db*"):  # of an earlier version, or of a server that was started by hand
        if not database.is_symlink():
            with contextlib.suppress(FileNotFoundError, PermissionError):  # another server has just closed it; or it is another user's
                database.chmod(0o600)
    with listening, open(log, "ab" if record is None else "wb", opener=_private) as output:
        os.fchmod(output.fileno(), 0o600)
        child = subprocess.Popen(
            command, env=environment, cwd=empty_folder(), stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            pass_fds=[listening.fileno()], start_new_session=True, umask=0o077,
        )  # fmt: skip
    server = Server(page, auth, process_name(child.pid))
    try:
        _wait_for_start(server, child, log)
        if record is not None:
            _write(record, server)
    except BaseException:
        child.kill()
        child.wait()
        raise
    return server, child


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


def _safe_settings(page: str, auth: str, *, has_page: bool) -> dict[str, str]:
    return {
        "PREFECT_SERVER_API_AUTH_STRING": auth,
        "PREFECT_API_AUTH_STRING": auth,
        "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": page,
        # with the default, in memory, the slots of runs that outlive the server would never be freed
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "PREFECT_SERVER_UI_API_URL": f"{page}/api",  # the page uses port 4200 unless this is set
        "PREFECT_SERVER_UI_ENABLED": str(has_page).lower(),
    }


def _wait_for_start(server: Server, child: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and child.poll() is None:
        if server.answers(2):  # the socket is open before the server is ready
            return
    raise _not_started(child.poll(), log)


def _not_started(status: int | None, log: Path) -> AecoreError:
    """Return the error about a server that ended with this exit status (negative: a signal), or runs and does not answer."""
    ended = f"did not start in {START_S:.0f} s" if status is None else "ended while it started"
    if refused := _refused_in(_home()):  # asked first: on a full disk there is no log either
        return _no_room(ended, refused)
    said = _last_error(log)
    if _NO_MEMORY.search(said) or status == -signal.SIGKILL:
        return ClusterError(
            f"the Prefect server {ended}: not enough memory here ({said or 'it was killed'}); use a larger machine, or set "
            "PREFECT_API_URL to a server on another one"
        )
    if _OF_DATABASE.search(said):
        return StoreError(
            f"the Prefect server {ended}: its database cannot be used ({said}); end what else uses PREFECT_HOME={_home()}, or set "
            f"PREFECT_HOME to another folder (log: {log})"
        )
    return ClusterError(f"the Prefect server {ended}{f' ({said})' if said else ''}, see {log}; or set PREFECT_API_URL to a running one")


def _no_room(ended: str, refused: OSError) -> StoreError:
    remedy = "raise the limit of file sizes (ulimit -f)" if refused.errno == errno.EFBIG else "free space there"
    return StoreError(
        f"the Prefect server {ended}: its files in PREFECT_HOME={_home()} cannot be written ({refused.strerror}); what is finished is "
        f"kept: {remedy}, or set PREFECT_HOME to a folder that has {ROOM_BYTES >> 20} MB, then run the same command again"
    )


def _refused_in(home: Path) -> OSError | None:
    """Return why a server cannot write its files into a folder, found by writing one as it does; None if it can."""
    path = home / f"room-{secrets.token_hex(6)}"
    try:
        with open(path, "xb", opener=_private) as file:
            file.write(bytes(ROOM_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
    return None


def _last_error(log: Path) -> str:
    """Return the last line of a log that names an error, in one line that can be printed; empty if there is none."""
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
        found = _ERROR.findall(file.read().decode(errors="replace"))
        return printable(found[-1], one_line=True)[:300] if found else ""
    return ""


def _wait_for_end(used: contextlib.ExitStack, record: Path | None, child: "subprocess.Popen[bytes] | None") -> None:
    """Release a server. If no other process uses it, it removes its record and ends: wait for that."""
    used.close()
    if child is None:
        return
    deadline = time.monotonic() + 2
    while record is not None and record.exists() and child.poll() is None:
        if time.monotonic() > deadline:
            _left_running.append(child)  # another `aepipe serve` uses it; Python warns of a child without a reference
            return
        time.sleep(0.05)
    try:
        child.wait(timeout=END_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _bound(port: int) -> socket.socket:
    """Return a listening socket on 127.0.0.1: on this port, or on a free one if it is taken."""
    for wanted in dict.fromkeys((port, 0)):
        listening = socket.socket()
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((LOOPBACK, wanted))
            listening.listen(128)
        except OSError:
            listening.close()
            continue
        if wanted != port:
            logger.warning("port %d is taken by another program: using port %d", port, listening.getsockname()[1])
        return listening
    raise ClusterError(f"no free port on {LOOPBACK} for a Prefect server: set PREFECT_API_URL to a running one")


def _write(record: Path, server: Server) -> None:
    """Write address and password for other processes of this user; a shell can read the file too (`. server.env`)."""
    lines = server.settings | {PROCESS: server.process}
    temporary = record.with_name(f"{record.name}.{secrets.token_hex(6)}")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "w") as file:
        file.writelines(f"{name}={value}\n" for name, value in lines.items())
    temporary.replace(record)


def _recorded(record: Path) -> Server | None:
    """Return the server of a record if its process is alive, listens on its port and accepts the password, else None."""
    try:
        with open(os.open(record, os.O_RDONLY | os.O_NOFOLLOW)) as file:
            found = os.fstat(file.fileno())
            lines = dict(line.rstrip("\n").split("=", 1) for line in file if "=" in line)
        if found.st_uid != os.getuid() or found.st_mode & 0o077:
            return None
        page = lines["PREFECT_API_URL"].removesuffix("/api")
        server = Server(page, lines["PREFECT_API_AUTH_STRING"], lines[PROCESS])
        port = int(page.rpartition(":")[2])
    except (OSError, KeyError, ValueError):
        return None
    # the password is sent only to the process that it belongs to: after a reboot another one may listen on the port
    return server if is_alive(server.process) and _listens(server.process, port) and server.answers(60) else None


def _listens(process: str, port: int) -> bool:
    """Return whether this process owns the socket that listens on this port of 127.0.0.1."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    inodes = {f"socket:[{row[9]}]" for row in rows if row[3] == "0A" and row[1] == f"0100007F:{port:04X}"}
    try:
        descriptors = list(Path(f"/proc/{process.partition(':')[0]}/fd").iterdir())
    except OSError:  # it has ended meanwhile
        return False
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            if os.readlink(descriptor) in inodes:
                return True
    return False


@contextlib.contextmanager
def _locked(path: Path, how: int) -> Iterator[None]:
    """Hold a lock on a file; the kernel releases it when the process ends."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, how)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _settings(server: Server, *, has_page: bool = True) -> Iterator[None]:
    """Make Prefect in this process use the server, even if it was imported before."""
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, PREFECT_UI_URL, temporary_settings

    values: dict[Any, str] = {PREFECT_API_URL: f"{server.page}/api", PREFECT_API_AUTH_STRING: server.auth}
    if not has_page:
        values[PREFECT_UI_URL] = ""  # else the run's log would show the address of a page that does not exist
    with temporary_settings(values):
        yield
