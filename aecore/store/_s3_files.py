"""External files in a bucket, read-only: listed in pages, downloaded many at a time.

Keys are taken as they are, with empty names in them (`a//b`). Without credentials, or with AWS_NO_SIGN_REQUEST, requests are not
signed: public buckets answer these. AWS_REQUEST_PAYER=requester pays for those of others (`_s3_client.py`).
"""

import errno
import io
import logging
import os
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from aecore.errors import DataError, counted
from aecore.store._buckets import bucket
from aecore.store._cache import ObjectCache
from aecore.store._cleanup import close_read
from aecore.store._s3_client import Answered, Client, ShortBody, client, retried, unsigned
from aecore.store._s3_prefix import BucketPrefix, date_of
from aecore.store._states import Seen, object_seen, object_state
from aecore.threads import submit_ahead

if TYPE_CHECKING:
    from s3fs import S3FileSystem

logger = logging.getLogger(__name__)
IN_FLIGHT = 48  # files or pieces
AHEAD, HELD = 8, 2  # whole objects
PIECE_BYTES = 1 << 14  # of an object of which little is read


class State(NamedTuple):
    """ETag, size and modification time of an object, and the time of the answer that showed it."""

    etag: str
    bytes: int
    modified: datetime
    date: str | None

    @property
    def text(self) -> str:
        return object_state(self.etag, self.modified)


