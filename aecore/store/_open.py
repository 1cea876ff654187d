"""URLs: the table of schemes, how addresses are made absolute, and which store they open."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from aecore.errors import ConfigError, DataError, masked, require_text
from aecore.store._base import Files, Store
from aecore.store._local import LocalFiles, LocalStore
from aecore.store._typos import readable, refuse_typos


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the URLs of one scheme are read: `absolute` checks one and returns the form that is kept, the others open that form.

    The second argument of `absolute` names the URL in errors. `is_remote`: every machine reaches it; a path may exist on one only.
    """

    absolute: Callable[[str, str], str]
    store: Callable[[str], Store]
    files: Callable[[str], Files]
    is_remote: bool = True


TAR_ENDINGS = (".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".tzst", *(f".tar.{kind}" for kind in ("gz", "bz2", "xz", "zst", "zstd")))


def is_tar(name: str) -> bool:
    """Return whether a file of this name is a tar, plain or compressed."""
    return name.lower().endswith(TAR_ENDINGS)


def split_urls(url: str) -> list[str]:
    """Return the addresses that are joined by `::`, as webdataset writes several; one address is returned as it is.

    They are if all are tars, or if each begins as an address does: with a scheme, / or a dot. Else `::` is part of a name.
    """
    parts = url.split("::")
    several = all(map(is_tar, parts)) or all(re.match(r"\.{0,2}/|\.{1,2}$|\w+://", part) for part in parts)
    return parts if len(parts) > 1 and several else [url]


def absolute_url(url: str | os.PathLike[str], what: str = "URL") -> str:
    """Return a local path (or `file://` URL) as an absolute path, an `s3://` URL without a slash at its end.

    Workers have another working directory, so addresses are made absolute before they travel; each of several joined by `::` is.
    ConfigError for any other scheme.
    """
    text = os.fspath(url)
    if len(parts := split_urls(text)) > 1:
        return "::".join(absolute_url(part, what) for part in parts)
    if not text:
        raise ConfigError(f"{what} is empty: give a folder, for example ./out")
    if text.startswith("pipe:"):
        raise ConfigError(f"{what} {text!r} would run a command: only {readable(SCHEMES)} are read")
    require_text(text, what)
    refuse_typos(text, what, SCHEMES)
    return _scheme(text).absolute(text, what)


def is_remote(url: str) -> bool:
    """Return whether an absolute URL is in a bucket, which every machine reaches; a path may exist on one machine only."""
    return _scheme(url).is_remote


def resolve_url(base: str, url: str) -> str:
    """Return `url` if it is absolute, else resolved below the absolute URL `base` ("." is `base` itself)."""
    return url if "://" in url or url.startswith("/") else f"{base}/{url}".removesuffix("/.")


def recorded_url(url: str, what: str) -> str:
    """Return `absolute_url` of an address in a file of an artefact, `what` says which; DataError if no store opens it: nobody typed it."""
    try:
        return absolute_url(url, what)
    except ConfigError as error:
        raise DataError(f"{error}; the file was damaged, or not written by aecore: restore it, or do not use the artefact") from None


def open_store(url: str | os.PathLike[str]) -> Store:
    """Return the store of the artefact at `url`. No I/O: nothing is created before the first put."""
    where = absolute_url(url)
    return _scheme(where).store(where)


def open_files(url: str | os.PathLike[str]) -> Files:
    """Return read access to the external files below `url`."""
    where = absolute_url(url)
    return _scheme(where).files(where)


def _scheme(url: str) -> Scheme:
    name, separator, _ = url.partition("://")
    return SCHEMES.get(name if separator else "file", SCHEMES["file"])


def _path(text: str, what: str) -> str:
    parts = urlsplit(text)
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise ConfigError(f"{what} {text!r} names the host {parts.hostname!r}: write file:///path")
        text = unquote(parts.path)
    elif "://" in text:
        raise ConfigError(f"{what} has the scheme {parts.scheme!r}: {readable(SCHEMES)} are read and written")
    if "\0" in text:
        raise ConfigError(f"{what} {text!r} holds a zero byte (%00 in a URL), which no path does: leave it out")
    try:
        path = str(Path(text).expanduser().absolute())
        if "/../" in f"{path}/":
            plain = os.path.normpath(path)
            path = plain if os.path.realpath(plain) == os.path.realpath(path) else path  # a link before the dots leads elsewhere
        return path[1:] if path.startswith("//") else path  # pathlib keeps two slashes, as of what is below the folder /
    except RuntimeError:
        raise ConfigError(f"{what} {text!r}: that user has no home directory here: write the whole path, or ./~... for a folder") from None


def _s3_url(text: str, what: str) -> str:
    profile, bucket, prefix = _s3_parts(text, what)
    at = f"{profile}@" if profile else ""
    return f"s3://{at}{bucket}/{prefix}".rstrip("/")


def _s3_parts(text: str, what: str) -> tuple[str | None, str, str]:
    """Return profile, bucket and prefix of `s3://[profile@]bucket/prefix`; ConfigError that never repeats what could be a secret."""
    netloc, _, prefix = text.removeprefix("s3://").partition("/")
    profile, at, bucket = netloc.rpartition("@")
    if ":" in netloc and not at:  # a secret key may hold a slash, so that what follows it looks like a prefix
        profile, bucket = netloc, "bucket"
    if ":" in profile or (at and not profile):
        raise ConfigError(
            f"{what} has something other than the name of a profile before the @: write s3://profile@{bucket}/... with a profile of "
            "~/.aws/config; keys belong there or into AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, never into a URL"
        )
    if masked(text) != text:  # it would be written into claims, manifests and logs
        raise ConfigError(
            f"{what} is {text!r}, with a signature or a token: write s3://profile@{bucket}/... without it, with a profile of ~/.aws/config"
        )
    if not bucket:
        raise ConfigError(f"{what} {text!r} names no bucket: write s3://bucket/prefix")
    if any(part in (".", "..", "") for part in prefix.rstrip("/").split("/")) and prefix.rstrip("/"):
        raise ConfigError(
            f"{what} {text!r} has an empty part, a . or a .. below the bucket: leave it out (objects with // in their keys "
            "are read from the folder before it)"
        )
    return profile or None, bucket, prefix.rstrip("/")


def _s3_store(where: str) -> Store:
    from aecore.store._cached import CachedStore
    from aecore.store._s3 import S3Store

    profile, bucket, prefix = _s3_parts(where, "URL")
    return CachedStore(S3Store(where, bucket, prefix, profile))


def _s3_files(where: str) -> Files:
    from aecore.store._s3_files import S3Files

    profile, bucket, prefix = _s3_parts(where, "URL")
    return S3Files(where, bucket, prefix, profile)


SCHEMES = {  # a path is a URL of the first
    "file": Scheme(_path, lambda where: LocalStore(Path(where)), lambda where: LocalFiles(Path(where)), is_remote=False),
    "s3": Scheme(_s3_url, _s3_store, _s3_files),
}
