"""Turn a file into a shard's member: always check it, change it only for `shards.resize`, `shards.mode` or `shards.value_range`.

If size, mode and range are right already the original bytes are kept. Else the pixels, as they are meant, are composed over
`shards.background` where they have alpha, converted, resized (bicubic, to a square without keeping their aspect) and written: JPEG
stays JPEG (quality 95), what a PNG holds becomes PNG, all else TIFF of the same dtype. 16 bits become 8 by 255/65535, or by the precision
that the file states (12-bit JPEG: 255/4095); integers of other sizes and floats have no fixed range, so `mode` needs `value_range`.
Equal versions of the libraries give equal bytes.
"""

import dataclasses
import io
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from aecore.data.format.bad_sample import BadSample
from aecore.data.format.colour import BLOCK_VALUES, by_blocks, composed
from aecore.data.format.decode import DecodeError, Decoder, Reading
from aecore.data.format.foreign import explained
from aecore.data.format.image import ImageHeader, image_header, load_image
from aecore.data.format.pixels import decode_image, image_file, white_level
from aecore.data.format.record import DATA_EXTENSIONS, IMAGE_EXTENSIONS, Header, array_header, array_values
from aecore.data.format.sample_format import SampleFormat
from aecore.data.write.spec import ShardSpec
from aecore.errors import ConfigError, DataError

Frames = Literal["first", "all", "refuse"]
Pixels = NDArray[Any]  # any: every image has its own dtype
JPEG_QUALITY = 95
_JPEG = ("jpg", "jpeg")
_LARGE = 1e37  # far enough from the largest float32 for sums of them


def prepare(data: bytes, ext: str, shards: ShardSpec, frames: Frames = "first", ranged: Counter[str] | None = None) -> tuple[Header, bytes]:
    """Return header and bytes of the data member to store; BadSample if the bytes are damaged or not of an allowed kind.

    `ranged` counts the `images` that `shards.value_range` converts, their `values`, and the `cut` ones, which are outside of it.
    """
    try:
        return _prepared(data, ext, shards, frames, Counter() if ranged is None else ranged)
    except BadSample as bad:
        raise explained(data, ext, bad) from bad


def _prepared(data: bytes, ext: str, shards: ShardSpec, frames: Frames, ranged: Counter[str]) -> tuple[Header, bytes]:
    if ext not in IMAGE_EXTENSIONS:
        return _prepare_array(data, ext, shards)
    header = image_header(data, ext, pixels=shards.pixels, max_pixels=shards.max_pixels)
    if header.frames > 1 and frames == "refuse":
        raise BadSample("frames", f"{header.frames} pages or frames, and source.frames=refuse: choose first or all")
    if shards.check == "decode" or header.doubtful:
        if shards.pixels == 1:
            load_image(data, header)
        else:
            _require_decodable(data, header)
    if shards.resize is None and shards.mode == "keep" and not _has_range(header, shards):
        return header, data
    fits = shards.resize is None or (header.width == header.height == shards.resize and not _loses_alpha(header, shards))
    if fits and shards.mode in ("keep", header.mode) and not _has_range(header, shards):
        return header, data
    return _converted_1(data, header, shards) if shards.pixels == 1 else _converted(data, header, shards, ranged)


def _require_decodable(data: bytes, header: ImageHeader) -> None:
    """Raise BadSample unless the decoder of training decodes the image, with its reason."""
    try:
        pixels = Decoder(Reading(), SampleFormat.parse(header.format_text)).batch([data])
    except DecodeError as error:
        raise BadSample(error.reason, str(error)) from error
    except DataError as error:
        raise BadSample("unsupported", str(error)) from error
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        raise BadSample("not_finite", "the image holds NaN or infinity")


def _decoded(step: Callable[[], Any]) -> Any:  # any: the result of `step`
    """Return the result of decoding; BadSample for what codecs raise."""
    try:
        return step()
    except MemoryError:
        raise
    except Exception as error:
        raise BadSample.of(error) from error


def _prepare_array(data: bytes, ext: str, shards: ShardSpec) -> tuple[Header, bytes]:
    if ext != "npy":
        raise BadSample("extension", f"files of extension {ext!r} are not stored (allowed: {', '.join(sorted(DATA_EXTENSIONS))})")
    if shards.resize is not None or shards.mode != "keep" or shards.value_range is not None:
        raise ConfigError(
            "shards.resize, shards.mode and shards.value_range work on images; this source gives arrays (.npy): leave them at their "
            "defaults"
        )
    header = array_header(data, pixels=shards.pixels, layout=shards.layout)
    if 0 in header.shape:
        raise BadSample("empty", f"an array of shape {header.shape} holds no values")
    if shards.check == "decode" and not np.isfinite(array_values(data, header)).all():
        raise BadSample("not_finite", "the array holds NaN or infinity")
    return header, data


