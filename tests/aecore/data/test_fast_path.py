"""Images that go straight from their files into a tar, in C and in Python: the bytes are those of the way sample by sample."""

import dataclasses
import gc
import hashlib
import io
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aecore import native
from aecore.data.dataset import open_dataset
from aecore.data.format.tar import BLANK, Samples, headers, stored_size
from aecore.data.manifest import DatasetManifest
from aecore.data.read.verify import verify_dataset
from aecore.data.sources.folder import FolderSpec
from aecore.data.write import fast_path, pack
from aecore.data.write.job import shard_dataset
from aecore.data.write.pack import ShardWriter
from aecore.data.write.plan import plan_dataset
from aecore.data.write.spec import ShardSpec
from aecore.data.write.splits import SplitSpec
from aecore.errors import DataError, StoreError
from aecore.native.bytes_column import BytesColumn
from aecore.native.loops import StreamHash, examine
from aecore.native.tar_builder import TarBuilder, TarFiles, open_tar_builder
from aecore.registry import SOURCES

START = 700  # bytes of the tar before the first sample of a builder
SIZES = (0, 1, 300, 511, 512, 513, 1024, 3500, 3584, 3585, 4095, 4096, 4097, 8192, 12_345, 70_000)  # of what stands behind an image


@pytest.fixture(params=["compiled", "python"], autouse=True)
def way(request, monkeypatch):
    """Every test runs with the compiled loops, where they are built, and with their twin."""
    if request.param == "python":
        monkeypatch.setattr(native, "_library", lambda: None)
    elif not native.available():
        pytest.skip("the compiled loops are not built here")
    return request.param


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(fast_path, "BLOCK_FILES", 5)
    monkeypatch.setattr(fast_path, "BLOCK_BYTES", 40_000)
    monkeypatch.setattr(fast_path, "MOST_BYTES", 100_000)


