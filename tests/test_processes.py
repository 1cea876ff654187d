"""What tests start ends with them, and a test that fails does not fail its neighbour."""

import ast
import os
import sys
from pathlib import Path

import pytest

from tests.processes import free_ports, run, started, wait_until

ROOT = Path(__file__).resolve().parent.parent
# starts a child in its own session and one whose parent ends at once, then ignores the polite signal
FAMILY = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
child = subprocess.Popen(sleep, start_new_session=True).pid
orphan = f"import subprocess; print(subprocess.Popen({sleep}, start_new_session=True, stdout=-3, stderr=-3).pid)"
done = subprocess.run([sys.executable, "-c", orphan], capture_output=True, text=True)
print("ready", child, done.stdout.strip(), flush=True)
time.sleep(600)
"""
NEIGHBOURS = """
import multiprocessing, socket, subprocess, sys, time

def test_fails_with_everything_open(tmp_path):
    file = (tmp_path / "file").open("w")
    sender, receiver = socket.socketpair()
    process = subprocess.Popen([sys.executable, "-c", "pass"], stdout=subprocess.PIPE)
    process.wait()
    child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
    child.start()
    assert not file

def test_fails_in_the_cause_of_its_error(tmp_path):
    def inner():
        file = (tmp_path / "file").open("w")
        raise OSError(str(file))
    try:
        inner()
    except OSError as error:
        raise ValueError("other") from error

def test_passes():
    import gc
    gc.collect()
    assert not multiprocessing.active_children()
"""


def alive(pid: int) -> bool:
    path = Path(f"/proc/{pid}/stat")
    return path.exists() and path.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_block_that_fails_leaves_no_process_and_no_open_file() -> None:
    before, family = set(os.listdir("/proc/self/fd")), list[int]()
    with pytest.raises(ZeroDivisionError), started([sys.executable, "-c", FAMILY], grace_s=0.2) as running:
        running.wait_for("ready")
        family = [running.pid, *map(int, running.out.split()[1:])]
        assert len(family) == 3 and all(map(alive, family))
        raise ZeroDivisionError
    wait_until(lambda: not any(map(alive, family)), f"{family} are gone")
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_wait_ends_at_once_with_the_output_when_the_process_has_ended() -> None:
    with started([sys.executable, "-c", "print('first'); raise SystemExit(3)"]) as running:
        with pytest.raises(AssertionError, match=r"ended with 3 before: second[\s\S]*first"):
            running.wait_for("second")
        assert running.wait_for("first")
        assert running.finish().returncode == 3


def test_a_wait_has_a_bound_and_says_for_what() -> None:
    with pytest.raises(AssertionError, match="not in 0 s: the sky falls"):
        wait_until(lambda: False, "the sky falls", 0.01)
    with started([sys.executable, "-c", "print('hello', flush=True); import time; time.sleep(600)"]) as running:
        running.wait_for("hello")
        with pytest.raises(AssertionError, match=r"still running after 0 s: [\s\S]*hello"):
            running.finish(0.01)


def test_a_command_that_fails_shows_its_output() -> None:
    with pytest.raises(AssertionError, match=r"exit status 5: [\s\S]*so it is"):
        run([sys.executable, "-c", "import sys; print('so it is', file=sys.stderr); sys.exit(5)"], check=True)


def test_ports_are_not_those_of_outgoing_connections() -> None:
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = free_ports(5)
    assert len(set(ports)) == 5
    assert all(port < lowest for port in ports) or lowest <= 2048


def test_a_test_that_fails_does_not_fail_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "test_neighbours.py").write_text(NEIGHBOURS)
    command = [sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", "--rootdir", tmp_path, "-p", "tests.leftovers"]
    done = run([*command, "-p", "no:cacheprovider", "test_neighbours.py"], cwd=tmp_path)
    assert "2 failed, 1 passed" in done.stdout.splitlines()[-1], done.stdout
    assert "Unraisable" not in done.stdout and "ResourceWarning" not in done.stdout, done.stdout


def test_every_process_of_a_test_is_started_by_the_helper_that_ends_it() -> None:
    exempt = {"processes.py", "test_processes.py", "benchmarks"}
    found = []
    for path in (ROOT / "tests").rglob("*.py"):
        text = path.read_text()
        if "Popen" in text and not exempt & set(path.parts):
            calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
            found += [f"{path.relative_to(ROOT)}:{call.lineno}" for call in calls if ast.unparse(call.func).endswith("Popen")]
    assert found == [], "use tests.processes.started: it ends the process and all of its descendants when the block ends"
