"""`aepipe doctor`: checks whether this machine, store, cluster and server can run a recipe; one line per check, with a remedy.

Every check has a timeout: it runs in a thread that is abandoned afterwards. Nothing is changed; the checks of a store write below a
folder that they remove. What is not configured is skipped, with the reason.
"""

from pipelines.doctor._check import Check, Finding, exit_code, run_checks
from pipelines.doctor._environment import environment_checks
from pipelines.doctor._machine import machine_checks
from pipelines.doctor._prefect import prefect_checks
from pipelines.doctor._ray import leftover_checks, ray_checks
from pipelines.doctor._store import store_checks
from pipelines.recipe.yaml import Tree

__all__ = ["Check", "Finding", "doctor", "exit_code"]


def doctor(url: str | None = None, recipe: str | None = None, overrides: tuple[str, ...] = ()) -> Tree:
    """Run all checks; `recipe` (with overrides) states the required resources. An unknown recipe is a ConfigError."""
    from pipelines.recipe.recipe import load_recipe

    cluster = load_recipe(recipe, overrides).cluster
    services = [*ray_checks(cluster), *leftover_checks(), *prefect_checks()]
    checks = [*environment_checks(), *machine_checks(cluster), *store_checks(url), *services]
    findings = run_checks(checks)
    states = ("ok", "warning", "failed", "skipped")
    counts = {state: sum(finding.state == state for finding in findings) for state in states}
    return {**counts, "exit_code": exit_code(findings), "checks": [finding.to_dict() for finding in findings]}
