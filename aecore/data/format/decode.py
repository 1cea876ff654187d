"""Bytes of samples in, one preallocated array `[n, H, W, C]` out. Nothing here can execute what it reads.

The first bytes of a member decide what it is: plain PNG and JPEG go straight to a decoder (JPEG to simplejpeg, which gives the pixels of
imagecodecs and raises where a file lacks data), `.npy` arrays are read without objects, everything else goes through
`pixels.decode_image`, which decides what can be read. The size in the header is compared with the expected one before any pixel is
loaded. Both decoders give the same pixels for PNG; for JPEG they differ by a few levels, so the decoder's name belongs to every
artefact, and its version, with that of simplejpeg, is recorded there.

Pixels: as they are meant (see `image`), 1-bit images 0 and 255, palettes RGB. Alpha is composed over the background where the expected
format has no channel for it. What was written before `pixels=2` is read as it was: as stored, a colour key (PNG tRNS) dropped.
"""

import importlib
import io
import itertools
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from aecore.data.format.bad_sample import BadSample
from aecore.data.format.colour import composed
from aecore.data.format.image import MAX_PIXEL_BYTES, PixelsVersion, image_header, may_turn, png_to_decode
from aecore.data.format.jpeg import PROGRESSIVE, ZEROS, has_all_scans
from aecore.data.format.pillow import READ_FORMATS
from aecore.data.format.pixels import JPEG_MAGIC, PNG_MAGIC, decode_image, white_level
from aecore.data.format.record import ArrayHeader, NpyError, array_header, array_values, read_npy_header
from aecore.data.format.sample_format import SampleFormat
from aecore.errors import ConfigError, DataError
from aecore.native.bytes_column import BytesColumn
from aecore.native.loops import decode_pngs, plain_jpegs
from aecore.store import sha256_json

DecoderName = Literal["imagecodecs", "pillow"]
Pixels = NDArray[Any]  # any: uint8, uint16 or the dtype of an array sample

NPY_MAGIC = b"\x93NUMPY"


@dataclass(frozen=True, slots=True)
class Reading:
    """How samples are decoded: by which library, by which version of the rules, over which background where alpha is left out."""

    decoder: DecoderName = "imagecodecs"
    pixels: PixelsVersion = 2
    background: str = "white"


class DecodeError(DataError):
    """One sample that cannot be decoded into the expected format; `row` is its row in the requested batch."""

    def __init__(self, reason: str, message: str, row: int = 0) -> None:
        super().__init__(message)
        self.reason = reason
        self.row = row


