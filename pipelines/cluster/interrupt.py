"""Turns Ctrl-C and SIGTERM into a request to stop, for work that saves its state before it ends, and bounds the time until the end.

Inside a `StopRequest` that somebody polls, the first signal only sets the request; a second one, and any before the first poll, when
there is nothing to save, has its usual effect at once. `end` then gives the first signal its usual effect too (Prefect, for example, has
its own handler of SIGTERM).

A handler of Python runs in the main thread, between two of its instructions. It never does while that thread is in a call that does not
return (a read of a hanging network disk), and the exception that it raises ends nothing while cleaning up waits for a thread that is in
such a call (the requests to a service that never answers). So the process of a command has a thread that sees signals by itself
(`end_in_time`) and ends the process when the time is over. Whatever is committed stays: the end is no other than that by SIGKILL.
"""

import contextlib
import logging
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any, NoReturn

from aecore.errors import AecoreError, Interrupted

logger = logging.getLogger(__name__)
SIGNALS = (signal.SIGINT, signal.SIGTERM)
PATIENCE_S = 4.0  # from a signal to the end, for work that needs no time to stop
GRACE_S = 20.0  # more, to end a step and write a checkpoint: Prefect, SLURM and Kubernetes kill after 30
LOOK_S = 0.5
STOP_MESSAGE = (
    b"\naepipe: finishing the current step and writing a checkpoint (%d s at most); send the signal again to end at once\n" % GRACE_S
)
LEFT = (
    "interrupted, and a read or a request did not return in time: it was abandoned; what is finished is kept, the same command goes on "
    "from there"
)
_patience = [PATIENCE_S]
_say: Callable[[AecoreError], None] | None = None
_needed_until = 0.0  # when a block of `patience` was left for the last time


@contextlib.contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Give this process more time to end after a signal, as long as the `with` block lasts; `math.inf`: all that it takes."""
    global _needed_until
    _patience.append(seconds)
    try:
        yield
    finally:
        _needed_until = time.monotonic()
        _patience.remove(seconds)


def end_in_time(say: Callable[[AecoreError], None]) -> None:
    """Let this process end when `PATIENCE_S`, and what `patience` adds, have passed since the first signal. For the main thread.

    Parameters
    ----------
    say
        Reports the error with whose exit code the process ends. It must not wait for a lock that a thread may hold, as of `sys.stderr`.
    """
    global _say
    _say = say
    waiting, woken = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)  # written by whichever thread the system gives the signal to
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # the signals of a child are not this process's

    def watch() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        while not _arrived(waiting):
            pass
        first = time.monotonic()
        while time.monotonic() < max(first, _needed_until) + sum(_patience):
            time.sleep(LOOK_S)
        leave(Interrupted(LEFT))

    threading.Thread(target=watch, name="aepipe-signals", daemon=True).start()


def leave(error: AecoreError) -> None:
    """End this process at once, from any thread; where that was not prepared by `end_in_time`, the error is only logged."""
    if _say is None:
        logger.error("%s", error)
        return
    try:
        _say(error)
    finally:
        os._exit(error.exit_code)


def _arrived(waiting: int) -> bool:
    """Return whether a signal arrived within `LOOK_S`.

    One that the system gave to a main thread in an uninterruptible call is pending: this thread, which blocks it, can see that.
    """
    if select.select([waiting], [], [], LOOK_S)[0]:
        return any(number in SIGNALS for number in os.read(waiting, 4096))
    return any(number in SIGNALS for number in signal.sigpending())


def write_line(line: str, descriptor: int = 2) -> None:
    """Write a line to standard error (or output) if that takes it at once: not through `sys`, whose streams what hangs may have locked."""
    with contextlib.suppress(OSError, ValueError):
        if select.select([], [descriptor], [], 0)[1]:
            os.write(descriptor, f"{line}\n".encode())


class StopRequest:
    """A context manager; calling it returns whether a signal was received. Outside the main thread, and for ignored signals, never."""

    def __init__(self) -> None:
        self._received: int | None = None
        self._polled = False
        self._before: dict[int, Any] = {}  # any: the type of handlers in `signal`
        self._grace = contextlib.ExitStack()

    def __call__(self) -> bool:
        """Return whether a signal was received."""
        self._polled = True
        return self._received is not None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                before = signal.getsignal(number)
                if before not in (None, signal.SIG_IGN):
                    self._before[number] = before
                    signal.signal(number, self._on_signal)
        self._grace.enter_context(patience(GRACE_S))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()

    def _restore(self) -> None:
        self._grace.close()
        for number, before in self._before.items():
            if signal.getsignal(number) == self._on_signal:
                signal.signal(number, before)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._received is None and self._polled:
            self._received = number
            os.write(2, STOP_MESSAGE)  # not `sys.stderr`: a handler may run in the middle of a write to it, which is not reentrant
            return
        self._restore()
        signal.raise_signal(number)

    def end(self, message: str) -> NoReturn:
        """Give the received signal its usual effect: a KeyboardInterrupt carries `message`, for any other effect it is logged."""
        self._restore()
        before = self._before.get(self._received or 0)
        try:
            if callable(before):
                before(self._received, None)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(message) from None
        except BaseException:
            logger.warning("%s", message)
            raise
        raise KeyboardInterrupt(message)


class StopFlag:
    """A Ray actor that reserves no CPU: the driver sets the flag, rank 0 polls it. It is here since its process then imports no torch."""

    def __init__(self) -> None:
        self._requested = False

    def request(self) -> None:
        """Request a stop."""
        self._requested = True

    def is_requested(self) -> bool:
        """Return whether a stop was requested."""
        return self._requested
