"""Size, mode and structure of an image file, read from its bytes without decoding pixels; the first check against damaged input.

PNG and JPEG are parsed here without Pillow. Every PNG chunk is checked against its CRC up to IEND; a JPEG must walk from SOI through
its segments to a frame header (JPEG has no checksums: damage inside the scan is found by a full decode at best). TIFF goes through
tifffile, other formats through Pillow's header readers, which detect less damage. The content decides the format, not the file name.

There are two readings of an image, by `pixels`. 2 is what the file means: EXIF orientation turns it, transparency is a channel, CMYK,
LAB and YCbCr are RGB, a TIFF has the values that are stored. 1 is how datasets, checkpoints and tables read images before that.
"""

import dataclasses
import functools
import struct
import sys
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from aecore.data.format.bad_sample import BadSample
from aecore.data.format.jpeg import APP1, EOI, FRAMES, SEGMENTS_1, SOI, SOS, has_all_scans, jpeg_orientation, jpeg_segments
from aecore.data.format.orientation import turned_size, xmp_orientation
from aecore.data.format.pillow import PILLOW_FORMATS, open_unbounded
from aecore.native.loops import exif_orientation

PixelsVersion = Literal[1, 2]
MAX_PIXELS = 1 << 26  # 67 megapixels: an image this large does not fit a batch, and a decompression bomb is larger
FRAME_BYTES = 12  # that the header of a frame takes at least, in every format but stacks in TIFFs
MAX_PIXEL_BYTES = 16  # of the decoded values on average, so that the limit of the pixels also bounds the memory
IMAGE_EXTENSIONS = frozenset({"png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff", "gif"})

_PNG_START = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
_PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
_PNG_MODES = {0: "L", 2: "RGB", 3: "P", 4: "LA", 6: "RGBA"}
_TEXTS = (b"iTXt", b"tEXt", b"zTXt")
_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
_PNG_WITH_ALPHA = {"1": "LA", "L": "LA", "I;16": "LA;16", "P": "PA", "RGB": "RGBA", "RGB;16": "RGBA;16"}  # of a tRNS chunk
_PNG_MEANING = (b"tRNS", b"eXIf", b"acTL")  # chunks that change what an image is seen as
_XMP, _RAW_EXIF = b"XML:com.adobe.xmp\0", b"Raw profile type exif\0"  # of text chunks that do so
_TEXT_BYTES = 1 << 20  # of a packed text
_JPEG_MODES = {1: "L", 3: "RGB", 4: "CMYK"}
_JPEG_DEEP_MODES = {1: "I;16", 3: "RGB;16"}  # of 9 to 16 bits
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_CHANNELS = {"1": 1, "L": 1, "I": 1, "F": 1, "LA": 2, "CMYK": 4, "RGBA": 4, "PA": 4}
_chunk_head = struct.Struct(">I4s").unpack_from
_chunk_crc = struct.Struct(">I").unpack_from
_headers_seen: dict[bytes, "ImageHeader"] = {}  # first 33 bytes of a PNG -> its header: datasets repeat them


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """Size in pixels, mode as Pillow names it (16-bit PNG: `I;16`, `RGB;16`, `LA;16`, `RGBA;16`), extension of the true format.

    Attributes
    ----------
    channels : int
        Channels of the decoded image; 0: as many as the mode has.
    frames : int
        Pages or frames of the file; the header is that of the first.
    doubtful : bool
        Whether the structure has faults that decoders overlook: only a full decode tells whether all pixels are there.
    """

    width: int
    height: int
    mode: str
    ext: str
    channels: int = 0
    frames: int = 1
    doubtful: bool = False
    length: None = field(default=None, init=False)  # what a sequence has and an image does not

    @property
    def format_text(self) -> str:
        """Return `HxWxC/mode` of the decoded image, for example `28x28x1/L`; a palette counts as its 3 colours."""
        return f"{self.height}x{self.width}x{self.channels or _CHANNELS.get(self.mode.partition(';')[0], 3)}/{self.mode}"


