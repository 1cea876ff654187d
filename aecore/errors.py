"""Errors that a user can act on, each with an exit code for command lines.

A message gives the value seen, what was expected or the known choices, and the next action in terms of this library: the functions and
fields to use. What a command line can add to it is named by a `Hint`. `assert` is for internal invariants. What a disk, the memory or an
input does to Python code that expects nothing (OSError, MemoryError, ...) becomes an `AecoreError` in `from_outside`; any other exception
is a bug and keeps its traceback. So is a RecursionError: only code that parses outside data knows that those are nested too deep.
A message never holds a password or a signature of a URL (`masked`), wherever it goes then: a log, a record, another process. What a
terminal would obey is escaped when it is printed (`printable`), and by JSON.
"""

import difflib
import errno
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

_REMEDIES = {
    errno.ENOSPC: "; what is finished is kept: free space there, then run the same command again",
    errno.EDQUOT: "; what is finished is kept: free space or raise the quota, then run the same command again",
    errno.EROFS: "; it is mounted read-only: write to another URL",
    errno.EACCES: "; this user may not write there: write to another URL, or have the folder's owner allow it",
    errno.EPERM: "; the file system refuses it: write to another URL (it has to know hard links)",
    errno.ENOTDIR: "; a part of the path is a file: write to another URL",
    errno.EOPNOTSUPP: "; the file system knows no hard links: write to another URL",
}
_ANY_REMEDY = {  # where it is not known whether a file was read or written
    **_REMEDIES,
    **dict.fromkeys((errno.EACCES, errno.EPERM), "; this user may not do that there: change the permissions, or use another URL"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "; raise the limit of open files (ulimit -n), then run the same command again"),
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR), "; it is not there: check the address, then run the same command again"),
    errno.ENAMETOOLONG: "; use a shorter name",
    errno.ELOOP: "; a link there leads to itself: correct it, or use another URL",
}
_USUAL_REMEDY = "; what is finished is kept: run the same command again when the storage is well"
_BUCKET_CLIENTS = frozenset({"aiobotocore", "aiohttp", "botocore", "fsspec", "s3fs"})  # packages whose errors are those of the storage
_NO_MEMORY = ("can't allocate memory", "can't start new thread", "out of memory")  # in a RuntimeError of torch or of Python
SIMILARITY = 0.75  # of difflib, from 0 to 1: a known name that is less similar to an unknown one is not suggested
MOST_KNOWN = 40  # known names in a message
_WORD = re.compile(r"[a-z]{3,}|\d{3,}")
MASK = "***"
# up to the last @ before the path; or, since a secret may hold a slash, up to the first @ after `name:` that no port number follows
_USERINFO = re.compile(r"(?i)([a-z][a-z0-9+.-]{0,20}://)([^\s/?#'\"]{0,1024}|[^\s/?#'\"@:]{0,99}:(?!\d+(?:[/?#,;\s]|$))[^\s'\"]{0,1024}?)@")
_PROFILE = re.compile("(?i)s3://[^:]*@")
_SIGNATURE = re.compile(
    r"(?i)((?:x-(?:amz|goog)-(?:signature|credential|security-token)"
    r"|(?<=[?&;])(?:signature|awsaccesskeyid|googleaccessid|sig|(?:access_)?token|password|secret))(?:=|%3d))[^\s&;'\"<>]+"
)
# all of ASCII's and Latin-1's but tab and line feed, other line ends, changes of direction, halves of a pair (bytes that are no UTF-8)
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def masked(text: str) -> str:
    """Return `text` with the passwords and signatures of URLs in it replaced by `***`; the profile of `s3://profile@bucket` is none."""

    def hide(found: re.Match[str]) -> str:
        return found[0] if _PROFILE.fullmatch(found[0]) else f"{found[1]}{MASK}@"

    return _SIGNATURE.sub(rf"\1{MASK}", _USERINFO.sub(hide, text))


def printable(text: str, *, one_line: bool = False) -> str:
    """Return `text` as it may be printed or logged: masked, with control characters, with `one_line` also line feeds, escaped."""
    escaped = _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), masked(text))
    return escaped.replace("\n", "\\n") if one_line else escaped


@dataclass(frozen=True, slots=True)
class Hint:
    """The name of a situation for which a command line knows the next command, and the values (URLs) of that command.

    The value `python` is the part of the message that a command line leaves out, since it names functions of this library.
    """

    name: str
    values: Mapping[str, str] = field(default_factory=dict)


