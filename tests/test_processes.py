"""What tests start ends with them, and a test that fails does not fail its neighbour."""

import ast
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from tests.processes import MARK, WARM, free_ports, run, started, wait_until
from tests.warm import template

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
    exempt = {"processes.py", "warm.py", "test_processes.py", "benchmarks"}
    found = []
    for path in (ROOT / "tests").rglob("*.py"):
        text = path.read_text()
        if "Popen" in text and not exempt & set(path.parts):
            calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
            found += [f"{path.relative_to(ROOT)}:{call.lineno}" for call in calls if ast.unparse(call.func).endswith("Popen")]
    assert found == [], "use tests.processes.started: it ends the process and all of its descendants when the block ends"


class TestWarm:
    """A process that is forked from a template is like one of a new interpreter."""

    SAYS = """
import json, os, sys
print(json.dumps([sys.argv, os.getcwd(), dict(os.environ), sys.path, __name__, os.getsid(0) == os.getpid()]))
"""

    def test_it_has_arguments_environment_and_folder_of_its_own(self, tmp_path: Path) -> None:
        environ = {**os.environ, "ONE": "1", "TMPDIR": str(tmp_path)}
        warm, cold = (
            json.loads(run([*python, "-c", self.SAYS, "a b", tmp_path], cwd=tmp_path, env=environ, check=True).stdout)
            for python in (WARM, (sys.executable, "-P"))
        )
        for said in (warm, cold):
            said[2].pop(MARK)
        assert warm == cold

    def test_it_has_imported_torch_and_neither_ray_nor_prefect(self) -> None:
        code = "import sys; print({'torch', 'ray', 'prefect', 'tests'} & sys.modules.keys())"
        assert run([*WARM, "-c", code], check=True).stdout == "{'torch'}\n"

    def test_what_is_read_at_an_import_is_as_its_environment_says(self) -> None:
        code = "import os, sys; print(sys.flags.dont_write_bytecode)"
        assert run([*WARM, "-c", code], env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}, check=True).stdout == "1\n"

    @pytest.mark.parametrize("code", ["import sys; sys.exit(5)", "import os, signal; os.kill(os.getpid(), signal.SIGTERM)", "1 / 0"])
    def test_it_ends_as_another_one(self, code: str) -> None:
        code = f"import atexit; atexit.register(print, 'end')\n{code}"
        warm, cold = (run([*python, "-c", code]) for python in (WARM, (sys.executable, "-P")))
        assert (warm.returncode, warm.stdout, warm.stderr) == (cold.returncode, cold.stdout, cold.stderr)

    def test_it_is_stopped_and_killed_with_all_that_it_started(self) -> None:
        code = "import os, time; os.fork(); print(os.getpid(), flush=True); time.sleep(600)"
        with started([*WARM, "-c", code]) as running:
            running.wait_for(lambda: len(running.out.split()) == 2, "both say who they are")
            running.send(signal.SIGSTOP)
            wait_until(lambda: Path(f"/proc/{running.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T", "it is stopped")
            running.send(signal.SIGKILL)
            assert running.finish().returncode == -signal.SIGKILL
            family = [int(pid) for pid in running.out.split()]
        wait_until(lambda: not any(map(alive, family)), f"{family} are gone")

    def test_the_command_says_the_same(self) -> None:
        warm, cold = (run([*python, "-m", "pipelines.cli", "list", "models"], check=True) for python in (WARM, (sys.executable, "-P")))
        assert warm.stdout == cold.stdout

    def test_a_script_of_a_shell_is_one(self, tmp_path: Path) -> None:
        script = tmp_path / "python"
        template(os.environ).write_script(script, ["-c"])
        for code in ("import sys; print(*sys.argv, sys.stdin.read(), 'torch' in sys.modules); sys.exit(5)", "import os; os.abort()"):
            warm, cold = (
                run(["sh", "-c", f'echo in | {python} "$0" "a b"', code], cwd=tmp_path) for python in (script, f"{sys.executable} -P -c")
            )
            assert (warm.returncode, warm.stdout.replace("True", "False")) == (cold.returncode, cold.stdout)
        with started([script, "import time; print('here', flush=True); time.sleep(600)"]) as running:
            running.wait_for("here")
            os.kill(running.pid, signal.SIGTERM)
            assert running.finish().returncode == -signal.SIGTERM

    def test_the_template_ends_with_its_process(self) -> None:
        code = (
            "import os; from tests.processes import WARM, run; os.environ['TEMPLATE_OF'] = str(os.getpid()); "
            "run([*WARM, '-c', '']); print('ready', flush=True); os._exit(0)"
        )
        with started([sys.executable, "-c", code], cwd=ROOT) as running:
            running.wait_for("ready")
            wait_until(lambda: not any(_is_template_of(running.pid, pid) for pid in os.listdir("/proc")), "the template has ended")


def _is_template_of(parent: int, pid: str) -> bool:
    try:
        environ, line = (Path(f"/proc/{pid}/{name}").read_text() for name in ("environ", "cmdline"))
    except OSError:
        return False
    return "warm.py" in line and f"TEMPLATE_OF={parent}\0" in environ


def test_the_s3_server_for_tests_explains_itself() -> None:
    command = [sys.executable, "-P", "-m", "tests.s3.server"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TEST_S3")} | {"PYTHONPATH": str(ROOT)}
    told, refused = run([*command, "--help"], env=environment), run([*command, "folder"], env=environment)
    assert (told.returncode, told.stderr) == (0, "") and "usage: python tests/s3/server.py" in told.stdout
    assert refused.returncode == 2 and "error: set TEST_S3_REGION and TEST_S3_SECRET" in refused.stderr
    assert "Traceback" not in refused.stderr
