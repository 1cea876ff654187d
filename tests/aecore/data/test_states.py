"""States of source files: what a listing says of them, and what a worker finds after it read them. Real files, a real S3 server."""

import contextlib
import dataclasses
import gzip
import hashlib
import io
import json
import os
import signal
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from aecore import native
from aecore.artifact.commit import claim_generation, read_record
from aecore.data.dataset import open_dataset
from aecore.data.format.png import StoredPng
from aecore.data.read.verify import verify_dataset
from aecore.data.sources import Listing, origin_of
from aecore.data.sources._labels import by_rules
from aecore.data.sources.arrays import ArraysSpec
from aecore.data.sources.folder import FolderSpec
from aecore.data.sources.sprites import SpritesSpec
from aecore.data.sources.webdataset import WebdatasetSpec
from aecore.data.write.job import adopt_shards, shard_dataset
from aecore.data.write.pack import ShardWriter
from aecore.data.write.plan import plan_dataset
from aecore.data.write.spec import ShardSpec
from aecore.data.write.splits import SplitSpec
from aecore.errors import ConfigError
from aecore.native.loops import list_folder
from aecore.registry import SOURCES, to_dict
from aecore.store import _states, local_state, open_store, settled_ns, sha256_json
from tests.documents import content
from tests.processes import run
from tests.warm import WARM


def pixels(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape or (8, 8), np.uint8)


def png(seed: int) -> bytes:
    return StoredPng((8, 8))(pixels(seed))


def saved(seed: int, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(seed)).save(file, format, **options)
    return file.getvalue()


def pages(seed: int) -> bytes:
    more = [Image.fromarray(pixels(seed + page)) for page in (100, 200)]
    return saved(seed, "TIFF", save_all=True, append_images=more)


def array(save: Callable[..., None], seed: int, order: Any = "C", **names: Any) -> bytes:
    file, rows = io.BytesIO(), np.asarray(pixels(seed, 3, 8, 8), order=order)
    save(file, **dict.fromkeys(names, rows)) if names else save(file, rows)
    return file.getvalue()


def idx(seed: int) -> bytes:
    return bytes([0, 0, 8, 3]) + np.array([3, 8, 8], ">u4").tobytes() + pixels(seed, 3, 8, 8).tobytes()


def tar(seed: int, first: int) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for number in range(first, first + 3):
            info = tarfile.TarInfo(f"{number:03d}.png")
            info.size = len(data := png(seed + number))
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


@dataclasses.dataclass(frozen=True)
class Kind:
    """How a source of two files is made: their names, the bytes of one of them by a seed, and the spec."""

    names: tuple[str, str]
    content: Callable[[int, int], bytes]  # of a seed, of the number of the file
    spec: type
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def write(self, root: Path) -> Any:
        root.mkdir(parents=True, exist_ok=True)
        for number, name in enumerate(self.names):
            (root / name).write_bytes(self.content(number, number))
        return self.spec(url=str(root), **self.options)