class AecoreError(Exception):
    """Base of all errors that a user can act on; `exit_code` is for the process of a command line that it ends."""

    exit_code = 1

    def __init__(self, *args: object, hint: Hint | None = None) -> None:
        super().__init__(*(masked(each) if isinstance(each, str) else each for each in args))
        self.hint = hint

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without the constructor, which may take more than a message: an error travels whole to another process."""
        return _restored, (type(self), self.args, vars(self))


class RunFailed(AecoreError):
    """The work started and could not finish (a part failed for good, the loss became NaN, a worker kept dying)."""

    exit_code = 1


class Diverged(RunFailed):
    """A loss or weight became NaN or infinite: the same run again would end the same way."""


class Interrupted(RunFailed):
    """The run was asked to stop and wrote a checkpoint first: the same run again continues from it."""

    exit_code = 130


class WorkerDied(RunFailed):
    """A worker kept dying or failing. Whoever raises this has started it again as often as is allowed: nothing else starts it once more."""


class ConfigError(AecoreError):
    """A key, a value or a combination that cannot work, or an output that belongs to another configuration."""

    exit_code = 2


class DataError(AecoreError):
    """Input data that is missing, damaged or does not fit."""

    exit_code = 3


class InputError(DataError, ValueError):
    """A batch that a model cannot take: missing labels, a mask of another shape. Also a ValueError, as Python users expect."""


class StoreError(AecoreError):
    """The storage refused or could not be reached: permissions, space, credentials, unknown URL scheme."""

    exit_code = 4


class ClusterError(AecoreError):
    """The cluster cannot be reached or cannot give the resources that were asked for."""

    exit_code = 5


class ServiceLost(ClusterError):
    """The connection to a service broke while it was used: the same work again may succeed."""


def _restored(kind: type[AecoreError], args: tuple[Any, ...], attributes: dict[str, Any]) -> AecoreError:
    error = kind.__new__(kind, *args)
    vars(error).update(attributes)
    return error


def to_json(error: BaseException) -> dict[str, Any]:
    """Return the name of the error's class, its message, exit code and hint (if any) as plain JSON data, for `from_json`."""
    known = error if isinstance(error, AecoreError) else AecoreError()
    data = {"error": type(error).__name__, "message": str(error), "exit_code": known.exit_code}
    return data if known.hint is None else {**data, "hint": asdict(known.hint)}


def from_json(data: Mapping[str, Any]) -> AecoreError:
    """Return the error that `to_json` described, with its class, message and hint.

    A class whose constructor takes more than a message becomes its nearest base class without one; an unknown class becomes the first
    class with its exit code, or RunFailed.
    """
    known = list(_subclasses(AecoreError))
    named = next((kind for kind in known if kind.__name__ == data.get("error")), None)
    if named is None:
        named = next((kind for kind in known if kind.exit_code == data.get("exit_code")), RunFailed)
    plain = next(kind for kind in named.__mro__ if getattr(kind, "__init__", None) is AecoreError.__init__)
    hint = data.get("hint") or {}  # its writer may be of another version: keys that are unknown here are left out
    known_hint = Hint(hint["name"], hint.get("values") or {}) if "name" in hint else None
    error: AecoreError = plain(str(data.get("message")), hint=known_hint)
    return error


def _subclasses(kind: type[AecoreError]) -> Iterator[type[AecoreError]]:
    """Yield the subclasses of `kind`, breadth first: those of this module come before the narrower ones of other modules."""
    below = kind.__subclasses__()
    yield from below
    for narrower in below:
        yield from _subclasses(narrower)


def require_text(value: str, what: str) -> None:
    """ConfigError if `value`, which `what` names, cannot be written as UTF-8: it has bytes of a file name that are no text here."""
    if not value.isascii() and value.encode("utf-8", "replace").decode() != value:
        raise ConfigError(
            f"{what} {value!r} is no text here: it is not UTF-8 (rename the file), or this locale is not (set LC_ALL=C.UTF-8)"
        )


