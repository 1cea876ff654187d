"""A fixed 1/n of the parts of an artefact: n nightly checks with k = 1..n read everything once."""

import hashlib
import re
from dataclasses import dataclass

from aecore.errors import ConfigError


@dataclass(frozen=True, slots=True)
class VerifySubset:
    """The `number`-th of `total` subsets. A stem belongs to exactly one, by its sha256 modulo `total`; appends move none."""

    number: int = 1
    total: int = 1

    def takes(self, stem: str) -> bool:
        """Return whether the part with this stem is in the subset."""
        return int.from_bytes(hashlib.sha256(stem.encode()).digest()[:8], "big") % self.total == self.number - 1

    def __str__(self) -> str:
        return f"{self.number}/{self.total}"


def parse_subset(text: str, option: str = "--read-data-subset") -> VerifySubset:
    """Return the subset `k/n`; ConfigError unless 1 <= k <= n."""
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text.strip())
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigError(f"{option} {text} is no slice: write k/n with 1 <= k <= n, for example {option} 1/7 for the first of seven")
    return VerifySubset(int(match[1]), int(match[2]))
