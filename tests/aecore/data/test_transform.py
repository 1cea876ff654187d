"""Pixels are what the file says, for both decoders; values reach the network in the range that the spec names."""

import dataclasses
import io
import struct
import subprocess
import sys
import zlib
from typing import Any

import imagecodecs
import numpy as np
import PIL
import pytest
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image

from aecore._base.batch import Batch
from aecore.data.format.decode import DecodeError, Decoder, DecoderName, Reading, decoder_version
from aecore.data.format.sample_format import SampleFormat
from aecore.data.format.transform import Transform, TransformSpec, preprocessing_sha256
from aecore.errors import ConfigError, DataError

torch.set_num_threads(1)
RNG = np.random.default_rng(0)
GRAY = RNG.integers(0, 256, (5, 7), dtype=np.uint8)
RGB = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
RGBA = RNG.integers(0, 256, (5, 7, 4), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (5, 7), dtype=np.uint16)
BOTH: list[DecoderName] = ["imagecodecs", "pillow"]


def encoded(pixels: NDArray[np.generic], format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def raw_png(width: int, height: int, depth: int, colour: int, rows: list[bytes], extra: bytes = b"", interlaced: int = 0) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def interlaced_png(gray: NDArray[np.uint8]) -> bytes:
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    rows = [row.tobytes() for x, y, dx, dy in passes for row in gray[y::dy, x::dx] if row.size]
    return raw_png(gray.shape[1], gray.shape[0], 8, 0, rows, interlaced=1)


PALETTE = chunk(b"PLTE", bytes([1, 2, 3, 4, 5, 6]))
HALF_CLEAR = chunk(b"tRNS", b"\0\xff")
COLOURS = np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)
PNGS: dict[str, tuple[bytes, str, NDArray[np.generic]]] = {
    "gray": (encoded(GRAY), "L", GRAY[..., None]),
    "rgb": (encoded(RGB), "RGB", RGB),
    "rgba": (encoded(RGBA), "RGBA", RGBA),
    "gray and alpha": (encoded(RGBA[..., :2]), "LA", RGBA[..., :2]),
    "16 bit": (encoded(DEEP), "I;16", DEEP[..., None]),
    "1 bit": (encoded(GRAY > 128), "1", np.where(GRAY > 128, 255, 0).astype(np.uint8)[..., None]),
    "2 bit": (raw_png(4, 1, 2, 0, [b"\x1b"]), "L", np.array([[[0], [85], [170], [255]]], np.uint8)),
    "palette": (raw_png(2, 1, 8, 3, [b"\0\1"], PALETTE), "P", COLOURS),
    "palette with alpha": (
        raw_png(2, 1, 8, 3, [b"\0\1"], PALETTE + HALF_CLEAR),
        "PA",
        np.array([[[1, 2, 3, 0], [4, 5, 6, 255]]], np.uint8),
    ),
    "1 bit palette": (raw_png(2, 1, 1, 3, [b"\x40"], PALETTE), "P", COLOURS),
    "gray colour key": (raw_png(2, 1, 8, 0, [b"\1\2"], chunk(b"tRNS", b"\0\1")), "LA", np.array([[[1, 0], [2, 255]]], np.uint8)),
    "rgb colour key": (raw_png(1, 1, 8, 2, [b"\1\2\3"], chunk(b"tRNS", b"\0\1\0\2\0\3")), "RGBA", np.array([[[1, 2, 3, 0]]], np.uint8)),
    "gamma": (raw_png(2, 1, 8, 0, [b"\1\x80"], chunk(b"gAMA", struct.pack(">I", 20000))), "L", np.array([[[1], [128]]], np.uint8)),
    "interlaced": (interlaced_png(GRAY), "L", GRAY[..., None]),
}


def form(pixels: NDArray[np.generic], mode: str) -> SampleFormat:
    return SampleFormat.from_shapes({"x".join(map(str, pixels.shape)) + "/" + mode: 1})


