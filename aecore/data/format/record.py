"""One sample as stored in a shard: a key and named byte members, and the short list of extensions a member may have.

Keys are made so that webdataset groups them back exactly: no dot, no leading underscore in a component, only `[A-Za-z0-9_%/-]`.
Nothing here can execute code: `.npy` headers are read as literals and object arrays are refused.
"""

import ast
import hashlib
import io
import itertools
import math
import re
import string
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from aecore.data.format.bad_sample import COMPLEX_REMEDY, BadSample
from aecore.data.format.image import IMAGE_EXTENSIONS, MAX_PIXELS, ImageHeader, PixelsVersion, image_header
from aecore.errors import ConfigError, DataError
from aecore.native.texts import Texts, ascii_bytes, joined

__all__ = [
    "ALLOWED_EXTENSIONS",
    "DATA_EXTENSIONS",
    "IMAGE_EXTENSIONS",
    "MAX_PIXELS",
    "ArrayHeader",
    "BadSample",
    "Header",
    "ImageHeader",
    "NpyError",
    "Sample",
    "array_header",
    "array_values",
    "encode_key",
    "encode_keys",
    "image_header",
    "is_channel_last",
    "joined_key",
    "read_npy_header",
    "require_allowed",
]

DATA_EXTENSIONS = IMAGE_EXTENSIONS | {"npy"}
ALLOWED_EXTENSIONS = DATA_EXTENSIONS | {"cls", "txt", "json"}
MAX_COMPONENT_BYTES, MAX_KEY_BYTES = 80, 200
MAX_DIMS = 32  # numpy has 64 for a batch
Layout = Literal["auto", "hwc", "chw"]
MOST_COLOURS = 4  # channels that an axis of an image may be without being the shortest
_USTAR_NAME, _USTAR_PREFIX, _LONGEST_SUFFIX = 100, 155, 5  # the suffix is "." and an extension: ".jpeg"
_MAX_ARRAY_HEADER, _MAX_ARRAY_DEPTH = 10_000, 8  # characters (numpy reads no more) and brackets of a `.npy` header
_BRACKETS = {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}

_PLAIN = re.compile(r"[A-Za-z0-9-][A-Za-z0-9_-]*(?:/[A-Za-z0-9-][A-Za-z0-9_-]*)*")
_PLAIN_BYTES = f"{string.ascii_letters}{string.digits}_/-".encode()
_IS_PLAIN = np.isin(np.arange(256), np.frombuffer(_PLAIN_BYTES, np.uint8))
_SLASH, _UNDERSCORE = b"/_"
_UNSAFE = re.compile(rb"[^A-Za-z0-9_-]")
_SHORTENED = re.compile(r".{40}-[0-9a-f]{32}")
_SHORTENED_BYTES = 73


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample of a shard: `members` maps extension to bytes; `label` is the class id, None where there is none."""

    key: str
    members: Mapping[str, bytes]
    label: int | None = None

    @property
    def data(self) -> tuple[str, bytes]:
        """Return extension and bytes of the data member (the one that is not `cls`, `txt` or `json`)."""
        for ext, value in self.members.items():
            if ext in DATA_EXTENSIONS:
                return ext, value
        raise DataError(f"sample {self.key!r} has no data member, only {', '.join(self.members) or 'nothing'}")


@dataclass(frozen=True, slots=True)
class ArrayHeader:
    """Shape and dtype of a `.npy` member, and the byte at which its values start.

    Attributes
    ----------
    dtype : dtype
        In this machine's byte order; `stored` is that of the file.
    fortran : bool
        Whether the file has the values in Fortran order.
    is_image : bool
        Whether it is an image `[H, W, C]`: see `is_channel_last`.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    start: int
    stored: np.dtype[np.generic] | None = None
    fortran: bool = False
    is_image: bool = False
    frames: int = field(default=1, init=False)  # as of an image header
    doubtful: bool = field(default=False, init=False)
    width: None = field(default=None, init=False)  # what an image header has and an array does not
    height: None = field(default=None, init=False)
    mode: None = field(default=None, init=False)
    ext: str = field(default="npy", init=False)

    @property
    def length(self) -> int | None:
        """Size of the first axis: the steps of a sequence; None for a single number."""
        return self.shape[0] if self.shape else None

    @property
    def format_text(self) -> str:
        """Return for example `3x32x32/float32`; of an image `32x32x3/hwc;float32`."""
        return f"{'x'.join(map(str, self.shape))}/{'hwc;' if self.is_image else ''}{self.dtype.name}"


Header = ImageHeader | ArrayHeader


def require_allowed(ext: str, where: str) -> None:
    """Raise DataError, which names the allow-list, unless members of extension `ext` may be read."""
    if ext not in ALLOWED_EXTENSIONS:
        raise DataError(f"{where} has the extension {ext!r}, which is not read (allowed: {', '.join(sorted(ALLOWED_EXTENSIONS))})")


