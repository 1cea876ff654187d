import contextlib
import io
import struct
import zlib

import imagecodecs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_expander

from aecore.data.format.bad_sample import BadSample
from aecore.data.format.decode import DecodeError, Decoder, Reading
from aecore.data.format.image import MAX_PIXELS, image_header
from aecore.data.format.record import (
    ALLOWED_EXTENSIONS,
    NpyError,
    Sample,
    array_header,
    encode_key,
    encode_keys,
    read_npy_header,
    require_allowed,
)
from aecore.data.format.sample_format import SampleFormat
from aecore.data.format.tar import Samples, TarPacker
from aecore.data.write.convert import prepare
from aecore.data.write.spec import ShardSpec
from aecore.errors import DataError
from aecore.native.bytes_column import BytesColumn

parts = st.one_of(
    st.text(st.characters(exclude_characters="/", exclude_categories=["Cs"]), max_size=12),
    st.sampled_from(
        ["a", "A", "_a", "__a__", "a.b", "a..b", ".a", "%2E", "%", "a%2Eb", "-", "a" * 80, "a" * 81, "é" * 40, "字" * 90, "_" * 200]
    ),
)
paths = st.lists(parts, min_size=1, max_size=6).map("/".join)


def encoded(pixels: np.ndarray, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


def picture(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def as_webdataset_reads(keys: list[str]) -> list[dict]:
    """What webdataset finds in a shard of these keys, each with itself as data and its number as label."""
    packer, column = TarPacker(), BytesColumn.from_bytes([key.encode() for key in keys])
    samples = Samples(keys, ["jpeg"], column, np.arange(len(keys), dtype=np.int32))
    stream = io.BytesIO(bytes(packer(samples)) + packer.end())
    return list(group_by_keys(tar_file_expander([{"url": "x.tar", "stream": stream}])))


def reason(data: bytes, ext: str = "png") -> str:
    with pytest.raises(BadSample) as caught:
        image_header(data, ext)
    return caught.value.reason


class TestKeys:
    @settings(max_examples=300, deadline=None)
    @given(st.lists(paths, min_size=1, max_size=20, unique=True))
    def test_keys_are_different_and_come_back_through_webdataset_as_one_sample_each(self, given_paths):
        keys = [encode_key(path) for path in given_paths]
        assert len(set(keys)) == len(keys)
        read = as_webdataset_reads(keys)
        assert [sample["__key__"] for sample in read] == keys
        assert [sample["jpeg"].decode() for sample in read] == keys
        assert [int(sample["cls"]) for sample in read] == list(range(len(keys)))

    def test_a_plain_path_is_its_own_key_and_other_characters_are_percent_encoded(self):
        assert encode_key("train/Greek/character01/0709_01") == "train/Greek/character01/0709_01"
        assert encode_key("_a/b.v1/ü x") == "%5Fa/b%2Ev1/%C3%BC%20x"

    def test_long_names_keep_40_bytes_and_get_a_hash(self):
        key = encode_key("a/" + "b" * 81)
        assert key.startswith("a/" + "b" * 40 + "-") and len(key) == 2 + 40 + 1 + 32
        assert len(encode_key("/".join(["c" * 60] * 5))) == 73

    def test_a_file_named_like_a_shortened_key_does_not_collide_with_it(self):
        for path in ("b" * 81, "/".join(["c" * 60] * 5), "/".join(["d" * 80] * 2 + ["e" * 38])):
            key = encode_key(path)
            assert encode_key(key) != key

    def test_a_file_name_that_is_no_utf8_has_a_key(self):
        assert encode_key(b"a\xff".decode("utf-8", "surrogateescape")) == "a%FF"


class TestPNG:
    @pytest.mark.parametrize(("mode", "channels"), [("1", ()), ("L", ()), ("LA", (2,)), ("RGB", (3,)), ("RGBA", (4,))])
    def test_the_mode_is_what_pillow_says(self, mode, channels):
        data = encoded(picture(9, 7, *channels) > 99 if mode == "1" else picture(9, 7, *channels), "PNG")
        header = image_header(data, "png")
        assert (header.width, header.height, header.mode, header.ext) == (7, 9, mode, "png")
        assert Image.open(io.BytesIO(data)).mode == mode

    def test_sixteen_bits_and_palettes_are_told_apart(self):
        assert image_header(encoded(np.full((4, 4), 300, np.uint16), "PNG"), "png").format_text == "4x4x1/I;16"
        palette = io.BytesIO()
        Image.fromarray(picture(4, 4, 3)).quantize(5).save(palette, "PNG")
        assert image_header(palette.getvalue(), "png").format_text == "4x4x3/P"

    def test_every_truncation_and_every_flipped_bit_is_found(self):
        data = encoded(picture(8, 8), "PNG")
        image_header(data, "png")
        for end in range(len(data)):
            reason(data[:end])
        for bit in range(8 * len(data)):
            damaged = bytearray(data)
            damaged[bit // 8] ^= 1 << bit % 8
            reason(bytes(damaged))

    def test_an_empty_file_and_no_image_have_their_own_reasons(self):
        assert reason(b"") == "empty"
        assert reason(b"no image at all") == "decode"

    def test_a_decompression_bomb_is_refused_by_its_header(self):
        data = bytearray(encoded(picture(4, 4), "PNG"))
        data[16:24] = struct.pack(">II", 1 << 15, (MAX_PIXELS >> 15) + 1)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
        assert reason(bytes(data)) == "too_large"


class TestJPEG:
    @pytest.mark.parametrize(("mode", "shape"), [("L", (9, 7)), ("RGB", (9, 7, 3))])
    @pytest.mark.parametrize("progressive", [False, True])
    def test_size_and_mode_are_read_from_the_frame(self, mode, shape, progressive):
        header = image_header(encoded(picture(*shape), "JPEG", progressive=progressive), "jpeg")
        assert (header.width, header.height, header.mode, header.ext) == (7, 9, mode, "jpeg")

    def test_every_truncation_that_costs_pixels_is_found(self):
        data = encoded(picture(16, 16, 3), "JPEG")
        pixels = imagecodecs.jpeg8_decode(data)
        for end in range(len(data)):
            try:
                _, kept = prepare(data[:end], "jpg", ShardSpec())
            except BadSample:
                assert end < len(data) - 2
            else:
                assert (imagecodecs.jpeg8_decode(kept) == pixels).all()

    def test_every_truncation_is_found_in_version_1(self):
        data = encoded(picture(16, 16, 3), "JPEG")
        for end in range(len(data) - 1):
            with pytest.raises(BadSample):
                image_header(data[:end], "jpg", pixels=1)

    def test_bytes_after_the_end_marker_are_allowed(self):
        image_header(encoded(picture(16, 16), "JPEG") + bytes(100), "jpg")

    def test_an_end_marker_in_a_thumbnail_does_not_hide_a_truncation(self):
        thumbnail = encoded(picture(8, 8), "JPEG")
        data = encoded(picture(16, 16), "JPEG")
        segment = b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 2) + thumbnail
        for cut in (2, 20):
            with pytest.raises(BadSample, match="truncated"):
                image_header(data[:2] + segment + data[2:-cut], "jpg", pixels=1)
        with pytest.raises(BadSample, match="truncated"):
            prepare(data[:2] + segment + data[2:-20], "jpg", ShardSpec())
        assert prepare(data[:2] + segment + data[2:-2], "jpg", ShardSpec())[0].format_text == "16x16x1/L"


class TestOtherImages:
    @pytest.mark.parametrize(("format", "ext"), [("WEBP", "webp"), ("BMP", "bmp"), ("TIFF", "tif"), ("GIF", "gif")])
    def test_the_header_is_read_by_pillow(self, format, ext):
        header = image_header(encoded(picture(9, 7), format), ext)
        assert (header.width, header.height, header.ext) == (7, 9, ext)

    def test_the_content_decides_the_extension(self):
        assert image_header(encoded(picture(8, 8), "JPEG"), "png").ext == "jpg"
        assert image_header(encoded(picture(8, 8), "PNG"), "jpeg").ext == "png"
        assert image_header(encoded(picture(8, 8), "WEBP"), "bmp").ext == "webp"


class TestArrays:
    def test_shape_and_dtype_are_read_without_numpy_load(self):
        file = io.BytesIO()
        np.save(file, np.zeros((3, 4), np.float32))
        header = array_header(file.getvalue())
        assert (header.shape, header.format_text, header.start) == ((3, 4), "3x4/float32", 128)

    def test_objects_truncations_and_rubbish_are_refused(self):
        file = io.BytesIO()
        np.save(file, np.array([{"a": 1}]), allow_pickle=True)
        with pytest.raises(BadSample, match="unsupported"):
            array_header(file.getvalue())
        file = io.BytesIO()
        np.save(file, np.zeros(5))
        for end in range(len(file.getvalue())):
            with pytest.raises(BadSample):
                array_header(file.getvalue()[:end])

    def test_an_array_is_accepted_exactly_if_training_can_decode_it(self):
        def saved(values, version=(1, 0)):
            file = io.BytesIO()
            np.lib.format.write_array(file, values, version)
            return file.getvalue()

        def headed(text, data=bytes(24), pad=64):
            return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) + pad) + text.encode() + b" " * pad + data

        grid = np.arange(6.0).reshape(2, 3)
        good = [saved(grid.astype(dtype)) for dtype in ("<f4", "<f8", "<i8", "u1", "<u2", "?", "<f2", ">f4", ">i8", ">u2")]
        good += [saved(np.float32(3)), saved(np.zeros((0, 3))), saved(np.zeros(4)), saved(grid[:, :1])]
        good += [headed(f"{{'descr': '<f4', 'fortran_order': {fortran}, 'shape': (6,)}}") for fortran in (False, True)]
        good += [saved(np.asfortranarray(grid)), saved(np.asfortranarray(grid.astype(">f4"))), saved(grid, (2, 0)), saved(grid, (3, 0))]
        bad = [saved(np.zeros(3, "M8[s]")), saved(np.zeros(3, "S4")), saved(grid.astype("<c8")), saved(grid.astype(">c16"))]
        bad += [
            headed(f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}}}")
            for descr, fortran, shape in [
                ("None", False, (3,)),
                ("'<f4'", 0, (6,)),
                ("'<f4'", False, [6]),
                ("'<f4'", False, 6),
            ]
        ]
        bad += [headed("{'descr': '<f4', 'fortran_order': False, 'shape': (6,), 'more': 1}"), headed("{'descr': '<f4', 'shape': (6,)}")]
        bad += [headed("{'descr': '<f4', 'fortran_order': False, 'shape': (6,)}", pad=10_000)]
        for data in good:
            pixels = Decoder(Reading("pillow"), SampleFormat.from_shapes({array_header(data).format_text: 1})).batch([data])
            np.testing.assert_array_equal(pixels[0], np.load(io.BytesIO(data)))
        for data in bad:
            with pytest.raises(BadSample):
                array_header(data)
        for data in bad[:4]:
            with pytest.raises(DecodeError):
                Decoder(Reading("pillow"), SampleFormat((2, 3), np.dtype("f8"), image=False)).batch([data])

    @pytest.mark.parametrize("shape", [(True, 2), (2,) + (1,) * 70])
    def test_shapes_that_no_batch_can_have_are_refused(self, shape: tuple[int, ...]):
        text = repr({"descr": "|u1", "fortran_order": False, "shape": shape}).encode()
        with pytest.raises(BadSample):
            array_header(b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + bytes(2))

    def test_what_to_do_about_the_order_is_said_in_version_1(self):
        for values, match in (
            (np.ones((2, 3), order="F"), "ascontiguousarray"),
            (np.ones(3, ">f4"), r"non-native byte order.*astype\('float32'\)"),
        ):
            file = io.BytesIO()
            np.save(file, values)
            with pytest.raises(BadSample, match=match):
                array_header(file.getvalue(), pixels=1)


