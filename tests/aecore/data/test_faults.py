"""Files that cannot be read for a moment, or for good: no sample is judged by that, in no reader, compiled or not."""

import contextlib
import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from aecore import native
from aecore.data.dataset import open_dataset
from aecore.data.read.stream import open_stream
from aecore.data.sources._arrayfile import ArrayFile
from aecore.data.sources.arrays import ArraysSpec
from aecore.data.sources.folder import FolderSource, FolderSpec
from aecore.data.sources.webdataset import WebdatasetSpec
from aecore.data.write.job import adopt_shards, shard_dataset
from aecore.data.write.spec import ShardSpec
from aecore.errors import StoreError
from aecore.registry import SOURCES
from aecore.store import _again as again_module
from tests.aecore.data.test_external_tars import two_tars
from tests.aecore.data.test_faults_s3 import pictures, written
from tests.aecore.data.test_stream import batches

FAULTS = (errno.EIO, errno.EACCES, errno.ESTALE, errno.ETIMEDOUT, errno.ENOENT)
NEEDS_SHIM = pytest.mark.skipif(not native.available() or shutil.which("cc") is None, reason="needs the compiled loops and a C compiler")


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Listings have the states of young files too, so that a rerun gives the same bytes whenever it is made."""
    monkeypatch.setattr("aecore.store._states.YOUNG_NS", 0)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(again_module, "FIRST_PAUSE_S", 0.001)


class Faults:
    """Errors of the calls that open and read files whose path has `part` in it, the first `times` of them."""

    def __init__(self, part: str, code: int, times: int) -> None:
        self.part, self.code, self.left, self.raised = part, code, times, 0
        self.calls = {name: getattr(os, name) for name in ("open", "read", "pread", "preadv")}

    def __call__(self, name: str, where: Any, *args: Any) -> Any:
        path = os.readlink(f"/proc/self/fd/{where}") if isinstance(where, int) else os.fspath(where)
        if self.part in path and self.left:
            self.left -= 1
            self.raised += 1
            raise OSError(self.code, os.strerror(self.code), *([] if isinstance(where, int) else [path]))
        return self.calls[name](where, *args)


@contextlib.contextmanager
def faults(part: str, code: int, times: int = 1 << 30, calls: tuple[str, ...] = ("open", "read", "pread", "preadv")) -> Iterator[Faults]:
    found = Faults(part, code, times)
    with pytest.MonkeyPatch.context() as patch:
        for name in calls:
            patch.setattr(os, name, lambda *args, name=name: found(name, *args))
        yield found


def make(kind: str, root: Path) -> tuple[Any, str]:
    """Write a source of this kind; return its spec, and a part of the path of a file that holds samples."""
    root.mkdir(parents=True, exist_ok=True)
    images = np.random.default_rng(0).integers(0, 256, (30, 4, 4), np.uint8)
    if kind == "folder":
        return FolderSpec(url=str(pictures(root))), "07.bmp"
    if kind in ("tar", "adopt"):
        return WebdatasetSpec(url=str(two_tars(root))), "00001.tar"
    if kind == "npz":
        np.savez(root / "rows.npz", images=images, labels=np.arange(30) % 3)
    elif kind == "npy":
        np.save(root / "rows.npy", images.astype(np.float32))
    else:
        (root / "rows-images-idx3-ubyte").write_bytes(
            bytes([0, 0, 8, 3]) + b"".join(side.to_bytes(4, "big") for side in images.shape) + images.tobytes()
        )
    return ArraysSpec(url=str(root)), "/rows"


def write(kind: str, spec: Any, out: Path) -> dict[str, bytes]:
    job = adopt_shards if kind == "adopt" else shard_dataset
    job(spec, str(out), shards=ShardSpec(max_bad=0.1, max_samples=20))
    return written(out)


KINDS = ("folder", "tar", "adopt", "npz", "npy", "idx")


@pytest.fixture
def without_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_library", lambda: None)


@pytest.mark.usefixtures("without_loops")
@pytest.mark.parametrize("code", FAULTS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_read_fails_its_shard_and_a_rerun_stores_it(
    tmp_path: Path, kind: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, part = make(kind, tmp_path / "in")
    clean = write(kind, spec, tmp_path / "clean")
    listed = type(SOURCES.build(spec)).listing
    with faults(part, code) as found:
        found.left, most = 0, found.left

        def listing(self: Any) -> Any:
            rows = listed(self)
            found.left = most  # it is there when it is listed
            return rows

        monkeypatch.setattr(type(SOURCES.build(spec)), "listing", listing)
        with pytest.raises(StoreError, match=os.strerror(code)) as raised:
            write(kind, spec, tmp_path / "ds")
    assert raised.value.exit_code == 4
    assert found.raised >= again_module.READS
    assert not list((tmp_path / "ds").glob("quarantine/*07*")) and not list((tmp_path / "ds").glob("dataset.*"))
    assert write(kind, spec, tmp_path / "ds") == clean


@pytest.mark.usefixtures("without_loops")
@pytest.mark.parametrize("code", FAULTS[:4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_of_the_moment_leaves_the_dataset_of_a_clean_read(tmp_path: Path, kind: str, code: int) -> None:
    spec, part = make(kind, tmp_path / "in")
    clean = write(kind, spec, tmp_path / "clean")
    reads = ("read", "pread", "preadv")
    with faults(part, code, times=again_module.READS - 1, calls=reads) as found:
        assert write(kind, spec, tmp_path / "ds") == clean
    assert found.raised == again_module.READS - 1


def test_a_file_of_which_less_comes_than_its_size_is_not_judged(tmp_path: Path) -> None:
    source = FolderSource(make("folder", tmp_path / "in")[0])
    path = tmp_path / "in/1/07.bmp"
    with pytest.MonkeyPatch.context() as patch:
        pieces = iter([path.read_bytes()[:50], b"", path.read_bytes()[:50], path.read_bytes()[50:], b""])
        patch.setattr(os, "read", lambda *_: next(pieces))
        with pytest.raises(OSError, match="only 50 of its"):
            source.read("1/07.bmp")
        assert source.read("1/07.bmp") == ("bmp", path.read_bytes()), "pieces are joined"


def test_training_on_tars_reads_again_and_then_says_which_tar_cannot_be_read(tmp_path: Path) -> None:
    tars = two_tars(tmp_path / "in")
    whole = [batch.x for batch in batches(tars, 5)]
    with faults("0000", errno.EIO, times=2):
        again = [batch.x for batch in batches(tars, 5)]
    assert all((one == other).all() for one, other in zip(whole, again, strict=True))
    with faults("00000.tar", errno.EIO), pytest.raises(StoreError, match=r"cannot read .*00000.tar: Input/output error"):
        open_stream(str(tars), "train")


@pytest.mark.usefixtures("without_loops")
def test_rows_of_adopted_tars_are_read_again_and_then_it_is_said_that_they_cannot_be_read(tmp_path: Path) -> None:
    spec, _ = make("adopt", tmp_path / "in")
    write("adopt", spec, tmp_path / "ds")
    dataset = open_dataset(str(tmp_path / "ds"))
    for read in (lambda reader: reader.read_rows([0, 3]), lambda reader: list(reader.iterate())):
        whole = read(dataset.reader(dataset.manifest.shards[0]))
        with faults("00000.tar", errno.EIO, times=2, calls=("pread", "preadv")):
            assert read(dataset.reader(dataset.manifest.shards[0])) == whole
        with faults("00000.tar", errno.EIO, calls=("pread", "preadv")), pytest.raises(StoreError, match="00000.tar: Input/output error"):
            read(dataset.reader(dataset.manifest.shards[0]))


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.EMFILE])
def test_a_tar_that_cannot_be_opened_for_a_moment_is_opened_again_and_then_it_is_said(tmp_path: Path, code: int) -> None:
    spec, _ = make("adopt", tmp_path / "in")
    write("adopt", spec, tmp_path / "ds")
    dataset = open_dataset(str(tmp_path / "ds"))
    for read in (lambda reader: reader.read_rows([0, 3]), lambda reader: list(reader.iterate())):
        whole = read(dataset.reader(dataset.manifest.shards[0]))
        with faults("00000.tar", code, times=2, calls=("open",)):
            assert read(dataset.reader(dataset.manifest.shards[0])) == whole
        reader = dataset.reader(dataset.manifest.shards[0])
        with faults("00000.tar", code, calls=("open",)), pytest.raises(StoreError, match=f"00000.tar: {os.strerror(code)} .tried 3 times"):
            read(reader)
        reader.close()


@pytest.mark.usefixtures("without_loops")
@pytest.mark.parametrize("kind", ["adopt", "tar"])
def test_a_stale_descriptor_is_replaced(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, _ = make(kind, tmp_path / "in")
    write(kind, spec, tmp_path / "ds")
    dataset = open_dataset(str(tmp_path / "ds"))
    calls, stale = {name: getattr(os, name) for name in ("open", "pread", "preadv")}, True

    def opening(*args: Any, **options: Any) -> int:
        nonlocal stale
        stale = False
        return int(calls["open"](*args, **options))

    def reading(name: str, *args: Any) -> Any:
        if stale:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return calls[name](*args)

    for read in (lambda reader: reader.read_rows([0, 3]), lambda reader: list(reader.iterate())):
        reader = dataset.reader(dataset.manifest.shards[0])
        whole = read(reader)
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", opening)
            for name in ("pread", "preadv"):
                patch.setattr(os, name, lambda *args, name=name: reading(name, *args))
            stale = True
            assert read(reader) == whole
        reader.close()
        assert read(reader) == whole, "opened again after close"


def test_closing_a_reader_whose_tar_could_not_be_fetched_again_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, _ = make("adopt", tmp_path / "in")
    write("adopt", spec, tmp_path / "ds")
    dataset = open_dataset(str(tmp_path / "ds"))
    reader = dataset.reader(dataset.manifest.shards[0])
    reader.read_rows([0])
    monkeypatch.setattr(type(reader._tars), "refetch_if_corrupt", lambda self, ref: True)
    with faults("00000.tar", errno.EIO, calls=("open",)), pytest.raises(StoreError):
        reader._refetch_if_corrupt(reader._descriptor)
    reader.close()


def test_a_label_file_that_cannot_be_read_is_not_taken_for_none(tmp_path: Path) -> None:
    make("idx", tmp_path)
    (tmp_path / "rows-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1]) + (30).to_bytes(4, "big") + bytes(30))
    spec, stat = ArraysSpec(url=str(tmp_path / "rows-images-idx3-ubyte")), Path.stat

    def failing(self: Path, **options: Any) -> Any:
        if "labels" in self.name:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))
        return stat(self, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "stat", failing)
        with pytest.raises(StoreError, match="labels-idx1-ubyte: Input/output error"):
            SOURCES.build(spec).listing()
    assert SOURCES.build(spec).listing().label_names == ["0"] * 30


@pytest.mark.parametrize("order", ["C", "F"])
def test_rows_that_are_read_are_those_of_the_map(tmp_path: Path, order: str) -> None:
    values = np.asarray(np.random.default_rng(0).normal(size=(7, 3, 5)), dtype=">f4", order=order)  # type: ignore[call-overload]
    np.save(tmp_path / "a.npy", values)
    rows = ArrayFile(tmp_path / "a.npy", "a.npy", 0).rows("")[0]
    assert (rows.shape, rows.dtype, len(rows)) == ((7, 3, 5), values.dtype, 7)
    assert all((rows[row] == values[row]).all() for row in range(7))
    with pytest.raises(IndexError):
        rows[7]


SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>
static int fails(const char *path) {
    static int left = -1;
    const char *part = getenv("FAULT_PART"), *count = getenv("FAULT_COUNT");
    if (!part || !strstr(path, part)) return 0;
    if (left < 0) left = atoi(getenv("FAULT_TIMES"));
    if (__sync_fetch_and_sub(&left, 1) <= 0) { left = 0; return 0; }
    int log = syscall(SYS_openat, AT_FDCWD, count, O_WRONLY | O_CREAT | O_APPEND, 0600);
    if (write(log, "x", 1) == 1) close(log);
    errno = atoi(getenv("FAULT_CODE"));
    return 1;
}
static int fails_at(int file) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return fails(path);
}
#define NEXT(name) static __typeof__(&name) next; if (!next) next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define READ(name) ssize_t name(int file, void *to, size_t n) { \
    NEXT(name); return fails_at(file) ? -1 : next(file, to, n); }
#define PREAD(name) ssize_t name(int file, void *to, size_t n, off_t at) { \
    NEXT(name); return fails_at(file) ? -1 : next(file, to, n, at); }
#define PREADV(name) ssize_t name(int file, const struct iovec *to, int n, off_t at, int flags) { \
    NEXT(name); return fails_at(file) ? -1 : next(file, to, n, at, flags); }
READ(read) PREAD(pread) PREAD(pread64) PREADV(preadv2) PREADV(preadv64v2)
"""
JOB = """
import sys
from aecore import native
from aecore.data.write.job import shard_dataset
from aecore.data.sources.folder import FolderSpec
from aecore.data.write.spec import ShardSpec
from aecore.errors import AecoreError
from aecore.data.write.pack import ShardWriter
take, taken = ShardWriter._write_fast, []
ShardWriter._write_fast = lambda *args: taken.append(take(*args)) or taken[-1]
try:
    shard_dataset(FolderSpec(url=sys.argv[1]), sys.argv[2], shards=ShardSpec(max_bad=0.1, max_samples=20))
except AecoreError as error:
    print(error)
    sys.exit(error.exit_code)
assert any(taken), "no block went straight from the files into the tar"
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that makes reads fail in a process that loads it first."""
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(SHIM)
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", folder / "shim.so", folder / "shim.c", "-ldl"], check=True)
    return folder / "shim.so"


