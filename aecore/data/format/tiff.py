"""TIFF as it is meant, read by tifffile: values of any depth, band by band, or the colours that a photometric interpretation means.

Values keep their dtype (12 bits in 16 stay 0 to 4095; fewer than 8 bits are scaled to 8). MinIsWhite is inverted; palettes, CMYK, LAB
and YCbCr become RGB; premultiplied alpha is divided out; bands without a meaning are channels. Pages that are thumbnails or masks of
others are no images of their own. Every strip must be inside the file and give all of its rows; complex values and what tifffile cannot
unpack are refused.
"""

import contextlib
import io
import itertools
import logging
import math
import struct
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import tifffile
from numpy.typing import NDArray

from aecore.data.format.bad_sample import COMPLEX_REMEDY, BadSample
from aecore.data.format.colour import by_blocks, cmyk_to_rgb, lab_to_rgb, straight_alpha, white_of
from aecore.data.format.fax import require_whole_faxes
from aecore.data.format.jpeg import clean_pixels, has_all_scans, is_whole_jpeg, jpeg_size
from aecore.data.format.orientation import UPRIGHT, turned_size, upright, xmp_orientation

Pixels = NDArray[Any]  # any: every image has its own dtype
_MIN_IS_WHITE, _MIN_IS_BLACK, _RGB, _PALETTE, _MASK, _SEPARATED, _YCBCR, _CIELAB, _ICCLAB = 0, 1, 2, 3, 4, 5, 6, 8, 9
_PREMULTIPLIED, _STRAIGHT = 1, 2  # kinds of alpha among the extra samples
_COMPLEX = (5, 6)  # sample formats: of whole numbers, of floats
_JPEG = 7  # compression that tifffile gives as RGB
_FAXES = (2, 3, 4)  # CCITT RLE, Group 3, Group 4
# none, CCITT, LZW, JPEG, deflate, PackBits, LZMA, Zstandard: others have sizes of their own, which only their decoders know
_READ_COMPRESSIONS = (1, 2, 3, 4, 5, _JPEG, 8, 32773, 32946, 34925, 50000)
_BIG = 43  # version of BigTIFF
_TILE_BYTES = 1 << 28  # of a tile that is larger than its image
_REDUCED_OR_MASK = 0b101  # of a page's NewSubfileType
_MODES = {(1, "u1"): "L", (1, "u2"): "I;16", (3, "u1"): "RGB", (3, "u2"): "RGB;16", (1, "i4"): "I", (1, "f4"): "F"}
_ALPHA_MODES = {"L": "LA", "I;16": "LA;16", "RGB": "RGBA", "RGB;16": "RGBA;16"}

logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it says of damaged files becomes a reason of ours


class TiffFacts(NamedTuple):
    """Size of the first image as it is seen, its mode and channels, how many images there are, and bytes of a decoded pixel."""

    width: int
    height: int
    mode: str
    channels: int
    frames: int
    pixel_bytes: int


class _Form(NamedTuple):
    """What a page becomes: mode, channels (colours, alpha, bands) and dtype; `alpha`: the kind of the extra sample that is one, or 0."""

    mode: str
    channels: int
    dtype: np.dtype[Any]  # any: as above
    alpha: int = 0


def tiff_facts(data: bytes) -> TiffFacts:
    """Return the facts of a TIFF from its tags; BadSample if it is damaged, cut off or of a kind that is not read."""
    with _images(data) as images:
        page = images[0]
        form = _form(page)
        needed = max(map(sum, zip(page.dataoffsets, page.databytecounts, strict=False)), default=0)
        frames = _stacked(page) if len(images) == 1 else len(images)
        if len(images) < frames:
            needed = max(needed, page.dataoffsets[0] + frames * page.nbytes)
        if not needed or needed > len(data):
            raise BadSample("truncated", f"TIFF of {len(data)} bytes, its pixels end at byte {needed}")
        _require_segments(page, form, data)
        width, height = turned_size(int(page.imagewidth), int(page.imagelength), _orientation(page))
        pixel_bytes = max(form.channels, int(page.samplesperpixel)) * form.dtype.itemsize
        return TiffFacts(width, height, form.mode, form.channels, frames, pixel_bytes)


def tiff_pixels(data: bytes) -> tuple[Pixels, bool]:
    """Return the pixels `[H, W, C]` of the first image of a TIFF, as they are seen, and whether the last channel is alpha.

    Its header was checked. Raises what tifffile and its codecs do for damaged pixels.
    """
    with TiffImages(data, 1) as images:
        return images.pixels(0)


