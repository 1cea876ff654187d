"""Serve all flows from this process: runs are started by cron, from Prefect's page, or by `prefect deployment run`.

Needs neither pool nor worker: right for one machine. Each recipe becomes one deployment per flow, with the recipe as its parameter;
the pipeline gets the schedule. Without PREFECT_API_URL a server of ours is used (`flows/server.py`), with its SQLite file under
PREFECT_HOME: the temporary server that a single flow gets has no scheduler, so cron ticks would never fire.
"""

import contextlib
import os
import warnings
from collections.abc import Sequence

from pipelines.cluster.session import make_importable
from pipelines.deploy.crash_restart import end_dead_runs
from pipelines.deploy.recipes import check, deployments, schedule
from pipelines.flows import require_server, set_defaults
from pipelines.flows.server import empty_folder, lasting_server
from pipelines.recipe.recipe import Recipe


def serve(recipes: Sequence[Recipe], cron: str | None = None) -> None:
    """Serve until interrupted, which is no failure. `cron` overrides `schedule.cron`; ConfigError if a recipe could never run."""
    check(recipes, cron, "serve")
    set_defaults()
    for recipe in recipes:
        schedule(recipe, cron)  # refuses a wrong one before a server is started
    make_importable()  # scheduled runs are processes of their own
    wanted: Sequence[Recipe | None] = recipes or [None]
    with contextlib.ExitStack() as stack:
        if os.environ.get("PREFECT_API_URL"):
            require_server()
            made = [deployment for recipe in wanted for deployment in deployments(recipe, cron)]
        else:
            _, is_new = stack.enter_context(lasting_server())
            made = [deployment for recipe in wanted for deployment in deployments(recipe, cron)]
            end_dead_runs([deployment.full_name for deployment in made], served_elsewhere=not is_new)
        import prefect

        stack.enter_context(contextlib.chdir(empty_folder()))  # that of all runs; what recipes name is absolute by now
        # Prefect's own handler of SIGTERM forgets to await it; the runner stops all the same
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "coroutine 'Runner.astop' was never awaited", RuntimeWarning)
        prefect.serve(*made)
