"""What every store promises: one suite for a folder, a bucket and memory, the last two also through the cache of this machine."""

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from aecore.data.dataset import open_dataset
from aecore.data.read.verify import verify_dataset
from aecore.data.sources.folder import FolderSpec
from aecore.data.write.job import shard_dataset
from aecore.errors import ConfigError, DataError, StoreError
from aecore.store import SCHEMES, AlreadyExists, FileRef, LocalStore, Store, absolute_url, is_remote, open_store
from aecore.store import _cached as cached_module
from aecore.store._cached import CachedStore
from aecore.store._s3 import S3Store
from tests.aecore.encoding import image_folder
from tests.memory_store import MEMORY, MEMORY_SCHEME, MemoryStore
from tests.processes import run

ROOT = Path(__file__).resolve().parents[2]
Spoil = Callable[[str, bytes], None]  # writes bytes under a name, past the store
CACHED = ("s3 with a cache", "memory with a cache")


@pytest.fixture
def memory_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An address of a scheme that the table gets here, with an empty cache."""
    monkeypatch.setitem(SCHEMES, "memory", MEMORY_SCHEME)
    monkeypatch.setattr(cached_module, "RECENT_S", 0.0)  # tests change files behind the store's back
    monkeypatch.setenv("AECORE_CACHE", str(tmp_path / "cache"))
    return f"memory:/{tmp_path}"


@pytest.fixture(params=["local", "s3", "s3 with a cache", "memory", "memory with a cache"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Store, Spoil]:
    """A new, empty store, and a way to change its files behind its back."""
    if request.param.startswith("memory"):
        url = request.getfixturevalue("memory_url")
        memory = open_store(url)
        assert isinstance(memory, MemoryStore)
        store: Store = CachedStore(memory) if request.param in CACHED else memory
        return store, lambda name, data: memory.files.update({name: (time.time(), data)})
    if request.param.startswith("s3"):
        s3 = request.getfixturevalue("s3")
        url = f"{s3.url}/artefact"
        store = open_store(url) if request.param in CACHED else S3Store(url, s3.bucket, "artefact", None)
        assert isinstance(store, CachedStore if request.param in CACHED else S3Store)
        return store, lambda name, data: s3.raw.put_object(Bucket=s3.bucket, Key=f"artefact/{name}", Body=data)

    def write(name: str, data: bytes) -> None:
        (tmp_path / "artefact" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "artefact" / name).write_bytes(data)

    return open_store(tmp_path / "artefact"), write


@pytest.mark.parametrize("kind", [LocalStore, S3Store, CachedStore, MemoryStore])
def test_every_store_has_all_that_the_interface_has(kind: type, tmp_path: Path) -> None:
    """Also the wrapper, which would miss what is added to the interface."""
    wanted = {name for name in {*vars(Store), *Store.__annotations__} if not name.startswith("_")}
    assert {"put", "url", "is_local"} <= wanted
    opened = CachedStore(MemoryStore("memory://law")) if kind is CachedStore else None
    assert wanted - {"url"} <= set(dir(opened or kind))


def test_the_copies_of_stores_in_memory_go_with_their_process(tmp_path: Path) -> None:
    code = (
        "from tests.memory_store import MemoryStore\n"
        "for number in range(3):\n"
        "    store = MemoryStore(f'memory://{number}')\n"
        "    assert store.local(store.put('a', b'x', role='part')).read_bytes() == b'x'"
    )
    run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "TMPDIR": str(tmp_path)}, check=True)
    assert list(tmp_path.iterdir()) == []


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


def test_one_wrong_file_among_many_is_named_and_the_first_one_counts(opened):
    store, spoil = opened
    refs = [store.put(f"{folder}/part-{number:03d}", b"x" * (number + 1), role="part") for folder in "ab" for number in range(20)]
    store.check_all(refs)
    spoil("b/part-007", b"x")
    with pytest.raises(DataError, match="b/part-007"):
        store.check_all(refs)
    store.remove("a/part-013")
    with pytest.raises(DataError, match="a/part-013"):
        store.check_all(refs)


def test_a_copy_that_is_whole_is_not_fetched_again(store):
    ref = store.put("x", b"hello", role="part")
    assert store.read("x", ref=ref, fresh=True) == store.local(ref).read_bytes() == b"hello"
    assert not store.refetch_if_corrupt(ref)


@pytest.mark.parametrize("opened", CACHED, indirect=True)
def test_a_cached_copy_is_read_without_the_store_and_repaired_from_it(opened):
    store, spoil = opened
    ref = store.put("x", b"hello", role="part")
    store.local(ref).write_bytes(b"HELLO")  # the copy of this machine, of the right size
    assert store.read("x", ref=ref) == b"hello"
    store.local(ref).write_bytes(b"HELLO")
    assert store.refetch_if_corrupt(ref) and store.local(ref).read_bytes() == b"hello"
    spoil("x", b"OTHER")
    assert store.read("x", ref=ref) == b"hello", "the copy: no file of an artefact ever changes"
    with pytest.raises(DataError):
        store.read("x", ref=ref, fresh=True)


def test_a_scheme_is_one_entry_of_the_table(memory_url, tmp_path, monkeypatch):
    assert absolute_url(f"{memory_url}/") == memory_url and is_remote(memory_url)
    images, out = f"{memory_url}/in", f"{memory_url}/out"
    for path in image_folder(tmp_path / "in", "train", range(6)).rglob("*.png"):
        MemoryStore(images).put(path.relative_to(tmp_path / "in").as_posix(), path.read_bytes(), role="part")
    shard_dataset(FolderSpec(url=images), out)
    assert verify_dataset(open_dataset(out), read_data=True).ok and open_dataset(out).manifest.num_samples() == 6
    assert {name.partition("/")[0] for name in MEMORY[out]} == {
        "dataset.000001.json",
        "listings",
        "records",
        "report",
        "run.000001.json",
        "shards",
    }
    with pytest.raises(ConfigError, match=r"scheme 'memorie': paths, file://, s3:// and memory:// URLs .*did you mean 'memory'"):
        absolute_url("memorie://x")
    with pytest.raises(ConfigError, match="did you mean memory://x/y"):
        absolute_url("memory:/x/y")
    monkeypatch.delitem(SCHEMES, "memory")
    with pytest.raises(ConfigError, match=r"scheme 'memory': paths, file:// and s3:// URLs are read"):
        open_store(memory_url)


def test_is_local_says_whether_files_are_paths(store, tmp_path):
    assert store.is_local is store.url.startswith(str(tmp_path))
