"""Arrays whose rows are samples: `.npy`, `.npz` (with labels and `factor_*`), and idx files as MNIST ships them, also gzip'ed.

uint8 arrays `[N, H, W]` and `[N, H, W, 1 | 3 | 4]` are images, and are stored as PNG (stored, not deflated: about the bytes of a `.npy`
member, the same on every machine): so `shards.resize` and `shards.mode` work, networks get `[C, H, W]`, and any reader of
WebDataset sees pictures. The pixels are those of the array. Everything else, and everything with `source.store_as=npy`, keeps its values
in `.npy` members of the row's shape. Files are mapped, not loaded: a worker reads the rows of its shard and no others.
"""

import io
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from aecore.data.arrayfile import Array, ArrayFile, array_format, stem_of
from aecore.data.names import is_data, is_labels, partner, split_of, without_split
from aecore.data.png import COLOUR_TYPES, StoredPng
from aecore.data.record import encode_keys
from aecore.data.sources import Listing
from aecore.errors import ConfigError, DataError, did_you_mean
from aecore.registry import SOURCES, knob, spec
from aecore.store import absolute_url, open_files

_MEMBER = re.compile(r"(.*\.npz)/(.*)", re.DOTALL)
FACTOR = "factor_"


@spec
class ArraysSpec:
    """Rows of arrays in .npy, .npz or idx files; labels come from the array or file that is named like them (y, labels, ...)."""

    kind: Literal["arrays"] = "arrays"
    url: str = knob("", "file, or folder of files", identity=False)
    images: str = knob("", "array of an .npz that holds the samples; empty: images, x, data, ... or the only one")
    labels: str = knob("", "array of an .npz that holds the labels; empty: labels, y, ... if there is one")
    factors: tuple[str, ...] = knob((), "arrays of an .npz that become columns, besides those named factor_*")
    store_as: Literal["auto", "png", "npy"] = knob("auto", "png: as images; npy: as arrays of the same values; auto: uint8 images as png")
    max_inflated_bytes: int = knob(16 << 30, "bytes that one compressed array may inflate to", ge=1, identity=False)


@dataclass(frozen=True, slots=True)
class _Block:
    """One array of N samples: how sources name it, what its keys begin with, its split, labels (N names) and factor columns."""

    head: str
    stem: str
    array: Array
    split: str = ""
    labels: list[str] | None = None
    factors: Mapping[str, Array] = field(default_factory=dict)


