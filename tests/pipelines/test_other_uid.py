"""Another user of the machine, who was there before us or comes later: nothing of ours is read, nothing of theirs is used or run.

The intruder is a process of another uid, so these tests need root. The place that both share is like /tmp: everybody may create, only
owners may rename. Tried are: reading every file below our folders and the memory files of our services, also with a umask that keeps
nothing secret; links, folders, files and pipes under every name of ours before we use it; our sockets and ports without the password.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aecore.errors import StoreError
from aecore.store import FileRef, keep_torch_cache_private, open_store
from aecore.store import _race as race_module
from aecore.store import _scratch as scratch_module
from aecore.store._cache import ObjectCache
from pipelines.cluster import leftovers as leftovers_module
from pipelines.cluster.leftovers import clear_leftovers, leftovers, make_session_root
from pipelines.flows.server import empty_folder
from tests.pipelines.sockets import listeners
from tests.processes import Started, below, run, started

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="acts as another user, which only root may do")
OTHER_UID = 65534
SECRET = "canary-of-ours"

BECOME = f"""
import base64, encodings.idna, json, os, socket, sys, urllib.error, urllib.request  # unreadable later
os.setgroups([]); os.setgid({OTHER_UID}); os.setuid({OTHER_UID})
assert os.getresuid() == ({OTHER_UID},) * 3
"""
READ = """
found = []
for top in sys.argv[1:]:
    for folder, folders, names in os.walk(top):
        for name in names:
            path = os.path.join(folder, name)
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
                os.read(descriptor, 1)
                os.close(descriptor)
                found.append(path)
            except OSError:
                pass
print(json.dumps(found))
"""
OPEN = """
found = []
for path in sys.argv[1:]:
    for flags in (os.O_RDONLY | os.O_NONBLOCK, os.O_WRONLY | os.O_NONBLOCK):
        try:
            os.close(os.open(path, flags))
            found.append(path)
        except OSError:
            pass
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(path)
            found.append(path)
        except OSError:
            pass
print(json.dumps(found))
"""
COMMANDS = """
found = []
for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
        found.append(open(f"/proc/{pid}/cmdline").read())
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        pass
assert len(found) > 2
print(json.dumps(found))
"""
PLANT = """
kind, name, target = sys.argv[1:]
theirs = f"{os.path.dirname(name)}/theirs"
os.mkdir(theirs); os.chmod(theirs, 0o777)
if kind == "folder": os.mkdir(name); os.chmod(name, 0o777)
if kind == "link to a folder of theirs": os.symlink(theirs, name)
if kind == "link to a folder of ours": os.symlink(target, name)
if kind == "link to nothing": os.symlink(f"{theirs}/missing", name)
if kind == "file": open(name, "w").close(); os.chmod(name, 0o666)
if kind == "pipe": os.mkfifo(name)
if kind == "folder":
    for inside in ("server.env", "prefect.db", "server.log", "a" * 64, "ray"):
        with open(f"{name}/{inside}", "w") as file: file.write("evil")
print("null")
"""
ASK = """
page, found = sys.argv[1], {}
for method, path, login in (
    ("GET", "admin/version", None), ("POST", "deployments/filter", None), ("POST", "flow_runs/filter", "admin:wrong"),
    ("POST", "admin/database/clear", "admin:"), ("GET", "csrf-token?client=x", None),
):
    request = urllib.request.Request(f"{page}/api/{path}", b"{}" if method == "POST" else None, {"content-type": "application/json"})
    if login: request.add_header("Authorization", "Basic " + base64.b64encode(login.encode()).decode())
    try:
        found[path] = urllib.request.urlopen(request, timeout=30).status
    except urllib.error.HTTPError as error:
        found[path] = error.code
print(json.dumps(found))
"""
CALL_RAY = """
os.environ["RAY_AUTH_MODE"] = sys.argv[2]
os.environ["RAY_AUTH_TOKEN"] = "0" * 64
from ray._raylet import GcsClient
BECOME
found = {}
for name in ("internal_kv_get", "internal_kv_keys", "internal_kv_put"):
    arguments = {"internal_kv_put": (b"x", b"evil", True, None)}.get(name, (b"session_name" if name.endswith("get") else b"", None))
    try:
        client = GcsClient(address=sys.argv[1])
        found[name] = repr(getattr(client, name)(*arguments, timeout=20))
    except Exception as error:
        found[name] = f"refused: {error}"
