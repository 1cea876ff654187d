"""An artefact below `s3://[profile@]bucket/prefix` of any S3-compatible service.

A file is staged on this machine and appears by ONE conditional create (`If-None-Match: *`, its sha256 as metadata), in parts if it is
large. "Exists" with the same sha256 is success: a lost acknowledgement of this write, or another attempt. Whole objects are read, and
checked against their sha256 as they arrive; nothing is kept on this machine (`_cached.py` does that). Many files are looked at by listing
their folders; a name that a listing does not show is asked for by itself before it counts as missing.
"""

import asyncio
import base64
import contextlib
import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from email.utils import parsedate_to_datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aecore.errors import DataError, StoreError
from aecore.store._base import FileRef, damaged, fault_point, other_content, require_at_most, require_size, sha256_file
from aecore.store._cache import cache_root
from aecore.store._cleanup import discard
from aecore.store._race import ROLE, require_atomic, retest
from aecore.store._s3_body import written_sha256
from aecore.store._s3_client import Answered, code_of, endpoint, retried
from aecore.store._s3_prefix import BucketPrefix, date_of
from aecore.store._scratch import new_path
from aecore.threads import map_ordered

if TYPE_CHECKING:
    from s3fs import S3FileSystem

PART_BYTES, MAX_PARTS, PARTS_AT_ONCE = 16 << 20, 9_000, 4  # a service takes 10,000 parts
CHECKS_AT_ONCE = 8