@SOURCES.register(ArraysSpec)
class ArraysSource:
    """The rows of all arrays at the `url` of an `ArraysSpec`; sources are `<file>#<row>`, of an .npz `<file>/<array>#<row>`."""

    def __init__(self, arrays: ArraysSpec) -> None:
        self._spec = arrays
        url = absolute_url(arrays.url, "source.url")
        self._file = url.rpartition("/")[2] if array_format(url) else ""
        self._files = open_files(url.rpartition("/")[0] or "/" if self._file else url)
        self._rows: dict[str, Callable[[int], tuple[str, bytes]]] = {}

    def listing(self) -> Listing:
        """List every row of every array, file by file.

        Raises
        ------
        DataError
            If there is no such file, one is damaged, lengths differ, or it is not clear which array holds the samples.
        """
        names, notes = self._names()
        blocks = [block for name in names for block in self._blocks(name, names)]
        if not blocks:
            raise DataError(f"{self._files.url} holds labels and no samples ({', '.join(names[:4])}): add the file of the images")
        counts = [len(block.array) for block in blocks]
        rows = [(block, row) for block, count in zip(blocks, counts, strict=True) for row in range(count)]
        sizes = [len(_row_writer(block.array, self._spec.store_as, block.head)(0)[1]) for block in blocks]
        return Listing(
            encode_keys([f"{block.stem}/{row:09d}" for block, row in rows]),
            [f"{block.head}#{row}" for block, row in rows],
            np.repeat(np.array(sizes, np.int64), counts),
            label_names=[name for block in blocks for name in block.labels or [""] * len(block.array)] if _any(blocks, "labels") else None,
            splits=[block.split for block, _ in rows] if _any(blocks, "split") else None,
            columns=_columns(blocks),
            notes=notes,
            label_paths=False,
        )

    def read(self, source: str) -> tuple[str, bytes]:
        """Return extension and bytes of one row; OSError if its file cannot be read."""
        head, _, row = source.rpartition("#")
        return (self._rows.get(head) or self._open(head))(int(row))

    def _open(self, head: str) -> Callable[[int], tuple[str, bytes]]:
        member = _MEMBER.fullmatch(head)
        name, array = (member[1], member[2]) if member else (head, "")
        self._rows[head] = found = _row_writer(self._array_file(name).array(array), self._spec.store_as, head)
        return found

    def _array_file(self, name: str) -> ArrayFile:
        return ArrayFile(self._files.local(name), name, self._spec.max_inflated_bytes)

    def _names(self) -> tuple[list[str], tuple[str, ...]]:
        """Return the names of the files to read, sorted, and notes; of a single file also that of its labels."""
        if self._file:
            return self._with_labels(self._file), ()
        sizes = self._files.sizes()
        names = [name for name in sizes if array_format(name)]
        if not names:
            raise DataError(f"{self._files.url} holds no .npy, .npz or idx file (train-images-idx3-ubyte): check the address")
        twins = [name for name in names if name.endswith(".gz") and name[:-3] in sizes]
        notes = [f"skipped {len(sizes) - len(names)} other files"] if len(sizes) > len(names) else []
        notes += [f"skipped {len(twins)} .gz files that lie beside their inflated ones"] if twins else []
        return sorted(set(names) - set(twins)), tuple(notes)

    def _with_labels(self, name: str) -> list[str]:
        try:
            self._files.local(name).stat()
        except OSError as error:
            raise DataError(f"source.url {self._files.url}/{name} cannot be read: {error.strerror or error}; check the address") from error
        found = [name]
        for other in _label_files(name):
            try:
                self._files.local(other).stat()
            except OSError:
                continue
            found.append(other)
            break
        return found

    def _blocks(self, name: str, names: list[str]) -> Iterator[_Block]:
        file = self._array_file(name)
        stem = stem_of(name)
        if array_format(name) == "npz":
            yield from self._npz_blocks(file, name, stem)
        elif not is_labels(stem.rpartition("/")[2]):
            array = _samples(file.array(""), name)
            others = {stem_of(other): other for other in names if _folder(other) == _folder(name) and is_labels(_last(stem_of(other)))}
            found = partner(_last(stem), map(_last, others))
            labels = None if found is None else others[_folder(name) + found]
            yield _Block(name, stem, array, split_of(stem), None if labels is None else self._label_names(labels, "", array, name))

    def _npz_blocks(self, file: ArrayFile, name: str, stem: str) -> Iterator[_Block]:
        known = file.names()
        for data in self._data_names(known, name):
            split = split_of(data) or split_of(stem)
            array = _samples(file.array(data, verify=True), f"{name} (array {data!r})")
            label = self._chosen(known, self.labels_name, data, name) if self.labels_name else partner(data, filter(is_labels, known))
            labels = None if label is None else self._label_names(name, label, array, data)
            prefix = f"{stem}/{data}" if split_of(data) else stem
            yield _Block(f"{name}/{data}", prefix, array, split, labels, self._factor_columns(file, known, data, len(array), name))

    @property
    def labels_name(self) -> str:
        return self._spec.labels

    def _data_names(self, known: list[str], where: str) -> list[str]:
        """Return the arrays of an .npz that hold samples: one, or one for each split."""
        asked = self._spec.images
        extra = {name for name in known if name.startswith(FACTOR) or is_labels(name) or name in (self._spec.labels, *self._spec.factors)}
        if asked:
            found = [name for name in known if without_split(name) == without_split(asked)]
        else:
            rest = [name for name in known if name not in extra]
            found = rest if len(rest) == 1 else [name for name in rest if is_data(name)]
        if not found:
            what = (
                f"no array {asked!r}{did_you_mean(asked, known)}"
                if asked
                else f"the arrays {', '.join(known) or 'none'}, none named images"
            )
            raise DataError(f"{where} has {what}: say which one holds the samples with source.images")
        if len({split_of(name) for name in found}) < len(found):
            raise DataError(f"{where} has several arrays that may hold the samples ({', '.join(found)}): say which with source.images")
        return found

    def _chosen(self, known: list[str], asked: str, data: str, where: str) -> str:
        """Return the array called `asked`, in the split of the array `data` if there is one for each."""
        found = [name for name in known if without_split(name) == without_split(asked)]
        same = [name for name in found if split_of(name) == split_of(data)]
        if asked in known and not same:
            return asked
        if not same:
            raise DataError(
                f"{where} has no array {asked!r}{did_you_mean(asked, known)}: set source.labels or source.factors to one of these"
            )
        return same[0]

    def _label_names(self, name: str, array: str, samples: Array, of: str) -> list[str]:
        where = f"{name} (array {array!r})" if array else name
        return _names_of(_as_long(self._array_file(name).array(array, verify=True), len(samples), where, of), where)

    def _factor_columns(self, file: ArrayFile, known: list[str], data: str, count: int, where: str) -> dict[str, Array]:
        """Return the columns of all factor arrays of one array of samples: `[N, k]` becomes k columns."""
        split = split_of(data)
        asked = [self._chosen(known, name, data, where) for name in self._spec.factors]
        names = [*asked, *(name for name in known if name.startswith(FACTOR) and split_of(name) in ("", split) and name not in asked)]
        found: dict[str, Array] = {}
        for name in names:
            values = _as_long(file.array(name, verify=True), count, f"{where} (array {name!r})", data)
            title = FACTOR + name.removeprefix(FACTOR).removesuffix(f"_{split}")
            if values.ndim == 1:
                found[title] = _native(values)
            elif values.ndim == 2:
                found |= {f"{title}_{column}": _native(values[:, column]) for column in range(values.shape[1])}
            else:
                raise DataError(f"{where} (array {name!r}) has shape {values.shape}: factors are numbers or rows of numbers")
        return found