def image_header(data: bytes, ext: str, *, pixels: PixelsVersion = 2, max_pixels: int = MAX_PIXELS) -> ImageHeader:
    """Return the header of an image after checking its structure; BadSample if it is empty, damaged, too large or of an unknown format.

    `ext` is the extension of the file's name; the result's `ext` is `ext` where it fits the content (`jpg` and `jpeg` both do),
    else the content's own: a JPEG named `.png` is stored as `.jpg`.
    """
    if data.startswith(b"\x89PNG"):
        return _png_header(data, pixels, max_pixels)
    if data.startswith(b"\xff\xd8"):
        header = _jpeg_header if pixels == 2 else _jpeg_header_1
        return header(data, ext if ext in ("jpg", "jpeg") else "jpg", max_pixels)
    if not data:
        raise BadSample("empty", "the file has no bytes")
    if pixels == 2 and data.startswith(TIFF_STARTS):
        return _tiff_header(data, ext if ext in ("tif", "tiff") else "tiff", max_pixels)
    return _pillow_header(data, ext, pixels, max_pixels)


def stated_header(data: bytes, ext: str, *, pixels: PixelsVersion = 2) -> ImageHeader | None:
    """Return the header of an image of known bytes without a look at its pixels; None for formats that have to be opened for it."""
    if data.startswith(b"\x89PNG"):
        if pixels == 2 and has_png_meaning(data):
            return _png_header(data, pixels, sys.maxsize)
        return _headers_seen.get(data[:33]) or _png_start(data)
    if data.startswith(b"\xff\xd8"):
        return (_jpeg_header if pixels == 2 else _jpeg_header_1)(data, ext if ext in ("jpg", "jpeg") else "jpg", sys.maxsize)
    if pixels == 2 and data.startswith(TIFF_STARTS):
        return _tiff_header(data, ext if ext in ("tif", "tiff") else "tiff", sys.maxsize)
    return None


def has_png_meaning(data: bytes) -> bool:
    """Return whether a PNG may have a chunk that changes what its header states: turned, transparent, animated."""
    return any(kind in data for kind in (*_PNG_MEANING, _XMP, _RAW_EXIF))


def _png_header(data: bytes, pixels: PixelsVersion, max_pixels: int) -> ImageHeader:
    header = _headers_seen.get(data[:33]) or _png_start(data)
    position, size, has_pixels, meaning, animated = 33, len(data), False, dict[bytes, bytes](), _Animation()
    num_colours = 0
    try:
        # almost always the first IEND is the end; else its own CRC is checked like any other
        while size - position != len(_PNG_END) or not data.endswith(_PNG_END):
            length, kind = _chunk_head(data, position)
            end = position + 8 + length
            if zlib.crc32(data[position + 4 : end]) != _chunk_crc(data, end)[0]:
                raise BadSample("checksum", f"PNG chunk {kind!r} at byte {position} does not fit its CRC")
            if kind == b"IDAT":
                animated.has_default = animated.has_default or not (has_pixels or animated.held)
                has_pixels = True
            elif kind == b"IEND":
                break
            elif kind == b"fcTL":
                animated.held += 1
            elif kind == b"PLTE":
                num_colours = num_colours or _palette_size(length, has_pixels)
            elif kind == b"tRNS" and not _is_transparency(data[25], length, num_colours):
                pass
            elif kind in _PNG_MEANING and not (kind != b"eXIf" and has_pixels):  # those after the pixels are none, as the format has it
                meaning.setdefault(kind, data[position + 8 : end])
            elif kind in _TEXTS and data.startswith((_XMP, _RAW_EXIF), position + 8):
                meaning.setdefault(b"text", b"")
            position = end + 4
    except struct.error:
        raise BadSample("truncated", f"PNG ends at byte {size}, inside the chunk at byte {position}") from None
    if not has_pixels:
        raise BadSample("format", "PNG without pixel data (no IDAT chunk)")
    require_size(header.width, header.height, max_pixels)
    return _png_meaning(data, header, meaning, animated) if meaning and pixels == 2 else header


