"""aepipe doctor: every check against the real thing, its remedy when that is missing, and a bound on all of it."""

import hashlib
import http.server
import json
import os
import re
import socket
import threading
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from aecore import native
from aecore.errors import ClusterError, ConfigError, StoreError
from aecore.nn import linear_path
from aecore.store import FileRef, LocalStore, _race, open_store
from aecore.store._race import remember
from aecore.store._s3 import S3Store
from pipelines.cli.main import main
from pipelines.doctor import Check, Finding, _environment, _machine, _prefect, _ray, _store, exit_code
from pipelines.doctor._check import ok, run_checks
from pipelines.recipe.recipe import ClusterSpec
from tests.e2e.servers import prefect_server
from tests.processes import wait_until
from tests.s3 import S3
from tests.s3.proxy import FaultProxy


def states(findings: list[Finding]) -> dict[str, str]:
    return {finding.name: finding.state for finding in findings}


def checked(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> dict[str, dict[str, str]]:
    """Run the verb; return its checks by name (of several of one name the worst)."""
    capsys.readouterr()
    assert main(["doctor", *argv, "--json"]) == code
    found = json.loads(capsys.readouterr().out)
    assert found["exit_code"] == code
    order = ["skipped", "ok", "warning", "failed"]
    return {check["name"]: check for check in sorted(found["checks"], key=lambda check: order.index(check["state"]))}


def test_with_nothing_configured_it_passes_and_says_what_it_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    found = checked(capsys, "cluster.num_workers=1")
    assert [name for name, check in found.items() if check["state"] == "failed"] == []
    for name, why in (("store", "no URL given"), ("ray", "RAY_ADDRESS is not set"), ("prefect", "PREFECT_API_URL is not set")):
        assert found[name]["state"] == "skipped"
        assert why in found[name]["message"]
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("ok       python: Python 3.")
    assert lines[-1].endswith("skipped")


def test_it_says_whether_the_compiled_loops_are_used_and_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    if native.available():
        assert _machine.compiled_loops().state == "ok"
        assert native.processor().name in _machine.compiled_loops().message
        with monkeypatch.context() as patch:
            patch.setenv("AECORE_NATIVE", "0")
            patch.setattr(native, "_load", native._load.__wrapped__)
            assert _machine.compiled_loops().message == "shards are read, hashed and packed in Python (AECORE_NATIVE=0)"
    monkeypatch.setattr(native, "_load", native._load.__wrapped__)
    monkeypatch.setattr(native, "_path", lambda: None)
    assert "install a C compiler" in _machine.compiled_loops().message


def test_it_says_which_matrix_product_is_used_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    linear_path.cache_clear()
    monkeypatch.setenv("AECORE_LINEAR", "torch")
    assert "torch (AECORE_LINEAR=torch)" in _machine.linear_layers().message
    linear_path.cache_clear()
    monkeypatch.setenv("AECORE_LINEAR", "mkl")
    (finding,) = run_checks([check for check in _machine.machine_checks(ClusterSpec()) if check.name == "linear layers"])
    assert finding.state == "failed" and "AECORE_LINEAR is 'mkl'" in finding.message
    linear_path.cache_clear()


def test_a_good_store_passes_and_nothing_of_the_check_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "theirs").mkdir()
    for place in (tmp_path / "new/deep/place", tmp_path / "theirs"):
        found = checked(capsys, str(place))
        for name in ("write", "read after write", "put-if-absent", "hard links", "clock", "race"):
            assert found[f"store: {name}"]["state"] == "ok", found
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == ["theirs"]


def test_a_bucket_passes_and_nothing_of_the_check_is_left(s3: S3) -> None:
    url = f"{s3.url}/place"
    findings = run_checks(_store.store_checks(url))
    assert states(findings) == {f"store: {name}": "ok" for name in ("race", "write", "read after write", "put-if-absent", "clock")}, (
        findings
    )
    assert s3.objects() == {}


def test_a_bucket_that_does_not_create_atomically_fails(bare_s3: S3) -> None:
    (found,) = run_checks(_store.store_checks(f"{bare_s3.url}/place"))
    assert (found.name, found.state, found.exit_code) == ("store: race", "failed", 4)
    assert re.fullmatch("[2-8] of 8 overlapping writes of one name were acknowledged", found.message)
    assert bare_s3.objects() == {}