class Decoder:
    """Decodes samples of one format; made once per loader, since it looks up the package and remembers good headers."""

    def __init__(self, reading: Reading, sample_format: SampleFormat) -> None:
        self.sample_format = sample_format
        self._reading = reading
        self._image = _import_decoder("pillow")
        self._codecs: Any = _import_decoder("imagecodecs") if reading.decoder == "imagecodecs" else None  # any: imagecodecs has no types
        self._simplejpeg = importlib.import_module("simplejpeg")
        self._one = self._into if reading.pixels == 2 else self._into_1
        self._arrays: dict[bytes, ArrayHeader] = {}
        self._npy_headers: dict[bytes, int] = {}  # of `pixels=1`
        # decoders give [H, W] for one channel
        shape = sample_format.shape
        self._colours = {1: "GRAY", 3: "RGB"}.get(shape[-1] if sample_format.image else 0, "")  # of a JPEG that needs no change
        self._decoded = shape[:2] if sample_format.image and shape[2:] == (1,) else shape

    def batch(self, members: Sequence[bytes], on_bad: Callable[[DecodeError], None] | None = None) -> Pixels:
        """Return `[n, *shape]`. A bad sample raises DecodeError; with `on_bad` it is passed to that function and its row is undefined."""
        out = np.empty((len(members), *self.sample_format.shape), self.sample_format.dtype)
        targets = out.reshape(len(members), *self._decoded)
        for row, frame in self._unusual(members, out):
            try:
                self._one(targets[row, ...], members[row], frame)  # `...`: a view also where a sample is one number
            except MemoryError:
                raise
            except Exception as error:
                why = BadSample.of(error)
                bad = DecodeError(why.reason, why.message, row)
                if on_bad is None:
                    raise bad from error
                on_bad(bad)
        return out

    def _unusual(self, members: Sequence[bytes], out: Pixels) -> Iterable[tuple[int, int]]:
        """Decode small plain PNGs into their rows of `out`, all in one call; return the other rows, with `plain_jpegs` of them."""
        if self._codecs is None or not self.sample_format.image or out.dtype != np.uint8 or not len(members):
            return zip(range(len(members)), itertools.repeat(0))
        found = members if isinstance(members, BytesColumn) else BytesColumn.from_bytes(members)
        rows = np.flatnonzero(~decode_pngs(found, out, as_stored=self._reading.pixels == 1))
        return zip(rows.tolist(), plain_jpegs(found.take(rows), *self.sample_format.shape).tolist(), strict=True)

    def _into(self, target: Pixels, data: bytes, frame: int) -> None:
        if frame and self._colours and not data.endswith(ZEROS):
            complete = frame != PROGRESSIVE or has_all_scans(data)
            try:
                self._simplejpeg.decode_jpeg(data, self._colours, buffer=target)
            except ValueError:  # a warning: the complete decoder decides
                target[...] = self._meant(data).reshape(target.shape)
            else:
                if not complete:
                    self._meant(data)
        elif data.startswith(NPY_MAGIC):
            target[...] = self._array(data).reshape(target.shape)
        elif not self.sample_format.image:
            raise BadSample("format", "expected a .npy array, found other bytes")
        elif not (data.startswith(PNG_MAGIC) and self._plain_png(target, data)):
            target[...] = self._meant(data).reshape(target.shape)

    def _plain_png(self, target: Pixels, data: bytes) -> bool:
        """Decode a PNG that nothing turns straight into `target`; return whether it fitted."""
        width, height, interlaced = *struct.unpack_from(">II", data, 16), data[28]
        if self._codecs is None or may_turn(data) or (height, width) != self.sample_format.shape[:2] or interlaced:
            return False
        pixels = self._codecs.png_decode(png_to_decode(data))
        if pixels.shape != target.shape or pixels.dtype != target.dtype:
            return False
        target[...] = pixels
        return True

    def _meant(self, data: bytes) -> Pixels:
        """Return the pixels of any image in the expected format."""
        shape, dtype = self.sample_format.shape, self.sample_format.dtype
        header = image_header(data, "", max_pixels=max(shape[0] * shape[1], -(-self.sample_format.nbytes // MAX_PIXEL_BYTES), 1))
        if (header.height, header.width) != shape[:2]:
            raise self._unexpected(f"{header.height}x{header.width} pixels")
        pixels, has_alpha = decode_image(data, self._reading.decoder)
        if has_alpha and pixels.shape[2] == shape[2] + 1:
            pixels = composed(pixels, self._reading.background, white_level(data, pixels.dtype))
        if pixels.shape != shape or pixels.dtype != dtype:
            raise self._unexpected(f"shape {pixels.shape} and dtype {pixels.dtype}")
        return pixels

    def _array(self, data: bytes) -> Pixels:
        """Read a `.npy` member; the header is parsed once for all samples that share it."""
        head = data[: 10 + int.from_bytes(data[8:10], "little")]
        header = self._arrays.get(head)
        if header is None:
            header = array_header(data, layout="chw")  # the index has chosen
            if header.shape != self.sample_format.shape or header.dtype != self.sample_format.dtype:
                raise self._unexpected(f"an array of shape {header.shape} and dtype {header.dtype}")
            self._arrays[head] = header
        return array_values(data, header)

    def _into_1(self, target: Pixels, data: bytes, _: int) -> None:
        if data.startswith(JPEG_MAGIC):
            has_all_scans(data)  # not too many
        if data.startswith(NPY_MAGIC):
            pixels = self._npy(data)
        elif not self.sample_format.image:
            raise BadSample("format", "expected a .npy array, found other bytes")
        elif self._codecs is None:
            pixels = self._pillow(data)
        elif data.startswith(PNG_MAGIC):
            pixels = self._png(data)
        elif data.startswith(JPEG_MAGIC):
            self._codecs.jpeg8_decode(data, out=target)  # compares header and `out` before it decodes (ValueError)
            return
        else:
            pixels = self._pillow(data)
        if pixels.shape != target.shape or pixels.dtype != target.dtype:
            raise self._unexpected(f"shape {pixels.shape} and dtype {pixels.dtype}")
        target[...] = pixels

    def _unexpected(self, found: str) -> BadSample:
        return BadSample("shape", f"decoded to {found}, the index promises shape {self._decoded} and dtype {self.sample_format.dtype}")

    def _png(self, data: bytes) -> Pixels:
        width, height, depth, colour, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
        if (height, width) != self.sample_format.shape[:2]:
            raise self._unexpected(f"{height}x{width} pixels")
        # imagecodecs prints a libpng warning for each interlaced file; Pillow gives the same pixels up to 8 bits and for 16-bit gray
        if interlaced and (depth <= 8 or colour == 0):
            return self._pillow(data)
        pixels: Pixels = self._codecs.png_decode(data)
        if pixels.ndim > len(self._decoded) or pixels.shape[2:] > self._decoded[2:]:
            pixels = _without_colour_key(pixels, data)
        return pixels

    def _pillow(self, data: bytes) -> Pixels:
        with self._image.open(io.BytesIO(data), formats=READ_FORMATS) as image:
            if (image.height, image.width) != self.sample_format.shape[:2]:
                raise self._unexpected(f"{image.height}x{image.width} pixels")
            if image.format == "PNG" and data[24] == 16 and data[25] != 0:
                raise BadSample("format", "Pillow reads only 8 bits of a 16-bit colour PNG: use transform.decoder=imagecodecs")
            if image.mode == "P":  # by way of RGBA: Pillow warns about RGB when the palette has alpha
                return np.asarray(image.convert("RGBA"))[..., :3]
            if image.mode == "1":
                return np.asarray(image).astype(np.uint8) * np.uint8(255)
            if image.mode in ("CMYK", "LAB", "YCbCr"):
                raise BadSample("unsupported", f"colours of mode {image.mode}, which only transform.pixels=2 reads")
            return np.asarray(image)

    def _npy(self, data: bytes) -> Pixels:
        """Read a `.npy` member without objects; the header is parsed once for all samples that share it."""
        header = data[: 10 + int.from_bytes(data[8:10], "little")]
        if header not in self._npy_headers:
            try:
                dtype, shape, fortran, start = read_npy_header(io.BytesIO(data), versions=("1.0",))
            except NpyError as error:
                raise BadSample("format", f"{error}: only files of version 1.0 are read") from error
            if shape != self.sample_format.shape or fortran or dtype != self.sample_format.dtype:
                raise self._unexpected(f"an array of shape {shape}, dtype {dtype}, {'Fortran' if fortran else 'C'} order")
            self._npy_headers[header] = start
        values: Pixels = np.frombuffer(data, self.sample_format.dtype, offset=self._npy_headers[header])
        return values.reshape(self.sample_format.shape)


def _without_colour_key(pixels: Pixels, data: bytes) -> Pixels:
    """Drop the alpha channel that imagecodecs makes of a tRNS chunk: gray stays gray, a palette gives RGB."""
    if data[25] in (0, 2, 3) and pixels.ndim == 3 and pixels.shape[2] in (2, 4):
        return pixels[..., 0] if pixels.shape[2] == 2 else pixels[..., :3]
    return pixels


def _import_decoder(name: DecoderName) -> Any:  # any: imagecodecs has no types
    try:
        return importlib.import_module("PIL.Image" if name == "pillow" else name)
    except ImportError as error:
        raise ConfigError(
            f"transform.decoder={name} needs the Python package {name} ({error}): install it (pip install {name}), "
            "or choose the other decoder of imagecodecs and pillow (JPEG pixels then differ by a few levels)"
        ) from error


def decoder_version(name: DecoderName, pixels: PixelsVersion = 2) -> str:
    """Return "imagecodecs 2026.3.6, simplejpeg 1.9.0", for the artefact's metadata: what decodes, with versions.

    simplejpeg decodes the JPEGs of `pixels=2`. Of `pixels=1` it is the decoder alone.
    """
    own = f"{name} {_import_decoder(name).__version__}"
    return own if pixels == 1 else f"{own}, simplejpeg {importlib.import_module('simplejpeg').__version__}"


def preprocessing_hash(transform: Mapping[str, Any], decoder: str) -> str:  # any: plain JSON data
    """Return the hash of everything that turns stored bytes into network input: fields of a `TransformSpec`, decoder and its version."""
    fields = {name: value for name, value in transform.items() if name != "binarize"}  # latents are of the grey
    return sha256_json({"transform": fields, "decoder": decoder})
