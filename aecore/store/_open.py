"""From a URL to the store that holds it."""

import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

from aecore.errors import ConfigError
from aecore.store._base import Files, Store
from aecore.store._local import LocalFiles, LocalStore


def absolute_url(url: str | os.PathLike[str], what: str = "URL") -> str:
    """Return a local path (or `file://` URL) as an absolute path; ConfigError for any scheme but file.

    Workers have another working directory, so addresses are made absolute before they travel.
    """
    text = os.fspath(url)
    if not text:
        raise ConfigError(f"{what} is empty: give a folder, for example ./out")
    if text.startswith("pipe:"):
        raise ConfigError(f"{what} {text!r} would run a command: only paths and file:// URLs are read")
    parts = urlsplit(text)
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise ConfigError(f"{what} {text!r} names the host {parts.netloc!r}: write file:///path")
        text = unquote(parts.path)
    elif "://" in text:
        raise ConfigError(f"{what} {text!r} has the scheme {parts.scheme!r}: this version reads and writes paths and file:// URLs")
    return str(Path(text).expanduser().absolute())


def open_store(url: str | os.PathLike[str]) -> Store:
    """Return the store of the artefact at `url` (nothing is created before the first put)."""
    return LocalStore(Path(absolute_url(url)))


def open_files(url: str | os.PathLike[str]) -> Files:
    """Return the files below `url`, to read."""
    return LocalFiles(Path(absolute_url(url)))