def _loses_alpha(header: ImageHeader, shards: ShardSpec) -> bool:
    """Return whether the image has alpha, which a resize composes: also where its size is right already, as resized ones have none."""
    return shards.pixels == 2 and SampleFormat.parse(header.format_text).has_alpha


def _has_range(header: ImageHeader, shards: ShardSpec) -> bool:
    """Return whether `value_range` says what the values of this image mean: 8 bits have their range."""
    return shards.value_range is not None and SampleFormat.parse(header.format_text).dtype != np.uint8


def _converted(data: bytes, header: ImageHeader, shards: ShardSpec, ranged: Counter[str]) -> tuple[Header, bytes]:
    pixels, has_alpha = _decoded(lambda: decode_image(data))
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        raise BadSample("not_finite", "the image holds NaN or infinity, which cannot be resized or converted")
    white = float(_decoded(lambda: white_level(data, pixels.dtype)))
    if shards.value_range is not None and pixels.dtype != np.uint8:
        pixels, white = _in_range(pixels, *shards.value_range, white if has_alpha else None, ranged), 65535.0
    if has_alpha:
        pixels = composed(pixels, shards.background, white)
    if shards.mode != "keep":
        pixels = _to_mode(pixels, shards.mode, white)
    if shards.resize is not None and pixels.shape[:2] != (shards.resize, shards.resize):
        pixels = _resized(pixels, shards.resize)
    changed, ext = _encoded(pixels, header)
    return dataclasses.replace(image_header(changed, ext, max_pixels=shards.max_pixels), frames=header.frames), changed


def _in_range(pixels: Pixels, black: float, white: float, opaque: float | None, ranged: Counter[str]) -> Pixels:
    """Return 16 bits from black to white, counted; `opaque` is the largest alpha (None: there is none), which keeps its share."""
    ranged["images"] += 1

    def convert(block: Pixels) -> Pixels:
        shares = (block.astype(np.float64) - black) / (white - black)
        if opaque is not None:
            shares[..., -1] = block[..., -1] / opaque
        colours = shares if opaque is None else shares[..., :-1]
        ranged["values"] += colours.size
        ranged["cut"] += int(np.count_nonzero((colours < 0) | (colours > 1)))
        return np.rint(np.clip(shares, 0, 1) * 65535).astype(np.uint16)

    return by_blocks(convert, pixels)


def _to_mode(pixels: Pixels, mode: Literal["L", "RGB"], white: float) -> Pixels:
    """Return 8 bits of grey or RGB, white from `white` on; BadSample if the pixels have no fixed range or are neither."""
    if pixels.dtype == np.uint16:
        pixels = by_blocks(lambda block: np.rint(np.minimum(block * (255 / white), 255)).astype(np.uint8), pixels)
    if pixels.dtype != np.uint8:
        raise BadSample(
            "unsupported",
            f"{pixels.dtype} values have no fixed range to convert from: say it with shards.value_range=[black,white], or keep the "
            "original values (shards.mode=keep)",
        )
    if pixels.shape[2] not in (1, 3):
        raise BadSample("unsupported", f"an image of {pixels.shape[2]} bands has no mode {mode}: keep the bands (shards.mode=keep)")
    return np.asarray(_pillow_image(pixels).convert(mode)).reshape(*pixels.shape[:2], -1)


