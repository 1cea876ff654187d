"""The segments of a JPEG, and whether its scans are whole. libjpeg-turbo decodes (simplejpeg, imagecodecs); no codec is here.

libjpeg fills what a scan lacks with grey and goes on with a warning. simplejpeg raises for warnings, which costs nothing: what it decodes
comes from data that the file holds, and none are left over (`clean_pixels`). Warnings are also given for stray bytes that lose nothing:
where there is one, `is_whole_jpeg` tells, which takes several decodes.
"""

import functools
import itertools
import re
import struct
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from aecore.data.format.bad_sample import BadSample
from aecore.data.format.orientation import UPRIGHT, xmp_orientation
from aecore.native.loops import exif_orientation

# data without a marker; each begins with other bits, since the end of a cut code may mean the same as the zeros that libjpeg puts there
_FILLERS = tuple(bytes([first, *((37 * number + first) % 255 for number in range(127))]) for first in (0x5A, 0xA5, 0xFE, 0xC3, 0x7E, 0x99))
_SMALL_BYTES = 1 << 12  # a file that may lack so little that it takes all of them
_REST = 64  # bytes
ZEROS = bytes(16)  # what a transfer that was broken off leaves at the end of a file of the full size
_UNSEEN = 16  # more than the missing bits that a scan can state
_RESTARTS = tuple(bytes([0xFF, 0xD0 + number]) for number in range(8))
_FREE_BYTES = 1 << 18  # that may be added to the smallest files
_MARKER = re.compile(rb"(?<!\xff)\xff++[^\x00\xff]", re.DOTALL)  # with the fill bytes before it, of which each is looked at once
_RESTART = re.compile(rb"\xff[\xd0-\xd7]", re.DOTALL)
_SEGMENT = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]", re.DOTALL)  # a marker that has a length, SOI or EOI
SEGMENTS_1 = re.compile(rb"\xff[^\xff]", re.DOTALL)  # as `pixels=1` reads headers: every marker has a length
_UNUSUAL = frozenset({*range(0xC0), *range(0xD0, 0xDA), 0xFF})  # markers that are no segment, or may be none
_segment_head = struct.Struct(">BBH").unpack_from
_EXIF, _XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
SOI, EOI, SOS, APP1, PROGRESSIVE = 0xD8, 0xD9, 0xDA, 0xE1, 0xC2
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15
_COLOURS = {b"\1": "GRAY", b"\3": "RGB", b"\4": "CMYK"}  # of simplejpeg, by components
_EIGHTH = {"min_height": 1, "min_width": 1, "min_factor": 8}
_SCALED = frozenset({0xC0, 0xC1, PROGRESSIVE})  # frames that libjpeg scales: of a lossless one it writes all pixels, whatever was asked
_ALL_SCANS, _MOST_SCANS, _SCAN_PIXELS = 24, 500, 1 << 27  # always read, ever read, pixels of them together; encoders make up to some 20


def jpeg_segments(data: bytes, markers: re.Pattern[bytes] = _SEGMENT) -> Iterator[tuple[int, int, int]]:
    """Yield (marker, position of its 0xFF, bytes) of the segments of a JPEG after its SOI, up to the EOI that ends its first picture.

    As libjpeg finds them: what is between segments is passed over, that is fill bytes, stray bytes, markers without a length and the data
    of scans. The bytes of a segment are those of marker, length and what the length counts; a file that is cut off may not hold them all.
    An EOI before the first scan ends nothing. `markers` are those of segments.
    """
    position, scanned, size = 2, False, len(data)
    while True:
        if position + 4 <= size:
            start, marker, length = _segment_head(data, position)
        if position + 4 > size or start != 0xFF or marker in _UNUSUAL:
            found = markers.search(data, position)
            if found is None:
                return
            position = found.start()
            marker = data[position + 1]
            if marker in (SOI, EOI):
                length = 0
            elif position + 4 > size:
                return
            else:
                length = data[position + 2] << 8 | data[position + 3]
        yield marker, position, length + 2
        position += length + 2
        if marker == SOS:
            scanned = True
        elif marker == EOI and scanned:
            return


def clean_pixels(data: bytes, *, eighth: bool = False) -> NDArray[np.uint8] | None:
    """Return the stored pixels `[H, W, C]` of a JPEG of 8 bits in which nothing is missing or left over; None if that is in doubt.

    `eighth` decodes to an eighth of the size where libjpeg scales, for the check alone. BadSample as by `has_all_scans`.
    """
    import simplejpeg

    at = _frame(data)
    colours = _COLOURS.get(data[at + 9 : at + 10])
    if not has_all_scans(data) or colours is None or data[at + 4] != 8 or data.endswith(ZEROS):
        return None
    try:
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, colours, **(_EIGHTH if eighth and data[at + 1] in _SCALED else {}))
    except ValueError:  # a warning of libjpeg, or what only other decoders read
        return None
    return pixels


def is_whole_jpeg(data: bytes) -> bool:
    """Return whether every block of a JPEG is decoded from data that the file holds.

    libjpeg fills what is missing with grey and says nothing. If there is data missing, the pixels depend on what is put at the ends of the
    scans (or before the markers inside them); if nothing is, decoders skip that. A progressive file must also have all its scans. Raises
    what the codec does for a damaged file.
    """
    import imagecodecs

    scans = [at + size for marker, at, size in jpeg_segments(data) if marker == SOS]  # where the data of each begin
    end = next((at + size for marker, at, size in jpeg_segments(data) if marker == EOI and at >= scans[0]), None)
    if end is not None:
        data = data[:end]  # what follows is no part of this picture
    elif data.endswith(ZEROS):  # codes of pixels to a decoder
        data = data.rstrip(b"\0")
        data += b"\0" if data.endswith(b"\xff") else b""
    if scans[0] > len(data):
        return False
    data = data if end is not None else data + b"\xff\xd9"
    pixels = imagecodecs.jpeg8_decode(data)
    for filler in _FILLERS if len(data) < _SMALL_BYTES else _FILLERS[:2]:
        if not np.array_equal(pixels, imagecodecs.jpeg8_decode(_filled(data, scans[0], filler))):
            return False
    return has_all_scans(data) and _has_all_restarts(data) and not _has_rest(data, scans[-1], pixels)


