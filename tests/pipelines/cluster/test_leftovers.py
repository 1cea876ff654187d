"""What killed drivers leave of their local Rays is named, and removed as soon as nothing uses it."""

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from aecore.store import pid_namespace
from pipelines.cluster import leftovers as module
from pipelines.cluster.leftovers import NOTE, clear_leftovers, leftovers, make_session_root, note_driver, session_root
from pipelines.cluster.process import process_name
from pipelines.doctor import _ray
from tests.processes import Started, started, wait_until

DEAD = "4194305:1"  # no process has this number


@pytest.fixture(autouse=True)
def folders_of_pytest_are_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let sessions be in a folder of pytest, whose name is longer than sockets allow."""
    monkeypatch.setattr(module, "MAX_SOCKET_LENGTH", 1000)


def session(root: Path, second: int, note: str | None, pid: int = 4_194_305) -> Path:
    """Make the folder of a session that was started at a second of a minute."""
    folder = root / "ray" / f"session_2026-11-30_00-00-{second:02d}_123456_{pid}"
    (folder / "logs").mkdir(parents=True)
    (folder / "logs" / "worker.out").touch()
    if note is not None:
        (folder / NOTE).write_text(note)
    return folder


@contextlib.contextmanager
def using(folder: Path) -> Iterator[Started]:
    """Run a process whose output goes to a file of the session, as that of a worker does."""
    with started(
        [sys.executable, "-c", "print(1, flush=True); import time; time.sleep(600)"], log=folder / "logs" / "worker.out"
    ) as worker:
        worker.wait_for("1")
        yield worker


def test_folders_of_sessions_whose_processes_are_gone_are_removed_but_the_newest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    gone = [session(tmp_path, second, f"{pid_namespace()} {DEAD}") for second in range(3)]
    (tmp_path / "ray" / "session_latest").symlink_to(gone[-1])
    kept = {
        "its driver runs": session(tmp_path, 10, f"{pid_namespace()} {process_name(os.getpid())}"),
        "of another container": session(tmp_path, 11, f"elsewhere {DEAD}"),
        "without a note": session(tmp_path, 12, None),
        "no session": tmp_path / "ray" / "other",
    }
    kept["no session"].mkdir()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / NOTE).write_text(f"{pid_namespace()} {DEAD}")
    (tmp_path / "ray" / "session_2026-11-30_00-00-20_1_4194305").symlink_to(tmp_path / "theirs")
    clear_leftovers(tmp_path)
    assert [folder.exists() for folder in gone] == [False, False, True]
    assert {why: folder.exists() for why, folder in kept.items()} == dict.fromkeys(kept, True)
    assert (tmp_path / "theirs" / NOTE).exists()
    assert "removed 2 folders of sessions of Ray that have ended" in caplog.text
    clear_leftovers(tmp_path / "nothing here")


def test_a_reused_pid_is_not_the_driver(tmp_path: Path) -> None:
    session(tmp_path, 0, f"{pid_namespace()} {os.getpid()}:1", pid=os.getpid())
    assert [left.is_noted for left in leftovers(tmp_path)] == [True]


def test_processes_that_outlive_their_driver_are_named_with_what_to_do_and_their_folder_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o700)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    folder = session(tmp_path, 0, f"{pid_namespace()} {DEAD}")
    os.utime(folder, (1, 1))
    with using(folder) as worker:
        clear_leftovers(tmp_path)
        assert folder.exists()
        assert f"1 process outlived the driver of a local Ray ({folder.name}, started " in caplog.text
        assert f"days ago): end them with `kill -9 {worker.pid}`" in caplog.text
        (found,) = _ray.left_behind()
        assert (found.state, found.remedy) == ("warning", f"end them: kill -9 {worker.pid}")
        assert folder.name in found.message and "days ago" in found.message
    (found,) = _ray.left_behind()
    assert found.state == "ok" and "1 session folder of ended runs" in found.message
    clear_leftovers(tmp_path)
    assert not folder.exists()


def test_a_ray_that_was_started_by_hand_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with using(session(tmp_path, 0, None)):
        assert leftovers(tmp_path) == []


def test_the_doctor_names_folders_whose_origin_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o700)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    session(tmp_path, 0, None)
    (found,) = _ray.left_behind()
    assert found.state == "warning" and "1 session folder of unknown origin" in found.message and "in another container" in found.remedy


def test_a_session_notes_who_started_it(tmp_path: Path) -> None:
    note_driver(tmp_path)
    assert (tmp_path / NOTE).read_text() == f"{pid_namespace()} {process_name(os.getpid())}"


def test_sessions_are_in_a_private_folder_whatever_others_did_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARED", tmp_path)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    name = tmp_path / f"aepipe-ray-{os.getuid()}"
    assert make_session_root() == name
    name.chmod(0o777)
    (tmp_path / "elsewhere").mkdir()
    spoils: tuple[Callable[[], object], ...] = (
        lambda: None,
        lambda: (name.rmdir(), name.symlink_to(tmp_path / "elsewhere")),
        lambda: (name.unlink(), name.symlink_to(tmp_path / "nowhere")),
        lambda: (name.unlink(), name.touch()),
    )
    for spoil in spoils:
        spoil()
        other = make_session_root()
        assert other != name
        assert (other.stat().st_mode & 0o777, other.is_symlink()) == (0o700, False)
        other.rmdir()


def test_a_folder_of_sessions_that_others_can_enter_gets_a_private_one_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    for mode, expected in (
        (0o700, tmp_path),
        (0o755, tmp_path / f"aepipe-ray-{os.getuid()}"),
        (0o1777, tmp_path / f"aepipe-ray-{os.getuid()}"),
    ):
        tmp_path.chmod(mode)
        assert session_root() == make_session_root() == expected
        assert expected.stat().st_mode & 0o777 == 0o700
        monkeypatch.setenv("RAY_TMPDIR", str(expected))
        assert session_root() == expected, "for a process that this one starts"
        monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))


LOCAL = """
import sys
from pipelines.cluster.session import connect, disconnect
from pipelines.recipe.recipe import ClusterSpec
connect(ClusterSpec(num_workers=1))
import ray
print(ray._private.worker.global_worker.node.get_session_dir_path(), flush=True)
sys.stdin.readline()
disconnect()
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_start_of_ray_removes_what_ended_and_the_session_of_a_killed_driver_is_removed_by_a_later_one() -> None:
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as root:  # short: sockets lie in it
        ended, kept = (session(Path(root), second, f"{pid_namespace()} {DEAD}") for second in range(2))
        latest = Path(root, "ray", "session_latest")
        latest.symlink_to(kept)
        with started([sys.executable, "-c", LOCAL], env=os.environ | {"RAY_TMPDIR": root}, stdin=subprocess.PIPE) as driver:
            driver.wait_for("\n")
            killed = Path(driver.out.split("\n")[0])
            assert [ended.exists(), kept.exists(), killed.is_dir()] == [False, True, True], "that of the run before stays: it has logs"
            driver.send(signal.SIGKILL)
            driver.process.wait()

            def pids() -> tuple[int, ...]:
                return {left.folder: left.pids for left in leftovers(Path(root))}[killed]

            wait_until(lambda: pids() == (), "the processes of Ray end with the driver", every_s=2)  # each look reads all of /proc
        clear_leftovers(Path(root))
        assert [kept.exists(), killed.exists()] == [False, True], "now that of the killed driver is the newest"
        latest.unlink()
        latest.symlink_to(session(Path(root), 2, f"{pid_namespace()} {DEAD}"))
        clear_leftovers(Path(root))
        assert not killed.exists()


@pytest.mark.parametrize("is_link", [False, True])
def test_sessions_are_where_the_paths_of_sockets_fit(tmp_path, monkeypatch, is_link):
    monkeypatch.setattr(module, "MAX_SOCKET_LENGTH", 107)
    long = tmp_path / ("x" * (60 - len(str(tmp_path)) % 40))
    long.mkdir()
    short = Path(tempfile.mkdtemp(dir="/tmp")) / "s"
    short.symlink_to(long)
    monkeypatch.setenv("RAY_TMPDIR", str(short if is_link else long))
    root = session_root()
    assert len(str(root)) + module.SOCKET_LENGTH <= module.MAX_SOCKET_LENGTH
    assert (root.parent == short) is is_link
    shutil.rmtree(short.parent)