@pytest.fixture
def taken(monkeypatch):
    """How many blocks each run took."""
    found, take = list[int](), ShardWriter._write_fast
    monkeypatch.setattr(ShardWriter, "_write_fast", lambda *args: found.append(take(*args)) or found[-1])
    return found


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Listings have the states of young files too, so that two data sets of the same files are equal whenever they are made."""
    monkeypatch.setattr("aecore.store._states.YOUNG_NS", 0)


def encoded(number: int, kind: str = "PNG", side: int = 0) -> bytes:
    file, random = io.BytesIO(), np.random.default_rng(number)
    pixels = random.integers(0, 256, (side or 3 + number % 5, 6, *((3,) if number % 3 == 0 else ())), np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def images(root: Path, count: int, seed: int = 0) -> list[Path]:
    """Write images of many sizes and three classes; some bytes follow the end of a PNG, which is no fault of it."""
    random, paths = np.random.default_rng(seed), []
    for number in range(count):
        kind = str(random.choice(["png", "jpg", "jpeg"]))
        path = root / f"train/{number % 3}/{number:03d}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        behind = random.bytes(int(random.choice(SIZES))) if kind == "png" else b""
        path.write_bytes(encoded(number, "PNG" if kind == "png" else "JPEG") + behind)
        paths.append(path)
    return paths


def written(root: Path, out: Path, **options) -> tuple[DatasetManifest, dict[str, bytes]]:
    manifest = shard_dataset(FolderSpec(url=str(root), **options), str(out), shards=ShardSpec(max_samples=60, max_bad=0.5))
    assert verify_dataset(open_dataset(str(out)), read_data=True).ok
    files = [path for path in sorted(out.rglob("*")) if path.is_file() and not path.match("run.*.json")]
    paths = [path for path in files if not {"records", "report"} & {*path.parts}]  # they hold seconds
    return manifest, {path.relative_to(out).as_posix(): path.read_bytes() for path in paths}


def require_same_without(root: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **options) -> DatasetManifest:
    manifest, files = written(root, out / "straight", **options)
    monkeypatch.setattr(pack, "plain_files", lambda *_: None)
    assert written(root, out / "by sample", **options) == (manifest, files)
    return manifest


@pytest.mark.parametrize("seed", range(6))
def test_plain_images_of_all_sizes_give_the_same_data_set_as_python(tmp_path, monkeypatch, taken, seed):
    images(tmp_path / "in", 150, seed)
    require_same_without(tmp_path / "in", tmp_path, monkeypatch)
    assert sum(taken) > 30 and len(taken) == 3, "each shard was taken in one run"


def test_images_in_no_class_have_no_label_member(tmp_path, monkeypatch, taken):
    (tmp_path / "in").mkdir()
    for number in range(40):
        (tmp_path / f"in/{number}.png").write_bytes(encoded(number))
    manifest = require_same_without(tmp_path / "in", tmp_path, monkeypatch)
    assert manifest.classes == () and taken == [8]


def test_names_of_any_bytes_and_capital_endings_are_read(tmp_path, monkeypatch, taken):
    (tmp_path / "in").mkdir()
    for number, name in enumerate([b"\xff\xfe.png", "ü.png".encode(), b"A.PNG", b"b.JPG", b"c.JPEG", b"d e.jpeg", b"f.g.png"]):
        with open(os.fsencode(tmp_path) + b"/in/" + name, "wb") as file:
            file.write(encoded(number, "PNG" if b"p" in name.lower()[-3:-2] and b"png" in name.lower() else "JPEG"))
    assert require_same_without(tmp_path / "in", tmp_path, monkeypatch).num_samples() == 7
    assert sum(taken) == 2


def spoil(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "cut":
        path.write_bytes(data[: len(data) // 3])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "flipped":
        path.write_bytes(data[:20] + bytes([data[20] ^ 1]) + data[21:])
    elif how == "other format":  # a PNG named .jpg and a JPEG named .png
        path.write_bytes(encoded(7, "JPEG" if path.suffix == ".png" else "PNG"))
    elif how == "kind that only Pillow reads":
        path.rename(path.with_suffix(".webp"))
        path.with_suffix(".webp").write_bytes(encoded(8, "WEBP"))
    elif how == "array":
        path.unlink()
        np.save(path.with_suffix(".npy"), np.zeros((4, 6), np.uint8))
    elif how == "larger than a block":
        path.write_bytes(encoded(9, "JPEG" if path.suffix != ".png" else "PNG", side=20) + bytes(50_000 if path.suffix == ".png" else 0))
    elif how == "larger than all blocks" and path.suffix == ".png":
        path.write_bytes(encoded(9) + bytes(200_000))
    elif how == "fifo":
        path.unlink()
        os.mkfifo(path)
    elif how == "folder":
        path.unlink()
        path.mkdir()
        (path / "inside.png").write_bytes(encoded(3))


FORMS = ("other format", "kind that only Pillow reads", "array", "larger than a block", "larger than all blocks")


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long), 2])
@pytest.mark.parametrize("how", ["cut", "empty", "flipped", *FORMS, "fifo", "folder"])
def test_what_is_not_plain_changes_nothing_else(tmp_path, monkeypatch, taken, how, seed):
    paths = images(tmp_path / "in", 150, seed)
    for number in np.random.default_rng(seed).choice(150, 1 + 9 * seed, replace=False).tolist():
        spoil(paths[number], how)
    manifest = require_same_without(tmp_path / "in", tmp_path, monkeypatch, extensions=("jpeg", "jpg", "npy", "png", "webp"))
    assert sum(shard.samples + shard.quarantined for shard in manifest.shards) == 150
    assert any(taken), "the rest went straight"


@pytest.mark.parametrize("how", ["gone", "grown", "grown by a page", "shrunk", "folder", "fifo", "unreadable link"])
def test_files_that_change_after_they_were_listed_are_taken_as_they_are_and_those_that_are_gone_are_not_judged(tmp_path, monkeypatch, how):
    monkeypatch.setattr("aecore.store._again.FIRST_PAUSE_S", 0.001)
    unreadable = how in ("gone", "folder", "unreadable link")

    def change(root: Path) -> None:
        for path in sorted(root.rglob("*.png"))[:: 7 if how != "gone" else 20]:
            data = path.read_bytes()
            if how.startswith("grown"):
                path.write_bytes(data + bytes(1 if how == "grown" else 4096))
            elif how == "shrunk":
                path.write_bytes(encoded(1))
            else:
                path.unlink()
                if how == "folder":
                    path.mkdir()
                elif how == "fifo":
                    os.mkfifo(path)
                elif how == "unreadable link":
                    path.symlink_to("nowhere")

    def changing(root: Path) -> None:
        plan = pack.plain_files
        done = list[bool]()

        def first_change(*args):
            if not done:
                done.append(True)
                change(root)
            return plan(*args)

        monkeypatch.setattr(pack, "plain_files", first_change)

    def without_plain(plan):
        return lambda *args: plan(*args) and None

    results = []
    for loops in ("straight", "by sample"):
        images(tmp_path / loops / "in", 150, 1)
        with monkeypatch.context() as patch:
            monkeypatch, kept = patch, monkeypatch
            changing(tmp_path / loops / "in")
            if loops != "straight":
                patch.setattr(pack, "plain_files", without_plain(pack.plain_files))
            if unreadable:
                with pytest.raises(StoreError, match="it was there when the source was listed"):
                    written(tmp_path / loops / "in", tmp_path / loops / "out")
                assert not (tmp_path / loops / "out/quarantine").exists()
            # what is gone is not listed the next time
            manifest, files = written(tmp_path / loops / "in", tmp_path / loops / "out")
            files = {name: data for name, data in files.items() if not name.startswith(("dataset.", "listings/"))}
            manifest = dataclasses.replace(manifest, claim_sha256=None, listings=())  # which cover the states of files
            results.append((manifest, files))
            monkeypatch = kept
    assert results[0] == results[1]


def test_few_blocks_are_read_in_vain_where_many_are_unusual(tmp_path, monkeypatch):
    paths = images(tmp_path / "in", 300)
    for path in paths[::5]:
        spoil(path, "cut")
    blocks = list[int]()
    monkeypatch.setattr(TarBuilder, "__init__", _counting(TarBuilder.__init__, blocks))
    shard_dataset(FolderSpec(url=str(tmp_path / "in")), str(tmp_path / "out"), shards=ShardSpec(max_samples=300, max_bad=0.5))
    assert sum(blocks[1:]) <= 2 * 60 and min(blocks) == 1


def _counting(begin, blocks: list[int]):
    def counted(self, files, stream, tail):
        blocks.append(len(files.blocks) - 1)
        begin(self, files, stream, tail)

    return counted


def test_an_error_on_the_way_ends_the_threads_and_closes_the_files(tmp_path, monkeypatch):
    images(tmp_path / "in", 100)
    written(tmp_path / "in", tmp_path / "first")  # libraries start their threads
    before = threading.active_count(), len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")) + 1  # one may be ending

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(StoreError, match="No space left"):
        shard_dataset(FolderSpec(url=str(tmp_path / "in")), str(tmp_path / "out"))
    after = threading.active_count(), len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
    assert after[:2] == before[:2] and after[2] <= before[2]


def test_a_builder_that_is_left_early_ends(tmp_path, way):
    def threads() -> int:  # a thread of Python is gone for the kernel a little later
        return len(os.listdir("/proc/self/task")) if way == "compiled" else threading.active_count()

    paths = images(tmp_path / "in", 100)
    for number_of_blocks in (0, 1, 3):
        before = threads()
        with _builder_of(paths) as builder:
            for _ in range(number_of_blocks):
                assert builder.next_block() is not None
                builder.submit()
            if number_of_blocks or way == "compiled":
                assert threads() > before
        assert threads() == before


def _builder_of(paths: list[Path]) -> TarBuilder:

    sizes = np.array([path.stat().st_size for path in paths])
    starts = np.concatenate([[0], np.cumsum(stored_size(sizes))])
    folder = os.open("/", os.O_RDONLY)
    paths_in = BytesColumn.from_texts(os.fsencode("\0".join(str(path)[1:] for path in paths) + "\0"))
    names = BytesColumn.from_texts("".join(f"{path.stem}.png\0" for path in paths).encode())
    blocks = np.arange(0, len(paths) + 1, 10)
    begins = starts[:-1] + 512
    files = TarFiles(folder, paths_in, names, np.full(len(paths), -1, np.int32), starts, begins, begins + sizes, blocks, BLANK)
    return open_tar_builder(files, StreamHash(), b"")


def test_what_is_unusual_all_along_is_not_tried_again_and_again(tmp_path, monkeypatch, taken):
    for path in images(tmp_path / "in", 180):
        spoil(path, "cut")
    (tmp_path / "in/train/0/good.png").write_bytes(encoded(1))
    with pytest.raises(DataError, match="of 181 samples are bad"):
        shard_dataset(FolderSpec(url=str(tmp_path / "in")), str(tmp_path / "out"), shards=ShardSpec(max_samples=200))
    assert taken == [0] * pack.IN_VAIN


def test_an_interrupt_right_after_the_threads_have_begun_ends_them(tmp_path, way):
    """A signal's exception comes when the compiled function has returned and its result is not used yet."""
    if way == "python":
        pytest.skip("only compiled threads begin on entering")
    paths, tasks = images(tmp_path / "in", 100), len(os.listdir("/proc/self/task"))
    run = _builder_of(paths)
    library = run._library

    class Interrupted:
        def __getattr__(self, name):
            return getattr(library, name)

        def aecore_builder_start(self, *args):
            library.aecore_builder_start(*args)
            raise KeyboardInterrupt

    run._library = Interrupted()
    with pytest.raises(KeyboardInterrupt), run:
        pass
    del run
    gc.collect()
    assert len(os.listdir("/proc/self/task")) <= tasks  # threads of earlier tests may have ended meanwhile


