"""Connecting to Ray changes this process's environment and working directory: no thread of ours works meanwhile.

`getenv` in compiled code of another thread reads freed memory when the environment grows (glibc up to 2.40). That thread was the one
that writes a listing as Parquet: of 600 commands `aepipe shard` at an address where nothing listens, one ended with SIGSEGV.
"""

import json
import os
import sys
import threading
from pathlib import Path

import pytest

from aecore.errors import ClusterError
from pipelines.cli.main import main
from pipelines.cluster import session
from tests.processes import run

SPRITES = ("source.num_samples=60", "shards.max_samples=20", "splits.by=hash", "splits.test=0.2")
TINY = ("model.latent_dim=4", "backbone.hidden=[16]", "train.epochs=1", "train.global_batch=16")
HERE = "cluster.num_workers=0"


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the dataset `data` and the run `run`."""
    top = tmp_path_factory.mktemp("chain")
    assert main(["shard", "sprites", str(top / "data"), *SPRITES, HERE]) == 0
    assert main(["train", f"data={top / 'data'}", f"out={top / 'run'}", *TINY, HERE]) == 0
    return top


@pytest.mark.parametrize(
    "command",
    [
        ("shard", "sprites", "{out}", *SPRITES),
        ("train", "data={top}/data", "out={out}", *TINY),
        ("encode", "{top}/run", "{top}/data", "{out}"),
    ],
)
def test_no_thread_works_while_ray_starts(command: tuple[str, ...], chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_work: list[list[str]] = []

    def refuse() -> None:
        at_work.append([thread.name for thread in threading.enumerate() if thread not in before and thread.name != "aepipe-signals"])
        raise ClusterError("not now")

    monkeypatch.setattr(session, "_local_token", refuse)  # what `connect` asks for before it changes anything
    before = threading.enumerate()
    words = [word.format(top=chain, out=tmp_path / "out") for word in command]
    assert main([*words, "cluster.num_workers=1"]) == 5
    assert at_work == [[]]  # that of the signals waits for one


WATCHED = """
import contextlib, json, sys, threading
written = []
def hook(event, args):
    if event in ("os.putenv", "os.unsetenv"):
        written.append([args[0].decode(), threading.active_count(), sorted({"torch", "pyarrow", "ray"} & sys.modules.keys())])
sys.addaudithook(hook)
BEGIN
print(json.dumps([row for row in written if row[0] == "TORCHINDUCTOR_CACHE_DIR"]))
"""
BEGINNINGS = {
    "command": "from pipelines.cli.main import main\nmain(['train', 'data=/nowhere', 'out=/nowhere/run', 'cluster.num_workers=0'])",
    "job": "from pipelines.steps.job_main import main\nmain(['train', '{}'])",
    "flow": "import pipelines.flows",
    "actor": "from pipelines.cluster.fanout import PartWorker\nPartWorker(1)",
    "task": "from pipelines.cluster.fanout import _call\n_call(lambda: None, 1)",
    "rank": "from pipelines.cluster.train import _rank_loop\nwith contextlib.suppress(KeyError): _rank_loop({})",
}


@pytest.mark.parametrize("beginning", BEGINNINGS)
def test_the_cache_of_torch_is_named_before_a_process_has_threads(beginning: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"} | {"TMPDIR": str(tmp_path)}
    done = run([sys.executable, "-c", WATCHED.replace("BEGIN", BEGINNINGS[beginning])], env=environment, check=True)
    ((_, threads, loaded),) = json.loads(done.stdout.splitlines()[-1])
    assert (threads, "torch" in loaded) == (1, beginning == "rank"), "pipelines.cluster.train imports torch"
    assert not list(tmp_path.glob("aecore-torch-*")), "it is made when torch needs it"


SLOW = """
import json, logging, os, signal, sys, threading, time
from pathlib import Path
logging.basicConfig(level=logging.WARNING, stream=sys.stderr)

def children(name):
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                line = (process / "cmdline").read_bytes().split(b"\\0")
                if line[0].endswith(name) and int((process / "stat").read_text().rsplit(")", 1)[1].split()[1]) == os.getpid():
                    found.append(int(process.name))
            except (OSError, ValueError, IndexError):
                pass
    return found

stopped = []
def stop_the_first():
    while not stopped:
        for pid in children(b"raylet"):
            os.kill(pid, signal.SIGSTOP)
            stopped.append(pid)
        time.sleep(0.001)
threading.Thread(target=stop_the_first, daemon=True).start()

from pipelines.cluster import session
from pipelines.recipe.recipe import ClusterSpec
session.connect(ClusterSpec(num_workers=1))
print(json.dumps([stopped, children(b"raylet"), children(b"gcs_server")]))
session.disconnect()
"""


def test_a_local_ray_that_does_not_come_up_is_ended_and_started_again() -> None:
    done = run([sys.executable, "-P", "-c", SLOW], check=True, timeout_s=240)
    stopped, raylets, servers = json.loads(done.stdout.splitlines()[-1])
    assert len(stopped) == len(raylets) == len(servers) == 1 and stopped != raylets, "those of the first start have ended"
    assert "a local Ray was not up after 30 s: this machine is busy; start 2 of 3" in done.stderr