PLAIN = Kind(("a.png", "b.png"), lambda seed, _: png(seed), FolderSpec)
KINDS = {
    "png": PLAIN,
    "bmp": Kind(("a.bmp", "b.bmp"), lambda seed, _: saved(seed, "BMP"), FolderSpec),
    "npz files": Kind(("a.npz", "b.npz"), lambda seed, _: array(np.savez, seed, x=1), FolderSpec, {"extensions": ("npz",)}),
    "frames": Kind(("a.tiff", "b.tiff"), lambda seed, _: pages(seed), FolderSpec, {"frames": "all"}),
    "npy": Kind(("a.npy", "b.npy"), lambda seed, _: array(np.save, seed), ArraysSpec),
    "fortran": Kind(("a.npy", "b.npy"), lambda seed, _: array(np.save, seed, "F"), ArraysSpec),
    "npz": Kind(("a.npz", "b.npz"), lambda seed, _: array(np.savez, seed, x=1), ArraysSpec),
    "npz, compressed": Kind(("a.npz", "b.npz"), lambda seed, _: array(np.savez_compressed, seed, x=1), ArraysSpec),
    "idx": Kind(("a-idx3-ubyte", "b-idx3-ubyte"), lambda seed, _: idx(seed), ArraysSpec),
    "idx.gz": Kind(("a-idx3-ubyte.gz", "b-idx3-ubyte.gz"), lambda seed, _: gzip.compress(idx(seed), mtime=0), ArraysSpec),
    "tar": Kind(("a.tar", "b.tar"), lambda seed, number: tar(seed, 10 * number), WebdatasetSpec),
    "tar.gz": Kind(("a.tar.gz", "b.tar.gz"), lambda seed, number: gzip.compress(tar(seed, 10 * number), mtime=0), WebdatasetSpec),
    "tar, frames": Kind(("a.tar", "b.tar"), lambda seed, number: tar(seed, 10 * number), WebdatasetSpec, {"frames": "all"}),
}


