"""Arrays whose rows are samples: `.npy`, `.npz` (with labels and `factor_*`), and idx files as MNIST ships them, also gzip'ed.

Which labels are those of an array is said by names alone (`_names.partner`): among the arrays of an `.npz`, among the other files of a
folder, and for a single file by the one of its name with labels in the place of images; `source.labels` names others. Labels that belong
to no array by name, or with others to the same one, are not taken: a line of the log names them. Labels that are taken have a row for each
of the samples, or the source is refused.

uint8 arrays `[N, H, W]` and `[N, H, W, 1 | 3 | 4]` are images, and are stored as PNG (stored, not deflated: about the bytes of a `.npy`
member, the same on every machine): so `shards.resize` and `shards.mode` work, networks get `[C, H, W]`, and any reader of
WebDataset sees pictures. The pixels are those of the array. Everything else, and everything with `source.store_as=npy`, keeps its values
in `.npy` members of the row's shape. Files are mapped, not loaded: a worker reads only the rows of its shard.
"""

import dataclasses
import errno
import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from aecore.data.format.record import encode_keys
from aecore.data.sources import NAME_HELP, Listing, require_name
from aecore.data.sources._arrayfile import Array, ArrayFile
from aecore.data.sources._arrayvalues import (
    class_names,
    native,
    require_characters,
    require_lengths,
    require_rows,
    require_samples,
    row_writer,
)
from aecore.data.sources._filter import PathFilter, globs, with_limit
from aecore.data.sources._labels import is_expression, require_rule
from aecore.data.sources._names import (
    array_format,
    begins_keys,
    is_data,
    is_labels,
    partner,
    split_of,
    split_words,
    stem_of,
    without_split,
)
from aecore.data.sources._other_files import is_of_system, skip_file
from aecore.data.sources._skipped import Skipped, first_of
from aecore.errors import DataError, counted, did_you_mean
from aecore.native.texts import Texts, joined, numbered
from aecore.registry import SOURCES, knob, spec
from aecore.store import Seen, absolute_url, open_files, read_again

_ENDS_FILE = re.compile(r"(?<=\.npz)/")
FACTOR = "factor_"
MAX_EXACT = 1 << 53  # whole numbers up to here are exact in float64
MOST_LOOKED_AT = 10_000  # names for an error
_CHOOSE_LABELS = "source.labels takes one of them"
_NAME_ALIKE = "name each like its array (cats.npy and cats_labels.npy, x_test.npy and y_test.npy), or say which with source.labels"
_NO_LABEL = (
    "no sample has a label, since no array of labels belongs to the samples by its name (labels or y for the only array, x_test and "
    "y_test, cats and cats_labels): set source.labels to one, or to regex:<expression>"
)
_OF_NPZ = ("lengths", "images", "factors", "group")  # options that name arrays of an .npz
_CHOOSE = "source.images takes one as samples, source.labels as labels, source.factors as columns"


