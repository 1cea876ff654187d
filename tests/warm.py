"""Python processes of tests without the two seconds that importing torch takes: forks of a process that has imported it.

`started([*WARM, "-m", "pipelines.cli", ...])` and `[*WARM, "-c", code, ...]` are answered by such a fork if they can be, else by a new
interpreter, which ignores `-X warm`. A fork is a process like another one: with a pid, a session, a working directory, an environment
and streams of its own, it ends by signals and exit statuses, and runs its exit handlers. It imports `prefect` and `ray` itself, since
they read the environment then. What it does not have of its own is `/proc/PID/environ` and `/proc/PID/cmdline`.

The template (`python -P tests/warm.py SOCKET FD`) ends with the process that started it.
"""

import atexit
import contextlib
import faulthandler
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Mapping, Sequence
from pathlib import Path

WARM = (sys.executable, "-P", "-X", "warm")
MARK = "AECORE_TEST_PROCESS"  # in the environment of a started command and so in that of all its descendants
COLD = ("PYTHON", "OMP_", "MKL_", "OPENBLAS_", "TORCH", "AECORE_NATIVE")  # what is read before or while modules are imported
ROOT = Path(__file__).resolve().parent.parent
_templates: dict[tuple[int, tuple[tuple[str, str], ...]], "Template"] = {}  # pid of the process that started it, what it was imported with


class WarmProcess:
    """A fork of a template; what `Started` asks of a `subprocess.Popen`."""

    stdin = None

    def __init__(self, args: list[str], connection: socket.socket) -> None:
        self.args, self.returncode, self._connection = args, None, connection
        self._received = b""
        self.pid = int(self._line(60.0) or -1)
        assert self.pid > 0, f"the template of {args} has ended"

    returncode: int | None

    def _line(self, timeout_s: float | None) -> bytes | None:
        """Return the next line of the template, empty if it has ended; None if there is none in time."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while b"\n" not in self._received:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._connection], [], [], left)[0]:
                return None
            if not (more := self._connection.recv(64)):
                return b""
            self._received += more
        line, _, self._received = self._received.partition(b"\n")
        return line

    def poll(self) -> int | None:
        """Return the exit status, None as long as it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit status; subprocess.TimeoutExpired if it still runs then."""
        if self.returncode is None:
            line = self._line(timeout)
            if line is None:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            self.returncode = int(line or -signal.SIGKILL)
            self._connection.close()
        return self.returncode

    def send_signal(self, how: int) -> None:
        """Send a signal unless it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, how)


class Template:
    """The process that forks, as the one that asks sees it."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        path = os.path.join(tempfile.mkdtemp(prefix="aecore-warm-"), "socket")
        alive, self._held = os.pipe()  # the template reads its end when this process has none
        self._process = subprocess.Popen(
            [sys.executable, "-P", Path(__file__), path, str(alive)],
            pass_fds=[alive],
            start_new_session=True,
            cwd=ROOT,
            env={name: value for name, value in environ.items() if name != MARK},  # it does not end with the first command
        )
        os.close(alive)
        self._path = path

    def fork(self, command: list[str], environ: Mapping[str, str], cwd: str, streams: tuple[int, int, int]) -> WarmProcess:
        """Run `command` (the words after `WARM`) in a fork."""
        self._wait()
        return _asked(self._path, command, environ, cwd, streams)

    def write_script(self, script: Path, command: Sequence[str]) -> None:
        """Write a script for a shell: it runs `command` and its arguments in a fork, and gives on SIGINT, SIGTERM and the exit status."""
        self._wait()
        call = f"from tests.warm import _script; _script({self._path!r}, {list(command)!r})"
        script.write_text(f"#!{sys.executable} -IS\nimport sys; sys.path.append({str(ROOT)!r})\n{call}\n")
        script.chmod(0o755)

    def _wait(self) -> None:
        deadline = time.monotonic() + 120
        while not os.path.exists(self._path):
            assert self._process.poll() is None and time.monotonic() < deadline, "the template of warm processes does not answer"
            time.sleep(0.02)

    def end(self) -> None:
        os.close(self._held)
        self._process.wait()


def fork(words: Sequence[str], environ: Mapping[str, str], cwd: str, streams: tuple[int, int, int]) -> WarmProcess | None:
    """Run a command that begins with `WARM` in a fork; None for another one, and where it begins with a library of its own."""
    if tuple(words[: len(WARM)]) != WARM or "LD_PRELOAD" in environ:
        return None
    return template(environ).fork(list(words[len(WARM) :]), environ, cwd, streams)


def template(environ: Mapping[str, str]) -> Template:
    """Return this process's template for such an environment; it is started the first time and ends with this process."""
    cold = tuple(sorted((name, value) for name, value in environ.items() if name.startswith(COLD)))
    if (os.getpid(), cold) not in _templates:
        _templates[os.getpid(), cold] = made = Template(environ)
        atexit.register(made.end)
    return _templates[os.getpid(), cold]


