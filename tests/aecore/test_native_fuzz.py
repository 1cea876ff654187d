"""The C code that reads untrusted bytes, built with AddressSanitizer and UBSan, on many damaged images: none leads it out of its buffers.

The images are structures that are nearly right: bytes, lengths and chunks are changed, and the checksums are made to fit again in most.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from aecore import native

SOURCE = Path(native.__file__).with_name("src") / "image.c"  # what reads the bytes of images
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g")

SCRIPT = """
import ctypes, io, struct, sys, zlib
import numpy as np
from PIL import Image

library, rounds, beyond = ctypes.CDLL(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
uncompress = ctypes.cast(ctypes.CDLL("libz.so.1").uncompress, ctypes.c_void_p)
allocate, free = ctypes.CDLL(None).malloc, ctypes.CDLL(None).free
allocate.restype, allocate.argtypes, free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
random = np.random.default_rng(int(sys.argv[4]))
LENGTHS = [0, 1, 12, 1 << 16, 1 << 31, (1 << 32) - 1, (1 << 32) - 12]


def png(mode, size, **options):
    channels = {"L": (), "LA": (2,), "RGB": (3,), "RGBA": (4,)}[mode]
    file = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (*size, *channels)).astype(np.uint8)).save(file, "PNG", **options)
    return file.getvalue()


def chunks(data):
    at, found = 8, []
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        found.append(bytearray(data[at + 4 : at + 8 + length]))
        at += length + 12
    return found


def framed(parts, checksums):
    out = bytearray(b"\\x89PNG\\r\\n\\x1a\\n")
    for part in parts:
        crc = zlib.crc32(part) if checksums else int(random.integers(1 << 32))
        length = len(part) - 4 if random.random() < 0.98 else int(random.choice(LENGTHS))
        out += struct.pack(">I", length) + part + struct.pack(">I", crc)
    return out


def mutated_png(data):
    parts = chunks(data)
    if random.random() < 0.5:  # the pixels are packed anew, so the damage reaches what is behind zlib
        rows = bytearray(zlib.decompress(bytes(parts[1][4:])))
        for _ in range(int(random.integers(0, 4))):
            rows[random.integers(len(rows))] = random.integers(256)
        if random.random() < 0.2:
            rows = rows[: random.integers(len(rows) + 1)] if random.random() < 0.5 else rows + bytes(int(random.choice([1, 70_000])))
        parts[1] = bytearray(b"IDAT" + zlib.compress(bytes(rows), int(random.integers(10))))
    for _ in range(int(random.choice([0, 0, 1, 3]))):
        part = parts[random.integers(len(parts))]
        part[random.integers(len(part))] = random.integers(256)
    if random.random() < 0.2:
        parts.insert(random.integers(len(parts) + 1), parts[random.integers(len(parts))])
    if random.random() < 0.2:
        del parts[random.integers(len(parts))]
    out = framed(parts, random.random() < 0.9)
    return bytes(out[: random.integers(len(out) + 1)] if random.random() < 0.2 else out)


def mutated(data):
    out = bytearray(data)
    for _ in range(int(random.integers(1, 6))):
        out[random.integers(len(out))] = random.choice([0, 0xFF, 0xD9, 0xDA, 0xC0, int(random.integers(256))])
    return bytes(out[: random.integers(len(out) + 1)] if random.random() < 0.5 else out)


def run(data, height, width, channels):
    place = allocate(max(len(data), 1))  # exactly so many bytes: what is read beyond them is found
    ctypes.memmove(place, data, len(data))
    pixels = allocate(height * width * channels)
    begin, end = (ctypes.c_int64 * 1)(0), (ctypes.c_int64 * 1)(len(data) + beyond)
    done, facts = (ctypes.c_uint8 * 1)(), (ctypes.c_uint8 * 12)()
    file, shape = ctypes.c_void_p(place), map(ctypes.c_int64, (height, width, channels))
    library.aecore_examine(file, begin, end, ctypes.c_int64(1), facts)
    library.aecore_decode_pngs(uncompress, file, begin, end, ctypes.c_int64(1), ctypes.c_void_p(pixels), *shape, ctypes.c_int64(0), done)
    free(place)
    free(pixels)
    return facts[0], done[0]


sizes = [(28, 28, "L"), (9, 5, "RGB"), (1, 1, "LA"), (40, 30, "RGBA")]
seeds = [(png(mode, (height, width)), height, width, {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}[mode]) for height, width, mode in sizes]
photo = io.BytesIO()
Image.fromarray(random.integers(0, 256, (16, 16, 3)).astype(np.uint8)).save(photo, "JPEG")
known = decoded = 0
for number in range(rounds):
    data, height, width, channels = seeds[number % len(seeds)]
    kind, done = run(mutated_png(data) if number % 4 else mutated(data), height, width, channels)
    known, decoded = known + (kind == 1), decoded + done
    run(mutated(photo.getvalue()), 16, 16, 3)
print(known, decoded)
"""


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """The library with sanitizers, and the environment to load it in."""
    if not native.available() or shutil.which("gcc") is None:
        pytest.skip("no compiled loops here, or no gcc")
    runtime = subprocess.run(["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip("this gcc has no AddressSanitizer")
    library = tmp_path_factory.mktemp("sanitized") / "native.so"
    subprocess.run(["gcc", *SANITIZERS, "-O1", "-fPIC", "-shared", "-o", library, SOURCE], check=True)
    options = {"ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0", "UBSAN_OPTIONS": "print_stacktrace=1", "PYTHONMALLOC": "malloc"}
    return library, {**os.environ, **options, "LD_PRELOAD": runtime}


def fuzz(sanitized: tuple[Path, dict[str, str]], rounds: int, *, beyond: int = 0, seed: int = 0) -> subprocess.CompletedProcess[str]:
    library, environment = sanitized
    arguments = [str(library), str(rounds), str(beyond), str(seed)]
    return subprocess.run([sys.executable, "-c", SCRIPT, *arguments], env=environment, capture_output=True, text=True, timeout=120)


def test_damaged_images_lead_the_c_code_out_of_no_buffer(sanitized):
    done = fuzz(sanitized, 4000)
    assert done.returncode == 0, done.stderr[-4000:]
    known, decoded = map(int, done.stdout.split())
    assert 400 < decoded < known < 3700, "some reach the pixels, some do not"


def test_reading_beyond_a_buffer_is_found(sanitized):
    done = fuzz(sanitized, 200, beyond=64)
    assert done.returncode != 0 and "AddressSanitizer: heap-buffer-overflow" in done.stderr, done.stderr[-2000:]
