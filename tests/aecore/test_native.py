import hashlib
import io
import os
import re
import shutil
import struct
import zlib
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
from PIL import Image

from aecore import native
from aecore.data.format.bad_sample import BadSample
from aecore.data.format.decode import DecodeError, Decoder, Reading
from aecore.data.format.image import ImageHeader, image_header
from aecore.data.format.sample_format import SampleFormat
from aecore.data.sources.folder import FolderSpec
from aecore.data.write.job import shard_dataset
from aecore.data.write.spec import ShardSpec
from aecore.native import loops
from aecore.native.bytes_column import BytesColumn

compiled = pytest.mark.skipif(not native.available(), reason="the compiled loops are not built here")
EDGES = (0, 1, 54, 55, 56, 57, 63, 64, 65, 119, 120, 127, 128, 1000, 12_345)  # around the ends of blocks and of their padding


def without(monkeypatch) -> None:
    monkeypatch.setattr(native, "_library", lambda: None)


def encoded(size: tuple[int, int], mode: str = "L", **options) -> bytes:
    file = io.BytesIO()
    channels = {"L": (), "RGB": (3,), "CMYK": (4,), "RGBA": (4,), "LA": (2,), "I;16": ()}[mode]
    dtype = np.uint16 if mode == "I;16" else np.uint8
    pixels = np.random.default_rng(sum(size)).integers(0, 256, (*size[::-1], *channels)).astype(dtype)
    image = Image.fromarray(pixels) if mode != "CMYK" else Image.fromarray(pixels, "CMYK")
    image.save(file, **options)
    return file.getvalue()


def test_this_machine_has_the_compiled_loops_where_it_can():
    """They are optional for users, but a build that broke must not go unnoticed here."""
    info = Path("/proc/cpuinfo")
    if not info.exists() or "sha_ni" not in info.read_text() or os.environ.get("AECORE_NATIVE") == "0" or shutil.which("cc") is None:
        pytest.skip("no SHA instructions, no C compiler, or not wanted")
    assert native.available()


class TestHashes:
    @pytest.fixture(params=["compiled", "python"], autouse=True)
    def _loops(self, request, monkeypatch):
        if request.param == "python":
            without(monkeypatch)
        elif not native.available():
            pytest.skip("the compiled loops are not built here")

    @pytest.mark.parametrize("seed", range(40))
    def test_messages_of_all_sizes_have_the_hashes_of_hashlib(self, seed):
        random = np.random.default_rng(seed)
        messages = [random.bytes(int(random.choice(EDGES))) for _ in range(random.integers(0, 100))]
        expected = [hashlib.sha256(message).hexdigest() for message in messages]
        assert [bytes(digest).hex() for digest in loops.sha256s(BytesColumn.from_bytes(messages))] == expected

    @pytest.mark.parametrize("seed", range(40))
    def test_a_stream_beside_messages_has_the_hash_of_hashlib(self, seed):
        random, stream, plain = np.random.default_rng(seed), loops.StreamHash(), hashlib.sha256()
        for _ in range(random.integers(0, 6)):
            messages = [random.bytes(int(random.choice(EDGES))) for _ in range(random.integers(0, 60))]
            blocks = random.bytes(64 * int(random.choice([random.integers(0, 200), random.integers(0, 9000)])))
            plain.update(blocks)
            digests = stream.update(blocks, BytesColumn.from_bytes(messages))
            assert [bytes(digest) for digest in digests] == [hashlib.sha256(message).digest() for message in messages]
        assert stream.hexdigest() == plain.hexdigest()

    def test_the_padding_of_a_long_stream_counts_its_bits(self):
        stream, plain = loops.StreamHash(), hashlib.sha256()
        for _ in range(20):
            stream.append(bytes(1 << 20))
            plain.update(bytes(1 << 20))
        assert (stream.hexdigest(), stream.size) == (plain.hexdigest(), 20 << 20)

    def test_parts_of_blocks_are_refused(self):
        with pytest.raises(AssertionError, match="whole blocks"):
            loops.StreamHash().append(bytes(65))

    def test_the_hash_can_be_asked_for_on_the_way(self):
        stream, plain = loops.StreamHash(), hashlib.sha256()
        for _ in range(3):
            stream.append(bytes(640))
            plain.update(bytes(640))
            assert stream.hexdigest() == stream.hexdigest() == plain.hexdigest()

    @pytest.mark.parametrize(("begin", "end"), [(-1, 3), (4, 3), (0, 11), (11, 11), (0, 1 << 62)])
    def test_messages_outside_the_buffer_are_refused(self, begin, end):
        with pytest.raises(AssertionError, match="inside the buffer"):
            loops.sha256s(BytesColumn(np.zeros(10, np.uint8), np.array([begin]), np.array([end])))