def png_to_decode(data: bytes) -> bytes:
    """Return a PNG of only the chunks that make its pixels.

    Of the others decoders print warnings, take minutes where there are very many, or one refuses what the other overlooks. BadSample for
    those that no decoder knows but that would be needed.
    """
    kept, position, num_colours, has_clear, has_pixels = [data[:33]], 33, 0, False, False
    while position + 12 <= len(data):
        length, kind = _chunk_head(data, position)
        end = position + 12 + length
        if kind == b"IDAT":
            has_pixels = True
        elif kind == b"IEND":
            break
        elif kind == b"PLTE" and data[25] == 3 and not num_colours and _palette_size(length, has_pixels):
            num_colours = _palette_size(length, has_pixels)
        elif kind == b"tRNS" and not (has_clear or has_pixels) and _is_transparency(data[25], length, num_colours):
            has_clear = True
        else:
            if not kind[0] & 0x20 and kind != b"PLTE":
                raise BadSample("unsupported", f"PNG with a chunk {kind!r}, without which it cannot be decoded, as it says: save it again")
            kind = b""
        if kind:
            kept.append(data[position:end])
        position = end
    if data[25] == 3 and not num_colours:
        raise BadSample("format", "PNG of palette colours without a palette before its pixels (PLTE)")
    return b"".join([*kept, _PNG_END])


def _palette_size(length: int, has_pixels: bool) -> int:
    """Return the colours of a PLTE chunk of so many bytes; 0 if it is none: the first one before the pixels is the palette."""
    return 0 if has_pixels or length % 3 else length // 3


def _is_transparency(colour: int, length: int, num_colours: int) -> bool:
    """Return whether a tRNS chunk of so many bytes fits the kind of colour of its PNG and the palette before it: others are none."""
    return {0: length == 2, 2: length == 6, 3: 0 < length <= num_colours}.get(colour, False)


@dataclass(slots=True)
class _Animation:
    """What a PNG holds of an animation: frames, and whether its first image is not one of them."""

    held: int = 0
    has_default: bool = False

    def frames(self, stated: int) -> int:
        """Return the images of the file; BadSample unless it holds as many frames as it states."""
        if not 0 < stated <= 1 << 31:  # decoders take it for no animation
            return 1
        if stated > self.held:
            raise BadSample("frames", f"PNG that states {stated} frames and holds {self.held}: save it again")
        return stated + self.has_default


def _png_meaning(data: bytes, header: ImageHeader, chunks: dict[bytes, bytes], animated: _Animation) -> ImageHeader:
    mode = _PNG_WITH_ALPHA.get(header.mode, header.mode) if b"tRNS" in chunks else header.mode
    width, height = turned_size(header.width, header.height, png_orientation(data))
    frames = animated.frames(int.from_bytes(chunks[b"acTL"][:4], "big")) if b"acTL" in chunks else 1
    return ImageHeader(width, height, mode, header.ext, frames=frames)


def may_turn(data: bytes) -> bool:
    """Return whether a PNG may say an orientation: a walk over its chunks, which takes less than a search in its bytes."""
    position = 8
    while position + 12 <= len(data):
        length, kind = _chunk_head(data, position)
        if kind == b"eXIf" or (kind in _TEXTS and data.startswith((_XMP, _RAW_EXIF), position + 8)):
            return True
        if kind == b"IEND":
            break
        position += 12 + length
    return False


