"""Every form of image is stored with the pixels that it means: compared with what was written, a formula or Pillow, never with aecore."""

import contextlib
import dataclasses
import io
import json
import logging
import math
import struct
import tarfile
import time
import tracemalloc
import zlib
from collections import Counter
from types import SimpleNamespace

import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from aecore.data.dataset import open_dataset
from aecore.data.format import colour as colour_module
from aecore.data.format.bad_sample import BadSample
from aecore.data.format.colour import cmyk_to_rgb, composed, straight_alpha
from aecore.data.format.decode import Decoder, Reading
from aecore.data.format.image import _require_frames, image_header
from aecore.data.format.jpeg import is_whole_jpeg
from aecore.data.format.pixels import OpenImage
from aecore.data.format.record import array_header
from aecore.data.format.sample_format import SampleFormat
from aecore.data.format.tiff import _Form, _meant
from aecore.data.format.transform import TransformSpec
from aecore.data.read.loader import InputSpec, Loader
from aecore.data.sources import _frames as frames_module
from aecore.data.sources import reader
from aecore.data.sources.arrays import ArraysSpec
from aecore.data.sources.folder import FolderSource, FolderSpec
from aecore.data.sources.webdataset import WebdatasetSpec
from aecore.data.write import convert as convert_module
from aecore.data.write.convert import _in_range, _resized, _to_mode, prepare
from aecore.data.write.job import adopt_shards, shard_dataset
from aecore.data.write.spec import ShardSpec
from aecore.errors import ConfigError, DataError
from aecore.native.bytes_column import BytesColumn
from aecore.native.loops import examine, facts_of
from tests.aecore.data.forms import FORMS, exif, imagej_stack, noise, png_chunk, png_with, saved, smooth, tiff, upright

DECODERS = ("imagecodecs", "pillow")
RANDOM = np.random.default_rng(0)


def stored(data: bytes, ext: str, **shards) -> tuple[str, np.ndarray]:
    """Shard one file in memory and read it as training does; return its format and its pixels."""
    header, kept = prepare(data, ext, ShardSpec(**shards))
    pixels = Decoder(Reading(), SampleFormat.parse(header.format_text)).batch([kept])[0]
    if header.width is not None:
        assert (header.height, header.width) == pixels.shape[:2], "what the index says"
    return header.format_text, pixels


def twelve_bits(values: np.ndarray, **options) -> bytes:
    """A TIFF whose samples have 12 bits, two in three bytes; `values` have an even number of samples in a row."""
    whole = tiff(values, **options)
    pairs = values.reshape(-1, 2).astype(np.uint32)
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], -1).astype(np.uint8).tobytes()
    out = io.BytesIO(whole)
    with tifffile.TiffFile(io.BytesIO(whole)) as file:
        page = file.pages[0]
        samples, offset = page.samplesperpixel, page.dataoffsets[0]
        bits, sizes = page.tags["BitsPerSample"].valueoffset, page.tags["StripByteCounts"]
        assert len(page.dataoffsets) == 1
    out.seek(bits)
    out.write(struct.pack(f"<{samples}H", *[12] * samples))
    out.seek(sizes.valueoffset)
    out.write(len(packed).to_bytes(2 if sizes.dtype == 3 else 4, "little"))
    out.seek(offset)
    out.write(packed)
    return out.getvalue()


def sharded(tmp_path, files, frames="first", extensions=None, **shards):
    """Write files into a folder, shard it in the order of their names, and return the manifest."""
    for name, data in files.items():
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    known = extensions or sorted({name.rpartition(".")[2] for name in files})
    source = FolderSpec(url=str(tmp_path / "in"), extensions=tuple(known), frames=frames)
    return shard_dataset(source, str(tmp_path / "out"), shards=ShardSpec(**{"shuffle": False, "max_bad": 1.0, **shards}))


def with_checksums(data: bytes) -> bytes:
    """Return a PNG of which each chunk, as far as there are any, has the checksum of its bytes."""
    out, at = data[:8], 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        out += png_chunk(data[at + 4 : at + 8], data[at + 8 : at + 8 + length])
        at += 12 + length
    return out


def read(tmp_path, **options):
    """Return all samples of the dataset as a model gets them, without scaling."""
    with Loader(open_dataset(str(tmp_path / "out")), "train", spec=InputSpec(cache="none"), **options) as loader:
        return next(loader.range_batches(0, loader.num_samples, loader.num_samples)).x.numpy()


def npy(values, version=None):
    out = io.BytesIO()
    np.lib.format.write_array(out, values, version)
    return out.getvalue()


def assert_means(name: str, seed: object, form) -> None:
    text, pixels = stored(form.data, form.ext, check="decode")
    where = f"{name} {seed}: {text}"
    assert (pixels.shape, pixels.dtype) == (form.pixels.shape, form.pixels.dtype), where
    if form.near:
        assert np.abs(pixels.astype(int) - form.pixels.astype(int)).max() <= form.near, where
    else:
        np.testing.assert_array_equal(pixels, form.pixels, where)


def random_images(count: int) -> None:
    """Compare random images of random forms and sizes with what they mean."""
    random = np.random.default_rng(count)
    for number in range(count):
        name = list(FORMS)[number % len(FORMS)]
        height, width = random.integers(2, 40, 2).tolist()
        seed = int(random.integers(1 << 30))
        assert_means(name, (seed, height, width), FORMS[name](np.random.default_rng(seed), height, width))


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_read_as_it_is_meant(name):
    assert len(FORMS) >= 60
    assert_means(name, "fixed", FORMS[name](np.random.default_rng(7), 24, 20))


def test_random_images_of_all_forms_are_read_as_they_are_meant():
    random_images(3 * len(FORMS))


@pytest.mark.accept
def test_ten_thousand_random_images_are_read_as_they_are_meant():
    random_images(10_000)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_round_trips_of_values_over_modes_sizes_and_depths(data):
    dtype = np.dtype(data.draw(st.sampled_from(["u1", "u2", "u4", "i1", "i2", "i4", "f4", "f8"])))
    height, width, bands = data.draw(st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(1, 6)))
    values = data.draw(
        arrays.arrays(dtype, (height, width, bands), elements=arrays.from_dtype(dtype, allow_nan=False, allow_infinity=False))
    )
    options = {"byteorder": data.draw(st.sampled_from("<>")), "compression": data.draw(st.sampled_from([None, "zlib", "lzw"]))}
    if data.draw(st.booleans()):
        options["tile"] = (16, 16)
    plane, photometric = data.draw(st.sampled_from(["contig", "separate"])), "rgb" if bands == 3 else "minisblack"
    if bands == 1:
        file = tiff(values[..., 0], photometric=photometric, **options)
    else:
        placed = values if plane == "contig" else np.ascontiguousarray(np.moveaxis(values, 2, 0))
        file = tiff(placed, photometric=photometric, planarconfig=plane, **options)
    text, pixels = stored(file, "tif", check="decode")
    np.testing.assert_array_equal(pixels, values, text)
    assert pixels.dtype == dtype


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_round_trips_of_pngs_over_modes_sizes_and_depths(data):
    dtype, bands = np.dtype(data.draw(st.sampled_from(["u1", "u2"]))), data.draw(st.integers(1, 4))
    values = data.draw(arrays.arrays(dtype, (*data.draw(st.tuples(st.integers(1, 20), st.integers(1, 20))), bands)))
    file = imagecodecs.png_encode(values[..., 0] if bands == 1 else values, level=data.draw(st.integers(0, 9)))
    orientation = data.draw(st.integers(1, 8))
    turned = png_with(file, png_chunk(b"eXIf", exif(orientation).tobytes().removeprefix(b"Exif\0\0")))
    np.testing.assert_array_equal(stored(file, "png", check="decode")[1], values)
    np.testing.assert_array_equal(stored(turned, "png", check="decode")[1], upright(values, orientation))


