"""Files of which a part is lost are refused wherever pixels are decoded, and whole ones are not: decoders only warn, or say nothing."""

import io
import struct
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from aecore.data.format.bad_sample import BadSample
from aecore.data.format.decode import DecodeError, Decoder, Reading
from aecore.data.format.pixels import decode_image
from aecore.data.format.sample_format import SampleFormat
from aecore.data.write.convert import prepare
from aecore.data.write.spec import ShardSpec
from tests.aecore.data.forms import noise, saved, smooth, tiff

RANDOM = np.random.default_rng(6)
HEIGHT, WIDTH = 64, 96
BITS = np.kron(RANDOM.random((HEIGHT // 2, WIDTH // 2)) > 0.7, np.ones((2, 2), bool))
LOST: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda data: data[: len(data) // 2],
    "zeros": lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
    "nine tenths": lambda data: data[: len(data) * 9 // 10],
    "empty": lambda _: b"",
}


def strips(data: bytes, change: Callable[[bytes], bytes], number: int) -> bytes:
    """Return a TIFF whose strip or tile of this number is changed: it goes to the end of the file, and its count says its size."""
    out = bytearray(data)
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages[0]
        tags = [page.tags[code] for code in ((324, 325) if page.is_tiled else (273, 279))]
        segment = data[page.dataoffsets[number] : page.dataoffsets[number] + page.databytecounts[number]]
    changed = change(segment)
    for tag, value in zip(tags, (len(out), len(changed)), strict=True):
        code = {3: "H", 4: "I", 16: "Q"}[int(tag.dtype)]
        struct.pack_into("<" + code, out, tag.valueoffset + number * struct.calcsize(code), value)
    return bytes(out) + changed


def refused(data: bytes, ext: str, form: str) -> None:
    """The check of sharding, a conversion, training and encoding refuse it; nothing but the error says so."""
    for options in ({"check": "decode"}, {"resize": 8}):
        with pytest.raises(BadSample, match="truncated|decode"):
            prepare(data, ext, ShardSpec(**options))
    for decoder in ("imagecodecs", "pillow"):
        with pytest.raises(DecodeError, match=r"."):
            Decoder(Reading(decoder), SampleFormat.parse(form)).batch([data])


def kept(data: bytes, ext: str) -> str:
    with warnings.catch_warnings(action="error"):
        header, same = prepare(data, ext, ShardSpec(check="decode"))
    assert same == data
    for decoder in ("imagecodecs", "pillow"):
        Decoder(Reading(decoder), SampleFormat.parse(header.format_text)).batch([data])
    return header.format_text


class TestFax:
    """What a strip of a fax lacks is white, to imagecodecs and to libtiff."""

    def fax(self, bits: np.ndarray, kind: str, rows: int, fill: int = 1, **tags: int) -> bytes:
        options = {int(name.removeprefix("t")): value for name, value in tags.items()}
        return saved(Image.fromarray(bits), "TIFF", compression=kind, tiffinfo={278: rows, 266: fill, **options})

    @pytest.mark.parametrize("lost", LOST)
    @pytest.mark.parametrize("rows", [HEIGHT, 16])
    @pytest.mark.parametrize(
        ("kind", "tags"), [("tiff_ccitt", {}), ("group3", {}), ("group3", {"t292": 4}), ("group3", {"t292": 5}), ("group4", {})]
    )
    def test_a_strip_that_ends_early_is_refused(self, kind: str, tags: dict[str, int], rows: int, lost: str) -> None:
        data = self.fax(BITS, kind, rows, **tags)
        form = kept(data, "tif")
        np.testing.assert_array_equal(decode_image(data).pixels[..., 0] > 0, BITS)
        for number in {0, HEIGHT // rows - 1}:
            refused(strips(data, LOST[lost], number), "tif", form)

    @pytest.mark.parametrize("lost", ["cut", "zeros"])
    def test_the_order_of_bits_changes_nothing(self, lost: str) -> None:
        data = bytearray(self.fax(BITS, "group4", HEIGHT, fill=2))
        with tifffile.TiffFile(io.BytesIO(bytes(data))) as file:
            assert file.pages[0].fillorder == 2
        np.testing.assert_array_equal(decode_image(bytes(data)).pixels[..., 0] > 0, BITS)
        refused(strips(bytes(data), LOST[lost], 0), "tif", kept(bytes(data), "tif"))

    @pytest.mark.parametrize("kind", ["tiff_ccitt", "group3", "group4"])
    def test_whole_ones_of_any_picture_are_kept(self, kind: str) -> None:
        """White at the end, black, lines of one pixel, with zeros or few stray bytes after the last line."""
        for seed in range(40):
            random = np.random.default_rng(seed)
            height, width = random.integers(1, 40), int(random.choice([1, 8, 9, 40, 333, 1728]))
            bits = random.random((height, width)) > random.choice([0.0, 0.1, 0.5, 0.97, 1.0])
            bits[height // 2 :] |= random.random() < 0.3  # Pillow's 1 is white
            for rows in (int(height), 7):
                data = self.fax(bits, kind, rows, **({"t292": int(random.choice([0, 1, 4, 5]))} if kind == "group3" else {}))
                for number, after in ((0, b""), (-(-int(height) // rows) - 1, bytes(20)), (0, b"stray")):
                    padded = strips(data, lambda segment, after=after: segment + after, number)
                    kept(padded, "tif")
                    np.testing.assert_array_equal(decode_image(padded).pixels[..., 0] > 0, bits)

    def test_of_cuts_anywhere_at_least_99_of_100_that_cost_pixels_are_found(self) -> None:
        lost = found = 0
        for kind in ("tiff_ccitt", "group3", "group4"):
            data = self.fax(BITS, kind, HEIGHT)
            for at in range(1, 900, 3):
                changed = strips(data, lambda segment, at=at: segment[:at], 0)
                with tifffile.TiffFile(io.BytesIO(changed)) as file:
                    try:
                        lost += int(not np.array_equal(file.asarray() == 0, ~BITS))
                    except Exception:
                        continue
                try:
                    decode_image(changed)
                except BadSample:
                    found += 1
        assert found >= 0.99 * lost > 100


class TestColoursOfTiffs:
    """Pillow converts YCbCr of TIFFs: what strips of it lack, libtiff makes up, with a line on standard error."""

    @pytest.mark.parametrize("lost", ["cut", "nine tenths", "empty"])
    @pytest.mark.parametrize("rows", [HEIGHT, 16])
    @pytest.mark.parametrize("compression", [None, "tiff_lzw", "packbits", "tiff_adobe_deflate", "zstd", "lzma"])
    def test_those_that_lack_bytes_are_refused(
        self, compression: str | None, rows: int, lost: str, capfd: pytest.CaptureFixture[str]
    ) -> None:
        picture = Image.fromarray(noise(RANDOM, HEIGHT, WIDTH, 3)).convert("YCbCr")
        data = saved(picture, "TIFF", tiffinfo={278: rows}, **({} if compression is None else {"compression": compression}))
        form = kept(data, "tif")
        for number in {0, HEIGHT // rows - 1}:
            refused(strips(data, LOST[lost], number), "tif", form)
        assert capfd.readouterr().err == ""


class TestTiffs:
    @pytest.mark.parametrize("lost", ["cut", "nine tenths", "empty"])
    @pytest.mark.parametrize("form", [{"rowsperstrip": 16}, {"rowsperstrip": HEIGHT}, {"tile": (32, 32)}], ids=["strips", "strip", "tiles"])
    @pytest.mark.parametrize("compression", [None, "lzw", "packbits", "zlib", "zstd", "lzma", "jpeg"])
    def test_those_that_lack_bytes_are_refused(self, compression: str | None, form: dict[str, Any], lost: str) -> None:
        data = tiff(smooth(RANDOM, HEIGHT, WIDTH, 3), compression=compression, photometric="rgb", **form)
        text = kept(data, "tif")
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            last = len(file.pages[0].dataoffsets) - 1
        for number in {0, last}:
            refused(strips(data, LOST[lost], number), "tif", text)

    @pytest.mark.parametrize("compression", ["lzw", "packbits", "zlib", "zstd", "lzma"])
    def test_zeros_instead_of_the_second_half_are_no_data(self, compression: str) -> None:
        data = tiff(smooth(RANDOM, HEIGHT, WIDTH, 3), compression=compression, photometric="rgb", rowsperstrip=HEIGHT)
        refused(strips(data, LOST["zeros"], 0), "tif", kept(data, "tif"))

    def test_other_compressions_are_refused_whole(self) -> None:
        """LERC, WebP, JPEG 2000, ThunderScan, the JPEG of TIFF 6.0 and others are not read: their message says what to do."""
        data = tiff(smooth(RANDOM, HEIGHT, WIDTH, 3), photometric="rgb", rowsperstrip=HEIGHT)
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            at = file.pages[0].tags[259].valueoffset
        for code in (6, 32766, 32771, 32809, 34712, 34887, 34926, 34927, 50001, 50002):
            with pytest.raises(BadSample, match="unsupported|decode"):
                prepare(data[:at] + struct.pack("<H", code) + data[at + 2 :], "tif", ShardSpec())


class TestEndsOfZeros:
    """A transfer that breaks off after the file got its size: zeros are codes of pixels to the decoder of a JPEG."""

    @pytest.mark.parametrize("options", [{}, {"progressive": True}, {"optimize": True}, {"restart_marker_rows": 1}], ids=str)
    @pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
    def test_a_jpeg_that_ends_in_zeros_instead_of_pixels_is_refused(self, mode: str, options: dict[str, Any]) -> None:
        for kind in (noise, smooth):
            data = saved(Image.fromarray(kind(RANDOM, HEIGHT, WIDTH, 3)).convert(mode), "JPEG", **options)
            form = kept(data, "jpg")
            begin = data.index(b"\xff\xda") + 14
            for share in (0.1, 0.5, 0.9):
                at = begin + int((len(data) - begin) * share)
                refused(data[:at] + bytes(max(len(data) - at, 64)), "jpg", form)
            kept(data + bytes(600), "jpg")
            kept(data[:-2] + bytes(600), "jpg")  # whole, without its end marker

    def test_one_inside_a_tiff_too(self) -> None:
        for kind in (noise, smooth):
            data = tiff(kind(RANDOM, HEIGHT, WIDTH, 3), compression="jpeg", photometric="rgb", rowsperstrip=HEIGHT)
            refused(strips(data, LOST["zeros"], 0), "tif", kept(data, "tif"))


@pytest.mark.parametrize("share", [0.4, 0.7, 0.95])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("GIF", {}),
        ("GIF", {"interlace": 0}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
    ],
    ids=str,
)
def test_a_file_that_ends_early_is_refused(name: str, options: dict[str, Any], share: float) -> None:
    for kind in (noise, smooth):
        for mode in ("L", "RGB"):
            data = saved(Image.fromarray(kind(RANDOM, HEIGHT, WIDTH, 3)).convert(mode), name, **options)
            refused(data[: int(len(data) * share)], name.lower(), kept(data, name.lower()))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_run_length_bitmap_that_ends_early_is_refused(bits: int) -> None:
    lines = []
    for row in range(HEIGHT):
        runs = [(8, (row + column) % 16 * 17) for column in range(WIDTH // 8)]
        lines.append(b"".join(bytes(run) for run in runs) + b"\0\0")
    pixels = b"".join(lines) + b"\0\1"
    palette = b"".join(bytes([level * 255 // ((1 << bits) - 1)] * 3 + [0]) for level in range(1 << bits))
    start = 54 + len(palette)
    header = struct.pack("<IiiHHIIiiII", 40, WIDTH, HEIGHT, 1, bits, 1 if bits == 8 else 2, len(pixels), 0, 0, 1 << bits, 0)
    data = b"BM" + struct.pack("<IHHI", start + len(pixels), 0, 0, start) + header + palette + pixels
    form = kept(data, "bmp")
    for share in (0.3, 0.6, 0.9):
        refused(data[: start + int(len(pixels) * share)], "bmp", form)