@NEEDS_SHIM
@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_an_error_in_the_compiled_path_is_no_bad_sample(tmp_path: Path, shim: Path, code: int) -> None:
    root = tmp_path / "in"
    for number in range(60):
        path = root / f"{number % 3}/{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 5), number, np.uint8)).save(path)

    def run(out: str, times: int) -> subprocess.CompletedProcess[str]:
        faults = {"FAULT_PART": "/33.png", "FAULT_CODE": str(code), "FAULT_TIMES": str(times), "FAULT_COUNT": str(tmp_path / "count")}
        environment = {**os.environ, **faults, "LD_PRELOAD": str(shim)}
        command = [sys.executable, "-c", JOB, str(root), str(tmp_path / out)]
        return subprocess.run(command, env=environment, check=False, capture_output=True, text=True)

    def without_faults(out: str) -> None:
        shard_dataset(FolderSpec(url=str(root)), str(tmp_path / out), shards=ShardSpec(max_bad=0.1, max_samples=20))

    without_faults("clean")
    clean = written(tmp_path / "clean")
    once = run("once", times=1)
    assert once.returncode == 0, once.stdout + once.stderr
    assert (tmp_path / "count").stat().st_size == 1, "the compiled path met the error"
    assert written(tmp_path / "once") == clean
    always = run("always", times=1 << 30)
    assert (always.returncode, os.strerror(code) in always.stdout, "33.png" in always.stdout) == (4, True, True), (
        always.stdout + always.stderr
    )
    assert len(list((tmp_path / "always/records").iterdir())) == 2 and not (tmp_path / "always/quarantine").exists()
    without_faults("always")
    assert written(tmp_path / "always") == clean