def _has_all_restarts(data: bytes) -> bool:
    """Return whether the restart markers of each scan count from 0 to 7 and again: where one is left out an interval is lost with it."""
    starts, ends = list[int](), list[int]()
    for marker, at, size in jpeg_segments(data):
        if len(ends) < len(starts):
            ends.append(at)
        if marker == SOS:
            starts.append(at + size)
    for start, end in itertools.zip_longest(starts, ends, fillvalue=len(data)):
        if any(marker[0][-1] != 0xD0 + number % 8 for number, marker in enumerate(_RESTART.finditer(data, start, end))):
            return False
    return True


def _has_rest(data: bytes, start: int, pixels: NDArray[np.uint8]) -> bool:
    """Return whether the scan whose data begin at `start` holds some after its last block: others are lost, since bytes were changed.

    Padding of one value and fewer than `_REST` stray bytes lose nothing.
    """
    import imagecodecs

    end = next((at for _, at, _ in jpeg_segments(data) if at >= start), len(data))
    end = start + len(data[start:end].rstrip(b"\0").rstrip(b"\xff"))
    first = end - _REST
    while first > start and data[first - 1] == 0xFF:  # it would make a marker of the first byte that is changed
        first -= 1
    if first <= start:
        return False
    changed = (data[:first] + filler[: end - first] + data[end:] for filler in _FILLERS[:2])
    return all(np.array_equal(pixels, imagecodecs.jpeg8_decode(other)) for other in changed)


def _filled(data: bytes, start: int, filler: bytes) -> bytes:
    """Return a JPEG with data before the markers inside and after its scans, which begin at `start`; of at most a few times its size.

    At the end of a scan these are also all restart intervals that may be missing.
    """
    scans = sum(marker == SOS for marker, _, _ in jpeg_segments(data))
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


def has_all_scans(data: bytes) -> bool:
    """Return whether the scans of a JPEG give all bits of all coefficients; those of a sequential one give all bits of its components.

    BadSample if they are more than any encoder makes: a scan of a few bytes is decoded over all pixels. Hence this goes before decoding.
    """
    frame, scans = b"", list[bytes]()
    for marker, at, size in jpeg_segments(data):
        if marker in FRAMES:
            frame = data[at : at + size]
        elif marker == SOS:
            scans.append(data[at + 4 : at + size])
            if len(scans) == 1 and frame[1:2] != b"\xc2" and scans[0][:1] == frame[9:10]:  # it has all components: libjpeg reads no other
                return True
    height, width = int.from_bytes(frame[5:7], "big"), int.from_bytes(frame[7:9], "big")
    most = min(_MOST_SCANS, max(_ALL_SCANS, _SCAN_PIXELS // max(1, width * height)))
    if len(scans) > most:
        where = f"JPEG of {width}x{height} pixels in {len(scans)} scans, at most {most} are read"
        raise BadSample("decode", f"{where}: save it again as a baseline JPEG")
    if frame[1:2] == b"\xc2":
        return _give_all(frame, tuple(scans))
    return {component for scan in scans for component in scan[1:-3:2]}.issuperset(frame[10::3])


@functools.lru_cache(256)  # encoders have few ways to divide a picture into scans
def _give_all(frame: bytes, scans: tuple[bytes, ...]) -> bool:
    missing = {component: [_UNSEEN] * 64 for component in frame[10::3]}  # low bits of each coefficient that were not in a scan
    for scan in scans:
        first, stop, high, low = scan[-3], scan[-2] + 1, scan[-1] >> 4, scan[-1] & 15
        for component in scan[1:-3:2]:
            bits = missing.get(component, [])
            if high and any(known != high for known in bits[first:stop]):  # it refines what a scan gave that is lost
                return False
            bits[first:stop] = [low] * len(bits[first:stop])
    return not any(map(any, missing.values()))


def jpeg_orientation(data: bytes) -> int:
    """Return the orientation of a JPEG, by what is before its first scan: the first block of EXIF, else the last one of XMP, as Pillow."""
    exif, xmp = b"", b""
    for marker, at, size in jpeg_segments(data):
        if marker == SOS:
            break
        if marker == APP1 and data.startswith(_EXIF, at + 4):
            exif = exif or data[at + 10 : at + size]
        elif marker == APP1 and data.startswith(_XMP, at + 4):
            xmp = data[at + 4 + len(_XMP) : at + size]
    return exif_orientation(exif, xmp_orientation(xmp) if xmp else UPRIGHT)


def jpeg_size(data: bytes) -> tuple[int, int]:
    """Return width and height that the frame header of a JPEG says, 0 if there is none."""
    at = _frame(data)
    return int.from_bytes(data[at + 7 : at + 9], "big"), int.from_bytes(data[at + 5 : at + 7], "big")


def jpeg_precision(data: bytes) -> int:
    """Return the bits of a sample that the frame header of a JPEG says, 8 if there is none."""
    return int.from_bytes(data[(at := _frame(data)) + 4 : at + 5], "big") or 8


def _frame(data: bytes) -> int:
    """Return where the frame header of a JPEG is (its 0xFF), the end of the file if there is none before the first scan."""
    for marker, at, _ in jpeg_segments(data):
        if marker in FRAMES:
            return at
        if marker == SOS:
            break
    return len(data)
