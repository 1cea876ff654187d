"""The pixels of one image of any format that is read, as they are meant (`pixels=2`): the one decoder that decides what is readable.

Sharding, `shards.check=decode`, training and encoding all end here for whatever is not plain, and for what a faster decoder refuses.
imagecodecs decodes PNG and JPEG, tifffile TIFF, Pillow the rest (and plain JPEG for `transform.decoder=pillow`).
"""

import functools
import io
import re
import struct
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from aecore.data.format.colour import cmyk_to_rgb
from aecore.data.format.image import TIFF_STARTS, BadSample, open_unbounded, opened_orientation
from aecore.data.format.orientation import UPRIGHT, upright
from aecore.native.loops import exif_orientation

Pixels = NDArray[Any]  # any: uint8 to float64
PNG_MAGIC, JPEG_MAGIC = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
EXIF = b"Exif\0\0"
# data without a marker; each begins with other bits, since the end of a cut code may mean the same as the zeros that libjpeg puts there
_FILLERS = tuple(bytes([first, *((37 * number + first) % 255 for number in range(127))]) for first in (0x5A, 0xA5, 0xFE, 0xC3, 0x7E, 0x99))
_SMALL_BYTES = 1 << 12  # a file that may lack so little that it takes all of them
_MARKER = re.compile(rb"\xff+[^\x00\xff]", re.DOTALL)  # with the fill bytes before it


class Picture(NamedTuple):
    """Pixels `[H, W, C]` as they are seen, and whether the last channel is (straight) alpha."""

    pixels: Pixels
    has_alpha: bool


def decode_image(data: bytes, decoder: Literal["imagecodecs", "pillow"] = "imagecodecs", frame: int = 0) -> Picture:
    """Return an image, or one of its frames, after its header was checked. Raises what the codecs do for damaged pixels."""
    if frame == 0 and data.startswith(PNG_MAGIC):
        return _png(data, decoder)
    if frame == 0 and data.startswith(JPEG_MAGIC):
        return _jpeg(data, decoder)
    if data.startswith(TIFF_STARTS):
        from aecore.data.format.tiff import tiff_pixels  # imported late: most datasets have no TIFF

        return Picture(*tiff_pixels(data, frame))
    return _pillow(data, frame)


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


def is_whole_jpeg(data: bytes) -> bool:
    """Return whether every block of a JPEG is decoded from data that the file holds.

    libjpeg fills what is missing with grey and says nothing. If there is data missing, the pixels depend on what is put at the ends of the
    scans (or before the markers inside them); if nothing is, decoders skip that. A progressive file must also have all its scans. Raises
    what the codec does for a damaged file.
    """
    import imagecodecs

    scans = [(at, length) for at, marker, length in _segments(data) if marker == 0xDA]
    start = scans[0][0] + 2 + scans[0][1]
    if start > len(data):
        return False
    if data.rfind(b"\xff\xd9") < start:
        data += b"\xff\xd9"
    pixels = imagecodecs.jpeg8_decode(data)
    for filler in _FILLERS if len(data) < _SMALL_BYTES else _FILLERS[:2]:
        filled = data[:start] + _MARKER.sub(functools.partial(_filled, filler), data[start:])
        if not np.array_equal(pixels, imagecodecs.jpeg8_decode(filled)):
            return False
    return _is_complete(data, scans)


def _filled(filler: bytes, marker: re.Match[bytes]) -> bytes:
    """Return a marker inside or after a scan with data before it, at the end of a scan also all restart intervals that may be missing."""
    if 0xD0 <= marker[0][-1] <= 0xD7:
        return filler + marker[0]
    return filler + b"".join(bytes([0xFF, 0xD0 + number % 8]) + filler for number in range(16)) + marker[0]


