"""Ordered work-ahead in threads, for calls that release the interpreter lock (hashes, files, the network, torch).

Nothing here outlives its `with` block or its generator: leaving either waits for the calls that have begun. The error of a call is
raised in place of its result.
"""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from queue import SimpleQueue
from types import TracebackType
from typing import Generic, ParamSpec, Self, TypeVar

P = ParamSpec("P")
A = TypeVar("A")
R = TypeVar("R")
T = TypeVar("T")


class BackgroundCall(Generic[P]):
    """Each call starts `function` in a thread, after it has waited for the previous call and raised its error, if any.

    Leaving the `with` block waits for the last call and raises its error, unless another error leaves the block.
    """

    def __init__(self, function: Callable[P, object]) -> None:
        self._function = function
        self._thread = ThreadPoolExecutor(1)  # starts its thread at the first call
        self._last: Future[object] | None = None

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> None:
        """Wait for the previous call and start the next one."""
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


def submit_ahead(
    submit: Callable[[A], Future[R]],
    arguments: Iterable[A],
    most: int,
    *,
    alone: Callable[[A], bool] = lambda argument: False,
    eager: bool = False,
) -> Generator[Future[R], None, None]:
    """Yield the futures of `submit(argument)` in order; the caller takes each result or error, and may continue after an error.

    Parameters
    ----------
    submit : callable
        Starts one call and returns its future.
    arguments : iterable
        One argument per call, taken in the caller's thread.
    most : int
        Number of calls that are in flight (at least 1).
    alone : callable, optional
        Whether an argument waits until the futures of all earlier ones were taken (it is large, say).
    eager : bool
        Yield finished futures before the next argument is taken: for arguments that are slow to make.
    """
    begun = deque[Future[R]]()
    try:
        for argument in arguments:
            while begun and alone(argument):
                yield begun.popleft()
            begun.append(submit(argument))
            while begun and (len(begun) >= most or (eager and begun[0].done())):
                yield begun.popleft()
        while begun:
            yield begun.popleft()
    finally:
        for future in begun:
            future.cancel()


def map_ordered(
    function: Callable[[A], R], arguments: Iterable[A], *, threads: int, alone: Callable[[A], bool] = lambda argument: False
) -> Generator[R, None, None]:
    """Yield `function(argument)` of each argument in order, computed by `threads` threads, at most `threads + 1` calls ahead.

    Arguments are taken in the caller's thread; for `alone` see `submit_ahead`.
    """
    with (
        ThreadPoolExecutor(threads) as pool,
        closing(submit_ahead(lambda argument: pool.submit(function, argument), arguments, threads + 1, alone=alone)) as futures,
    ):
        for future in futures:
            yield future.result()


def prefetched(source: Generator[T, None, None], depth: int) -> Generator[T, None, None]:
    """Yield the items of `source`, computed by one thread at most `depth` items ahead; `depth` 0 uses no thread.

    `source` is closed at the end in both cases.
    """
    if depth == 0:
        yield from source
        return
    items: SimpleQueue[tuple[T] | BaseException | None] = SimpleQueue()
    room = threading.Semaphore(depth)
    stopped = threading.Event()

    def work() -> None:
        try:
            room.acquire()
            while not stopped.is_set():
                items.put((next(source),))
                room.acquire()
        except StopIteration:
            items.put(None)
        except BaseException as error:  # the consumer raises it
            items.put(error)
        finally:
            source.close()

    thread = threading.Thread(target=work, name="aecore-prefetch", daemon=True)
    thread.start()
    try:
        while (item := items.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            room.release()
            yield item[0]
    finally:
        stopped.set()
        room.release()
        thread.join()