class TestAllowList:
    @pytest.mark.parametrize("ext", ["pkl", "pickle", "pyd", "pth", "pt", "gz", "py", ""])
    def test_members_that_could_execute_or_inflate_are_refused_by_name(self, ext):
        with pytest.raises(DataError, match="allowed: bmp, cls, gif"):
            require_allowed(ext, "a member")
        assert ext not in ALLOWED_EXTENSIONS

    def test_the_data_member_is_the_one_that_is_no_label(self):
        assert Sample("a", {"cls": b"1", "png": b"x"}, 1).data == ("png", b"x")
        with pytest.raises(DataError, match="no data member"):
            _ = Sample("a", {"cls": b"1"}).data


PLAIN_PATHS = st.from_regex(r"[a-z0-9]{1,4}(/[a-z0-9-]{1,80}){0,3}", fullmatch=True)


@settings(max_examples=300)
@given(st.lists(st.one_of(st.text(alphabet="ab_/-.9é", max_size=12), PLAIN_PATHS), max_size=6))
def test_keys_of_many_paths_are_the_keys_of_each(paths: list[str]) -> None:
    assert encode_keys(paths) == [encode_key(path) for path in paths]


NPY_DTYPES = ["?", "u1", "<i8", ">f4", "<c16", "<U7", "S3", [("x", "<f4"), ("y", "u1", (2,))]]


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("dtype", NPY_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 5), (1, 2, 3, 4)])
def test_npy_headers_are_read_as_numpy_reads_them(version, dtype, shape):
    file = io.BytesIO(b"before")
    file.seek(6)
    values = np.zeros(shape, np.dtype(dtype), order="F")
    np.lib.format.write_array(file, values, version)
    file.seek(6)
    header = read_npy_header(file)
    assert (header.dtype, header.shape, header.fortran) == (values.dtype, shape, not values.flags.c_contiguous)
    assert (file.tell(), len(file.getvalue())) == (6 + header.start, 6 + header.start + values.nbytes)
    file.seek(6)
    with contextlib.nullcontext() if version == (1, 0) else pytest.raises(NpyError, match=f"version {version[0]}.0 of .npy is not read"):
        assert read_npy_header(file, versions=("1.0",)) == header


def test_every_damaged_byte_of_a_npy_header_is_an_npy_error_or_a_header_and_reads_no_further_than_it():
    file = io.BytesIO()
    np.save(file, np.zeros((3, 4), np.float32))
    data = file.getvalue()
    generator, refused = np.random.default_rng(0), 0
    for at in range(len(data) - 48):
        for value in generator.integers(0, 256, 4).tolist():
            changed = io.BytesIO(data[:at] + bytes([value]) + data[at + 1 :])
            try:
                assert changed.tell() <= read_npy_header(changed).start
            except NpyError:
                refused += 1
    assert refused > 200
