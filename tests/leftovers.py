"""Hooks of pytest: what a failed test leaves behind fails no other test."""

import contextlib
import gc
import multiprocessing
import sys
import traceback
from collections.abc import Generator

import pytest

FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    item.stash[FAILED] = item.stash.get(FAILED, False) or report.failed
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    before = set(multiprocessing.active_children())
    result = yield
    if item.stash.get(FAILED, False):
        _clear_up_after_failure(set(multiprocessing.active_children()) - before)
    return result


def _clear_up_after_failure(children: set[multiprocessing.process.BaseProcess]) -> None:
    """Drop what a failed test left, now and in silence: else its open files warn, and so fail, whichever test runs when they are collected.

    They live in the frames of its traceback, which Python keeps for debuggers; pytest has shown it by now.
    """
    for child in children:
        child.kill()
        child.join(10)
    for name in ("last_exc", "last_value"):
        error = getattr(sys, name, None)
        while error is not None:
            traceback.clear_frames(error.__traceback__)
            error = error.__cause__ or error.__context__
    for name in ("last_exc", "last_type", "last_value", "last_traceback"):
        with contextlib.suppress(AttributeError):
            delattr(sys, name)
    collect_in_silence()


def collect_in_silence() -> None:
    """Collect garbage now; what it warns of when it goes is nobody's failure."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
    try:
        gc.collect()
    finally:
        sys.unraisablehook = hook