def _is_complete(data: bytes, scans: list[tuple[int, int]]) -> bool:
    """Return whether the scans of a JPEG give all bits of all coefficients: those of a sequential one always do."""
    frame = next((at for at, marker, _ in _segments(data) if marker == 0xC2), None)
    if frame is None:
        return True
    components = [data[frame + 10 + 3 * number] for number in range(data[frame + 9])]
    missing = {component: [1] * 64 for component in components}  # bits that a coefficient still lacks; 1: has not been seen
    for at, _ in scans:
        count = data[at + 4]
        first, last, low = data[at + 5 + 2 * count], data[at + 6 + 2 * count], data[at + 7 + 2 * count] & 15
        for number in range(count):
            if (component := data[at + 5 + 2 * number]) in missing:
                missing[component][first : last + 1] = [low] * (last + 1 - first)
    return not any(map(any, missing.values()))


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield position, marker and length of the segments of a JPEG."""
    position = 2
    while (found := _MARKER.search(data, position)) is not None and found.end() + 2 <= len(data):
        at, marker = found.end() - 2, data[found.end() - 1]
        if marker == 0xD9 and position > 2 and at + 2 == len(data):
            return
        if marker == 0x01 or 0xD0 <= marker <= 0xD9:
            position = at + 2
            continue
        length = (data[at + 2] << 8) | data[at + 3]
        yield at, marker, length
        position = at + 2 + length


def _png(data: bytes, decoder: str) -> Picture:
    depth, colour, interlaced = data[24], data[25], data[28]
    # imagecodecs prints a libpng warning for each interlaced file. Pillow gives the same pixels, but of 16 bits only the upper 8, and
    # compares a colour key of fewer than 8 bits with scaled values
    by_pillow = depth <= 8 and not (depth < 8 and colour == 0 and b"tRNS" in data)
    if by_pillow and (interlaced or decoder == "pillow"):
        picture = _pillow(data, 0, turned=False)
    else:
        import imagecodecs

        picture = _with_channels(imagecodecs.png_decode(data))
    if (found := data.find(b"eXIf")) < 0:
        return picture
    return Picture(upright(picture.pixels, _png_orientation(data, found)), picture.has_alpha)


def _png_orientation(data: bytes, found: int) -> int:
    """Return the orientation that a PNG says; `found` is where `eXIf` is first seen, which may be inside another chunk."""
    position = 8
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        if kind == b"eXIf":
            return exif_orientation(data[position + 8 : position + 8 + length])
        if kind == b"IEND":
            break
        position += 12 + length
    return UPRIGHT


def _jpeg(data: bytes, decoder: str) -> Picture:
    pixels = _pillow_jpeg(data) if decoder == "pillow" else None
    if pixels is None:
        import imagecodecs

        pixels = imagecodecs.jpeg8_decode(data)
    if pixels.ndim == 3 and pixels.shape[2] == 4:  # inks, stored inverted as Adobe does
        pixels = cmyk_to_rgb(255 - pixels)
    picture = Picture(pixels if pixels.ndim == 3 else pixels[..., None], has_alpha=False)
    if EXIF not in data:
        return picture
    blocks = (data[at + 10 : at + 2 + length] for at, marker, length in _segments(data) if marker == 0xE1 and data.startswith(EXIF, at + 4))
    return Picture(upright(picture.pixels, exif_orientation(next(blocks, b""))), has_alpha=False)


def _pillow_jpeg(data: bytes) -> Pixels | None:
    """Return the stored pixels of a plain JPEG by Pillow; None for what it does not read (other depths, stray bytes, no EOI)."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "MPO")) as image:
            return np.asarray(image) if image.mode in ("L", "RGB") else None
    except (OSError, SyntaxError, ValueError, struct.error):
        return None


def _with_channels(pixels: Pixels) -> Picture:
    """Return what imagecodecs gives for a PNG: two and four channels have alpha."""
    pixels = pixels if pixels.ndim == 3 else pixels[..., None]
    return Picture(pixels, pixels.shape[2] in (2, 4))


def _pillow(data: bytes, frame: int, *, turned: bool = True) -> Picture:
    with open_unbounded(data) as image:
        if frame:
            image.seek(frame)
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
