"""The environment variables of this project: ONE table of names, what each takes and what it means.

Code that reads one asks `environment_value`. A command asks `check_environment` before it works: a wrong value is an error even where
the command does not come to read it, and a name that nobody reads is a typing error, which would be ignored silently. infra/README.md
shows the same table.
"""

import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aecore.errors import ConfigError, did_you_mean

PREFIX = "AECORE_"
ROLES = (  # kinds of files that a store commits
    *("checkpoint", "config", "decoded", "figure", "figures", "image", "index", "listing", "manifest", "metrics", "model", "part"),
    *("quarantine", "race", "record", "refused", "removal", "report", "run", "samples", "state", "tar", "weights"),
)
FAULT_STAGES = ("staged", "synced", "linked")  # written but not durable, durable but not visible, visible
_FAULT = re.compile(rf"({'|'.join(ROLES)})\.({'|'.join(FAULT_STAGES)})(:[1-9]\d{{0,8}})?")
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Variable:
    """One variable: what its value has to be, in words; what it does; how its text is read (ValueError for a wrong one)."""

    name: str
    takes: str
    about: str
    read: Callable[[str], Any] = str  # any: every variable has its own type


def _folder(text: str) -> str:
    folder = os.path.expanduser(text)  # in quotes a shell leaves ~ as it is
    if "://" in folder or folder.startswith("~"):
        raise ValueError(text)
    return folder


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text)):
        raise ValueError(text)
    return int(text)


def _one_of(*words: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in words:
            raise ValueError(text)
        return text

    return read


def _fault(text: str) -> tuple[str, int]:
    if not _FAULT.fullmatch(text):
        raise ValueError(text)
    name, _, nth = text.partition(":")
    return name, int(nth or 1)


def _addresses(text: str) -> list[str]:
    found = [part for part in map(str.strip, text.split(",")) if part]
    if any("://" in part and not part.startswith(("s3://", "file:///")) for part in found):
        raise ValueError(text)
    return found


VARIABLES = {
    variable.name: variable
    for variable in (
        Variable("AECORE_CACHE", "a folder", "where objects of a bucket are cached (default ~/.cache/aecore)", _folder),
        Variable("AECORE_CACHE_BYTES", "a number of bytes above 0, for example 17179869184", "how much that cache may hold", _positive),
        Variable(
            "AECORE_FAULT",
            f"KIND.STAGE or KIND.STAGE:N with a kind of file ({', '.join(ROLES)}) and a stage ({', '.join(FAULT_STAGES)})",
            "for tests: the process ends by SIGKILL at the N-th time a file of that kind is at that stage",
            _fault,
        ),
        Variable("AECORE_LINEAR", "torch or onednn", "the matrix product of linear layers on CPUs", _one_of("torch", "onednn")),
        Variable("AECORE_NATIVE", "0 or 1", "0 leaves the compiled loops out", _one_of("0", "1")),
        Variable(
            "AECORE_TAR_PREFIXES",
            "paths or s3:// URLs, separated by commas",
            "addresses below which the tars of adopted datasets in buckets may lie",
            _addresses,
        ),
        Variable("AECORE_APT", "0 or 1", "0: the set-up never calls apt-get", _one_of("0", "1")),
        Variable("AECORE_TORCH_INDEX", "the address of a package index", "a further index where the set-up looks for torch"),
        Variable("AECORE_DATA", "a folder", "where tests find real images", _folder),
        Variable("AECORE_ACCEPT", "0 or 1", "1: the full-size tests run", _one_of("0", "1")),
        Variable("AECORE_LONG", "0 or 1", "1: the long tests run", _one_of("0", "1")),
        Variable("AECORE_PICTURES", "a folder", "where tests of the Prefect page leave their pictures", _folder),
        Variable("AECORE_TEST_PROCESS", "a word", "marks the processes that a test has started"),
    )
}


def environment_value(name: str) -> Any:  # any: as in `Variable.read`
    """Return what a variable of the table says, None if it is not set or empty; ConfigError for a wrong value."""
    text, variable = os.environ.get(name, ""), VARIABLES[name]
    try:
        return variable.read(text) if text else None
    except ValueError:
        raise ConfigError(f"the environment variable {name} is {text!r}, expected {variable.takes}: correct or unset it") from None


def check_environment() -> None:
    """ConfigError if a variable of the table has a wrong value; one warning for each name with our prefix that is not in it."""
    for name in sorted(name for name in os.environ if name.startswith(PREFIX)):
        if name in VARIABLES:
            environment_value(name)
        else:
            logger.warning("the environment variable %s is not read by anything%s", name, did_you_mean(name, VARIABLES))
