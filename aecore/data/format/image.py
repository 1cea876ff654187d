"""Size, mode and structure of an image file, read from its bytes without decoding pixels; the first check against damaged input.

PNG and JPEG are parsed here without Pillow. Every PNG chunk is checked against its CRC up to IEND; a JPEG must walk from SOI through
its segments to a frame header and hold an EOI after it (JPEG has no checksums: damage inside the scan is found by a full decode at
best). Other formats go through Pillow's header readers, which detect less damage. The content decides the format, not the file name.
"""

import functools
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

MAX_PIXELS = 1 << 26  # 67 megapixels: an image this large does not fit a batch, and a decompression bomb is larger
IMAGE_EXTENSIONS = frozenset({"png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff", "gif"})

_PNG_START = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
_PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
_PNG_MODES = {0: "L", 2: "RGB", 3: "P", 4: "LA", 6: "RGBA"}
_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
_JPEG_MODES = {1: "L", 3: "RGB", 4: "CMYK"}
_PILLOW_FORMATS = {"WEBP": "webp", "BMP": "bmp", "TIFF": "tiff", "GIF": "gif"}
READ_FORMATS = ("PNG", "JPEG", *_PILLOW_FORMATS)  # as Pillow names them: others it gives to programs
_CHANNELS = {"1": 1, "L": 1, "I": 1, "F": 1, "LA": 2, "CMYK": 4, "RGBA": 4}
_chunk_head = struct.Struct(">I4s").unpack_from
_chunk_crc = struct.Struct(">I").unpack_from
_headers_seen: dict[bytes, "ImageHeader"] = {}  # first 33 bytes of a PNG -> its header: datasets repeat them


