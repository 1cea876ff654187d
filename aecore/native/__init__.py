"""The loops that run for every byte of a shard, compiled from C if possible, else in Python, behind one interface.

`src/` is compiled when the package is installed, if there is a C compiler, and runs on x86-64 Linux with SHA instructions. Calls
release the interpreter lock, so threads run in parallel. `loops` and `tar_builder` give the same bytes without it, so callers need not
know which is used. `available` and `why_not` are for messages; AECORE_NATIVE=0 disables it.
"""

import ctypes
import platform
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aecore.store import environment_value

VERSION = 15  # equal to the one in native.h: a library built from another version is not used
FACTS = np.dtype([("kind", "u1"), ("detail", "V3"), ("width", "u4"), ("height", "u4")])


class Processor(NamedTuple):
    """Maker (`GenuineIntel`, `AuthenticAMD`) and name of a processor as in /proc/cpuinfo; "" where it has none."""

    vendor: str
    name: str


@cache
def processor() -> Processor:
    """Return the maker and the name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0].splitlines()
    except OSError:  # not Linux
        return Processor("", platform.processor() or platform.machine())
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return Processor(found.get("vendor_id", ""), found.get("model name", "") or platform.machine())


def available() -> bool:
    """Return whether the compiled loops are used."""
    return _library() is not None


def why_not() -> str:
    """Return why the compiled loops are not used, "" if they are."""
    return _load()[1]


def _library() -> Any | None:  # any: a shared library's functions have no types
    return _load()[0]


def _path() -> Path | None:
    paths = [Path(__file__).parent.with_name(f"_native{suffix}") for suffix in EXTENSION_SUFFIXES]
    return next((path for path in paths if path.is_file()), None)


@cache
def _load() -> tuple[Any | None, str]:  # any: as above
    """Return the library and "", or None and the reason."""
    path = _path()
    if path is None:
        return None, "they were not built: install a C compiler, then the package again"
    if environment_value("AECORE_NATIVE") == "0":
        return None, "AECORE_NATIVE=0"
    try:
        library = ctypes.CDLL(str(path))
        for function in ("native", "read_pieces", "list", "builder_next_block", "builder_finished_pages"):
            getattr(library, f"aecore_{function}").restype = ctypes.c_int64
        version = library.aecore_native()
        if version == VERSION:
            _describe(library)
            return library, ""
    except (OSError, AttributeError) as error:  # a damaged file, one for another system, or of another version
        return None, f"{path.name} cannot be used ({error}): install the package again"
    if version == 0:
        return None, f"{processor().name} has no SHA instructions"
    return None, f"{path.name} was built from another version of aecore: install the package again"


def _describe(library: Any) -> None:  # any: as above
    data, numbers, labels, words, facts = (np.ctypeslib.ndpointer(kind, flags="C") for kind in ("u1", "i8", "i4", "u4", FACTS))
    number = ctypes.c_int64
    library.aecore_sha256.argtypes = [words, data, number, data, numbers, numbers, number, data]
    library.aecore_blake2b.argtypes = [ctypes.c_char_p, number, data, labels, number, np.ctypeslib.ndpointer("u8", flags="C")]
    library.aecore_blake2b.restype = None
    library.aecore_list.argtypes = [ctypes.c_int, data, data, number, numbers, numbers, numbers, data, number]
    library.aecore_examine.argtypes = [data, numbers, numbers, number, facts]
    library.aecore_read_pieces.argtypes = [ctypes.c_int, numbers, number, data, numbers, numbers]
    library.aecore_decode_pngs.argtypes = [ctypes.c_void_p, data, numbers, numbers, number, data, number, number, number, number, data]
    library.aecore_builder_start.argtypes, library.aecore_builder_start.restype = [ctypes.c_void_p, ctypes.c_void_p], None
    for function in ("next_block", "submit", "finished_pages", "release", "stop"):
        getattr(library, f"aecore_builder_{function}").argtypes = [ctypes.c_void_p]
    library.aecore_pack.argtypes = [data, data, ctypes.c_char_p, data, numbers, numbers, labels, number]
