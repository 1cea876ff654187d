"""JPEGs that lack a part of their pixels are refused alike by the check, training and encoding; the walk over segments."""

import functools
import io
import itertools
import re
import struct
from collections import Counter

import imagecodecs
import numpy as np
import pytest
import simplejpeg
import tifffile
from PIL import Image

from aecore.data.dataset import open_dataset
from aecore.data.format import jpeg as jpeg_module
from aecore.data.format import pixels as pixels_module
from aecore.data.format.bad_sample import BadSample
from aecore.data.format.decode import DecodeError, Decoder, Reading
from aecore.data.format.image import image_header
from aecore.data.format.jpeg import clean_pixels, is_whole_jpeg, jpeg_segments, jpeg_size
from aecore.data.format.sample_format import SampleFormat
from aecore.data.read.loader import InputSpec, Loader
from aecore.data.sources.folder import FolderSpec
from aecore.data.write.convert import prepare
from aecore.data.write.job import shard_dataset
from aecore.data.write.spec import ShardSpec
from aecore.errors import DataError
from tests.aecore.data.forms import exif, noise, saved, smooth, upright

KINDS = {
    "baseline": {},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_blocks": 2},
    "optimized": {"optimize": True},
    "turned": {"exif": exif(6)},
}


def picture(random: np.random.Generator, mode: str, **options) -> bytes:
    height, width = random.integers(1, 60, 2).tolist()
    kind = noise if random.random() < 0.5 else smooth
    extra = {"subsampling": int(random.integers(3))} if mode == "RGB" else {}
    image = Image.fromarray(kind(random, height, width, 3)).convert(mode)
    return saved(image, "JPEG", quality=int(random.integers(30, 97)), **options, **extra)


def damaged(random: np.random.Generator, data: bytes) -> bytes:
    """Return a JPEG with one of the faults that transfers and tools leave in the data of scans."""
    start = data.index(b"\xff\xda")
    at, count = int(random.integers(start + 10, len(data) - 2)), int(random.integers(1, 200))
    ways = [
        lambda: data[:at] + b"\xff\xd9",  # the end is lost, the end marker is there
        lambda: data[:at],
        lambda: data[:at] + bytes(min(count, len(data) - 2 - at)) + data[at + count :],
        lambda: data[:at] + data[at + count :],
        lambda: data[:-2] + bytes(count) + data[-2:],  # loses nothing
        lambda: data[:at] + bytes([data[at] ^ 1 << int(random.integers(8))]) + data[at + 1 :],
        lambda: data,
    ]
    return ways[int(random.integers(len(ways)))]()


def of_three_scans(kept: int) -> tuple[bytes, np.ndarray]:
    """A sequential JPEG with a scan for each component, of which so many are kept, and the pixels of the whole file by Pillow."""
    greys = [saved(Image.fromarray(smooth(np.random.default_rng(seed), 32, 40, 1)[..., 0]), "JPEG", quality=95) for seed in range(3)]
    segments = [[(marker, grey[at : at + size], at + size) for marker, at, size in jpeg_segments(grey)] for grey in greys]
    tables = {kind: b"".join(text for marker, text, _ in segments[0] if marker == kind) for kind in (0xE0, 0xDB, 0xC4)}
    frame = b"\xff\xc0" + struct.pack(">HBHHB", 17, 8, 32, 40, 3) + b"".join(bytes([component, 0x11, 0]) for component in (1, 2, 3))
    start = b"\xff\xd8" + tables[0xE0] + tables[0xDB] + frame + tables[0xC4]
    scans = []
    for component, grey, parts in zip((1, 2, 3), greys, segments, strict=True):
        begin = next(end for marker, _, end in parts if marker == 0xDA)
        scans.append(b"\xff\xda\0\x08\1" + bytes([component, 0, 0, 63, 0]) + grey[begin:-2])
    whole = start + b"".join(scans) + b"\xff\xd9"
    return start + b"".join(scans[:kept]) + b"\xff\xd9", np.asarray(Image.open(io.BytesIO(whole)).convert("RGB"))


def refused(data: bytes, shards: ShardSpec) -> str:
    """Return the reason why sharding refuses a file, "" if it does not."""
    try:
        prepare(data, "jpg", shards)
    except BadSample as bad:
        return bad.reason
    return ""


