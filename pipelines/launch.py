"""How a verb starts the work of a recipe: one step in this process or as its flow, the pipeline always as a flow.

A step goes through Prefect where `PREFECT_API_URL` names a server; both ways call the same functions of `steps.py`. The functions
here import what they need when they are called.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipelines.arguments import Args, Result
from pipelines.overrides import require_no_conflict


def step(name: str, args: Args, base: Mapping[str, Any], sections: Sequence[str]) -> Result:
    """Run one step. `base` holds the keys that were given as arguments; a dry run shows `sections` of the recipe."""
    from pipelines import progress, steps, text
    from pipelines.config import load_recipe

    require_no_conflict(base, args.overrides)
    recipe = load_recipe(args.recipe, args.overrides, base=base)
    if os.environ.get("PREFECT_API_URL") and not args.dry_run:
        summary = flow(name, debug=args.debug)(recipe.travelling())
    else:
        report = progress.both(progress.terminal(), progress.log_to(logging.getLogger("pipelines")))
        summary = steps.STEPS[name](recipe, report, dry_run=args.dry_run)
    if args.dry_run:
        summary = {**summary, "recipe": recipe.resolved(sections)}
    return Result(summary, text.of_step)


def pipeline(args: Args) -> Result:
    """Run all stages of a recipe as one flow; a dry run names them and plans the first one that can be planned."""
    from pipelines import steps, text
    from pipelines.config import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    steps.check_pipeline(recipe)
    if not args.dry_run:
        return Result(flow("pipeline", debug=args.debug)(recipe.travelling()), text.of_pipeline)
    names = steps.stages(recipe)
    plan = {"stages": {name: steps.stage(recipe, name).tree["out"] for name in names}, "recipe": recipe.resolved()}
    if names[0] == "shard":
        plan["shard"] = steps.shard(steps.stage(recipe, "shard"), dry_run=True)
    return Result(plan, text.of_tree)


def flow(name: str, *, debug: bool) -> Callable[..., Any]:
    """Return a Prefect flow; its console keeps tracebacks for `--debug` (Prefect's own record has them always)."""
    from importlib import import_module

    flows: Any = import_module("pipelines.flows")
    flows.require_server()
    module = import_module(f"pipelines.flows.{name}")
    for logger in ("aecore", "pipelines"):  # Prefect's own handlers take them from here on
        logging.getLogger(logger).handlers = []
    if not debug:
        import_module("pipelines.flows.console").hide_tracebacks()
    found: Callable[..., Any] = getattr(module, f"{name}_flow")
    return found