class TiffImages:
    """The images of an open TIFF, whose tags are parsed once; with `most` only the first of them. `close` it."""

    def __init__(self, data: bytes, most: int | None = None) -> None:
        self._data, self._file = data, contextlib.ExitStack()
        self._images = self._file.enter_context(_images(data, most))

    def __enter__(self) -> "TiffImages":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def size(self, frame: int) -> tuple[int, int, int]:
        """Return width, height and bytes of a decoded pixel of one image."""
        page = self._images[frame if len(self._images) > 1 else 0]
        form = _form(page)
        return int(page.imagewidth), int(page.imagelength), max(form.channels, int(page.samplesperpixel)) * form.dtype.itemsize

    def total_pixels(self) -> int:
        """Return the pixels of all pages together; the images of an ImageJ stack, which are stored as they are, count as one."""
        return sum(int(page.imagewidth) * int(page.imagelength) for page in self._images)

    def pixels(self, frame: int) -> tuple[Pixels, bool]:
        """Return the pixels of one image, as `tiff_pixels` does."""
        data, stacked = self._data, len(self._images) == 1 and frame > 0
        page = self._images[0 if stacked else frame]
        form = _form(page)
        _require_segments(page, form, data)
        if page.compression == _JPEG:
            _require_whole_jpegs(page, data)
        elif page.compression in _FAXES:
            require_whole_faxes(page, data)
        if page.photometric == _YCBCR and page.compression != _JPEG:
            _require_whole_ycbcr(page, data)
            from PIL import Image, TiffImagePlugin  # libtiff's own conversion: chroma may be subsampled

            # Image.open has a limit of its own
            with warnings.catch_warnings(action="ignore"), TiffImagePlugin.TiffImageFile(io.BytesIO(data)) as image:
                image.seek(page.index)
                image.im = Image.new(image.mode, (page.imagewidth, page.imagelength)).im  # where Pillow makes one its own limit counts
                return np.asarray(image.convert("RGB")), False  # Pillow has turned it
        pixels = _meant(page, _stored(page, data, frame if stacked else 0), form)
        return upright(pixels, _orientation(page)), form.alpha > 0


def tiff_precision(data: bytes) -> int:
    """Return the bits of a sample of the first image."""
    with _images(data, 1) as images:
        return int(images[0].bitspersample)


def tiff_file(pixels: Pixels) -> bytes:
    """Return pixels `[H, W, C]` of any dtype as a TIFF of one page: three channels are RGB, others grey or bands."""
    out, photometric = io.BytesIO(), "rgb" if pixels.shape[2] == 3 else "minisblack"
    values = pixels[..., 0] if pixels.shape[2] == 1 else pixels
    planar = None if values.ndim == 2 else "contig"
    tifffile.imwrite(out, np.ascontiguousarray(values), photometric=photometric, planarconfig=planar, metadata=None, software=False)
    return out.getvalue()


@contextlib.contextmanager
def _images(data: bytes, most: int | None = None) -> Iterator[list[Any]]:  # any: tifffile.TiffPage
    """Yield the pages that are images of their own, at least one; with `most` only the first of them."""
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            pages = (file.pages.get(number) for number in range(_num_pages(data, file.tiff)))
            images: Iterator[Any] = (page for page in pages if not getattr(page, "subfiletype", 0) & _REDUCED_OR_MASK)  # any: as above
            yield list(itertools.islice(images, most)) or [file.pages.get(0)]
    except (BadSample, MemoryError):
        raise
    except Exception as error:  # a parser of untrusted bytes raises anything
        raise BadSample("decode", f"not a readable TIFF ({type(error).__name__}: {error})") from error


def _num_pages(data: bytes, tiff: Any) -> int:  # any: tifffile.TiffFormat
    """Return the pages of a file, those of a circle once; BadSample if one is outside the file: the others after it are lost."""
    at = struct.unpack_from(tiff.offsetformat, data, 8 if tiff.version == _BIG else 4)[0]
    seen = dict[int, None]()
    while at and at not in seen:
        seen[at] = None
        try:
            num_tags = struct.unpack_from(tiff.tagnoformat, data, at)[0]
            at = struct.unpack_from(tiff.offsetformat, data, at + tiff.tagnosize + num_tags * tiff.tagsize)[0]
        except struct.error:
            raise BadSample("truncated", f"TIFF of {len(data)} bytes, its page {len(seen)} is at byte {at}") from None
    return len(seen)


