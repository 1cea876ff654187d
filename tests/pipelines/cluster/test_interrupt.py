"""Signals as requests to stop: the first is heard, the second is what it always was."""

import concurrent.futures
import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from aecore.checkpoint.files import committed_checkpoints
from aecore.store import open_store
from aecore.training.metrics import last_row
from pipelines.cli.main import main
from pipelines.cluster import train as cluster_train
from pipelines.cluster.interrupt import StopRequest
from tests.aecore.training import losses, published_weights
from tests.pipelines.cluster.test_train import SAID, job_for
from tests.processes import AEPIPE, WARM, Started, started
from tests.s3 import s3_environment


@pytest.fixture
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_a_request_and_the_second_ends_at_once(number: int) -> None:
    signal.signal(number, signal.default_int_handler)
    with StopRequest() as stop:
        assert not stop()
        signal.raise_signal(number)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is signal.default_int_handler


@pytest.mark.usefixtures("handlers")
def test_a_signal_before_anybody_asks_ends_at_once() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt), StopRequest():
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.usefixtures("handlers")
def test_the_program_ends_as_its_own_handler_ends_it() -> None:
    class Termination(BaseException):
        pass

    def terminate(number: int, frame: object) -> None:
        raise Termination

    signal.signal(signal.SIGTERM, terminate)
    with StopRequest() as stop:
        assert not stop()
        signal.raise_signal(signal.SIGTERM)
    with pytest.raises(Termination):
        stop.end("saved")
    assert signal.getsignal(signal.SIGTERM) is terminate


@pytest.mark.usefixtures("handlers")
def test_an_ignored_signal_stays_ignored_and_a_thread_hears_none() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert not stop()
    found: list[bool] = []

    def in_a_thread() -> None:
        with StopRequest() as stop:
            found.append(stop())

    thread = threading.Thread(target=in_a_thread)
    thread.start()
    thread.join()
    assert found == [False]


