"""Per bucket: counts of the checksums that this process has compared, and what the service does not support."""

import logging
import threading

logger = logging.getLogger(__name__)


class Bucket:
    """Counts of compared and uncomparable checksums of one bucket."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.matched = self.unchecked = 0  # ETags that were the MD5, bodies without any checksum
        self.ignores_etags = self.refuses_mode = False
        self._noted = False
        self._lock = threading.Lock()  # event loops of several threads count

    def count_match(self) -> None:
        """Count an ETag that was the MD5 of its object."""
        with self._lock:
            self.matched += 1

    def count_unchecked(self) -> None:
        """Count a body that could not be compared."""
        with self._lock:
            self.unchecked += 1
            is_first = self.unchecked == 1
        if is_first:
            logger.info("%s: objects without a checksum that can be compared are read once (counted for each shard)", self.url)

    def note_other_etag(self, where: str) -> None:
        """Record an ETag that is not the MD5 of its object."""
        with self._lock:
            self.ignores_etags = self.matched == 0
            self.unchecked += 1
        if self.matched:
            logger.warning("%s: its ETag is not its MD5, although %d others of this bucket are: compare it", where, self.matched)
        elif not self._noted:
            logger.warning("%s: ETags are no MD5 here (first: %s): bodies are not compared with them", self.url, where)
        self._noted = True


_buckets: dict[str, Bucket] = {}
_making = threading.Lock()


def bucket(url: str) -> Bucket:
    """Return the counts of the bucket of an `s3://[profile@]bucket/...` URL."""
    key = "/".join(url.split("/", 3)[:3])
    with _making:
        return _buckets.setdefault(key, Bucket(key))


def unchecked_bodies() -> int:
    """Return how many bodies this process has read without a checksum to compare with."""
    with _making:
        return sum(known.unchecked for known in _buckets.values())