class S3Store(BucketPrefix):
    """One artefact in a bucket."""

    is_local = False

    def __reduce__(self) -> tuple[type["S3Store"], tuple[str, str, str, str | None]]:
        return S3Store, (self.url, self._bucket, self._prefix, self._profile)

    @contextlib.contextmanager
    def stage(self) -> Iterator[Path]:
        path = new_path()
        try:
            yield path
        finally:
            discard(path)

    def put(self, name: str, data: bytes, *, role: str) -> FileRef:
        ref = FileRef(name, len(data), hashlib.sha256(data).hexdigest())
        fault_point(f"{role}.staged")
        self._create(ref, lambda filesystem: self._put_whole(filesystem, ref, data), role)
        return ref

    def put_staged(self, name: str, staged: Path, *, role: str, sha256: str | None = None) -> FileRef:
        ref = FileRef(name, staged.stat().st_size, sha256 or sha256_file(staged))
        fault_point(f"{role}.staged")
        if ref.bytes <= 2 * PART_BYTES:
            data = staged.read_bytes()
            self._create(ref, lambda filesystem: self._put_whole(filesystem, ref, data), role)
        else:
            self._create(ref, lambda filesystem: self._put_parts(filesystem, ref, staged), role)
        return ref

    def _create(self, ref: FileRef, upload: Any, role: str) -> None:  # any: a coroutine function of the file system
        assert ref.bytes, f"{ref.name} has no bytes"
        if role != ROLE:
            require_atomic(self, self.location, cache_root())
        fault_point(f"{role}.synced")
        try:
            self._client.run(upload)
        except Answered as error:
            if not error.taken:
                raise
            there = self._sha256_of(ref.name)
            if there != ref.sha256:
                raise other_content(self._where(ref.name), ref, there) from None
        fault_point(f"{role}.linked")

    def _sha256_of(self, name: str) -> str:
        head = self._head(name)
        if head is None:
            raise StoreError(
                f"{self._where(name)} existed while it was written and is gone now: another process removes files below {self.url}"
            )
        return written_sha256(head) or hashlib.sha256(self._get(name)).hexdigest()

    async def _put_whole(self, filesystem: "S3FileSystem", ref: FileRef, data: bytes) -> None:
        arguments = {"Body": data, "ContentMD5": _md5(data), "Metadata": {"sha256": ref.sha256}, "IfNoneMatch": "*"}
        await retried(lambda: filesystem._call_s3("put_object", **self._at(ref.name), **arguments), self._where(ref.name), "write")

    async def _put_parts(self, filesystem: "S3FileSystem", ref: FileRef, staged: Path) -> None:
        at, where = self._at(ref.name), self._where(ref.name)
        metadata = {"sha256": ref.sha256}
        begun = await retried(lambda: filesystem._call_s3("create_multipart_upload", **at, Metadata=metadata), where, "write")
        upload = {**at, "UploadId": begun["UploadId"]}
        try:
            parts = await self._upload_parts(filesystem, upload, ref, staged)
            complete = {"MultipartUpload": {"Parts": parts}, "IfNoneMatch": "*"}
            await retried(lambda: self._complete(filesystem, upload, complete, ref), where, "write")
        except BaseException:
            with contextlib.suppress(Exception):  # the first error counts; what may remain is an unfinished upload, invisible to readers
                await filesystem._call_s3("abort_multipart_upload", **upload)
            raise

    async def _upload_parts(self, filesystem: "S3FileSystem", upload: dict[str, str], ref: FileRef, staged: Path) -> list[dict[str, Any]]:
        size = max(PART_BYTES, -(-ref.bytes // MAX_PARTS))
        room = asyncio.Semaphore(PARTS_AT_ONCE)

        async def part(number: int) -> dict[str, Any]:  # any: an entry of S3's list of parts
            async with room:
                with staged.open("rb") as file:
                    file.seek((number - 1) * size)
                    data = file.read(size)
                arguments = {"Body": data, "ContentMD5": _md5(data), "PartNumber": number}
                done = await retried(
                    lambda: filesystem._call_s3("upload_part", **upload, **arguments), self._where(ref.name), f"write part {number} of"
                )
                return {"PartNumber": number, "ETag": done["ETag"]}

        tasks = [asyncio.create_task(part(number + 1)) for number in range(-(-ref.bytes // size))]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)  # no part is in flight any more when the upload is aborted

    async def _complete(self, filesystem: "S3FileSystem", upload: dict[str, str], complete: dict[str, Any], ref: FileRef) -> None:
        try:
            await filesystem._call_s3("complete_multipart_upload", **upload, **complete)
        except OSError as error:
            if code_of(error) != "NoSuchUpload":  # else an earlier attempt completed it (the response was lost), or it was aborted
                raise
            try:
                head = await filesystem._call_s3("head_object", **self._at(ref.name))
            except OSError:
                head = {}
            if written_sha256(head) != ref.sha256:
                raise StoreError(f"the upload of {self._where(ref.name)} was aborted elsewhere: run the same command again") from error

    def read(self, name: str, *, ref: FileRef | None = None, fresh: bool = False, limit: int | None = None) -> bytes:
        if ref is not None:
            require_at_most(self._where(name), ref.bytes, limit)
            with os.fdopen(self.open(ref), "rb") as file:
                return file.read()
        try:
            return self._get(name, limit, fresh)
        except Answered as error:
            if error.missing:
                raise DataError(f"{self._where(name)} is missing") from None
            raise

    def check(self, ref: FileRef, *, verify: bool = False) -> None:
        if not verify:
            require_size(self._where(ref.name), ref, self.size(ref.name))
            return
        with self.stage() as copy:
            self.fetch(ref, copy)

    def check_all(self, refs: Sequence[FileRef], *, verify: bool = False) -> None:
        listed = {} if verify else self._listed([ref.name for ref in refs])
        left = [ref for ref in refs if verify or listed.get(ref.name) != ref.bytes]
        for _ in map_ordered(lambda ref: self.check(ref, verify=verify), left, threads=CHECKS_AT_ONCE):
            pass

    def _listed(self, names: Sequence[str]) -> dict[str, int]:
        """Return the sizes of those names that listings show, as far as these take less time than one request for each name.

        A listing may lack what was just written, or what is far from the other names: those are left out.
        """
        folders, found = defaultdict[str, list[str]](list), dict[str, int]()
        for name in names:
            folders[name.rpartition("/")[0]].append(name)
        for folder, wanted in folders.items():
            first, last = min(wanted), max(wanted)
            pages = self._pages(Prefix=self._below(folder), Delimiter="/", StartAfter=self._key(first)[:-1])
            for page in islice(pages, len(wanted) // CHECKS_AT_ONCE):  # that many names one by one take as long as a page
                shown = {f"{folder}/{entry['Key'].rpartition('/')[2]}".lstrip("/"): entry["Size"] for entry in page.get("Contents", ())}
                found |= shown
                if max(shown, default="") >= last:
                    break
        return found

    def local(self, ref: FileRef) -> Path:
        with self.stage() as copy:
            self.fetch(ref, copy)
            return copy.rename(new_path())  # removed when this process has ended (`_scratch.py`)

    def open(self, ref: FileRef) -> int:
        with self.stage() as copy:
            self.fetch(ref, copy)
            return os.open(copy, os.O_RDONLY)

    def refetch_if_corrupt(self, ref: FileRef) -> bool:
        return False

    def prefetch(self, refs: Sequence[FileRef]) -> None:
        """No-op: there is no place to keep them (see `CachedStore`)."""

    @property
    def location(self) -> str:
        """Bucket and endpoint."""
        return f"{'/'.join(self.url.split('/', 3)[:3])} at {endpoint()}"

    def test_creation(self) -> str | None:
        return retest(self, self.location, cache_root())

    def fetch(self, ref: FileRef, target: Path) -> None:
        """Write the bytes of `ref` to `target`; DataError unless they exist and have its size and sha256."""
        try:
            found = self._download(ref.name, target, ref.sha256)
        except Answered as error:
            if error.missing:
                require_size(self._where(ref.name), ref, None)
            raise
        require_size(self._where(ref.name), ref, target.stat().st_size)
        if found is not None and found != ref.sha256:
            raise damaged(self._where(ref.name), ref, found)

    def size(self, name: str) -> int | None:
        head = self._head(name)
        return None if head is None else int(head["ContentLength"])

    def modified(self, name: str) -> float | None:
        head = self._head(name)
        return None if head is None else float(head["LastModified"].timestamp())

    def now(self) -> float:
        page = next(self._pages(Prefix=f"{self._key('')}/", Delimiter="/"))
        date = date_of(page)
        if date is None:
            raise StoreError(f"{self.url}: the service's answers have no date")
        return parsedate_to_datetime(date).timestamp()

    def list(self, folder: str = "") -> list[str]:
        prefix, found = self._below(folder), list[str]()
        for page in self._pages(Prefix=prefix, Delimiter="/"):
            found += [entry["Key"][len(prefix) :] for entry in page.get("Contents", ())]
            found += [entry["Prefix"][len(prefix) : -1] for entry in page.get("CommonPrefixes", ())]
        return sorted(name for name in found if name)

    def remove(self, name: str) -> None:
        self._client.call(self._where(name), "remove", "delete_object", **self._at(name))


def _md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
