"""Whether the strips or tiles of a fax TIFF (CCITT RLE, Group 3 and 4) hold all of their rows; imagecodecs decodes them.

Its decoder leaves white what a strip lacks, or what follows a code that does not exist, and says nothing; so does libtiff. Rows that the
data give do not depend on what follows the data, and what stands before their end matters: both are asked by decoding changed data.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aecore.data.format.bad_sample import BadSample

Rows = NDArray[np.uint8]
_RANDOM = np.random.default_rng(4)
_FILLERS = tuple(bytes([17 * number]) + _RANDOM.bytes(255) for number in (10, 5, 2, 3, 13, 6, 9, 4, 15, 11))
_AFTER_ZEROS = tuple(bytes([3 * number + 3]) + _RANDOM.bytes(255) for number in range(10))  # three zeros go first: a code may end in them
_GROUP4, _END_OF_BLOCK = 4, "000000000001" * 2  # of Group 4: what is cut off has it no more
_END = 32  # bytes that the codes after the last row take at most, and stray ones
_MOST_SEEN = 1 << 17
_whole_seen: set[tuple[int, int]] = set()  # hashes of files, and pages: training reads them again


def require_whole_faxes(page: Any, data: bytes) -> None:  # any: tifffile.TiffPage
    """Raise BadSample if a strip or tile of a fax lacks a part of its rows. Raises what imagecodecs does for a damaged one."""
    from imagecodecs import bitorder_decode

    key = hash(data), page.index
    if key in _whole_seen:
        return
    num, kind = len(page.dataoffsets), "tile" if page.is_tiled else "strip"
    is_stated = (325 if page.is_tiled else 279) in page.tags  # else its end is that of the file, or the next page
    for number, (offset, count) in enumerate(zip(page.dataoffsets, page.databytecounts, strict=False)):
        segment = data[offset : offset + count]
        if page.fillorder == 2:
            segment = bytes(bitorder_decode(segment))
        lacks = bool(segment) and _lacks_rows(segment, _decoder(page, number), ends_in_one=page.compression == _GROUP4)
        if lacks or (is_stated and _has_rest(segment, _decoder(page, 0))):
            where = f"{kind} {number + 1} of {num}" if num > 1 else kind
            raise BadSample("truncated", f"fax TIFF whose {where} of {len(segment)} bytes does not give all of its rows: save it again")
    if len(_whole_seen) < _MOST_SEEN:
        _whole_seen.add(key)


def _decoder(page: Any, number: int) -> Callable[[bytes], Rows | None]:  # any: as above
    """Return what decodes data in normal order of bits as this strip or tile; None for those that it refuses."""
    from imagecodecs import CcittrleError, bitorder_decode

    def decode(segment: bytes) -> Rows | None:
        try:
            rows: Rows = page.decode(bitorder_decode(segment) if page.fillorder == 2 else segment, number)[0]
        except CcittrleError:  # that of all three kinds
            return None
        return rows

    return decode


def _lacks_rows(segment: bytes, decode: Callable[[bytes], Rows | None], *, ends_in_one: bool) -> bool:
    """Return whether the rows depend on what follows the data, of which zeros at the end are no part."""
    rows, begun = decode(segment), segment.rstrip(b"\0")
    if ends_in_one and f"{int.from_bytes(begun[-4:], 'big'):b}".rstrip("0").endswith(_END_OF_BLOCK):
        return False
    fillers = _FILLERS if ends_in_one or begun == segment else _AFTER_ZEROS
    return rows is None or not all(_equal(rows, decode(begun + filler)) for filler in fillers)


def _has_rest(segment: bytes, decode: Callable[[bytes], Rows | None]) -> bool:
    """Return whether the last bytes change nothing, since the decoder stopped before them. Rows of a padded last strip count too.

    Of changes that begin among the zeros of the end of a line the decoder makes white lines, which may be there: hence several places.
    """
    last = len(segment.rstrip(b"\0")) - _END
    if last < 6:
        return False
    rows, places = decode(segment), range(last - 6, last + 1)
    return all(_equal(rows, decode(segment[:first] + filler)) for filler in _FILLERS[:4] for first in places)


def _equal(rows: Rows | None, others: Rows | None) -> bool:
    return rows is None is others or (rows is not None and others is not None and np.array_equal(rows, others))
