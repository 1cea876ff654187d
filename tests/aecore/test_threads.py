import threading
import weakref
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from aecore.errors import DataError
from aecore.threads import BackgroundCall, map_ordered, prefetched, submit_ahead


def test_one_call_at_a_time_in_order_and_all_done_at_the_end():
    seen, inside = list[int](), threading.Semaphore(1)

    def work(number: int) -> None:
        assert inside.acquire(blocking=False)
        seen.append(number)
        inside.release()

    with BackgroundCall(work) as call:
        for number in range(100):
            call(number)
    assert seen == list(range(100))


def test_an_error_is_raised_by_the_next_call_or_at_the_end():
    def fail() -> None:
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"), BackgroundCall(fail) as call:
        call()
        call()
        pytest.fail("the second call does not begin")
    with pytest.raises(OSError, match="full"), BackgroundCall(fail) as call:
        call()


def test_another_error_is_not_hidden_and_the_thread_ends():
    before = threading.active_count()
    with pytest.raises(KeyError), BackgroundCall(lambda: 1 / 0) as call:
        call()
        raise KeyError
    assert threading.active_count() == before


def test_results_come_in_the_order_of_their_arguments_however_long_each_takes():
    last_is_done = threading.Event()

    def work(number: int) -> int:
        if number == 3:
            last_is_done.set()
        elif number == 0:
            assert last_is_done.wait(10), "later calls do not begin while the first one works"
        return number * number

    assert list(map_ordered(work, range(20), threads=3)) == [number * number for number in range(20)]


def test_calls_are_begun_no_further_ahead_than_one_more_than_there_are_threads():
    taken = list[int]()
    results = map_ordered(lambda number: number, counted(taken), threads=2)
    for number in range(5):
        assert next(results) == number
        assert taken == list(range(number + 3))
    results.close()


def counted(taken: list[int]) -> Iterator[int]:
    for number in range(1000):
        taken.append(number)
        yield number


def test_an_argument_that_wants_to_be_alone_waits_for_all_results_before_it():
    out, begun = list[int](), dict[int, list[int]]()

    def work(number: int) -> int:
        begun[number] = list(out)
        return number

    for number in map_ordered(work, range(10), threads=3, alone=lambda number: number == 7):
        out.append(number)
    assert begun[7] == [0, 1, 2, 3, 4, 5, 6]


def test_an_error_comes_in_the_place_of_its_result_and_what_has_not_begun_never_begins():
    begun, go = list[int](), threading.Event()

    def work(number: int) -> int:
        begun.append(number)
        if number == 1:
            raise DataError("damaged")
        if number == 2:
            assert go.wait(10)
        return number

    results = map_ordered(work, range(10), threads=1)
    assert next(results) == 0
    go.set()
    with pytest.raises(DataError, match="damaged"):
        next(results)
    assert max(begun) <= 2, "nothing after the next one"


def test_futures_are_still_to_be_had_after_one_that_failed():
    with ThreadPoolExecutor(2) as pool:
        futures = list(submit_ahead(lambda number: pool.submit(lambda: 6 // number), [1, 0, 2], 2))
    assert [future.exception() is None for future in futures] == [True, False, True]


def test_what_is_done_is_handed_out_before_the_next_argument_is_taken_if_asked():
    taken = list[int]()

    def submit(number: int) -> Future[int]:
        done = Future[int]()
        done.set_result(number)
        return done

    eager = submit_ahead(submit, counted(taken), 5, eager=True)
    assert (next(eager).result(), taken) == (0, [0])
    eager.close()


def counting(stop: int, closed: list[bool]) -> Generator[int, None, None]:
    try:
        yield from range(stop)
    finally:
        closed.append(True)


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_prefetched_items_are_the_items(depth: int) -> None:
    closed: list[bool] = []
    assert list(prefetched(counting(20, closed), depth)) == list(range(20))
    assert closed == [True]


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_an_unfinished_prefetch_ends_when_it_is_closed(depth: int) -> None:
    closed: list[bool] = []
    items = prefetched(counting(10**9, closed), depth)
    assert [next(items) for _ in range(5)] == [0, 1, 2, 3, 4]
    items.close()
    assert closed == [True]


@pytest.mark.parametrize("depth", [1, 3])
def test_a_prefetch_that_is_dropped_ends_too(depth: int) -> None:
    closed: list[bool] = []
    items = prefetched(counting(10**9, closed), depth)
    next(items)
    dropped = weakref.ref(items)
    del items
    assert dropped() is None
    assert closed == [True]


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_an_error_reaches_the_consumer_after_the_items_before_it(depth: int) -> None:
    def failing() -> Generator[int, None, None]:
        yield 1
        yield 2
        raise DataError("damaged")

    items = prefetched(failing(), depth)
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(DataError, match="damaged"):
        next(items)


def test_a_prefetch_works_ahead_no_further_than_its_depth():
    made, full = list[int](), threading.Event()

    def recorded() -> Generator[int, None, None]:
        for number in range(100):
            made.append(number)
            if number == 3:
                full.set()
            yield number

    items = prefetched(recorded(), 3)
    next(items)
    assert full.wait(10)
    assert len(made) == 4  # one taken, three ahead
    items.close()
