"""One function in a thread of its own, one call at a time: for work that releases the interpreter lock (hashes, files, the network)."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, ParamSpec, Self

P = ParamSpec("P")


class Beside(Generic[P]):
    """Call it to begin `function` beside the caller; a call first waits for the one before and raises its error.

    Leaving the `with` block waits for the last call and raises its error, unless another error leaves the block.
    """

    def __init__(self, function: Callable[P, object]) -> None:
        self._function = function
        self._thread = ThreadPoolExecutor(1)  # starts its thread at the first call
        self._last: Future[object] | None = None

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> None:
        self._wait()
        self._last = self._thread.submit(self._function, *args, **kwargs)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._wait()
        finally:
            self._thread.shutdown()

    def _wait(self) -> None:
        if self._last is not None:
            last, self._last = self._last, None
            last.result()
