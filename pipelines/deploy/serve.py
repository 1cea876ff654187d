"""`aepipe serve`: serves all flows from this process; runs are started by cron, on Prefect's page, or by `prefect deployment run`.

It needs neither pool nor worker, which is right for one machine. Each recipe becomes one deployment per flow; the pipeline gets the
schedule. Without PREFECT_API_URL it uses the lasting server of `flows/server.py`, with its SQLite file under PREFECT_HOME: the
temporary server of a single flow has no scheduler, so schedules would never fire.
"""

import contextlib
import math
import os
import warnings
from collections.abc import Sequence

from pipelines.cluster.interrupt import patience
from pipelines.cluster.session import make_importable
from pipelines.deploy.crash_restart import end_dead_runs
from pipelines.deploy.recipes import check, deployments, schedule
from pipelines.flows import require_server, set_defaults
from pipelines.flows.server import empty_folder, lasting_server
from pipelines.recipe.recipe import Recipe


def serve(recipes: Sequence[Recipe], cron: str | None = None) -> None:
    """Serve until interrupted, which is not a failure. `cron` overrides `schedule.cron`; ConfigError if a recipe cannot run."""
    check(recipes, cron, "serve")
    set_defaults()
    for recipe in recipes:
        schedule(recipe, cron)  # checks it before a server is started
    make_importable()  # scheduled runs are separate processes
    wanted: Sequence[Recipe | None] = recipes or [None]
    with contextlib.ExitStack() as stack:
        stack.enter_context(patience(math.inf))  # Prefect waits for the runs that it ends
        if os.environ.get("PREFECT_API_URL"):
            require_server()
            made = [deployment for recipe in wanted for deployment in deployments(recipe, cron)]
        else:
            _, is_new = stack.enter_context(lasting_server())
            made = [deployment for recipe in wanted for deployment in deployments(recipe, cron)]
            end_dead_runs([deployment.full_name for deployment in made], served_elsewhere=not is_new)
        import prefect

        stack.enter_context(contextlib.chdir(empty_folder()))  # the working directory of all runs; paths of recipes are absolute
        # Prefect's own handler of SIGTERM forgets to await it; the runner stops all the same
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "coroutine 'Runner.astop' was never awaited", RuntimeWarning)
        prefect.serve(*made)
