"""The exits of the command line: one line and an exit code for what the outside does, whoever reads what is printed."""

import contextlib
import errno
import hashlib
import http.server
import io
import json
import logging
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aecore.artifact.documents import parse_json
from aecore.errors import ClusterError, ConfigError, DataError, ServiceLost, StoreError
from aecore.store import FileRef, open_store
from aecore.training.metrics import read_rows
from pipelines.cli.main import main
from pipelines.cluster.outside import known_error
from pipelines.recipe.recipe import load_recipe
from pipelines.steps import job_main
from pipelines.steps.progress import Progress, TerminalLine, TrainWatch, lines_to
from tests.filefaults import faults
from tests.processes import run

AEPIPE = (sys.executable, "-P", "-m", "pipelines.cli")


@pytest.fixture(autouse=True)
def own_loggers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the loggers back as they were: a command logs to the standard error that it finds."""
    for package in ("aecore", "pipelines"):
        monkeypatch.setattr(logging.getLogger(package), "handlers", [])


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Give the messages that `pipelines` logs at WARNING or above, also where Prefect keeps them from the root logger."""
    import pipelines.flows.factory  # noqa: F401  Prefect configures the loggers when it is imported

    said = list[str]()

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    monkeypatch.setattr(logging.getLogger("pipelines"), "handlers", [Kept(logging.WARNING)])
    return said


def raiser(error: Exception) -> Any:
    def call(*_: object, **__: object) -> None:
        raise error

    return call