def encode_key(path: str) -> str:
    """Return the key of a relative path without its extension; different paths have different keys (up to sha256).

    Bytes outside `[A-Za-z0-9_-]` and a leading `_` of a component are percent-encoded. A component over 80 bytes, a key over 200 and a
    key that no USTAR header can hold become their first 40 bytes + `-` + 32 hex of the sha256 of what they replace; so does
    a path that already looks like that, which keeps the encoding injective.
    """
    if len(path) < _SHORTENED_BYTES and _PLAIN.fullmatch(path):  # nearly all paths: nothing to encode, nothing to shorten
        return path
    components = [_shorten(_encode(part), MAX_COMPONENT_BYTES) for part in path.split("/")]
    key = "/".join(components)
    if len(components) == 1:
        return key
    return _shorten(key, MAX_KEY_BYTES if _fits_header(key) else 0)


def joined_key(above: str, key: str) -> str:
    """Return the key of a sample below another component; both are keys already."""
    whole = f"{above}/{key}"
    return _shorten(whole, MAX_KEY_BYTES if _fits_header(whole) else 0)


def encode_keys(paths: Sequence[str]) -> Texts:
    """Return `encode_key` of each path; of a batch of plain ones that is checked for all at once."""
    texts = Texts.of(paths)
    batches = [*texts.batches()]
    plain = [_all_plain(batch) for batch in batches]
    if all(plain):
        return texts
    pairs = zip(batches, plain, strict=True)
    return joined([Texts(batch) if is_plain else Texts.of([encode_key(path) for path in Texts(batch)]) for batch, is_plain in pairs])


def _all_plain(batch: Any) -> bool:  # any: an array of Arrow
    """Return whether all paths of a batch are their own keys."""
    found = ascii_bytes(batch)
    if found is None or not len(batch):
        return found is not None
    data, offsets = found
    sizes = np.diff(offsets)
    if sizes.min() == 0 or sizes.max() >= _SHORTENED_BYTES or not _IS_PLAIN[data].all():
        return False
    is_slash = data == _SLASH
    starts = np.zeros(len(data), np.bool_)  # of components
    starts[1:] = is_slash[:-1]
    starts[offsets[:-1]] = True
    return not (starts & (is_slash | (data == _UNDERSCORE))).any() and not is_slash[offsets[1:] - 1].any()


def _encode(component: str) -> str:
    if not component:
        return "%"  # no other component encodes to a lone percent sign
    raw = component.encode("utf-8", "surrogateescape")
    text = _UNSAFE.sub(lambda match: b"%%%02X" % match[0][0], raw).decode()
    return "%5F" + text[1:] if text[0] == "_" else text


def _shorten(text: str, limit: int) -> str:
    if len(text) <= limit and not _SHORTENED.fullmatch(text):
        return text
    return f"{text[:40]}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def _fits_header(key: str) -> bool:
    if len(key) + _LONGEST_SUFFIX <= _USTAR_NAME:
        return True
    slashes = [at for at, char in enumerate(key) if char == "/"]
    return any(at <= _USTAR_PREFIX and len(key) - at - 1 + _LONGEST_SUFFIX <= _USTAR_NAME for at in slashes)


_REMEDIES = {  # of dtypes that are not read, by their kind
    "c": COMPLEX_REMEDY,
    "O": "Python objects need a pickle, which is never read: save an array of numbers (numpy.stack), or of several lengths a file for each",
    "S": "save numbers instead of texts, such as ids of tokens",
    "U": "save numbers instead of texts, such as ids of tokens",
    "M": "save dates as numbers (array.astype('int64'))",
    "m": "save time differences as numbers (array.astype('int64'))",
    "V": "save its fields as channels (numpy.lib.recfunctions.structured_to_unstructured)",
}


def array_header(data: bytes, *, pixels: PixelsVersion = 2, layout: Layout = "auto") -> ArrayHeader:
    """Return shape and dtype of a `.npy` file after checking its size; BadSample if it is damaged or is one that `Decoder` does not read.

    Read are booleans and real numbers in any byte order, C or Fortran order and version. With `pixels=1` only what `np.save` writes by
    default, complex numbers too, and every array has the axes of the network.

    Raises
    ------
    ConfigError
        The axes may be `[H, W, C]` or `[C, H, W]`, and `layout` does not say which.
    """
    if not data:
        raise BadSample("empty", "the file has no bytes")
    try:
        dtype, shape, fortran, start = read_npy_header(io.BytesIO(data), versions=("1.0",) if pixels == 1 else ("1.0", "2.0", "3.0"))
    except NpyError as error:
        if error.version is not None:
            reason = f".npy of version {error.version}: only version 1.0 is read; save the plain array again with np.save"
            raise BadSample("unsupported", reason) from error
        raise BadSample("format", "not a .npy file" if error.cause is None else f".npy header is damaged ({error.cause})") from error
    if dtype.kind not in ("biufc" if pixels == 1 else "biuf") or dtype.fields is not None:
        remedy = _REMEDIES["V" if dtype.fields is not None else dtype.kind]
        raise BadSample("unsupported", f".npy of dtype {dtype}: only booleans and numbers are read; {remedy}")
    if dtype.kind == "f" and dtype.itemsize > 8 and pixels == 2:
        raise BadSample("unsupported", f".npy of dtype {dtype}, which no network takes: save array.astype('float64')")
    if len(shape) > MAX_DIMS:
        raise BadSample("unsupported", f".npy with {len(shape)} dimensions: at most {MAX_DIMS} are read")
    if fortran and pixels == 1:
        raise BadSample("unsupported", ".npy in Fortran order: only C order is read; save np.ascontiguousarray(array)")
    if dtype != np.dtype(dtype.name) and pixels == 1:
        raise BadSample("unsupported", f".npy of dtype {dtype.str} (non-native byte order): save array.astype({dtype.name!r})")
    if any(side < 0 for side in shape):
        raise BadSample("truncated", f".npy whose header promises the shape {shape}: save it again with numpy.save")
    expected = start + math.prod(shape) * dtype.itemsize
    if len(data) != expected:
        raise BadSample("truncated", f".npy of {len(data)} bytes, its header promises {expected}")
    if pixels == 1:
        return ArrayHeader(shape, dtype, start)
    return ArrayHeader(shape, dtype.newbyteorder("="), start, dtype, fortran, is_channel_last(shape, layout))