@spec
class ArraysSpec:
    """Rows of arrays in .npy, .npz or idx files; labels come from the array or file with a matching name (y, labels, ...)."""

    kind: Literal["arrays"] = "arrays"
    url: str = knob("", "file, or folder of files", identity=False)
    images: str = knob("", "array of an .npz that holds the samples; empty: images, x, data, ... or the only one")
    labels: str = knob(
        "",
        "array of an .npz, or file beside a .npy or idx file (its name, or its path below the source), that holds the labels; "
        "regex:<expression> over the keys (cat/000000001 of cat.npy); empty: labels, y, ... if there is one",
    )
    factors: tuple[str, ...] = knob((), "arrays of an .npz that become columns, in addition to those named factor_*")
    lengths: str = knob("", "array of an .npz with the number of valid steps of each row; the rest is not stored")
    group: str | None = knob(
        None,
        "array of an .npz with the bag of each sample, or regex:<expression> over the keys: bags stay whole, see model.kind=mil_vae",
    )
    classes: tuple[str | int, ...] | str = knob((), "names of all classes in their order, or a file with one name a line", since=2)
    include: tuple[str, ...] | str = knob((), "globs of the files or folders to take (files of labels stay); none: all", since=2)
    exclude: tuple[str, ...] | str = knob((), "globs of the files or folders to leave out, such as 'old' or '*_test.npy'", since=2)
    min_size: int = knob(0, "bytes that a file has at least: smaller ones are left out", ge=0, since=2)
    limit: int | None = knob(None, "samples at most, chosen by a hash of their keys: spread over all arrays", ge=1, since=2)
    name: str = knob("", NAME_HELP, identity=False, since=2)
    store_as: Literal["auto", "png", "npy"] = knob("auto", "png: as images; npy: as arrays of the same values; auto: uint8 images as png")
    max_inflated_bytes: int = knob(
        0, "bytes that one compressed array may inflate to; 0: 1 GiB, or 128 times its file's", ge=0, identity=False
    )

    def __post_init__(self) -> None:
        for option, rule in (("source.labels", self.labels), ("source.group", self.group)):
            if is_expression(rule):
                require_rule(option, rule, ())
        require_name(self.name)
        object.__setattr__(self, "include", globs("source.include", self.include))
        object.__setattr__(self, "exclude", globs("source.exclude", self.exclude))

    @property
    def label(self) -> str:
        """The rule of the labels: an expression, or auto."""
        return self.labels if is_expression(self.labels) else "auto"


def _array(name: str | None) -> str:
    """Return the name of an array that an option gives; "" if it gives none, or an expression."""
    return "" if name is None or is_expression(name) else name


@dataclass(frozen=True, slots=True)
class _Block:
    """One array of N samples: its name in sources, the prefix of its keys, its split, labels and bags (N names), factor columns."""

    head: str
    stem: str
    array: Array
    split: str = ""
    labels: Texts | None = None
    factors: Mapping[str, Array] = field(default_factory=dict)
    lengths: Array | None = None
    groups: list[str] | None = None
    label_file: str = ""  # that holds the labels
    seen: Seen | None = None  # of its file, before it was read


