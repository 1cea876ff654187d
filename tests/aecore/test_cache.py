"""The cache of whole objects: shared by threads and processes, verified once, bounded, safe to lose."""

import hashlib
import multiprocessing
import os
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType

import pytest

from aecore.errors import ConfigError, DataError, StoreError
from aecore.store import FileRef
from aecore.store import _cache as cache_module
from aecore.store._cache import ObjectCache
from tests.processes import WAIT_S, children, join, wait_until


class Origin:
    """Objects of `size` bytes by name; counts what is fetched from it."""

    def __init__(self, size: int = 1000, pause_s: float = 0.0) -> None:
        self.size, self.pause_s, self.fetched = size, pause_s, list[str]()

    def data(self, name: str) -> bytes:
        return (name.encode() * self.size)[: self.size]

    def ref(self, name: str) -> FileRef:
        return FileRef(name, self.size, hashlib.sha256(self.data(name)).hexdigest())

    def fetch(self, ref: FileRef, target: Path) -> None:
        self.fetched.append(ref.name)
        time.sleep(self.pause_s)
        target.write_bytes(self.data(ref.name))


def read(cache: ObjectCache, origin: Origin, name: str) -> bytes:
    with os.fdopen(cache.open(origin.ref(name), origin.fetch), "rb") as file:
        return file.read()


def held(cache: ObjectCache) -> int:
    return sum(path.stat().st_size for path in cache.root.iterdir())


def test_an_object_is_fetched_once_whoever_asks(tmp_path):
    cache, origin = ObjectCache(tmp_path / "cache", 1 << 20), Origin(pause_s=0.05)
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda number: read(cache, origin, "ab"[number % 2]), range(64)))
    assert found == [origin.data("ab"[number % 2]) for number in range(64)]
    assert sorted(origin.fetched) == ["a", "b"]


def _read_in_process(root: Path, log: Path) -> None:
    origin = Origin(pause_s=0.2)
    assert read(ObjectCache(root, 1 << 20), origin, "a") == origin.data("a")
    with log.open("a") as file:
        file.write("".join(f"{name}\n" for name in origin.fetched))


def test_processes_share_it(tmp_path):
    processes = [
        multiprocessing.get_context("spawn").Process(target=_read_in_process, args=(tmp_path / "c", tmp_path / "log")) for _ in "123"
    ]
    with children(*processes):
        assert join(*processes) == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "a\n"


def test_what_was_not_asked_for_the_longest_time_goes_first(tmp_path):
    cache, origin = ObjectCache(tmp_path / "cache", 3000), Origin()
    for name in "abc":
        read(cache, origin, name)
        time.sleep(0.01)  # so that their times differ on any file system
    read(cache, origin, "a")
    read(cache, origin, "d")
    assert held(cache) == 3000
    for name in "acd":
        read(cache, origin, name)
    assert origin.fetched == ["a", "b", "c", "d"]
    read(cache, origin, "b")
    assert held(cache) == 3000


def test_an_open_object_is_not_evicted_and_readable_to_its_end(tmp_path, caplog):
    cache, origin = ObjectCache(tmp_path / "cache", 1000), Origin()
    descriptor = cache.open(origin.ref("a"), origin.fetch)
    read(cache, origin, "b")
    assert held(cache) == 2000 and "in use" in caplog.text
    assert os.pread(descriptor, 2000, 0) == origin.data("a")
    os.close(descriptor)
    read(cache, origin, "c")
    assert held(cache) == 1000


def test_a_path_stays_for_a_while(tmp_path):
    cache, origin = ObjectCache(tmp_path / "cache", 1000), Origin()
    path = cache.path(origin.ref("a"), origin.fetch)
    read(cache, origin, "b")
    assert path.read_bytes() == origin.data("a")


def test_many_readers_of_a_small_cache_get_what_they_ask_for(tmp_path):
    cache, origin = ObjectCache(tmp_path / "cache", 3000), Origin()
    names = [chr(ord("a") + number % 9) for number in range(200)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda name: read(cache, origin, name), names)) == [origin.data(name) for name in names]
    assert held(cache) <= 8 * 1000, "what eight readers have open at once"


def test_a_fetch_that_fails_leaves_nothing_and_is_told(tmp_path):
    cache, origin = ObjectCache(tmp_path / "cache", 3000), Origin()

    def broken(ref, target):
        target.write_bytes(b"half")
        raise DataError("damaged")

    with pytest.raises(DataError):
        cache.open(origin.ref("a"), broken)
    assert held(cache) == 0
    assert read(cache, origin, "a") == origin.data("a")