def _require_segments(page: Any, form: _Form, data: bytes) -> None:  # any: as above
    """Raise BadSample unless a page has all its strips or tiles, of a bounded size. Those at 0 of 0 bytes hold no data (GDAL)."""
    if page.is_tiled:
        num_bytes = int(page.tilewidth) * int(page.tilelength) * int(page.samplesperpixel) * form.dtype.itemsize
        if num_bytes > max(_TILE_BYTES, page.nbytes):
            where = f"{page.tilewidth}x{page.tilelength} pixels for an image of {page.imagewidth}x{page.imagelength}"
            raise BadSample("too_large", f"TIFF with tiles of {where}: save it with smaller ones")
    if not page.is_contiguous:
        num = math.prod(page.chunked)
        places = zip(page.dataoffsets[:num], page.databytecounts[:num], strict=False)
        found = sum((offset > 0) == (count > 0) for offset, count in places)
        if found < num:
            raise BadSample("truncated", f"TIFF with {found} of the {num} {'tiles' if page.is_tiled else 'strips'} of its image")
    if page.compression == _JPEG:
        _require_jpeg_sizes(page, data)


def _require_jpeg_sizes(page: Any, data: bytes) -> None:  # any: as above
    """Raise BadSample if a JPEG inside the file is larger than the strip or tile that it is in, or of too many scans."""
    most = (page.tilewidth, page.tilelength) if page.is_tiled else (page.imagewidth, page.rowsperstrip)
    across, down = (-(-int(side) // 16) * 16 for side in most)
    for jpeg in _jpegs(page, data):
        width, height = jpeg_size(jpeg)
        if width > across or height > down:
            raise BadSample("format", f"TIFF with a JPEG of {width}x{height} pixels in a place of {across}x{down}")
        has_all_scans(jpeg)  # not too many


def _require_whole_jpegs(page: Any, data: bytes) -> None:  # any: as above
    """Raise BadSample if a JPEG inside the file lacks a part of its pixels, as one in a file of its own."""
    for jpeg in _jpegs(page, data):
        if clean_pixels(jpeg, eighth=True) is None and not is_whole_jpeg(jpeg):
            width, height = jpeg_size(jpeg)
            raise BadSample("truncated", f"TIFF with a JPEG of {len(jpeg)} bytes, which do not give all of its {width}x{height} pixels")


def _require_whole_ycbcr(page: Any, data: bytes) -> None:  # any: as above
    """Raise BadSample unless each strip or tile of subsampled colours holds its bytes: Pillow, which converts them, makes up the others."""
    from imagecodecs import bitorder_decode

    across, down = page.subsampling or (2, 2)  # the default of TIFF 6.0
    width, length = (page.tilewidth, page.tilelength) if page.is_tiled else (page.imagewidth, page.rowsperstrip)
    unpack = tifffile.TIFF.DECOMPRESSORS[page.compression]
    for number, (offset, count) in enumerate(zip(page.dataoffsets, page.databytecounts, strict=False)):
        rows = length if page.is_tiled else min(length, page.imagelength - number * length)
        needed = -(-width // across) * -(-rows // down) * (across * down + 2)
        segment = data[offset : offset + count]
        if segment:
            segment = unpack(bitorder_decode(segment) if page.fillorder == 2 else segment, out=needed)
        if len(segment) < needed:
            where = f"{'tile' if page.is_tiled else 'strip'} {number + 1} holds {len(segment)} of its {needed} bytes"
            raise BadSample("truncated", f"TIFF of YCbCr colours whose {where}: save it again")


def _jpegs(page: Any, data: bytes) -> Iterator[bytes]:  # any: as above
    """Yield the JPEGs of the strips or tiles with the tables that they share."""
    tables = (page.jpegtables or b"").removesuffix(b"\xff\xd9")
    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=False):
        if jpeg := data[offset : offset + count]:
            yield tables + jpeg[2:] if tables else jpeg


def _stacked(page: Any) -> int:  # any: as above
    """Return the images of an ImageJ stack, which follow the first without pages of their own."""
    if not page.is_imagej or not page.is_contiguous:
        return 1
    return max(1, int((page.parent.imagej_metadata or {}).get("images", 1)))


def _orientation(page: Any) -> int:  # any: as above
    value = page.tags.valueof(274)
    if value is None and (xmp := page.tags.valueof(700)):
        value = xmp_orientation(xmp if isinstance(xmp, bytes) else str(xmp).encode())
    return int(value) if value in range(1, 9) else UPRIGHT


def _form(page: Any) -> _Form:  # any: as above
    """Return what a page becomes; BadSample if it is of a kind that is not read."""
    colour, samples, bits = int(page.photometric or 0), int(page.samplesperpixel), page.bitspersample
    if page.sampleformat in _COMPLEX:
        raise BadSample("unsupported", f"TIFF of complex numbers of {bits} bits: only whole numbers and floats are read; {COMPLEX_REMEDY}")
    if page.dtype is None or page.dtype.kind not in "biuf" or not isinstance(bits, int) or int(page.imagedepth) > 1:
        raise BadSample(
            "unsupported", f"TIFF with sample format {page.sampleformat} of {bits} bits: read are whole numbers and floats of one depth"
        )
    if int(page.compression) not in _READ_COMPRESSIONS:
        name = getattr(page.compression, "name", page.compression)
        raise BadSample("unsupported", f"TIFF compressed by {name}, which is not read: save it with LZW, deflate or none")
    dtype = np.dtype(page.dtype).newbyteorder("=")
    dtype = np.dtype("u1") if dtype.kind == "b" or (dtype.kind == "u" and bits < 8) else dtype
    if colour == _PALETTE and samples == 1 and bits <= 16:
        return _Form("P", 3, np.dtype("u1"))
    if colour in (_CIELAB, _ICCLAB) and samples == 3 and dtype.itemsize <= 2:
        return _Form("LAB" if dtype.itemsize == 1 else "LAB;16", 3, np.dtype(f"u{dtype.itemsize}"))
    if colour == _YCBCR and samples == 3 and dtype == np.uint8:
        return _Form("YCbCr", 3, dtype)
    if colour == _SEPARATED and samples == 4 and dtype in (np.uint8, np.uint16):
        return _Form("CMYK" if dtype.itemsize == 1 else "CMYK;16", 3, dtype)
    if colour not in (_MIN_IS_WHITE, _MIN_IS_BLACK, _MASK, _RGB, _SEPARATED) or (colour == _RGB and samples < 3):
        name = getattr(page.photometric, "name", page.photometric)
        raise BadSample("unsupported", f"TIFF of {name} colours with {samples} samples of {bits} bits is not read: save it as grey or RGB")
    extra = samples - (3 if colour == _RGB else 1)
    mode = _MODES.get((samples - extra, dtype.str[1:]), "")
    alpha = int(page.extrasamples[0]) if extra == 1 and colour != _SEPARATED and page.extrasamples else 0
    if alpha in (_PREMULTIPLIED, _STRAIGHT) and mode in _ALPHA_MODES:
        return _Form(_ALPHA_MODES[mode], samples, dtype, alpha)
    if extra or not mode:
        return _Form(f"image;{dtype.name}", samples, dtype)
    return _Form("1" if bits == 1 and dtype == np.uint8 else mode, samples, dtype)


def _stored(page: Any, data: bytes, number: int) -> Pixels:  # any: as above
    """Return the stored samples `[H, W, S]`; `number` is the place in an ImageJ stack."""
    if number:
        values = np.frombuffer(
            data, page.dtype.newbyteorder(page.parent.byteorder), math.prod(page.shape), page.dataoffsets[0] + number * page.nbytes
        )
        values = values.astype(page.dtype).reshape(page.shape)
    else:
        values = page.asarray()
    if values.ndim == 2:
        return values[..., None]
    return np.moveaxis(values, 0, -1) if page.axes == "SYX" else values


def _meant(page: Any, values: Pixels, form: _Form) -> Pixels:  # any: as above
    """Return the pixels `[H, W, C]` that stored samples mean."""
    colour, bits = int(page.photometric or 0), page.bitspersample
    if form.mode == "P":
        table = np.asarray(page.colormap)
        colours = (table >> 8 if table.max() > 255 else table).astype(np.uint8)
        return by_blocks(lambda block: colours[:, block[..., 0]].transpose(1, 2, 0), values)
    if form.mode.startswith("LAB"):
        return by_blocks(lambda block: _lab(block, form, signed=colour == _CIELAB), values)
    if form.mode.startswith("CMYK"):
        return cmyk_to_rgb(values)
    if values.dtype.kind in "bu" and bits < 8:
        scale = 255 / ((1 << bits) - 1)
        values = by_blocks(lambda block: np.rint(block * scale).astype(np.uint8), values)
    if colour == _MIN_IS_WHITE and values.dtype.kind == "u":
        white = values.dtype.type((1 << bits) - 1 if bits >= 8 else 255)
        values = np.require(values, requirements="W")
        np.subtract(white, values[..., :1], out=values[..., :1])
    values = values.astype(form.dtype, copy=False)
    white = white_of(form.dtype) if bits < 8 or form.dtype.kind != "u" else float((1 << bits) - 1)
    return straight_alpha(values, white) if form.alpha == _PREMULTIPLIED else values


def _lab(values: Pixels, form: _Form, *, signed: bool) -> Pixels:
    """Return RGB of stored L*, a* and b*: from 0 to 100, and 8 bits of a whole number each (two's complement, or with 128 added)."""
    unit = 1 if form.dtype.itemsize == 1 else 256
    full = white_of(form.dtype) if signed or unit == 1 else 0xFF00
    colours = values[..., 1:].astype(form.dtype).view(f"i{form.dtype.itemsize}") if signed else values[..., 1:].astype(float) - 128 * unit
    return lab_to_rgb(np.concatenate([values[..., :1] * (100 / full), colours / unit], axis=-1), form.dtype)
