"""The main program of a Ray job: `python -P -m pipelines.steps.job_main STEP RECIPE`, RECIPE as JSON, on the cluster of the job.

It runs the same steps, without Prefect, which the client has. Its output are lines on standard output: the log, progress that the
client parses (`progress.from_line`), and at the end one line RESULT with the summary or the error; the exit code is that of `aepipe`.
"""

import contextlib
import json
import logging
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from aecore import errors
from aecore.artifact.documents import parse_json
from aecore.errors import Interrupted, RunFailed, printable
from aecore.store import check_environment, name_torch_cache
from pipelines.cluster.interrupt import end_in_time, write_line
from pipelines.cluster.outside import known_error
from pipelines.recipe.recipe import Recipe
from pipelines.recipe.yaml import Tree
from pipelines.steps import progress
from pipelines.steps.logs import log_to_handler
from pipelines.steps.pipeline import PIPELINE, run_stages
from pipelines.steps.steps import STEPS

RESULT = "aepipe-result "
logger = logging.getLogger(__name__)


def arguments(name: str, tree: Tree) -> tuple[str, ...]:
    """Return the arguments of the interpreter that runs step `name` (or PIPELINE) of a recipe inside a job.

    Inside a job the cluster is that of RAY_ADDRESS, which Ray sets; without workers the step runs in the job's own process.
    """
    cluster = {key: value for key, value in (tree.get("cluster") or {}).items() if key not in ("address", "python")}
    cluster["kind"] = "local" if cluster.get("num_workers") == 0 else "address"
    return ("-P", "-m", "pipelines.steps.job_main", name, json.dumps(tree | {"cluster": cluster}, separators=(",", ":")))


def work(name: str, recipe: Recipe, report: progress.Report) -> Tree:
    """Run one step, or all steps of a pipeline."""

    def run(step: str, part: Recipe) -> Tree:
        summary = STEPS[step](part, report)
        logger.info("%s done in %.1f s", step, summary["seconds"])
        return summary

    return run_stages(recipe, run) if name == PIPELINE else run(name, recipe)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a step and return its exit code."""
    name, text = sys.argv[1:] if argv is None else argv
    name_torch_cache()
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log_to_handler(handler, logging.INFO)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray stops a job by SIGTERM
    if argv is None:
        end_in_time(lambda error: write_line(f"{RESULT}{json.dumps(errors.to_json(error))}", 1))
    try:
        check_environment()
        return _end(0, {"summary": work(name, Recipe(json.loads(text)), progress.lines_to(sys.stdout))})
    except KeyboardInterrupt as interrupt:
        message = str(interrupt) or "the job was interrupted; what is finished is kept"
        return _end(Interrupted.exit_code, errors.to_json(Interrupted(message)))
    except Exception as error:
        known = known_error(error)
        if known is None:  # a bug: its traceback goes to the log, as on the command line
            sys.stdout.write(printable(traceback.format_exc()))
            known = RunFailed(f"{type(error).__name__}: {error}")
        return _end(known.exit_code, errors.to_json(known))


def _end(exit_code: int, result: dict[str, Any]) -> int:
    with contextlib.suppress(OSError):  # the log of the job takes nothing more: the exit code says what it can
        sys.stdout.write(f"{RESULT}{json.dumps(result, default=str)}\n")
        sys.stdout.flush()
    return exit_code


def result_of(line: str) -> dict[str, Any] | None:
    """Return the object of a line RESULT, None for any other line and for a truncated one."""
    if not line.startswith(RESULT):
        return None
    try:
        result = parse_json(line.removeprefix(RESULT))
    except ValueError:
        return None
    return result if isinstance(result, dict) else None


if __name__ == "__main__":
    sys.exit(main())