def similar(word: str, known: Iterable[str], count: int = 1, at_least: float = SIMILARITY) -> list[str]:
    """Return up to `count` known names that an unknown `word` may mean, the most similar first; [] if none is similar.

    Names one typo away come first, whatever their length; then those that begin with it; then those with a difflib ratio of at least
    `at_least`; if there are none, those that share a whole word with it (`batch_size`, `global_batch`).
    """
    names = list(known)
    found = [name for name in names if _is_one_typo(word.casefold(), name.casefold())]
    found += [name for name in names if len(word) >= 3 and name.casefold().startswith(word.casefold())]
    found += difflib.get_close_matches(word, names, n=count, cutoff=at_least)
    if not found:
        words = set(_WORD.findall(word.casefold()))
        sharing = [name for name in names if words & set(_WORD.findall(name.casefold()))]
        found = difflib.get_close_matches(word, sharing, n=count, cutoff=0.0)
    return list(dict.fromkeys(found))[:count]


def _is_one_typo(word: str, name: str) -> bool:
    """Return whether they differ by one wrong, missing or extra letter, or by two swapped neighbours."""
    while word and name and word[0] == name[0]:
        word, name = word[1:], name[1:]
    while word and name and word[-1] == name[-1]:
        word, name = word[:-1], name[:-1]
    return max(len(word), len(name)) <= 1 or (len(word) == 2 and word == name[::-1])


def counted(number: int, one: str, many: str) -> str:
    """Return a count for a message: `counted(2, "sample has", "samples have")` is "2 samples have"."""
    return f"{number} {one if number == 1 else many}"


def did_you_mean(value: str, known: Iterable[str], prefix: str = "") -> str:
    """Return " (did you mean 'x'? known: a, b, x)", to end a message about an unknown name; `prefix` is put before each name."""
    names = sorted(known)
    nearest = similar(value, names)
    guess = f"did you mean {prefix + nearest[0]!r}? " if nearest else ""
    more = f" and {len(names) - MOST_KNOWN} more" if len(names) > MOST_KNOWN else ""
    return f" ({guess}known: {', '.join(prefix + name for name in names[:MOST_KNOWN]) or 'none'}{more})"


def disk_error(message: str, error: OSError) -> StoreError:
    """Return the error about a file that could not be written: `message` and, where it is known, what to do."""
    return _storage_error(message, error, _REMEDIES.get(error.errno or 0, ""))


def read_error(message: str, error: OSError) -> StoreError:
    """Return the error about a place that could not be looked at: `message`, the system's reason and what to do."""
    return _storage_error(f"{message}: {error.strerror or error}", error, _ANY_REMEDY.get(error.errno or 0, _USUAL_REMEDY))


def _storage_error(message: str, error: OSError, remedy: str) -> StoreError:
    return StoreError(message + remedy, hint=Hint("disk-full") if error.errno == errno.ENOSPC else None)


def from_outside(error: Exception) -> AecoreError | None:
    """Return the typed error for an exception that storage, memory or an input caused; None for a bug, which keeps its traceback.

    This is the one place that decides it, for code that does not expect the exception; code that does says more itself. An `AecoreError`
    is returned as it is.
    """
    if isinstance(error, AecoreError):
        return error
    what = str(error).strip() or type(error).__name__
    if (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (isinstance(error, RuntimeError) and any(text in what for text in _NO_MEMORY))
    ):
        first = what.splitlines()[0]
        return ClusterError(f"not enough memory here ({first}): use less of it (smaller batches, fewer workers), or a larger machine")
    if isinstance(error, OSError):
        where = "" if error.filename is None else f"{error.filename!r}: "
        remedy = _ANY_REMEDY.get(error.errno or 0, _USUAL_REMEDY)
        return _storage_error(f"the storage cannot be used: {where}{error.strerror or what}", error, remedy)
    if {kind.__module__.partition(".")[0] for kind in type(error).__mro__} & _BUCKET_CLIENTS:
        return StoreError(f"the storage cannot be used: {type(error).__name__}: {what}{_USUAL_REMEDY}")
    if isinstance(error, UnicodeDecodeError):
        return DataError(f"an input is not {error.encoding} text ({what}): write it as {error.encoding}")
    if isinstance(error, UnicodeEncodeError):
        name = error.object[max(0, error.start - 60) : error.end + 20]
        return ConfigError(f"a name cannot be written as {error.encoding} ({name!r}: {error.reason}): rename it, or set LC_ALL=C.UTF-8")
    if isinstance(error, ValueError) and what in ("embedded null byte", "embedded null character"):
        return ConfigError("an address or a name holds a zero byte: leave it out")
    if isinstance(error, RuntimeError) and "determine home directory" in what:
        return ConfigError("this user, or the one of an address with ~, has no home directory here: set HOME, or write the whole path")
    return None