def decoded(data: bytes, sample: SampleFormat, decoder: str) -> np.ndarray | str:
    """Return what training and encoding read, or the reason why they refuse it."""
    try:
        return Decoder(Reading(decoder), sample).batch([data])[0]
    except DecodeError as error:
        return error.reason


class TestLostPixels:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
    def test_training_refuses_what_the_check_refuses_and_with_its_reason(self, mode, kind):
        random, seen = np.random.default_rng([len(mode), len(kind)]), Counter[str]()
        for _ in range(80):
            data = damaged(random, picture(random, mode, **KINDS[kind]))
            if refused(data, ShardSpec()):
                continue
            sample = SampleFormat.parse(image_header(data, "jpg").format_text)
            reason = refused(data, ShardSpec(check="decode"))
            seen[reason] += 1
            if reason:
                assert decoded(data, sample, "imagecodecs") == decoded(data, sample, "pillow") == reason
                assert refused(data, ShardSpec(resize=4)) == reason, "what is converted is decoded"
            else:
                pixels = decoded(data, sample, "imagecodecs")
                assert isinstance(pixels, np.ndarray)
                assert isinstance(decoded(data, sample, "pillow"), np.ndarray)
                if mode != "CMYK" and kind != "turned":
                    np.testing.assert_array_equal(pixels.squeeze(), imagecodecs.jpeg8_decode(data).squeeze())
        assert seen["truncated"] > 5 and seen[""] > 5, seen

    @pytest.mark.parametrize("bits", [12, 16])
    def test_those_of_more_than_eight_bits_too(self, bits):
        values = noise(np.random.default_rng(1), 40, 40, 1, "u2")[..., 0] >> (16 - bits)
        data = imagecodecs.jpeg8_encode(values, bitspersample=bits, lossless=bits == 16)
        sample = SampleFormat.parse(image_header(data, "jpg").format_text)
        np.testing.assert_array_equal(decoded(data, sample, "imagecodecs")[..., 0], imagecodecs.jpeg8_decode(data))
        half = data[: len(data) // 2] + b"\xff\xd9"
        assert decoded(half, sample, "imagecodecs") == decoded(half, sample, "pillow") == "truncated"

    @pytest.mark.parametrize("kept", [1, 2, 3])
    def test_a_sequential_one_needs_a_scan_of_each_component(self, kept):
        """libjpeg makes components without a scan grey and warns of nothing."""
        data, values = of_three_scans(kept)
        sample = SampleFormat.parse(image_header(data, "jpg").format_text)
        expected = "" if kept == 3 else "truncated"
        assert refused(data, ShardSpec(check="decode")) == refused(data, ShardSpec(resize=4)) == expected
        for decoder in ("imagecodecs", "pillow"):
            found = decoded(data, sample, decoder)
            assert found == expected if expected else np.array_equal(found, values)

    def test_a_progressive_one_needs_every_scan(self):
        """The sixth gives what the seventh refines: without it the picture is another, and no bit seems to be missing."""
        data = saved(Image.fromarray(smooth(np.random.default_rng(3), 64, 80, 3)), "JPEG", progressive=True)
        starts = [at for marker, at, _ in jpeg_segments(data) if marker == 0xDA] + [len(data) - 2]
        assert len(starts) == 11 and refused(data, ShardSpec(check="decode")) == ""
        for start, end in itertools.pairwise(starts):
            assert refused(data[:start] + data[end:], ShardSpec(check="decode")) in ("truncated", "decode")

    @pytest.mark.parametrize("lost", range(1, 8))
    def test_a_lost_interval_between_restart_markers_is_found(self, lost):
        data = saved(Image.fromarray(smooth(np.random.default_rng(4), 64, 80, 3)), "JPEG", restart_marker_blocks=1)
        marks = [found.start() for found in re.finditer(rb"\xff[\xd0-\xd7]", data)]
        sample = SampleFormat.parse(image_header(data, "jpg").format_text)
        for cut in (data[: marks[3]] + data[marks[3 + lost] :], data[: marks[3] + 2] + data[marks[3 + lost] :]):
            assert decoded(cut, sample, "imagecodecs") == decoded(cut, sample, "pillow") == "truncated"

    def test_the_second_picture_of_a_file_is_judged_as_the_first(self, tmp_path):
        first, second = (Image.fromarray(smooth(np.random.default_rng(seed), 64, 48, 3)) for seed in (1, 2))
        data = saved(first, "MPO", save_all=True, append_images=[second])
        for name, content in (("whole", data), ("cut", data[: -len(saved(second, "JPEG")) // 3])):
            (tmp_path / name).mkdir()
            (tmp_path / name / "a.jpg").write_bytes(content)
            source = FolderSpec(url=str(tmp_path / name), extensions=("jpg",), frames="all")
            manifest = shard_dataset(source, str(tmp_path / f"{name}-out"), shards=ShardSpec(max_bad=1.0))
            assert manifest.num_samples() == 2 - len(manifest.reasons)
            assert manifest.reasons == ({"truncated": 1} if name == "cut" else {})

    @pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
    def test_one_inside_a_tiff_is_judged_as_one_in_a_file(self, mode):
        picture = Image.fromarray(smooth(np.random.default_rng(5), 64, 80, 3)).convert(mode)
        data = saved(picture, "TIFF", compression="jpeg")
        assert refused(data, ShardSpec(check="decode")) == ""
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            page = file.pages[0]
            start, count = page.dataoffsets[0], page.databytecounts[0]
        half = data[: start + count // 2] + bytes(count - count // 2) + data[start + count :]
        sample = SampleFormat.parse(image_header(half, "tif").format_text)
        assert refused(half, ShardSpec(check="decode")) == decoded(half, sample, "imagecodecs") == decoded(half, sample, "pillow")
        assert refused(half, ShardSpec(check="decode")) == "truncated"

    def test_a_half_lost_photo_under_the_default_check_ends_training_with_the_advice(self, tmp_path):
        (tmp_path / "in").mkdir()
        for number in range(4):
            data = saved(Image.fromarray(noise(np.random.default_rng(number), 32, 32, 3)), "JPEG", quality=90)
            half = data[: len(data) * 2 // 3] + b"\xff\xd9"
            (tmp_path / "in" / f"{number}.jpg").write_bytes(half if number == 2 else data)
        source = FolderSpec(url=str(tmp_path / "in"), extensions=("jpg",))
        assert shard_dataset(source, str(tmp_path / "out"), shards=ShardSpec()).num_samples() == 4
        wanted = pytest.raises(DataError, match=r"sample '2' .*do not give all of its 32x32 pixels.*check=decode")
        with Loader(open_dataset(str(tmp_path / "out")), "train", spec=InputSpec(cache="none")) as loader, wanted:
            next(loader.range_batches(0, 4, 4))
        checked = shard_dataset(source, str(tmp_path / "checked"), shards=ShardSpec(check="decode", max_bad=0.5))
        assert (checked.num_samples(), checked.quarantined) == (3, 1)

    def test_version_1_reads_on_as_it_did(self):
        data = saved(Image.fromarray(noise(np.random.default_rng(0), 32, 32, 3)), "JPEG", quality=90)
        half = data[: len(data) * 2 // 3] + b"\xff\xd9"
        sample = SampleFormat.parse("32x32x3/RGB")
        np.testing.assert_array_equal(Decoder(Reading(pixels=1), sample).batch([half])[0], imagecodecs.jpeg8_decode(half))

    def test_whole_files_are_kept_wherever_their_bytes_are_255(self):
        random, found = np.random.default_rng(3), 0
        while found < 3:  # one file of 200
            data = saved(Image.fromarray(noise(random, 16, 16, 3)), "JPEG", quality=90)
            if data[-67] == 0xFF:
                found += 1
                assert is_whole_jpeg(data)
                prepare(data, "jpg", ShardSpec(check="decode"))

    def test_what_takes_several_decodes_to_tell_is_told_once(self, monkeypatch):
        calls = []
        monkeypatch.setattr(pixels_module, "_whole_seen", set())
        monkeypatch.setattr(pixels_module, "is_whole_jpeg", lambda data: calls.append(data) or is_whole_jpeg(data))
        data = saved(Image.fromarray(noise(np.random.default_rng(8), 32, 32, 3)), "JPEG")
        padded = data[:-2] + bytes(100) + data[-2:]
        decoder = Decoder(Reading(), SampleFormat.parse("32x32x3/RGB"))
        out = decoder.batch([padded, data, padded])
        np.testing.assert_array_equal(out, decoder.batch([data] * 3))
        assert calls == [padded]


class TestOneLibrary:
    """simplejpeg gives the pixels that imagecodecs gives: artefacts name imagecodecs as their decoder."""

    def test_both_give_the_same_pixels(self):
        random = np.random.default_rng(4)
        for _ in range(300):
            mode = str(random.choice(["L", "RGB", "CMYK"]))
            data = picture(random, mode, progressive=bool(random.integers(2)))
            np.testing.assert_array_equal(clean_pixels(data).squeeze(), imagecodecs.jpeg8_decode(data).squeeze())
        for colours in ("RGB", "YCBCR"):
            for sampling in ("444", "422", "420", "411", "440"):
                values = smooth(random, 33, 47, 3)
                data = imagecodecs.jpeg8_encode(values, outcolorspace=colours, subsampling=sampling)
                np.testing.assert_array_equal(clean_pixels(data), imagecodecs.jpeg8_decode(data))

    def test_grey_among_colours_is_another_format(self):
        grey = saved(Image.fromarray(noise(np.random.default_rng(4), 8, 8, 1)[..., 0]), "JPEG")
        assert simplejpeg.decode_jpeg(grey, "RGB").shape == (8, 8, 3)
        assert decoded(grey, SampleFormat.parse("8x8x3/RGB"), "imagecodecs") == "shape"


class TestUnusualFrames:
    @pytest.mark.parametrize("mode", ["L", "RGB"])
    def test_a_lossless_one_is_never_decoded_to_an_eighth(self, mode):
        """libjpeg does not scale it: it wrote all rows into an array for an eighth of them."""
        values = noise(np.random.default_rng(0), 256, 256, 3 if mode == "RGB" else 1)
        data = imagecodecs.ljpeg_encode(values[..., 0]) if mode == "L" else imagecodecs.jpeg8_encode(values, lossless=True)
        assert data.count(b"\xff\xc3") == 1 and clean_pixels(data, eighth=True).shape == values.shape
        sample = SampleFormat.parse(image_header(data, "jpg").format_text)
        for decoder in ("imagecodecs", "pillow"):
            np.testing.assert_array_equal(decoded(data, sample, decoder), values)

    @pytest.mark.parametrize("form", [{"progressive": True}, {"scans": 3}])
    def test_more_scans_than_any_encoder_makes_are_refused_before_decoding(self, form, monkeypatch):
        monkeypatch.setattr(jpeg_module, "_SCAN_PIXELS", 30 * 64 * 48)
        data = saved(Image.new("RGB", (64, 48), (9, 8, 7)), "JPEG", progressive="progressive" in form)
        if "scans" in form:  # one of no data for each component
            start = [at for marker, at, _ in jpeg_segments(data) if marker == 0xDA][0]
            heads = b"".join(b"\xff\xda\0\x08\1" + bytes([component, 0x11 if component > 1 else 0, 0, 63, 0]) for component in (1, 2, 3))
            data = data[:start] + heads + b"\xff\xd9"
        last = [at for marker, at, _ in jpeg_segments(data) if marker == 0xDA][-1]
        scan, before = data[last:-2], sum(marker == 0xDA for marker, _, _ in jpeg_segments(data))
        for count in (30, 31):
            many = data[:-2] + scan * (count - before) + data[-2:]
            told = f"JPEG of 64x48 pixels in {count} scans, at most 30 are read: save it again as a baseline JPEG"
            said = reasons_of_all_readers(many)
            assert [told in text for text in said] == [count > 30] * 7, said


def reasons_of_all_readers(data: bytes) -> list[str]:
    """Return for each way to decode a JPEG why it is refused, "" where it is not."""
    sample = SampleFormat.parse(image_header(data, "jpg").format_text)
    readers = [Decoder(reading, sample) for reading in (Reading(), Reading("pillow"), Reading(pixels=1))]
    checks = [ShardSpec(check="decode"), ShardSpec(check="decode", pixels=1), ShardSpec(resize=4)]
    ways = [functools.partial(reader.batch, [data]) for reader in readers]
    ways += [functools.partial(prepare, data, "jpg", shards) for shards in checks]
    ways.append(functools.partial(prepare, tiff_of_jpeg(data), "tif", ShardSpec()))
    said = []
    for way in ways:
        try:
            way()
            said.append("")
        except (BadSample, DecodeError) as error:
            said.append(f"{error.reason}: {error}")
    return said


def tiff_of_jpeg(data: bytes) -> bytes:
    """Return a TIFF whose one strip is this JPEG."""
    height, width = jpeg_size(data)[::-1]
    out = io.BytesIO()
    with tifffile.TiffWriter(out) as file:
        options = {"photometric": "ycbcr", "subsampling": (1, 1), "compression": "jpeg", "rowsperstrip": height}
        file.write(iter([data]), shape=(height, width, 3), dtype=np.uint8, metadata=None, **options)
    return out.getvalue()


class TestOrientation:
    """One rule for all that read a JPEG: the first EXIF block before its first scan."""

    @pytest.mark.parametrize("orientation", [None, 1, 8])
    @pytest.mark.parametrize("scan", [1, -1])
    def test_a_block_after_the_first_scan_turns_nothing(self, orientation, scan):
        values, before = smooth(np.random.default_rng(0), 24, 48, 3), {} if orientation is None else {"exif": exif(orientation)}
        data, block = saved(Image.fromarray(values), "JPEG", progressive=True, **before), exif(6).tobytes()
        wanted = upright(imagecodecs.jpeg8_decode(data), orientation or 1)
        at = [at for marker, at, _ in jpeg_segments(data) if marker == 0xDA][scan]
        data = data[:at] + b"\xff\xe1" + (2 + len(block)).to_bytes(2, "big") + block + data[at:]
        header = image_header(data, "jpg")
        assert (header.height, header.width) == wanted.shape[:2]
        for decoder in ("imagecodecs", "pillow"):
            np.testing.assert_array_equal(decoded(data, SampleFormat.parse(header.format_text), decoder), wanted)
            rows = Decoder(Reading(decoder), SampleFormat.parse(header.format_text)).batch([data] * 20)
            np.testing.assert_array_equal(rows, [wanted] * 20)


def naive_segments(data: bytes) -> list[tuple[int, int, int]]:
    """The segments byte by byte, by ITU-T T.81, B.1."""
    found, at, scanned = [], 2, False
    while at + 1 < len(data):
        marker = data[at + 1]
        if data[at] != 0xFF or marker in (0x00, 0x01, 0xFF, *range(0xD0, 0xD8)):
            at += 1
            continue
        if marker in (0xD8, 0xD9):
            size = 2
        elif at + 3 < len(data):
            size = 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        else:
            break
        found.append((marker, at, size))
        if marker == 0xD9 and scanned:
            break
        scanned, at = scanned or marker == 0xDA, at + size
    return found


def test_segments_are_those_of_a_byte_by_byte_walk():
    random = np.random.default_rng(6)
    for number in range(3000):
        data = bytearray(picture(random, str(random.choice(["L", "RGB"])), **KINDS[list(KINDS)[number % len(KINDS)]]))
        for _ in range(int(random.integers(0, 6))):
            at = int(random.integers(min(len(data), 700)))
            odd = int(random.choice([0, 1, 0xC0, 0xC2, 0xC4, 0xD0, 0xD8, 0xD9, 0xDA, 0xE1, 0xFF, random.integers(256)]))
            if random.random() < 0.5:
                data[at] = odd
            else:
                data[at:at] = bytes([0xFF, odd])[int(random.integers(2)) :]
        if random.random() < 0.3:
            del data[int(random.integers(len(data))) :]
        assert list(jpeg_segments(bytes(data))) == naive_segments(bytes(data)), bytes(data[:60]).hex()
    for data in (b"", b"\xff", b"\xff\xd8", b"\xff\xd8\xff", b"\xff\xd8\xff\xd9", b"\xff\xd8\xff\xda\0", random.bytes(5000)):
        assert list(jpeg_segments(data)) == naive_segments(data)


def test_headers_are_read_from_any_bytes_or_refused_with_a_reason():
    random = np.random.default_rng(7)
    whole = picture(random, "RGB")
    with Image.open(io.BytesIO(whole)) as image:
        size = image.size
    for _ in range(3000):
        data = bytearray(whole)
        at = int(random.integers(2, whole.index(b"\xff\xda")))
        data[at : at + int(random.integers(2))] = random.bytes(int(random.integers(3)))
        for version in (1, 2):
            header, reason = None, ""
            try:
                header = image_header(bytes(data), "jpg", pixels=version)
            except BadSample as bad:
                reason = bad.reason
            if header is None:
                assert reason in ("format", "truncated", "unsupported", "too_large")
            else:
                assert header.width * header.height > 0
        head = image_header(whole[:2] + b"\xff" * int(random.integers(5)) + whole[2:], "jpg")
        assert ((head.width, head.height), head.doubtful) == (size, False)
