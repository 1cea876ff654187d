"""What may not be deployed is refused before any server is asked; addresses in messages show no password."""

from pathlib import Path

import pytest

from aecore.errors import AecoreError, ClusterError, ConfigError
from pipelines.deploy.crash_restart import ENDS, automations
from pipelines.deploy.pool import JOB_ENVIRONMENT, deploy
from pipelines.deploy.recipes import FLOWS, check, deployments, require_no_credentials
from pipelines.deploy.serve import serve
from pipelines.flows import require_server
from pipelines.recipe.recipe import load_recipe
from pipelines.steps.steps import with_absolute_urls

pytestmark = pytest.mark.prefect


def printed(error: type[AecoreError], *arguments: str, cron: str | None = None) -> str:
    with pytest.raises(error) as caught:
        deploy([load_recipe("demo", arguments)] if arguments else [], cron)
    return str(caught.value)


def test_one_deployment_per_flow_and_only_the_pipeline_has_the_schedule() -> None:
    recipe = load_recipe("demo", ["out=/srv/x", "schedule.cron=0 3 * * *", "schedule.timezone=Europe/Vienna"])
    made = deployments(recipe)
    assert [deployment.full_name for deployment in made] == [f"aepipe-{name}/demo" for name in FLOWS]
    assert [len(deployment.schedules or []) for deployment in made] == [0] * (len(FLOWS) - 1) + [1]
    plan = made[-1].schedules[0].schedule
    assert (plan.cron, plan.timezone) == ("0 3 * * *", "Europe/Vienna")
    assert deployments(recipe, "1 1 * * *")[-1].schedules[0].schedule.cron == "1 1 * * *"
    assert made[-1].parameters == {"recipe": with_absolute_urls(recipe)}
    assert made[0].parameters["recipe"]["out"] == "/srv/x/dataset"


@pytest.mark.parametrize(
    "value",
    ["https://key:hidden@store/images", "s3://key:hidden@bucket/x", "https://store/x?X-Amz-Signature=hidden", "http://:hidden@store/"],
)
def test_a_recipe_with_credentials_is_refused_without_repeating_them(value: str) -> None:
    with pytest.raises(ConfigError, match="source.url holds credentials") as caught:
        require_no_credentials({"source": {"kind": "folder", "url": value}})
    assert "hidden" not in str(caught.value)
    require_no_credentials({"source": {"url": "s3://bucket/a@b:c/x"}, "out": "/srv/a:b@c"})


@pytest.mark.parametrize(
    ("arguments", "cron", "message"),
    [
        ((), "0 3 * * *", "--cron needs a recipe to run: aepipe deploy RECIPE"),
        (("schedule.cron=",), None, "out is missing"),
        (("out=x", "name=a/b"), None, "the name 'a/b' cannot name a deployment"),
        (("out=x", "name=manual"), None, "the name 'manual' cannot name a deployment"),
        (("out=x",), None, "PREFECT_API_URL is not set, so there is no server to deploy to: set it"),
    ],
)
def test_what_cannot_be_deployed_is_refused(arguments: tuple[str, ...], cron: str | None, message: str) -> None:
    assert message in printed(ConfigError, *arguments, cron=cron)


def test_a_wrong_schedule_is_refused_before_anything_is_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wrong, recipe = r"schedule.cron='every night' .* cannot be scheduled.* for example '0 3 \* \* \*'", load_recipe("demo", ["out=/x"])
    with pytest.raises(ConfigError, match=wrong):
        deployments(recipe, "every night")
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=wrong):
        serve([recipe], "every night")
    assert not (tmp_path / "server.log").exists(), "a server was started first"


def test_two_recipes_of_one_name_are_refused() -> None:
    recipe = load_recipe("demo", ["out=/x"])
    with pytest.raises(ConfigError, match=r"two recipes have one name \(demo, demo\)"):
        check([recipe, recipe], None, "deploy")


def test_an_unreachable_server_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://admin:hidden@127.0.0.1:9/api")
    with pytest.raises(ConfigError, match="a password goes into PREFECT_API_AUTH_STRING") as caught:
        require_server(2)
    assert "hidden" not in str(caught.value)
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    with pytest.raises(ClusterError, match="no Prefect server answers at PREFECT_API_URL=http://127.0.0.1:9/api"):
        require_server(2)


def test_the_environment_of_a_run_holds_settings_and_no_secret() -> None:
    assert JOB_ENVIRONMENT["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "30"
    assert not [name for name in JOB_ENVIRONMENT if any(word in name for word in ("AUTH", "KEY", "TOKEN", "SECRET", "URL", "HOME"))]


def test_the_automations_are_what_prefect_takes_and_every_end_of_a_run_stops_the_wait() -> None:
    from prefect.client.schemas.objects import TERMINAL_STATES
    from prefect.events.schemas.automations import AutomationCore

    silence, crash = (AutomationCore.model_validate(plan) for plan in automations(90))
    assert {state.value.capitalize() for state in TERMINAL_STATES} <= set(ENDS)
    assert silence.trigger.within.total_seconds() == 90
    assert "prefect.flow-run.heartbeat" in silence.trigger.expect
    assert crash.trigger.after == {"prefect.flow-run.Crashed"}
    assert crash.trigger.within.total_seconds() > 20  # Prefect's worker reports a crash twice


def test_relative_addresses_become_those_of_the_deployer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    made = deployments(load_recipe("demo", ["out=./here"]))
    assert made[-1].parameters["recipe"]["out"] == str(tmp_path / "here")