def png_orientation(data: bytes) -> int:
    """Return the orientation of a PNG that was checked: by its first `eXIf` chunk, else EXIF as a text, else its last text of XMP."""
    exif, texts, position = b"", dict[bytes, bytes](), 8
    while position + 12 <= len(data):
        length, kind = _chunk_head(data, position)
        chunk = data[position + 8 : position + 8 + length]
        if kind == b"eXIf":
            exif = exif or chunk
        elif kind in _TEXTS and chunk.startswith((_XMP, _RAW_EXIF)):
            texts[chunk[: chunk.index(b"\0") + 1]] = _text_of(kind, chunk)
        elif kind == b"IEND":
            break
        position += 12 + length
    return exif_orientation(exif or _exif_of_text(texts.get(_RAW_EXIF, b"")), xmp_orientation(texts.get(_XMP, b"")))


def _text_of(kind: bytes, chunk: bytes) -> bytes:
    """Return what a text chunk of a PNG says after its keyword, as Latin-1 or UTF-8; "" if it is damaged."""
    _, _, text = chunk.partition(b"\0")
    packed = kind == b"zTXt"
    if kind == b"iTXt":
        packed, text = text[:1] == b"\1", text[2:].partition(b"\0")[2].partition(b"\0")[2]
    elif packed:
        text = text[1:]
    try:
        return zlib.decompressobj().decompress(text, _TEXT_BYTES) if packed else text
    except zlib.error:
        return b""


def _exif_of_text(text: bytes) -> bytes:
    """Return a block of EXIF that is written in hexadecimal digits after three lines, as ImageMagick does."""
    try:
        return bytes.fromhex("".join(text.decode("latin-1").split("\n")[3:]))
    except ValueError:
        return b""


def _png_start(data: bytes) -> ImageHeader:
    if len(data) < 33:
        raise BadSample("truncated", f"PNG of {len(data)} bytes ends inside its header")
    if not data.startswith(_PNG_START):
        raise BadSample("format", "PNG signature or IHDR chunk is damaged")
    if zlib.crc32(data[12:29]) != _chunk_crc(data, 29)[0]:
        raise BadSample("checksum", "PNG chunk b'IHDR' at byte 8 does not fit its CRC")
    width, height, depth, colour, compression, filters, interlace = struct.unpack_from(">IIBBBBB", data, 16)
    if compression or filters or interlace > 1:
        raise BadSample("format", f"PNG of compression {compression}, filters {filters} and interlace {interlace}, which do not exist")
    if depth not in _PNG_DEPTHS.get(colour, ()):
        raise BadSample("format", f"PNG with bit depth {depth} and colour type {colour}, which do not exist together")
    mode = {1: "1", 16: "I;16"}.get(depth, "L") if colour == 0 else _PNG_MODES[colour] + (";16" if depth == 16 else "")
    header = _shared(width, height, mode, "png")
    if len(_headers_seen) < 4096:
        _headers_seen[data[:33]] = header
    return header


def _jpeg_header(data: bytes, ext: str, max_pixels: int) -> ImageHeader:
    """Read the segments up to the scan, as libjpeg does: stray bytes before a marker and a missing EOI are left to a full decode."""
    frame, doubtful, has_app1, frames, end = b"", False, False, 1, 2
    for marker, at, size in jpeg_segments(data):
        doubtful = doubtful or (at != end and not _is_fill(data, end, at))
        end = at + size
        if marker in FRAMES:
            if frame:
                raise BadSample("format", f"JPEG with a second frame header at byte {at}")
            frame = data[at : at + 10]
        elif marker == SOS:
            break
        elif marker == EOI:
            raise BadSample("truncated", f"JPEG ends at byte {end} before its pixels")
        elif marker == SOI or size < 4:
            raise BadSample("format", f"JPEG marker {marker:#x} at byte {at} does not belong there")
        elif marker == APP1:
            has_app1 = True
        elif marker == 0xE2 and data.startswith(b"MPF\0", at + 4):
            frames = _pillow_frames(data, ext)
    else:
        end = len(data) + 1
    if end > len(data):
        raise BadSample("truncated", f"JPEG ends at byte {len(data)} before its pixels")
    if not frame:
        raise BadSample("format", "JPEG without a frame header (SOF) before its pixels")
    width, height, mode = _jpeg_frame(frame)
    require_size(width, height, max_pixels)
    if has_app1:
        width, height = turned_size(width, height, jpeg_orientation(data))
    if not data.endswith(b"\xff\xd9") and data.rfind(b"\xff\xd9", at) < 0:
        doubtful = True
    if doubtful or frames > 1 or mode == "CMYK":
        return ImageHeader(width, height, mode, ext, channels=3 if mode == "CMYK" else 0, frames=frames, doubtful=doubtful)
    return _shared(width, height, mode, ext)