@pytest.fixture(scope="module")
def whole(sprites: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert main(["train", *keys(sprites), f"out={out}"]) == 0
    return out


def keys(data: Path) -> list[str]:
    small = ("model.latent_dim=4", "backbone.hidden=[16]", "train.global_batch=32", "train.epochs=40", "checkpoint.every_steps=100000")
    return [f"data={data}", "cluster.num_workers=0", *small]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_says_the_step_that_it_saved_and_goes_on_from_it(
    sprites: Path, whole: Path, tmp_path: Path, number: int
) -> None:
    command = [*AEPIPE, "train", *keys(sprites), f"out={tmp_path}/run"]
    with started(command) as process:
        process.wait_for("epoch 3:")  # training is at work
        process.send(number)
        done = process.finish()
    error = done.stderr
    assert done.returncode == 130, error
    found = SAID.search(error)
    assert found, error
    assert "Traceback" not in error
    store = open_store(f"{tmp_path}/run")
    newest = last_row(store)
    assert newest is not None
    assert int(found[1]) == int(found[2]) == newest["step"] == max(step for step, _ in committed_checkpoints(store))
    assert main(["train", *keys(sprites), f"out={tmp_path}/run"]) == 0
    assert losses(tmp_path / "run") == losses(whole)
    assert published_weights(tmp_path / "run") == published_weights(whole)


@pytest.mark.usefixtures("handlers")
def test_workers_that_do_not_end_their_step_in_time_are_waited_for_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    class Flag:
        """The actor, as the driver sees it: `flag.request.remote()`."""

        def __init__(self) -> None:
            self.request, self.requested = self, 0

        def remote(self) -> None:
            self.requested += 1

    monkeypatch.setattr(cluster_train, "GRACE_S", 0.0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    flag, never = Flag(), concurrent.futures.Future[None]()
    with StopRequest() as stop:
        assert not stop()
        signal.raise_signal(signal.SIGINT)
        assert cluster_train._wait_for(never, stop, flag, lambda: None) is False
    assert flag.requested == 1


def test_a_worker_asks_once_a_second_whether_to_stop_and_no_more_when_it_shall(monkeypatch: pytest.MonkeyPatch) -> None:
    now, asked, answers = 100.0, [], [False, False, True]

    def ask() -> bool:
        asked.append(now)
        return answers.pop(0)

    monkeypatch.setattr(cluster_train.time, "monotonic", lambda: now)
    stop, heard = cluster_train._at_most_every(1.0, ask), []
    for step in range(20):
        now = 100 + step / 4
        heard.append(stop())
    assert (asked, heard) == ([100.0, 101.0, 102.0], [False] * 8 + [True] * 12)


def test_what_a_run_keeps_is_said_by_its_newest_checkpoint(sprites: Path, whole: Path, tmp_path: Path) -> None:
    assert cluster_train._saved(job_for(sprites, tmp_path)) == "no checkpoint was written yet, the same command starts from the beginning"
    assert cluster_train._saved(job_for(sprites, whole)).startswith("its newest checkpoint is that of step 440, the same command continues")


@pytest.fixture
def silent(tmp_path: Path) -> Iterator[tuple[dict[str, str], list[socket.socket]]]:
    """Give the environment for a service that accepts connections and never answers, and its connections."""
    accepted: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    accepted.append(listener.accept()[0])

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield {**os.environ, **s3_environment(listener.getsockname()[1], tmp_path / "cache")}, accepted
        listener.shutdown(socket.SHUT_RDWR)
    thread.join()
    for connection in accepted:
        connection.close()


def end_of(process: Started, number: int, within_s: float) -> float:
    """Send a signal, wait for the end, and return the seconds that it took."""
    began = time.monotonic()
    process.send(signal.Signals(number))
    done = process.finish(within_s)
    assert done.returncode == 130, process.tail()
    assert done.stderr.count("aepipe: interrupted") == 1 and "Traceback" not in done.stderr, process.tail()
    return time.monotonic() - began


@pytest.mark.parametrize(
    ("words", "number"),
    [
        (["verify", "s3://b/x"], signal.SIGINT),
        (["verify", "s3://b/x"], signal.SIGTERM),
        (["doctor", "s3://b/x"], signal.SIGINT),
        (["encode", "s3://b/run", "s3://b/data", "{tmp}/table", "cluster.num_workers=0", "--json"], signal.SIGTERM),
        (["shard", "sprites", "s3://b/x", "cluster.num_workers=0"], signal.SIGINT),
        (["train", "mnist_vae", "data=s3://b/data", "out={tmp}/run", "cluster.num_workers=0"], signal.SIGINT),
        (["train", "mnist_vae", "data=s3://b/data", "out={tmp}/run", "cluster.num_workers=0"], signal.SIGTERM),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else value.name,
)
def test_a_service_that_never_answers_does_not_hold_up_the_end(
    silent: tuple[dict[str, str], list[socket.socket]], tmp_path: Path, words: list[str], number: int
) -> None:
    environment, accepted = silent
    with started([*AEPIPE, *(word.format(tmp=tmp_path) for word in words)], env=environment) as process:
        process.wait_for(lambda: accepted, "a request")
        time.sleep(0.3)
        assert end_of(process, number, 60) < 15  # 4 s and the time of a busy machine; the requests are given up after 60 s and more
        if "--json" in words:
            assert json.loads(process.out)["exit_code"] == 130


# A thread that starts a process shares its memory until that has another program: it is in a call that no signal interrupts, as one that
# reads from a network disk whose server is gone. The new process waits for a pipe that nobody opens.
HANGING = """
import ctypes, os, sys, threading
real, libc = os.open, ctypes.CDLL(None)
where, pipe, how = sys.argv[1:4]

def hang():
    actions, pid = ctypes.create_string_buffer(256), ctypes.c_int()
    libc.posix_spawn_file_actions_init(actions)
    libc.posix_spawn_file_actions_addopen(actions, 0, pipe.encode(), os.O_RDONLY, 0)
    argv = (ctypes.c_char_p * 2)(b"true", None)
    libc.posix_spawn(ctypes.byref(pid), b"/bin/true", actions, None, argv, (ctypes.c_char_p * 1)(None))

def opened(path, *args, **options):
    if os.fspath(path).startswith(where):
        print("hangs", flush=True)
        if how == "main":
            hang()
        else:
            import concurrent.futures
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                pool.submit(hang).result()
    return real(path, *args, **options)

os.open = opened
sys.argv[1:] = sys.argv[4:]
from pipelines.cli.main import main
sys.exit(main())
"""


@pytest.mark.parametrize(
    ("verb", "how", "number"),
    [
        ("verify", "main", signal.SIGTERM),
        ("verify", "main", signal.SIGINT),
        ("verify", "another thread", signal.SIGTERM),
        ("train", "main", signal.SIGTERM),  # where a signal may be a request to save the state first
        ("train", "another thread", signal.SIGTERM),
    ],
)
def test_a_read_that_never_returns_does_not_hold_up_the_end(sprites: Path, tmp_path: Path, verb: str, how: str, number: int) -> None:
    os.mkfifo(tmp_path / "pipe")
    words = {
        "verify": [f"{sprites}/dataset.", "verify", sprites],
        "train": [f"{sprites}/shards/", "train", *keys(sprites), f"out={tmp_path}/run"],
    }
    where, *command = words[verb]
    with started([*WARM, "-c", HANGING, where, tmp_path / "pipe", how, *command]) as process:
        process.wait_for("hangs")
        time.sleep(0.3)
        assert end_of(process, number, 90) < (15 if verb == "verify" else 40)


def test_who_needs_time_to_end_has_it_and_no_more_than_that() -> None:
    program = """
import signal, sys, time
from pipelines.cluster import interrupt
interrupt.PATIENCE_S = interrupt._patience[0] = 1.0
signal.signal(signal.SIGTERM, lambda *_: print("heard", flush=True))
interrupt.end_in_time(lambda error: interrupt.write_line("left"))
with interrupt.patience(4):
    print("ready", flush=True)
    signal.pause()
    time.sleep(3)
    print("saved", flush=True)
time.sleep(0.5)
print("told", flush=True)
time.sleep(60)
"""
    with started([sys.executable, "-c", program]) as process:
        process.wait_for("ready")
        time.sleep(0.3)
        process.send(signal.SIGTERM)
        done = process.finish(50)
    assert (done.returncode, done.stdout.split(), done.stderr.split()) == (130, ["ready", "heard", "saved", "told"], ["left"])
