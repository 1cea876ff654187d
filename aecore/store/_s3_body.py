"""Bodies of objects: received whole, compared with a checksum, and read again on a mismatch.

Otherwise a bit that flips in transit is stored: most JPEGs and all BMPs with one still decode. A body is compared with, in this order,

- `x-amz-checksum-*` of the whole object, by botocore as it arrives (CRC-32, SHA-1, SHA-256; those of parts do not cover the whole),
- the sha256 that this project writes as metadata,
- the ETag, where it is 32 hex digits and the response names no KMS key and no customer key: then it is the MD5.

Two equal reads that differ from the ETag mean that the ETag is no MD5: that is logged once, and if no ETag of the bucket was one, ETags
are not compared any more. Reads that differ from each other are a fault: the third one must match. A body without any checksum is read
once and counted. The price is one MD5 (0.6 GB/s of one core), in separate threads for large bodies.
"""

import asyncio
import hashlib
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from aecore.errors import StoreError
from aecore.store._base import require_at_most
from aecore.store._buckets import Bucket, bucket
from aecore.store._s3_client import ShortBody, code_of, past_proxies, retried

if TYPE_CHECKING:
    from s3fs import S3FileSystem

logger = logging.getLogger(__name__)
Take = Callable[[bytes], object]
READS, READ_BYTES = 3, 1 << 20
THREAD_BYTES = 1 << 15  # a smaller piece is hashed in less time than a thread needs to start
_VERIFIED = ("ChecksumCRC32", "ChecksumSHA1", "ChecksumSHA256")  # by botocore; the others need a library that it does not bring along
_MD5 = re.compile(r"[0-9a-f]{32}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class _Digest(Protocol):
    def update(self, data: bytes, /) -> None: ...
    def hexdigest(self) -> str: ...


@dataclass(frozen=True, slots=True)
class _Received:
    """One read of a whole body: the checksums it was compared with, whether one matched, and its digests (equal for equal bytes)."""

    by: tuple[str, ...]
    matches: bool
    digests: tuple[str, ...]


async def receive(
    filesystem: "S3FileSystem",
    at: dict[str, str],
    where: str,
    begin: Callable[[], Take],
    sha256: str | None = None,
    limit: int | None = None,
    fresh: bool = False,
    see: Callable[[dict[str, Any]], object] | None = None,
) -> str | None:
    """Feed the body of an object to the function that `begin()` returns; `begin` is called again for each read.

    Parameters
    ----------
    at : dict
        Bucket and key.
    sha256 : str, optional
        Expected hash of the content; nothing else is compared then.
    limit : int, optional
        The most bytes that the object may have.
    fresh : bool
        Ask proxies on the way for the service's own answer; the read after a mismatch always does.
    see : callable, optional
        Called with the answer of each read, before its body is received.

    Returns
    -------
    str or None
        The sha256 of the received bytes if `sha256` was given (it differs if the object does), else None.

    Raises
    ------
    DataError
        If it has more than `limit` bytes, before they are read.
    StoreError
        If it cannot be read, or if no read matches its checksum and the reads differ from each other.
    """
    known = bucket(where)
    before: _Received | None = None
    for number in range(READS):
        past_proxies.set(fresh or number > 0)
        got = await retried(lambda: _once(filesystem, at, where, begin, sha256, limit, see), where, "read")
        if got.matches:
            return sha256
        if number == 1 and before is not None and got.digests and got.digests == before.digests:
            break
        logger.warning("%s: the received bytes do not match its %s: it is read again", where, got.by[0])
        before = got
    else:
        raise StoreError(
            f"cannot read {where}: none of {READS} reads matched its {got.by[0]}: the network or a proxy changes the bytes; nothing is "
            "recorded about it: run the same command again when that is repaired"
        )
    if sha256 is not None:
        return got.digests[0]
    if got.by != ("ETag",):
        raise StoreError(
            f"cannot read {where}: two reads gave the same bytes, which do not match its {got.by[0]}: the object is damaged; "
            "restore it, then run the same command again"
        )
    known.note_other_etag(where)
    return None


async def _once(
    filesystem: "S3FileSystem",
    at: dict[str, str],
    where: str,
    begin: Callable[[], Take],
    sha256: str | None,
    limit: int | None,
    see: Callable[[dict[str, Any]], object] | None,
) -> _Received:
    """Read a body once. ShortBody if it ends early."""
    from botocore.exceptions import FlexibleChecksumError

    known = bucket(where)
    asked = sha256 is None and not known.refuses_mode
    answer = await _answer(filesystem, at, known) if asked else await filesystem._call_s3("get_object", **at)
    if see is not None:
        see(answer)
    if limit is not None and answer["ContentLength"] > limit:
        answer["Body"].close()  # the rest of it is not received
        require_at_most(where, answer["ContentLength"], limit)
    expected = {"sha256": sha256} if sha256 else _expected(answer, known)
    # botocore compares the checksums that it was asked to request
    by_service = [name for name in _VERIFIED if "-" not in answer.get(name, "-")] if asked and not known.refuses_mode else []
    digests: dict[str, _Digest] = {}
    if not by_service:
        digests = {name: hashlib.md5(usedforsecurity=False) if name == "ETag" else hashlib.sha256() for name in expected}
    try:
        await _stream(answer, begin(), list(digests.values()))
    except FlexibleChecksumError:
        return _Received((by_service[0] if by_service else "checksum",), False, ())
    if by_service:
        return _Received((by_service[0],), True, ())
    if not expected:
        known.count_unchecked()
        return _Received((), True, ())
    found = {name: digest.hexdigest() for name, digest in digests.items()}
    matches = [name for name in expected if found[name] == expected[name]]
    if "ETag" in matches:
        known.count_match()
    return _Received(tuple(expected), bool(matches), tuple(found.values()))


async def _answer(filesystem: "S3FileSystem", at: dict[str, str], known: Bucket) -> dict[str, Any]:  # any: S3's answer
    """Request an object with its checksums, without them where the service does not know that mode."""
    try:
        answer: dict[str, Any] = await filesystem._call_s3("get_object", **at, ChecksumMode="ENABLED")
    except Exception as error:
        if code_of(error) not in ("NotImplemented", "501"):
            raise
        known.refuses_mode = True
        answer = await filesystem._call_s3("get_object", **at)
    return answer


def _expected(answer: dict[str, Any], known: Bucket) -> dict[str, str]:
    """Return name -> expected digest of the whole object, from its metadata and ETag; a body is intact if one of them matches."""
    found: dict[str, str] = {}
    written = written_sha256(answer)
    if written is not None and _SHA256.fullmatch(written):
        found["sha256"] = written
    etag = str(answer.get("ETag", "")).strip('"').lower()
    by_key = str(answer.get("ServerSideEncryption", "")).startswith("aws:kms") or "SSEKMSKeyId" in answer
    if _MD5.fullmatch(etag) and not by_key and "SSECustomerAlgorithm" not in answer and not known.ignores_etags:
        found["ETag"] = etag
    return found


def written_sha256(answer: dict[str, Any]) -> str | None:  # any: S3's answer
    """Return the sha256 that the writer of an object left in its metadata; services differ in the case of names."""
    return next((str(value) for name, value in answer.get("Metadata", {}).items() if name.lower() == "sha256"), None)


async def _stream(answer: dict[str, Any], take: Take, digests: list[_Digest]) -> None:
    """Feed the pieces of a body to `take` and to the digests; large pieces are hashed in a thread while the next one arrives."""
    expected, received = answer["ContentLength"], 0
    hashing: asyncio.Future[None] | None = None

    def update(piece: bytes) -> None:
        for digest in digests:
            digest.update(piece)

    async with answer["Body"] as body:
        try:
            while piece := await body.read(READ_BYTES):
                received += len(piece)
                take(piece)
                if hashing is not None:
                    await hashing
                    hashing = None
                if digests and len(piece) >= THREAD_BYTES:
                    hashing = asyncio.get_running_loop().run_in_executor(None, update, piece)
                else:
                    update(piece)
        finally:
            if hashing is not None:
                await hashing
    if received != expected:
        raise ShortBody(f"{received} of {expected} bytes arrived")
