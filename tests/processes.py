"""Processes that tests start, and waits for what they do. Every wait has a bound, and no process or open file outlives its test.

A test waits for exactly what it needs next: a line that the process prints, a file that it writes, a state that a server reports.
Bounds are generous, because a busy machine is no fault: a wait ends early when the process that it watches has ended.
"""

import contextlib
import os
import random
import secrets
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TypeVar

from tests.warm import MARK, WARM, WarmProcess, fork

T = TypeVar("T")
WAIT_S = 240.0
RUN_S = 480.0  # below pytest's timeout, so that the output of a command that hangs is in the message
GRACE_S = 15.0  # between a polite end and SIGKILL
AEPIPE = (*WARM, "-m", "pipelines.cli")


def wait_until(condition: Callable[[], T], what: str | Callable[[], str], timeout_s: float = WAIT_S, every_s: float = 0.05) -> T:
    """Return the first true answer of `condition`; AssertionError that says `what` did not happen in time."""
    deadline = time.monotonic() + timeout_s
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"not in {timeout_s:.0f} s: {what if isinstance(what, str) else what()}"
        time.sleep(every_s)
    return answer


class Started:
    """A command that runs. Its output goes to files, so it never waits for a reader and leaves no pipe behind."""

    def __init__(self, process: "subprocess.Popen[bytes] | WarmProcess", out: Path, err: Path, mark: str) -> None:
        self.process, self.pid, self._out, self._err, self._mark = process, process.pid, out, err, mark

    @property
    def out(self) -> str:
        """What it has written to standard output so far."""
        return self._out.read_text(errors="replace")

    @property
    def err(self) -> str:
        """What it has written to standard error so far; the same as `out` if both go to one log."""
        return self._err.read_text(errors="replace")

    def tail(self) -> str:
        return f"{self.process.args}\n{self.out[-3000:]}" + ("" if self._err == self._out else f"\n{self.err[-5000:]}")

    def wait_for(self, condition: str | Callable[[], T], what: str = "", timeout_s: float = WAIT_S, every_s: float = 0.05) -> T | bool:
        """Wait for a text in its output or for a condition; AssertionError with the output if it ends before, or in `timeout_s`."""

        def answer() -> T | bool:
            ended = self.process.poll() is not None  # asked first: what it wrote before its end counts
            found = condition in self.out + self.err if isinstance(condition, str) else condition()
            assert found or not ended, f"ended with {self.process.returncode} before: {what or condition}\n{self.tail()}"
            return found

        return wait_until(answer, lambda: f"{what or condition}\n{self.tail()}", timeout_s, every_s)

    def send(self, how: signal.Signals) -> None:
        """Send a signal to the process itself."""
        self.process.send_signal(how)

    def finish(self, timeout_s: float = RUN_S) -> "subprocess.CompletedProcess[str]":
        """Wait until it has ended; return its exit status and output, AssertionError with the output if it goes on."""
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout_s:.0f} s: {self.tail()}") from None
        return subprocess.CompletedProcess(self.process.args, self.process.returncode, self.out, self.err)

    def end(self, how: signal.Signals = signal.SIGTERM, grace_s: float = GRACE_S) -> int:
        """Ask it to end, kill what is left of it and of all that it started, and return its exit status."""
        left = self._family()  # before it ends: its children get another parent then
        if self.process.poll() is None:
            self.process.send_signal(how)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(grace_s)
        for pid, born in (left | self._family()).items():
            if _born(pid) == born:  # else the number belongs to another process by now
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        return self.process.wait(GRACE_S)

    def _family(self) -> dict[int, str]:
        """Return its descendants and all processes with its mark or session, as pid -> time of birth; itself as long as it runs."""
        running = {self.pid} if self.process.poll() is None else set()
        pids = (running | set(below(self.pid)) if running else set()) | _marked(self._mark, self.pid)
        return {pid: born for pid in pids if (born := _born(pid))}


