"""Files in an artefact's folders that no manifest names: a reader that takes all files of a pattern would read them as well.

What an attempt wrote that goes on, or was killed or overtaken, is only noted: that is no damage, and garbage collection knows when it goes.
"""

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from aecore.artifact.commit import newest_number
from aecore.artifact.documents import read_json
from aecore.errors import DataError
from aecore.store import FileRef, Store

logger = logging.getLogger(__name__)
SHOWN = 5
DEPTH = 4  # of folders: `data/split=train/` and what somebody put below it
_PART = re.compile(r"[A-Za-z0-9].*-\d{6,}(?:-[rg]\d{6,})?(?:-t\d{6})?")  # also of rows, of what is removed, written again

IsOfAttempt = Callable[[Mapping[str, Any], int, str], bool]  # any: plain JSON data


def unnamed_problems(
    store: Store, folders: Mapping[str, Sequence[str]], named: Iterable[FileRef], is_of_attempt: IsOfAttempt
) -> Iterator[str]:
    """Yield one problem for the files that no manifest names, and a remedy.

    Parameters
    ----------
    store : Store
        The folder of the artefact.
    folders : Mapping
        Folder -> suffixes of the files that readers take from it.
    named : iterable of FileRef
        What the newest manifest names: all that older ones do, too.
    is_of_attempt : callable
        `is_of_attempt(claim, number, stem)`: whether the part of this name was written under a claim that was not committed.
    """
    known = {ref.name for ref in named}
    found = [name for folder, suffixes in folders.items() for name in _files(store, folder, tuple(suffixes)) if name not in known]
    if not found:
        return
    claims = _claims(store)
    attempts = [
        name for name in found if (stem := _stem(name)) and any(is_of_attempt(claim, number, stem) for number, claim in claims.items())
    ]
    if attempts:
        text = "%s: %d files are of an attempt that was not committed (%s): a pattern over the folder reads them as well"
        logger.warning(text, store.url, len(attempts), _shown(attempts))
    if strays := [name for name in found if name not in set(attempts)]:
        yield (
            f"{store.url}: no manifest names {_shown(strays)}, and whoever reads all files of a pattern reads "
            f"{'it' if len(strays) == 1 else 'them'} as well: remove {'it' if len(strays) == 1 else 'them'}"
        )


def _files(store: Store, folder: str, suffixes: tuple[str, ...], depth: int = DEPTH) -> Iterator[str]:
    """Yield the files below a folder that a pattern matches; it does not match hidden ones."""
    for name in store.list(folder):
        if name.startswith("."):
            continue
        if name.endswith(suffixes):
            yield f"{folder}/{name}"
        elif "." not in name and depth > 1:
            yield from _files(store, f"{folder}/{name}", suffixes, depth - 1)


def _stem(name: str) -> str | None:
    """Return the part that a file belongs to by its name, None if no part has such a name."""
    stem = name.rpartition("/")[2].rpartition(".")[0]
    return stem if _PART.fullmatch(stem) else None


def _claims(store: Store) -> dict[int, Mapping[str, Any]]:  # any: plain JSON data
    """Return the claims that can be read."""
    found = dict[int, Mapping[str, Any]]()
    for number in range(1, (newest_number(store, "run") or 0) + 1):
        if store.size(name := f"run.{number:06d}.json") is not None:
            try:
                found[number] = read_json(store, name)
            except DataError as error:  # what it made is not known
                logger.warning("%s", error)
    return found


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