@pytest.mark.parametrize("decoder", BOTH)
@pytest.mark.parametrize("name", PNGS)
def test_png_pixels_are_exact_for_both_decoders(name: str, decoder: DecoderName, capfd: pytest.CaptureFixture[str]) -> None:
    data, mode, pixels = PNGS[name]
    out = Decoder(Reading(decoder), form(pixels, mode)).batch([data, data])
    assert out.dtype == pixels.dtype
    np.testing.assert_array_equal(out, np.stack([pixels, pixels]))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("decoder", BOTH)
@pytest.mark.parametrize(("name", "mode"), [("palette with alpha", "P"), ("gray colour key", "L"), ("rgb colour key", "RGB")])
def test_version_1_drops_transparency_that_is_no_channel(name: str, mode: str, decoder: DecoderName) -> None:
    data, _, pixels = PNGS[name]
    out = Decoder(Reading(decoder, pixels=1), form(pixels[..., :-1], mode)).batch([data, data])
    np.testing.assert_array_equal(out, np.stack([pixels[..., :-1]] * 2))


def test_sixteen_bit_colour_needs_imagecodecs_in_version_1() -> None:
    data, sample = raw_png(1, 1, 16, 2, [b"\1\2\3\4\5\6"]), SampleFormat((1, 1, 3), np.dtype("u2"), image=True)
    for reading in (Reading("imagecodecs"), Reading("pillow"), Reading("imagecodecs", pixels=1)):
        np.testing.assert_array_equal(Decoder(reading, sample).batch([data]).ravel(), [258, 772, 1286])
    with pytest.raises(DecodeError, match="transform.decoder=imagecodecs"):
        Decoder(Reading("pillow", pixels=1), sample).batch([data])


@pytest.mark.parametrize("decoder", BOTH)
@pytest.mark.parametrize("format", ["JPEG", "WEBP", "BMP", "TIFF"])
def test_other_formats_decode_close_to_the_pixels(format: str, decoder: DecoderName) -> None:
    smooth = np.stack([*np.meshgrid(np.arange(0, 256, 8), np.arange(0, 256, 8)), np.full((32, 32), 99)], axis=-1).astype(np.uint8)
    out = Decoder(Reading(decoder), form(smooth, "RGB")).batch([encoded(smooth, format)])
    assert np.abs(out[0].astype(int) - smooth).mean() < 4


@pytest.mark.parametrize("decoder", BOTH)
def test_arrays_keep_their_values(decoder: DecoderName) -> None:
    values = RNG.standard_normal((3, 4, 2)).astype(np.float32)
    out = Decoder(Reading(decoder), SampleFormat.from_shapes({"4x2/float32": 3})).batch([npy(value) for value in values])
    np.testing.assert_array_equal(out, values)


def npy(value: NDArray[np.generic]) -> bytes:
    file = io.BytesIO()
    np.save(file, value)
    return file.getvalue()


BAD_IMAGES = {
    "another size": encoded(GRAY[:4]),
    "another jpeg size": encoded(GRAY[:4], "JPEG"),
    "colour": encoded(RGB),
    "colour jpeg": encoded(RGB, "JPEG"),
    "16 bit": encoded(DEEP),
    "palette": raw_png(7, 5, 8, 3, [bytes(7)] * 5, PALETTE),
    "cut off": encoded(GRAY)[:60],
    "text": b"not an image",
    "empty": b"",
    "huge": raw_png(60_000, 60_000, 8, 0, []),
    "array": npy(GRAY.astype(np.float64)),
    "object array": npy(np.array([{}])),
}


@pytest.mark.parametrize("decoder", BOTH)
@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_bad_sample_is_an_error_that_carries_its_row(name: str, decoder: DecoderName) -> None:
    members, decode = [encoded(GRAY), BAD_IMAGES[name], encoded(GRAY)], Decoder(Reading(decoder), form(GRAY[..., None], "L"))
    with pytest.raises(DecodeError) as caught:
        decode.batch(members)
    assert caught.value.row == 1
    bad: list[DecodeError] = []
    out = decode.batch(members, on_bad=bad.append)
    assert [error.row for error in bad] == [1]
    np.testing.assert_array_equal(out[[0, 2], ..., 0], np.stack([GRAY, GRAY]))


def test_object_arrays_are_never_unpickled() -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return (pytest.fail, ("unpickled",))

    data = npy(np.array([Bomb()], dtype=object))
    with pytest.raises(DecodeError):
        Decoder(Reading("imagecodecs"), SampleFormat.from_shapes({"1/object": 1})).batch([data])


