"""Each compiled loop against its twin in Python, and each path that is chosen by the processor against the plain one, on this machine.

One thread, in this process, CPU time of all threads (a shared machine disturbs it less than the clock), many short pairs. Rows of the
models compare oneDNN with torch's own product, whichever `linear_path` chooses here: a ratio below 1 in the row of the chosen one
means that the rule is wrong for this processor. The loops are wrong for it where a row is below 1.
"""

import contextlib
import functools
import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import imagecodecs
import numpy as np
import torch
from PIL import Image

from aecore import native
from aecore.data.format.decode import Decoder, Reading
from aecore.data.format.sample_format import SampleFormat
from aecore.data.format.tar import Samples, TarPacker
from aecore.data.sources.folder import FolderSpec
from aecore.data.write.job import shard_dataset
from aecore.native.bytes_column import BytesColumn
from aecore.native.loops import StreamHash, examine, list_folder, read_pieces
from aecore.nn import _linear
from pipelines.cluster.memory import disable_malloc_trim
from tests.benchmarks.pairs import HEADER, Pairs, Side

PAIRS = 21
SIZES = {"300 bytes": (300, 10_000), "12 kB": (12_000, 500)}


def in_python(side: Side) -> Side:
    """Return the side without the compiled loops."""

    def without() -> None:
        with mock.patch.object(native, "_library", return_value=None):
            side()

    return without


def cpu_pairs(name: str, ours: Side, theirs: Side, *, units: int, pairs: int = PAIRS) -> Pairs:
    """Run both sides in turn and take the CPU time of this process."""
    seconds: dict[Side, list[float]] = {ours: [], theirs: []}
    for number in range(-1, pairs):
        for side in (ours, theirs) if number % 2 == 0 else (theirs, ours):
            begun = time.process_time()
            side()
            if number >= 0:  # the first is not counted
                seconds[side].append(time.process_time() - begun)
    return Pairs(name, units, tuple(seconds[ours]), tuple(seconds[theirs]))


def column(size: int, count: int) -> BytesColumn:
    data = np.random.default_rng(0).integers(0, 256, size * count, np.uint8)
    ends = np.arange(1, count + 1) * size
    return BytesColumn(data, ends - size, ends)


def pngs(count: int) -> list[bytes]:
    """28x28 grey images of about 300 bytes, as MNIST's."""
    random, files = np.random.default_rng(0), list[bytes]()
    for _ in range(count):
        pixels = np.zeros((28, 28), np.uint8)
        pixels[6:22, 10:18] = random.integers(0, 256, (16, 8)) // 16 * 16
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        files.append(file.getvalue())
    return files


@contextlib.contextmanager
def folder_of(files: list[bytes]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="bench-native-") as scratch:
        for number, data in enumerate(files):
            path = Path(scratch) / f"files/{number % 10}/{number:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        yield Path(scratch)


def loops() -> Iterator[Pairs]:
    """Compiled, and not compiled."""

    def row(name: str, side: Side, units: int, pairs: int = PAIRS) -> Pairs:
        return cpu_pairs(f"{name}; in Python", side, in_python(side), units=units, pairs=pairs)

    for name, (size, count) in SIZES.items():
        messages = column(size, count)
        stream = messages.data.tobytes()[: len(messages.data) // 64 * 64]

        def hashed(stream: bytes = stream, messages: BytesColumn = messages) -> None:
            StreamHash().update(stream, messages)

        yield row(f"sha256 of a stream and of messages of {name}", hashed, count)
    files = pngs(10_000)
    images = BytesColumn.from_bytes(files)
    yield row("examine images of 300 bytes", functools.partial(examine, images), len(files))
    samples = Samples([f"{number:05d}" for number in range(len(files))], ["png"], images, np.zeros(len(files), np.int32))
    yield row("pack images of 300 bytes into a tar", lambda: TarPacker()(samples), len(files))
    with folder_of(files) as scratch:
        folder = os.open(scratch / "files/0", os.O_RDONLY)
        yield row("list a folder", functools.partial(list_folder, folder), len(files) // 10)
        os.close(folder)
        (scratch / "joined").write_bytes(images.data.tobytes())
        joined = os.open(scratch / "joined", os.O_RDONLY)
        order = np.random.default_rng(0).permutation(len(files))
        yield row("read pieces of 300 bytes", lambda: read_pieces(joined, images.begins[order], images.sizes[order]), len(files))
        os.close(joined)

        def sharded() -> None:
            shard_dataset(FolderSpec(url=str(scratch / "files")), tempfile.mkdtemp(dir=scratch))

        yield row("shard 10,000 images of 300 bytes, everything included", sharded, len(files), pairs=9)
    decoder = Decoder(Reading("imagecodecs"), SampleFormat((28, 28, 1), np.dtype(np.uint8), image=True))
    decode = functools.partial(decoder.batch, images)
    yield cpu_pairs("decode a batch of 28x28 PNGs; imagecodecs, called for each", decode, in_python(decode), units=len(files))

    def bare() -> None:
        for file in files:
            imagecodecs.png_decode(file)

    yield cpu_pairs("decode a batch of 28x28 PNGs; a bare loop over imagecodecs", decode, bare, units=len(files))


def products() -> Iterator[Pairs]:
    """oneDNN, and torch's own product."""
    for rows, inputs, outputs in ((128, 784, 256), (128, 256, 256), (512, 784, 256), (128, 3072, 512)):
        torch.manual_seed(0)
        layer, x, gradient = _linear.Linear(inputs, outputs), torch.randn(rows, inputs, requires_grad=True), torch.randn(rows, outputs)

        def step(name: str, layer: _linear.Linear = layer, x: torch.Tensor = x, gradient: torch.Tensor = gradient) -> None:
            with mock.patch.object(_linear, "linear_path", functools.partial(_linear.LinearPath, name, "in this benchmark")):
                for _ in range(50):
                    layer(x).backward(gradient)

        title = f"linear layer {rows} x {inputs} to {outputs}, forward and backward: oneDNN; torch's own"
        yield cpu_pairs(title, functools.partial(step, "onednn"), functools.partial(step, "torch"), units=50 * rows)


def main() -> None:
    torch.set_num_threads(1)
    disable_malloc_trim()
    print(f"compiled loops: {native.why_not() or 'used'}; linear layers: {_linear.linear_path()}")
    print(HEADER)
    groups: tuple[Callable[[], Iterator[Pairs]], ...] = (*((loops,) if native.available() else ()), products)
    for group in groups:
        for pairs in group():
            print(pairs.row(">= 1"), flush=True)


if __name__ == "__main__":
    main()