@contextlib.contextmanager
def started(
    command: Sequence[object],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | str | None = None,
    log: Path | None = None,
    how: signal.Signals = signal.SIGTERM,
    grace_s: float = GRACE_S,
    **options: object,
) -> Iterator[Started]:
    """Start a command as the leader of a process group; when the block ends, however it does, the command and all its descendants end.

    Parameters
    ----------
    log
        Where both streams are appended; None: temporary files, one for each stream.
    how, grace_s
        The signal that asks it to end, and the time until it is killed.
    options
        More arguments of `subprocess.Popen` (`user`, `stdin`, ...).
    """
    mark = secrets.token_hex(8)
    with contextlib.ExitStack() as stack:
        if log is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="aecore-process-")))
            out, err = folder / "out", folder / "err"
        else:
            out = err = log
        with out.open("ab") as stdout, err.open("ab") as stderr:
            words = [os.fspath(word) if isinstance(word, Path) else str(word) for word in command]
            environ = {**(os.environ if env is None else env), MARK: mark}
            process = None if options else _forked(words, environ, cwd, stdout.fileno(), stderr.fileno())
            process = process or subprocess.Popen(
                words,
                env=environ,
                cwd=cwd,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
                **{"stdin": subprocess.DEVNULL, **options},  # type: ignore[call-overload]
            )
        running = Started(process, out, err, mark)
        if process.stdin is not None:
            stack.enter_context(contextlib.suppress(BrokenPipeError))
            stack.callback(process.stdin.close)
        stack.callback(running.end, how, grace_s)
        yield running


def run(
    command: Sequence[object],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | str | None = None,
    timeout_s: float = RUN_S,
    check: bool = False,
) -> "subprocess.CompletedProcess[str]":
    """Run a command to its end; nothing that it started is left. With `check`, AssertionError with its output if it fails."""
    with started(command, env=env, cwd=cwd) as running:
        done = running.finish(timeout_s)
        assert done.returncode == 0 or not check, f"exit status {done.returncode}: {running.tail()}"
        return done


@contextlib.contextmanager
def children(*processes: BaseProcess) -> Iterator[None]:
    """Start processes of `multiprocessing`; none is left when the block ends, however it does."""
    try:
        for process in processes:
            process.start()
        yield
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join(GRACE_S)


def join(*processes: BaseProcess, timeout_s: float = RUN_S) -> list[int | None]:
    """Wait until processes of `multiprocessing` have ended; return their exit codes."""
    wait_until(lambda: not any(process.is_alive() for process in processes), lambda: f"{processes} have ended", timeout_s)
    return [process.exitcode for process in processes]


def below(pid: int | None = None) -> dict[int, str]:
    """Return pid -> command line of all descendants of a process (this one by default)."""
    parents: dict[int, int] = {}
    for number in _pids():
        if stat := _stat(number):
            parents[number] = int(stat[1])
    found, frontier = {}, {pid or os.getpid()}
    while frontier:
        frontier = {child for child, parent in parents.items() if parent in frontier} - set(found)
        found |= {child: _read(child, "cmdline") for child in frontier}
    return found


def free_ports(count: int) -> list[int]:
    """Return ports that nothing listens on, below those that the system gives to outgoing connections: none of these can take one."""
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    candidates = range(max(1024, lowest - 12000), lowest) if lowest > 2048 else range(20000, 32000)
    found: list[int] = []
    with contextlib.ExitStack() as stack:
        for port in random.Random(secrets.randbits(64)).sample(candidates, len(candidates)):
            probe = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                found.append(port)
            if len(found) == count:
                return found
    raise AssertionError(f"no {count} free ports in {candidates}")


def free_port() -> int:
    return free_ports(1)[0]


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace").replace("\0", " ")
    except OSError:
        return ""


def _stat(pid: int) -> list[str]:
    """Return the fields of a process from its state on; none if it is not there any more."""
    return _read(pid, "stat").rpartition(")")[2].split()


def _born(pid: int) -> str:
    """Return when a process was started; empty for one that has ended, also if its parent has not asked for its status yet."""
    stat = _stat(pid)
    return stat[19] if stat and stat[0] != "Z" else ""


def _forked(words: list[str], environ: Mapping[str, str], cwd: Path | str | None, out: int, err: int) -> WarmProcess | None:
    with open(os.devnull, "rb") as nothing:
        return fork(words, environ, os.path.abspath(cwd or "."), (nothing.fileno(), out, err))


def _marked(mark: str, session: int) -> set[int]:
    return {pid for pid in _pids() if _stat(pid)[3:4] == [str(session)] or f"{MARK}={mark}" in _read(pid, "environ")}