def rewrite(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def rewrite_with_its_time(path: Path, data: bytes) -> None:
    before = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(path: Path, data: bytes) -> None:
    other = path.with_name(f".{path.name}.new")
    other.write_bytes(data)
    before = path.stat()
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.rename(path)


WAYS = [rewrite, rewrite_with_its_time, replace]


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is young: tests need not wait for their files."""
    monkeypatch.setattr(_states, "YOUNG_NS", -(10**12))


def tick() -> None:
    """Wait until the clock of the file system has gone on."""
    time.sleep(0.02)


def listed(spec: Any) -> Listing:
    return SOURCES.build(spec).listing()


def by_source(listing: Listing) -> dict[str, str | None]:
    return dict(zip(listing.sources, listing.states or [], strict=True))


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_written_again_has_another_state_and_the_others_keep_theirs(tmp_path, settled, kind, way):
    made = KINDS[kind]
    spec = made.write(tmp_path)
    first = by_source(listed(spec))
    assert None not in first.values() and by_source(listed(spec)) == first
    size = (tmp_path / made.names[0]).stat().st_size
    tick()
    way(tmp_path / made.names[0], made.content(7, 0))
    if "compressed" not in kind and "gz" not in kind:
        assert (tmp_path / made.names[0]).stat().st_size == size
    second = by_source(listed(spec))
    assert second.keys() == first.keys()
    assert {name for name in first if first[name] != second[name]} == {name for name in first if name.startswith("a")}
    assert listed(spec).sha256() != dataclasses.replace(listed(spec), states=[*first.values()]).sha256()


def test_a_young_state_is_unknown_and_the_hash_of_a_claim_covers_it_all_the_same(tmp_path, monkeypatch):
    specs = {kind: made.write(tmp_path / kind) for kind, made in KINDS.items()}
    with monkeypatch.context() as patch:
        patch.setattr(_states, "YOUNG_NS", 10**15)  # a busy machine may take more than two seconds for all this
        young = {kind: listed(spec) for kind, spec in specs.items()}
    for found in young.values():
        assert found.states == [None] * len(found) and found.all_states is not None and None not in found.all_states
        assert found.take(np.array([1, 0])).all_states == found.all_states[1::-1]
    monkeypatch.setattr(_states, "YOUNG_NS", -(10**12))
    for kind, spec in specs.items():
        found = listed(spec)
        assert found.states == young[kind].all_states and found.all_states is None
        assert found.sha256() == young[kind].sha256()


def test_what_was_changed_less_than_two_seconds_ago_is_young(tmp_path):
    spec = PLAIN.write(tmp_path)
    time.sleep(2.1)
    for _ in range(50):
        (tmp_path / "b.png").touch()
        started = time.monotonic()
        found = listed(spec)
        if time.monotonic() - started < 1.5:  # else the machine was busy
            break
    assert [state is None for state in found.states or ()] == [False, True]


def test_a_time_ahead_of_the_clock_is_young(tmp_path):
    spec = PLAIN.write(tmp_path)
    future = time.time() + 3600
    os.utime(tmp_path / "a.png", (future, future))
    time.sleep(2.1)
    assert [state is None for state in listed(spec).states or ()] == [True, False]


def test_the_clock_of_a_file_server_is_that_of_a_file_written_now_and_without_one_a_week_is_young(tmp_path, monkeypatch, caplog):
    near = 60 * 10**9  # a busy machine
    assert 2 * 10**9 <= -settled_ns(tmp_path) + time.time_ns() < near
    monkeypatch.setattr(_states, "_LOCAL", frozenset())
    assert 2 * 10**9 <= -settled_ns(tmp_path) + time.time_ns() < near
    assert not list(tmp_path.iterdir()) and not caplog.records
    with caplog.at_level("INFO"):
        assert 0 <= -settled_ns(Path("/proc")) + time.time_ns() - 7 * 86_400 * 10**9 < near
    assert "/proc: the clock of its file server cannot be asked" in caplog.text


@pytest.mark.parametrize("loops", ["compiled", "python"])
def test_listed_states_are_those_of_the_open_files(tmp_path, monkeypatch, loops):
    if loops == "python":
        monkeypatch.setattr(native, "_library", lambda: None)
    elif not native.available():
        pytest.skip("the compiled loops are not built here")
    for number, name in enumerate([b"a", b"\xff\xfe", "ü".encode(), b"b" * 255]):
        path = os.fsencode(tmp_path) + b"/" + name
        with open(path, "wb") as file:
            file.write(bytes(number))
        os.utime(path, ns=(0, -(10**9) + number if number else 1))  # before 1970
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("a")
    descriptor = os.open(tmp_path, os.O_RDONLY)
    found = list_folder(descriptor)
    os.close(descriptor)
    assert found.names == sorted(os.listdir(tmp_path), key=os.fsencode)
    for name, size, state, changed in zip(found.names, found.sizes.tolist(), found.states, found.changed.tolist(), strict=True):
        known = os.lstat(tmp_path / name)
        if name in ("folder", "link"):
            assert (size, state, changed) == (-1, "-" * 50, 0)
        else:
            assert (size, state) == (known.st_size, local_state(known)) and changed == max(known.st_mtime_ns, known.st_ctime_ns)


def test_a_link_has_the_state_of_its_file_and_one_that_leads_nowhere_has_none(tmp_path, settled):
    PLAIN.write(tmp_path / "in")
    (tmp_path / "in/c.png").symlink_to("a.png")
    (tmp_path / "in/d.png").symlink_to("nothing")
    states = by_source(listed(FolderSpec(url=str(tmp_path / "in"), follow_links=True)))
    assert states["c.png"] == states["a.png"] is not None and states["d.png"] is None


def unsettled_of(spec: Any, change: Callable[[], object], shards: ShardSpec | None = None) -> tuple[set[str], list[int]]:
    """List, plan, change, and write into a tar; return the sources of the samples that are not settled, and their ordinals."""
    listing = listed(spec)
    (task,) = plan_dataset(listing, SplitSpec(by="none"), shards or ShardSpec(), None, 1, spec).tasks
    change()
    writer = ShardWriter(task)
    with open_store(Path(spec.url).parent / "out").stage() as staged:
        writer.write(staged, SOURCES.build(spec))
    ordinals = writer.unsettled()
    places = dict(zip(task.ordinals.tolist(), task.sources, strict=True))
    return {places[ordinal] for ordinal in ordinals}, ordinals


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_what_changed_after_it_was_listed_is_unsettled(tmp_path, settled, kind, way):
    made = KINDS[kind]
    spec = made.write(tmp_path / "in")
    assert unsettled_of(spec, lambda: None) == (set(), [])
    expected = {name for name in listed(spec).sources if name.startswith("a")}
    tick()
    found, ordinals = unsettled_of(spec, lambda: way(tmp_path / "in" / made.names[0], made.content(7, 0)))
    assert found == expected and ordinals == sorted(ordinals)


@pytest.mark.parametrize("loops", ["compiled", "python"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_both_ways_of_plain_images_find_what_changed(tmp_path, monkeypatch, settled, loops, way):
    if loops == "python":
        monkeypatch.setattr(native, "_library", lambda: None)
    elif not native.available():
        pytest.skip("the compiled loops are not built here")
    (tmp_path / "in").mkdir()
    for number in range(300):
        (tmp_path / f"in/{number:03d}.png").write_bytes(png(number))
    taken, take = list[int](), ShardWriter._write_fast
    monkeypatch.setattr(ShardWriter, "_write_fast", lambda *args: taken.append(take(*args)) or taken[-1])
    tick()
    changed = {f"{number:03d}.png" for number in range(0, 300, 7)}
    found, _ = unsettled_of(
        FolderSpec(url=str(tmp_path / "in")), lambda: [way(tmp_path / "in" / name, png(900 + int(name[:3]))) for name in sorted(changed)]
    )
    assert found == changed and taken == [1]


def test_samples_whose_state_was_young_or_is_not_known_are_unsettled(tmp_path, monkeypatch):
    spec = PLAIN.write(tmp_path / "in")
    tick()
    (tmp_path / "in/b.png").touch()
    before, after = ((tmp_path / "in" / name).stat().st_ctime_ns for name in PLAIN.names)
    monkeypatch.setattr("aecore.data.sources.folder.settled_ns", lambda root: (before + after) // 2)
    assert unsettled_of(spec, lambda: None)[0] == {"b.png"}


@contextlib.contextmanager
def written_all_the_time(path: Path, content: Callable[[int], bytes]) -> Iterator[None]:
    """A writer that overwrites a file in place again and again, always with as many bytes."""
    over = threading.Event()

    def write() -> None:
        number = 0
        with open(path, "r+b", buffering=0) as file:
            while not over.is_set():
                number += 1
                file.seek(0)
                file.write(content(number % 2))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        yield
    finally:
        over.set()
        writer.join()


@pytest.mark.parametrize("kind", ["bmp", "npy", "png"])
def test_a_file_that_is_written_while_it_is_read_is_stored_as_read_and_unsettled(tmp_path, settled, kind):
    """2 MB each: a read takes longer than the writer's next write."""

    def large(seed: int) -> bytes:
        if kind == "png":
            return StoredPng((1024, 1024))(pixels(seed, 1024, 1024))
        file = io.BytesIO()
        if kind == "npy":
            np.save(file, pixels(seed, 2, 1024, 1024))
        else:
            Image.fromarray(pixels(seed, 1024, 1024)).save(file, "BMP")
        return file.getvalue()

    contents = [large(0), large(1)]
    (tmp_path / "in").mkdir()
    busy, calm = tmp_path / f"in/a.{kind}", tmp_path / f"in/b.{kind}"
    busy.write_bytes(contents[0])
    calm.write_bytes(contents[1])
    spec: Any = ArraysSpec(url=str(tmp_path / "in")) if kind == "npy" else FolderSpec(url=str(tmp_path / "in"))
    with written_all_the_time(busy, lambda number: contents[number]):
        manifest = shard_dataset(spec, str(tmp_path / "ds"), shards=ShardSpec(max_bad=0.5))
    record = read_record(open_store(tmp_path / "ds"), "train-000000")
    index = open_dataset(str(tmp_path / "ds")).index(manifest.shards[0]).to_pylist()
    known = {row["ordinal"] for row in index if row["source"].startswith("b")}
    assert record is not None and set(record.detail["unsettled"]) == set(range(record.detail["planned"])) - known
    assert verify_dataset(open_dataset(str(tmp_path / "ds")), read_data=True).ok


def test_records_say_what_is_unsettled_and_nothing_where_all_is_settled(tmp_path, settled):
    spec = PLAIN.write(tmp_path / "in")
    shard_dataset(spec, str(tmp_path / "ds"))
    assert "unsettled" not in json.loads((tmp_path / "ds/records/train-000000.json").read_text())["detail"]


def test_adopted_tars_that_changed_are_unsettled(tmp_path, settled):
    spec = KINDS["tar"].write(tmp_path / "in")
    adopt_shards(spec, str(tmp_path / "calm"))
    store = open_store(tmp_path / "calm")
    assert all("unsettled" not in read_record(store, f"train-00000{number}").detail for number in (0, 1))  # type: ignore[union-attr]  # there are two
    (tmp_path / "in/later.tar").write_bytes(tar(3, 50))
    source = SOURCES.build(spec)
    listing = source.listing()
    tasks = plan_dataset(
        listing, SplitSpec(by="none"), ShardSpec(), None, 1, spec, [name.partition("#")[0] for name in listing.sources]
    ).tasks
    tick()
    rewrite_with_its_time(tmp_path / "in/b.tar", tar(9, 10))
    for task in tasks:
        writer = ShardWriter(task)
        with contextlib.closing(source.for_thread()) as opened:
            writer.scan(opened)
        assert writer.unsettled() == (task.ordinals.tolist() if task.sources[0].startswith("b") else [])


@pytest.mark.parametrize("kind", ["png", "npz files", "frames", "npy", "npz, compressed", "tar", "tar.gz"])
def test_objects_have_states_and_are_compared_with_what_was_downloaded(s3, tmp_path, settled, kind):
    made = KINDS[kind]
    made.write(tmp_path / "in")
    s3.upload(tmp_path / "in", "in")
    spec = made.spec(url=f"{s3.url}/in", **made.options)
    first = by_source(listed(spec))
    assert None not in first.values() and by_source(listed(spec)) == first

    def change() -> None:
        s3.raw.put_object(Bucket=s3.bucket, Key=f"in/{made.names[0]}", Body=made.content(7, 0))

    expected = {name for name in first if name.startswith("a")}
    listing = listed(spec)
    for changes in (False, True):
        (task,) = plan_dataset(listing, SplitSpec(by="none"), ShardSpec(), None, 1, spec).tasks
        if changes:
            change()
        writer = ShardWriter(task)
        with open_store(tmp_path / "out").stage() as staged:
            writer.write(staged, SOURCES.build(spec))
        places = dict(zip(task.ordinals.tolist(), task.sources, strict=True))
        assert {places[ordinal] for ordinal in writer.unsettled()} == (expected if changes else set())
    second = by_source(listed(spec))
    assert {name for name in first if first[name] != second[name]} == expected


def test_an_object_is_young_by_the_clock_of_its_service(s3, tmp_path, monkeypatch):
    PLAIN.write(tmp_path / "in")
    s3.upload(tmp_path / "in", "in")
    with monkeypatch.context() as patch:
        patch.setattr(_states, "YOUNG_NS", 10**15)  # as in the test of files
        found = listed(FolderSpec(url=f"{s3.url}/in"))
    assert found.states == [None, None] and None not in (found.all_states or [None])
    time.sleep(4.1)  # times of objects and of answers are whole seconds
    aged = listed(FolderSpec(url=f"{s3.url}/in"))
    assert (aged.states, aged.sha256()) == (found.all_states, found.sha256())


def test_pieces_of_tars_that_the_cache_does_not_hold_have_states(s3, tmp_path, monkeypatch, settled):
    made = KINDS["tar"]
    made.write(tmp_path / "in")
    s3.upload(tmp_path / "in", "in")
    monkeypatch.setenv("AECORE_CACHE_BYTES", "4096")
    spec = WebdatasetSpec(url=f"{s3.url}/in")
    (task,) = plan_dataset(listed(spec), SplitSpec(by="none"), ShardSpec(), None, 1, spec).tasks
    s3.raw.put_object(Bucket=s3.bucket, Key="in/a.tar", Body=tar(7, 0))
    writer = ShardWriter(task)
    with open_store(tmp_path / "out").stage() as staged:
        writer.write(staged, SOURCES.build(spec))
    places = dict(zip(task.ordinals.tolist(), task.sources, strict=True))
    assert {places[ordinal] for ordinal in writer.unsettled()} == {name for name in task.sources if name.startswith("a")}


def test_the_origin_is_an_absolute_address_without_a_profile_or_the_name_of_the_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert origin_of(FolderSpec(url="in")) == str(tmp_path / "in") == origin_of(FolderSpec(url=f"file://{tmp_path}/in"))
    assert origin_of(FolderSpec(url="s3://lab@bucket/a@b/c")) == "s3://bucket/a@b/c" == origin_of(FolderSpec(url="s3://bucket/a@b/c"))
    assert origin_of(WebdatasetSpec(url="s3://lab@b/0.tar::s3://lab@b/1.tar")) == "s3://b/0.tar::s3://b/1.tar"
    assert origin_of(SpritesSpec()) == ""
    for spec in (FolderSpec, ArraysSpec, WebdatasetSpec):
        assert origin_of(spec(url="s3://bucket/in", name="cameras")) == "cameras"
        assert to_dict(spec(url="in", name="cameras"), identity_only=True) == to_dict(spec(url="in"), identity_only=True)
        for wrong in (" a", "a\nb", "\x1b[31m"):
            with pytest.raises(ConfigError, match="source.name is .*one line of text"):
                spec(url="in", name=wrong)


def test_a_claim_covers_states_and_origin(tmp_path, settled):
    spec = PLAIN.write(tmp_path / "in")
    found = dataclasses.replace(listed(spec), origin="here")
    taken = found.take(np.array([1]))
    assert found.states is not None and (taken.states, taken.origin) == (found.states[1:], "here")
    assert len({found.sha256(), dataclasses.replace(found, origin="there").sha256(), found.without_states().sha256()}) == 3
    bare = Listing(found.keys, found.sources, found.sizes, found.label_names, found.splits)
    assert found.without_states().sha256() == bare.sha256() == dataclasses.replace(bare, states=[None, None]).sha256()


@pytest.mark.parametrize("change", [False, True], ids=["as it was", "changed"])
def test_a_run_that_was_killed_goes_on_with_equal_states_and_begins_anew_with_others(tmp_path, settled, change):
    (tmp_path / "in").mkdir()
    for number in range(60):
        (tmp_path / f"in/{number:02d}.png").write_bytes(png(number))
    shards, out = ShardSpec(max_samples=10), tmp_path / "ds"
    code = (
        "from aecore.store import _states; _states.YOUNG_NS = 10**15; "  # all are young, however long this takes to start
        "from aecore.data.sources.folder import FolderSpec; from aecore.data.write.job import shard_dataset; "
        "from aecore.data.write.spec import ShardSpec; "
        f"shard_dataset(FolderSpec(url={str(tmp_path / 'in')!r}), {str(out)!r}, shards=ShardSpec(max_samples=10))"
    )
    killed = run([*WARM, "-c", code], env={**os.environ, "AECORE_FAULT": "record.linked:2"})
    assert killed.returncode == -9
    recorded = [path.stem for path in (out / "records").iterdir()]
    assert 2 <= len(recorded) < 6, "parts are committed by several threads"
    before = {path: path.stat().st_ino for path in (out / "shards").iterdir()}
    if change:
        tick()
        rewrite_with_its_time(tmp_path / "in/07.png", png(99))
    manifest = shard_dataset(FolderSpec(url=str(tmp_path / "in")), str(out), shards=shards)
    assert manifest.claim == (2 if change else 1)
    assert {path: path.stat().st_ino for path in before} == before
    stored = {row["source"]: row["sha256"] for shard in manifest.shards for row in open_dataset(str(out)).index(shard).to_pylist()}
    assert stored == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "in").iterdir()}
    for stem in recorded:  # they were read when all states were young
        record = read_record(open_store(out), stem)
        assert record is not None and len(record.detail["unsettled"]) == 10


