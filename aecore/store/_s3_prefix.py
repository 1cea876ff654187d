"""A bucket and a prefix: the calls that the store of an artefact and external files share."""

import os
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aecore.errors import DataError
from aecore.store._s3_body import Take, receive
from aecore.store._s3_client import Answered, Client, client

if TYPE_CHECKING:
    from s3fs import S3FileSystem

PAGE = 1000


class BucketPrefix:
    """A bucket and a prefix, and the client that reaches them."""

    def __init__(self, url: str, bucket: str, prefix: str, profile: str | None) -> None:
        self.url, self._bucket, self._prefix, self._profile = url, bucket, prefix, profile

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    @property
    def _client(self) -> Client:
        return client(self._profile)

    def _key(self, name: str) -> str:
        if name.startswith("/") or ".." in name.split("/"):
            raise DataError(f"{self.url}: the name {name!r} leads out of the artefact")
        return f"{self._prefix}/{name}".strip("/")

    def _below(self, folder: str) -> str:
        """Return the start of the keys of all objects below a folder ("" is the prefix itself)."""
        return f"{key}/" if (key := self._key(folder)) else ""

    def _where(self, name: str) -> str:
        return f"{self.url}/{name}"

    def _at(self, name: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._key(name)}

    def _head(self, name: str) -> dict[str, Any] | None:  # any: S3's answer
        try:
            answer: dict[str, Any] = self._client.call(self._where(name), "look at", "head_object", **self._at(name))
        except Answered as error:
            if error.missing:
                return None
            raise
        return answer

    def _pages(self, **arguments: Any) -> Iterator[dict[str, Any]]:  # any: as above
        more: dict[str, str] = {}
        while True:
            page = self._client.call(self.url, "list", "list_objects_v2", Bucket=self._bucket, MaxKeys=PAGE, **arguments, **more)
            yield page
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def _get(self, name: str, limit: int | None = None, fresh: bool = False) -> bytes:
        return self._client.run(lambda filesystem: self._body(filesystem, name, limit, fresh))

    async def _body(
        self,
        filesystem: "S3FileSystem",
        name: str,
        limit: int | None = None,
        fresh: bool = False,
        see: Callable[[dict[str, Any]], object] | None = None,  # any: S3's answer
    ) -> bytes:
        pieces: list[bytes] = []

        def begin() -> Take:
            pieces.clear()
            return pieces.append

        await receive(filesystem, self._at(name), self._where(name), begin, limit=limit, fresh=fresh, see=see)
        return b"".join(pieces)

    def _download(self, name: str, target: Path, sha256: str | None = None, **only: str) -> str | None:
        """Write an object to `target`, if it fits the conditions `only`; return its sha256 if the expected one is given."""
        # not truncated first: the cache counts the bytes that it has reserved in the file
        with os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600), "wb", buffering=0) as file:

            def begin() -> Take:
                file.seek(0)
                return lambda piece: _write(file, piece)

            found = self._client.run(lambda filesystem: receive(filesystem, self._at(name) | only, self._where(name), begin, sha256))
            file.truncate()
        return found


def date_of(answer: dict[str, Any]) -> str | None:  # any: S3's answer
    """Return the time of an answer, by the clock of the service, as HTTP writes it."""
    date: str | None = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
    return date


def _write(file: FileIO, piece: bytes) -> None:
    """Write all of a piece: an unbuffered write may be short."""
    left = memoryview(piece)
    while left:
        left = left[file.write(left) :]