@SOURCES.register(ArraysSpec)
class ArraysSource:
    """The rows of all arrays at the `url` of an `ArraysSpec`; sources are `<file>#<row>`, of an .npz `<file>/<array>#<row>`."""

    def __init__(self, arrays: ArraysSpec) -> None:
        self._spec = arrays
        self._filter = PathFilter(arrays.include, arrays.exclude, arrays.min_size)
        url = absolute_url(arrays.url, "source.url")
        self._file = url.rpartition("/")[2] if array_format(url) else ""
        self._files = open_files(url.rpartition("/")[0] or "/" if self._file else url)
        self._rows: dict[str, Callable[[int], tuple[str, bytes]]] = {}
        self._found = dict[str, Callable[[], os.stat_result]]()  # by head: what is known of its file after rows were read
        self._labels: list[str] = []  # the files that `source.labels` names

    def listing(self) -> Listing:
        """List every row of every array, file by file.

        Raises
        ------
        DataError
            If there is no such file, one is damaged, lengths differ, or it is ambiguous which array holds the samples.
        StoreError
            If one cannot be read.
        """
        return read_again(self._listing, self._files.url)

    def _listing(self) -> Listing:
        skipped = Skipped()
        names, notes = self._names(skipped)
        blocks = list[_Block]()
        for name in names:
            seen = self._files.seen(name)
            blocks += [dataclasses.replace(block, seen=seen) for block in self._blocks(name, names, skipped)]
        if not blocks:
            raise DataError(f"{self._files.url} holds labels and no samples ({first_of(names)}): add the file of the images")
        taken = {block.label_file for block in blocks}
        for name in filter(self._holds_labels, names):
            if name not in taken and not self._filter.excludes(name):
                if _array(self._spec.labels):
                    skipped.add("file(s) of labels that source.labels does not name", name)
                else:
                    skipped.add("file(s) of labels that fit no array, or several", name, _NAME_ALIKE)
        if not _any(blocks, "labels") and self._spec.label == "auto":
            notes = (*notes, _NO_LABEL)
        if _any(blocks, "labels"):
            for block in blocks:
                if block.labels is None:
                    skipped.add(
                        "array(s) without labels, as others have", block.head, "name labels like it to label its samples", kept=True
                    )
        counts = [len(block.array) for block in blocks]
        sizes = [self._sizes(block) for block in blocks]
        paths = joined([numbered(f"{block.stem}/", count, width=9) for block, count in zip(blocks, counts, strict=True)])
        of_rows = f"{counted(sum(counts), 'row', 'rows')} of {counted(len(blocks), 'array', 'arrays')}"

        def repeated(values: Sequence[str | None]) -> Texts:  # of each block, for each of its rows
            return Texts.coded(values, np.repeat(np.arange(len(blocks), dtype=np.int32), counts))

        listing = Listing(
            encode_keys(paths),
            joined([numbered(f"{block.head}#", count) for block, count in zip(blocks, counts, strict=True)]),
            np.concatenate(sizes),
            label_names=joined([_labels(block) for block in blocks]) if _any(blocks, "labels") else None,
            splits=repeated([block.split for block in blocks]) if _any(blocks, "split") else None,
            groups=_groups(blocks),
            columns=_columns(blocks),
            notes=(
                f"one sample per row: {of_rows} (source.kind=folder takes each file as one)",
                *skipped.lines(),
                *notes,
            ),
            label_paths=False,
            paths=paths,
        )
        states = repeated([None if block.seen is None else block.seen.state for block in blocks])
        starts = np.cumsum([0, *counts])
        are_young = [block.seen is not None and block.seen.young for block in blocks]
        young = [np.arange(starts[at], starts[at + 1]) for at, is_young in enumerate(are_young) if is_young]
        listing = listing.with_young(states, np.concatenate([np.zeros(0, np.int64), *young]))
        return with_limit(listing, self._spec.limit, self._spec.group, paths)

    def read(self, source: str) -> tuple[str, bytes]:
        """Return extension and bytes of one row; OSError if its file cannot be read or has fewer rows by now (the next read reopens it)."""
        head, _, row = source.rpartition("#")
        try:
            return (self._rows.get(head) or self._open(head))(int(row))
        except OSError:
            self._rows.pop(head, None)
            raise
        except IndexError:
            self._rows.pop(head, None)
            gone = f"it has no row {row} any more: it was written again after it was listed, so run the same command again"
            raise OSError(errno.EIO, gone, head) from None

    def read_states(self, sources: Sequence[str]) -> list[str | None]:
        """Return the states of the files of these rows, which were read, as they are now (of compressed ones, when they were inflated)."""
        heads = [source.rpartition("#")[0] for source in sources]
        known = {head: self._state(head) for head in set(heads)}
        return [known[head] for head in heads]

    def _state(self, head: str) -> str | None:
        found = self._found.get(head)
        return None if found is None else self._files.state(self._file_and_array(head)[0], found())

    def _open(self, head: str) -> Callable[[int], tuple[str, bytes]]:
        name, array = self._file_and_array(head)
        file = self._array_file(name)
        lengths = self._lengths(file, array, name) if array else None
        rows, self._found[head] = file.rows(array)
        self._rows[head] = found = row_writer(rows, self._spec.store_as, head, lengths)
        return found

    def _file_and_array(self, head: str) -> tuple[str, str]:
        """Return the file and the array in it ("" in a file of one): folders and arrays may have names that end in .npz too."""
        found = [(head[: slash.start()], head[slash.end() :]) for slash in _ENDS_FILE.finditer(head)]
        if array_format(head) is not None:
            found.append((head, ""))
        return next((place for place in found if self._is_file(place[0])), found[0]) if len(found) > 1 else found[0]

    def _is_file(self, name: str) -> bool:
        try:
            return self._files.local(name).is_file()
        except (FileNotFoundError, NotADirectoryError):
            return False

    def _sizes(self, block: _Block) -> NDArray[np.int64]:
        """Return the bytes of every row as it is stored."""
        write = row_writer(block.array, self._spec.store_as, block.head, block.lengths)
        if block.lengths is None:
            return np.full(len(block.array), len(write(0)[1]), np.int64)
        return np.array([len(write(row)[1]) for row in range(len(block.array))], np.int64)

    def _lengths(self, file: ArrayFile, data: str, where: str) -> Array | None:
        """Return the steps of each row of the array `data` of an .npz; None if `source.lengths` names none."""
        if not self._spec.lengths:
            return None
        name, samples = self._chosen(file.names(), self._spec.lengths, data, where, "source.lengths"), file.array(data)
        return require_lengths(file.array(name, verify=True), samples, f"{where} (array {name!r})", data)

    def _array_file(self, name: str) -> ArrayFile:
        return ArrayFile(self._files.local(name), name, self._spec.max_inflated_bytes, "source.max_inflated_bytes")

    def _names(self, skipped: Skipped) -> tuple[list[str], tuple[str, ...]]:
        """Return the names of the files to read, sorted, and notes; of a single file also that of its labels."""
        if self._file:
            names = self._with_labels(self._file)
            self._labels = self._named_labels(names)
            if self._filter.is_set:
                size = self._files.local(self._file).stat().st_size
                self._see_labels(names[1:], names[:1], skipped)
                self._require([self._file] if self._filter.takes(self._file, size, skipped) else [], skipped)
            return names, tuple(self._filter.unused())
        sizes = self._files.sizes()
        names = [name for name in sizes if array_format(name) and not is_of_system(name)]
        for name in sorted(sizes.keys() - {*names}):
            skip_file(skipped, name, pictures="source.kind=folder takes them")
        self._labels = self._named_labels(names)
        labels, data = ([name for name in names if self._holds_labels(name) == wanted] for wanted in (True, False))
        taken = [name for name in data if self._filter.takes(name, sizes[name], skipped)] if self._filter.is_set else data
        self._see_labels(labels, taken, skipped)
        if data or not labels:
            self._require(taken, skipped)
        names = labels + taken
        twins = [name for name in names if name.endswith(".gz") and name[:-3] in sizes]
        notes = self._filter.unused()
        notes += [f"skipped {counted(len(twins), '.gz file', '.gz files')} whose uncompressed copies exist"] if twins else []
        return sorted(set(names) - set(twins)), tuple(notes)

    def _require(self, names: list[str], skipped: Skipped) -> None:
        """Raise DataError, which says what was left out, if there is no file."""
        if not names:
            found = "".join(f"\n  {note}" for note in (*skipped.lines(), *self._filter.unused()))
            advice = f" that is taken as samples:{found}" if found else ": check the address"
            raise DataError(f"{self._files.url} holds no .npy, .npz or idx file (train-images-idx3-ubyte){advice}")

    def _see_labels(self, labels: list[str], data: list[str], skipped: Skipped) -> None:
        """Show the filter the files of labels, which it leaves in; those in a folder of data that `exclude` matches are counted."""
        folders = set(map(_folder, data))
        for name in labels:
            if self._filter.excludes(name) and _folder(name) in folders:
                what = "file(s) of labels that source.exclude matches, which stay with their arrays"
                skipped.add(what, name, "move them away to leave the labels out", kept=True)

    def _with_labels(self, name: str) -> list[str]:
        try:
            self._files.local(name).stat()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DataError(f"source.url {self._files.url}/{name} cannot be read: {error.strerror or error}; check the address") from error
        asked, found = _array(self._spec.labels), [name]
        for other in _label_files(name) if not asked else () if array_format(name) == "npz" else _files_called(asked):
            try:
                self._files.local(other).stat()
            except (FileNotFoundError, NotADirectoryError):
                continue
            found.append(other)
            break
        return found

    def _blocks(self, name: str, names: list[str], skipped: Skipped) -> Iterator[_Block]:
        file = self._array_file(name)
        stem = stem_of(name)
        if array_format(name) == "npz":
            yield from self._npz_blocks(file, name, stem, skipped)
        elif not self._holds_labels(name):
            for option in _OF_NPZ:
                if asked := getattr(self._spec, option) if option != "group" else _array(self._spec.group):
                    shown = asked if isinstance(asked, str) else ",".join(asked)
                    raise DataError(f"source.{option}={shown} names an array of an .npz, {name} is none: save both with np.savez")
            array = require_samples(file.array(""), name)
            of_labels = self._labels_of(name, names)
            labels = None if of_labels is None else self._label_names(of_labels, "", array, name)
            yield _Block(name, stem, array, split_of(stem), labels, label_file=of_labels or "")

    def _holds_labels(self, name: str) -> bool:
        return _is_label_file(name) or name in self._labels

    def _named_labels(self, names: list[str]) -> list[str]:
        """Return those of the files that `source.labels` names: by a path below the source, or by a name, with or without its ending."""
        asked, files = _array(self._spec.labels).removeprefix("./"), [name for name in names if array_format(name) != "npz"]
        if "/" in asked:
            return [name for name in files if asked in (name, stem_of(name))]
        wanted = without_split(stem_of(asked) if array_format(asked) else asked)
        return [name for name in files if without_split(_last(stem_of(name))) == wanted] if asked else []

    def _labels_of(self, name: str, names: list[str]) -> str | None:
        """Return the file of labels of a file that is one array; None if there is none, and `source.labels` asks for none."""
        data = [other for other in names if array_format(other) != "npz" and not self._holds_labels(other)]
        near, mine = [other for other in data if _folder(other) == _folder(name)], _last(stem_of(name))
        if asked := _array(self._spec.labels):
            beside = [other for other in self._labels if _folder(other) == _folder(name)]
            labels, arrays = (beside, near) if beside else (self._labels, data)
            alike = [other for other in arrays if split_words(_last(stem_of(other))) == split_words(mine)]
            found = labels if len(arrays) == 1 else [other for other in labels if split_words(_last(stem_of(other))) == split_words(mine)]
            if len(found) == len(alike) == 1:
                return found[0]
            known = [other if array_format(asked) else stem_of(other) for other in self._known() if other not in data]
            names_what = f"several files ({first_of(found)})" if len(found) > 1 else "one file" if found else "no file"
            for_what = f"several arrays ({first_of(alike)})" if len(alike) > 1 else name
            remedy = "give one, with a row for each sample; of several arrays each needs its own (x_train, classes_train, x_test, ...)"
            raise DataError(f"source.labels={asked} names {names_what} for {for_what}{did_you_mean(asked, known)}: {remedy}")
        labels = [other for other in names if _folder(other) == _folder(name) and _is_label_file(other)]
        stems = [_last(stem_of(other)) for other in labels]  # two files may have one stem
        found_stem = partner(mine, near, stems)
        return None if found_stem is None else labels[stems.index(found_stem)]

    def _known(self) -> list[str]:
        """Return the files of arrays at the source, or next to it if it is a file."""
        return [name for name in itertools.islice(self._files.names(), MOST_LOOKED_AT) if array_format(name) not in (None, "npz")]

    def _npz_blocks(self, file: ArrayFile, name: str, stem: str, skipped: Skipped) -> Iterator[_Block]:
        known, asked = file.names(), _array(self._spec.labels)
        samples = self._data_names(known, name)
        used = set(samples)
        for data in samples:
            split = split_of(data) or split_of(stem)
            array = require_samples(file.array(data, verify=True), f"{name} (array {data!r})")
            label = self._chosen(known, asked, data, name) if asked else partner(data, samples, filter(is_labels, known))
            labels = None if label is None else self._label_names(name, label, array, data)
            prefix = f"{stem}/{data}" if begins_keys(data, samples) else stem
            factors = self._factor_names(known, data, name)
            columns = self._factor_columns(file, factors, data, len(array), name)
            lengths, bags = self._lengths(file, data, name), self._bags(known, name, data, array, prefix)
            others = [self._chosen(known, other, data, name) for other in (self._spec.lengths, _array(self._spec.group)) if other]
            used |= {*factors, *others, *([] if label is None else [label])}
            yield _Block(f"{name}/{data}", prefix, array, split, labels, columns, lengths, bags)
        for other in (other for other in known if other not in used):
            if is_labels(other):
                skipped.add("array(s) of labels that fit no samples by name, or are not the only ones", f"{name}/{other}", _CHOOSE_LABELS)
            else:
                skipped.add("array(s) that nothing takes", f"{name}/{other}", _CHOOSE)

    def _bags(self, known: list[str], name: str, data: str, array: Array, prefix: str) -> list[str] | None:
        """Return the bag of each sample, with the prefix of its keys: bag 3 of another file or split is another bag."""
        asked = _array(self._spec.group)
        if not asked:
            return None
        bags = self._label_names(name, self._chosen(known, asked, data, name, "source.group"), array, data)
        return [f"{prefix}/{_bag(bag, name)}" for bag in bags]

    def _data_names(self, known: list[str], where: str) -> list[str]:
        """Return the arrays of an .npz that hold samples: one, or one for each split."""
        asked = self._spec.images
        other = {without_split(name) for name in self._arrays_of_other_use()}
        extra = {name for name in known if name.startswith(FACTOR) or is_labels(name) or without_split(name) in other}
        if asked:
            found = [name for name in known if without_split(name) == without_split(asked)]
        else:
            rest = [name for name in known if name not in extra]
            found = rest if len(rest) == 1 else [name for name in rest if is_data(name)]
        if not found:
            what = f"no array {asked!r}{did_you_mean(asked, known)}" if asked else f"the arrays {first_of(known)}, none named images"
            raise DataError(f"{where} has {what}: choose the one that holds the samples with source.images")
        if len({split_words(name) for name in found}) < len(found):
            raise DataError(f"{where} has several arrays that may hold the samples ({first_of(found)}): choose one with source.images")
        return found

    def _arrays_of_other_use(self) -> tuple[str, ...]:
        """Return the arrays that the spec names as something other than samples."""
        spec = self._spec
        return tuple(name for name in (_array(spec.labels), spec.lengths, _array(spec.group), *spec.factors) if name)

    def _chosen(self, known: list[str], asked: str, data: str, where: str, key: str = "source.labels or source.factors") -> str:
        """Return the array called `asked`, in the split of the array `data` if there is one for each."""
        found = [name for name in known if without_split(name) == without_split(asked)]
        same = [name for name in found if split_words(name) == split_words(data)]
        same = same or [name for name in found if split_of(name) == split_of(data)]
        if asked in known and not same:
            if len(self._data_names(known, where)) == 1:
                return asked
            raise DataError(
                f"{where} has one array {asked!r} for several arrays of samples, of which each row belongs to one: save one for each "
                f"(x_train, y_train, x_test, y_test), or choose the samples with source.images; {key} is {asked!r}"
            )
        if not same:
            raise DataError(f"{where} has no array {asked!r}{did_you_mean(asked, known)}: set {key} to one of these")
        return same[0]

    def _label_names(self, name: str, array: str, samples: Array, of: str) -> Texts:
        where = f"{name} (array {array!r})" if array else name
        return class_names(require_rows(self._array_file(name).array(array, verify=True), len(samples), where, of), where)

    def _factor_names(self, known: list[str], data: str, where: str) -> list[str]:
        """Return the factor arrays of one array of samples."""
        split = split_of(data)
        asked = [self._chosen(known, name, data, where) for name in self._spec.factors]
        return [*asked, *(name for name in known if name.startswith(FACTOR) and split_of(name) in ("", split) and name not in asked)]

    def _factor_columns(self, file: ArrayFile, names: list[str], data: str, count: int, where: str) -> dict[str, Array]:
        """Return the columns of these factor arrays of one array of samples: `[N, k]` becomes k columns."""
        split = split_of(data)
        found: dict[str, Array] = {}
        for name in names:
            values = require_rows(file.array(name, verify=True), count, f"{where} (array {name!r})", data)
            require_characters(values, f"{where} (array {name!r})")
            title = FACTOR + name.removeprefix(FACTOR).removesuffix(f"_{split}")
            if values.ndim == 1:
                new = {title: native(values)}
            elif values.ndim == 2:
                new = {f"{title}_{column}": native(values[:, column]) for column in range(values.shape[1])}
            else:
                raise DataError(f"{where} (array {name!r}) has shape {values.shape}: factors are numbers or rows of numbers")
            if twice := sorted(new.keys() & found.keys()):
                raise DataError(f"{where} (array {name!r}) gives the column {twice[0]!r}, as another array does: rename one of them")
            found |= new
        return found


