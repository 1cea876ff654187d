"""`aepipe deploy`: deploys recipes to a process work pool of the Prefect server at PREFECT_API_URL.

It can be repeated at any time: existing deployments are updated to the recipe, a schedule that the recipe no longer has is removed, and
nothing else on the server is touched. Workers (`prefect worker start --pool aepipe`) then run the flows, each in a separate process.
"""

import os
from collections.abc import Sequence
from typing import Any

from aecore.errors import ConfigError
from pipelines.deploy import POOL
from pipelines.deploy.crash_restart import LOST_AFTER_S, automations
from pipelines.deploy.recipes import check, deployments
from pipelines.flows import SETTINGS, require_server, set_defaults
from pipelines.recipe.recipe import Recipe
from pipelines.recipe.yaml import Tree

JOB_ENVIRONMENT = {name: value for name, value in SETTINGS.items() if name != "PREFECT_HOME" and "EPHEMERAL" not in name}


def deploy(
    recipes: Sequence[Recipe], cron: str | None = None, pool: str = POOL, *, lost_after_s: int = LOST_AFTER_S, dry_run: bool = False
) -> Tree:
    """Create or update pool, automations and deployments; without recipes, of flows that take one as parameter. `dry_run` writes nothing.

    Raises
    ------
    ConfigError
        No PREFECT_API_URL, a recipe that cannot run or holds credentials, a pool of another type.
    ClusterError
        The server does not answer. What it answers with an error is one of httpx: `pipelines.cluster.outside` knows what to do.
    """
    check(recipes, cron, "deploy")
    if not os.environ.get("PREFECT_API_URL"):
        raise ConfigError(
            "PREFECT_API_URL is not set, so there is no server to deploy to: set it, for example "
            "PREFECT_API_URL=http://127.0.0.1:4200/api (and PREFECT_API_AUTH_STRING), or use `aepipe serve`, which needs no server"
        )
    set_defaults()
    require_server()
    wanted: Sequence[Recipe | None] = recipes or [None]
    options = {"work_pool_name": pool, "job_variables": {"env": JOB_ENVIRONMENT}}
    made = [deployment for recipe in wanted for deployment in deployments(recipe, cron, **options)]
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        return {
            "pool": _make_pool(client, pool, dry_run),
            "automations": [_make_automation(client, automation, dry_run) for automation in automations(lost_after_s)],
            "deployments": [_make_deployment(client, deployment, pool, dry_run) for deployment in made],
            "dry_run": dry_run,
        }


def _make_pool(client: Any, name: str, dry_run: bool) -> Tree:
    import asyncio

    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectNotFound
    from prefect.workers.utilities import get_default_base_job_template_for_infrastructure_type

    try:
        found = client.read_work_pool(name)
    except ObjectNotFound:
        if not dry_run:
            template = asyncio.run(get_default_base_job_template_for_infrastructure_type("process"))
            client.create_work_pool(WorkPoolCreate(name=name, type="process", base_job_template=template or {}))
        return {"name": name, "type": "process", "made": "new"}
    if found.type != "process":
        raise ConfigError(
            f"the work pool {name!r} is of type {found.type!r}, expected 'process': choose another with --pool NAME (created if it "
            "does not exist)"
        )
    return {"name": name, "type": "process", "made": "kept"}


def _make_automation(client: Any, wanted: Tree, dry_run: bool) -> Tree:
    from prefect.events.schemas.automations import AutomationCore

    core = AutomationCore.model_validate(wanted)
    found = client.read_automations_by_name(wanted["name"])
    if not dry_run and found:
        client.update_automation(found[0].id, core)
    elif not dry_run:
        client.create_automation(core)
    return {"name": wanted["name"], "made": "updated" if found else "new"}


def _make_deployment(client: Any, deployment: Any, pool: str, dry_run: bool) -> Tree:
    from prefect.exceptions import ObjectNotFound

    try:
        before = client.read_deployment_by_name(deployment.full_name)
    except ObjectNotFound:
        before = None
    if not dry_run:
        deployment.apply(work_pool_name=pool)
    plans = [made.schedule for made in deployment.schedules or []]
    return {
        "name": deployment.full_name,
        "made": "new" if before is None else "updated",
        "schedule": f"{plans[0].cron} ({plans[0].timezone})" if plans else None,
        "parameters": deployment.parameters,
    }
