"""What the command prints about things from outside: names of files and classes, addresses, errors of other libraries."""

import io
import json
import logging
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aecore.errors import ClusterError
from aecore.store import _s3_client as client_module
from pipelines.cli.main import main
from pipelines.cluster.outside import known_error
from pipelines.steps.logs import Printable, make_printable
from pipelines.steps.progress import Progress, TerminalLine, from_line, lines_to
from tests.processes import WARM, run, started

EVIL = "cat\x1b]0;owned\x07\x1b[2J"
SIGNATURE = "X-Amz-Signature=hidden123"


def said(capsys: pytest.CaptureFixture[str], *argv: str, code: int) -> tuple[str, str]:
    """Run a verb; return what it printed to both streams."""
    capsys.readouterr()
    got = main(argv)
    output = capsys.readouterr()
    assert got == code, output.err
    return output.out, output.err


def test_an_error_and_a_table_show_names_without_control_characters_and_json_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (EVIL, "dog\nfinished: yes"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(4):
            pixels = np.full((8, 8), number * 40, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")
    (tmp_path / "images" / EVIL / "bad\x1b[31m.png").write_bytes(b"no image")
    data = str(tmp_path / "data")
    _, err = said(capsys, "shard", str(tmp_path / "images"), data, "cluster.num_workers=0", "shards.max_bad=0.2", code=0)
    assert "\x1b" not in err
    shown, _ = said(capsys, "show", data, code=0)
    assert "\x1b" not in shown and r"cat\x1b]0;owned\x07" in shown
    assert "\nfinished: yes" not in shown and r"dog\nfinished: yes" in shown
    listed, _ = said(capsys, "show", data, "--json", code=0)
    assert EVIL in json.loads(listed)["class_names"] and "\x1b" not in listed
    for argv in (["show", f"{tmp_path}/{EVIL}"], ["show", "--json", f"{tmp_path}/{EVIL}"], ["train", f"data={tmp_path}/{EVIL}", "out=x"]):
        out, err = said(capsys, *argv, code=3)
        assert "\x1b" not in out + err and r"cat\x1b]0;owned\x07" in err
    assert EVIL in json.loads(said(capsys, "show", "--json", f"{tmp_path}/{EVIL}", code=3)[0])["message"]


@pytest.mark.parametrize("flags", [[], ["--json"], ["--debug"]])
def test_a_signature_in_an_address_is_not_repeated(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (
        ["show", f"https://bucket.s3.amazonaws.com/a?{SIGNATURE}"],
        ["show", f"s3://bucket/a?{SIGNATURE}"],
        ["shard", f"s3a://bucket/a?{SIGNATURE}", str(tmp_path / "data"), "source.kind=folder", "cluster.num_workers=0"],
        ["train", f"data=s3://bucket/a?{SIGNATURE}", f"out={tmp_path}/run", "--dry-run"],
        ["run", "demo", f"out=s3://user:hidden123@bucket/a?{SIGNATURE}", "--dry-run"],
    ):
        out, err = said(capsys, *argv, *flags, code=2)
        assert "hidden" not in out + err, argv
    assert list(tmp_path.iterdir()) == []


def test_the_recipe_of_a_dry_run_shows_no_secret(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["shard", "sprites", str(tmp_path / "data"), f"name=http://me:hidden123@host:1/?{SIGNATURE}", "cluster.num_workers=0"]
    for flags in ([], ["--json"]):
        out, err = said(capsys, *argv, "--dry-run", *flags, code=0)
        assert "http://***@host:1/?X-Amz-Signature=***" in out
        assert "hidden" not in out + err


@pytest.mark.parametrize("flags", [[], ["--json"], ["--debug"]])
def test_the_password_of_an_endpoint_is_in_no_traceback(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:hidden123@not-a-host-:9")
    try:
        out, err = said(capsys, "show", "s3://bucket/a", *flags, code=4)
        assert "hidden" not in out + err
        assert "check AWS_ENDPOINT_URL" in err
        assert ("Invalid endpoint: http://***@not-a-host-:9" in err) == ("--debug" in flags), "the library names the whole address"
    finally:
        client_module.close_clients()


BUG = """
import sys, threading
from pipelines.cli import main as module
def broken(words):
    def fail(): raise KeyError("http://u:hidden123@h/ \\x1b[31m")
    other = threading.Thread(target=fail)
    other.start()
    other.join()
    fail()
module._run = broken
sys.argv = ["aepipe", "show", "x"]
sys.exit(module.main())
"""


def test_the_traceback_of_a_bug_is_printable_too() -> None:
    done = run([sys.executable, "-c", BUG])
    assert done.returncode == 1
    assert done.stderr.count("Traceback (most recent call last)") == done.stderr.count("KeyError") == 2, "one of another thread"
    assert "hidden" not in done.stderr and "\x1b" not in done.stderr


ENDING = """
import atexit, sys, time
from pipelines.cli.main import main
atexit.register(lambda: (print("ending", flush=True), time.sleep(600)))
sys.argv = ["aepipe", "list", "models"]
sys.exit(main())
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_after_the_result_is_no_traceback(how: signal.Signals) -> None:
    with started([*WARM, "-c", ENDING]) as process:
        process.wait_for("ending")
        process.send(how)
        done = process.finish()
    assert (done.returncode, done.stderr) == (-how, "")


def test_a_log_of_ours_is_one_printable_line_per_record() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.addFilter(Printable())
    logger = logging.Logger("aecore.test")
    logger.addHandler(handler)
    logger.warning("cannot read %s at %s", "a\x1b[31m\naepipe: ok", "http://u:hidden@h")
    assert stream.getvalue() == "cannot read a\\x1b[31m\\naepipe: ok at http://***@h\n"
    try:
        raise ValueError("http://u:hidden@h \x1b")
    except ValueError:
        logger.exception("failed")
    assert "ValueError: http://***@h \\x1b\n" in stream.getvalue()
    assert "hidden" not in stream.getvalue() and "\x1b" not in stream.getvalue()


def test_a_line_of_progress_is_one_printable_line() -> None:
    progress, stream = Progress("shard", 1, 2, "shards", "a\x1b[2J\nshard: 2 of 2 shards, b"), io.StringIO()
    lines_to(stream)(progress)
    assert stream.getvalue() == "shard: 1 of 2 shards, a\\x1b[2J\\nshard: 2 of 2 shards, b\n"
    assert from_line(stream.getvalue().rstrip("\n")) is not None
    drawn = io.StringIO()
    TerminalLine(drawn)(progress)
    assert drawn.getvalue().removeprefix("\r\x1b[2K").isprintable()


def test_a_wrong_log_call_fails_nothing_and_the_console_of_the_root_is_filtered():
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logging.getLogger().addHandler(handler)
    try:
        make_printable("prefect")
        logging.getLogger("prefect.client").warning("%d \x1b[31m", "x")
        logging.getLogger("urllib3").warning("http://u:secret@host/ \x1b[31m")
    finally:
        logging.getLogger().removeHandler(handler)
    assert "\x1b" not in stream.getvalue() and "secret" not in stream.getvalue() and "urllib3" not in stream.getvalue()
    assert len(stream.getvalue().splitlines()) == 2


def test_a_service_that_was_lost_is_tried_again():
    import ray

    from pipelines.flows.factory import is_retryable

    def failed(error: BaseException) -> object:
        class State:
            def result(self) -> None:
                raise error

        return State()

    assert is_retryable(None, None, failed(known_error(ray.exceptions.RaySystemError("x"))))
    assert is_retryable(None, None, failed(known_error(ConnectionResetError())))
    assert not is_retryable(None, None, failed(ClusterError("no such cluster")))
