"""`aepipe`: the only place that prints and that turns errors into exit codes.

    aepipe VERB ARGUMENTS [key.path=value ...] [--json] [--dry-run]

Arguments of the form `key.path=value` are overrides of the recipe, in any position. Results go to standard output, progress
and errors to standard error; what `--json` prints is always valid JSON, for an error an object of `error`, `message` and `exit_code`.
Heavy imports happen inside the verb that needs them.
Exit codes: 0 ok, 1 the run failed, 2 usage or config, 3 input data, 4 storage, 5 cluster or resources, 130 interrupted.
"""

import json
import logging
import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import Any

from aecore.errors import AecoreError, DataError
from aecore.registry import flatten
from pipelines.cli import overrides
from pipelines.cli.verbs import VERBS
from pipelines.steps.hints import next_command

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    as_json, debug = "--json" in words, "--debug" in words
    _log(debug)
    if threading.current_thread() is threading.main_thread():  # for `docker stop` and cluster schedulers: as Ctrl-C
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _run(words)
    except KeyboardInterrupt as interrupt:
        message = str(interrupt) or "interrupted; what is finished is kept, the same command goes on from there"
        return _failed({"error": "Interrupted", "message": message, "exit_code": INTERRUPTED}, as_json=as_json)
    except AecoreError as error:
        if debug:
            traceback.print_exc()
        more = next_command(error)
        message = str(error) if more is None else f"{error}; {more}"
        return _failed({"error": type(error).__name__, "message": message, "exit_code": error.exit_code}, as_json=as_json)
    except BrokenPipeError:  # the reader of our output has closed it, as in `aepipe show x | head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  so that the interpreter's own flush at exit does not fail
        return 0


def _failed(error: dict[str, Any], *, as_json: bool) -> int:
    """Print an error on standard error, with `--json` also where the result would be; return its exit code."""
    print(f"aepipe: {error['message']}", file=sys.stderr)
    if as_json:
        print(json.dumps(error, indent=2))
    return int(error["exit_code"])


def _run(words: Sequence[str]) -> int:
    arguments, changes = overrides.split(words)
    args = VERBS.parse(arguments)
    args.overrides = changes
    if not args.verb.reads_recipe:
        overrides.refuse(args.verb.name, args.overrides, "reads no recipe")
    result = args.verb.run(args)
    if result is None:
        return 0
    print(_to_json(result.data) if args.json else result.as_text(result.data))
    return result.exit_code


def _to_json(data: Any) -> str:
    """Return data as JSON text; DataError that names every NaN and infinity, which JSON does not have."""
    try:
        return json.dumps(data, indent=2, default=str, allow_nan=False)
    except ValueError:
        leaves = flatten(data, lists=True)
        found = "; ".join(f"{path} is {value}" for path, value in leaves if isinstance(value, float) and not math.isfinite(value))
        raise DataError(f"the result holds numbers that JSON does not have: {found}; print it without --json, check the data") from None


def _log(debug: bool) -> None:
    """Log to standard error: only warnings on a terminal, which shows a progress line, else INFO lines too."""
    level = logging.DEBUG if debug else logging.WARNING if sys.stderr.isatty() else logging.INFO
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s" if debug else "%(message)s"))
    for name in ("aecore", "pipelines"):
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.handlers = [handler]


if __name__ == "__main__":
    sys.exit(main())