class BadSample(Exception):
    """One sample that cannot be used; it goes to the quarantine with a short `reason` and a readable `message`."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """Size in pixels, mode as Pillow names it (16-bit PNG: `I;16`, `RGB;16`, `LA;16`, `RGBA;16`), extension of the true format."""

    width: int
    height: int
    mode: str
    ext: str
    length: None = field(default=None, init=False)  # what a sequence has and an image does not

    @property
    def format_text(self) -> str:
        """Return `HxWxC/mode` of the decoded image, for example `28x28x1/L`; a palette counts as its 3 colours."""
        return f"{self.height}x{self.width}x{_CHANNELS.get(self.mode.partition(';')[0], 3)}/{self.mode}"


def image_header(data: bytes, ext: str) -> ImageHeader:
    """Return the header of an image after checking its structure; BadSample if it is empty, damaged, too large or of an unknown format.

    `ext` is the extension of the file's name; the result's `ext` is `ext` where it fits the content (`jpg` and `jpeg` both do),
    else the content's own: a JPEG named `.png` is stored as `.jpg`.
    """
    if data.startswith(b"\x89PNG"):
        return _png_header(data)
    if data.startswith(b"\xff\xd8"):
        return _jpeg_header(data, ext if ext in ("jpg", "jpeg") else "jpg")
    if not data:
        raise BadSample("empty", "the file has no bytes")
    return _pillow_header(data, ext)


def stated_header(data: bytes, ext: str) -> ImageHeader | None:
    """Return the header that a PNG or JPEG of known bytes begins with, the rest unchecked; None for other formats; or BadSample."""
    if data.startswith(b"\x89PNG"):
        return _headers_seen.get(data[:33]) or _png_start(data)
    return _jpeg_header(data, ext if ext in ("jpg", "jpeg") else "jpg") if data.startswith(b"\xff\xd8") else None


def _png_header(data: bytes) -> ImageHeader:
    header = _headers_seen.get(data[:33]) or _png_start(data)
    position, size, has_pixels = 33, len(data), False
    try:
        while data[position:] != _PNG_END:  # almost always true at the first IEND; else its own CRC is checked like any other
            length, kind = _chunk_head(data, position)
            end = position + 8 + length
            if zlib.crc32(data[position + 4 : end]) != _chunk_crc(data, end)[0]:
                raise BadSample("checksum", f"PNG chunk {kind!r} at byte {position} does not fit its CRC")
            if kind == b"IDAT":
                has_pixels = True
            elif kind == b"IEND":
                break
            position = end + 4
    except struct.error:
        raise BadSample("truncated", f"PNG ends at byte {size}, inside the chunk at byte {position}") from None
    if not has_pixels:
        raise BadSample("format", "PNG without pixel data (no IDAT chunk)")
    return header


def _png_start(data: bytes) -> ImageHeader:
    if len(data) < 33:
        raise BadSample("truncated", f"PNG of {len(data)} bytes ends inside its header")
    if not data.startswith(_PNG_START):
        raise BadSample("format", "PNG signature or IHDR chunk is damaged")
    if zlib.crc32(data[12:29]) != _chunk_crc(data, 29)[0]:
        raise BadSample("checksum", "PNG chunk b'IHDR' at byte 8 does not fit its CRC")
    width, height, depth, colour = struct.unpack_from(">IIBB", data, 16)
    if depth not in _PNG_DEPTHS.get(colour, ()):
        raise BadSample("format", f"PNG with bit depth {depth} and colour type {colour}, which do not exist together")
    mode = {1: "1", 16: "I;16"}.get(depth, "L") if colour == 0 else _PNG_MODES[colour] + (";16" if depth == 16 else "")
    header = _sized(width, height, mode, "png")
    if len(_headers_seen) < 4096:
        _headers_seen[data[:33]] = header
    return header


def _jpeg_header(data: bytes, ext: str) -> ImageHeader:
    position, size, header = 2, len(data), None
    while True:
        if position + 4 > size:
            raise BadSample("truncated", f"JPEG ends at byte {size} before its pixels")
        if data[position] != 0xFF:
            raise BadSample("format", f"JPEG has no marker at byte {position}")
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte before a marker
            position += 1
            continue
        length = (data[position + 2] << 8) | data[position + 3]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            header = _jpeg_frame(data[position : position + 10], marker, ext)
        elif marker == 0xDA:
            break
        elif marker in (0xD8, 0xD9) or length < 2:
            raise BadSample("format", f"JPEG marker {marker:#x} at byte {position} does not belong there")
        position += 2 + length
    if header is None:
        raise BadSample("format", "JPEG without a frame header (SOF) before its pixels")
    if not data.endswith(b"\xff\xd9") and data.rfind(b"\xff\xd9", position) < 0:
        raise BadSample("truncated", f"JPEG of {size} bytes has no end marker (EOI)")
    return header


def _jpeg_frame(frame: bytes, marker: int, ext: str) -> ImageHeader:
    if len(frame) < 10:
        raise BadSample("truncated", "JPEG ends inside its frame header")
    depth, height, width, components = struct.unpack_from(">BHHB", frame, 4)
    if marker > 0xC2 or depth != 8 or components not in _JPEG_MODES:
        kind = f"JPEG of kind SOF{marker - 0xC0} with {depth} bits and {components} components"
        raise BadSample("unsupported", f"{kind}; read are SOF0 to SOF2 with 8 bits and 1, 3 or 4 components")
    return _sized(width, height, _JPEG_MODES[components], ext)


def _pillow_header(data: bytes, ext: str) -> ImageHeader:
    with open_image(data, ext) as image:
        found = _PILLOW_FORMATS.get(image.format or "")
        if found is None:
            raise BadSample("format", f"{image.format} is not among png, jpeg, webp, bmp, tiff, gif")
        same = ext == found or (ext, found) == ("tif", "tiff")
        return _sized(image.width, image.height, image.mode, ext if same else found)


def open_image(data: bytes, ext: str) -> Any:  # any: PIL.Image.Image, imported only here
    """Open `data` with Pillow (header only) without its warnings; BadSample if it is no image of the known formats."""
    from PIL import Image

    return _decoding(lambda: Image.open(BytesIO(data), formats=READ_FORMATS), ext)


def load_image(data: bytes, header: ImageHeader) -> Any:  # any: PIL.Image.Image
    """Return the image with its pixels decoded; BadSample if that fails. `header` comes from `image_header`, which checked the size."""
    image = open_image(data, header.ext)
    _decoding(image.load, header.ext)
    return image


def _decoding(step: Callable[[], Any], ext: str) -> Any:  # any: the result of `step`
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # corrupt EXIF and sizes above Pillow's own limit: ours was checked or will be
        try:
            return step()
        except MemoryError:
            raise
        except Exception as error:  # decoders of untrusted bytes raise anything: OSError, SyntaxError, struct.error, ...
            raise BadSample("decode", f"not a readable {ext} image ({type(error).__name__})") from error


@functools.lru_cache(4096)  # equal headers are one object: faster than making another
def _sized(width: int, height: int, mode: str, ext: str) -> ImageHeader:
    if width < 1 or height < 1:
        raise BadSample("format", f"image of {width}x{height} pixels")
    if width * height > MAX_PIXELS:
        raise BadSample("too_large", f"image of {width}x{height} pixels, at most {MAX_PIXELS} are read")
    return ImageHeader(width, height, mode, ext)