def array_values(data: bytes, header: ArrayHeader) -> NDArray[Any]:  # any: every array has its own dtype
    """Return the values of a `.npy` in its shape, in this machine's byte order."""
    stored = header.stored or header.dtype
    values = np.frombuffer(data, stored, offset=header.start).reshape(header.shape, order="F" if header.fortran else "C")
    return values.astype(header.dtype, copy=False)


def is_channel_last(shape: tuple[int, ...], layout: Layout = "auto") -> bool:
    """Return whether an array of three axes is an image `[H, W, C]` rather than `[C, H, W]`, which networks take.

    The axis of the channels is the one that is shorter than both others. If none is (a cube, a volume of three sides), the array is
    taken as it is.

    Raises
    ------
    ConfigError
        Both ends may be the channels, and `layout` does not say which: `[3, 32, 3]`, or `[8, 8, 64]`, which may be 8x8 pixels.
    """
    if len(shape) != 3 or layout == "chw":
        return False
    first, middle, last = shape
    if layout == "hwc" or last < min(first, middle):
        return True
    if (first == last < middle and last <= MOST_COLOURS) or (first == middle < last):
        raise ConfigError(
            f"an array of shape {shape} may be {first}x{middle} pixels with {last} channels, or {first} channels of {middle}x{last} "
            "pixels: say which with shards.layout=hwc or shards.layout=chw"
        )
    return False


class NpyError(ValueError):
    """Not a readable `.npy` header: of another `version`, damaged (`cause`: the error's class) or, with neither, not a `.npy` at all."""

    def __init__(self, version: str | None = None, cause: str | None = None) -> None:
        super().__init__(f"version {version} of .npy is not read" if version else f"damaged .npy header ({cause})" if cause else "not .npy")
        self.version, self.cause = version, cause


class NpyHeader(NamedTuple):
    """The header of a `.npy` file; its values begin at byte `start` of the file."""

    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]
    fortran: bool
    start: int


def read_npy_header(file: IO[bytes], versions: Container[str] = ("1.0", "2.0", "3.0")) -> NpyHeader:
    """Read the header of the `.npy` at the current position of `file`; nothing is executed and no objects are made. NpyError if it is none.

    Its length and the depth of its brackets are looked at before it is read and evaluated: a megabyte of them takes Python gigabytes.
    The caller checks what the header promises (dtype, shape, number of bytes).
    """
    head = file.read(12)
    if len(head) < 12 or head[:6] != b"\x93NUMPY":
        raise NpyError
    version = f"{head[6]}.{head[7]}"
    if version not in versions:
        raise NpyError(version)
    start = 10 if head[6] == 1 else 12
    length = int.from_bytes(head[8:start], "little")
    try:
        if length > _MAX_ARRAY_HEADER:
            raise ValueError(length)
        text = (head[start:] + file.read(max(0, start + length - 12)))[:length]
        dtype, shape, fortran = _array_fields(text.decode("utf-8" if head[6] == 3 else "latin1"))
    except (ValueError, SyntaxError, KeyError, TypeError, RecursionError, MemoryError) as error:
        raise NpyError(cause=type(error).__name__) from error
    return NpyHeader(dtype, shape, fortran, start + length)


def _array_fields(text: str) -> tuple[np.dtype[np.generic], tuple[int, ...], bool]:
    """Return dtype, shape and Fortran order of a header's text; as strict as numpy's own reader, but nothing warns."""
    if max(itertools.accumulate(_BRACKETS.get(char, 0) for char in text), default=0) > _MAX_ARRAY_DEPTH:
        raise ValueError(text[:80])
    fields = ast.literal_eval(text)
    descr, shape, fortran = fields["descr"], fields["shape"], fields["fortran_order"]
    if len(fields) != 3 or not (isinstance(descr, str | list) and isinstance(fortran, bool)):
        raise ValueError(text[:80])
    if not isinstance(shape, tuple) or not all(type(side) is int for side in shape):
        raise ValueError(shape)
    return np.dtype(descr), shape, fortran
