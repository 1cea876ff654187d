"""External files in a bucket, read-only: listed in pages, downloaded many at a time."""

import errno
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

from aecore.errors import DataError
from aecore.store._cache import ObjectCache
from aecore.store._s3_client import Answered
from aecore.store._s3_prefix import BucketPrefix
from aecore.threads import submit_ahead

IN_FLIGHT = 48  # files


class S3Files(BucketPrefix):
    """External files below a prefix."""

    def sizes(self) -> dict[str, int]:
        prefix, found = f"{self._prefix}/" if self._prefix else "", dict[str, int]()
        for page in self._pages(Prefix=prefix):
            found |= {entry["Key"][len(prefix) :]: entry["Size"] for entry in page.get("Contents", ())}
        found = {name: size for name, size in found.items() if not any(part.startswith(".") or not part for part in name.split("/"))}
        if not found:
            raise DataError(f"{self.url} holds no object: check the address")
        return dict(sorted(found.items()))

    def read(self, name: str) -> bytes:
        return self._result(self._client.submit(lambda filesystem: self._body(filesystem, name)), name)

    def _result(self, future: Future[bytes], name: str) -> bytes:
        try:
            return future.result()
        except Answered as error:
            if error.missing:
                raise FileNotFoundError(errno.ENOENT, "the object is not there any more", self._where(name)) from None
            raise

    def prefetch(self, names: Sequence[str]) -> Callable[[str], bytes]:
        """Return `read` for these names in this order, with `IN_FLIGHT` of them being downloaded."""
        expected = iter(names)
        bodies = submit_ahead(lambda name: self._client.submit(lambda filesystem: self._body(filesystem, name)), names, IN_FLIGHT)

        def read(name: str) -> bytes:
            body = next(bodies, None)
            if body is None:
                return self.read(name)
            assert next(expected) == name, "files are read in the order of `names`"
            return self._result(body, name)

        return read

    def local(self, name: str) -> Path:
        head = self._head(name)
        if head is None:
            raise FileNotFoundError(2, "no such object", self._where(name))
        return ObjectCache().unverified(
            f"{self._where(name)} {head['ETag']}", int(head["ContentLength"]), lambda to: self._download(name, to)
        )