def _any(blocks: list[_Block], what: str) -> bool:
    return any(getattr(block, what) for block in blocks)


def _folder(name: str) -> str:
    return "".join(name.rpartition("/")[:2])


def _last(stem: str) -> str:
    return stem.rpartition("/")[2]


def _label_files(name: str) -> list[str]:
    """Return the names that the labels of a single file may have beside it."""
    pairs = (("images", "labels"), ("imgs", "labels"), ("data", "labels"), ("x", "y"), ("X", "y"))
    found = [re.sub(rf"(?<![A-Za-z0-9]){old}(?![A-Za-z0-9])", new, name) for old, new in pairs]
    names = [re.sub(r"idx\d", "idx1", other) for other in found if other != name]
    return [*names, *(other[:-3] if other.endswith(".gz") else f"{other}.gz" for other in names if array_format(name) == "idx")]


def _samples(array: Array, where: str) -> Array:
    if array.ndim < 2 or not array.size:
        raise DataError(f"{where} has shape {array.shape}: expected [N, ...] with at least one row, a sample each")
    if array.dtype.kind not in "biufc":
        raise DataError(f"{where} holds {array.dtype}: samples are booleans or numbers; say which array they are with source.images")
    return array


def _as_long(values: Array, count: int, where: str, of: str) -> Array:
    if not values.ndim or len(values) != count:
        found = f"{len(values)} rows" if values.ndim else "one number"
        raise DataError(f"{where} has {found}, {of} has {count}: they must belong to each other, row by row")
    return values


def _native(values: Array) -> Array:
    if values.dtype.kind == "S":
        return np.array([value.decode("utf-8", "backslashreplace") for value in values.tolist()], dtype=object)
    if values.dtype.kind == "U":
        return values.astype(object)
    if values.dtype.kind == "c":
        raise DataError("factors are complex numbers: give their parts as two arrays")
    return np.ascontiguousarray(values, values.dtype.newbyteorder("="))


def _names_of(values: Array, where: str) -> list[str]:
    """Return the class names of an array of labels: whole numbers or strings, `[N]` or `[N, 1]`."""
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1:
        raise DataError(f"{where} has shape {values.shape}: labels are one number or name for each sample; one-hot rows need argmax(1)")
    if values.dtype.kind == "f":
        if not (np.isfinite(values) & (values == np.floor(values))).all():
            raise DataError(f"{where} holds fractions: labels are whole numbers or names")
        values = values.astype(np.int64)
    if values.dtype.kind == "c":
        raise DataError(f"{where} holds complex numbers: labels are whole numbers or names")
    return [str(value) for value in _native(values if values.dtype.kind != "b" else values.astype(np.uint8)).tolist()]


def _columns(blocks: list[_Block]) -> dict[str, NDArray[Any]]:
    names = {name: None for block in blocks for name in block.factors}
    for name in names:
        without = [block.head for block in blocks if name not in block.factors]
        if without:
            raise DataError(f"{without[0]} has no array {name!r}, other files have one: add it, or shard the files on their own")
    return {name: np.concatenate([block.factors[name] for block in blocks]) for name in names}


def _row_writer(array: Array, store_as: str, where: str) -> Callable[[int], tuple[str, bytes]]:
    """Return the function from a row's number to its extension and bytes."""
    is_image = array.dtype == np.uint8 and (array.ndim == 3 or (array.ndim == 4 and array.shape[3] in COLOUR_TYPES))
    if store_as == "png" and not is_image:
        raise ConfigError(
            f"source.store_as=png needs uint8 images [N, H, W] or [N, H, W, 1 | 3 | 4], {where} has shape {array.shape} "
            f"and dtype {array.dtype}: use source.store_as=auto"
        )
    if is_image and store_as != "npy":
        png = StoredPng(array.shape[1:])
        return lambda row: ("png", png(array[row]))
    native = array.dtype.newbyteorder("=")
    head = io.BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(native), "fortran_order": False, "shape": array.shape[1:]}
    np.lib.format.write_array_header_1_0(head, fields)
    start = head.getvalue()
    return lambda row: ("npy", start + array[row].astype(native, copy=False).tobytes())