def test_few_descriptors_are_enough_also_for_files_that_are_not_in_memory(tmp_path):
    images(tmp_path / "in", 150)
    script = """
import os, pickle, resource, sys
from pathlib import Path
from aecore.data.write.pack import ShardWriter
from aecore.data.write.plan import plan_dataset
from aecore.data.write.fast_path import plain_files
from aecore.registry import SOURCES
import aecore.data.sources.folder
task = pickle.load(open(sys.argv[1], "rb"))
source = SOURCES.build(task.source)
assert plain_files(source, task) is not None
os.sync()
for spare in map(int, sys.argv[3:]):
    for path in Path(task.source.url).rglob("*.*"):
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)
    free = os.open("/", os.O_RDONLY)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + spare, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    pack = ShardWriter(task)
    pack.write(Path(f"{sys.argv[2]}{spare}"), source)
    assert not pack.bad
"""
    source = FolderSpec(url=str(tmp_path / "in"))
    listing = SOURCES.build(source).listing()
    (task,) = plan_dataset(listing, SplitSpec(by="none"), ShardSpec(), None, 1, source).tasks
    (tmp_path / "task").write_bytes(pickle.dumps(task))
    ShardWriter(task).write(tmp_path / "usual", SOURCES.build(source))
    spares = ["8", "20", "40"]
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "task"), str(tmp_path / "out"), *spares], check=True)
    for spare in spares:
        assert (tmp_path / f"out{spare}").read_bytes() == (tmp_path / "usual").read_bytes()


