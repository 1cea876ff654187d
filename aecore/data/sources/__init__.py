"""Sources of raw samples. One file per kind; each lists its samples cheaply and reads the bytes of one on demand.

A source never decodes, resizes or filters by content: everything listed is planned, and a sample that turns out to be damaged goes
to the quarantine. A read error is not a damaged sample: it ends the shard, and nothing is recorded. Adding a source is adding a file
here: a `@spec` with `kind`, and a build function registered in `SOURCES`.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from aecore.data.format.bad_sample import BadSample
from aecore.data.format.spill import is_large, spilled, take_rows
from aecore.errors import ConfigError, DataError, require_text
from aecore.native.texts import BATCH, Texts
from aecore.store import Seen, absolute_url, read_again, split_urls

T = TypeVar("T")
NAME_HELP = "name of the source in datasets, instead of its address: set it where the same samples may come from another address later"


@dataclass(frozen=True, slots=True)
class Listing:
    """All samples of a source, by column: n rows in the source's own, stable order; no sample bytes.

    Texts are given as lists or as `Texts`, which they become.

    Attributes
    ----------
    keys, sources : sequence of str
        n encoded keys (see `record.encode_key`), and the n names that `Source.read` takes.
    sizes : int64 array
        Bytes of each sample in the source.
    label_names : sequence of str, optional
        Class of each sample, "" where it has none; what is no text (bytes that are no UTF-8 as lone surrogates, NUL) makes its sample
        unusable. Where `splits` is given these are paths below the source's root, so they
        begin with the top folder (`train/Greek/character01`), and the plan decides whether that is a split or a part of the class.
        If `label_paths` is false they are plain names.
    label_rule : str
        What the plan makes of `label_names`: `leaf` the last folder, `regex:...` what the expression finds, else the names as they are.
    paths : sequence of str, optional
        What rules of labels and groups look at, with `/`, where `sources` are no paths.
    splits : sequence of str, optional
        Top folder of each sample ("" directly below the root) or the split in its file's name, for sources that have folders.
    groups : sequence of str, optional
        Bag of each sample: rows of one group stay adjacent, in one shard and one split.
    columns : mapping
        Further columns for the index (factors, metadata), n values each.
    notes : tuple of str
        Messages for the user (files that were skipped).
    unusable : list of BadSample or None, optional
        Why a sample cannot be used, None for each that can. Such samples are planned and go to the quarantine unread.
    states : sequence of str or None, optional
        State of the file of each sample before its bytes were read: a text that is compared for equality only. None: not known, or too
        young to be told from a later one; the next run reads such a sample again.
    origin : str
        The address that the samples come from, or the name that stands for it (`origin_of`).
    all_states : sequence of str or None, optional
        The states with those that are too young, for the hash of a claim: work that was begun goes on as long as they are equal.
    named_splits : bool
        Whether `splits` are the names of splits, which stay as they are, and not folders.
    classes : tuple of str
        The names of classes in their order, of a source that has one; a new dataset takes it.
    """

    keys: Sequence[str]
    sources: Sequence[str]
    sizes: NDArray[np.int64]
    label_names: Sequence[str] | None = None
    splits: Sequence[str] | None = None
    groups: Sequence[str] | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)  # any: arrays of numpy or Arrow, each of its own type
    notes: tuple[str, ...] = ()
    label_paths: bool = True
    label_rule: str = "path"
    paths: Sequence[str] | None = None
    unusable: list[BadSample | None] | None = None
    states: Sequence[str | None] | None = None
    origin: str = ""
    all_states: Sequence[str | None] | None = None
    named_splits: bool = False
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in (*_TEXTS, "states", "all_states"):
            if (values := getattr(self, name)) is not None:
                object.__setattr__(self, name, as_texts(values, f"the source lists {name}"))
        names = (*_TEXTS[1:], "sizes", "unusable", "states", "all_states")
        for name, column in [*((name, getattr(self, name)) for name in names), *self.columns.items()]:
            if column is not None and len(column) != len(self.keys):
                raise DataError(f"the source lists {len(self.keys)} keys and {len(column)} values of {name}: each column has one a sample")

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, rows: NDArray[np.int64]) -> "Listing":
        """Return these rows, in this order."""
        if len(rows) == len(self) and (np.diff(rows) == 1).all():
            return self
        names = (*_TEXTS, "unusable", "states", "all_states")
        large = self._plain(names) if is_large(len(self)) else {}
        taken: dict[str, Any] = {name: take(getattr(self, name), rows) for name in names if name not in large}  # any: as `take`
        if large:  # in one pass over all of them
            table = take_rows(pa.table(large), rows)
            taken |= {name: Texts(table[name]) for name in large}
        columns = {name: column.take(rows) for name, column in self.columns.items()}
        return dataclasses.replace(self, sizes=self.sizes[rows], columns=columns, **taken)

    def slice(self, start: int, stop: int) -> "Listing":
        """Return the rows [start, stop), of which nothing is copied."""
        names = (*_TEXTS, "unusable", "states", "all_states", "sizes")
        cut: dict[str, Any] = {name: None if (column := getattr(self, name)) is None else column[start:stop] for name in names}
        return dataclasses.replace(self, columns={name: column[start:stop] for name, column in self.columns.items()}, **cut)

    def spilled(self) -> "Listing":
        """Return the listing with its texts in a scratch file, if it is large."""
        plain = self._plain((*_TEXTS, "states", "all_states")) if is_large(len(self)) else {}
        if not plain:
            return self
        table = pa.table(plain)
        mapped = spilled([table], table.schema)
        given: dict[str, Any] = {name: Texts(mapped[name]) for name in plain}  # any: as `take`
        return dataclasses.replace(self, **given)

    def _plain(self, names: Sequence[str]) -> dict[str, Any]:  # any: columns of Arrow
        """Return the columns whose texts are there one by one."""
        found = {name: getattr(self, name) for name in names}
        return {name: texts.arrow for name, texts in found.items() if isinstance(texts, Texts) and not texts.is_coded}

    def with_states(self, seen: Sequence[Seen | None]) -> "Listing":
        """Return the listing with what was seen of the file of each sample (None: nothing)."""
        states = Texts.of([None if found is None else found.state for found in seen])
        young = [row for row, found in enumerate(seen) if found is not None and found.young]
        return self.with_young(states, young)

    def with_young(self, states: Texts, young: Sequence[int] | NDArray[np.int64]) -> "Listing":
        """Return the listing with these states, of which those of the rows `young` are too young."""
        return dataclasses.replace(self, states=states.without(young), all_states=states if len(young) else None)

    def without_states(self) -> "Listing":
        """Return what versions before states listed."""
        return dataclasses.replace(self, states=None, all_states=None, origin="")

    def sha256(self) -> str:
        """Return the hash of everything that the plan depends on: all columns, in order."""
        digest = hashlib.sha256(f"{len(self)} rows".encode())
        for name in _TEXTS[:-1]:
            _add_texts(digest, name, getattr(self, name))  # file names may hold lone surrogates, and no NUL
        numbers = {"sizes": self.sizes, **{f"columns.{name}": self.columns[name] for name in sorted(self.columns)}}
        for name, column in numbers.items():
            digest.update(f"[{json.dumps(name)}, [".encode())
            for start in range(0, len(column), BATCH):
                digest.update((", " * (start > 0) + json.dumps(column[start : start + BATCH].tolist())[1:-1]).encode())
            digest.update(b"]]")
        if self.unusable is not None:
            digest.update(json.dumps(["unusable", [why and why.args for why in self.unusable]]).encode())
        states = self.states if self.all_states is None else self.all_states
        if isinstance(states, Texts) and states.num_bytes():
            _add_texts(digest, "states", states)
        if self.origin:
            digest.update(f"\norigin {self.origin}".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


_TEXTS = ("keys", "sources", "label_names", "splits", "groups", "paths")  # columns; of the last one nothing is hashed


def as_texts(values: Sequence[str | None], what: str) -> Texts:
    """Return a column of texts; DataError, which begins with `what`, if one of them is no text, as when a source gives class numbers."""
    try:
        return Texts.of(values)
    except TypeError as error:
        wrong = error.args[0]
        raise DataError(f"{what} with {wrong!r} ({type(wrong).__name__}), expected text: use str(value)") from error


def _add_texts(digest: Any, name: str, values: Texts | None) -> None:  # any: hashlib's object has no public type
    """Hash texts with NUL between them, and before that how many bytes these are."""
    if values is None:
        return
    digest.update(f"\n{name} {values.num_bytes() + max(0, len(values) - 1)}\n".encode())
    before = memoryview(b"")
    for column in values.terminated():
        digest.update(before)
        whole = column.data.data[column.begins[0] : column.ends[-1] + 1]
        digest.update(whole[:-1])
        before = whole[-1:]


def take(values: Sequence[T] | None, rows: NDArray[np.int64]) -> Any:  # any: None stays None, texts stay texts, a list a list
    """Return `values` at `rows`; None if there are no values."""
    return values.take(rows) if isinstance(values, Texts) else None if values is None else [values[row] for row in rows.tolist()]


class Source(Protocol):
    """The interface of what the registry `SOURCES` builds from a spec; made in every worker, so it opens files lazily."""

    def listing(self) -> Listing:
        """List all samples. DataError if the source is missing, unreadable or empty."""

    def read(self, source: str) -> tuple[str, bytes]:
        """Return extension (lower case, no dot) and all bytes of one listed sample.

        Raises OSError or StoreError if it cannot be read, BadSample if what was read is no sample.
        """


def file_root(source: Source) -> Path | None:
    """Return the folder that sample names are file paths in, each file one sample; None if the source has no such files."""
    root: Callable[[], Path | None] | None = getattr(source, "file_root", None)
    return None if root is None else root()


def require_name(name: str) -> None:
    """ConfigError unless a `source.name` is one line of text, or empty."""
    require_text(name, "source.name")
    if name != name.strip() or not name.isprintable():
        raise ConfigError(f"source.name is {name!r}, expected one line of text without spaces around it, for example cameras-2026")


def origin_of(source: Any) -> str:  # any: every source kind has its own spec class
    """Return what the samples of a spec come from: its `name`, else its `url`, absolute and without a profile; "" if it has neither."""
    if name := getattr(source, "name", ""):
        return str(name)
    url = getattr(source, "url", "")
    return origin_of_url(absolute_url(url, "source.url")) if url else ""


def origin_of_url(url: str) -> str:
    """Return what samples from an absolute address (or several) come from."""
    return "::".join(map(_without_userinfo, split_urls(url)))


def _without_userinfo(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    place, slash, path = rest.partition("/")
    return f"{scheme}://{place.rpartition('@')[2]}{slash}{path}" if separator else url


def read_states(source: Source, names: Sequence[str]) -> Sequence[str | None]:
    """Return the states of the files of these samples, which were read last, as they were after that; None where one is not known."""
    states: Callable[[Sequence[str]], Sequence[str | None]] | None = getattr(source, "read_states", None)
    try:
        return [None] * len(names) if states is None else states(names)
    except OSError:  # the bytes were read, and nothing says more of the file now
        return [None] * len(names)


def generations(source: Source) -> Mapping[str, int]:
    """Return the datasets that a source has listed, if it reads any, and the generation of each."""
    found: Mapping[str, int] = getattr(source, "generations", {})
    return found


def takes_frames(source: Any) -> bool:  # any: every source kind has its own spec class
    """Return whether the spec of a source takes all pages and frames of a file, each as a sample."""
    return getattr(source, "frames", "first") == "all"


def bound_pixels(source: Source, most: int) -> None:
    """Have a source that decodes (frames of files) decode no image of more pixels."""
    bound: Callable[[int], None] | None = getattr(source, "bound_pixels", None)
    if bound is not None:
        bound(most)


def reader(source: Source, names: Sequence[str]) -> Callable[[str], tuple[str, bytes]]:
    """Return a function that reads these samples in this order: `source.prefetch(names)` if the source has it, else `source.read`.

    A read error is retried and then raised as StoreError: it is not a property of the sample. DataError if it returns no sample.
    """
    prefetch: Callable[[Sequence[str]], Callable[[str], tuple[str, bytes]]] | None = getattr(source, "prefetch", None)
    first = source.read if prefetch is None else prefetch(names)

    def read(name: str) -> tuple[str, bytes]:
        try:
            found = first(name)
        except OSError as error:
            found = read_again(lambda: source.read(name), name, error)
        _require_sample(found, source, name)
        return found

    return read


def _require_sample(found: Any, source: Source, name: str) -> None:  # any: sources may be written by users
    """Raise DataError, which says what `Source.read` returns, if it returned something else."""
    if not isinstance(found, tuple) or len(found) != 2:
        what = "bytes without their extension" if isinstance(found, bytes) else f"a value of type {type(found).__name__}"
    elif not isinstance(found[1], bytes):
        what = f"the data as {type(found[1]).__name__} (bytes are those of an encoded file, for example `file.getvalue()`)"
    elif not isinstance(found[0], str) or found[0][:1] == "." or found[0] != found[0].lower():
        what = f"the extension {found[0]!r}"
    else:
        return
    raise DataError(
        f"{type(source).__name__}.read({name!r}) returned {what}, expected the extension, lower case and without a dot, and the bytes of "
        "one sample: return ('png', data)"
    )
