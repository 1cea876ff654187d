"""A bucket and a prefix: what an artefact and somebody else's files there have in common."""

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aecore.errors import DataError
from aecore.store._s3_client import Answered, Client, ShortBody, client, retried

if TYPE_CHECKING:
    from s3fs import S3FileSystem

READ_BYTES, PAGE = 1 << 20, 1000


class Place:
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

    def _get(self, name: str) -> bytes:
        return self._client.run(lambda filesystem: self._body(filesystem, name))

    async def _body(self, filesystem: "S3FileSystem", name: str) -> bytes:
        async def once() -> bytes:
            pieces: list[bytes] = []
            await _stream(filesystem, self._at(name), pieces.append)
            return b"".join(pieces)

        return await retried(once, self._where(name), "read")

    def _download(self, name: str, target: Path) -> str:
        """Write an object to `target`; return its sha256."""

        async def all_of_it(filesystem: "S3FileSystem") -> str:
            async def once() -> str:
                digest = hashlib.sha256()
                # not emptied first: the cache counts the size that it gave the file
                with os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT, 0o600), "wb", buffering=0) as file:

                    def take(piece: bytes) -> None:
                        file.write(piece)
                        digest.update(piece)

                    await _stream(filesystem, self._at(name), take)
                    file.truncate()
                return digest.hexdigest()

            return await retried(once, self._where(name), "read")

        return self._client.run(all_of_it)


async def _stream(filesystem: "S3FileSystem", at: dict[str, str], take: Callable[[bytes], object]) -> None:
    answer = await filesystem._call_s3("get_object", **at)
    expected, received = answer["ContentLength"], 0
    async with answer["Body"] as body:
        while piece := await body.read(READ_BYTES):
            received += len(piece)
            take(piece)
    if received != expected:
        raise ShortBody(f"{received} of {expected} bytes arrived")