def test_a_place_that_cannot_be_written_fails_with_exit_code_4(capsys: pytest.CaptureFixture[str]) -> None:
    found = checked(capsys, "/proc/nothing/here", code=4)
    assert "cannot write under /proc/nothing/here" in found["store"]["message"]
    assert found["store"]["remedy"].startswith("use another URL")


class Overwriting(LocalStore):
    """A store that takes every write, as some shared file systems and gateways do."""

    def put(self, name: str, data: bytes, *, role: str) -> FileRef:
        (self.root / name).parent.mkdir(exist_ok=True)
        (self.root / name).write_bytes(data)
        return FileRef(name, len(data), hashlib.sha256(data).hexdigest())


def test_a_store_that_overwrites_and_a_race_without_one_winner_are_found(tmp_path: Path) -> None:
    store = Overwriting(tmp_path)
    store.put("one", b"first", role="doctor")
    found = _store._exclusive(store)
    assert (found.state, found.message) == ("failed", "a second write under one name was not refused")
    raced = _store.raced(store)
    assert (raced.state, raced.message) == ("failed", "8 of 8 overlapping writes of one name were acknowledged")


def test_a_clock_that_is_wrong_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    later = time.time() + 400
    monkeypatch.setattr(_store.time, "time", lambda: later)
    found = _store._clock(open_store(tmp_path))
    assert found.state == "warning"
    assert found.message == "the clock of the storage and of this machine are 400 s apart"