def _is_fill(data: bytes, start: int, stop: int) -> bool:
    """Return whether the bytes between two segments are fill bytes, which the format allows before a marker."""
    return not data[start:stop].strip(b"\xff")


def _jpeg_frame(frame: bytes) -> tuple[int, int, str]:
    """Return width, height and mode of a frame header (SOF)."""
    if len(frame) < 10:
        raise BadSample("truncated", "JPEG ends inside its frame header")
    marker, depth, height, width, components = frame[1], *struct.unpack_from(">BHHB", frame, 4)
    modes = _JPEG_MODES if depth == 8 else _JPEG_DEEP_MODES
    if marker > 0xC3 or not 8 <= depth <= 16 or components not in modes:
        kind = f"JPEG of kind SOF{marker - 0xC0} with {depth} bits and {components} components"
        raise BadSample("unsupported", f"{kind}; read are SOF0 to SOF3 with 8 bits and 1, 3 or 4 components, or to 16 bits and 1 or 3")
    return width, height, modes[components]


def _jpeg_header_1(data: bytes, ext: str, max_pixels: int) -> ImageHeader:
    """Return the header as `pixels=1` reads it: baseline to progressive of 8 bits, as stored, with an EOI."""
    header, end = None, 2
    for marker, at, size in jpeg_segments(data, SEGMENTS_1):
        if at != end and not _is_fill(data, end, at):
            raise BadSample("format", f"JPEG has no marker at byte {end}")
        end = at + size
        if marker in FRAMES:
            frame = data[at : at + 10]
            if len(frame) == 10 and (marker > 0xC2 or frame[4] != 8):
                raise BadSample(
                    "unsupported",
                    f"JPEG of kind SOF{marker - 0xC0} with {frame[4]} bits and {frame[9]} components; read are SOF0 to SOF2 with 8 bits "
                    "and 1, 3 or 4 components",
                )
            width, height, mode = _jpeg_frame(frame)
            require_size(width, height, max_pixels)
            header = _shared(width, height, mode, ext)
        elif marker == SOS:
            break
        elif marker == EOI:
            raise BadSample("truncated", f"JPEG ends at byte {end} before its pixels")
        elif marker == SOI or size < 4:
            raise BadSample("format", f"JPEG marker {marker:#x} at byte {at} does not belong there")
    else:
        raise BadSample("truncated", f"JPEG ends at byte {len(data)} before its pixels")
    if header is None:
        raise BadSample("format", "JPEG without a frame header (SOF) before its pixels")
    if not data.endswith(b"\xff\xd9") and data.rfind(b"\xff\xd9", at) < 0:
        raise BadSample("truncated", f"JPEG of {len(data)} bytes has no end marker (EOI)")
    return header


def _tiff_header(data: bytes, ext: str, max_pixels: int) -> ImageHeader:
    from aecore.data.format.tiff import tiff_facts  # imported late: most datasets have no TIFF

    width, height, mode, channels, frames, pixel_bytes = tiff_facts(data)
    require_size(width, height, max_pixels, pixel_bytes)
    return ImageHeader(width, height, mode, ext, channels=channels, frames=frames)