def test_leftovers_and_damage_of_a_killed_process_are_no_harm(tmp_path):
    cache, origin = ObjectCache(tmp_path / "cache", 3000), Origin()
    ref = origin.ref("a")
    (cache.root / f"{ref.sha256}.part").write_bytes(b"x" * 500)
    (cache.root / f"{'0' * 64}.part").write_bytes(b"x" * 500)
    (cache.root / ref.sha256).write_bytes(b"cut off")
    assert read(cache, origin, "a") == origin.data("a")
    assert held(cache) == 1000, "parts that nobody writes any more are removed"


INTRUDERS: dict[str, Callable[[Path, Path], object]] = {
    "a pipe": lambda place, other: os.mkfifo(place),
    "a socket": lambda place, other: bound(place),
    "an empty folder": lambda place, other: place.mkdir(),
    "a link to a device without end": lambda place, other: place.symlink_to("/dev/zero"),
    "a link to a pipe": lambda place, other: (os.mkfifo(other.parent / "pipe"), place.symlink_to(other.parent / "pipe")),
    "a link to a huge file": lambda place, other: (sparse(other.parent / "huge"), place.symlink_to(other.parent / "huge")),
    "a link to nothing": lambda place, other: place.symlink_to(other.parent / "missing"),
    "a link to itself": lambda place, other: place.symlink_to(place),
    "a link to another object": lambda place, other: place.symlink_to(other),
    "another name of another object": lambda place, other: place.hardlink_to(other),
    "a huge file": lambda place, other: sparse(place),
}


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


def bound(path: Path) -> None:
    where = os.open(path.parent, os.O_PATH)  # the address of a socket is short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"/proc/self/fd/{where}/{path.name}")
    os.close(where)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("intruder", INTRUDERS)
@pytest.mark.parametrize("place", ["object", "its download", "another download", "lock"])
def test_what_the_cache_did_not_write_is_replaced_and_never_read(place: str, intruder: str, tmp_path: Path) -> None:
    cache, origin = ObjectCache(tmp_path / "cache", 3000), Origin()
    assert read(cache, origin, "b") == origin.data("b")
    (tmp_path / "elsewhere").mkdir()
    other = tmp_path / "elsewhere" / "precious"
    other.write_bytes(origin.data("b"))
    sha256 = origin.ref("a").sha256
    names = {"object": sha256, "its download": f"{sha256}.part", "another download": f"{'0' * 64}.part", "lock": "lock"}
    (cache.root / names[place]).unlink(missing_ok=True)
    INTRUDERS[intruder](cache.root / names[place], other)
    assert cache.refetch_if_corrupt(origin.ref("a"))
    assert read(cache, origin, "a") == origin.data("a")
    assert read(cache, origin, "b") == origin.data("b")
    assert origin.fetched == ["b", "a"]
    assert other.read_bytes() == origin.data("b"), "what a link leads to is not written"
    assert stat.S_ISREG((cache.root / sha256).lstat().st_mode)


def test_a_folder_with_files_under_the_name_of_an_object_is_named_and_kept(tmp_path: Path) -> None:
    cache, origin = ObjectCache(tmp_path / "cache", 3000), Origin()
    folder = cache.root / origin.ref("a").sha256
    folder.mkdir()
    (folder / "thesis.txt").write_bytes(b"x")
    with pytest.raises(StoreError, match=f"{folder}.*not empty"):
        read(cache, origin, "a")
    assert (folder / "thesis.txt").exists()


def test_what_others_keep_in_the_folder_stays(tmp_path):
    cache, origin = ObjectCache(tmp_path / "scratch", 500), Origin()
    (cache.root / "folder").mkdir(parents=True)
    for name in ("thesis.txt", "film.part"):
        (cache.root / name).write_bytes(b"x" * 1000)
    assert read(cache, origin, "a") == origin.data("a") and read(cache, origin, "b") == origin.data("b")
    assert {path.name for path in cache.root.iterdir()} >= {"folder", "thesis.txt", "film.part"}
    assert not (cache.root / origin.ref("a").sha256).exists()