class TestBuilder:
    """Both builders over the same laws: what they give is computed here from the files."""

    @staticmethod
    def files(root: Path, labels: list[int], data: list[bytes], sizes: list[int] | None = None) -> TarFiles:
        """Files of these contents, five to a block, with the sizes that are expected."""
        root.mkdir(parents=True, exist_ok=True)
        names = [f"{number:03d}.png" for number in range(len(data))]
        for name, content in zip(names, data, strict=True):
            (root / name).write_bytes(content)
        expected, has_label = np.array(sizes or list(map(len, data))), np.array(labels) >= 0
        starts = START + np.concatenate([[0], np.cumsum(stored_size(expected) + 1024 * has_label)])
        begins = starts[:-1] + 512 + 1024 * has_label
        texts = BytesColumn.from_texts("".join(f"{name}\0" for name in names).encode())
        blocks = np.append(np.arange(0, len(data), 5), len(data))
        folder = os.open(root, os.O_RDONLY)
        return TarFiles(folder, texts, texts, np.array(labels, np.int32), starts, begins, begins + expected, blocks, BLANK)

    @staticmethod
    def built(files: TarFiles, tail: bytes) -> tuple[bytes, TarBuilder]:
        stream, pages = StreamHash(), list[bytes]()
        with open_tar_builder(files, stream, tail) as builder:
            while (rows := builder.next_block()) is not None:
                assert rows == slice(*files.blocks[builder.submitted : builder.submitted + 2].tolist())
                assert builder.content(rows.start) == Path(f"/proc/self/fd/{files.folder}/{rows.start:03d}.png").read_bytes()
                builder.submit()
                if builder.submitted - builder.released > 2:
                    pages.append(bytes(builder.finished_pages()))
                    builder.release()
            while builder.released < builder.submitted:
                pages.append(bytes(builder.finished_pages()))
                builder.release()
        os.close(files.folder)
        written = b"".join(pages)
        assert stream.size == len(written) and stream.hexdigest() == hashlib.sha256(written).hexdigest()
        return written, builder

    @pytest.mark.parametrize("labelled", [True, False])
    def test_the_tar_has_every_file_at_its_place_and_every_hash(self, tmp_path, labelled):
        random = np.random.default_rng(0)
        data = [encoded(number) + random.bytes(int(random.choice(SIZES))) for number in range(33)]
        labels = [int(label) for label in random.integers(-1, 1000, 33)] if labelled else [-1] * 33
        tail = random.bytes(START)
        written, builder = self.built(self.files(tmp_path / "in", labels, data), tail)
        samples = Samples([f"{number:03d}" for number in range(33)], ["png"], BytesColumn.from_bytes(data), np.array(labels, np.int32))
        names, contents = samples.members()
        blocks = headers(names, np.array([len(content) for content in contents]))
        expected = tail + b"".join(
            block.tobytes() + content + bytes(-len(content) % 512) for block, content in zip(blocks, contents, strict=True)
        )
        assert written + builder.tail[: len(expected) - len(written)].tobytes() == expected
        assert [digest.tobytes() for digest in builder.digests] == [hashlib.sha256(content).digest() for content in data]
        assert builder.facts.tobytes() == examine(BytesColumn.from_bytes(data)).tobytes()

    @pytest.mark.parametrize("row", [0, 4, 5, 17, 32])
    @pytest.mark.parametrize("what", ["no image", "other size", "gone"])
    def test_it_ends_before_the_block_of_a_file_that_is_not_as_expected(self, tmp_path, row, what):
        data = [encoded(number) for number in range(33)]
        sizes = [len(content) for content in data]
        if what == "no image":
            data[row] = bytes(sizes[row])
        elif what == "other size":
            sizes[row] += 1
        files = self.files(tmp_path / "in", [-1] * 33, data, sizes)
        if what == "gone":
            (tmp_path / f"in/{row:03d}.png").unlink()
        _, builder = self.built(files, bytes(START))
        assert builder.submitted == row // 5

    @pytest.mark.parametrize("field", ["paths", "names", "labels", "begins", "blocks"])
    def test_columns_that_do_not_fit_each_other_are_refused(self, tmp_path, field):
        files = self.files(tmp_path / "in", [-1] * 9, [encoded(number) for number in range(9)])
        with pytest.raises(AssertionError, match="every file has"):
            open_tar_builder(dataclasses.replace(files, **{field: getattr(files, field)[:-1]}), StreamHash(), b"")
        unended = BytesColumn(files.names.data[:-1], files.names.begins, files.names.ends)
        with pytest.raises(AssertionError, match="zero byte"):
            open_tar_builder(dataclasses.replace(files, names=unended), StreamHash(), b"")
        os.close(files.folder)