class S3Files(BucketPrefix):
    """External files below a prefix."""

    def __init__(self, url: str, bucket: str, prefix: str, profile: str | None) -> None:
        super().__init__(url, bucket, prefix, profile)
        self._listed: dict[str, State] = {}
        self._bodies = dict[str, str]()  # states of objects whose bytes were read
        self._copies = dict[str, str]()  # states of objects of which copies were opened
        self._parts = dict[str, str]()  # states of objects of which pieces are read
        self._markers = list[str]()  # objects of the last listing whose names end in "/"
        self._told = False  # of them
        self._held = deque[int]()  # descriptors of the last copies whose paths were returned
        weakref.finalize(self, _close_all, self._held)

    @property
    def room(self) -> int:
        return ObjectCache().limit

    @property
    def _client(self) -> Client:
        return client(self._profile, unsigned=unsigned(self._profile))

    def _key(self, name: str) -> str:
        if ".." in name.split("/"):
            raise DataError(
                f"{self.url}: the name {name!r} has .. in it, which no client asks for as it is: copy the object to another key"
            )
        return f"{self._prefix}/{name}" if self._prefix and name else self._prefix or name

    def _objects(self) -> Iterator[dict[str, State]]:
        """Yield the objects by name, page by page, without the markers of folders."""
        self._markers.clear()
        prefix = f"{self._prefix}/" if self._prefix else ""
        for page in self._pages(Prefix=prefix):
            date = date_of(page)
            named = (
                (entry["Key"][len(prefix) :], State(entry.get("ETag", ""), entry["Size"], entry["LastModified"], date))
                for entry in page.get("Contents", ())
            )
            found = {name: state for name, state in named if name}
            self._markers += [name for name in found if name.endswith("/")]
            yield {name: state for name, state in found.items() if not name.endswith("/")}

    def names(self) -> Iterator[str]:
        for page in self._objects():
            yield from (name for name in page if not _is_hidden(name))

    def sizes(self, *, hidden: bool = False) -> dict[str, int]:
        found = self._sizes(hidden)
        if self._markers and not self._told:
            self._told = True
            logger.info(
                "%s: skipped %s (for example %r): they mark folders, and hold no sample",
                self.url,
                counted(len(self._markers), "object whose name ends in /", "objects whose names end in /"),
                self._markers[0],
            )
        return found

    def _sizes(self, hidden: bool) -> dict[str, int]:
        found = {name: state for page in self._objects() for name, state in page.items()}
        self._listed = {name: found[name] for name in sorted(found) if hidden or not _is_hidden(name)}
        if not self._listed:
            if self._prefix and (head := self._head("")) is not None:
                what = f"{self.url} is one object of {head['ContentLength']} bytes, expected a folder"
                raise DataError(f"{what}: give the folder that holds it, and unpack archives first")
            raise DataError(f"{self.url} holds no object: check the address")
        return {name: state.bytes for name, state in self._listed.items()}

    def seen(self, name: str) -> Seen:
        state = self._listed.get(name) or self._state(name)
        return object_seen(state.etag, state.modified, state.date)

    def state(self, name: str, found: os.stat_result | None = None) -> str | None:
        if found is not None:
            return self._copies.get(name)
        return self._bodies.pop(name, None) or self._parts.get(name)

    def read(self, name: str) -> bytes:
        return self._result(self._submit(name), name)

    def _submit(self, name: str) -> Future[bytes]:
        def see(answer: dict[str, Any]) -> None:  # any: S3's answer
            self._bodies[name] = object_state(answer["ETag"], answer["LastModified"])

        return self._client.submit(lambda filesystem: self._body(filesystem, name, see=see))

    def _result(self, future: Future[bytes], name: str) -> bytes:
        try:
            return future.result()
        except Answered as error:
            if error.missing:
                raise FileNotFoundError(errno.ENOENT, "the object is not there any more", self._where(name)) from None
            if error.taken:
                raise self._replaced(name) from None
            raise

    def prefetch(self, names: Sequence[str]) -> Callable[[str], bytes]:
        """Return `read` for these names in this order, with `IN_FLIGHT` of them being downloaded."""
        expected = iter(names)
        bodies = submit_ahead(self._submit, names, IN_FLIGHT)

        def read(name: str) -> bytes:
            body = next(bodies, None)
            if body is None:
                return self.read(name)
            assert next(expected) == name, "files are read in the order of `names`"
            return self._result(body, name)

        return read

    def local(self, name: str) -> Path:
        """Return the path of a copy, which stays in the cache until `HELD` others were asked for."""
        known = self._copy(name)
        self._held.append(ObjectCache().open_unverified(*known))
        while len(self._held) > HELD:
            close_read(self._held.popleft())
        return ObjectCache().unverified(*known, keep_s=0.0)

    def open(self, name: str) -> int:
        return ObjectCache().open_unverified(*self._copy(name))

    def _copy(self, name: str) -> tuple[str, int, Callable[[Path], object]]:
        """Return what the cache asks of an object: its identity, its size, how to download it."""
        state = self._state(name)
        self._copies[name] = state.text

        def download(target: Path) -> None:
            try:
                self._download(name, target, IfMatch=state.etag)
            except Answered as error:
                raise self._replaced(name) if error.taken else error from None

        return f"{self._where(name)} {state.etag}", state.bytes, download

    def _replaced(self, name: str) -> DataError:
        return DataError(f"{self._where(name)} was replaced while it was read: run the same command again")

    def start(self, name: str) -> IO[bytes]:
        return io.BufferedReader(_Pieces(self, name, self._state(name)), PIECE_BYTES)

    def ahead(self, names: Sequence[str]) -> Iterator[str]:
        room = ObjectCache().limit // 2
        sizes, begun = dict[int, int](), deque[Future[None]]()
        with ThreadPoolExecutor(AHEAD, "ahead") as pool:
            stop = 0  # of what is being downloaded
            try:
                for row, name in enumerate(names):
                    while stop < len(names) and stop - row < AHEAD:
                        sizes[stop] = sizes.get(stop) or self._bytes_of(names[stop])
                        if stop > row and sum(sizes[at] for at in range(row, stop + 1)) > room:
                            break
                        begun.append(pool.submit(self._bring, names[stop]))
                        stop += 1
                    begun.popleft().exception()  # whoever opens it raises it
                    yield name
            finally:
                for future in begun:
                    future.cancel()

    def _bytes_of(self, name: str) -> int:
        if name in self._listed:
            return self._listed[name].bytes
        head = self._head(name)
        return 0 if head is None else int(head["ContentLength"])

    def _bring(self, name: str) -> None:
        close_read(self.open(name))

    def pieces(self, places: Sequence[tuple[str, int, int]], room: int | None = None) -> Callable[[int], bytes] | None:
        names = dict.fromkeys(name for name, _, _ in places)
        if not names.keys() <= self._listed.keys():
            self._sizes(hidden=False)
        states = {name: self._listed.get(name) or self._state(name) for name in names}
        if sum(state.bytes for state in states.values()) <= (ObjectCache().limit if room is None else room):
            return None
        self._parts = {name: state.text for name, state in states.items()}

        def submit(row: int) -> Future[bytes]:
            name, offset, size = places[row]
            return self._submit_piece(name, states[name], offset, size)

        expected = iter(range(len(places)))
        bodies = submit_ahead(submit, range(len(places)), IN_FLIGHT)

        def read(row: int) -> bytes:
            body = next(bodies, None)
            if body is None:
                return self._result(submit(row), places[row][0])
            assert next(expected) == row, "pieces are read in the order of `places`"
            return self._result(body, places[row][0])

        return read

    def piece(self, name: str, state: State, offset: int, size: int) -> bytes:
        """Return some bytes of an object in this state."""
        return self._result(self._submit_piece(name, state, offset, size), name)

    def _submit_piece(self, name: str, state: State, offset: int, size: int) -> Future[bytes]:
        return self._client.submit(lambda filesystem: self._piece(filesystem, name, state.etag, offset, size))

    async def _piece(self, filesystem: "S3FileSystem", name: str, etag: str, offset: int, size: int) -> bytes:
        """Return the bytes of a part of an object that is still the one with this ETag; no checksum covers them."""
        if not size:
            return b""
        where = self._where(name)

        async def once() -> bytes:
            at = {**self._at(name), "Range": f"bytes={offset}-{offset + size - 1}", "IfMatch": etag}
            answer = await filesystem._call_s3("get_object", **at)
            async with answer["Body"] as body:
                data: bytes = await body.read()
            if len(data) != size:
                raise ShortBody(f"{len(data)} of {size} bytes arrived")
            return data

        data = await retried(once, where, "read")
        bucket(where).count_unchecked()
        return data

    def _state(self, name: str) -> State:
        head = self._head(name)
        if head is None:
            raise FileNotFoundError(errno.ENOENT, "no such object", self._where(name))
        return State(head["ETag"], int(head["ContentLength"]), head["LastModified"], date_of(head))


class _Pieces(io.RawIOBase):
    """An object as a file: each read is a request for that part of it."""

    def __init__(self, files: S3Files, name: str, state: State) -> None:
        self._files, self._name, self._state, self._at = files, name, state, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._state.bytes}[whence]
        if self._at < 0:
            raise OSError(errno.EINVAL, "a seek before the file", self._name)
        return self._at

    def readinto(self, buffer: "bytearray | memoryview") -> int:  # type: ignore[override]  # of the buffers that `BufferedReader` passes
        size = max(0, min(len(buffer), self._state.bytes - self._at))
        data = self._files.piece(self._name, self._state, self._at, size)
        buffer[:size] = data
        self._at += size
        return size


def _close_all(descriptors: deque[int]) -> None:
    while descriptors:
        close_read(descriptors.popleft())


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or "/." in name
