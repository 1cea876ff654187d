"""What is logged holds no secret of a URL and no control character.

The filter belongs to handlers: a filter of a logger would not see the records of the loggers below it.
"""

import logging

from aecore.errors import printable

OURS = ("aecore", "pipelines")


class Printable(logging.Filter):
    """Replaces message and traceback of a record by what may be printed; a message of ours is one line."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the record, and let it pass."""
        try:
            text = record.getMessage()
        except Exception:  # a wrong log call, of any package: it must not fail the work
            text = f"{record.msg} {record.args!r}"
        record.msg, record.args = printable(text, one_line=record.name.partition(".")[0] in OURS), ()
        if record.exc_info:
            record.exc_text = printable(record.exc_text or logging.Formatter().formatException(record.exc_info))
        return True


_FILTER = Printable()


def make_printable(*prefixes: str) -> None:
    """Add the filter to all handlers of the root logger, of the loggers with these names, and of those below them, once."""
    names = [name for name in list(logging.root.manager.loggerDict) if name.partition(".")[0] in prefixes]  # other threads add loggers
    for logger in (logging.getLogger(), *map(logging.getLogger, names)):
        for handler in list(logger.handlers):
            handler.addFilter(_FILTER)


def log_to_handler(handler: logging.Handler, level: int) -> None:
    """Let `handler` alone write the log of our packages."""
    handler.addFilter(_FILTER)
    for name in OURS:
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.handlers = [handler]