def _pillow_header(data: bytes, ext: str, pixels: PixelsVersion, max_pixels: int) -> ImageHeader:
    with open_image(data, ext) as image:
        found = PILLOW_FORMATS.get(image.format or "")
        if found is None:
            raise BadSample("format", f"{image.format} is not among png, jpeg, webp, bmp, tiff, gif")
        require_size(image.width, image.height, max_pixels)
        header = _shared(image.width, image.height, image.mode, ext if ext == found or (ext, found) == ("tif", "tiff") else found)
        return header if pixels == 1 else _meaning(image, header, len(data))


def _meaning(image: Any, header: ImageHeader, size: int) -> ImageHeader:  # any: PIL.Image.Image
    """Return the header of an image that Pillow has opened, as it is seen."""
    mode = {"L": "LA", "RGB": "RGBA", "P": "PA"}.get(image.mode, image.mode) if "transparency" in image.info else image.mode
    width, height = turned_size(header.width, header.height, opened_orientation(image))
    frames = int(_decoding(lambda: getattr(image, "n_frames", 1), header.ext))  # Pillow gives it to formats that may have several
    _require_frames(frames, size)
    return dataclasses.replace(header, width=width, height=height, mode=mode, frames=frames)


def opened_orientation(image: Any) -> int:  # any: as above
    """Return the orientation of an image that Pillow has opened, by EXIF, else by XMP; a damaged block says none."""
    xmp = image.info.get("xmp", b"")
    return exif_orientation(bytes(image.info.get("exif", b"")), xmp_orientation(xmp.encode() if isinstance(xmp, str) else bytes(xmp)))


def _pillow_frames(data: bytes, ext: str) -> int:
    """Return the images of a JPEG with a multi-picture index; 1 if Pillow takes the others for parts of the first, or cannot tell."""
    try:
        with open_image(data, ext) as image:
            frames = int(getattr(image, "n_frames", 1))
    except BadSample:
        return 1
    _require_frames(frames, len(data))
    return frames


def open_image(data: bytes, ext: str) -> Any:  # any: PIL.Image.Image, imported only here
    """Open `data` with Pillow (header only) without its warnings; BadSample if it is no image of the known formats."""
    return _decoding(lambda: open_unbounded(data), ext)


def load_image(data: bytes, header: ImageHeader) -> Any:  # any: PIL.Image.Image
    """Return the image with its pixels decoded; BadSample if that fails. `header` comes from `image_header`, which checked the size."""
    if data.startswith(b"\xff\xd8"):
        has_all_scans(data)  # not too many
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
            raise BadSample("decode", f"not a readable {f'{ext} ' if ext else ''}image ({type(error).__name__})") from error


def _require_frames(frames: int, size: int) -> None:
    """Raise BadSample if a file of `size` bytes cannot hold the frames that it states."""
    if frames * FRAME_BYTES > size:
        raise BadSample("frames", f"a file of {size} bytes that states {frames} frames, each of which takes at least {FRAME_BYTES}")


@functools.lru_cache(4096)  # equal headers are one object: faster than making another
def _shared(width: int, height: int, mode: str, ext: str) -> ImageHeader:
    return ImageHeader(width, height, mode, ext)


def require_size(width: int, height: int, max_pixels: int, pixel_bytes: int = 1) -> None:
    """Raise BadSample if an image is empty, or larger than the limit in pixels or, decoded, in bytes."""
    if width < 1 or height < 1:
        raise BadSample("format", f"image of {width}x{height} pixels")
    if width * height > max_pixels:
        raise BadSample("too_large", f"image of {width}x{height} pixels, at most {max_pixels} are read (shards.max_pixels)")
    if width * height * pixel_bytes > MAX_PIXEL_BYTES * max_pixels:
        raise BadSample(
            "too_large",
            f"image of {width}x{height} pixels of {pixel_bytes} bytes takes {width * height * pixel_bytes} bytes, at most "
            f"{MAX_PIXEL_BYTES * max_pixels} are read ({MAX_PIXEL_BYTES} times shards.max_pixels)",
        )
