"""Files of several pages or frames as several samples (`source.frames=all`): `<source>#<frame, 9 digits>` with the key `<key>/<frame>`.

Listing reads every file that may have them, and a sample is decoded and written again without loss: its own bytes do not exist.
"""

import contextlib
import dataclasses
import sys
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from aecore.data.format.bad_sample import BadSample
from aecore.data.format.image import MAX_PIXELS, image_header
from aecore.data.format.pixels import OpenImage, image_file, require_frames
from aecore.data.format.record import IMAGE_EXTENSIONS
from aecore.data.format.tar import MAX_MEMBER_BYTES
from aecore.data.sources import Listing
from aecore.data.sources._names import FRAME
from aecore.errors import DataError, StoreError, counted
from aecore.store import read_again

Read = Callable[[str], tuple[str, bytes]]
HELD_BYTES = 1 << 28
_ALONE = frozenset({"bmp"})  # formats that hold one image


def with_frames(listing: Listing, read: Read, max_pixels: int = MAX_PIXELS) -> Listing:
    """Return the listing with a row for each page or frame of its images. StoreError if a file cannot be read.

    A file of which no frame may be decoded, since they are too large or too many, is one row: a sample that cannot be used.
    """
    unread = [size > MAX_MEMBER_BYTES for size in listing.sizes.tolist()]  # these are quarantined unread
    if listing.unusable is not None:
        unread = [large or bad is not None for large, bad in zip(unread, listing.unusable, strict=True)]
    found = [(1, None) if bad else _num_frames(name, read, max_pixels) for name, bad in zip(listing.sources, unread, strict=True)]
    counts = np.array([count for count, _ in found], np.int64)
    if any(why for _, why in found):
        whole = [known or why for known, (_, why) in zip(listing.unusable or [None] * len(listing), found, strict=True)]
        listing = dataclasses.replace(listing, unusable=whole)
    rows = np.repeat(np.arange(len(listing)), counts)
    places = np.concatenate([np.arange(count) for count in counts]) if len(counts) else counts
    names = [f"{place:09d}" if counts[row] > 1 else "" for row, place in zip(rows.tolist(), places.tolist(), strict=True)]
    taken = listing.take(rows)
    several = int((counts > 1).sum())
    kind = "with several pages or frames"
    note = f"{counted(several, f'file {kind} is', f'files {kind} are')} {int(counts[counts > 1].sum())} samples"
    return dataclasses.replace(
        taken,
        keys=[f"{key}/{name}" if name else key for key, name in zip(taken.keys, names, strict=True)],
        sources=[f"{source}#{name}" if name else source for source, name in zip(taken.sources, names, strict=True)],
        sizes=-(-taken.sizes // counts[rows]),
        notes=(*taken.notes, f"{note} (source.frames=all)") if several else taken.notes,
    )


class FrameReader:
    """Reads the samples that `with_frames` listed, in any order: a file stays open while frames of it are still to be read.

    Animations can only be decoded from their beginning: on the way to a frame those that come later in `expect`'s order are kept.
    Files and frames that are kept have at most `HELD_BYTES`; above that files are opened again. `max_pixels` is the limit of an image that
    is decoded; all of a file are refused that have too many together. Threads take turns.
    """

    def __init__(self, read: Read) -> None:
        self.max_pixels = MAX_PIXELS
        self._read = read
        self._open: OrderedDict[str, tuple[OpenImage, int]] = OrderedDict()  # by name, the last used one last: the file and its bytes
        self._wanted = dict[str, set[int]]()  # frames of each file that are still to be read
        self._kept = defaultdict[str, dict[int, tuple[str, bytes]]](dict)  # extension and bytes of frames that were decoded on the way
        self._bytes = 0  # of open files and kept frames
        self._lock = threading.Lock()

    def expect(self, sources: Sequence[str]) -> None:
        """Replace what is known about the samples that will be read: these, in any order."""
        with self._lock:
            while self._open:
                self._close(next(iter(self._open)))
            self._wanted, self._bytes = {}, 0
            self._kept.clear()
            for source in sources:
                if (match := FRAME.fullmatch(source)) is not None:
                    self._wanted.setdefault(match[1], set()).add(int(match[2]))

    def __call__(self, source: str) -> tuple[str, bytes]:
        """Return extension and bytes of a sample; BadSample if its frame cannot be decoded, or is too large to be."""
        match = FRAME.fullmatch(source)
        if match is None:
            return self._read(source)
        name, number = match[1], int(match[2])
        with self._lock, _decoding(number, name):
            kept, wanted = self._kept[name], self._wanted.get(name, set())
            found = kept.pop(number, None)
            try:
                if found is None:
                    self._opened(name).require_total(self.max_pixels)
                    self._keep_passed(name, number)
                    found = self._frame(name, number)
                else:
                    self._bytes -= len(found[1])
            finally:
                if number in wanted:
                    wanted.remove(number)
                    if len(wanted) == len(kept) and name in self._open:  # nothing of the file is to be decoded any more
                        self._close(name)
        return found

    def _frame(self, name: str, number: int) -> tuple[str, bytes]:
        data, ext = image_file(self._opened(name).frame(number, self.max_pixels).pixels)
        return ext, data

    def _keep_passed(self, name: str, number: int) -> None:
        """Keep the frames that decoding this one passes, as far as they are wanted."""
        kept, wanted = self._kept[name], self._wanted.get(name, set())
        for passed in self._opened(name).passed(number):
            if passed not in wanted or passed in kept or self._bytes >= HELD_BYTES:
                continue
            try:
                kept[passed] = self._frame(name, passed)
            except Exception:  # whatever it is, it is raised again when that frame is read
                continue
            self._bytes += len(kept[passed][1])

    def _opened(self, name: str) -> OpenImage:
        if name not in self._open:
            if not self._wanted.get(name):  # nothing is known of other frames: only the last file stays open
                while self._open:
                    self._close(next(iter(self._open)))
            data = self._read(name)[1]
            while self._open and self._bytes + len(data) > HELD_BYTES:
                self._close(next(iter(self._open)))
            self._open[name] = OpenImage(data), len(data)
            self._bytes += len(data)
        self._open.move_to_end(name)
        return self._open[name][0]

    def _close(self, name: str) -> None:
        file, size = self._open.pop(name)
        self._bytes -= size
        file.close()


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


def _num_frames(source: str, read: Read, max_pixels: int) -> tuple[int, BadSample | None]:
    """Return the rows of a file, and why none of its frames can be used; what else is wrong with it is found when it is packed."""
    if source.rpartition(".")[2].lower() not in IMAGE_EXTENSIONS - _ALONE:
        return 1, None
    try:
        ext, data = read_again(lambda: read(source), source)
        header = image_header(data, ext, max_pixels=sys.maxsize)  # of a single image it is known when it is packed
    except BadSample:
        return 1, None
    try:
        if header.frames > 1:
            require_frames(data, header, max_pixels)
    except BadSample as bad:
        return 1, bad.bare()
    return header.frames, None
