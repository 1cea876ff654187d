"""Writing and reading shards against webdataset's own writer and reader, and against `tar cf`.

`python -m tests.benchmarks shard`. Everything is included on our side: listing, reading the files, checks, hashes, index,
fsync. It lives in processes of its own, which keep freed memory as the command and its workers do. What the sides wrote is removed
before each run, which is not timed. All sides work on the same files, in the page cache unless a row says otherwise. The peer writes and
reads the same members (image and `.cls`) without index, hashes, checks or fsync, and `tar` copies the image files alone.
"""

import functools
import hashlib
import multiprocessing
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import webdataset
from PIL import Image

from aecore.data.dataset import open_dataset
from aecore.data.format.tar import BLOCK
from aecore.data.sources.folder import FolderSpec
from aecore.data.write.job import shard_dataset
from aecore.data.write.spec import ShardSpec
from pipelines.cluster.memory import disable_malloc_trim
from tests.benchmarks.pairs import HEADER, Home, Side, compare, two_processes
from tests.realdata import unpack

PAIRS = 9


def mnist(target: Path) -> int:
    """50,000 PNGs of about 300 bytes."""
    unpack("mnist", target, train_per_class=5000, test_per_class=0)
    return 50_000


def jpeg256(target: Path) -> int:
    """24,000 JPEGs of 256x256, about 12 kB: CIFAR-10 scaled up."""
    with tempfile.TemporaryDirectory() as small, ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        unpack("cifar10", Path(small), train_per_class=2400, test_per_class=0)
        paths = list(Path(small).rglob("*.jpg"))
        return len(list(pool.map(enlarge, paths, [target / path.relative_to(small) for path in paths], chunksize=200)))


def enlarge(path: Path, large: Path) -> None:
    large.parent.mkdir(parents=True, exist_ok=True)
    Image.open(path).resize((256, 256), Image.Resampling.BICUBIC).save(large, quality=95)


def write_ours(files: Path, scratch: Path) -> None:
    shard_dataset(FolderSpec(url=str(files)), tempfile.mkdtemp(dir=scratch))


def write_ours_twice(files: Path, scratch: Path, units: int) -> None:
    out, shards = tempfile.mkdtemp(dir=scratch), ShardSpec(max_samples=units // 6 + 1)
    shard_dataset(FolderSpec(url=str(files)), out, shards=shards, fan_out=two_processes)


def write_floor(files: Path, scratch: Path) -> None:
    """The least that our promises need in Python on one core: the size of every file, its bytes, both hashes, one durable file."""
    with open(f"{tempfile.mkdtemp(dir=scratch)}/all", "wb", buffering=0) as target:
        paths, whole, chunk = list[str](), hashlib.sha256(), list[bytes]()
        for folder, _, _ in os.walk(files):
            with os.scandir(folder) as entries:
                paths += [entry.path for entry in entries if entry.is_file(follow_symlinks=False) and entry.stat().st_size]
        for number, path in enumerate(paths, 1):
            descriptor = os.open(path, os.O_RDONLY)
            data = os.read(descriptor, 1 << 17)
            os.close(descriptor)
            hashlib.sha256(data).digest()
            chunk += (bytes(BLOCK), data, bytes(-len(data) % BLOCK))
            if number % 500 == 0 or number == len(paths):
                packed = b"".join(chunk)
                whole.update(packed)
                target.write(packed)
                chunk.clear()
        os.fsync(target.fileno())


def write_peer(files: Path, scratch: Path) -> None:
    """What people write today: a walk, a class list, ShardWriter with reproducible headers."""
    paths = sorted(os.path.join(folder, name) for folder, _, names in os.walk(files) for name in names)
    names = sorted({path.split("/")[-2] for path in paths})
    classes = {name: str(number).encode() for number, name in enumerate(names)}
    out = tempfile.mkdtemp(dir=scratch)
    with webdataset.ShardWriter(f"{out}/train-%06d.tar", maxcount=10_000, mtime=0, verbose=0) as writer:
        for path in paths:
            with open(path, "rb") as file:
                data = file.read()
            key, _, ext = path[len(str(files)) + 1 :].rpartition(".")
            writer.write({"__key__": key, ext: data, "cls": classes[path.split("/")[-2]]})


def write_tar(files: Path, scratch: Path) -> None:
    subprocess.run(["tar", "cf", f"{tempfile.mkdtemp(dir=scratch)}/all.tar", "-C", str(files), "."], check=True)


def clean(scratch: Path) -> None:
    """Remove what all sides wrote."""
    shutil.rmtree(scratch)
    scratch.mkdir()


def forget(files: Path) -> None:
    """Take all files out of the page cache (their names and sizes stay known), as they are when they are read for the first time."""
    os.sync()  # what is not on the disk yet cannot be dropped
    for path in files.glob("*/*/*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_ours(dataset: Path) -> int:
    opened = open_dataset(str(dataset))
    return sum(1 for shard in opened.manifest.split("train") for _ in opened.reader(shard).iterate())


def read_peer(dataset: Path) -> int:
    shards = sorted(str(path) for path in (dataset / "shards").glob("*.tar"))
    return sum(1 for _ in webdataset.WebDataset(shards, shardshuffle=False))


def rows(name: str, prepare: Callable[[Path], int]) -> None:
    with tempfile.TemporaryDirectory() as folder, Home(disable_malloc_trim) as process, Home(disable_malloc_trim) as processes:
        files, scratch, dataset = (Path(folder) / part for part in ("files", "out", "dataset"))
        scratch.mkdir()
        units = prepare(files)
        shard_dataset(FolderSpec(url=str(files)), str(dataset))
        peer, tar, floor = (functools.partial(side, files, scratch) for side in (write_peer, write_tar, write_floor))
        one = process(functools.partial(write_ours, files, scratch))
        two = processes(functools.partial(write_ours_twice, files, scratch, units))

        def show(what: str, ours: Side, theirs: Side, asked: str = "", before: Side | None = None) -> None:
            before = before or functools.partial(clean, scratch)
            print(compare(f"{name}: {what}", ours, theirs, units=units, pairs=PAIRS, before=before).row(asked), flush=True)

        show("write, one process; ShardWriter(mtime=0)", one, peer, ">= 4.5")
        show("write, one process; tar cf", one, tar, ">= 0.45")
        show("write, two processes; one ShardWriter", two, peer, ">= 8")
        show("write, two processes; tar cf", two, tar, ">= 0.75")

        def cold() -> None:
            clean(scratch)
            forget(files)

        show("write files that are not in the page cache, one process; ShardWriter(mtime=0)", one, peer, before=cold)
        show("write files that are not in the page cache, one process; tar cf", one, tar, before=cold)
        show("write, one process; floor: list, read, 2 sha256, write, fsync", one, floor)
        show("read; webdataset", functools.partial(read_ours, dataset), functools.partial(read_peer, dataset), ">= 5")


def main() -> None:
    print(HEADER)
    rows("mnist", mnist)
    rows("jpeg256", jpeg256)


if __name__ == "__main__":
    main()