def _labels(block: _Block) -> Texts:
    return Texts.coded([""], np.zeros(len(block.array), np.int32)) if block.labels is None else block.labels


def _any(blocks: list[_Block], what: str) -> bool:
    return any(getattr(block, what) for block in blocks)


def _bag(name: str, where: str) -> str:
    """Return the name of a bag with escapes for bytes that are no UTF-8; DataError if it is no text."""
    try:
        if "\0" not in name:
            return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:
        pass
    raise DataError(f"{where} names the bag {ascii(name)[:80]}, which has NUL or half a surrogate pair in it: write it without")


def _is_label_file(name: str) -> bool:
    return array_format(name) != "npz" and is_labels(_last(stem_of(name)))


def _files_called(asked: str) -> list[str]:
    """Return what a file next to another may be called that `source.labels` names."""
    return [asked, f"{asked}.npy", *(f"{asked}{ending}" for ending in ("-idx1-ubyte", "-idx1-ubyte.gz"))]


def _folder(name: str) -> str:
    return "".join(name.rpartition("/")[:2])


def _last(stem: str) -> str:
    return stem.rpartition("/")[2]


def _label_files(name: str) -> list[str]:
    """Return the names that the file of labels may have next to a single file of images."""
    pairs = (("images", "labels"), ("imgs", "labels"), ("data", "labels"), ("x", "y"), ("X", "y"))
    found = [re.sub(rf"(?<![A-Za-z0-9]){old}(?![A-Za-z0-9])", new, name) for old, new in pairs]
    names = [other for made in found if made != name and _is_label_file(other := re.sub(r"idx\d", "idx1", made))]
    return [*names, *(other[:-3] if other.endswith(".gz") else f"{other}.gz" for other in names if array_format(name) == "idx")]