class TestOrientation:
    FILES = {  # noqa: RUF012  # a constant
        f"{number}.{ext}": saved(Image.fromarray(smooth(np.random.default_rng(number), 24, 48, 3)), format, exif=exif(6), **options)
        for number, (ext, format, options) in enumerate(
            [("jpg", "JPEG", {}), ("png", "PNG", {}), ("webp", "WEBP", {"lossless": True}), ("jpeg", "JPEG", {"progressive": True})]
        )
    }

    def test_the_index_and_all_readers_have_the_turned_size(self, tmp_path):
        manifest = sharded(tmp_path, self.FILES)
        assert manifest.sample.shapes == {"48x24x3/RGB": 4}
        index = open_dataset(str(tmp_path / "out")).reader(manifest.shards[0]).index
        assert index["width"].to_pylist() == [24] * 4 and index["height"].to_pylist() == [48] * 4
        for batch, decoder in ((read(tmp_path), "imagecodecs"), (read(tmp_path, transform=TransformSpec(decoder="pillow")), "pillow")):
            for number, pixels in enumerate(batch):
                wanted = np.rot90(smooth(np.random.default_rng(number), 24, 48, 3), -1)
                assert np.abs(pixels.transpose(1, 2, 0).astype(int) - wanted).mean() < 3, (number, decoder)

    @pytest.mark.parametrize("write", [shard_dataset, adopt_shards])
    def test_jpegs_in_a_tar_are_turned_too(self, tmp_path, write):
        pictures = [smooth(np.random.default_rng(number), 24, 16, 3) for number in range(3)]
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            for number, picture in enumerate(pictures):
                data = saved(Image.fromarray(picture), "JPEG", quality=95, exif=exif(6))
                info = tarfile.TarInfo(f"{number}.jpg")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        manifest = write(WebdatasetSpec(url=str(tmp_path / "x.tar")), str(tmp_path / "out"), shards=ShardSpec(shuffle=False))
        assert manifest.sample.shapes == {"16x24x3/RGB": 3}
        for picture, pixels in zip(pictures, read(tmp_path).transpose(0, 2, 3, 1), strict=True):
            assert np.abs(pixels.astype(int) - np.rot90(picture, -1)).mean() < 3

    @pytest.mark.parametrize("compression", [None, "zlib", "lzw"])
    @pytest.mark.parametrize("colour", ["ycbcr", "rgb"])
    def test_a_tiff_is_turned_once(self, colour, compression):
        stored_pixels = np.kron(noise(RANDOM, 2, 3, 3), np.ones((4, 4, 1), np.uint8))  # Pillow turns what it reads, tifffile does not
        turns = [lambda x: x, np.fliplr, lambda x: np.rot90(x, 2), np.flipud, lambda x: x.swapaxes(0, 1), lambda x: np.rot90(x, -1)]
        turns += [lambda x: np.rot90(x, 2).swapaxes(0, 1), np.rot90]
        values = np.asarray(Image.fromarray(stored_pixels).convert("YCbCr")) if colour == "ycbcr" else stored_pixels
        for orientation, turn in enumerate(turns, 1):
            tags = [(274, "H", 1, orientation, True), *([(530, "H", 2, (1, 1), True)] if colour == "ycbcr" else [])]
            _, pixels = stored(tiff(values, photometric=colour, compression=compression, extratags=tags), "tif")
            wanted = turn(stored_pixels).astype(int)
            assert pixels.shape == wanted.shape and np.abs(pixels - wanted).max() < 6, orientation

    def test_the_fast_path_of_sharding_knows_it_too(self, tmp_path):
        data = saved(Image.new("RGB", (64, 32), (9, 0, 0)), "JPEG")
        turned = saved(Image.new("RGB", (64, 32), (9, 0, 0)), "JPEG", exif=exif(8))
        straight = saved(Image.new("RGB", (64, 32), (9, 0, 0)), "JPEG", exif=exif(1))
        manifest = sharded(tmp_path, {f"{n:03}.jpg": (data, turned, straight)[n % 3] for n in range(90)})
        assert manifest.sample.shapes == {"32x64x3/RGB": 60, "64x32x3/RGB": 30}

    def test_a_resized_image_is_turned_first(self, tmp_path):
        left_red = np.zeros((32, 64, 3), np.uint8)
        left_red[:, :32, 0] = left_red[:, 32:, 2] = 200
        text, pixels = stored(saved(Image.fromarray(left_red), "PNG", exif=exif(6)), "png", resize=16)
        assert text == "16x16x3/RGB"
        assert (pixels[:6, :, 0] > 150).all() and (pixels[10:, :, 2] > 150).all()  # the left side is on top

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_a_tiff_of_ycbcr_is_turned_once(self, orientation):
        upper = np.zeros((16, 32, 3), np.uint8)
        upper[:, :16] = 200
        upper[:8] += 50
        data = saved(Image.fromarray(upper).convert("YCbCr"), "TIFF", tiffinfo={274: orientation})
        np.testing.assert_allclose(stored(data, "tif")[1], upright(upper, orientation), atol=3)

    @pytest.mark.parametrize("order", "<>")
    @pytest.mark.parametrize(("kind", "value"), [(1, "B3x"), (3, "H2x"), (4, "I"), (6, "b3x"), (8, "h2x"), (9, "i")])
    def test_the_tag_may_have_any_type_of_whole_numbers(self, kind, value, order):
        pixels = smooth(RANDOM, 16, 24, 3)
        entry = struct.pack(f"{order}HHI{value}", 274, kind, 1, 6)
        block = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HIH", 42, 8, 1) + entry + bytes(4)
        for prefix in (b"Exif\0\0", b"Exif\0\0Exif\0\0"):  # the second as some programs write it
            for format, ext, options in (("JPEG", "jpg", {"quality": 95}), ("WEBP", "webp", {"lossless": True}), ("PNG", "png", {})):
                data = saved(Image.fromarray(pixels), format, **options, exif=prefix + block)
                np.testing.assert_allclose(stored(data, ext, check="decode")[1].astype(int), upright(pixels, 6), atol=30 * (ext == "jpg"))
            jpeg = BytesColumn.from_bytes([saved(Image.fromarray(pixels), "JPEG", exif=prefix + block)])
            assert examine(jpeg).tolist() == [facts_of(memoryview(jpeg[0]))]

    @pytest.mark.parametrize("block", [b"", b"II*\0", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\0\x09\x01\x12", b"nonsense"])
    def test_a_damaged_block_turns_nothing(self, block):
        pixels = noise(RANDOM, 6, 4, 3)
        for format, ext, options in (("JPEG", "jpg", {"quality": 95}), ("WEBP", "webp", {"lossless": True}), ("PNG", "png", {})):
            data = saved(Image.fromarray(pixels), format, **options, exif=b"Exif\0\0" + block)
            text, found = stored(data, ext, check="decode")
            assert text == "6x4x3/RGB"
            assert format == "JPEG" or (found == pixels).all()

    def test_version_1_reads_as_stored(self):
        for name, data in self.FILES.items():
            assert image_header(data, name.rpartition(".")[2], pixels=1).format_text == "24x48x3/RGB"


class TestAlpha:
    def composed(self, pixels, background):
        """The formula of alpha compositing over an opaque background (Porter and Duff, over)."""
        alpha = pixels[..., -1:] / 255
        return pixels[..., :-1] * alpha + np.array(background)[: pixels.shape[2] - 1] * (1 - alpha)

    @pytest.mark.parametrize(("name", "colour"), [("white", (255, 255, 255)), ("black", (0, 0, 0)), ("#ff8000", (255, 128, 0))])
    def test_it_is_composed_over_the_background_before_the_resize(self, name, colour):
        pixels = noise(RANDOM, 16, 16, 4)
        _, found = stored(saved(Image.fromarray(pixels), "PNG"), "png", mode="RGB", background=name)
        np.testing.assert_allclose(found, self.composed(pixels, colour), atol=0.51)
        _, small = stored(saved(Image.fromarray(pixels), "PNG"), "png", resize=8, background=name)
        wanted = Image.fromarray(np.floor(self.composed(pixels, colour) + 0.5).astype(np.uint8)).resize((8, 8), Image.Resampling.BICUBIC)
        assert np.abs(small.astype(int) - np.asarray(wanted)).max() <= 1

    @pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
    def test_an_image_that_has_the_size_already_is_composed_as_the_resized_ones_are(self, tmp_path, mode):
        image = Image.fromarray(noise(RANDOM, 8, 8, 4)).convert("LA" if mode == "LA" else "RGBA")
        wanted = self.composed(np.asarray(image), (0, 0, 0))
        if mode == "P":
            image = Image.new("P", (8, 8), 3)
            image.putpalette([50, 100, 150] * 4)
            image.info["transparency"] = 3
            wanted = np.zeros((8, 8, 3))
        large = image.resize((16, 16))
        large.info = dict(image.info)
        files = {"a.png": saved(image, "PNG"), "b.png": saved(large, "PNG")}
        manifest = sharded(tmp_path, files, resize=8, background="black")
        assert len(manifest.sample.shapes) == 1, manifest.sample.shapes
        np.testing.assert_allclose(read(tmp_path)[0].transpose(1, 2, 0), wanted, atol=0.51)

    def test_alpha_of_twelve_bits_is_opaque_at_4095(self):
        pixels = np.full((6, 5, 4), 4095, np.uint16)
        pixels[..., :3] = noise(RANDOM, 6, 5, 3, "u2") >> 4
        data = twelve_bits(pixels, photometric="rgb", extrasamples=["unassalpha"])
        found = stored(data, "tif", mode="RGB")[1]
        np.testing.assert_allclose(found, pixels[..., :3] / 4095 * 255, atol=0.51)

    def test_leftover_colours_under_full_transparency_do_not_show(self):
        pixels = noise(RANDOM, 8, 8, 4)
        pixels[..., 3] = 0
        for data in (saved(Image.fromarray(pixels), "PNG"), saved(Image.fromarray(pixels), "WEBP", lossless=True, exact=True)):
            assert (stored(data, "png", mode="RGB")[1] == 255).all()
            assert (stored(data, "png", mode="L")[1] == 255).all()

    def test_kept_bytes_keep_it_and_a_model_of_three_channels_sees_the_background(self, tmp_path):
        pictures = [noise(np.random.default_rng(number), 8, 8, 4) for number in range(3)]
        files = {f"{number}.png": saved(Image.fromarray(pixels), "PNG") for number, pixels in enumerate(pictures)}
        sharded(tmp_path, files)
        np.testing.assert_array_equal(read(tmp_path), np.stack(pictures).transpose(0, 3, 1, 2))
        seen = read(tmp_path, channels=3, transform=TransformSpec(background="black"))
        wanted = [self.composed(pixels, (0, 0, 0)) for pixels in pictures]
        np.testing.assert_allclose(seen.transpose(0, 2, 3, 1), wanted, atol=0.51)

    def test_images_with_and_without_it_train_together_over_the_background(self, tmp_path):
        rgba, rgb = noise(RANDOM, 8, 8, 4), noise(RANDOM, 8, 8, 3)
        sharded(tmp_path, {"a.png": saved(Image.fromarray(rgba), "PNG"), "b.png": saved(Image.fromarray(rgb), "PNG")})
        assert open_dataset(str(tmp_path / "out")).input_shape() == (3, 8, 8)
        found = read(tmp_path).transpose(0, 2, 3, 1)
        np.testing.assert_allclose(found, [self.composed(rgba, (255, 255, 255)), rgb], atol=0.51)

    def test_a_colour_that_does_not_exist_is_refused_by_name(self):
        for make in (lambda: ShardSpec(background="whit"), lambda: TransformSpec(background="#12")):
            with pytest.raises(ConfigError, match="expected the name of a colour"):
                make()


class TestFrames:
    PAGES = np.stack([noise(np.random.default_rng(number), 6, 5, 1, "u2")[..., 0] for number in range(3)])

    def files(self):
        pictures = [Image.fromarray(noise(np.random.default_rng(number), 6, 5, 3)) for number in range(3)]
        return {
            "pages.tif": tiff(self.PAGES, photometric="minisblack"),
            "stack.tif": imagej_stack(self.PAGES),
            "moving.webp": saved(pictures[0], "WEBP", save_all=True, append_images=pictures[1:], lossless=True),
            "moving.png": saved(pictures[0], "PNG", save_all=True, append_images=pictures[1:]),
        }

    def test_the_first_is_taken_and_the_log_says_so(self, tmp_path, caplog):
        caplog.set_level(logging.INFO)
        assert sharded(tmp_path, self.files()).num_samples() == 4
        assert "4 files have several pages or frames, of which the first was stored (source.frames=first" in caplog.text

    @pytest.mark.parametrize("shards", [{"resize": 4}, {"mode": "L"}, {"value_range": (0, 65535)}])
    def test_the_log_says_so_of_converted_files_too(self, tmp_path, caplog, shards):
        with caplog.at_level(logging.INFO):
            manifest = sharded(tmp_path, self.files(), **shards)
        assert manifest.num_samples() == 4
        assert "4 files have several pages or frames, of which the first was stored" in caplog.text

    def test_they_can_be_refused(self, tmp_path):
        assert sharded(tmp_path, {**self.files(), "one.tif": tiff(self.PAGES[0])}, frames="refuse").reasons == {"frames": 4}

    @pytest.mark.parametrize("name", ["pages.tif", "stack.tif", "moving.webp", "moving.png"])
    def test_all_are_samples_of_their_own(self, tmp_path, name, caplog):
        caplog.set_level(logging.INFO)
        sharded(tmp_path, {name: self.files()[name]}, frames="all")
        assert "1 file with several pages or frames is 3 samples" in caplog.text
        dataset = open_dataset(str(tmp_path / "out"))
        stem = name.partition(".")[0]
        assert dataset.reader(dataset.manifest.shards[0]).index["key"].to_pylist() == [f"{stem}/{number:09d}" for number in range(3)]
        if name.endswith("tif"):
            wanted = self.PAGES[:, None]
        else:
            wanted = np.stack([noise(np.random.default_rng(number), 6, 5, 3).transpose(2, 0, 1) for number in range(3)])
        np.testing.assert_array_equal(read(tmp_path), wanted)

    def test_those_of_a_tar_too(self, tmp_path):
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            for name, data in (("a.tif", tiff(self.PAGES, photometric="minisblack")), ("a.cls", b"7")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        source = WebdatasetSpec(url=str(tmp_path / "x.tar"), frames="all")
        manifest = shard_dataset(source, str(tmp_path / "out"), shards=ShardSpec(shuffle=False))
        assert (manifest.num_samples(), manifest.classes) == (3, ("7",))
        np.testing.assert_array_equal(read(tmp_path), self.PAGES[:, None])

    def test_a_damaged_frame_is_quarantined_alone(self, tmp_path):
        data = bytearray(tiff(self.PAGES, photometric="minisblack", compression="zlib"))
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            at = file.pages.get(1).dataoffsets[0]
        data[at : at + 4] = b"\xff" * 4
        manifest = sharded(tmp_path, {"pages.tif": bytes(data)}, frames="all")
        assert (manifest.num_samples(), manifest.reasons) == (2, {"decode": 1})
        np.testing.assert_array_equal(read(tmp_path), self.PAGES[[0, 2]][:, None])

    @pytest.mark.parametrize("stated", [0, 1, 3, 4, 3_000_000, (1 << 31) + 1, (1 << 32) - 1])
    def test_frames_that_a_file_does_not_hold_are_no_samples(self, tmp_path, stated):
        data = self.files()["moving.png"]
        at = data.index(b"acTL") - 4
        data = data[:at] + png_chunk(b"acTL", struct.pack(">II", stated, 0)) + data[at + 20 :]
        manifest = sharded(tmp_path, {"moving.png": data, "one.png": saved(Image.new("RGB", (5, 6)), "PNG")}, frames="all")
        if 3 < stated <= 1 << 31:
            assert (manifest.num_samples(), manifest.reasons) == (1, {"frames": 1})
        else:  # decoders take the last for no animation
            assert manifest.num_samples() == 1 + (stated if 0 < stated < 4 else 1)

    def test_other_formats_hold_what_they_state(self):
        with pytest.raises(BadSample, match="a file of 100 bytes that states 9 frames"):
            _require_frames(9, 100)
        for name, frames in (("GIF", 300), ("WEBP", 300), ("TIFF", 300), ("MPO", 300), ("PNG", 300)):
            pictures = [Image.fromarray(np.full((1, 1), number % 256, np.uint8)).convert("RGB") for number in range(frames)]
            for number, picture in enumerate(pictures):
                picture.putpixel((0, 0), (number % 256, number // 256, number * 7 % 256))
            options = {"loop": 0} if name == "GIF" else {"lossless": True} if name == "WEBP" else {}
            data = saved(pictures[0], name, save_all=True, append_images=pictures[1:], **options)
            assert image_header(data, "").frames == Image.open(io.BytesIO(data)).n_frames == frames, name

    @pytest.mark.parametrize("name", ["moving.gif", "pages.tif", "stack.tif", "moving.webp", "moving.png"])
    def test_a_file_is_read_once_for_all_its_frames(self, tmp_path, name, monkeypatch):
        frames = [Image.fromarray(np.full((4, 4), number, np.uint8)) for number in range(40)]
        (tmp_path / "in").mkdir()
        pages = np.stack([np.asarray(frame) for frame in frames])
        if name.endswith(".tif"):
            data = imagej_stack(pages) if name == "stack.tif" else tiff(pages, photometric="minisblack")
        else:
            options = {"lossless": True} if name.endswith(".webp") else {}
            data = saved(frames[0], name[7:].upper(), save_all=True, append_images=frames[1:], **options)
        (tmp_path / "in" / name).write_bytes(data)
        source = FolderSource(FolderSpec(url=str(tmp_path / "in"), extensions=(name.rpartition(".")[2],), frames="all"))
        listed, reads = source.listing(), []
        read_file = source._file
        monkeypatch.setattr(source, "_file", lambda name: (reads.append(name), read_file(name))[1])

        def value(place):
            return int(np.asarray(Image.open(io.BytesIO(source.read(listed.sources[place])[1])).convert("L"))[0, 0])

        assert [value(place) for place in range(40)] == list(range(40)) and reads == [name]
        assert [value(place) for place in (7, 3, 39, 0)] == [7, 3, 39, 0], "in any order too"

    @pytest.mark.parametrize("held", [1 << 28, 300])
    def test_shuffled_frames_of_several_files_are_right_and_each_file_is_opened_once(self, tmp_path, monkeypatch, held):
        pages = [np.full((4, 4), number, np.uint8) for number in range(30)]
        frames, files = [Image.fromarray(page) for page in pages], {"a.tif": tiff(np.stack(pages), photometric="minisblack")}
        for name in ("b.gif", "c.png", "d.webp"):
            options = {"lossless": True} if name.endswith(".webp") else {}
            files[name] = saved(frames[0], name[2:].upper(), save_all=True, append_images=frames[1:], **options)
        (tmp_path / "in").mkdir()
        for name, data in files.items():
            (tmp_path / "in" / name).write_bytes(data)
        source = FolderSource(FolderSpec(url=str(tmp_path / "in"), extensions=("tif", "gif", "png", "webp"), frames="all"))
        listed, reads, decoded, read_file, frame = source.listing(), [], [], source._file, OpenImage.frame
        monkeypatch.setattr(source, "_file", lambda name: (reads.append(name), read_file(name))[1])
        monkeypatch.setattr(OpenImage, "frame", lambda *args: (decoded.append(args), frame(*args))[1])
        monkeypatch.setattr(frames_module, "HELD_BYTES", held)
        order = np.random.default_rng(0).permutation(len(listed)).tolist()
        read = reader(source, [listed.sources[place] for place in order])
        values = [int(np.asarray(Image.open(io.BytesIO(read(listed.sources[place])[1])).convert("L"))[0, 0]) for place in order]
        assert len(order) == 120 and values == [place % 30 for place in order]
        if held > 300:
            assert sorted(reads) == sorted(files) and len(decoded) == 120, "each file is read once, each frame decoded once"
            assert not source._frames._open, "a file is closed with its last frame"

    @pytest.mark.parametrize("name", ["a.png", "a.gif", "a.webp", "a.tif"])
    def test_the_same_frames_of_a_damaged_file_are_refused_in_any_order(self, tmp_path, name):
        random, pages = np.random.default_rng(0), noise(np.random.default_rng(1), 6 * 8, 8, 3).reshape(6, 8, 8, 3)
        frames, partly = [Image.fromarray(page) for page in pages], 0
        options = {"lossless": True} if name == "a.webp" else {"compression": "tiff_adobe_deflate"} if name == "a.tif" else {}
        whole = saved(frames[0], "TIFF" if name == "a.tif" else name[2:].upper(), save_all=True, append_images=frames[1:], **options)
        source = FolderSource(FolderSpec(url=str(tmp_path), extensions=(name.rpartition(".")[2],), frames="all"))

        def outcome(read, frame):
            try:
                return read(frame)[1]
            except BadSample as bad:
                return bad.reason, bad.message

        for _ in range(40):
            at = int(random.integers(len(whole) // 3, len(whole)))
            data = whole[:at] + bytes([whole[at] ^ 1 << int(random.integers(8))]) + whole[at + 1 :]
            (tmp_path / name).write_bytes(with_checksums(data) if name == "a.png" else data)
            listed = source.listing().sources
            if len(listed) < 6:
                continue
            alone = [outcome(reader(source, [frame]), frame) for frame in listed]
            partly += 0 < sum(isinstance(found, tuple) for found in alone) < 6
            for order in ([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [2, 5, 3, 0, 4, 1], [3, 4, 0, 5]):
                read = reader(source, [listed[place] for place in order])
                found = [outcome(read, listed[place]) for place in order]
                assert found == [alone[place] for place in order]
                assert not source._frames._open, "a file is closed with its last frame"
        assert partly

    def test_the_limit_of_pixels_is_that_of_the_knob_for_each_frame(self, tmp_path):
        out = io.BytesIO()
        with tifffile.TiffWriter(out) as file:
            for side in (4, 40, 4):
                file.write(np.zeros((side, side), np.uint8), photometric="minisblack", metadata=None)
        manifest = sharded(tmp_path, {"pages.tif": out.getvalue()}, frames="all", max_pixels=100)
        assert (manifest.num_samples(), manifest.reasons) == (2, {"too_large": 1})
        source = FolderSource(FolderSpec(url=str(tmp_path / "in"), extensions=("png",), frames="all"))
        pictures = [Image.new("1", (9000, 9000), number) for number in (0, 1)]  # above the default
        (tmp_path / "in/large.png").write_bytes(saved(pictures[0], "PNG", save_all=True, append_images=pictures[1:]))
        assert [why and why.reason for why in source.listing().unusable or ()] == ["too_large"], "one row: no frame can be read"
        source.bound_pixels(1 << 27)
        assert len(source.listing()) == 2
        assert source.read("large.png#000000001")[0] == "png"
        source.bound_pixels(1 << 26)
        with pytest.raises(BadSample, match="at most 67108864 are read"):
            source.read("large.png#000000001")

    @pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.tif"])
    def test_the_pixels_of_a_file_are_bounded_by_its_bytes(self, tmp_path, name):
        """A frame of a few bytes is decoded over the whole canvas: 3000 of them were minutes for a file of 46 kB."""
        frames, side = 60, 300
        if name == "a.tif":
            out = io.BytesIO()
            with tifffile.TiffWriter(out) as file:
                for _ in range(frames):
                    file.write(np.zeros((side, side), np.uint8), photometric="minisblack", compression="zlib", metadata=None)
            data = out.getvalue()
        else:
            pictures = [Image.new("RGB", (side, side)) for _ in range(frames)]
            for number, picture in enumerate(pictures):
                picture.putpixel((0, 0), (number, 0, 0))
            data = saved(pictures[0], name[2:].upper(), save_all=True, append_images=pictures[1:], lossless=True)
        assert 256 * len(data) < 5_000_000 < frames * side * side
        files = {name: data, "one.png": saved(Image.new("RGB", (side, side)), "PNG")}
        manifest = sharded(tmp_path, files, frames="all", max_pixels=side**2)
        assert (manifest.num_samples(), manifest.reasons) == (1, {"too_large": 1}), "one row of the file"
        source = FolderSource(FolderSpec(url=str(tmp_path / "in"), extensions=(name[2:],), frames="all"))
        source.bound_pixels(frames * side**2 // 4)
        listed = source.listing().sources
        source.bound_pixels(side**2)
        assert name in source.listing().sources
        with pytest.raises(
            BadSample, match=rf"{len(data)} bytes whose pages or frames have 5400000 pixels together, at most \d+ are decoded"
        ):
            reader(source, listed)(listed[1])
        source.bound_pixels(frames * side**2 // 4)
        assert reader(source, listed)(listed[1])[0] in ("png", "tiff")

    def test_the_default_image_of_an_animation_is_a_frame_of_its_own(self, tmp_path):
        pictures = [Image.fromarray(noise(np.random.default_rng(number), 6, 5, 3)) for number in range(3)]
        data = saved(pictures[0], "PNG", save_all=True, append_images=pictures[1:], default_image=True)
        sharded(tmp_path, {"moving.png": data}, frames="all")
        np.testing.assert_array_equal(read(tmp_path), np.stack([np.asarray(picture).transpose(2, 0, 1) for picture in pictures]))

    def test_thumbnails_and_masks_of_a_tiff_are_no_frames(self):
        out = io.BytesIO()
        with tifffile.TiffWriter(out) as file:
            file.write(self.PAGES[0][:3, :2], photometric="minisblack", subfiletype=1, metadata=None)
            file.write(self.PAGES[1], photometric="minisblack", metadata=None)
            file.write(self.PAGES[2] > 9, photometric="mask", subfiletype=4, metadata=None)
        header = image_header(out.getvalue(), "tif")
        assert (header.frames, header.format_text) == (1, "6x5x1/I;16")
        np.testing.assert_array_equal(stored(out.getvalue(), "tif")[1][..., 0], self.PAGES[1])


class TestRanges:
    def test_twelve_bits_in_sixteen_fill_the_range(self):
        values = noise(RANDOM, 9, 7, 1, "u2") >> 4
        for data, ext in ((imagecodecs.png_encode(values[..., 0]), "png"), (tiff(values[..., 0]), "tif")):
            text, pixels = stored(data, ext, value_range=(0, 4095))
            np.testing.assert_array_equal(pixels, np.rint(values / 4095 * 65535))
            assert text == "9x7x1/I;16"
            assert np.abs(stored(data, ext, value_range=(0, 4095), mode="L")[1] - values / 4095 * 255).max() < 0.51

    @pytest.mark.parametrize("bits", [10, 12, 14, 16])
    @pytest.mark.parametrize("bands", [1, 3])
    def test_a_jpeg_of_more_than_eight_bits_has_the_range_of_its_precision(self, bits, bands):
        values = smooth(RANDOM, 16, 24, bands).astype(np.uint16) << (bits - 8)
        data = imagecodecs.jpeg8_encode(values if bands > 1 else values[..., 0], level=100, lossless=True, bitspersample=bits)
        np.testing.assert_array_equal(stored(data, "jpg")[1], values)
        for mode, bright in (("L", values), ("RGB", np.broadcast_to(values, (16, 24, 3)))):
            if bands == 1 or mode == "RGB":
                wanted = bright / ((1 << bits) - 1) * 255
                assert np.abs(stored(data, "jpg", mode=mode)[1] - wanted).mean() < 4, "a JPEG again, of quality 95"

    def test_a_lossy_jpeg_of_twelve_bits_has_it_too(self):
        values = (16 * smooth(RANDOM, 16, 24, 1).astype(np.uint16))[..., 0]
        data = imagecodecs.jpeg8_encode(values, level=95, bitspersample=12)
        assert np.abs(stored(data, "jpg", mode="L")[1][..., 0] - values / 4095 * 255).max() < 8

    def test_a_tiff_of_twelve_bits_has_it_too(self):
        values = noise(RANDOM, 6, 4, 1, "u2") >> 4
        found = stored(twelve_bits(values[..., 0], photometric="minisblack"), "tif", mode="L")[1]
        np.testing.assert_allclose(found, values / 4095 * 255, atol=0.51)

    def test_floats_and_signed_values_get_a_mode_by_it_and_are_refused_without(self):
        values = RANDOM.normal(size=(8, 8)).astype(np.float32)
        for stretched in (values, (values * 1000).astype(np.int16)):
            low, high = float(stretched.min()), float(stretched.max())
            pixels = stored(tiff(stretched), "tif", value_range=(low, high), mode="L")[1]
            assert np.abs(pixels[..., 0] - (stretched - low) / (high - low) * 255).max() < 0.51
            with pytest.raises(BadSample, match=r"no fixed range to convert from: say it with shards.value_range"):
                stored(tiff(stretched), "tif", mode="L")

    def test_eight_bits_have_their_range(self):
        pixels = noise(RANDOM, 8, 8, 3)
        np.testing.assert_array_equal(stored(saved(Image.fromarray(pixels), "PNG"), "png", value_range=(0, 4095))[1], pixels)

    def test_arrays_have_none(self, tmp_path):
        values = RANDOM.normal(size=(8, 8)).astype(np.float32)
        with pytest.raises(ConfigError, match=r"shards.value_range work on images; this source gives arrays"):
            sharded(tmp_path, {f"a/{number}.npy": npy(values) for number in range(3)}, value_range=(-1, 1))

    def test_version_1_knows_none(self):
        with pytest.raises(ConfigError, match=r"need shards.pixels=2"):
            ShardSpec(value_range=(0, 4095), pixels=1)

    @pytest.mark.parametrize("value_range", [(5, 5), (9, 1)])
    def test_an_empty_range_is_refused(self, value_range):
        with pytest.raises(ConfigError, match="black below white"):
            ShardSpec(value_range=value_range)


def bicubic(values: np.ndarray, side: int) -> np.ndarray:
    """The cubic convolution of Keys (1981) with a=-1/2 in both directions, stretched by the scale where the image shrinks."""

    def weights(size: int) -> np.ndarray:
        scale = size / side
        stretch = max(1.0, scale)
        found = np.zeros((side, size))
        for row in range(side):
            for column in range(size):
                at = abs((column + 0.5) - (row + 0.5) * scale) / stretch
                found[row, column] = 1.5 * at**3 - 2.5 * at**2 + 1 if at <= 1 else -0.5 * at**3 + 2.5 * at**2 - 4 * at + 2 if at < 2 else 0
            found[row] /= math.fsum(found[row])
        return found

    return np.einsum("yh,xw,hwc->yxc", weights(values.shape[0]), weights(values.shape[1]), values.astype(np.float64))


def resized(values: np.ndarray, side: int, **shards) -> np.ndarray:
    """The pixels that sharding stores of a TIFF."""
    bands = values.shape[2]
    options = {"planarconfig": "contig"} if bands > 1 else {}
    data = tiff(values if bands > 1 else values[..., 0], photometric="rgb" if bands == 3 else "minisblack", **options)
    _, pixels = stored(data, "tif", resize=side, **shards)
    assert pixels.dtype == values.dtype
    return pixels


class TestResize:
    @pytest.mark.parametrize("dtype", ["u2", "i2", "i4", "u4", "f4", "f8"])
    @pytest.mark.parametrize("bands", [1, 3, 5])
    @pytest.mark.parametrize("side", [16, 48])
    def test_images_of_any_dtype_are_resized_in_their_own_values(self, dtype, bands, side):
        y, x = np.mgrid[:40, :32]
        values = np.stack([9000 * (band + 1) + 20 * x + 30 * y + 500 * (x % 7 == 0) for band in range(bands)], -1)
        values = (-values // 2 if np.dtype(dtype).kind in "if" else values).astype(dtype)
        wanted = bicubic(values, side)
        np.testing.assert_allclose(resized(values, side, check="decode"), wanted, atol=0.51 if values.dtype.kind != "f" else 0.01)

    @pytest.mark.parametrize("value", [16777217, -2147483647, 2147483647])
    def test_whole_numbers_that_float32_has_not_are_kept(self, value):
        assert (resized(np.full((9, 7, 1), value, np.int32), 4) == value).all()
        assert (resized(np.full((9, 7, 1), abs(value), np.uint32), 4) == abs(value)).all()

    @pytest.mark.parametrize("value", [1e300, -1.7e308, 1 / 3])
    def test_float64_is_resized_in_float64(self, value):
        values = np.full((9, 7, 1), value)
        np.testing.assert_allclose(resized(values, 4), value, rtol=1e-14)
        values[4, 3] = 0
        assert np.isfinite(resized(values, 4)).all()

    def test_the_largest_values_stay_values(self):
        for dtype in (np.float16, np.float32, np.float64):
            values = np.zeros((8, 8, 1), dtype)
            values[:, 4:] = np.finfo(dtype).max
            found = resized(values, 16)
            assert np.isfinite(found).all()
            assert found.max() == np.finfo(dtype).max

    def test_whole_numbers_beyond_float64_are_refused(self):
        with pytest.raises(BadSample, match=r"int64 values above 2\^53 cannot be resized exactly: save them"):
            resized(np.full((9, 7, 1), (1 << 53) + 1, np.int64), 4)

    @pytest.mark.parametrize("shards", [{"resize": 4}, {"value_range": (0, 1)}, {"value_range": (0, 1), "mode": "L"}])
    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_what_is_no_number_is_quarantined_where_pixels_are_computed(self, shards, value):
        values = np.ones((6, 6), np.float32)
        values[2, 3] = value
        with pytest.raises(BadSample, match="not_finite"):
            prepare(tiff(values), "tif", ShardSpec(**shards))


class TestTiffsThatAreNotRead:
    @pytest.mark.parametrize("compression", ["jpeg2000", "webp", "jpegxl", "lerc"])
    @pytest.mark.parametrize("shards", [{}, {"check": "decode"}, {"mode": "L", "resize": 8}])
    def test_other_compressions_are_refused_with_those_that_are_read(self, compression, shards):
        data = tiff(smooth(RANDOM, 32, 32, 3), photometric="rgb", compression=compression)
        with pytest.raises(BadSample, match=rf"(?i)compressed by {compression}, which is not read: save it with LZW, deflate or none"):
            prepare(data, "tif", ShardSpec(**shards))

    def test_complex_values_are_refused_as_those_of_arrays_are(self):
        whole = tiff(noise(RANDOM, 6, 6, 1, "i4")[..., 0])
        with tifffile.TiffFile(io.BytesIO(whole)) as file:
            at = file.pages[0].tags["SampleFormat"].valueoffset
        of_whole_numbers = whole[:at] + struct.pack("<H", 5) + whole[at + 2 :]
        floats = [tiff(np.zeros((6, 6), dtype), photometric="minisblack") for dtype in ("c8", "c16")]
        for data, bits in ((of_whole_numbers, 32), (floats[0], 64), (floats[1], 128)):
            with pytest.raises(BadSample, match=f"TIFF of complex numbers of {bits} bits.*save the real and the imaginary part"):
                prepare(data, "tif", ShardSpec())


class TestLimits:
    def test_pixels_are_bounded_by_a_knob(self, tmp_path):
        files = {
            "a.png": saved(Image.new("L", (40, 30)), "PNG"),
            "b.jpg": saved(Image.new("L", (40, 30)), "JPEG"),
            "c.tif": tiff(np.zeros((30, 40))),
        }
        for name, data in files.items():
            ext = name[-3:]
            with pytest.raises(BadSample, match=r"40x30 pixels, at most 1199 are read \(shards.max_pixels\)"):
                prepare(data, ext, ShardSpec(max_pixels=1199))
            prepare(data, ext, ShardSpec(max_pixels=1200))

    def test_a_larger_limit_reads_what_the_default_refuses(self):
        data = saved(Image.new("L", (9000, 8000), 7), "PNG")
        with pytest.raises(BadSample, match="too_large"):
            prepare(data, "png", ShardSpec(resize=4))
        assert (stored(data, "png", resize=4, max_pixels=100_000_000)[1] == 7).all()

    def test_the_limit_of_the_knob_counts_and_not_that_of_pillow(self):
        data = saved(Image.new("1", (20_000, 10_000)), "BMP")
        with pytest.raises(BadSample, match="20000x10000 pixels, at most"):
            prepare(data, "bmp", ShardSpec())
        assert prepare(data, "bmp", ShardSpec(max_pixels=1 << 28))[0].format_text == "10000x20000x1/1"

    def test_neither_decoder_has_a_limit_of_its_own(self, monkeypatch):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # twice that many are an error of Pillow's, as 179 million are
        jpeg = saved(Image.new("RGB", (30, 20), "red"), "JPEG")
        ycbcr = FORMS["tiff ycbcr"](RANDOM, 30, 20)
        for decoder in ("imagecodecs", "pillow"):
            for data, ext in ((jpeg, "jpg"), (ycbcr.data, ycbcr.ext)):
                header = image_header(data, ext)
                pixels = Decoder(Reading(decoder), SampleFormat.parse(header.format_text)).batch([data])
                assert pixels.shape[1:3] == (header.height, header.width)

    def test_the_memory_of_many_bands_is_bounded_too(self):
        data = tiff(np.zeros((10, 10, 20), np.float32), photometric="minisblack", planarconfig="contig")
        with pytest.raises(BadSample, match=r"80 bytes takes 8000 bytes, at most 7984 are read \(16 times"):
            prepare(data, "tif", ShardSpec(max_pixels=499))
        prepare(data, "tif", ShardSpec(max_pixels=500))

    @pytest.mark.parametrize("shape", [(300, 500), (1, 150_000)])
    @pytest.mark.parametrize("kind", ["cmyk", "cmyk 16", "premultiplied", "composed", "lab", "in range", "to mode", "palette"])
    def test_what_a_conversion_takes_on_the_way_does_not_grow_with_the_image(self, kind, shape, monkeypatch):
        values = noise(np.random.default_rng(0), *shape, 4, "u1" if kind in ("cmyk", "composed", "lab", "palette") else "u2")
        three = np.ascontiguousarray(values[..., :3])
        table = noise(np.random.default_rng(1), 3, 256, 1, "u2")[..., 0]
        page = SimpleNamespace(photometric=3, bitspersample=8, colormap=table)
        lab = SimpleNamespace(photometric=8, bitspersample=8)
        convert = {
            "cmyk": lambda: cmyk_to_rgb(values),
            "cmyk 16": lambda: cmyk_to_rgb(values),
            "premultiplied": lambda: straight_alpha(values, 65535.0),
            "composed": lambda: composed(values, "white", 255.0),
            "lab": lambda: _meant(lab, three, _Form("LAB", 3, np.dtype("u1"))),
            "in range": lambda: _in_range(values, 10, 60000, 65535.0, Counter()),
            "to mode": lambda: _to_mode(three, "RGB", 65535.0),
            "palette": lambda: _meant(page, three[..., :1], _Form("P", 3, np.dtype("u1"))),
        }[kind]
        whole = convert()
        monkeypatch.setattr(colour_module, "BLOCK_VALUES", 1 << 12)
        tracemalloc.start()
        parts, most = convert(), tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        np.testing.assert_array_equal(parts, whole)
        assert most < (3 if kind == "to mode" else 1) * parts.nbytes + (1 << 19), "the result (Pillow copies it) and a few blocks"

    @pytest.mark.parametrize("dtype", ["f8", "i4", "u2"])
    def test_a_resize_by_rows_gives_what_all_at_once_gives(self, dtype, monkeypatch):
        values = (noise(np.random.default_rng(0), 90, 70, 2, "u2") / (7 if dtype == "f8" else 1)).astype(dtype)
        whole = _resized(values, 16)
        monkeypatch.setattr(convert_module, "BLOCK_VALUES", 1000)
        np.testing.assert_allclose(_resized(values, 16), whole, rtol=1e-12)

    def test_a_jpeg_inside_a_tiff_that_says_gigapixels_is_refused_by_its_tags(self):
        data = bytearray(saved(Image.fromarray(smooth(RANDOM, 32, 32, 3)), "TIFF", compression="jpeg"))
        at = data.index(b"\xff\xc0") + 5
        assert data[at : at + 4] == struct.pack(">HH", 32, 32)
        image_header(bytes(data), "tif")
        data[at : at + 4] = struct.pack(">HH", 65500, 65500)
        with pytest.raises(BadSample, match="65500x65500 pixels in a place of 32x32"):
            image_header(bytes(data), "tif")

    def test_what_tiffs_inflate_to_is_bounded_by_their_tags(self):
        data = tiff(np.zeros((4, 4), np.uint8), compression="zlib")
        bomb = zlib.compress(bytes(1 << 26))
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            tags = {name: file.pages[0].tags[name].valueoffset for name in ("StripOffsets", "StripByteCounts")}
            kind = {name: file.pages[0].tags[name].dtype for name in tags}
        changed = bytearray(data) + bomb
        for name, value in (("StripOffsets", len(data)), ("StripByteCounts", len(bomb))):
            size = {3: 2, 4: 4, 16: 8}[int(kind[name])]
            changed[tags[name] : tags[name] + size] = value.to_bytes(size, "little")
        with pytest.raises(BadSample):
            prepare(bytes(changed), "tif", ShardSpec(check="decode"))

    def test_a_tiff_that_promises_more_than_it_holds_is_found_by_its_tags(self):
        data = tiff(noise(RANDOM, 32, 32, 1, "u2")[..., 0])
        for end in range(0, len(data), 7):
            with pytest.raises(BadSample):
                image_header(data[:end], "tif")


class TestArrays:
    @pytest.mark.parametrize(("shape", "wanted"), [((16, 16, 4), (4, 16, 16)), ((4, 16, 16), (4, 16, 16)), ((32, 24, 13), (13, 32, 24))])
    def test_channels_that_are_last_are_never_taken_for_rows(self, tmp_path, shape, wanted, caplog):
        caplog.set_level(logging.INFO)
        values = [np.random.default_rng(number).normal(size=shape).astype(np.float32) for number in range(3)]
        sharded(tmp_path, {f"a/{number}.npy": npy(array) for number, array in enumerate(values)})
        assert open_dataset(str(tmp_path / "out")).input_shape() == wanted
        np.testing.assert_array_equal(read(tmp_path), values if shape == wanted else np.moveaxis(values, 3, 1))
        assert ("are images [H, W, C]" in caplog.text) == (shape != wanted)

    @pytest.mark.parametrize("shape", [(3, 32, 3), (8, 8, 64)])
    def test_where_the_shape_does_not_tell_it_is_asked(self, shape):
        data = npy(np.zeros(shape, np.float32))
        with pytest.raises(ConfigError, match=r"shards.layout=hwc or shards.layout=chw"):
            prepare(data, "npy", ShardSpec())
        text = "x".join(map(str, shape))
        assert prepare(data, "npy", ShardSpec(layout="hwc"))[0].format_text == f"{text}/hwc;float32"
        assert prepare(data, "npy", ShardSpec(layout="chw"))[0].format_text == f"{text}/float32"

    @pytest.mark.parametrize("shape", [(5,), (5, 3), (8, 8, 8), (2, 8, 8, 3), (8, 6, 7)])
    def test_other_arrays_keep_their_axes(self, shape):
        assert not array_header(npy(np.zeros(shape))).is_image

    @settings(max_examples=60, deadline=None)
    @given(st.data())
    def test_every_order_and_version_is_read_with_its_values(self, data):
        dtype = np.dtype(data.draw(st.sampled_from(["<f4", ">f4", "<f8", ">f8", ">i2", "<u2", ">i8", "<f2", "u1", "?"])))
        shape = data.draw(st.sampled_from([(3,), (4, 2), (2, 5, 3), (6, 7, 2), (2, 3, 2, 2)]))
        values = data.draw(arrays.arrays(dtype, shape, elements=arrays.from_dtype(dtype, allow_nan=False, allow_infinity=False)))
        values = np.asfortranarray(values) if data.draw(st.booleans()) else values
        _, found = stored(npy(values, data.draw(st.sampled_from([(1, 0), (2, 0), (3, 0)]))), "npy", layout="chw")
        np.testing.assert_array_equal(found, values)
        assert found.dtype == dtype.newbyteorder("=")

    def test_sequences_of_several_axes_stay_sequences(self):
        shapes = {array_header(npy(np.zeros((steps, 21, 3), np.float32))).format_text: 1 for steps in (40, 50, 60)}
        found = SampleFormat.from_shapes(shapes, sequences=True)
        assert (found.shape, found.varying, found.image) == ((60, 21, 3), True, False)

    def test_complex_values_are_refused_with_what_to_do(self, tmp_path):
        with pytest.raises(BadSample, match="complex64.*save the real and the imaginary part"):
            prepare(npy(np.zeros((3, 3), np.complex64)), "npy", ShardSpec())
        np.save(tmp_path / "x.npy", np.zeros((4, 3, 3), np.complex64))
        with pytest.raises(DataError, match=r"complex64.*save the real and the imaginary part"):
            shard_dataset(ArraysSpec(url=str(tmp_path / "x.npy")), str(tmp_path / "out"))

    def test_rows_of_an_array_are_images_too(self, tmp_path):
        values = RANDOM.normal(size=(5, 8, 8, 3)).astype(np.float32)
        np.save(tmp_path / "x.npy", values)
        shard_dataset(ArraysSpec(url=str(tmp_path / "x.npy")), str(tmp_path / "out"), shards=ShardSpec(shuffle=False))
        np.testing.assert_array_equal(read(tmp_path), values.transpose(0, 3, 1, 2))


class TestOneDecoder:
    def half(self, data):
        start = data.index(b"\xff\xda")
        return data[: start + (len(data) - start) // 2] + b"\xff\xd9"

    @pytest.mark.parametrize("check", ["header", "decode"])
    def test_a_file_without_its_beginning_or_end_is_refused_by_both_checks(self, check):
        picture = Image.fromarray(smooth(RANDOM, 40, 48, 3))
        with pytest.raises(BadSample, match="decode: not a readable jpg image"):
            prepare(b"\r\n\0" + saved(picture, "JPEG"), "jpg", ShardSpec(check=check))
        with pytest.raises(BadSample, match="truncated: PNG ends at byte"):
            prepare(saved(picture, "PNG")[:-12], "png", ShardSpec(check=check))

    @pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 2}, {"optimize": True}])
    @pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
    def test_half_a_jpeg_is_found(self, mode, options):
        for kind in (noise, smooth):
            data = saved(Image.fromarray(kind(np.random.default_rng(5), 64, 48, 3)).convert(mode), "JPEG", **options)
            prepare(data, "jpg", ShardSpec(check="decode"))
            prepare(data[:-2], "jpg", ShardSpec(check="decode"))
            with pytest.raises(BadSample, match="truncated|decode"):
                prepare(self.half(data), "jpg", ShardSpec(check="decode"))

    @pytest.mark.parametrize("options", [{}, {"restart_marker_blocks": 8}, {"optimize": True}])
    def test_zeros_in_a_scan_are_told_from_stray_bytes_that_lose_nothing(self, options):
        for seed in range(20):
            data = saved(Image.fromarray(noise(np.random.default_rng(seed), 32, 32, 3)), "JPEG", quality=90, **options)
            for stray in (b"", b"\0" * 300, b"\xff" * 9, b"stray bytes"):
                prepare(data[:-2] + stray + data[-2:], "jpg", ShardSpec(check="decode"))
            at = len(data) * 2 // 3
            if not options:
                with pytest.raises(BadSample, match="truncated|decode"):
                    prepare(data[:at] + bytes(200) + data[at + 200 :], "jpg", ShardSpec(check="decode"))

    def test_flat_pictures_are_whole(self):
        for value in (0, 128, 255):
            flat = np.full((200, 300, 3), value, np.uint8)
            flat[:20] = noise(RANDOM, 20, 300, 3)
            for options in ({}, {"progressive": True}, {"optimize": True}):
                prepare(saved(Image.fromarray(flat), "JPEG", **options), "jpg", ShardSpec(check="decode"))

    def test_the_second_picture_of_a_file_does_not_hide_that_the_first_is_cut(self):
        picture = Image.fromarray(smooth(RANDOM, 64, 48, 3))
        for options in ({}, {"progressive": True}):
            data = saved(picture, "JPEG", **options)
            second = saved(picture, "JPEG")
            prepare(data + second, "jpg", ShardSpec(check="decode"))
            with pytest.raises(BadSample, match="truncated|decode"):
                prepare(self.half(data) + second, "jpg", ShardSpec(check="decode"))

    @pytest.mark.parametrize("ending", [b"\xff\xd9", b""], ids=["eoi", "none"])
    @pytest.mark.parametrize("tail", [b"\xff\xe0", b"\xff\xd0", b"\xff\x01", b"\xff\xff", b"\xff\xc4\0\2", b"random"])
    def test_what_follows_a_picture_is_bounded_work(self, tail, ending):
        data = saved(Image.fromarray(noise(RANDOM, 64, 48, 3)), "JPEG")[:-2] + ending
        tail = RANDOM.bytes(1 << 18) if tail == b"random" else tail * ((1 << 18) // len(tail)) + b"\0"
        tracemalloc.start()
        started = time.process_time()
        with contextlib.suppress(Exception):  # decoders refuse some of what has no end, by errors of their own
            assert is_whole_jpeg(data + tail)
        took, (_, peak) = time.process_time() - started, tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 16 << 20 and took < 20, f"{peak} bytes, {took} s"  # of 500 kB of the first: 1.9 GB, 15 s
        if ending:
            assert is_whole_jpeg(data + tail)

    def test_damaged_files_of_all_forms_are_read_or_refused_with_a_reason(self):
        random = np.random.default_rng(1)
        for name in list(FORMS) * 6:
            form = FORMS[name](random, *random.integers(2, 30, 2).tolist())
            data = bytearray(form.data)
            if random.random() < 0.3:
                del data[int(random.integers(len(data))) :]
            else:
                for at in random.integers(0, min(len(data), 200 if random.random() < 0.6 else len(data)), 4).tolist():
                    data[at] = int(random.integers(256))
            try:
                header, kept = prepare(bytes(data), form.ext, ShardSpec(check="decode"))
            except BadSample:
                continue
            assert kept == bytes(data)
            for decoder in ("imagecodecs", "pillow"):
                pixels = Decoder(Reading(decoder), SampleFormat.parse(header.format_text)).batch([kept])
                assert pixels.shape[1:3] == (header.height, header.width)

    def test_what_the_check_keeps_training_reads(self, tmp_path):
        files = {}
        for number in range(60):
            data = saved(Image.fromarray(noise(np.random.default_rng(number), 16, 16, 3)), "PNG" if number % 2 else "JPEG")
            changed = bytearray(data)
            changed[int(np.random.default_rng(number).integers(len(data)))] ^= 1 << number % 8
            if number % 2:  # every checksum fits, the pixels are others or none
                at = data.index(b"IDAT")
                size = struct.unpack(">I", data[at - 4 : at])[0]
                changed = bytearray(data[: at - 4] + png_chunk(b"IDAT", bytes(changed[at + 4 : at + 4 + size])) + data[at + 8 + size :])
            files[f"{number:03}.{'png' if number % 2 else 'jpg'}"] = bytes(changed)
        manifest = sharded(tmp_path, files, check="decode")
        assert manifest.num_samples() + manifest.quarantined == 60
        if set(manifest.sample.shapes) == {"16x16x3/RGB"}:
            assert len(read(tmp_path)) == manifest.num_samples()

    def test_values_that_are_no_numbers_are_found_in_images_too(self):
        values = np.ones((6, 6), np.float32)
        values[2, 3] = np.nan
        prepare(tiff(values), "tif", ShardSpec())
        with pytest.raises(BadSample, match="not_finite"):
            prepare(tiff(values), "tif", ShardSpec(check="decode"))

    def test_a_png_whose_pixels_are_short_is_found(self):
        header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
        data = b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(bytes(90))) + png_chunk(b"IEND", b"")
        prepare(data, "png", ShardSpec())
        with pytest.raises(BadSample, match="decode"):
            prepare(data, "png", ShardSpec(check="decode"))


class TestWholeTiffs:
    """What strips or tiles of a TIFF do not give is not made up: tifffile leaves it 0 and says so in a log."""

    def changed(self, data: bytes, **values: list[int]) -> bytes:
        """Return a little-endian TIFF of which these tags have other values."""
        out = bytearray(data)
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            tags = {name: file.pages[0].tags[name] for name in values}
        for name, found in values.items():
            place = len(out)
            out += struct.pack(f"<{len(found)}I", *found)
            short = found[0] if len(found) == 1 else place
            struct.pack_into("<HII", out, tags[name].offset + 2, 4, len(found), short)
        return bytes(out)

    @pytest.mark.parametrize("compression", [None, "lzw", "zlib", "packbits", "zstd", "lzma"])
    @pytest.mark.parametrize("form", [{"rowsperstrip": 16}, {"tile": (16, 16)}], ids=["strips", "tiles"])
    def test_one_that_lacks_some_is_refused(self, form, compression):
        values = noise(RANDOM, 64, 48, 1)[..., 0]
        data = tiff(values, compression=compression, **form)
        names = ("TileOffsets", "TileByteCounts") if "tile" in form else ("StripOffsets", "StripByteCounts")
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            offsets, counts = (list(file.pages[0].tags[name].value) for name in names)
        lost = [
            self.changed(data, **{names[0]: offsets[:2], names[1]: counts[:2]}),
            self.changed(data, **{names[1]: [counts[0], 0, *counts[2:]]}),
            self.changed(data, **{names[0]: [offsets[0], 0, *offsets[2:]]}),
            self.changed(data, ImageLength=[128]),
        ]
        np.testing.assert_array_equal(stored(data, "tif", check="decode")[1][..., 0], values)
        for cut in lost:
            for check in ("header", "decode"):
                with pytest.raises(
                    BadSample, match=r"truncated: TIFF (with \d+ of the \d+ (strips|tiles)|of \d+ bytes)|decode: not a readable"
                ):
                    prepare(cut, "tif", ShardSpec(check=check))
        if compression or "tile" in form:  # what GDAL stores of tiles without data
            sparse = self.changed(data, **{names[0]: [offsets[0], 0, *offsets[2:]], names[1]: [counts[0], 0, *counts[2:]]})
            assert (stored(sparse, "tif", check="decode")[1] == 0).sum() >= 256

    def test_a_tile_that_is_gigabytes_for_a_small_image_is_refused_by_its_tags(self):
        data = tiff(np.zeros((16, 16), np.uint8), tile=(16, 16), compression="zlib")
        prepare(self.changed(data, TileWidth=[4096], TileLength=[4096]), "tif", ShardSpec())
        large = self.changed(data, TileWidth=[57344], TileLength=[57344])
        with pytest.raises(BadSample, match="too_large: TIFF with tiles of 57344x57344 pixels for an image of 16x16"):
            prepare(large, "tif", ShardSpec())

    def pages(self, num: int, last: int) -> bytes:
        """Return a TIFF whose last page is followed by the page of this number, or by nothing inside the file."""
        data = tiff(np.zeros((4, 4), np.uint8), software="")
        at = struct.unpack_from("<I", data, 4)[0]
        directory = data[at : at + 2 + 12 * struct.unpack_from("<H", data, at)[0]]
        places = [at, *(len(data) + (len(directory) + 4) * number for number in range(num - 1))]
        follows = [*places[1:], places[last] if last < num else 1 << 30]
        out = bytearray(data) + b"".join(directory + struct.pack("<I", place) for place in follows[1:])
        struct.pack_into("<I", out, at + len(directory), follows[0])
        return bytes(out)

    @pytest.mark.parametrize("last", [0, 90, 149])
    def test_pages_in_a_circle_are_each_one(self, last):
        """Of more than 100 tifffile never found the end: its list of them took the whole memory."""
        assert image_header(self.pages(150, last), "tif").frames == 150

    def test_pages_that_are_outside_the_file_are_not_left_out(self):
        with pytest.raises(BadSample, match="truncated: TIFF of .* bytes, its page 4 is at byte 1073741824"):
            image_header(self.pages(3, 3), "tif")


class TestChunksOfPngs:
    """Decoders get the chunks that make pixels: what they say of others is a line for each image and epoch on standard error."""

    PIXELS = noise(np.random.default_rng(8), 13, 11, 3)

    def file(
        self, *before: bytes, after: bytes = b"", colour: int = 2, lines: bytes | None = None, interlaced: bool = False, depth: int = 8
    ):
        header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 11, 13, depth, colour, 0, 0, interlaced))
        lines = b"".join(b"\0" + row.tobytes() for row in self.PIXELS) if lines is None else lines
        return b"".join([b"\x89PNG\r\n\x1a\n", header, *before, png_chunk(b"IDAT", zlib.compress(lines)), after, png_chunk(b"IEND", b"")])

    def read(self, data: bytes) -> np.ndarray:
        """Return the pixels, which both decoders and a conversion must agree on."""
        header, kept = prepare(data, "png", ShardSpec(check="decode"))
        one, other = (Decoder(Reading(decoder), SampleFormat.parse(header.format_text)).batch([kept])[0] for decoder in DECODERS)
        np.testing.assert_array_equal(one, other)
        prepare(data, "png", ShardSpec(resize=4))
        return one

    @pytest.mark.parametrize(
        ("kind", "content"),
        [
            (b"iCCP", b"icc\0\0" + zlib.compress(bytes(200))),
            (b"sRGB", b"\x09"),
            (b"sBIT", b"\x20\0\0"),
            (b"pHYs", b"\0"),
            (b"tIME", bytes(7)),
            (b"bKGD", b"\0"),
            (b"hIST", b"\0\0"),
            (b"tRNS", b"\0"),
            (b"zTXt", b"text\0\0" + zlib.compress(bytes(100 << 20))),
            (b"PLTE", bytes(6)),
        ],
    )
    def test_damaged_ones_that_make_no_pixels_are_no_line_and_no_refusal(self, kind, content, capfd):
        np.testing.assert_array_equal(self.read(self.file(png_chunk(kind, content))), self.PIXELS)
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize(
        ("colour", "depth"),
        [
            (colour, depth)
            for colour, depths in {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}.items()
            for depth in depths
        ],
    )
    def test_interlaced_ones_are_no_line_and_have_their_pixels(self, colour, depth, capfd):
        random, samples = np.random.default_rng(depth), {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
        values = random.integers(0, 1 << depth, (13, 11, samples), dtype=np.uint16)
        colours = noise(random, 1, 1 << min(depth, 8), 3)[0]

        def lines(part: np.ndarray) -> bytes:
            bits = (part.reshape(len(part), -1, 1) >> np.arange(depth)[::-1] & 1).astype(np.uint8).reshape(len(part), -1)
            return b"".join(b"\0" + np.packbits(row).tobytes() for row in bits) if part.size else b""

        passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
        data = b"".join(lines(values[top::down, left::across]) for top, left, down, across in passes)
        wanted = colours[values[..., 0]] if colour == 3 else values.astype(np.uint16 if depth == 16 else np.uint8)
        wanted = wanted * np.uint8(255 // ((1 << depth) - 1)) if depth < 8 and colour == 0 else wanted
        before, white = [png_chunk(b"PLTE", colours.tobytes())] if colour == 3 else [], 65535 if depth == 16 else 255
        np.testing.assert_array_equal(self.read(self.file(*before, colour=colour, depth=depth, lines=data, interlaced=True)), wanted)
        if colour in (0, 2):
            key = png_chunk(b"tRNS", struct.pack(f">{samples}H", *values[0, 0].tolist()))
            found = self.read(self.file(key, colour=colour, depth=depth, lines=data, interlaced=True))
            clear = (values == values[0, 0]).all(-1, keepdims=True)
            np.testing.assert_array_equal(found, np.concatenate([wanted, np.where(clear, 0, white).astype(wanted.dtype)], -1))
        with pytest.raises(BadSample):
            self.read(self.file(*before, colour=colour, depth=depth, lines=data[:-3], interlaced=True))
        assert capfd.readouterr() == ("", "")

    def test_transparency_that_is_none_is_no_channel(self, tmp_path):
        key = png_chunk(b"tRNS", struct.pack(">HHH", *self.PIXELS[0, 0].tolist()))
        files = {"a.png": self.file(key), "b.png": self.file(png_chunk(b"tRNS", b"\0\0")), "c.png": self.file(after=key)}
        assert [self.read(data).shape[2] for data in files.values()] == [4, 3, 3]
        assert sharded(tmp_path, files).sample.shapes == {"13x11x4/RGBA": 1, "13x11x3/RGB": 2}, "the fast path knows it too"
        colours, clear = png_chunk(b"PLTE", bytes(range(48))), png_chunk(b"tRNS", b"\0\x80")
        lines = b"".join(b"\0" + bytes(range(11)) for _ in range(13))
        for before, after, channels in (
            ([colours, clear], b"", 4),
            ([clear, colours], b"", 3),
            ([colours], clear, 3),
            ([colours, png_chunk(b"tRNS", bytes(200))], b"", 3),
            ([png_chunk(b"PLTE", bytes(33)), colours, png_chunk(b"tRNS", bytes(16))], b"", 3),  # fits the second palette, which is none
            ([png_chunk(b"PLTE", bytes(34)), colours, png_chunk(b"tRNS", bytes(16))], b"", 4),
        ):
            data = self.file(*before, after=after, colour=3, lines=lines)
            assert self.read(data).shape[2] == channels
            made = sharded(tmp_path / f"{len(data)} {channels}", {"a.png": data}).sample.shapes
            assert list(made) == [{4: "13x11x4/PA", 3: "13x11x3/P"}[channels]], "the fast path knows it too"

    @pytest.mark.parametrize("decoder", ["imagecodecs", "pillow"])
    def test_what_cannot_be_read_without_more_is_refused_by_both_decoders_with_a_reason(self, decoder):
        unknown, bare = self.file(png_chunk(b"ABCD", b"\0")), self.file(colour=3, lines=bytes(12 * 13))
        for data, text in ((unknown, "PNG with a chunk b'ABCD', without which"), (bare, "PNG of palette colours without a palette")):
            with pytest.raises(BadSample, match=text):
                prepare(data, "png", ShardSpec(check="decode"))
            with pytest.raises(DataError, match=text):
                Decoder(Reading(decoder), SampleFormat.parse(image_header(data, "png").format_text)).batch([data])
        method = struct.pack(">IIBBBBB", 11, 13, 8, 2, 1, 0, 0)
        with pytest.raises(BadSample, match="PNG of compression 1, filters 0 and interlace 0, which do not exist"):
            image_header(b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", method) + self.file()[33:], "png")

    def test_very_many_chunks_take_linear_time(self):
        """A copy of the rest for each of them was minutes for a picture of 15 MB."""
        data = self.file(png_chunk(b"tEXt", b"a\0b" + bytes(50)) * 100_000)
        began = time.process_time()
        np.testing.assert_array_equal(self.read(data), self.PIXELS)
        assert time.process_time() - began < 20


class TestVersions:
    def test_a_dataset_of_version_1_is_appended_to_as_it_was_read(self, tmp_path):
        turned = saved(Image.new("L", (8, 4)), "PNG", exif=exif(6))
        sharded(tmp_path, {"a.png": turned}, pixels=1)
        manifest = sharded(tmp_path, {"b.png": turned})
        assert (manifest.number, manifest.sample.shapes) == (2, {"4x8x1/L": 2})
        assert "pixels" not in manifest.identity["shards"]
        assert read(tmp_path, transform=TransformSpec(pixels=1)).shape == (2, 1, 4, 8)
        with pytest.raises(DataError, match=r"written with shards.pixels=1 .* or set transform.pixels=1"):
            read(tmp_path)

    def test_new_datasets_and_checkpoints_record_the_version(self, tmp_path):
        manifest = sharded(tmp_path, {"a.png": saved(Image.new("L", (8, 4)), "PNG")})
        assert manifest.identity["shards"]["pixels"] == 2
        claim = json.loads((tmp_path / "out/run.000001.json").read_text())
        assert claim["identity"]["dataset"]["shards"]["pixels"] == 2
        assert dataclasses.asdict(TransformSpec().reading)["pixels"] == 2

    def test_adopted_tars_are_read_as_they_are_meant(self, tmp_path):
        pixels = noise(RANDOM, 6, 4, 3, "u2")
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            for number in range(3):
                data = tiff(pixels, photometric="rgb")
                info = tarfile.TarInfo(f"{number}.tif")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        adopt_shards(WebdatasetSpec(url=str(tmp_path / "x.tar")), str(tmp_path / "out"))
        np.testing.assert_array_equal(read(tmp_path), np.stack([pixels.transpose(2, 0, 1)] * 3))
        with pytest.raises(ConfigError, match="frames=all"):
            adopt_shards(WebdatasetSpec(url=str(tmp_path / "x.tar"), frames="all"), str(tmp_path / "other"))
