"""What every store promises: one suite for a folder, a bucket (with its cache) and memory."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from aecore.errors import DataError, StoreError
from aecore.store import AlreadyExists, FileRef, Store, open_store
from tests.memory_store import MemoryStore

Spoil = Callable[[str, bytes], None]  # writes bytes under a name, past the store


@pytest.fixture(params=["local", "s3", "memory"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Store, Spoil]:
    """A new, empty store, and a way to change its files behind its back."""
    if request.param == "memory":
        memory = MemoryStore()
        return memory, lambda name, data: memory.files.update({name: (time.time(), data)})
    if request.param == "s3":
        s3 = request.getfixturevalue("s3")
        return open_store(f"{s3.url}/artefact"), lambda name, data: s3.raw.put_object(Bucket=s3.bucket, Key=f"artefact/{name}", Body=data)

    def write(name: str, data: bytes) -> None:
        (tmp_path / "artefact" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "artefact" / name).write_bytes(data)

    return open_store(tmp_path / "artefact"), write


@pytest.fixture
def store(opened: tuple[Store, Spoil]) -> Store:
    return opened[0]


def test_what_is_put_is_read_sized_listed_and_dated(store):
    before = store.now()
    ref = store.put("a/b/c.txt", b"hello", role="part")
    assert (ref.name, ref.bytes, len(ref.sha256)) == ("a/b/c.txt", 5, 64)
    assert store.read("a/b/c.txt") == store.read("a/b/c.txt", ref=ref) == store.read("a/b/c.txt", fresh=True) == b"hello"
    assert store.size("a/b/c.txt") == 5
    assert [name for name in store.list() if not name.startswith(".")] == ["a"]
    assert (store.list("a"), store.list("a/b"), store.list("x")) == (["b"], ["c.txt"], [])
    assert -2 <= store.modified("a/b/c.txt") - before < 60  # a bucket's times are whole seconds
    store.check(ref, verify=True)
    store.check_all([ref, ref], verify=True)


def test_nothing_is_there_before_it_is_put(store):
    assert (store.size("x"), store.modified("x"), store.list(), store.list("x")) == (None, None, [], [])
    with pytest.raises(DataError, match="missing"):
        store.read("x")
    for look in (store.check, store.local, store.open):
        with pytest.raises((DataError, StoreError)):
            look(FileRef("x", 1, "0" * 64))
    store.remove("x")


def test_the_same_bytes_again_are_success_and_others_are_refused(store):
    ref = store.put("x", b"one", role="part")
    assert store.put("x", b"one", role="part") == ref
    with store.stage() as path:
        path.write_bytes(b"one")
        assert store.put_staged("x", path, role="part") == ref
    with pytest.raises(AlreadyExists):
        store.put("x", b"two", role="part")
    with store.stage() as path:
        path.write_bytes(b"two")
        with pytest.raises(AlreadyExists):
            store.put_staged("x", path, role="part")
    assert store.read("x", fresh=True) == b"one"


def test_of_writers_at_once_exactly_one_wins(store):
    won, lost = [], []

    def write(number: int) -> None:
        try:
            won.append(store.put("x", b"%d" % number * 1000, role="part"))
        except AlreadyExists:
            lost.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(lost)) == (1, 7)
    store.check(won[0], verify=True)


def test_a_staged_file_is_gone_when_its_block_ends(store):
    with store.stage() as path:
        path.write_bytes(b"x")
    assert not path.exists()
    assert store.size("x") is None


def test_a_local_copy_and_a_descriptor_have_the_bytes(store):
    ref = store.put("x", bytes(range(256)) * 300, role="part")
    store.prefetch([ref])
    assert store.local(ref).read_bytes() == bytes(range(256)) * 300
    descriptor = store.open(ref)
    try:
        assert os.pread(descriptor, 4, 254) == bytes([254, 255, 0, 1])
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("bad", [b"hellO", b"hell", b"hello!"])
def test_other_bytes_than_those_that_were_put_are_found(opened, bad):
    store, spoil = opened
    ref = store.put("x", b"hello", role="part")
    spoil("x", bad)
    with pytest.raises(DataError):
        store.read("x", ref=ref)
    with pytest.raises(DataError):
        store.check(ref, verify=True)
    if len(bad) != 5:
        with pytest.raises(DataError):
            store.check(ref)
    assert store.read("x", fresh=True) == bad


def test_no_more_is_read_than_is_allowed(store):
    store.put("x", b"hello", role="part")
    assert store.read("x", limit=5) == b"hello"
    with pytest.raises(DataError):
        store.read("x", limit=4, fresh=True)


def test_removing_takes_one_file_and_no_other(store):
    refs = [store.put(f"a/{name}", name.encode(), role="part") for name in ("x", "xy", "z")]
    store.remove("a/x")
    assert store.size("a/x") is None
    assert store.list("a") == ["xy", "z"]
    store.check_all(refs[1:], verify=True)
    store.remove("a/x")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x"])
def test_names_stay_inside(store, name):
    for use in (store.read, store.size, lambda name: store.put(name, b"x", role="part")):
        with pytest.raises(DataError, match="leads out of the artefact"):
            use(name)


def test_is_local_says_whether_files_are_paths(store, tmp_path):
    assert store.is_local is store.url.startswith(str(tmp_path))
