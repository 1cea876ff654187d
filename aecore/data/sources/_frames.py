"""Files of several pages or frames as several samples (`source.frames=all`): `<source>#<frame, 9 digits>` with the key `<key>/<frame>`.

Listing reads every file that may have them, and a sample is decoded and written again without loss: its own bytes do not exist.
"""

import dataclasses
import re
from collections.abc import Callable

import numpy as np

from aecore.data.format.image import BadSample, image_header
from aecore.data.format.pixels import decode_image, image_file
from aecore.data.format.record import IMAGE_EXTENSIONS
from aecore.data.format.tar import MAX_MEMBER_BYTES
from aecore.data.sources import Listing
from aecore.store import read_again

Read = Callable[[str], tuple[str, bytes]]
_FRAME = re.compile(r"(.+)#([0-9]{9})", re.DOTALL)
_ALONE = frozenset({"bmp"})  # formats that hold one image


def with_frames(listing: Listing, read: Read) -> Listing:
    """Return the listing with a row for each page or frame of its images. StoreError if a file cannot be read."""
    unread = [size > MAX_MEMBER_BYTES for size in listing.sizes.tolist()]  # these are quarantined unread
    if listing.unusable is not None:
        unread = [large or bad is not None for large, bad in zip(unread, listing.unusable, strict=True)]
    counts = np.array([1 if bad else _num_frames(name, read) for name, bad in zip(listing.sources, unread, strict=True)], np.int64)
    rows = np.repeat(np.arange(len(listing)), counts)
    places = np.concatenate([np.arange(count) for count in counts]) if len(counts) else counts
    names = [f"{place:09d}" if counts[row] > 1 else "" for row, place in zip(rows.tolist(), places.tolist(), strict=True)]
    found = listing.take(rows)
    several = int((counts > 1).sum())
    note = f"{several} files with several pages or frames are {int(counts[counts > 1].sum())} samples (source.frames=all)"
    return dataclasses.replace(
        found,
        keys=[f"{key}/{name}" if name else key for key, name in zip(found.keys, names, strict=True)],
        sources=[f"{source}#{name}" if name else source for source, name in zip(found.sources, names, strict=True)],
        sizes=-(-found.sizes // counts[rows]),
        notes=(*found.notes, note),
    )


def file_of(source: str) -> str:
    """Return the file of a sample that `with_frames` listed."""
    match = _FRAME.fullmatch(source)
    return source if match is None else match[1]


def read_frame(source: str, read: Read) -> tuple[str, bytes]:
    """Return extension and bytes of a sample that `with_frames` listed; BadSample if its frame cannot be decoded."""
    match = _FRAME.fullmatch(source)
    if match is None:
        return read(source)
    ext, data = read(match[1])
    try:
        data, ext = image_file(decode_image(data, frame=int(match[2])).pixels)
    except MemoryError:
        raise
    except Exception as error:  # codecs raise their own types, SyntaxError, struct.error, ...
        raise BadSample("decode", f"frame {int(match[2])} of {match[1]}: {type(error).__name__}: {error}") from error
    return ext, data


def _num_frames(source: str, read: Read) -> int:
    if source.rpartition(".")[2].lower() not in IMAGE_EXTENSIONS - _ALONE:
        return 1
    try:
        ext, data = read_again(lambda: read(source), source)
        return image_header(data, ext).frames
    except BadSample:
        return 1  # it goes to the quarantine when it is packed
