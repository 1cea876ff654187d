"""Files of several pages or frames as several samples (`source.frames=all`): `<source>#<frame, 9 digits>` with the key `<key>/<frame>`.

Listing reads every file that may have them, and a sample is decoded and written again without loss: its own bytes do not exist.
"""

import contextlib
import dataclasses
import sys
import threading
from collections.abc import Callable, Iterator

import numpy as np

from aecore.data.format.image import MAX_PIXELS, BadSample, image_header
from aecore.data.format.pixels import OpenImage, image_file
from aecore.data.format.record import IMAGE_EXTENSIONS
from aecore.data.format.tar import MAX_MEMBER_BYTES
from aecore.data.sources import Listing
from aecore.data.sources._names import FRAME
from aecore.errors import DataError, StoreError
from aecore.store import read_again

Read = Callable[[str], tuple[str, bytes]]
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


class FrameReader:
    """Reads the samples that `with_frames` listed; the last file stays open, since its next frame mostly is the next sample.

    `max_pixels` is the limit of an image that is decoded. Threads take turns.
    """

    def __init__(self, read: Read) -> None:
        self.max_pixels = MAX_PIXELS
        self._read, self._name = read, ""
        self._file: OpenImage | None = None
        self._lock = threading.Lock()

    def __call__(self, source: str) -> tuple[str, bytes]:
        """Return extension and bytes of a sample; BadSample if its frame cannot be decoded, or is too large to be."""
        match = FRAME.fullmatch(source)
        if match is None:
            return self._read(source)
        with self._lock, _decoding(int(match[2]), match[1]):
            data, ext = image_file(self._opened(match[1]).frame(int(match[2]), self.max_pixels).pixels)
        return ext, data

    def _opened(self, name: str) -> OpenImage:
        if self._file is None or self._name != name:
            if self._file is not None:
                self._file.close()
            self._file = None
            self._file, self._name = OpenImage(self._read(name)[1]), name
        return self._file


@contextlib.contextmanager
def _decoding(frame: int, name: str) -> Iterator[None]:
    """Raise what decoders of untrusted bytes raise as BadSample; what storage raises stays."""
    try:
        yield
    except (MemoryError, BadSample, StoreError, DataError):
        raise
    except OSError as error:
        if error.errno is not None:  # of the file, not of its bytes
            raise
        raise BadSample("decode", f"frame {frame} of {name}: {type(error).__name__}: {error}") from error
    except Exception as error:  # codecs raise their own types, SyntaxError, struct.error, ...
        raise BadSample("decode", f"frame {frame} of {name}: {type(error).__name__}: {error}") from error


def _num_frames(source: str, read: Read) -> int:
    if source.rpartition(".")[2].lower() not in IMAGE_EXTENSIONS - _ALONE:
        return 1
    try:
        ext, data = read_again(lambda: read(source), source)
        return image_header(data, ext, max_pixels=sys.maxsize).frames  # what is too large is known when it is packed
    except BadSample:
        return 1  # it goes to the quarantine when it is packed