class TestPieces:
    CONTENT = bytes(range(256)) * 40

    @pytest.fixture(params=["compiled", "python"])
    def read(self, request, monkeypatch, tmp_path):
        if request.param == "python":
            without(monkeypatch)
        elif not native.available():
            pytest.skip("the compiled loops are not built here")
        (tmp_path / "file").write_bytes(self.CONTENT)
        file = os.open(tmp_path / "file", os.O_RDONLY)
        yield lambda pieces: self.pieces(file, pieces)
        os.close(file)

    @staticmethod
    def pieces(file: int, places: list[tuple[int, int]]) -> list[bytes]:
        offsets, sizes = np.array(places, np.int64).reshape(-1, 2).T
        return list(loops.read_pieces(file, offsets, sizes))

    def test_pieces_come_in_the_order_asked(self, read):
        places = [(5000, 300), (0, 1), (10, 0), (4999, 302), (0, len(self.CONTENT))]
        assert read(places) == [self.CONTENT[begin : begin + size] for begin, size in places]
        assert read([]) == []

    def test_a_piece_ends_where_the_file_does(self, read):
        assert read([(10_000, 1000), (0, 3), (10_240, 5), (99_999, 5)]) == [self.CONTENT[10_000:], self.CONTENT[:3], b"", b""]

    def test_what_cannot_be_read_is_an_error(self, read, tmp_path):
        folder = os.open(tmp_path, os.O_RDONLY)
        with pytest.raises(IsADirectoryError):
            self.pieces(folder, [(0, 10)])
        os.close(folder)


