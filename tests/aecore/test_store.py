import ast
import errno
import os
import signal
import tempfile
import threading
import time
from pathlib import Path

import pytest

from aecore.errors import ConfigError, DataError, StoreError
from aecore.store import (
    AlreadyExists,
    FileRef,
    absolute_url,
    canonical_json,
    is_remote,
    open_files,
    open_store,
    resolve_url,
    sha256_file,
)
from aecore.store._environment import FAULT_STAGES
from tests.processes import WARM, run


def test_put_then_read_returns_the_bytes_and_their_hash(tmp_path):
    store = open_store(tmp_path / "a")
    ref = store.put("deep/er/name.bin", b"hello", role="part")
    assert store.read("deep/er/name.bin", ref=ref) == b"hello"
    assert ref.bytes == 5
    assert ref.sha256 == sha256_file(tmp_path / "a/deep/er/name.bin")


def test_opening_and_reading_a_store_creates_nothing(tmp_path):
    store = open_store(tmp_path / "nothing")
    assert store.list() == []
    assert store.size("x") is None
    assert not (tmp_path / "nothing").exists()


def test_putting_the_same_bytes_again_is_success_and_leaves_the_file_alone(tmp_path):
    store = open_store(tmp_path)
    first = store.put("name", b"same", role="part")
    inode = (tmp_path / "name").stat().st_ino
    assert store.put("name", b"same", role="part") == first
    assert (tmp_path / "name").stat().st_ino == inode


def test_putting_other_bytes_is_refused_and_the_old_ones_stay(tmp_path):
    store = open_store(tmp_path)
    store.put("name", b"old", role="part")
    with pytest.raises(AlreadyExists, match="exists with other content"):
        store.put("name", b"new", role="part")
    assert (tmp_path / "name").read_bytes() == b"old"


def test_zero_bytes_do_not_truncate_an_existing_file(tmp_path):
    store = open_store(tmp_path)
    store.put("name", b"old", role="part")
    with pytest.raises(AlreadyExists):
        store.put("name", b"", role="part")
    assert (tmp_path / "name").read_bytes() == b"old"


def test_nothing_is_left_in_the_staging_folder_after_success_or_failure(tmp_path):
    store = open_store(tmp_path)
    store.put("name", b"old", role="part")
    with pytest.raises(AlreadyExists):
        store.put("name", b"new", role="part")
    with pytest.raises(RuntimeError, match="in the middle"), store.stage() as staged:
        staged.write_bytes(b"half")
        raise RuntimeError("in the middle")
    assert list((tmp_path / ".tmp").iterdir()) == []


@pytest.mark.parametrize("size_change", [b"", b"hell", b"hello world"])
def test_a_changed_size_is_found_without_reading(tmp_path, size_change):
    store = open_store(tmp_path)
    ref = store.put("name", b"hello", role="part")
    (tmp_path / "name").write_bytes(size_change)
    with pytest.raises(DataError, match="the manifest says 5"):
        store.local(ref)


def test_a_flipped_bit_is_found_by_reading(tmp_path):
    store = open_store(tmp_path)
    ref = store.put("name", b"hello", role="part")
    (tmp_path / "name").write_bytes(b"hellp")
    store.local(ref)
    for read in (lambda: store.read("name", ref=ref), lambda: store.check(ref, verify=True)):
        with pytest.raises(DataError, match="is damaged"):
            read()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match="gone is missing"):
        open_store(tmp_path).local(FileRef("gone", 3, "0" * 64))


def test_a_file_of_more_bytes_than_the_limit_is_not_read(tmp_path):
    store = open_store(tmp_path)
    ref = store.put("name", b"12345", role="part")
    assert store.read("name", limit=5) == store.read("name", ref=ref, limit=5) == b"12345"
    for known in (None, ref):
        with pytest.raises(DataError, match="name has 5 bytes, expected at most 4 in a file of this kind"):
            store.read("name", ref=known, limit=4)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x"])
def test_names_cannot_leave_the_artefact(tmp_path, name):
    with pytest.raises(DataError, match="leads out of"):
        open_store(tmp_path).read(name)


@pytest.mark.parametrize("url", ["pipe:cat /etc/passwd", "http://x/y", "gs://b/k", "", "file://otherhost/x"])
def test_only_paths_and_file_urls_are_accepted(url):
    with pytest.raises(ConfigError):
        absolute_url(url)


def test_file_urls_and_relative_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute_url("out") == str(tmp_path / "out")
    assert absolute_url((tmp_path / "a b").as_uri()) == str(tmp_path / "a b")


def test_a_folder_that_cannot_be_written_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="cannot write"):
        open_store(tmp_path / "file").put("x", b"1", role="part")


def test_remove_takes_its_empty_folder_along_and_nothing_else(tmp_path):
    store = open_store(tmp_path)
    store.put("f/a", b"1", role="part")
    store.put("f/b", b"2", role="part")
    store.remove("f/a")
    assert store.list("f") == ["b"]
    store.remove("f/b")
    store.remove("f/b")
    assert not (tmp_path / "f").exists()