print(json.dumps(found))
"""


def intrude(code: str, *arguments: object) -> Any:  # any: plain JSON
    """Run code as another user; return what it prints."""
    program = code.replace("BECOME", BECOME) if "BECOME" in code else BECOME + code
    done = run([sys.executable, "-c", f"import os, sys, json\n{program}", *arguments], check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A place as /tmp is, which stands for TMPDIR, /tmp and the disk on which a user names folders; our umask keeps nothing secret."""
    del tmp_path  # made before TMPDIR changes
    folder = Path(tempfile.mkdtemp(prefix="ae", dir="/tmp"))  # short: sockets of Ray lie in it
    folder.chmod(0o1777)
    monkeypatch.setattr(scratch_module.tempfile, "tempdir", str(folder))
    monkeypatch.setattr(leftovers_module, "SHARED", folder)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that its absence is restored, whatever a test leaves
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("PREFECT_HOME", str(folder / "prefect"))
    monkeypatch.setenv("AECORE_CACHE", str(folder / "cache"))
    before = os.umask(0)
    try:
        yield folder
    finally:
        os.umask(before)
        shutil.rmtree(folder, ignore_errors=True)


def stage(shared: Path) -> Path:
    with open_store("s3://bucket/x").stage() as staged:
        staged.write_text(SECRET)
        return staged.parent


def cache(shared: Path) -> Path:
    found = ObjectCache().path(FileRef("a", 4, "a" * 64), lambda ref, target: target.write_bytes(b"good") and None)
    assert found.read_bytes() == b"good"
    return found.parent


def note(shared: Path) -> Path:
    race_module.remember("bucket", shared / "cache")
    if not race_module._remembered("bucket", shared / "cache"):
        raise StoreError("not remembered, so the bucket is tested again")
    return shared / "cache"


def compiled(shared: Path) -> Path:
    keep_torch_cache_private()
    return Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])


def server(shared: Path) -> Path:
    return empty_folder().parent


def ray(shared: Path) -> Path:
    return make_session_root()


PLACES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "files on their way to a bucket": (stage, f"aecore-staged-{os.getuid()}"),
    "code that torch compiled": (compiled, f"aecore-torch-{os.getuid()}"),
    "the cache": (cache, "cache"),
    "what is remembered of buckets": (note, "cache"),
    "the Prefect server": (server, "prefect"),
    "sessions of Ray": (ray, f"aepipe-ray-{os.getuid()}"),
}


@pytest.mark.parametrize("kind", ["folder", "link to a folder of theirs", "link to a folder of ours", "link to nothing", "file", "pipe"])
@pytest.mark.parametrize("place", PLACES)
def test_what_somebody_else_put_under_a_name_of_ours_is_not_used(place: str, kind: str, shared: Path, tmp_path: Path) -> None:
    use, name = PLACES[place]
    precious = tmp_path / "precious"
    precious.mkdir(0o700)
    intrude(PLANT, kind, shared / name, precious)
    before = {path: path.lstat().st_mtime_ns for path in (shared / name, shared / "theirs", precious)}
    with contextlib.suppress(StoreError):
        used = use(shared)
        assert (used.lstat().st_uid, used.lstat().st_mode & 0o777) == (0, 0o700)
        assert used.name != name and not used.is_symlink()
        shutil.rmtree(used)
    assert {path: path.lstat().st_mtime_ns for path in before} == before, "nothing was written there"
    assert [path for path in intrude(READ, shared) if not path.startswith(f"{shared / name}")] == []


@pytest.mark.parametrize("place", PLACES)
def test_what_we_keep_where_others_can_look_is_not_read(place: str, shared: Path) -> None:
    use, name = PLACES[place]
    folder = use(shared)
    assert folder == shared / name
    (folder / "more").write_text(SECRET)
    (folder / "more").chmod(0o666)
    paths = [path for path in folder.rglob("*") if path.is_file()]
    assert intrude(READ, shared) == []
    assert intrude(OPEN, folder, *paths) == []


OPTIMIZE = """
import torch
from aecore.training.optimizer import OptimSpec, build_optimizer
build_optimizer(OptimSpec(), torch.nn.Linear(1, 1))
"""


def test_an_optimizer_leaves_no_folder_of_torch_that_others_could_have_made(shared: Path) -> None:
    run([sys.executable, "-c", OPTIMIZE], env=os.environ | {"TMPDIR": str(shared)}, check=True)
    assert [(path.name, path.stat().st_mode & 0o777) for path in shared.iterdir()] == [(f"aecore-torch-{os.getuid()}", 0o700)]


