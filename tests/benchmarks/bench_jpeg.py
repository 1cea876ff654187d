"""What it costs to find the pixels that a JPEG lost: the decoder that training reads with against one that does not look for them.

One thread, in this process, CPU time, many short pairs. A ratio below 1 is the price: 0.80 means that decoding takes a quarter longer.
"""

import io
from functools import partial

import imagecodecs
import numpy as np
import torch
from PIL import Image

from aecore.data.format.decode import Decoder, DecoderName, Reading
from aecore.data.format.sample_format import SampleFormat
from tests.benchmarks.bench_native import cpu_pairs
from tests.benchmarks.pairs import HEADER

SIDES = {32: 1_000, 224: 60, 1024: 4}  # pixels a side: images at a time


def jpegs(side: int, count: int, progressive: bool) -> list[bytes]:
    """Colours that change slowly, with noise."""
    random, files = np.random.default_rng(0), list[bytes]()
    slow = np.linspace(0, 200, side)
    for _ in range(count):
        pixels = slow[:, None, None] / 2 + slow[None, :, None] / 2 + random.uniform(0, 55, (side, side, 3))
        file = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG", quality=90, progressive=progressive)
        files.append(file.getvalue())
    return files


def without_a_look(decoder: DecoderName, files: list[bytes], side: int) -> None:
    """Decode a batch, whatever its files lost."""
    out = np.empty((len(files), side, side, 3), np.uint8)
    for target, data in zip(out, files, strict=True):
        if decoder == "imagecodecs":
            imagecodecs.jpeg8_decode(data, out=target)
        else:
            with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
                target[...] = np.asarray(image)


def main() -> None:
    torch.set_num_threads(1)
    print(HEADER)
    decoders: tuple[DecoderName, ...] = ("imagecodecs", "pillow")
    for decoder in decoders:
        for progressive in (False, True):
            for side, count in SIDES.items():
                files, kind = jpegs(side, count, progressive), "progressive" if progressive else "baseline"
                ours = Decoder(Reading(decoder), SampleFormat((side, side, 3), np.dtype(np.uint8), image=True))
                sides = partial(ours.batch, files), partial(without_a_look, decoder, files, side)
                print(cpu_pairs(f"{decoder}, {kind} JPEG of {side} pixels a side", *sides, units=count).row(), flush=True)
