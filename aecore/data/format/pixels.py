"""The pixels of one image of any format that is read, as they are meant (`pixels=2`): the one decoder that decides what is readable.

Sharding, `shards.check=decode`, training and encoding all end here for whatever is not plain, and for what a faster decoder refuses.
imagecodecs decodes PNG, libjpeg-turbo JPEG (by simplejpeg, else imagecodecs: the same pixels), tifffile TIFF, Pillow the rest (and plain
JPEG for `transform.decoder=pillow`). A JPEG that lacks a part of its pixels is refused, whoever decodes it.
"""

import contextlib
import copy
import io
import struct
import zlib
from collections import defaultdict
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from aecore.data.format.bad_sample import BadSample
from aecore.data.format.colour import cmyk_to_rgb, white_of
from aecore.data.format.image import TIFF_STARTS, ImageHeader, opened_orientation, png_orientation, png_to_decode, require_size
from aecore.data.format.jpeg import clean_pixels, has_all_scans, is_whole_jpeg, jpeg_orientation, jpeg_precision, jpeg_size
from aecore.data.format.orientation import UPRIGHT, upright
from aecore.data.format.pillow import open_unbounded
from aecore.data.format.png import png_chunk

Pixels = NDArray[Any]  # any: uint8 to float64
PNG_MAGIC, JPEG_MAGIC = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
TOTAL_IMAGES, TOTAL_PER_BYTE = 4, 256  # pixels of a file of several images: images of the largest size, and pixels for each of its bytes
_PNG_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of a pixel, by the kind of colour
_ADAM7 = (
    (0, 0, 8, 8),
    (0, 4, 8, 8),
    (4, 0, 8, 4),
    (0, 2, 4, 4),
    (2, 0, 4, 2),
    (0, 1, 2, 2),
    (1, 0, 2, 1),
)  # top, left, and steps of each pass
_MOST_WHOLE = 1 << 17
_whole_seen: set[int] = set()  # hashes of JPEGs that took several decodes to tell that they are whole: training reads them again


class Picture(NamedTuple):
    """Pixels `[H, W, C]` as they are seen, and whether the last channel is (straight) alpha."""

    pixels: Pixels
    has_alpha: bool


def decode_image(data: bytes, decoder: Literal["imagecodecs", "pillow"] = "imagecodecs") -> Picture:
    """Return an image (of several the first) after its header was checked. Raises what the codecs do for damaged pixels."""
    if data.startswith(PNG_MAGIC):
        return _png(data, decoder)
    if data.startswith(JPEG_MAGIC):
        return _jpeg(data, decoder)
    if data.startswith(TIFF_STARTS):
        from aecore.data.format.tiff import tiff_pixels  # imported late: most datasets have no TIFF

        return Picture(*tiff_pixels(data))
    return _pillow(data)


