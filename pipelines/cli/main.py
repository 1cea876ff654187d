"""`aepipe`: the only place that prints and that turns errors into exit codes.

    aepipe VERB ARGUMENTS [key.path=value ...] [--json] [--dry-run]

Arguments of the form `key.path=value` are overrides of the recipe, in any position. Results go to standard output, progress
and errors to standard error; what `--json` prints is always valid JSON, for an error an object of `error`, `message` and `exit_code`.
What comes from outside (names of files, addresses, error texts) is printed without control characters and without the secrets of URLs.
Heavy imports happen inside the verb that needs them.
What the outside does to a verb (a disk, the memory, a service, a reader that closes the pipe) is one line and an exit code, too; a
traceback is a bug.
Exit codes: 0 ok, 1 the run failed, 2 usage or config, 3 input data, 4 storage, 5 cluster or resources, 130 interrupted.
"""

import contextlib
import errno
import io
import json
import logging
import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import Any

from aecore.errors import AecoreError, DataError, StoreError, masked, printable
from aecore.registry import flatten
from aecore.store import check_environment, name_torch_cache
from pipelines.cli import overrides, text
from pipelines.cli.verbs import VERBS
from pipelines.cluster.interrupt import SIGNALS, end_in_time, write_line
from pipelines.cluster.outside import known_error
from pipelines.steps.hints import for_users
from pipelines.steps.logs import log_to_handler

INTERRUPTED = 130
_closed: set[str] = set()  # streams that were closed when this process began
_ends: list[int] = []  # the exit code, when the last message of this process is written


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    as_json, debug = "--json" in words, "--debug" in words
    name_torch_cache()
    _prepare_streams()
    _log(debug)
    if argv is None:
        sys.excepthook = _print_bug
        threading.excepthook = lambda failed: _print_bug(failed.exc_type, failed.exc_value, failed.exc_traceback)
    if threading.current_thread() is threading.main_thread():  # for `docker stop` and cluster schedulers: as Ctrl-C
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    if argv is None:
        end_in_time(partial(_last_words, as_json=as_json))
    try:
        return _run(words)
    except SystemExit:  # of --help and --version, which have written all
        try:
            _show("", end="")
        except StoreError as error:
            return _failed({"error": "StoreError", "message": str(error), "exit_code": error.exit_code}, as_json=False)
        raise
    except KeyboardInterrupt as interrupt:
        if argv is None:  # what the command had open is closed when this block ends, where another interrupt would be a traceback
            _take_signals_as(signal.SIG_IGN)
        message = str(interrupt) or "interrupted; what is finished is kept, the same command goes on from there"
        return _failed({"error": "Interrupted", "message": message, "exit_code": INTERRUPTED}, as_json=as_json)
    except Exception as error:
        known = known_error(error)
        if known is None:
            raise
        if debug:
            _print_bug(type(error), error, error.__traceback__)
        message = for_users(known, None if known is error else "--debug shows where it happened")
        return _failed({"error": type(known).__name__, "message": message, "exit_code": known.exit_code}, as_json=as_json)
    finally:
        if argv is None:  # the process ends: in its exit handlers an interrupt would be a traceback
            _take_signals_as(signal.SIG_DFL)


def _take_signals_as(effect: signal.Handlers) -> None:
    for known in SIGNALS:
        signal.signal(known, effect)


def _last_words(error: AecoreError, *, as_json: bool) -> None:
    """Say why this process ends without its main thread, unless that has said it already; nothing here waits for another thread."""
    if not _ends:
        write_line(f"aepipe: {printable(str(error))}")
        if as_json:
            write_line(_to_json({"error": type(error).__name__, "message": str(error), "exit_code": error.exit_code}), 1)


def _failed(error: dict[str, Any], *, as_json: bool) -> int:
    """Print an error on standard error, with `--json` also where the result would be; return its exit code."""
    _ends.append(int(error["exit_code"]))
    with contextlib.suppress(OSError):  # nobody reads it: the exit code is what is left
        _print("stderr", f"aepipe: {printable(error['message'])}")
    if as_json:
        with contextlib.suppress(StoreError):
            _show(_to_json(error))
    return int(error["exit_code"])


def _show(result: str, end: str = "\n") -> None:
    """Print a result; StoreError if standard output does not take it. A reader that has closed it (`| head`) wants no more."""
    try:
        if "stdout" in _closed:
            raise OSError(errno.EBADF, "it is closed")
        _print("stdout", result, end)
    except BrokenPipeError:
        return
    except OSError as error:
        why = f"cannot write the result to standard output: {error.strerror or error}"
        raise StoreError(f"{why}; send it to another file and run the same command again, finished work is kept") from error


def _print(name: str, line: str, end: str = "\n") -> None:
    """Print to a stream of `sys`; one that raises OSError is left, so that the interpreter's own flush at exit does not fail."""
    try:
        print(line, end=end, file=getattr(sys, name), flush=True)
    except OSError:
        setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  as long as the process
        raise


def _prepare_streams() -> None:
    """Make any text printable: a closed stream (`2>&-`) leads nowhere, what the encoding of an open one lacks is escaped."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:
        pass  # else a file that is opened later gets the number of a closed stream, and what libraries print goes into it
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            _closed.add(name)
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  as long as the process
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _print_bug(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    sys.stderr.write(printable("".join(traceback.format_exception(kind, error, trace))))


def _run(words: Sequence[str]) -> int:
    try:
        os.getcwd()
    except OSError as error:
        raise StoreError(f"the working directory cannot be used: {error.strerror}; go to one that exists") from error
    arguments, changes = overrides.split(words)
    args = VERBS.parse(arguments)
    check_environment()
    args.overrides = changes
    if not args.verb.reads_recipe:
        overrides.refuse(args.verb.name, args.overrides, "reads no recipe")
    result = args.verb.run(args)
    if result is None:
        return 0
    _show(_to_json(result.data) if args.json else result.as_text(text.changed(result.data, partial(printable, one_line=True))))
    return result.exit_code


def _to_json(data: Any) -> str:
    """Return data as JSON text; DataError that names every NaN and infinity, which JSON does not have."""
    try:
        return json.dumps(text.changed(data, masked), indent=2, default=lambda value: masked(str(value)), allow_nan=False)
    except ValueError:
        leaves = flatten(data, lists=True)
        found = "; ".join(f"{path} is {value}" for path, value in leaves if isinstance(value, float) and not math.isfinite(value))
        raise DataError(f"the result holds numbers that JSON does not have: {found}; print it without --json, check the data") from None


def _log(debug: bool) -> None:
    """Log to standard error: only warnings on a terminal, which shows a progress line, else INFO lines too."""
    level = logging.DEBUG if debug else logging.WARNING if sys.stderr.isatty() else logging.INFO
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s" if debug else "%(message)s"))
    log_to_handler(handler, level)


if __name__ == "__main__":
    sys.exit(main())