@pytest.mark.parametrize("kind", KINDS)
def test_a_kill_while_files_are_young_begins_no_new_claim_when_they_have_aged(tmp_path, monkeypatch, kind):
    """Of the first generation and of one that follows it, wherever it is killed."""
    made, shards = KINDS[kind], ShardSpec(max_samples=2)
    spec = made.write(tmp_path / "in")
    for fault in ("run.linked", "record.linked", "listing.linked", "manifest.synced"):
        out = tmp_path / fault
        for generation in (1, 2):
            (tmp_path / "in" / made.names[0]).write_bytes(made.content(generation, 0))
            monkeypatch.setattr(_states, "YOUNG_NS", 10**15)
            child = os.fork()
            if child == 0:
                os.environ["AECORE_FAULT"] = fault
                shard_dataset(spec, str(out), shards=shards)
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
            assert [path.name for path in out.glob("dataset.*")] == [f"dataset.{number:06d}.json" for number in range(1, generation)]
            monkeypatch.setattr(_states, "YOUNG_NS", -(10**12))
            manifest = shard_dataset(spec, str(out), shards=shards)
            assert (manifest.number, manifest.claim) == (generation, generation)
            assert len(list(out.glob("run.*"))) == generation
        assert verify_dataset(open_dataset(str(out)), read_data=True).ok