def _resized(pixels: Pixels, side: int) -> Pixels:
    """Return the pixels resized band by band: 8 bits by Pillow's integers, what float32 holds by Pillow, the rest alike in float64."""
    from PIL import Image

    size, bicubic = (side, side), Image.Resampling.BICUBIC
    if pixels.dtype == np.uint8 and pixels.shape[2] in (1, 3):
        return np.asarray(_pillow_image(pixels).resize(size, bicubic)).reshape(side, side, -1)
    if np.can_cast(pixels.dtype, np.float32) and max(abs(float(pixels.min())), abs(float(pixels.max()))) < _LARGE:
        stored = np.moveaxis(pixels, 2, 0)  # one band after the other in float32
        bands = [np.asarray(Image.fromarray(band.astype(np.float32)).resize(size, bicubic)) for band in stored]
        resized = np.stack(bands, axis=2).astype(np.float64) * 0.25
    else:
        rows = max(1, BLOCK_VALUES // pixels[0].size)
        across = [_across(pixels[top : top + rows], side) for top in range(0, len(pixels), rows)]
        resized = _resampled(np.concatenate(across), side, axis=0)
    if pixels.dtype.kind == "f":
        limit = float(np.finfo(pixels.dtype).max) * 0.25
        return (resized.clip(-limit, limit).astype(pixels.dtype) * 4).astype(pixels.dtype)
    limits = np.iinfo(pixels.dtype)
    return np.rint(resized * 4).clip(limits.min, limits.max).astype(pixels.dtype)


def _across(pixels: Pixels, side: int) -> NDArray[np.float64]:
    """Return rows as `side` columns of a quarter of their values, since bicubic goes beyond the largest of them."""
    values = pixels.astype(np.float64)
    if pixels.dtype.kind in "iu" and not np.array_equal(values.astype(pixels.dtype), pixels):
        raise BadSample("unsupported", f"{pixels.dtype} values above 2^53 cannot be resized exactly: save them as 32 bits or float64")
    return _resampled(values * 0.25, side, axis=1)


def _resampled(values: NDArray[np.float64], size: int, axis: int) -> NDArray[np.float64]:
    """Return `size` samples along an axis, by the cubic convolution of Keys (1981, a=-1/2), widened where samples get fewer.

    As Pillow defines it: sample n is centred at (n + 1/2) * scale, and taps outside the image are left out.
    """
    scale, moved = values.shape[axis] / size, np.moveaxis(values, axis, 0)
    width = max(scale, 1.0)
    out = np.empty((size, *moved.shape[1:]))
    for number in range(size):
        centre = (number + 0.5) * scale
        first, last = max(0, int(centre - 2 * width + 0.5)), min(len(moved), int(centre + 2 * width + 0.5))
        x = np.abs((np.arange(first, last) + 0.5 - centre) / width)
        taps = np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, np.where(x < 2, ((-0.5 * x + 2.5) * x - 4) * x + 2, 0))
        out[number] = np.tensordot(taps / taps.sum(), moved[first:last], 1)
    return np.moveaxis(out, 0, axis)


def _pillow_image(pixels: Pixels) -> Any:  # any: PIL.Image.Image
    from PIL import Image

    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels))


def _encoded(pixels: Pixels, header: ImageHeader) -> tuple[bytes, str]:
    """Return the file of converted pixels, and its extension."""
    if header.ext in _JPEG and pixels.dtype == np.uint8 and pixels.shape[2] in (1, 3):
        out = io.BytesIO()
        _pillow_image(pixels).save(out, "JPEG", quality=JPEG_QUALITY)
        return out.getvalue(), header.ext
    if pixels.shape[2] in (1, 3):
        return image_file(pixels)
    from aecore.data.format.tiff import tiff_file  # imported late: most datasets have no TIFF

    return tiff_file(pixels), "tiff"  # of a PNG, two and four channels have alpha


def _converted_1(data: bytes, header: ImageHeader, shards: ShardSpec) -> tuple[Header, bytes]:
    """Return header and bytes as `pixels=1` converts: as stored, by Pillow; alpha dropped by `mode`."""
    if header.mode.startswith(("I", "F")) and not header.mode.startswith("I;16"):
        raise BadSample(
            "unsupported",
            f"an image of mode {header.mode} (32-bit integers or floats) has no fixed range to convert from: write it as 8 or 16 bits, "
            "or keep the original bytes (no shards.resize, shards.mode=keep)",
        )
    image = _to_mode_1(load_image(data, header), shards.mode)
    if shards.resize is not None and image.size != (shards.resize, shards.resize):
        image = _resized_1(image, shards.resize)
    changed = _encoded_1(image, header)
    return image_header(changed, header.ext if header.ext in _JPEG else "png", pixels=1, max_pixels=shards.max_pixels), changed


def _encoded_1(image: Any, header: ImageHeader) -> bytes:  # any: PIL.Image.Image
    out = io.BytesIO()
    try:
        if header.ext in _JPEG:
            image.save(out, "JPEG", quality=JPEG_QUALITY)
        else:
            image.save(out, "PNG")
    except OSError as error:  # Pillow's error for a mode that the format does not have
        raise BadSample("unsupported", f"{error}: choose shards.mode, or keep the original bytes (no shards.resize)") from error
    return out.getvalue()


def _to_mode_1(image: Any, mode: str) -> Any:  # any: PIL.Image.Image
    from PIL import Image

    if mode == "keep":
        steps = {"P": "RGBA" if "transparency" in image.info else "RGB", "1": "L"}  # modes that cannot be interpolated
        return image.convert(steps[image.mode]) if image.mode in steps else image
    if image.mode.startswith("I"):  # 16 bits: others were refused
        levels = by_blocks(lambda block: np.rint(block.clip(0, 65535) * (255 / 65535)).astype(np.uint8), np.asarray(image))
        image = Image.fromarray(levels)
    return image if image.mode == mode else image.convert(mode)


def _resized_1(image: Any, side: int) -> Any:  # any: PIL.Image.Image
    from PIL import Image

    if not image.mode.startswith("I"):
        return image.resize((side, side), Image.Resampling.BICUBIC)
    resized = Image.fromarray(np.asarray(image).astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC)
    return Image.fromarray(np.rint(np.clip(np.asarray(resized), 0, 65535)).astype(np.uint16))
