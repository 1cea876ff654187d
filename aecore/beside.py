"""Functions in threads of their own: for work that releases the interpreter lock (hashes, files, the network)."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, ParamSpec, Self, TypeVar

P = ParamSpec("P")
A = TypeVar("A")
R = TypeVar("R")


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


def in_order(function: Callable[[A], R], arguments: Iterable[A], *, threads: int) -> Generator[R, None, None]:
    """Yield `function(argument)` of each argument in their order, made by so many threads, at most one more than there are threads ahead.

    An error is raised in the place of its result. Closing the generator waits for the calls that have begun.
    """
    with ThreadPoolExecutor(threads) as pool:
        flying = deque[Future[R]]()
        try:
            for argument in arguments:
                flying.append(pool.submit(function, argument))
                if len(flying) > threads:
                    yield flying.popleft().result()
            while flying:
                yield flying.popleft().result()
        finally:
            for waiting in flying:
                waiting.cancel()