@pytest.mark.parametrize(
    ("name", "version", "what"),
    [("fastapi", "0.155.1", "every flow fails at its start"), ("sqlalchemy", "2.1.0", "cron schedules never fire")],
)
def test_versions_that_do_not_work_together_are_named_with_the_range_of_the_package(
    name: str, version: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    (need,) = [found for text in project["dependencies"] if (found := Requirement(text)).name == name]
    remedy = f"pip install '{need}'"
    real = _environment.installed
    monkeypatch.setattr(_environment, "installed", lambda asked: Version(version) if asked == name else real(asked))
    (found,) = run_checks([Check("known conflicts", _environment.conflicts, ConfigError)])
    assert (found.state, found.exit_code, found.remedy) == ("failed", 2, remedy)
    assert what in found.message
    listed = run_checks([Check("packages", _environment.packages, ConfigError)])
    assert any(name in finding.message and finding.state == "failed" for finding in listed)


def test_what_is_installed_here_is_what_the_project_asks_for() -> None:
    found = run_checks(_environment.environment_checks())
    assert not [finding for finding in found if finding.state == "failed"], found


def test_a_check_that_hangs_or_breaks_is_a_failure_and_the_others_have_their_turn() -> None:
    def breaks() -> Finding:
        raise ValueError("odd")

    goes_on = threading.Event()
    hangs = Check("hangs", lambda: goes_on.wait() and ok("hangs", "never"), ClusterError, timeout_s=0.2)
    try:
        found = run_checks([hangs, Check("breaks", breaks, StoreError), Check("fine", lambda: ok("fine", "yes"), StoreError)])
    finally:
        goes_on.set()
    assert [(finding.name, finding.state, finding.exit_code) for finding in found] == [
        ("hangs", "failed", 5),
        ("breaks", "failed", 4),
        ("fine", "ok", 0),
    ]
    assert exit_code(found) == 5
    assert "no answer within 0 s" in found[0].message
    assert found[1].message == "ValueError: odd"
    assert all(finding.remedy for finding in found if finding.state == "failed")


def test_more_threads_than_cores_and_more_workers_than_memory_are_said() -> None:
    (found,) = run_checks([Check("cores", lambda: _machine.cores(ClusterSpec(num_workers=4096)), ClusterError)])
    assert (found.state, found.remedy) == ("warning", "lower cluster.num_workers or cluster.threads_per_worker")
    found = run_checks([Check("memory", lambda: _machine.memory(ClusterSpec(num_workers=1 << 20)), ClusterError)])[0]
    assert (found.state, found.exit_code) == ("failed", 5)


@pytest.fixture
def silent_port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A port that takes connections and never answers; the bounds are short."""
    monkeypatch.setattr(_ray, "PROBE_S", 6.0)
    monkeypatch.setattr(_prefect, "ANSWER_S", 1.0)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(8)
        yield server.getsockname()[1]


def test_services_that_take_the_connection_and_never_answer_fail_in_bounded_time(silent_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{silent_port}")
    monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{silent_port}/api")
    found = run_checks([*_ray.ray_checks(ClusterSpec()), *_prefect.prefect_checks()])
    assert [(finding.name, finding.state, finding.exit_code) for finding in found] == [("ray", "failed", 5), ("prefect", "failed", 5)]


@pytest.mark.parametrize(
    "url", ["http://user:hunter2@host/api", "http://user:hunter2@127.0.0.1:9/api", "http://hunter2@host/api?token=hunter2"]
)
def test_a_password_in_the_address_of_a_server_is_refused_and_not_repeated(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", url)
    (found,) = run_checks(_prefect.prefect_checks())
    assert (found.state, found.exit_code) == ("failed", 5)
    assert "a password goes into PREFECT_API_AUTH_STRING" in found.message
    assert "hunter2" not in str(found)
    assert main(["shard", "sprites", "/tmp/never", "cluster.num_workers=0"]) == 2
    output = capsys.readouterr()
    assert "a password goes into PREFECT_API_AUTH_STRING" in output.err
    assert "hunter2" not in output.out + output.err


def test_the_result_of_a_race_replaces_what_writers_remember(bare_s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(f"{bare_s3.url}/place")
    remember(S3Store(bare_s3.url, bare_s3.bucket, "", None).location, Path(os.environ["AECORE_CACHE"]))
    store.put("a", b"1", role="part")  # as remembered
    assert _store.raced(store).state == "failed"
    with pytest.raises(StoreError, match="does not create files atomically"):
        store.put("b", b"1", role="part")


def test_writers_trust_the_race_of_the_doctor(bad_s3: S3, s3_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_race, "_passed", set())
    store = open_store(f"{bad_s3.url}/place")
    for note in Path(os.environ["AECORE_CACHE"]).iterdir():
        note.unlink()
    assert _store.raced(store).state == "ok"
    before = s3_proxy.seen("^PUT")
    store.put("a", b"1", role="part")
    assert s3_proxy.seen("^PUT") - before == 1


def test_services_that_are_not_there_fail_with_exit_code_5(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:1/api")
    found = checked(capsys, code=5)
    assert "nothing answers at 127.0.0.1:1" in found["ray"]["message"]
    assert "unset RAY_ADDRESS" in found["ray"]["remedy"]
    assert "no Prefect server answers at PREFECT_API_URL=http://127.0.0.1:1/api" in found["prefect"]["message"]


@pytest.fixture
def server_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The API address of a real Prefect server with a password."""
    with prefect_server(tmp_path, "admin:hunter2", {"PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true"}) as server:
        monkeypatch.setenv("PREFECT_API_URL", server.url)
        yield server.url


@pytest.mark.prefect
@pytest.mark.slow
def test_a_prefect_server_is_asked_for_version_password_workers_and_schedules(server_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def look() -> dict[str, Finding]:
        return {finding.name: finding for finding in run_checks(_prefect.prefect_checks())}

    without = look()
    assert states(list(without.values())) == {"prefect": "failed"}
    assert without["prefect"].remedy == "set PREFECT_API_AUTH_STRING=user:password"
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "admin:hunter2")
    found = look()
    assert found["prefect"].state == "ok", found
    assert found["prefect: password"].state == "ok"
    assert "no work pool" in found["prefect: workers"].message
    assert found["prefect: scheduler"].state == "skipped"
    _prefect.ask(server_url, "/work_pools/", {"name": "local", "type": "process"})
    assert "pool local has no live worker" in look()["prefect: workers"].message
    flow = _prefect.ask(server_url, "/flows/", {"name": "nightly"})
    schedule = {"active": True, "schedule": {"cron": "* * * * *", "timezone": "UTC"}}
    deployment = {"name": "nightly", "flow_id": flow["id"], "schedules": [schedule], "work_pool_name": "local"}
    _prefect.ask(server_url, "/deployments/", deployment)
    wait_until(lambda: look()["prefect: scheduler"].state == "ok", lambda: f"the scheduler is ok: {look()}", every_s=0.5)
    assert "for 1 deployment" in look()["prefect: scheduler"].message
    assert "hunter2" not in str(look())


def test_a_prefect_server_without_a_password_is_warned_of_on_loopback_too() -> None:
    class Open(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Open) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found = _prefect._password(f"http://127.0.0.1:{server.server_port}/api")
        server.shutdown()
    assert (found.state, found.message) == (
        "warning",
        "the server accepts deployments, and so code to run, from every user of this machine",
    )
