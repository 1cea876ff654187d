"""Work ahead in one thread: the next batches are read and decoded while the network computes. No processes, no pickling.

The thread ends with its generator: closing it (or leaving its `for` loop and dropping it) stops and joins the thread. An error in
the thread is raised to the consumer in the place where its item would have come.
"""

import threading
from collections.abc import Generator
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")


def prefetched(source: Generator[T, None, None], depth: int) -> Generator[T, None, None]:
    """Yield the items of `source`, computed by a thread at most `depth` items ahead; `depth` 0 takes no thread.

    `source` is closed at the end in either case.
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
