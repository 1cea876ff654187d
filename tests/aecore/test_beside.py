import threading

import pytest

from aecore.beside import Beside


def test_one_call_at_a_time_in_order_and_all_done_at_the_end():
    seen, inside = list[int](), threading.Semaphore(1)

    def work(number: int) -> None:
        assert inside.acquire(blocking=False)
        seen.append(number)
        inside.release()

    with Beside(work) as beside:
        for number in range(100):
            beside(number)
    assert seen == list(range(100))


def test_an_error_is_raised_by_the_next_call_or_at_the_end():
    def fail() -> None:
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"), Beside(fail) as beside:
        beside()
        beside()
        pytest.fail("the second call does not begin")
    with pytest.raises(OSError, match="full"), Beside(fail) as beside:
        beside()


def test_another_error_is_not_hidden_and_the_thread_ends():
    before = threading.active_count()
    with pytest.raises(KeyError), Beside(lambda: 1 / 0) as beside:
        beside()
        raise KeyError
    assert threading.active_count() == before