def test_who_stops_waiting_takes_nothing_from_who_fetches(tmp_path):
    cache, origin, stopped = ObjectCache(tmp_path / "cache", 3000), Origin(), threading.Event()

    def interrupted(number: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code is ObjectCache.open.__code__:
                raise KeyboardInterrupt
            frame = frame.f_back  # else it does not wait yet: the timer comes again

    def slow(ref, target):
        origin.fetched.append(ref.name)
        with target.open("wb") as file:
            assert stopped.wait(WAIT_S)
            file.write(origin.data(ref.name))

    before = signal.signal(signal.SIGALRM, interrupted)
    try:
        with ThreadPoolExecutor(1) as pool:
            fetching = pool.submit(cache.open, origin.ref("a"), slow)
            wait_until(lambda: origin.fetched, "the fetch began")
            signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
            with pytest.raises(KeyboardInterrupt):
                cache.open(origin.ref("a"), slow)
            signal.setitimer(signal.ITIMER_REAL, 0)
            stopped.set()
            os.close(fetching.result())
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        stopped.set()
        signal.signal(signal.SIGALRM, before)
    assert origin.fetched == ["a"] and read(cache, origin, "a") == origin.data("a")


def test_a_child_forked_while_an_object_arrives_holds_nobody_up(tmp_path):
    cache, origin, forked = ObjectCache(tmp_path / "cache", 3000), Origin(), list[int]()

    def forking(ref, target):
        forked.append(os.fork())
        if not forked[0]:
            time.sleep(300)
            os._exit(0)
        origin.fetch(ref, target)

    try:
        os.close(cache.open(origin.ref("a"), forking))
        assert os.waitpid(forked[0], os.WNOHANG) == (0, 0), "the open waited for the child to end"
    finally:
        os.kill(forked[0], signal.SIGKILL)
        os.waitpid(forked[0], 0)


def test_an_object_from_the_time_of_a_wrong_clock_does_not_stay_for_ever(tmp_path):
    cache, origin = ObjectCache(tmp_path / "cache", 2000), Origin()
    for name in "abcd":
        read(cache, origin, name)
        os.utime(cache.root / origin.ref(name).sha256, (4e9, 4e9))
    assert held(cache) <= 2000


def test_an_object_that_is_replaced_before_it_arrives_is_an_error(tmp_path):
    cache, tries = ObjectCache(tmp_path / "cache", 3000), list[int]()

    def other(target):
        tries.append(1)
        assert len(tries) < 9, "it would be fetched for ever"
        target.write_bytes(b"longer than it was")

    with pytest.raises(DataError, match="replaced while it was read"):
        cache.unverified("s3://bucket/a.tar etag", 4, other)
    assert held(cache) == 0


def test_a_cache_that_cannot_be_a_folder_is_told(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(StoreError, match="set AECORE_CACHE"):
        read(ObjectCache(tmp_path / "file", 3000), Origin(), "a")


def test_prefetching_brings_objects_in_the_background_and_never_fails(tmp_path):
    cache, origin = ObjectCache(tmp_path / "cache", 8000), Origin()
    failed = threading.Event()

    def broken(ref, target):
        failed.set()
        raise DataError("gone")

    cache.prefetch([origin.ref("x")], broken)
    assert failed.wait(WAIT_S)
    cache.prefetch([origin.ref(name) for name in "abcdefgh"], origin.fetch)
    wait_until(lambda: not cache_module._fetchers._asked, lambda: f"the background downloads end: {origin.fetched}")
    assert sorted(origin.fetched) == ["a", "b", "c", "d"], "half the cache, in order"


def test_nobody_waits_for_who_reads_an_object_that_just_arrived(tmp_path):
    cache, origin = ObjectCache(tmp_path / "cache", 3000), Origin(pause_s=0.3)
    held_open = threading.Event()

    def hold() -> bytes:
        with os.fdopen(cache.open(origin.ref("a"), origin.fetch), "rb") as file:
            data = file.read()
            held_open.wait()  # as long as a trainer keeps a shard open
            return data

    pool = ThreadPoolExecutor(5)
    holders = [pool.submit(hold) for _ in range(4)]
    asking = pool.submit(read, cache, origin, "a")
    try:
        assert asking.result(WAIT_S) == origin.data("a")
    finally:
        held_open.set()
        pool.shutdown()
    assert {holder.result() for holder in holders} == {origin.data("a")}
    assert origin.fetched == ["a"]


def test_a_damaged_object_is_mended_and_a_whole_one_stays(tmp_path, caplog):
    cache, origin = ObjectCache(tmp_path / "cache", 3000), Origin()
    ref = origin.ref("a")
    assert cache.refetch_if_corrupt(ref)  # it is not here
    read(cache, origin, "a")
    assert not cache.refetch_if_corrupt(ref)
    (cache.root / ref.sha256).write_bytes(bytes(ref.bytes))
    assert cache.refetch_if_corrupt(ref)
    assert "damaged copy of a" in caplog.text
    assert read(cache, origin, "a") == origin.data("a")


def test_an_object_without_a_hash_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    cache, seen = ObjectCache(tmp_path / "cache", 3000), list[tuple[int, int]]()
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: seen.append((os.fstat(descriptor).st_size, len(list(cache.root.glob("*[0-9a-f]")))))
    )
    path = cache.unverified("s3://b/x etag", 1000, lambda target: target.write_bytes(bytes(1000)))
    assert (path.stat().st_size, seen) == (1000, [(1000, 0)])


def test_a_limit_that_is_no_number_is_refused(monkeypatch):
    monkeypatch.setenv("AECORE_CACHE_BYTES", "lots")
    with pytest.raises(ConfigError, match="AECORE_CACHE_BYTES is 'lots', expected a number of bytes"):
        ObjectCache()