def test_a_session_that_somebody_else_made_up_is_not_removed(shared: Path, tmp_path: Path) -> None:
    root = make_session_root()
    (root / "ray").mkdir(0o777)
    planted = root / "ray" / "session_2026-11-30_00-00-00_1_4194305"
    planted.mkdir()
    (planted / leftovers_module.NOTE).write_text(f"{leftovers_module.pid_namespace()} 4194305:1")
    os.chown(planted, OTHER_UID, OTHER_UID)
    assert leftovers(root) == []
    clear_leftovers(root)
    assert planted.exists()


@contextlib.contextmanager
def running(program: str, environment: dict[str, str], lines: int = 1) -> Iterator[tuple[Started, list[str]]]:
    """Run a program of ours until the block ends; give it and the lines that it prints first."""
    with started([sys.executable, "-c", program], env=environment, stdin=subprocess.PIPE) as process:
        process.wait_for(lambda: process.out.count("\n") >= lines, "what it prints")
        yield process, process.out.splitlines()
        assert process.process.stdin is not None
        process.process.stdin.close()
        assert process.finish().returncode == 0


SERVE = """
import os, sys
os.umask(0)
from pipelines.flows.server import lasting_server
with lasting_server() as (server, _):
    print(server.page, flush=True)
    print(server.process.partition(":")[0], flush=True)
    sys.stdin.readline()
"""


@pytest.mark.prefect
@pytest.mark.slow
def test_the_prefect_server_answers_and_shows_nothing_to_another_user(shared: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    with running(SERVE, environment, 2) as (process, (page, pid)):
        home = shared / "prefect"
        record = (home / "server.env").read_text()
        password = re.search("PREFECT_API_AUTH_STRING=(.*)", record)
        assert password
        home.chmod(0o755)  # a home that the user named and lets others look into
        files = [path for path in home.rglob("*") if path.is_file() and path.name != "profiles.toml"]
        assert {"prefect.db", "server.env", "server.log"} <= {path.name for path in files}
        assert intrude(OPEN, *files, f"/proc/{pid}/environ", f"/proc/{pid}/mem", f"/proc/{process.pid}/environ") == []
        home.chmod(0o700)
        assert intrude(READ, shared) == []
        assert set(intrude(ASK, page).values()) <= {401, 403}
        commands = intrude(COMMANDS)
        assert not [command for command in commands if password[1] in command]
        assert all(one.is_loopback for one in listeners({process.pid, *below(process.pid)}))


RAY = """
import os, sys
os.umask(0)
from pipelines.cluster.session import connect, disconnect
from pipelines.recipe.recipe import ClusterSpec
connect(ClusterSpec(num_workers=1))
import ray
ray.get(ray.remote(num_cpus=0)(lambda: 1).remote())
print(ray.get_runtime_context().gcs_address, flush=True)
print(os.environ["RAY_AUTH_TOKEN"], flush=True)
print(ray._private.worker.global_worker.node.get_session_dir_path(), flush=True)
sys.stdin.readline()
disconnect()
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_local_ray_answers_and_shows_nothing_to_another_user(shared: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_")}
    environment |= {"RAY_TMPDIR": str(shared), "HOME": str(shared)}
    with running(RAY, environment, 3) as (process, (address, token, session)):
        root = shared / f"aepipe-ray-{os.getuid()}"
        assert Path(session).is_relative_to(root)
        sockets = [path for path in Path(session).rglob("*") if path.is_socket()]
        files = [path for path in root.rglob("*") if path.is_file()]
        assert sockets and files
        mine = {process.pid, *below(process.pid)}
        memory = [f"/proc/{pid}/{name}" for pid in mine for name in ("environ", "mem")]
        assert intrude(READ, shared) == []
        assert intrude(OPEN, *sockets, *files, *memory) == []
        for mode in ("disabled", "token"):
            answers = intrude(CALL_RAY, address, mode)
            assert [name for name, answer in answers.items() if not answer.startswith("refused: ")] == [], answers
            assert all("token" in answer.lower() or "unauth" in answer.lower() for answer in answers.values()), answers
        commands = intrude(COMMANDS)
        assert not [command for command in commands if token in command]
        assert all(one.is_loopback for one in listeners(mine))