class OpenImage:
    """A file of several images, parsed once: to decode them in their order takes linear time. `close` it.

    Whether an image can be decoded, and its pixels, do not depend on what was read before: after one that is damaged decoding begins anew.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._tiff: Any = None  # any: TiffImages, imported late
        self._image: Any = None  # any: PIL.Image.Image
        self._total = 0  # pixels of all images, once they are known
        self._next = 0  # the first frame that was not decoded on the way to the last one
        self._end: tuple[int, Exception] | None = None  # the first frame that damaged ones before it make unreachable, and why
        if data.startswith(TIFF_STARTS):
            from aecore.data.format.tiff import TiffImages

            self._tiff = TiffImages(data)
        else:
            self._image = open_unbounded(data)

    def close(self) -> None:
        """Close the file."""
        (self._image if self._tiff is None else self._tiff).close()

    def require_total(self, max_pixels: int) -> None:
        """Raise BadSample if all images together have more pixels than a file of its bytes may cost."""
        if self._total == 0:
            image = self._image
            self._total = self._tiff.total_pixels() if image is None else image.width * image.height * getattr(image, "n_frames", 1)
        require_total(self._total, len(self._data), max_pixels)

    def passed(self, number: int) -> range:
        """Return the frames that decoding this one passes: none of a TIFF, whose pages are read by themselves."""
        if self._tiff is not None:
            return range(0)
        return range(self._next if number >= self._image.tell() else 0, number if self._end is None else min(number, self._end[0]))

    def frame(self, number: int, max_pixels: int) -> Picture:
        """Return one image; BadSample before it is decoded if it is too large (see `require_size`), else as `decode_image`."""
        if self._tiff is not None:
            width, height, pixel_bytes = self._tiff.size(number)
            require_size(width, height, max_pixels, pixel_bytes)
            return Picture(*self._tiff.pixels(number))
        self._next = number + 1
        require_size(self._image.width, self._image.height, max_pixels)
        if number == 0 and self._data.startswith((PNG_MAGIC, JPEG_MAGIC)):
            return decode_image(self._data)
        if self._end is not None and number >= self._end[0]:
            raise copy.copy(self._end[1])
        if number < self._image.tell():  # Pillow's own way back fails for PNG
            self._reopen()
        try:
            self._image.seek(number)
        except Exception as error:
            self._end = number, copy.copy(error)  # without the traceback, which holds this file
            self._reopen()
            raise
        require_size(self._image.width, self._image.height, max_pixels)
        if self._data.startswith(JPEG_MAGIC):  # refused as the first one is, if it lacks a part of its pixels
            return _jpeg(self._data[self._image.offset :], "imagecodecs")
        try:
            return _opened_pillow(self._image, turned=True)
        except Exception:  # the decoder holds what it made of the damage
            self._reopen()
            raise

    def _reopen(self) -> None:
        self._image.close()
        self._image = open_unbounded(self._data)


def require_total(total: int, size: int, max_pixels: int) -> None:
    """Raise BadSample if all pages or frames of a file together have more pixels than one of `size` bytes may cost."""
    most = TOTAL_IMAGES * max_pixels + TOTAL_PER_BYTE * size
    if total > most:
        raise BadSample(
            "too_large",
            f"a file of {size} bytes whose pages or frames have {total} pixels together, at most {most} are decoded "
            f"({TOTAL_IMAGES} times shards.max_pixels and {TOTAL_PER_BYTE} a byte): save them as files of their own",
        )


def require_frames(data: bytes, header: ImageHeader, max_pixels: int) -> None:
    """Raise BadSample if no frame of a file of several may be decoded: `require_total`, or all are too large (pages differ in size)."""
    if data.startswith(TIFF_STARTS):
        with contextlib.closing(OpenImage(data)) as image:
            image.require_total(max_pixels)
        return
    require_size(header.width, header.height, max_pixels)
    require_total(header.width * header.height * header.frames, len(data), max_pixels)


def white_level(data: bytes, dtype: np.dtype[Any]) -> float:  # any: every image has its own dtype
    """Return the value of white in a decoded image, by the precision of a JPEG or TIFF (12 bits: 4095), else by its dtype."""
    bits = 8 * dtype.itemsize
    if dtype.kind != "u" or bits == 8:
        return white_of(dtype)
    if data.startswith(JPEG_MAGIC):
        bits = jpeg_precision(data)
    elif data.startswith(TIFF_STARTS):
        from aecore.data.format.tiff import tiff_precision  # imported late: most datasets have no TIFF

        bits = tiff_precision(data)
    return float((1 << min(bits, 8 * dtype.itemsize)) - 1)


def image_file(pixels: Pixels) -> tuple[bytes, str]:
    """Return pixels `[H, W, C]` as a file without loss, and its extension: PNG for what a PNG holds, else TIFF of the same dtype."""
    if pixels.dtype == np.uint8 and pixels.shape[2] <= 4:
        from PIL import Image

        out = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)).save(out, "PNG")
        return out.getvalue(), "png"
    if pixels.dtype == np.uint16 and pixels.shape[2] <= 4:
        import imagecodecs

        return bytes(imagecodecs.png_encode(np.ascontiguousarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels))), "png"
    from aecore.data.format.tiff import tiff_file  # imported late: most datasets have no TIFF

    return tiff_file(pixels), "tiff"


def _png(file: bytes, decoder: str) -> Picture:
    data = png_to_decode(file)
    depth, colour, interlaced = data[24], data[25], data[28]
    # Pillow gives the same pixels, but of 16 bits only the upper 8, compares a colour key of fewer than 8 bits with scaled values, and
    # overlooks that the last line of an interlaced image is missing
    by_pillow = depth <= 8 and not (depth < 8 and colour == 0 and b"tRNS" in data) and not interlaced
    if by_pillow and decoder == "pillow":
        picture = _pillow(data, turned=False)
    else:
        picture = _with_channels(_interlaced(data) if interlaced else _png_pixels(data))
    return Picture(upright(picture.pixels, png_orientation(file)), picture.has_alpha)


def _png_pixels(data: bytes) -> Pixels:
    import imagecodecs

    pixels: Pixels = imagecodecs.png_decode(data)
    return pixels


def _interlaced(data: bytes) -> Pixels:
    """Return the pixels of an interlaced PNG (of `png_to_decode`), of which each pass is decoded as a PNG: for whole ones libpng warns."""
    width, height, depth, colour = struct.unpack_from(">IIBB", data, 16)
    parts, at = defaultdict[bytes, bytearray](bytearray), 33
    while at < len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        parts[kind] += data[at + 8 : at + 8 + length]
        at += 12 + length
    colours = b"".join(png_chunk(kind, bytes(parts[kind])) for kind in (b"PLTE", b"tRNS") if parts[kind])
    packed, unpack, out = bytes(parts[b"IDAT"]), zlib.decompressobj(), None
    for top, left, down, across in _ADAM7:
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        if columns < 1 or rows < 1:
            continue
        size = rows * (1 + -(-columns * depth * _PNG_SAMPLES[colour] // 8))
        lines = unpack.decompress(packed, size)
        packed = unpack.unconsumed_tail
        if len(lines) < size:
            raise BadSample("truncated", f"PNG whose {width}x{height} pixels end in the pass of {columns}x{rows} of them")
        header = struct.pack(">IIBBBBB", columns, rows, depth, colour, 0, 0, 0)
        chunks = [png_chunk(b"IHDR", header), colours, png_chunk(b"IDAT", zlib.compress(lines, 0)), png_chunk(b"IEND", b"")]
        found = _png_pixels(PNG_MAGIC + b"".join(chunks))
        if out is None:
            out = np.empty((height, width, *found.shape[2:]), found.dtype)
        out[top::down, left::across] = found
    assert out is not None, "an image has pixels"
    return out


def _jpeg(data: bytes, decoder: str) -> Picture:
    pixels = _pillow_jpeg(data) if decoder == "pillow" else None
    clean = clean_pixels(data, eighth=pixels is not None)
    if clean is None:
        _require_whole(data)
    if pixels is None:
        pixels = clean
    if pixels is None:
        import imagecodecs

        pixels = imagecodecs.jpeg8_decode(data)
    if pixels.ndim == 3 and pixels.shape[2] == 4:  # inks, stored inverted as Adobe does
        pixels = cmyk_to_rgb(255 - pixels)
    picture = Picture(pixels if pixels.ndim == 3 else pixels[..., None], has_alpha=False)
    return Picture(upright(picture.pixels, jpeg_orientation(data)), has_alpha=False)


def _require_whole(data: bytes) -> None:
    """Raise BadSample unless a JPEG that libjpeg warns of has all its pixels."""
    key = hash(data)
    if key in _whole_seen:
        return
    if not is_whole_jpeg(data):
        width, height = jpeg_size(data)
        raise BadSample("truncated", f"JPEG of {len(data)} bytes, which do not give all of its {width}x{height} pixels")
    if len(_whole_seen) < _MOST_WHOLE:
        _whole_seen.add(key)


def _pillow_jpeg(data: bytes) -> Pixels | None:
    """Return the stored pixels of a plain JPEG by Pillow; None for what it does not read (other depths, stray bytes, no EOI)."""
    has_all_scans(data)  # not too many
    try:
        with open_unbounded(data) as image:
            return np.asarray(image) if image.mode in ("L", "RGB") else None
    except (OSError, SyntaxError, ValueError, struct.error):
        return None


def _with_channels(pixels: Pixels) -> Picture:
    """Return what imagecodecs gives for a PNG: two and four channels have alpha."""
    pixels = pixels if pixels.ndim == 3 else pixels[..., None]
    return Picture(pixels, pixels.shape[2] in (2, 4))


def _pillow(data: bytes, *, turned: bool = True) -> Picture:
    with open_unbounded(data) as image:
        return _opened_pillow(image, turned=turned)


def _opened_pillow(image: Any, *, turned: bool) -> Picture:  # any: PIL.Image.Image
    orientation = opened_orientation(image) if turned else UPRIGHT
    if "transparency" in image.info or image.mode == "PA":
        pixels = np.asarray(image.convert("LA" if image.mode == "L" else "RGBA"))
    elif image.mode == "1":
        pixels = np.asarray(image).astype(np.uint8) * np.uint8(255)
    elif image.mode in ("L", "LA", "RGB", "RGBA", "I;16"):
        pixels = np.asarray(image)
    elif image.mode in ("P", "CMYK"):
        pixels = np.asarray(image.convert("RGB"))
    else:
        raise BadSample("unsupported", f"{image.format} of mode {image.mode} is not read: save it as PNG")
    picture = Picture(pixels if pixels.ndim == 3 else pixels[..., None], pixels.ndim == 3 and pixels.shape[2] in (2, 4))
    return Picture(upright(picture.pixels, orientation), picture.has_alpha)
