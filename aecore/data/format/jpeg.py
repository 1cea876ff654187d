"""The segments of a JPEG, and whether its scans are whole. The decoding is imagecodecs' (libjpeg-turbo); no codec is here."""

import itertools
import re
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

# data without a marker; each begins with other bits, since the end of a cut code may mean the same as the zeros that libjpeg puts there
_FILLERS = tuple(bytes([first, *((37 * number + first) % 255 for number in range(127))]) for first in (0x5A, 0xA5, 0xFE, 0xC3, 0x7E, 0x99))
_SMALL_BYTES = 1 << 12  # a file that may lack so little that it takes all of them
_REST = 64  # bytes
_RESTARTS = tuple(bytes([0xFF, 0xD0 + number]) for number in range(8))
_FREE_BYTES = 1 << 18  # that may be added to the smallest files
_MARKER = re.compile(rb"(?<!\xff)\xff++[^\x00\xff]", re.DOTALL)  # with the fill bytes before it, of which each is looked at once
_SEGMENT = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]", re.DOTALL)  # a marker that has a length, or EOI


def is_whole_jpeg(data: bytes) -> bool:
    """Return whether every block of a JPEG is decoded from data that the file holds.

    libjpeg fills what is missing with grey and says nothing. If there is data missing, the pixels depend on what is put at the ends of the
    scans (or before the markers inside them); if nothing is, decoders skip that. A progressive file must also have all its scans. Raises
    what the codec does for a damaged file.
    """
    import imagecodecs

    scans = [(at, length) for at, marker, length in jpeg_segments(data) if marker == 0xDA]
    start = scans[0][0] + 2 + scans[0][1]
    if start > len(data):
        return False
    end = _end_of_picture(data)
    data = data + b"\xff\xd9" if end is None else data[:end]  # what follows is no part of this picture
    pixels = imagecodecs.jpeg8_decode(data)
    for filler in _FILLERS if len(data) < _SMALL_BYTES else _FILLERS[:2]:
        if not np.array_equal(pixels, imagecodecs.jpeg8_decode(_filled(data, start, filler))):
            return False
    return _is_complete(data, scans) and not _has_rest(data, scans[-1], pixels)


def _has_rest(data: bytes, scan: tuple[int, int], pixels: NDArray[np.uint8]) -> bool:
    """Return whether a scan holds data after its last block: its bytes were changed, so that blocks in between are lost.

    Padding of one value and fewer than `_REST` stray bytes lose nothing.
    """
    import imagecodecs

    start = scan[0] + 2 + scan[1]
    end = next((at.start() for at in _MARKER.finditer(data, start) if not 0xD0 <= at[0][-1] <= 0xD7), len(data))
    end = start + len(data[start:end].rstrip(b"\0").rstrip(b"\xff"))
    if end - _REST <= start:
        return False
    changed = (data[: end - _REST] + filler[:_REST] + data[end:] for filler in _FILLERS[:2])
    return all(np.array_equal(pixels, imagecodecs.jpeg8_decode(other)) for other in changed)


def _filled(data: bytes, start: int, filler: bytes) -> bytes:
    """Return a JPEG with data before the markers inside and after its scans, which begin at `start`; of at most a few times its size.

    At the end of a scan these are also all restart intervals that may be missing.
    """
    scans = sum(marker == 0xDA for _, marker, _ in jpeg_segments(data))
    width, height = jpeg_size(data)
    most = min(scans * (3 * -(-width // 8) * -(-height // 8) + 16), (len(data) + _FREE_BYTES) // 4)  # markers: others are stray bytes
    restarts = sum(map(data[start:].count, _RESTARTS))
    short = filler[: max(8, (len(data) + _FREE_BYTES) // (min(restarts, most) + 1))]
    ends = itertools.count()

    def before(marker: re.Match[bytes]) -> bytes:
        if 0xD0 <= marker[0][-1] <= 0xD7:
            return short + marker[0]
        if next(ends) * len(whole) > len(data) + _FREE_BYTES:  # no file has so many scans
            return marker[0]
        return whole + marker[0]

    whole = filler + b"".join(bytes([0xFF, 0xD0 + number % 8]) + filler for number in range(16))
    return data[:start] + _MARKER.sub(before, data[start:], count=most)


def _end_of_picture(data: bytes) -> int | None:
    """Return where the first picture of a JPEG ends, after its EOI; None if it has none."""
    after = 0
    for at, _, length in jpeg_segments(data):
        after = at + 2 + length
    found = _SEGMENT.search(data, after)
    return None if found is None or data[found.end() - 1] != 0xD9 else found.end()


def _is_complete(data: bytes, scans: list[tuple[int, int]]) -> bool:
    """Return whether the scans of a JPEG give all bits of all coefficients: those of a sequential one always do."""
    frame = next((at for at, marker, _ in jpeg_segments(data) if marker == 0xC2), None)
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


def jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield position, marker and length of the segments of a JPEG, up to the end of its first picture."""
    position, scanned = 2, False
    while (found := _SEGMENT.search(data, position)) is not None and found.end() + 2 <= len(data):
        at, marker = found.start(), data[found.start() + 1]
        if marker == 0xD9 and scanned:
            return
        if marker == 0xD9:
            position = at + 2
            continue
        length = (data[at + 2] << 8) | data[at + 3]
        yield at, marker, length
        scanned = scanned or marker == 0xDA
        position = at + 2 + length


def jpeg_size(data: bytes) -> tuple[int, int]:
    """Return width and height that the frame header of a JPEG says, 0 if there is none."""
    at = _frame(data)
    return (0, 0) if at is None else (int.from_bytes(data[at + 7 : at + 9], "big"), int.from_bytes(data[at + 5 : at + 7], "big"))


def jpeg_precision(data: bytes) -> int:
    """Return the bits of a sample that the frame header of a JPEG says, 8 if there is none."""
    at = _frame(data)
    return 8 if at is None else data[at + 4]


def _frame(data: bytes) -> int | None:
    """Return where the frame header of a JPEG is (its 0xFF), None if there is none before the first scan."""
    for at, marker, _ in jpeg_segments(data):
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return at
        if marker == 0xDA:
            break
    return None
