"""What every test shares: one torch thread, private and offline homes for Ray, Prefect and Hugging Face, real data if it is there.

The environment is set when pytest loads this file, before anything imports Ray or Prefect, so that sub-processes inherit it too.
With `-n 4 --dist loadgroup` (`make test` without arguments) all tests of a file that starts services, or has a fixture for all its tests,
run in one process.
"""

import functools
import gc
import logging
import os
import re
import shutil
import signal
import tempfile
import threading
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from xdist.scheduler import LoadGroupScheduling

from aecore.store import _cached as cached_module
from aecore.store import _race as race_module
from aecore.store._race import remember
from aecore.store._s3 import S3Store
from aecore.store._s3_client import close_clients
from tests.leftovers import pytest_runtest_makereport, pytest_runtest_protocol  # noqa: F401 (hooks)
from tests.prefect_home import SHARED, prefect_home
from tests.quick import mark_quick
from tests.realdata import unpack_real
from tests.s3 import S3, s3_environment, start_server
from tests.s3.proxy import FaultProxy

ROOT = Path(__file__).resolve().parent.parent
HOME = Path(tempfile.mkdtemp(prefix="aecore-tests-"))
os.environ.setdefault(SHARED, str(HOME))  # that of the first process, whose workers inherit it

for name in ("PREFECT_API_URL", "PREFECT_API_KEY", "PREFECT_API_AUTH_STRING", "PREFECT_PROFILE", "RAY_ADDRESS", "AECORE_FAULT"):
    os.environ.pop(name, None)
os.environ.update(
    PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),  # sub-processes and Ray workers find the sources
    PREFECT_HOME=str(HOME / "prefect"),
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
    DO_NOT_TRACK="1",
    RAY_AUTH_MODE="disabled",  # else ray.init writes a token into the user's home
    RAY_USAGE_STATS_ENABLED="0",
    RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.2",
    RAY_TRAIN_ENABLE_PREEMPTION_WATCHER="0",  # one process less for each training: no cloud takes this machine away
    HF_HOME=str(HOME / "huggingface"),
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a script's background job, and so would be what tests start and interrupt
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A flow that ran in this process leaves a callback for its end that fails in every process forked later (Prefect 3: `_drain` of a
# service whose threads did not come along), which then ends with status 1 whatever it did. A fork has none of the threads to wait for.
os.register_at_fork(after_in_child=threading._threading_atexits.clear)  # type: ignore[attr-defined]

# a shared machine stalls now and then; in CI the same examples every time
settings.register_profile("aecore", deadline=None, derandomize=os.environ.get("CI") == "true")
settings.load_profile("aecore")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked_for = {name for name in ("accept", "long") if os.environ.get(f"AECORE_{name.upper()}") == "1"}
    left_out = {item for item in items if {"accept", "long"} & {mark.name for mark in item.iter_markers()} - asked_for}
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=list(left_out))
    mark_quick(items)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Spare the garbage collector what stays until the end: else it walks all modules and 7,000 tests in a third of the time, here too."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()


class FilesOfServicesTogether(LoadGroupScheduling):
    """Give each test to a process of its own choice, but to one those of a file that share servers, folders, or what a fixture makes once.

    Groups of xdist 3.8 have no effect with pytest 9.2 (it does not find `Item._nodeid`), so the file decides.
    """

    def _split_scope(self, nodeid: str) -> str:
        return _shared(nodeid.split("::")[0]) or nodeid


@functools.cache
def _shared(file: str) -> str | None:
    """Return what the tests of a file share: with those of other files one local Ray, else the file; None: nothing."""
    text = (ROOT / file).read_text()
    if "two_workers: " in text:
        return "two_workers"
    return file if re.search(r'mark\.(ray|prefect)\b|scope="module"', text) else None


@pytest.hookimpl(optionalhook=True)  # -p no:xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:  # any: xdist has no types
    return FilesOfServicesTogether(config, log) if config.getvalue("dist") == "loadgroup" else None