def test_several_forms_are_refused_with_the_remedy() -> None:
    assert SampleFormat.from_shapes({"5x7x1/L": 3, "5x7x1/1": 1}) == SampleFormat((5, 7, 1), np.dtype("u1"), image=True)
    with pytest.raises(DataError, match=r"2 different formats.*shards.resize=<side>"):
        SampleFormat.from_shapes({"5x7x1/L": 3, "5x8x1/L": 1})
    with pytest.raises(DataError, match="shards.mode=RGB"):
        SampleFormat.from_shapes({"5x7x4/CMYK": 1})
    with pytest.raises(DataError, match="HSV"):
        SampleFormat.from_shapes({"5x7x3/HSV": 1})


def test_a_missing_decoder_is_a_config_error_with_the_remedy() -> None:
    code = (
        "import sys; sys.modules['imagecodecs'] = None\n"
        "from aecore.data.format.decode import Decoder, Reading\n"
        "from aecore.data.format.sample_format import SampleFormat\n"
        "from aecore.errors import ConfigError\n"
        "sample = SampleFormat.from_shapes({'5x7x1/L': 1}); Decoder(Reading('pillow'), sample)\n"
        "try: Decoder(Reading('imagecodecs'), sample)\n"
        "except ConfigError as error: print(error)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "transform.decoder=imagecodecs" in said and "pip install imagecodecs" in said


def batch_of(x: torch.Tensor) -> Batch:
    return Batch(x, torch.arange(len(x)), torch.arange(len(x)), len(x))


STORED = [
    (torch.tensor([0, 51, 255], dtype=torch.uint8), [0.0, 0.2, 1.0]),
    (torch.tensor([0, 13107, 65535], dtype=torch.uint16), [0.0, 0.2, 1.0]),
    (torch.tensor([False, True, True]), [0.0, 1.0, 1.0]),
]


@pytest.mark.parametrize(("stored", "unit"), STORED)
def test_scales_follow_the_stored_type(stored: torch.Tensor, unit: list[float]) -> None:
    x = stored[None]
    for scale, expected in [("unit", unit), ("symmetric", [2 * value - 1 for value in unit]), ("none", stored.float().tolist())]:
        transform = Transform(TransformSpec(scale=scale))  # type: ignore[arg-type]  # one of the literals
        out = transform(batch_of(x)).x
        assert out.dtype == torch.float32
        torch.testing.assert_close(out[0], torch.tensor(expected))
        assert torch.equal(transform.inverse(out, stored.dtype), x)


def test_float_arrays_pass_unit_unchanged_and_are_refused_where_no_range_is_known() -> None:
    x = torch.tensor([[-3.0, 40.0]], dtype=torch.float64)
    assert Transform(TransformSpec())(batch_of(x)).x.tolist() == [[-3.0, 40.0]]
    for bad, scale in [(x, "symmetric"), (x.long(), "unit")]:
        with pytest.raises(DataError, match="transform.scale=none"):
            Transform(TransformSpec(scale=scale))(batch_of(bad))  # type: ignore[arg-type]  # one of the literals


def test_the_output_is_contiguous_and_the_stored_batch_stays_as_it_is() -> None:
    stored = torch.arange(2 * 4 * 5 * 3, dtype=torch.uint8).reshape(2, 4, 5, 3).permute(0, 3, 1, 2)
    before = stored.clone()
    assert Transform(TransformSpec())(batch_of(stored)).x.is_contiguous()
    assert torch.equal(stored, before)


def test_the_preprocessing_hash_names_scale_and_decoder_version() -> None:
    hashes = {
        preprocessing_sha256(TransformSpec()),
        preprocessing_sha256(TransformSpec(scale="symmetric")),
        preprocessing_sha256(TransformSpec(decoder="pillow")),
        preprocessing_sha256(TransformSpec(), "imagecodecs 1.0"),
    }
    assert len(hashes) == 4
    assert preprocessing_sha256(TransformSpec()) == preprocessing_sha256(TransformSpec(), decoder_version("imagecodecs"))
    old = TransformSpec(pixels=1)
    assert preprocessing_sha256(old) == preprocessing_sha256(old, f"imagecodecs {imagecodecs.__version__}"), "as version 1 wrote it"
    assert decoder_version("pillow") == f"pillow {PIL.__version__}, simplejpeg {simplejpeg.__version__}"


def test_unknown_scale_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="symmetric"):
        TransformSpec(scale="unti")  # type: ignore[arg-type]  # the mistake under test


