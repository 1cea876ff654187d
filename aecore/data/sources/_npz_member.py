"""The array in an `.npz` member of a tar, as `.npy`: nothing is unpickled, and what it inflates to is bounded."""

import io
import zipfile
import zlib

import numpy as np

from aecore.data.format.image import BadSample
from aecore.data.format.record import NpyError, read_npy_header
from aecore.data.sources._inflate import InflateLimit
from aecore.data.sources._names import is_data, is_labels

CHUNK_BYTES = 1 << 20


def as_npy(data: bytes, limit: int = 0, option: str = "") -> bytes:
    """Return the `.npy` file of the one array in an `.npz`, C order and native bytes, version 1.0.

    Of several arrays it is the only one that its name does not call a label (`labels`, `y`, ...) or that it calls an image.

    Raises
    ------
    BadSample
        If there is no array or several ones, or it is damaged, holds Python objects or inflates to more than `limit` bytes, the value
        of `option` (0: see `InflateLimit`).
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            info = _only(archive)
            most = InflateLimit.of(len(data), limit, option)
            if info.file_size > most.most:
                raise BadSample("too_large", f"the array {info.filename!r} inflates to {info.file_size} bytes, more than {most.why}")
            with archive.open(info) as packed:
                found = packed.read(info.file_size + 1)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, OSError) as error:
        raise BadSample("format", f"the .npz cannot be read ({type(error).__name__}: {error})") from error
    if len(found) != info.file_size:
        raise BadSample("truncated", f"the array {info.filename!r} has {len(found)} bytes, the archive promises {info.file_size}")
    return _plain(found, info.filename)


def _only(archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    arrays = [info for info in archive.infolist() if info.filename.endswith(".npy")]
    names = [info.filename.removesuffix(".npy") for info in arrays]
    for fits in (lambda _: True, lambda name: not is_labels(name), is_data):
        chosen = [info for info, name in zip(arrays, names, strict=True) if fits(name)]
        if len(chosen) == 1:
            return chosen[0]
    if not arrays:
        raise BadSample("no_data", "the .npz holds no array")
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    raise BadSample("ambiguous", f"the .npz has the arrays {shown}, and one is a sample: write the others to members of their own")


def _plain(npy: bytes, name: str) -> bytes:
    """Return the file as `np.save` writes it, unless it is that already or `array_header` is to say what is wrong with it."""
    try:
        header = read_npy_header(io.BytesIO(npy))
    except NpyError as error:
        raise BadSample("format", f"the array {name!r} is no .npy file ({error})") from error
    if header.dtype.hasobject:
        why = f"the array {name!r} holds Python objects, which only a pickle can bring back: save numbers instead"
        raise BadSample("unsupported", why)
    if npy[6] == 1 and not header.fortran and header.dtype == np.dtype(header.dtype.name):
        return npy
    try:
        array = np.load(io.BytesIO(npy), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise BadSample("truncated", f"the array {name!r} is shorter or longer than its header promises ({error})") from error
    out = io.BytesIO()
    np.save(out, array.astype(array.dtype.newbyteorder("="), order="C"), allow_pickle=False)
    return out.getvalue()