def test_canonical_json_does_not_depend_on_key_order_and_refuses_nan():
    assert canonical_json({"b": 1, "a": [1.5, "é"]}) == canonical_json({"a": [1.5, "é"], "b": 1})
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"x": float("nan")})


@pytest.mark.parametrize("stage", FAULT_STAGES)
def test_a_process_killed_inside_put_leaves_all_or_nothing_under_the_name(tmp_path, stage):
    code = f"from aecore.store import open_store; open_store({str(tmp_path)!r}).put('name', b'x' * 1000, role='part')"
    environment = {**os.environ, "AECORE_FAULT": f"part.{stage}"}
    killed = run([*WARM, "-c", code], env=environment)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "name").exists() or (tmp_path / "name").stat().st_size == 1000
    run([*WARM, "-c", code], check=True)
    assert Path(tmp_path / "name").read_bytes() == b"x" * 1000


def test_a_put_survives_that_its_empty_folder_is_removed_meanwhile(tmp_path):
    store, done = open_store(tmp_path), threading.Event()

    def sweep() -> None:
        while not done.is_set():
            for name in store.list():
                store.remove(f"{name}/none")

    sweeper = threading.Thread(target=sweep)
    sweeper.start()
    try:
        for number in range(200):
            (tmp_path / f"part-{number}").mkdir()
            store.put(f"part-{number}/file", b"x", role="part")
    finally:
        done.set()
        sweeper.join()
    assert len(store.list()) == 201


def test_remove_takes_an_empty_folder_of_ours_along_and_never_the_artefact_or_the_staging_folder(tmp_path):
    (tmp_path / "theirs").mkdir()
    store = open_store(tmp_path / "theirs")
    store.put("a/b/one", b"1", role="part")
    store.put("top", b"2", role="part")
    (tmp_path / "theirs/.tmp/left").write_bytes(b"3")
    for name in ("a/b/one", "top", ".tmp/left", "a/none"):
        store.remove(name)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == ["theirs", "theirs/.tmp"]


def test_a_folder_that_cannot_be_listed_is_no_empty_one(tmp_path, monkeypatch):
    for name in ("a/1.tar", "b/2.tar"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"x")
    scandir = os.scandir

    def stale(path):
        if str(path).endswith("b"):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", stale)
    with pytest.raises(StoreError, match="b: Stale file handle"):
        open_files(tmp_path).sizes()


def test_modified_is_when_a_file_was_written(tmp_path):
    store, before = open_store(tmp_path), time.time()
    store.put("a/name", b"x", role="part")
    written = store.modified("a/name")
    assert written is not None
    assert before - 2 <= written <= time.time() + 2
    assert store.modified("a/none") is None
    assert store.modified("a/name/below") is None


@pytest.mark.parametrize("place", ["artefact", "artefact with .tmp", "missing", "missing/deep"])
@pytest.mark.parametrize("unnamed", [True, False])  # whether the file system can make a file without a name
def test_asking_for_the_time_leaves_nothing_behind(tmp_path, monkeypatch, place, unnamed):
    (tmp_path / "artefact").mkdir()
    (tmp_path / "artefact/file").write_bytes(b"x")
    if ".tmp" in place:
        (tmp_path / "artefact/.tmp").mkdir()
    monkeypatch.setattr(tempfile, "_O_TMPFILE_WORKS", unnamed)
    before = sorted(tmp_path.rglob("*"))
    assert abs(open_store(tmp_path / place.split()[0]).now() - time.time()) < 60
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("base", ["/data/set", "s3://bucket/set"])
def test_an_address_is_absolute_or_below_the_one_that_it_was_written_for(base: str) -> None:
    assert resolve_url(base, ".") == base
    assert resolve_url(base, "tars/a") == f"{base}/tars/a"
    for absolute in ("/other/tars", "s3://other/tars"):
        assert resolve_url(base, absolute) == absolute
        assert is_remote(absolute) == absolute.startswith("s3")


def test_only_the_store_compares_an_address_with_that_of_a_bucket() -> None:
    root = Path(__file__).resolve().parent.parent.parent
    files = [path for package in ("aecore", "pipelines") for path in (root / package).rglob("*.py") if path.parent.name != "store"]
    assert len(files) > 100
    for path in files:
        constants = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        assert not constants & {"s3", "s3:", "s3://"}, path


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_neither_waited_for_nor_read_without_end(tmp_path, kind):
    store, path = open_store(tmp_path), tmp_path / "name"
    {"pipe": os.mkfifo, "device": lambda place: place.symlink_to("/dev/zero"), "folder": os.mkdir}[kind](path)
    for read in (lambda: store.read("name"), lambda: store.open(FileRef("name", store.size("name") or 0, "0" * 64))):
        with pytest.raises(DataError, match=r"is (a pipe, a device or a folder, expected a file|missing)"):
            read()
