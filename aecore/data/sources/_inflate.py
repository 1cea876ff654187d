"""How many bytes external compressed data may inflate to: what is configured, or a multiple of its own, and what the disk has free."""

import shutil
import tempfile
from dataclasses import dataclass

from aecore.errors import DataError, Hint, StoreError

# images and arrays of noise shrink to a half, text to a tenth, dSprites (3 GB of bits) to a hundredth, zeros to a thousandth
ALLOWED_BYTES, MAX_RATIO = 1 << 30, 128  # of any file; for each of its bytes


@dataclass(frozen=True, slots=True)
class InflateLimit:
    """The most bytes that one file or array may inflate to, why not more, and how many are free where it is inflated."""

    most: int
    why: str
    free: int

    @classmethod
    def of(cls, packed: int, configured: int, option: str) -> "InflateLimit":
        """Return the limit for `packed` bytes. `configured` is the value of `option`, 0 if none was set; "" if there is no option."""
        free = shutil.disk_usage(tempfile.gettempdir()).free
        if configured:
            return cls(configured, f"{option}={configured}: raise it if that is right", free)
        most = max(ALLOWED_BYTES, MAX_RATIO * packed)
        remedy = f"set {option}, or unpack it first," if option else "unpack it first"
        return cls(most, f"{most} bytes, expected from {packed} compressed ones: {remedy} if that is right", free)

    def require(self, size: int, what: str) -> None:
        """DataError if `size` bytes are more than the limit, StoreError if there is no room for them; `what` begins the message."""
        if size > self.most:
            raise DataError(f"{what} more than {self.why}")
        if size > self.free:
            raise StoreError(
                f"{what} more than the {self.free} bytes that are free in {tempfile.gettempdir()} (TMPDIR): free space there, or set "
                "TMPDIR to another folder, then run the same command again",
                hint=Hint("disk-full"),
            )