def _groups(blocks: list[_Block]) -> list[str] | None:
    if not _any(blocks, "groups"):
        return None
    without = [block.head for block in blocks if block.groups is None]
    if without:
        raise DataError(f"{without[0]} is no array of an .npz, so source.group cannot name bags in it: shard it separately")
    return [bag for block in blocks for bag in block.groups or ()]


def _columns(blocks: list[_Block]) -> dict[str, NDArray[Any]]:
    names = {name: None for block in blocks for name in block.factors}
    for name in names:
        without = [block.head for block in blocks if name not in block.factors]
        if without:
            raise DataError(f"{without[0]} has no array {name!r}, other files have one: add it, or shard the files separately")
    return {name: _joined(name, blocks) for name in names}


def _joined(name: str, blocks: list[_Block]) -> Array:
    """Return a column of all blocks; DataError if numbers would become others in it, or texts are among them."""
    parts = [block.factors[name] for block in blocks]
    values = np.concatenate(parts)
    inexact = values.dtype.kind == "f" and any(
        max(abs(int(part.min())), abs(int(part.max()))) > MAX_EXACT for part in parts if part.dtype.kind in "iu"
    )
    if inexact or len({part.dtype == object for part in parts}) > 1:
        types = first_of([f"{block.head} {part.dtype}" for block, part in zip(blocks, parts, strict=True)])
        raise DataError(f"the arrays {name!r} are no one column, exactly ({types}): save them with one type")
    return values
