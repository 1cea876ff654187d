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
        record.msg, record.args = printable(record.getMessage(), one_line=record.name.partition(".")[0] in OURS), ()
        if record.exc_info:
            record.exc_text = printable(record.exc_text or logging.Formatter().formatException(record.exc_info))
        return True


_FILTER = Printable()


def make_printable(*prefixes: str) -> None:
    """Add the filter to all handlers of the loggers with these names, and of those below them, once."""
    for name in [name for name in logging.root.manager.loggerDict if name.partition(".")[0] in prefixes]:
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(_FILTER)


def log_to_handler(handler: logging.Handler, level: int) -> None:
    """Let `handler` alone write the log of our packages."""
    handler.addFilter(_FILTER)
    for name in OURS:
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.handlers = [handler]
