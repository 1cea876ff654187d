"""Ctrl-C and SIGTERM as a request to stop, for work that saves where it is before it ends.

While a `StopRequest` is entered the first signal only sets it, and a second one does at once what it would have done. The program then
ends as it would have ended (Prefect, for one, has a handler of its own for SIGTERM), only later: by `end`.
"""

import logging
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, NoReturn

logger = logging.getLogger(__name__)
SIGNALS = (signal.SIGINT, signal.SIGTERM)
STOP_MESSAGE = b"\naepipe: ending the present step and writing a checkpoint; the same signal again ends at once\n"


class StopRequest:
    """Whether a signal came since it was entered: call it. Outside of the main thread, and for signals that are ignored, never."""

    def __init__(self) -> None:
        self._received: int | None = None
        self._before: dict[int, Any] = {}  # any: as the signal module types handlers

    def __call__(self) -> bool:
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
            os.write(2, STOP_MESSAGE)  # a handler may run inside of a write to standard error, which cannot be entered again
            return
        self._restore()
        signal.raise_signal(number)

    def end(self, message: str) -> NoReturn:
        """Do what the signal would have done when it came; a KeyboardInterrupt says `message`, anything else is logged with it."""
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