def pytest_unconfigure() -> None:
    logging.raiseExceptions = False  # Prefect's server says good-bye at exit, when pytest has closed the captured streams
    shutil.rmtree(HOME, ignore_errors=True)


@pytest.fixture(autouse=True)
def logging_as_at_the_start() -> None:
    """Undo what earlier flows and commands did to this process's loggers: levels, and a console that reports that its stream is closed."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if type(handler).__name__ == "PrefectConsoleHandler"]:
        if getattr(getattr(getattr(handler, "console", None), "file", None), "closed", False):
            root.removeHandler(handler)
    root.setLevel(logging.WARNING)
    for name in ("aecore", "pipelines"):
        logging.getLogger(name).setLevel(logging.NOTSET)


@pytest.fixture(autouse=True)
def home_of_prefect(request: pytest.FixtureRequest) -> None:
    """Give tests with flows a PREFECT_HOME whose database is there."""
    if request.node.get_closest_marker("prefect"):
        prefect_home(HOME / "prefect")


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread() -> None:
    """The bits of a CPU matmul depend on the number of threads; tests that compare bits need one."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a real S3 server that this test run started."""
    with start_server(tmp_path_factory.mktemp("s3")) as port:
        yield port


@pytest.fixture
def s3(s3_server: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """A new, empty bucket; the environment has its endpoint and credentials, and a cache of its own."""
    monkeypatch.setattr(cached_module, "RECENT_S", 0.0)  # tests change objects behind the store's back
    yield _bucket(s3_server, s3_server, tmp_path, monkeypatch)
    close_clients()


@pytest.fixture
def bare_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """As `s3`, at a server whose conditional creates are not atomic; nothing is remembered of it."""
    (tmp_path / "bare").mkdir()
    with start_server(tmp_path / "bare", bare=True) as port:
        yield _bucket(port, port, tmp_path, monkeypatch, known=False)
        close_clients()


@pytest.fixture
def s3_proxy(s3_server: int) -> Iterator[FaultProxy]:
    """A proxy before the S3 server that spoils what it is told to."""
    with FaultProxy(s3_server) as proxy:
        yield proxy


@pytest.fixture
def bad_s3(s3_server: int, s3_proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """As `s3`, reached through `s3_proxy`."""
    yield _bucket(s3_server, s3_proxy.port, tmp_path, monkeypatch)
    close_clients()


def _bucket(server: int, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, known: bool = True) -> S3:
    for name, value in s3_environment(port, tmp_path / "cache").items():
        monkeypatch.setenv(name, value)
    made = S3(server, port).with_bucket()
    location = S3Store(made.url, made.bucket, "", None).location
    monkeypatch.setattr(race_module, "_passed", {location} if known else set())
    if known:  # that this server creates atomically has tests of its own
        remember(location, tmp_path / "cache")
    return made


@pytest.fixture(scope="session")
def real_mnist_small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real MNIST, 3,000 training and 500 test images of all classes, as class folders; read only."""
    return unpack_real("mnist", tmp_path_factory.mktemp("mnist"), train_per_class=300, test_per_class=50)


@pytest.fixture(scope="session")
def real_cifar10_small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real CIFAR-10, 1,000 training and 200 test images of all classes, as class folders; read only."""
    return unpack_real("cifar10", tmp_path_factory.mktemp("cifar10"), train_per_class=100, test_per_class=20)


@pytest.fixture(scope="session")
def real_mnist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All 70,000 images of MNIST as class folders; for tests marked `accept`."""
    return unpack_real("mnist", tmp_path_factory.mktemp("mnist-full"))


@pytest.fixture(scope="session")
def real_cifar10(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All 60,000 images of CIFAR-10 as class folders; for tests marked `accept`."""
    return unpack_real("cifar10", tmp_path_factory.mktemp("cifar10-full"))