def png(rows: bytes, height: int, width: int, colour: int = 0, *, depth: int = 8, pieces: int = 1, before: tuple[bytes, ...] = ()) -> bytes:
    """Return a PNG of these filtered rows, its pixels in `pieces` chunks."""
    packed = zlib.compress(rows)
    cut = -(-len(packed) // pieces)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = [b"IHDR" + header, *before, *(b"IDAT" + packed[at : at + cut] for at in range(0, len(packed), cut)), b"IEND"]
    framed = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


COLOURS = {1: 0, 2: 4, 3: 2, 4: 6}  # by channels


@compiled
class TestPixels:
    @staticmethod
    def decoded(files: list[bytes], height: int, width: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
        pixels = np.full((len(files), height, width, channels), 77, np.uint8)
        return loops.decode_pngs(BytesColumn.from_bytes(files), pixels), pixels

    @pytest.mark.parametrize("channels", COLOURS)
    @pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (7, 1), (28, 28), (13, 50)])
    def test_rows_of_all_filters_give_the_pixels_of_imagecodecs(self, height, width, channels):
        random, files = np.random.default_rng(height), list[bytes]()
        for _ in range(50):
            rows = random.integers(0, 256, (height, 1 + width * channels), np.uint8)
            rows[:, 0] = random.integers(0, 5, height)
            files.append(png(rows.tobytes(), height, width, COLOURS[channels]))
        done, pixels = self.decoded(files, height, width, channels)
        assert done.all()
        assert (pixels == np.stack([imagecodecs.png_decode(file).reshape(height, width, channels) for file in files])).all()

    def test_what_is_unusual_is_left_to_imagecodecs(self):
        plain = bytes(6 * 8)  # six rows of seven pixels
        other_filter = b"\5" + plain[1:]
        left_out = [
            png(plain, 6, 7, pieces=2),
            png(bytes(6 * 15), 6, 7, depth=16),
            png(bytes(6 * 22), 6, 7, colour=2),
            png(plain, 6, 7, colour=3, before=(b"PLTE" + bytes(768),)),
            png(bytes(6 * 2), 6, 7, depth=1),
            png(plain[:-1], 6, 7),
            png(plain + b"1", 6, 7),
            png(other_filter, 6, 7),
            png(plain, 6, 7)[:-1],
            encoded((6, 7), format="PNG"),
            encoded((7, 6), format="JPEG"),
            b"",
            b"\x89PNG\r\n\x1a\n",
        ]
        done, _ = self.decoded([png(plain, 6, 7), *left_out, encoded((7, 6), format="PNG")], 6, 7, 1)
        assert done.tolist() == [True, *[False] * len(left_out), True]

    @pytest.mark.parametrize(("height", "width"), [(256, 256), (65_536, 1), (1, 65_536)])
    def test_large_images_are_left_to_imagecodecs(self, height, width):
        done, _ = self.decoded([png(bytes(height * (width + 1)), height, width)], height, width, 1)
        assert not done.any()

    @pytest.mark.parametrize("damage", ["flipped", "cut"])
    def test_damaged_images_are_left_out_or_give_the_pixels_of_imagecodecs(self, damage):
        whole, damaged = encoded((28, 28), format="PNG"), list[bytes]()
        random = np.random.default_rng(0)
        for at in range(len(whole)):
            changed = bytearray(whole[:at] if damage == "cut" else whole)
            if damage == "flipped":
                changed[at] ^= 1 << int(random.integers(8))
            damaged.append(bytes(changed))
        done, pixels = self.decoded(damaged, 28, 28, 1)
        for row in np.flatnonzero(done):
            assert (imagecodecs.png_decode(damaged[row]) == pixels[row, ..., 0]).all()
        assert not done[:50].any()

    @pytest.mark.parametrize(
        "before",
        [(b"IHDR" + bytes(13),), (b"fdAT" + bytes(9),), (b"abcd",), (b"ABCD",), (b"tExt",), (b"PLTE" + bytes(4),), (b"IDAT",)],
        ids=lambda chunks: chunks[0][:4].decode(),
    )
    def test_chunks_that_libpng_may_refuse_are_left_to_it(self, before):
        assert not self.decoded([png(bytes(48), 6, 7, before=before)], 6, 7, 1)[0].any()

    def test_a_stream_that_reaches_further_back_than_it_says_is_left_to_libpng(self):
        data = png(bytes(28 * 29), 28, 28)
        at = data.index(b"IDAT") + 4
        size = struct.unpack(">I", data[at - 8 : at - 4])[0]
        stream = b"\x08" + bytes([31 - 0x0800 % 31]) + data[at + 2 : at + size]  # a window of 256 bytes
        chunk = b"IDAT" + stream
        changed = data[: at - 4] + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[at + size + 4 :]
        assert self.decoded([data, changed], 28, 28, 1)[0].tolist() == [True, False]

    def test_chunks_that_say_nothing_of_the_stored_pixels_change_nothing(self):
        rows = np.random.default_rng(0).integers(0, 256, (6, 8), np.uint8)
        rows[:, 0] = 0
        chunks = (b"gAMA" + struct.pack(">I", 45_455), b"tEXtTitle\0none")
        meant = png(rows.tobytes(), 6, 7, before=(*chunks, b"tRNS\0\x07")), png(rows.tobytes(), 6, 7, before=(*chunks, b"eXIf" + bytes(8)))
        done, pixels = self.decoded([png(rows.tobytes(), 6, 7, before=chunks), *meant], 6, 7, 1)
        assert done.tolist() == [True, False, False]
        assert (pixels[0, ..., 0] == rows[:, 1:]).all()
        done = loops.decode_pngs(BytesColumn.from_bytes(meant), pixels[1:], as_stored=True)
        assert done.all()
        assert (pixels[1:, ..., 0] == rows[:, 1:]).all()

    def test_batches_of_all_kinds_are_the_same_with_and_without_the_compiled_loops(self, monkeypatch):
        kinds = [("L", {}), ("RGB", {}), ("L", {"interlace": 1}), ("L", {"optimize": True})]
        files = [encoded((9, 5), mode, format="PNG", **options) for mode, options in kinds] + [encoded((9, 5), format="JPEG"), b"\x89PNG"]
        form, reports = SampleFormat((5, 9, 1), np.dtype("u1"), image=True), list[list[tuple[int, str]]]()
        batches = []
        for way in ("compiled", "python"):
            if way == "python":
                without(monkeypatch)
            bad = list[DecodeError]()
            batches.append(Decoder(Reading(), form).batch(files, bad.append))
            reports.append([(error.row, error.reason) for error in bad])
        assert reports[0] == reports[1] == [(1, "shape"), (5, "truncated")]
        good = [0, 2, 3, 4]
        assert (batches[0][good] == batches[1][good]).all()

    def test_places_outside_the_buffer_are_refused(self):
        with pytest.raises(AssertionError, match="inside the buffer"):
            loops.decode_pngs(BytesColumn(np.zeros(9, np.uint8), np.array([0]), np.array([10])), np.zeros((1, 5, 5, 1), np.uint8))


