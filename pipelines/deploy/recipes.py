"""Turns a recipe into one Prefect deployment per flow, named `<flow>/<recipe name>`; the pipeline gets the schedule.

Prefect keeps the parameters in its database and shows them on its page: the recipe's tree, which must not hold credentials.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from aecore.errors import ConfigError
from aecore.registry import flatten
from pipelines.recipe.recipe import Recipe
from pipelines.steps.pipeline import PIPELINE, check_pipeline, stage
from pipelines.steps.steps import STEPS, with_absolute_urls

FLOWS = (*STEPS, PIPELINE)
TAG = "aepipe"
MANUAL = "manual"  # deployments without a recipe: a run is started with one
_SECRET = re.compile(r"://[^/?#@\s]*:[^/?#@\s]*@|s3://[^/?#@\s]*:|[?&](X-Amz-Signature|Signature|sig|token)=", re.IGNORECASE)
_NOT_IN_A_NAME = re.compile(r"[/%&><]")


def check(recipes: Sequence[Recipe], cron: str | None, verb: str) -> None:
    """ConfigError if a recipe cannot run, or holds credentials, which must not enter Prefect's database."""
    if cron is not None and not recipes:
        raise ConfigError(f"--cron needs a recipe to run: aepipe {verb} RECIPE out=... --cron '0 3 * * *'")
    for recipe in recipes:
        check_pipeline(recipe)
        require_no_credentials(recipe.tree)
        if _NOT_IN_A_NAME.search(recipe.name) or recipe.name == MANUAL:
            raise ConfigError(
                f"the name {recipe.name!r} cannot name a deployment: give another with name=..., without / % & < > and not {MANUAL!r}"
            )
    names = [recipe.name for recipe in recipes]
    if len(set(names)) < len(names):
        raise ConfigError(f"two recipes have one name ({', '.join(names)}): give each its own `name:` and `out:`")


def require_no_credentials(tree: Mapping[str, Any]) -> None:
    """ConfigError if an address holds a password or a signature; the message does not repeat it."""
    for key, value in flatten(tree, lists=True):
        if isinstance(value, str) and _SECRET.search(value):
            raise ConfigError(
                f"{key} holds credentials, and Prefect stores and shows recipes: remove them from the address and set them in the "
                "workers' environment (AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"
            )


def schedule(recipe: Recipe, cron: str | None = None) -> Any:
    """Return the Prefect schedule of a recipe (`cron` overrides `schedule.cron`), None without one; ConfigError for a wrong one."""
    from prefect.schedules import Cron

    when = cron or recipe.schedule.cron
    if not when:
        return None
    try:
        return Cron(when, timezone=recipe.schedule.timezone)
    except ValueError as error:
        raise ConfigError(
            f"schedule.cron={when!r} (timezone {recipe.schedule.timezone!r}) cannot be scheduled: {error}; "
            "write minute, hour, day, month and weekday, for example '0 3 * * *' for every night at 3"
        ) from None


def deployments(recipe: Recipe | None, cron: str | None = None, **options: Any) -> list[Any]:
    """Return one Prefect deployment per flow; without a recipe, of flows that take one as parameter. `options` are Prefect's."""
    from importlib import import_module

    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
    from prefect.types.entrypoint import EntrypointType

    one_at_a_time = ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW)
    made = []
    for name in FLOWS:
        flow: Any = getattr(import_module(f"pipelines.flows.{name}"), f"{name}_flow")
        settings: dict[str, Any] = {"entrypoint_type": EntrypointType.MODULE_PATH, "tags": [TAG], **options}
        if recipe is not None:
            tree = with_absolute_urls(recipe) if name == PIPELINE else stage(recipe, name).tree
            settings |= {"parameters": {"recipe": tree}, "concurrency_limit": one_at_a_time}
            if name == PIPELINE and (when := schedule(recipe, cron)) is not None:
                settings["schedule"] = when
        made.append(flow.to_deployment(name=MANUAL if recipe is None else recipe.name, **settings))
    return made
