"""What infra/ ships: files that their schemas and linters accept, commands that parse, versions of the lock, no default secret."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.infra.commands import INFRA, ROOT, commands, understand

COMPOSE: dict[str, Any] = yaml.safe_load((INFRA / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]
ONCE = {name for name, service in SERVICES.items() if service["restart"] == "on-failure"}
BIN = Path(sys.executable).parent
SECRET = re.compile(r"PASSWORD|SECRET|TOKEN|AUTH_STRING|ACCESS_KEY|CONNECTION_URL")
YAMLLINT = "{extends: default, rules: {line-length: {max: 140}, document-start: disable}}"


def lock() -> dict[str, str]:
    return dict(line.split("==") for line in (INFRA / "requirements.lock").read_text().splitlines() if "==" in line)


def accepted(*command: object) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_compose_file_is_valid() -> None:
    accepted(BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", INFRA / "compose.yaml")


def test_the_linters_accept_every_file() -> None:
    accepted(BIN / "hadolint", INFRA / "Dockerfile")
    accepted(BIN / "yamllint", "--strict", "--config-data", YAMLLINT, *sorted(INFRA.glob("*.yaml")))


@pytest.mark.parametrize(("where", "words"), list(commands()), ids=lambda value: value if isinstance(value, str) else " ".join(value)[:60])
def test_every_command_is_understood(where: str, words: list[str]) -> None:
    understand(words)


def test_commands_are_found_in_every_file_and_wrong_ones_are_refused() -> None:
    found = list(commands())
    wanted = {("compose.yaml", "ray"), ("compose.yaml", "prefect"), ("compose.yaml", "aepipe"), ("aepipe-worker.service", "prefect")}
    wanted |= {("README.md", "aepipe"), ("prefect.yaml", "prefect"), ("aepipe-server.service", "prefect")}
    assert wanted <= {(where.partition(":")[0], words[0]) for where, words in found}
    for words in (["aepipe", "deploi"], ["aepipe", "deploy", "--poool", "x"], ["ray", "start", "--heat"], ["prefect", "worker", "begin"]):
        with pytest.raises((Exception, SystemExit)):
            understand(words)


def test_versions_are_those_of_the_lock_and_of_the_package() -> None:
    locked, version = lock(), tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert yaml.safe_load((INFRA / "prefect.yaml").read_text())["prefect-version"] == locked["prefect"]
    assert {service["image"] for service in SERVICES.values() if "build" in service} == {f"aepipe:{version}"}
    dockerfile = (INFRA / "Dockerfile").read_text()
    assert f'version="{version}"' in dockerfile
    assert set(re.findall(r"aepipe:(\d[\w.]*)", dockerfile)) == {version}
    assert set(re.findall(r"^FROM python:(\d+\.\d+)", dockerfile, re.MULTILINE)) == {"3.11"}
    assert "--constraint requirements.lock" in dockerfile
    assert not re.findall(r"\b[\w-]+==\d", dockerfile), "a version that the lock does not know of"
    for service in SERVICES.values():
        assert re.search(r":\d+\.\d+", service["image"]), f"{service['image']} is not pinned"


def test_no_secret_has_a_default_and_every_one_is_in_the_example() -> None:
    text = (INFRA / "compose.yaml").read_text()
    required, optional = set(re.findall(r"\$\{(\w+):\?", text)), set(re.findall(r"\$\{(\w+):-", text))
    assert set(re.findall(r"\$\{?(\w+)", text)) == required | optional, "a variable without a default or a demand"
    example = dict(line.split("=", 1) for line in (INFRA / "env.example").read_text().splitlines() if re.match(r"\w+=", line))
    assert set(example) == required | optional
    assert {name for name, value in example.items() if not value} == required
    for name, service in SERVICES.items():
        for key, value in service.get("environment", {}).items():
            if SECRET.search(key):
                assert "${" in value and ":?" in value, f"{name}: {key}={value}"
    for file in ("Dockerfile", "prefect.yaml", *(f"systemd/{path.name}" for path in (INFRA / "systemd").iterdir())):
        assert not re.findall(r"(?:PASSWORD|SECRET|TOKEN|AUTH_STRING|ACCESS_KEY\w*)[=:] ?[\w/+]{4,}", (INFRA / file).read_text()), file


def test_the_services_are_secure_by_default() -> None:
    server = SERVICES["prefect-server"]["environment"]
    assert server["PREFECT_SERVER_CSRF_PROTECTION_ENABLED"] == "true"
    assert ":?" in server["PREFECT_SERVER_API_AUTH_STRING"]
    assert server["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"] == server["PREFECT_SERVER_UI_API_URL"].removesuffix("/api")
    for name, service in SERVICES.items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), f"{name} is reached from outside"
        assert "no-new-privileges:true" in service["security_opt"], name
        assert "privileged" not in service, name
        if "ray" in str([service.get("entrypoint"), service.get("command")]):
            assert service["environment"]["RAY_AUTH_MODE"] == "token", name
            assert service["environment"]["RAY_enable_metrics_collection"] == "0", name
    assert COMPOSE["networks"]["database"] == {"internal": True}
    assert {name for name, service in SERVICES.items() if "database" in service["networks"]} == {"postgres", "prefect-server"}
    dockerfile = (INFRA / "Dockerfile").read_text()
    assert re.findall(r"^USER (\S+)", dockerfile, re.MULTILINE)[-1] == "10001:10001"
    assert "RAY_AUTH_MODE=token" in dockerfile
    assert "PYTHONSAFEPATH=1" in dockerfile
    units = {path.stem: path.read_text() for path in (INFRA / "systemd").iterdir()}
    assert all("\nEnvironment=PYTHONSAFEPATH=1\n" in unit for unit in units.values())
    assert "\nEnvironment=PREFECT_SERVER_CORS_ALLOWED_ORIGINS=http://127.0.0.1:4200\n" in units["aepipe-server"]
    assert "\nEnvironment=PREFECT_SERVER_CSRF_PROTECTION_ENABLED=true\n" in units["aepipe-server"]
    assert (INFRA / "Dockerfile.dockerignore").read_text().splitlines()[1] == "*", "the builder gets what is named, nothing else"
    assert "/infra/.env" in (ROOT / ".gitignore").read_text().splitlines()


def test_every_service_is_bounded_and_comes_back() -> None:
    for name, service in SERVICES.items():
        limits = service["deploy"]["resources"]["limits"]
        assert set(limits) == {"cpus", "memory"}, name
        assert service["logging"]["options"]["max-size"], name
        if name not in ONCE:
            assert service["restart"] == "unless-stopped", name
            assert service["healthcheck"]["test"], name
        for volume in service.get("volumes", []):
            assert volume.partition(":")[0] in COMPOSE["volumes"], f"{name}: {volume} is not a named volume"
        for other, condition in service.get("depends_on", {}).items():
            assert condition["condition"] == ("service_completed_successfully" if other in ONCE else "service_healthy"), (name, other)


def test_prefect_yaml_makes_what_aepipe_deploy_makes() -> None:
    from pipelines.deploy import POOL
    from pipelines.deploy.pool import JOB_ENVIRONMENT
    from pipelines.deploy.recipes import FLOWS, deployments
    from pipelines.recipe.recipe import Recipe
    from pipelines.steps.pipeline import stage
    from pipelines.steps.steps import with_absolute_urls

    entries = yaml.safe_load((INFRA / "prefect.yaml").read_text().replace("{{ $AEPIPE_OUT }}", "/srv/out"))["deployments"]
    trees = {entry["entrypoint"].split(".")[2]: entry["parameters"]["recipe"] for entry in entries}
    recipe = Recipe(trees["pipeline"])
    made = deployments(recipe, "0 3 * * *", work_pool_name=POOL, job_variables={"env": JOB_ENVIRONMENT})
    assert list(trees) == list(FLOWS)
    for name, entry, other in zip(FLOWS, entries, made, strict=True):
        assert entry["entrypoint"].replace(".", "") == other.entrypoint.replace(".", "").replace(":", "")
        assert (entry["name"], entry["tags"]) == (other.name, other.tags)
        assert entry["work_pool"] == {"name": other.work_pool_name, "job_variables": other.job_variables}
        assert (entry["concurrency_limit"]["limit"], entry["concurrency_limit"]["collision_strategy"]) == (1, "CANCEL_NEW")
        assert (other.concurrency_limit, other.concurrency_options.collision_strategy.value) == (1, "CANCEL_NEW")
        wanted = stage(recipe, name).tree if name != "pipeline" else with_absolute_urls(recipe)
        given = {key: value for key, value in wanted.items() if value is not None and key in trees[name]}
        assert trees[name] == given
        Recipe(trees[name])
    assert (
        [bool(entry.get("schedules")) for entry in entries]
        == [bool(other.schedules) for other in made]
        == [False] * (len(FLOWS) - 1) + [True]
    )


def test_the_units_are_understood_by_systemd(tmp_path: Path) -> None:
    if not Path("/usr/bin/systemd-analyze").exists():
        pytest.skip("no systemd-analyze on this machine")
    for path in (INFRA / "systemd").glob("*.service"):
        text = re.sub(r"/opt/aepipe/\.venv/bin/prefect", "/usr/bin/true", path.read_text())
        (tmp_path / path.name).write_text(text)
        done = subprocess.run(
            ["systemd-analyze", "verify", "--recursive-errors=no", tmp_path / path.name], capture_output=True, text=True, check=False
        )
        wrong = [line for line in done.stderr.splitlines() if path.name in line]
        assert not wrong, wrong