def _asked(path: str, command: list[str], environ: Mapping[str, str], cwd: str, streams: tuple[int, int, int]) -> WarmProcess:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    request = json.dumps({"command": command, "environ": dict(environ), "cwd": cwd}).encode("utf-8", "surrogateescape")
    socket.send_fds(connection, [len(request).to_bytes(8, "little")], list(streams))
    connection.sendall(request)
    return WarmProcess([*WARM, *command], connection)


def _script(path: str, command: list[str]) -> None:
    """Be what `Template.write_script` writes."""
    process = _asked(path, [*command, *sys.argv[1:]], os.environ, os.getcwd(), (0, 1, 2))
    for how in (signal.SIGINT, signal.SIGTERM):
        signal.signal(how, lambda number, _: os.kill(process.pid, number))
    status = process.wait()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


def _serve(path: str, alive: int) -> list[str]:
    """Fork for each connection and report how forks end; return, in a fork, its command, and never in the template."""
    server = socket.socket(socket.AF_UNIX)
    server.bind(f"{path}.new")
    server.listen(64)
    os.rename(f"{path}.new", path)  # there when it answers
    running: dict[int, tuple[int, socket.socket]] = {}  # pidfd -> pid, connection
    while True:
        ready = select.select([server, alive, *running], [], [])[0]
        if alive in ready:
            for pid, _ in running.values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            shutil.rmtree(os.path.dirname(path), ignore_errors=True)
            os._exit(0)
        for pidfd in [fd for fd in ready if fd in running]:
            pid, connection = running.pop(pidfd)
            os.close(pidfd)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            with contextlib.suppress(OSError):
                connection.sendall(b"%d\n" % status)
            connection.close()
        if server in ready:
            connection, _ = server.accept()
            head, streams, _, _ = socket.recv_fds(connection, 8, 3)
            request = json.loads(_exactly(connection, int.from_bytes(head, "little")).decode("utf-8", "surrogateescape"))
            pid = os.fork()
            if not pid:
                for held in (server, connection, *(other for _, other in running.values())):
                    held.close()
                for fd in (alive, *running):
                    os.close(fd)
                return _become(request, streams)
            connection.sendall(b"%d\n" % pid)
            running[os.pidfd_open(pid)] = pid, connection
            for fd in streams:
                os.close(fd)


def _exactly(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        data += connection.recv(count - len(data)) or sys.exit("the request ended early")
    return data


def _become(request: dict[str, object], streams: list[int]) -> list[str]:
    """Make this fork what a new interpreter would be; return its command."""
    os.setsid()
    for number, fd in enumerate(streams):
        os.dup2(fd, number)
        os.close(fd)
    os.environ.clear()
    os.environ.update(request["environ"])  # type: ignore[call-overload]
    time.tzset()
    faulthandler.enable()  # a crash in a library says where
    tempfile.tempdir = None  # TMPDIR may be another one
    os.chdir(str(request["cwd"]))
    for name in [name for name in sys.modules if name == "tests" or name.startswith("tests.")]:
        del sys.modules[name]
    command: list[str] = request["command"]  # type: ignore[assignment]
    sys.orig_argv = [*WARM, *command]
    return command


def _run(command: list[str]) -> int:
    """Do what the interpreter does with `-m MODULE ...` or `-c CODE ...`; return the exit status."""
    option, what, *rest = command
    try:
        if option == "-m":
            sys.argv = [what, *rest]
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            sys.argv = ["-c", *rest]
            sys.modules["__main__"] = module = types.ModuleType("__main__")
            exec(compile(what, "<string>", "exec"), vars(module))
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    except BaseException as error:
        own = error.__traceback__
        assert own is not None
        sys.excepthook(type(error), error.with_traceback(own.tb_next), own.tb_next)
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        return 1
    return 0


def _import_all() -> None:
    """Import what commands import, but what reads the environment at that moment."""
    for package in ("aecore", "pipelines.cli", "pipelines.recipe", "pipelines.steps"):
        found = importlib.import_module(package)
        for module in pkgutil.walk_packages(found.__path__, f"{package}."):
            if module.name.rpartition(".")[2] not in ("__main__", "_native"):
                importlib.import_module(module.name)
    for package in ("s3fs", "torch.utils.data", "pyarrow.dataset"):
        importlib.import_module(package)
    assert not {"ray", "prefect"} & sys.modules.keys()


if __name__ == "__main__":
    _import_all()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.freeze()
    status = _run(_serve(sys.argv[1], int(sys.argv[2])))
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)  # taking all modules down takes longer than most commands
