"""Checks the Prefect server of PREFECT_API_URL over plain HTTP: reachable, same version, password, workers, scheduler."""

import base64
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote, urlsplit

from aecore.errors import ClusterError, counted
from pipelines.cluster.job_client import refuse_secrets
from pipelines.doctor._check import Check, Finding, failed, ok, skipped, warning
from pipelines.doctor._environment import installed

ANSWER_S = 5.0
LATE_S = 120.0
LOOPBACK = ("127.0.0.1", "localhost", "::1")
START = "start it (`prefect server start`), correct PREFECT_API_URL, or unset it to work without one"


def prefect_checks() -> list[Check]:
    return [Check("prefect", prefect, ClusterError, timeout_s=60)]


def prefect() -> Iterator[Finding]:
    """Query the server. Credentials go into a header and are never shown."""
    url = os.environ.get("PREFECT_API_URL")
    if not url:
        yield skipped("prefect", "PREFECT_API_URL is not set: verbs work without a server, `aepipe run` starts a temporary one")
        return
    try:
        refuse_secrets("PREFECT_API_URL", url, "a password goes into PREFECT_API_AUTH_STRING=user:password")
        ask(url, "/health")
        version = ask(url, "/admin/version")
        ask(url, "/flow_runs/count", {})
    except urllib.error.HTTPError as error:
        yield _refusal(url, error)
        return
    except (OSError, ValueError) as error:
        yield failed("prefect", f"no Prefect server answers at PREFECT_API_URL={url} ({error})", START)
        return
    yield _version(url, str(version))
    yield _password(url)
    yield from _workers(url)
    yield from _scheduler(url)


def ask(url: str, path: str, body: Any = None) -> Any:  # any: plain JSON
    """Return the server's JSON answer; with `body` the request is a POST."""
    headers = {"Content-Type": "application/json"}
    if os.environ.get("PREFECT_API_AUTH_STRING"):
        headers["Authorization"] = "Basic " + base64.b64encode(os.environ["PREFECT_API_AUTH_STRING"].encode()).decode()
    elif os.environ.get("PREFECT_API_KEY"):
        headers["Authorization"] = f"Bearer {os.environ['PREFECT_API_KEY']}"
    data = None if body is None else json.dumps(body).encode()
    if data is not None:
        headers |= _token(url, headers)
    request = urllib.request.Request(f"{url.rstrip('/')}{path}", data=data, headers=headers)
    with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
        return json.loads(answer.read() or b"null")


def _token(url: str, headers: dict[str, str]) -> dict[str, str]:
    """Return the CSRF headers of a POST; {} for a server without CSRF protection, which answers 404 or 422."""
    client = "aepipe-doctor"
    request = urllib.request.Request(f"{url.rstrip('/')}/csrf-token?client={client}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
            return {"Prefect-Csrf-Token": json.loads(answer.read())["token"], "Prefect-Csrf-Client": client}
    except urllib.error.HTTPError as error:
        if error.code in (404, 422):
            return {}
        raise


def _refusal(url: str, error: urllib.error.HTTPError) -> Finding:
    if error.code in (401, 403):
        return failed("prefect", f"{url} asks for a password (HTTP {error.code})", "set PREFECT_API_AUTH_STRING=user:password")
    remedy = "the address ends with /api, for example http://127.0.0.1:4200/api" if error.code == 404 else START
    return failed("prefect", f"{url} answers HTTP {error.code}", remedy)


def _version(url: str, version: str) -> Finding:
    ours = installed("prefect")
    if ours is not None and version.split(".")[:2] != str(ours).split(".")[:2]:
        return warning("prefect", f"the server at {url} has version {version}, this client {ours}", "give both the version of the lock")
    return ok("prefect", f"server {version} at {url}")


def _password(url: str) -> Finding:
    """Check that the server requires a password: a client that can change a deployment runs code as the owner, on loopback too."""
    try:
        urllib.request.urlopen(f"{url.rstrip('/')}/admin/version", timeout=ANSWER_S).close()
    except urllib.error.HTTPError:
        return ok("prefect: password", "the server asks for it")
    who = "every user of this machine" if urlsplit(url).hostname in LOOPBACK else "everyone who can connect to it"
    remedy = "set PREFECT_SERVER_API_AUTH_STRING for the server and PREFECT_API_AUTH_STRING here"
    return warning("prefect: password", f"the server accepts deployments, and so code to run, from {who}", remedy)


def _workers(url: str) -> Iterator[Finding]:
    pools = [pool for pool in ask(url, "/work_pools/filter", {}) if not pool.get("is_paused")]
    if not pools:
        message = "no work pool: deployments of `aepipe deploy` would wait; `aepipe serve` needs none"
        yield warning("prefect: workers", message, "prefect work-pool create local --type process; prefect worker start --pool local")
    for pool in pools:
        workers = ask(url, f"/work_pools/{quote(pool['name'], safe='')}/workers/filter", {})
        alive = [worker["name"] for worker in workers if worker.get("status") == "ONLINE"]
        if alive:
            yield ok("prefect: workers", f"pool {pool['name']}: {len(alive)} alive")
        else:
            message = f"pool {pool['name']} has no live worker ({len(workers)} known): its runs wait"
            yield warning("prefect: workers", message, f"prefect worker start --pool {pool['name']}")


def _scheduler(url: str) -> Iterator[Finding]:
    """Check that runs are planned, which a live scheduler does for every active schedule, and that none is overdue."""
    deployments = [each for each in ask(url, "/deployments/filter", {"limit": 200}) if not each.get("paused")]
    scheduled = [each for each in deployments if any(schedule.get("active") for schedule in each.get("schedules") or ())]
    if not scheduled:
        yield skipped("prefect: scheduler", "no deployment with an active schedule: nothing shows whether it plans runs")
        return
    waiting = {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}, "limit": 200, "sort": "EXPECTED_START_TIME_ASC"}
    expected = [run.get("expected_start_time") for run in ask(url, "/flow_runs/filter", waiting)]
    times = [datetime.fromisoformat(when) for when in expected if when]
    now = datetime.now(UTC)
    planned, late = sum(when > now for when in times), sum(when < now - timedelta(seconds=LATE_S) for when in times)
    if late:
        message = f"{counted(late, 'scheduled run is', 'scheduled runs are')} more than {LATE_S:.0f} s late"
        yield warning(
            "prefect: scheduler", message, "start a worker for their pool, or `aepipe serve`; see whether a concurrency limit holds them"
        )
    those = counted(len(scheduled), "deployment", "deployments")
    if planned:
        yield ok("prefect: scheduler", f"{counted(planned, 'run is planned', 'runs are planned')} for {those}")
    else:
        message = f"no run is planned for {those} with an active schedule: the scheduler does not work"
        remedy = "run `prefect server services start` for a server without services; SQLAlchemy has to be < 2.1"
        yield failed("prefect: scheduler", message, remedy)