def grey_batch(rows: torch.Tensor, num_global: int = 64) -> Batch:
    x = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16).expand(len(rows), 1, 16, 16)
    return Batch(x, rows, rows, num_global)


def test_black_and_white_pixels_are_drawn_with_the_probability_of_their_grey() -> None:
    transform, rows = Transform(TransformSpec(binarize="dynamic")), torch.arange(64)
    draws = torch.stack([transform(transform.draw(grey_batch(rows), 0, step)).x for step in range(40)])
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    grey = torch.arange(256).reshape(16, 16) / 255
    torch.testing.assert_close(draws.mean((0, 1, 2)), grey, atol=0.05, rtol=0)  # 2,560 draws of each
    assert (draws[..., 0, 0] == 0).all() and (draws[..., 15, 15] == 1).all()


def test_pixels_are_drawn_anew_at_every_step_and_alike_on_any_number_of_ranks() -> None:
    transform, rows = Transform(TransformSpec(binarize="dynamic")), torch.arange(64)
    whole = transform.draw(grey_batch(rows), 3, 7).x
    assert torch.equal(transform.draw(grey_batch(rows[40:]), 3, 7).x, whole[40:])
    assert not torch.equal(transform.draw(grey_batch(rows), 3, 8).x, whole)
    assert not torch.equal(transform.draw(grey_batch(rows), 4, 7).x, whole)
    alone = dataclasses.replace(grey_batch(rows[:1]), positions=rows[:0])  # a rank without a sample
    assert transform.draw(alone, 3, 7).x.shape == (1, 1, 16, 16)
    pair = dataclasses.replace(grey_batch(rows), x_pair=grey_batch(rows).x)
    drawn = transform.draw(pair, 3, 7)
    assert torch.equal(drawn.x, whole) and drawn.x_pair is not None and not torch.equal(drawn.x_pair, whole)


def test_without_binarize_a_batch_stays_as_it_is_and_encoding_always_takes_the_grey() -> None:
    batch = grey_batch(torch.arange(64))
    assert Transform(TransformSpec()).draw(batch, 0, 0) is batch
    dynamic = TransformSpec(binarize="dynamic")
    assert torch.equal(Transform(dynamic)(batch).x, Transform(TransformSpec())(batch).x)
    assert preprocessing_sha256(dynamic) == preprocessing_sha256(TransformSpec())


@pytest.mark.parametrize("scale", ["symmetric", "none"])
def test_only_grey_values_between_0_and_1_are_drawn_from(scale: Any) -> None:
    with pytest.raises(ConfigError, match=f"binarize=dynamic draws from grey values.*scale is {scale}: use unit"):
        TransformSpec(binarize="dynamic", scale=scale)


@pytest.mark.parametrize("value", [float("nan"), -0.01, 200.0])
def test_a_value_that_is_no_shade_of_grey_is_refused_where_it_would_be_drawn_from(value: float) -> None:
    x = torch.full((4, 3), 0.5)
    x[2, 1] = value
    rows = torch.arange(4)
    with pytest.raises(DataError, match=rf"grey values in \[0, 1\], and a batch holds {value:g}"):
        Transform(TransformSpec(binarize="dynamic")).draw(Batch(x, rows, rows, 4), 0, 0)


def test_the_count_of_formats_is_that_of_the_list_and_equal_sizes_need_no_resize():
    shapes = {"8x8x1/L": 3, "8x8x3/P": 2, "8x8x3/RGB": 1}
    with pytest.raises(DataError, match=r"3 different formats \(8x8x1/L \(3\), 8x8x3/P \(2\), 8x8x3/RGB \(1\)\)") as refused:
        SampleFormat.from_shapes(shapes)
    assert "shards.mode=L or RGB" in str(refused.value)
    assert "resize" not in str(refused.value)
