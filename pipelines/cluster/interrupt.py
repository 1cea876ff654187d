"""Turns Ctrl-C and SIGTERM into a request to stop, for work that saves its state before it ends.

Inside a `StopRequest` the first signal only sets the request; a second one has its usual effect at once. `end` then gives the first
signal its usual effect too (Prefect, for example, has its own handler of SIGTERM).
"""

import logging
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, NoReturn

logger = logging.getLogger(__name__)
SIGNALS = (signal.SIGINT, signal.SIGTERM)
STOP_MESSAGE = b"\naepipe: finishing the current step and writing a checkpoint; send the signal again to end at once\n"


class StopRequest:
    """A context manager; calling it returns whether a signal was received. Outside the main thread, and for ignored signals, never."""

    def __init__(self) -> None:
        self._received: int | None = None
        self._before: dict[int, Any] = {}  # any: the type of handlers in `signal`

    def __call__(self) -> bool:
        """Return whether a signal was received."""
        return self._received is not None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                before = signal.getsignal(number)
                if before not in (None, signal.SIG_IGN):
                    self._before[number] = before
                    signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, before in self._before.items():
            if signal.getsignal(number) == self._on_signal:
                signal.signal(number, before)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._received is None:
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
