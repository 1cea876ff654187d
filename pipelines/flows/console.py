"""Hides Python tracebacks of failed runs on Prefect's console; its API still records them."""

import copy
import logging

_MARK = "Traceback (most recent call last)"


class _NoTraceback(logging.Formatter):
    """Formats a copy of the record, so that other handlers still get the traceback."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        clean = copy.copy(record)
        clean.exc_info, clean.exc_text = None, None
        if _MARK in clean.getMessage():
            clean.msg, clean.args = clean.getMessage().split(_MARK, 1)[0].rstrip(), ()
        return self._inner.format(clean)


def hide_tracebacks() -> None:
    """Wrap the formatters of the console handlers of Prefect's loggers."""
    from prefect.logging.handlers import PrefectConsoleHandler

    for name in ("", *(name for name in logging.root.manager.loggerDict if name.startswith("prefect"))):
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, PrefectConsoleHandler) and handler.formatter and not isinstance(handler.formatter, _NoTraceback):
                handler.setFormatter(_NoTraceback(handler.formatter))
