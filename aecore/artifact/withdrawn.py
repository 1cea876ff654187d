"""Withdrawn generations of a dataset: `withdrawn.NNNNNN.json` says that nothing may be read or made of generation N any more.

That the file exists says so, whatever it holds. Nothing here writes it: whoever does puts it first, and looks afterwards for what was made
of the generation. Who makes something looks before and after the commit, so of the two at least one sees the other.
"""

import contextlib
from collections.abc import Collection, Iterator

from aecore.errors import DataError
from aecore.store import Store, open_store


def withdrawn_name(number: int) -> str:
    """Return the name of the file that withdraws a generation."""
    return f"withdrawn.{number:06d}.json"


def is_withdrawn(store: Store, number: int, names: Collection[str] | None = None) -> bool:
    """Return whether a generation was withdrawn; `names` is a listing of the dataset, if one was just made."""
    name = withdrawn_name(number)
    return name in names if names is not None else store.size(name) is not None


READ_ANOTHER = "use a generation that was not, and make what was made of this one again"


def require_not_withdrawn(store: Store, number: int, names: Collection[str] | None = None, remedy: str = READ_ANOTHER) -> None:
    """DataError, which ends in the next action, if a generation was withdrawn; see `is_withdrawn`."""
    if is_withdrawn(store, number, names):
        raise DataError(
            f"generation {number} of {store.url} was withdrawn ({withdrawn_name(number)} is there): nothing may be read or made of it any "
            f"more; {remedy}"
        )


@contextlib.contextmanager
def made_of(url: str, number: int, what: str) -> Iterator[None]:
    """Look right before and after the body, which commits `what`, whether the generation that it was made of was withdrawn.

    `number` 0 is data without generations. DataError before it: nothing is committed; after it: the message names what has to go.
    """
    if not number:
        yield
        return
    store = open_store(url)
    require_not_withdrawn(store, number)
    yield
    if is_withdrawn(store, number):
        raise DataError(
            f"generation {number} of {store.url} was withdrawn ({withdrawn_name(number)} is there) while {what} was committed, which was "
            f"made of it: remove {what}, and make it again of a generation that was not withdrawn"
        )