def ray_start() -> Exception:
    return Exception("The current node timed out during startup. This could happen because the raylet failed to startup.")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(errno.EIO, "Input/output error", "/a/b"), 4, "the storage cannot be used: '/a/b': Input/output error; "),
        (OSError("Couldn't deserialize thrift"), 4, "Couldn't deserialize thrift"),
        (MemoryError("3 GiB"), 5, "not enough memory here (3 GiB)"),
        (RuntimeError("can't start new thread"), 5, "not enough memory here (can't start new thread)"),
        (ConnectionResetError("reset"), 5, "the connection to a service failed (ConnectionResetError: reset)"),
        (ValueError("embedded null byte"), 2, "zero byte"),
    ],
)
def test_a_fault_of_the_outside_ends_a_verb_with_one_line_and_its_exit_code(
    error: Exception, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pipelines.steps.show.show", raiser(error))
    assert main(["show", "x", "--json"]) == code
    output = capsys.readouterr()
    assert output.err.startswith("aepipe: ") and said in output.err
    assert output.err.rstrip().endswith("--debug shows where it happened")
    assert len(output.err.splitlines()) == 1
    assert json.loads(output.out)["exit_code"] == code


@pytest.mark.parametrize("bug", [KeyError("x"), RecursionError("maximum recursion depth exceeded")])
def test_a_bug_keeps_its_traceback(bug: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.steps.show.show", raiser(bug))
    with pytest.raises(type(bug)):
        main(["show", "x"])


def test_a_pipe_that_broke_in_the_work_is_no_success(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("pipelines.steps.show.show", raiser(BrokenPipeError(errno.EPIPE, "Broken pipe")))
    assert main(["show", "x"]) == 5
    assert "Broken pipe" in capsys.readouterr().err


@pytest.mark.parametrize(("url", "said"), [("file:///%00", "zero byte"), ("~nobody-of-that-name/x", "no home directory here")])
def test_an_address_that_no_file_system_knows_is_a_usage_error(url: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["show", url], ["verify", url], ["gc", url], ["shard", "sprites", url, "cluster.num_workers=0"]):
        assert main(argv) == ConfigError.exit_code
        assert said in capsys.readouterr().err


def test_closed_streams_and_readers_that_leave_change_no_exit_code() -> None:
    for line, code in (
        ("{} list recipes | head -c 1; exit ${{PIPESTATUS[0]}}", 0),
        ("{} list recipes > /dev/full", 4),
        ("{} show /nowhere --json > /dev/full", 3),
        ("{} list recipes >&-", 4),
        ("{} list recipes --json >&-", 4),
        ("{} show /nowhere >&-", 3),
        ("{} --help >&-", 4),
        ("{} --help > /dev/full", 4),
        ("{} --version >&- <&-", 4),
        ("{} shard --no-such-option >&-", 2),
        ("{} list recipes 2>&-", 0),
        ("{} show /nowhere 2>&-", 3),
        ("{} show /nowhere 2> /dev/full", 3),
    ):
        done = run(["bash", "-c", line.format(" ".join(AEPIPE))])
        assert done.returncode == code, (line, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        assert "Exception ignored" not in done.stderr
        why = "it is closed" if ">&-" in line else "No space left on device"
        assert (f"aepipe: cannot write the result to standard output: {why}; " in done.stderr) == (code == 4)
        assert code != 4 or len(done.stderr.splitlines()) == 1


def test_a_working_directory_that_is_gone_and_a_home_that_is_none_are_named(tmp_path: Path) -> None:
    gone = f"mkdir {tmp_path}/gone && cd {tmp_path}/gone && rmdir {tmp_path}/gone && {' '.join(AEPIPE)}"
    for command in ("show .", f"train data=/x out={tmp_path}/run"):
        done = run(["bash", "-c", f"{gone} {command}"])
        assert (done.returncode, done.stderr) == (
            4,
            "aepipe: the working directory cannot be used: No such file or directory; go to one that exists\n",
        )
    homes = {"XDG_CACHE_HOME": "", "PREFECT_HOME": ""}
    env = {name: value for name, value in os.environ.items() if name not in homes}
    done = run([*AEPIPE, "deploy"], env=env | {"HOME": "/dev/null"})
    assert done.returncode == 4
    assert "cannot make PREFECT_HOME=/dev/null/.cache/aepipe/prefect, or a folder above it; set it to a folder of your own" in done.stderr


def test_a_name_that_is_no_text_is_shown_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open(os.devnull, "w", encoding="ascii") as plain, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", plain)
        assert main(["list", "models"]) == 0
        print("\udcff\u2192", file=plain)
    for argv in (["show", f"{tmp_path}/\udcff"], ["shard", "sprites", str(tmp_path / "out"), "name=\udcff", "cluster.num_workers=0"]):
        assert main(argv) == 2
        assert "\\udcff" in (said := capsys.readouterr().err) and "is not UTF-8 (rename the file)" in said


def test_errors_of_services_are_those_of_the_cluster_and_a_task_is_judged_by_its_cause() -> None:
    import httpx
    import ray

    assert isinstance(known_error(httpx.ConnectError("refused")), ClusterError)
    assert isinstance(known_error(ray.exceptions.RaySystemError("gone")), ClusterError)
    caused = ray.exceptions.RayTaskError("work", "Traceback ...", OSError(errno.EIO, "Input/output error"))
    assert isinstance(known_error(caused.as_instanceof_cause()), StoreError)
    assert known_error(ray.exceptions.RayTaskError("work", "Traceback ...", KeyError("x")).as_instanceof_cause()) is None


class Answering(http.server.BaseHTTPRequestHandler):
    """Answers everything with one status, 0: closes the connection."""

    status: int

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.status:
            content = b'{"exception_message": "why not"}'
            self.send_response(self.status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        self.close_connection = True

    do_POST = do_PUT = do_PATCH = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def answering(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Give the address of a Prefect API that answers every request with the status of the parameter."""
    from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Answering,), {"status": request.param})) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/api"
        monkeypatch.setenv("PREFECT_API_URL", url)
        with temporary_settings({PREFECT_API_URL: url, PREFECT_CLIENT_MAX_RETRIES: 0}):
            yield url
        server.shutdown()


ANSWERS = [
    (401, False, "answered 401 Unauthorized", "set PREFECT_API_AUTH_STRING=user:password as on the server"),
    (403, False, "answered 403 Forbidden", "to a user who may do that"),
    (404, False, "answered 404 Not Found", "check PREFECT_API_URL (it ends with /api)"),
    (409, True, "answered 409 Conflict", "run the same command again"),
    (422, False, "answered 422 Unprocessable", "`aepipe doctor` compares the versions"),
    (429, True, "answered 429 Too Many Requests", "wait, then run the same command again"),
    (500, True, "answered 500 Internal Server Error", "look at its log, then run the same command again"),
    (0, True, "the connection to a service failed (RemoteProtocolError", "look whether the Ray cluster and the Prefect server are well"),
]


@pytest.mark.filterwarnings("ignore:Artifact creation outside of a flow:FutureWarning")
@pytest.mark.parametrize(
    ("answering", "retried", "answer", "remedy"), ANSWERS, indirect=["answering"], ids=[str(row[0]) for row in ANSWERS]
)
def test_an_answer_of_prefects_api_that_is_an_error_is_named_with_what_to_do(
    answering: str, retried: bool, answer: str, remedy: str, warnings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    from prefect.client.orchestration import get_client

    from pipelines.flows import factory

    factory.publish_report("x", "y")
    factory.publish_artifacts("shard", {"rows": 3, "dataset": "/x"})
    assert [line.partition(" is not on")[0] for line in warnings] == ["the report", "the summary of shard"]
    assert all(answer in line and remedy in line for line in warnings), warnings
    with pytest.raises(Exception) as raised, get_client(sync_client=True) as client:
        client.read_work_pools()
    assert isinstance(known_error(raised.value), ServiceLost) == retried
    assert main(["deploy", "demo", "out=/x", "cluster.num_workers=0"]) == ClusterError.exit_code
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("aepipe: ")]
    assert answering in said
    if answer.startswith("answered"):  # else there is no server for the command
        assert answer in said and remedy in said


def test_a_wrapped_request_is_judged_by_what_failed() -> None:
    import httpx
    from prefect.exceptions import ObjectNotFound

    request = httpx.Request("GET", "http://127.0.0.1:1/api/flow_runs/x")
    refused = httpx.HTTPStatusError("x", request=request, response=httpx.Response(404, request=request))
    for wrapping in (ObjectNotFound(refused), RuntimeError("Failed to reach API at http://127.0.0.1:1/api")):
        wrapping.__cause__ = refused
        known = known_error(wrapping)
        assert isinstance(known, ClusterError) and "404 Not Found" in str(known)
    assert known_error(RuntimeError("Failed to reach API")) is None
    versions = known_error(RuntimeError("Found incompatible versions: client: 3.1, server: 2.0. Major versions must match."))
    assert isinstance(versions, ClusterError) and "server: 2.0" in str(versions)


@pytest.mark.parametrize("answering", [401, 403, 404], indirect=True)
@pytest.mark.parametrize("streamed", [False, True])
def test_prefects_remedies_are_those_of_its_address_and_a_streamed_answer_needs_no_text(
    answering: str, streamed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import httpx

    def said(url: str) -> str:
        with pytest.raises(httpx.HTTPStatusError) as raised, httpx.Client() as client:
            if streamed:
                with client.stream("GET", url) as response:
                    response.raise_for_status()
            client.get(url).raise_for_status()
        known = known_error(raised.value)
        assert type(known) is ClusterError and url in str(known)
        assert ("why not" in str(known)) == (not streamed)
        return str(known)

    assert "PREFECT_API_" in said(f"{answering}/flow_runs/x?limit=3")
    assert "PREFECT_API_" in said(answering)
    assert "PREFECT_API_" not in said(answering + "s/x")
    assert "PREFECT_API_" not in said(answering.removesuffix("/api"))
    monkeypatch.setenv("PREFECT_API_URL", answering.replace("http", "HTTP") + "/")
    assert "PREFECT_API_" in said(f"{answering}/flow_runs/x")
    for other in ("http://127.0.0.1:1/api", "https://api.prefect.cloud/api", "", "http://["):
        monkeypatch.setenv("PREFECT_API_URL", other)
        assert "PREFECT_API_" not in said(f"{answering}/flow_runs/x")
    monkeypatch.delenv("PREFECT_API_URL")
    assert "PREFECT_API_" not in said(f"{answering}/flow_runs/x")


def test_a_ray_that_does_not_start_is_a_cluster_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from pipelines.cluster import session
    from pipelines.recipe.recipe import ClusterSpec

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", raiser(ray_start()))  # 30 s of a machine that is too busy
    monkeypatch.setattr(session._Connection, "address", None)
    with pytest.raises(ClusterError, match="cannot start a local Ray: The current node timed out during startup"):
        session.connect(ClusterSpec(num_workers=1))
    monkeypatch.setattr(ray, "init", raiser(TypeError("a bug")))
    with pytest.raises(TypeError):
        session.connect(ClusterSpec(num_workers=1))


def test_a_job_says_a_fault_of_the_outside_without_a_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("signal.signal", lambda *_: None)
    recipe = load_recipe(None, ["out=/x", "source.kind=sprites", "cluster.num_workers=0"])
    monkeypatch.setitem(job_main.STEPS, "shard", raiser(OSError(errno.ENOSPC, "No space left on device", "/x")))
    assert job_main.main(["shard", json.dumps(recipe.tree)]) == 4
    said = capsys.readouterr().out
    assert "Traceback" not in said
    assert job_main.result_of(said.splitlines()[-1]) is not None
    monkeypatch.setitem(job_main.STEPS, "shard", raiser(KeyError("x")))
    assert job_main.main(["shard", json.dumps(recipe.tree)]) == 1
    assert "Traceback" in capsys.readouterr().out


def test_a_page_that_does_not_take_a_summary_does_not_fail_the_step(monkeypatch: pytest.MonkeyPatch, warnings: list[str]) -> None:
    import httpx

    from pipelines.flows import factory

    for name in ("create_table_artifact", "create_link_artifact", "create_markdown_artifact"):
        monkeypatch.setattr(factory, name, raiser(httpx.ConnectError("refused")))
    factory.publish_artifacts("shard", {"rows": 3, "dataset": "/x"})
    factory.publish_report("x", "y")
    assert len(warnings) == 2
    assert all("is not on the run's page: the connection to a service failed (ConnectError: refused)" in line for line in warnings)


def metrics_of(root: Path) -> None:
    """Write the claim and one row of the metrics of a run."""
    store = open_store(root)
    row = {"step": 3, "epoch": 0, "samples": 10, "loss": 1.0, "lr": 0.1, "beta": 1.0}
    store.put("metrics/00000001-00000003-a.jsonl", json.dumps(row).encode() + b"\n", role="metrics")
    from aecore.artifact.commit import claim_generation

    claim_generation(store, "run", {"x": 1}, {"total_steps": 9})


def test_a_look_at_the_metrics_that_fails_is_a_warning_and_the_next_one_shows_them(tmp_path: Path, warnings: list[str]) -> None:
    metrics_of(tmp_path)
    seen: list[Progress] = []
    watch = TrainWatch(open_store(tmp_path), seen.append, milestones=False, interval_s=0.0)
    with faults(tmp_path, "listdir", errno.EIO) as met:
        watch()
        watch()
    assert met.raised == 2
    assert len(warnings) == 1
    assert "the progress of training cannot be read now: cannot list" in warnings[0]
    watch()
    assert [(progress.done, progress.total) for progress in seen] == [(3, 9)]
    for number, damaged in enumerate((b"{", b"[" * 100_000, b"3", b"")):
        (tmp_path / "metrics/00000001-00000003-a.jsonl").write_bytes(damaged)
        TrainWatch(open_store(tmp_path), seen.append, milestones=False).look()
        assert "00000001-00000003-a.jsonl is damaged" in warnings[1 + number]
        ref = FileRef("metrics/00000001-00000003-a.jsonl", len(damaged), hashlib.sha256(damaged).hexdigest())
        with pytest.raises(DataError, match=r"a\.jsonl is damaged: . lines, expected a JSON object in each; restore it"):
            read_rows(open_store(tmp_path), [ref])


def test_an_input_that_is_nested_too_deep_is_refused_where_it_is_parsed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shard", "sprites", "/x", f"{'a.' * 5000}b=1"]) == ConfigError.exit_code
    assert "has 5001 parts, expected at most 32" in capsys.readouterr().err
    assert job_main.result_of(f"{job_main.RESULT}{'[' * 100_000}") is None
    for depth, deep in ((64, False), (65, True), (100_000, True)):
        text = "[" * depth + "]" * depth
        with pytest.raises(ValueError, match="nested") if deep else contextlib.nullcontext():
            parse_json(text)


def test_progress_that_cannot_be_shown_does_not_end_the_work() -> None:
    line = Progress("train", 1, 2, "steps", "x")
    with open("/dev/full", "wb", buffering=0) as full:
        stream = io.TextIOWrapper(full, write_through=True)
        TerminalLine(stream)(line)
        lines_to(stream)(line)
        stream.detach()