@pytest.mark.parametrize("orientation", range(10))
@compiled
def test_jpegs_that_exif_turns_are_told_from_others(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    out = io.BytesIO()
    Image.new("L", (8, 6)).save(out, "JPEG", exif=exif)
    files = [out.getvalue(), encoded((8, 6), format="JPEG"), encoded((8, 6), format="JPEG", progressive=True)]
    others = [encoded((8, 6), format="PNG"), b"", b"\xff", b"\xff\xd8", out.getvalue()[:-2], encoded((8, 7), format="JPEG")]
    others += [encoded((8, 6), "RGB", format="JPEG"), encoded((8, 6), "CMYK", format="JPEG")]
    found = loops.plain_jpegs(BytesColumn.from_bytes(files + others), 6, 8, 1).tolist()
    assert found == [0 if 2 <= orientation <= 8 else 0xC0, 0xC0, 0xC2, *[0] * len(others)]


class TestImages:
    @pytest.fixture(params=["compiled", "python"], autouse=True)
    def _loops(self, request, monkeypatch):
        if request.param == "python":
            without(monkeypatch)
        elif not native.available():
            pytest.skip("the compiled loops are not built here")

    FILES = (
        *((encoded((28, 28), mode, format="PNG"), "png") for mode in ("L", "RGB", "RGBA", "LA", "I;16")),
        *((encoded((9, 5), mode, format="JPEG"), "jpg") for mode in ("L", "RGB", "CMYK")),
        (encoded((9, 5), "RGB", format="JPEG", progressive=True), "jpeg"),
        (encoded((5, 9), "RGB", format="JPEG"), "jpeg"),
        (encoded((28, 28), "L", format="PNG") + b"after the end", "png"),
        (encoded((9, 6), "L", format="JPEG") + b"after the end", "jpg"),
        (b"\xff\xd8\xff\xff\xff" + encoded((9, 7), "L", format="JPEG")[3:], "jpg"),  # fill bytes before a marker
    )

    @staticmethod
    def facts(files: list[bytes]) -> list[tuple[int, bytes]]:
        found = loops.examine(BytesColumn.from_bytes(files))
        return [(int(fact["kind"]), fact.tobytes()) for fact in found]

    def test_plain_images_are_recognised_and_equal_facts_mean_equal_headers(self):
        headers = dict[tuple[bytes, str], object]()
        for (data, ext), (kind, fact) in zip(self.FILES, self.facts([data for data, _ in self.FILES]), strict=True):
            assert kind == (1 if ext == "png" else 2)
            assert headers.setdefault((fact, ext), image_header(data, ext)) == image_header(data, ext)
        assert len(headers) == len(self.FILES) - 1  # the last is the first with bytes after its end

    @pytest.mark.parametrize("number", range(len(FILES)))
    @pytest.mark.parametrize("damage", ["flipped", "cut", "zeroed"])
    def test_what_python_refuses_is_never_recognised(self, number, damage):
        data, ext = self.FILES[number]
        random, damaged = np.random.default_rng(number), list[bytes]()
        for at in range(len(data)):
            changed = bytearray(data[:at] if damage == "cut" else data)
            if damage == "flipped":
                changed[at] ^= 1 << int(random.integers(8))
            elif damage == "zeroed":
                changed[at] = 0
            damaged.append(bytes(changed))
        known = {self.facts([data])[0][1]: image_header(data, ext)}
        for file, (kind, fact) in zip(damaged, self.facts(damaged), strict=True):
            header = _header(file, ext)
            if kind:  # a whole file of a kind that is not read is asked about once, so its facts must be its own
                assert known.setdefault(fact, header) == header

    @compiled
    @pytest.mark.parametrize("damage", ["flipped", "cut", "zeroed", "doubled"])
    def test_both_say_the_same_of_damaged_files(self, damage, monkeypatch):
        random, damaged = np.random.default_rng(0), list[bytes]()
        for data, _ in self.FILES:
            for at in random.integers(0, len(data), 200).tolist():
                changed = bytearray(data[:at] if damage == "cut" else data)
                if damage == "flipped":
                    changed[at] ^= 1 << int(random.integers(8))
                elif damage == "zeroed":
                    changed[at] = 0
                elif damage == "doubled":
                    changed[at:at] = changed[:at]
                damaged.append(bytes(changed))
        found = self.facts(damaged)
        without(monkeypatch)
        assert self.facts(damaged) == found

    def test_garbage_is_left_to_python(self):
        random = np.random.default_rng(0)
        starts = (b"", b"\x89", b"\x89PNG\r\n\x1a\n", b"\xff\xd8", b"\xff\xd8\xff\xe0", b"RIFF")
        files = [start + random.bytes(int(size)) for start in starts for size in random.integers(0, 80, 50)]
        assert not any(kind for kind, _ in self.facts(files))


def _header(data: bytes, ext: str) -> ImageHeader | None:
    try:
        return image_header(data, ext)
    except BadSample:
        return None


IMAGES = ("png", "jpg", "webp")


@pytest.mark.parametrize(
    ("options", "extensions"),
    [
        ({}, IMAGES),
        ({"check": "decode"}, IMAGES),
        ({"mode": "RGB"}, IMAGES),
        ({}, (*IMAGES, "npy")),
        ({"check": "decode"}, (*IMAGES, "npy")),
    ],
)
def test_data_sets_are_the_same_with_and_without_the_compiled_loops(tmp_path, monkeypatch, options, extensions):
    random = np.random.default_rng(0)
    for number in range(200):
        path = tmp_path / f"files/train/{number % 3}/{number:03d}.{random.choice(['png', 'jpg'])}"
        path.parent.mkdir(parents=True, exist_ok=True)
        data = encoded((int(random.integers(3, 9)), 7), str(random.choice(["L", "RGB"])), format="PNG" if path.suffix == ".png" else "JPEG")
        path.write_bytes(data[:-9] if number in (50, 51, 199) else data)
    (tmp_path / "files/train/0/wrong.jpg").write_bytes(encoded((8, 8), "L", format="PNG"))  # named as another format
    (tmp_path / "files/train/0/other.webp").write_bytes(encoded((8, 8), "RGB", format="WEBP"))
    (tmp_path / "files/train/0/empty.png").write_bytes(b"")
    (tmp_path / "files/train/0/picture.npy").write_bytes(encoded((8, 8), "L", format="PNG"))  # an image where an array should be
    (tmp_path / "files/train/1" / ("long" * 24 + ".png")).write_bytes(encoded((8, 8), "L", format="PNG"))
    shards = ShardSpec(max_samples=70, max_bad=0.1, **options)
    source = FolderSpec(url=str(tmp_path / "files"), extensions=extensions)
    first = shard_dataset(source, str(tmp_path / "one"), shards=shards)
    without(monkeypatch)
    second = shard_dataset(source, str(tmp_path / "two"), shards=shards)
    assert first.to_json() == second.to_json()
    for path in sorted((tmp_path / "one").rglob("*.tar")) + sorted((tmp_path / "one").rglob("*.parquet")):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes(), path


def test_a_library_of_another_version_is_not_used(monkeypatch):
    monkeypatch.setattr(native, "VERSION", 0)
    assert native._load.__wrapped__()[0] is None


def test_every_change_of_the_c_code_has_another_version():
    """So a library that was built before the change is not used after it: set VERSION in native.h and native/__init__.py, then this."""
    digest = hashlib.sha256()
    for path in sorted(Path(native.__file__).with_name("src").iterdir()):
        digest.update(path.read_bytes())
    assert (native.VERSION, digest.hexdigest()) == (15, "49be95f474cabd97bd86f4d32018f506c245bbaa4d14b74347c0ace0f56ca258")


def test_no_loop_is_chosen_by_wider_vectors():
    """SHA-NI beside AVX-512 was 10 % faster on one maker's processors and 60 times slower on another's."""
    for path in Path(native.__file__).with_name("src").iterdir():
        assert not re.search(r"avx|_mm256|_mm512|__builtin_cpu_supports|getenv", path.read_text()), path


@pytest.mark.parametrize("content", [b"", b"no library", b"\x7fELF"])
def test_a_library_that_cannot_be_loaded_is_none(tmp_path, monkeypatch, content):
    (tmp_path / "_native.so").write_bytes(content)
    monkeypatch.setattr(native, "_path", lambda: tmp_path / "_native.so")
    assert native._load.__wrapped__()[0] is None


def test_an_environment_variable_leaves_it_out(monkeypatch):
    monkeypatch.setenv("AECORE_NATIVE", "0")
    assert native._load.__wrapped__()[0] is None
