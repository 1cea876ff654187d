"""The one array of an `.npz` that is a sample by itself. Nothing is unpickled; what it may inflate to is bounded before it is."""

import lzma
import os
import struct
import zipfile
import zlib
from collections import Counter
from io import BytesIO
from pathlib import Path

from aecore.data.format.bad_sample import BadSample
from aecore.data.format.foreign import explained
from aecore.data.format.record import NpyError, read_npy_header
from aecore.data.sources._inflate import ALLOWED_BYTES, InflateLimit
from aecore.data.sources._names import is_data, is_labels
from aecore.data.sources._skipped import first_of
from aecore.errors import DataError
from aecore.store import open_regular

CHUNK_BYTES = 1 << 20
try:
    from compression.zstd import ZstdError  # type: ignore[import-not-found,unused-ignore]  # Python 3.14 has it
except ImportError:
    ZstdError = zlib.error  # zipfile knows no such members

# of a zip file and of the codecs of its members, each of which raises its own
DAMAGED_ZIP = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, ZstdError, struct.error, EOFError, NotImplementedError, RuntimeError)
_DAMAGED = (*DAMAGED_ZIP, KeyError, ValueError, OverflowError, OSError)


def only_array(data: bytes, limit: int = 0, option: str = "") -> bytes:
    """Return the array of an `.npz` that is the sample, as the bytes of a `.npy`.

    Raises
    ------
    BadSample
        If it is damaged, not clear which one, or inflates to more than `limit` bytes, the value of `option` (0: see `InflateLimit`).
    """
    try:
        with zipfile.ZipFile(BytesIO(data)) as archive:
            return _member(archive, _chosen(archive), len(data), limit, option)
    except _DAMAGED as error:
        if not data:
            raise BadSample("empty", "the file has no bytes") from error
        bad = BadSample("format", f".npz is damaged or is none ({type(error).__name__}): save it again with numpy.savez")
        raise explained(data, "npz", bad) from error


def left_out(path: str) -> tuple[str, list[str]] | None:
    """Return the array of an `.npz` that is the sample and the others, None if there are no others or none is the sample."""
    try:
        with os.fdopen(open_regular(Path(path)), "rb") as file, zipfile.ZipFile(file) as archive:
            name = _chosen(archive)
            others = [other[:-4] for other in archive.namelist() if other.endswith(".npy") and other != name]
    except (*_DAMAGED, BadSample, DataError):
        return None
    return (name[:-4], others) if others else None


def _member(archive: zipfile.ZipFile, name: str, packed: int, limit: int, option: str) -> bytes:
    info = archive.getinfo(name)
    if info.file_size > (limit or ALLOWED_BYTES) and info.file_size > (most := InflateLimit.of(packed, limit, option)).most:
        raise BadSample("too_large", f"{name} in the .npz inflates to {info.file_size} bytes, more than {most.why}; or save it as .npy")
    inflated = BytesIO()  # `read` of all at once, or joined pieces, would hold them twice
    with archive.open(info) as member:
        while inflated.tell() <= info.file_size and (piece := member.read(CHUNK_BYTES)):
            inflated.write(piece)
    found = inflated.getvalue()
    if len(found) != info.file_size:
        raise BadSample("truncated", f"{name} in the .npz has {len(found)} bytes, {info.file_size} were promised: save it again")
    return found


def _chosen(archive: zipfile.ZipFile) -> str:
    """Return the member that holds the sample: the only array, the only one named like data, or the only one that is no label or number."""
    names = [info.filename for info in archive.infolist() if info.filename.endswith(".npy")]
    if len(set(names)) < len(names):
        twice = first_of([name[:-4] for name, count in Counter(names).items() if count > 1])
        raise BadSample("ambiguous", f"the .npz holds arrays of one name ({twice}): save it again with numpy.savez")
    rest = [name for name in names if len(names) == 1 or not (is_labels(name[:-4]) or _is_number(archive, name))]
    named = [name for name in rest if is_data(name[:-4])]
    found = named if len(named) == 1 else rest
    if len(found) == 1:
        return found[0]
    if not names:
        raise BadSample("no_data", "the .npz holds no array: save the sample in it with numpy.savez")
    what = f"the .npz holds the arrays {first_of([name[:-4] for name in names])}, and it is not clear which is the sample"
    raise BadSample("ambiguous", f"{what}: name it image or data, or save it as .npy")


def _is_number(archive: zipfile.ZipFile, name: str) -> bool:
    with archive.open(name) as member:
        try:
            return read_npy_header(member).shape == ()
        except NpyError:
            return False