def test_a_claim_of_before_there_were_states_goes_on_as_it_began(tmp_path, settled):
    spec, shards = PLAIN.write(tmp_path / "in"), ShardSpec(resize=4)
    shard_dataset(spec, str(tmp_path / "new"), shards=shards)
    identity = content(tmp_path / "new/run.000001.json")["identity"]
    identity["listing"] = by_rules(spec, listed(spec)).without_states().sha256()
    store = open_store(tmp_path / "old")
    assert claim_generation(store, "dataset", identity, {}) == 1
    manifest = shard_dataset(spec, str(tmp_path / "old"), shards=shards)
    assert (manifest.claim, manifest.claim_sha256) == (1, sha256_json(identity))
    assert "source_sha256" not in open_dataset(str(tmp_path / "old")).index(manifest.shards[0]).column_names
    (tmp_path / "in/c.png").write_bytes(png(3))
    later = shard_dataset(spec, str(tmp_path / "old"), shards=shards)
    assert "source_sha256" in open_dataset(str(tmp_path / "old")).index(later.shards[1]).column_names
    assert verify_dataset(open_dataset(str(tmp_path / "old")), read_data=True).ok


@pytest.mark.parametrize("options", [{"resize": 4}, {"mode": "RGB"}], ids=str)
@pytest.mark.parametrize("kind", ["png", "bmp", "frames", "npy", "tar"])
def test_an_index_of_converted_samples_says_what_the_bytes_of_the_source_were(tmp_path, kind, options):
    spec = KINDS[kind].write(tmp_path / "in")
    manifest = shard_dataset(spec, str(tmp_path / "ds"), shards=ShardSpec(**options))
    index = open_dataset(str(tmp_path / "ds")).index(manifest.shards[0])
    source = SOURCES.build(spec)
    for row in index.to_pylist():
        assert row["source_sha256"] == hashlib.sha256(source.read(row["source"])[1]).hexdigest() != row["sha256"]
    assert verify_dataset(open_dataset(str(tmp_path / "ds")), read_data=True).ok
    plain = shard_dataset(spec, str(tmp_path / "plain"))
    assert "source_sha256" not in open_dataset(str(tmp_path / "plain")).index(plain.shards[0]).column_names
