"""Offsets of every member of a shard's tar, from its index: arrays to read by offset, plain lists to read in order.

An index is refused (DataError) if a value is missing, a member has another extension than the allowed ones, a sample has not exactly
one data member, members do not follow each other without gaps (in an adopted tar: in order), or a hash is malformed.
Lists are built lazily.
"""

import itertools
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from aecore.data.format.index import INDEX_SCHEMA
from aecore.data.format.record import DATA_EXTENSIONS, require_allowed
from aecore.data.format.tar import BLOCK, stored_size
from aecore.errors import DataError

REMEDY = "restore it or write the dataset again"
DIGEST_BYTES = 32
Int64s = NDArray[np.int64]


class Layout:
    """Offsets in a tar of N samples and M members, in file order; `where` names the tar in errors, `packed` is False for adopted tars.

    Attributes
    ----------
    data_ext, data_begins, data_ends : list of N str, `[N]` int64
        Extension and byte range of the data member (the image or array) of each sample.
    digests : `[N, 32]` uint8
        The sha256 of each data member.
    begins, ends : `[M]` int64
        Byte range of each member.
    firsts : `[N+1]` int64
        Index of each sample's first member, and M.
    starts : `[N+1]` int64
        First byte of each sample's first header, and of the end of the archive.
    """

    def __init__(self, index: pa.Table, where: str, *, packed: bool = True) -> None:
        _require_columns(index, where)
        self._index = index
        members: Any = index.column("members").combine_chunks()  # any: pyarrow's stubs give no flatten
        names, begins, sizes = members.flatten().flatten()
        if names.null_count or begins.null_count or sizes.null_count:
            raise DataError(f"the index of {where} has members without extension, offset or size: {REMEDY}")
        codes = names.dictionary_encode()
        self._names: list[str] = codes.dictionary.to_pylist()
        for name in sorted(self._names):
            require_allowed(name, f"a member of {where}")
        self._codes: Int64s = codes.indices.to_numpy().astype(np.int64)
        self.begins: Int64s = begins.to_numpy()
        self.ends: Int64s = self.begins + sizes.to_numpy()
        if (self.begins < BLOCK).any() or (self.ends < self.begins).any():
            raise DataError(f"the index of {where} has members at impossible offsets: {REMEDY}")
        self.firsts: Int64s = np.concatenate([[0], np.cumsum(members.value_lengths().to_numpy())])
        is_data = np.array([name in DATA_EXTENSIONS for name in self._names], bool)
        data = np.flatnonzero(is_data[self._codes])
        if not np.array_equal(np.searchsorted(self.firsts, data, side="right") - 1, np.arange(index.num_rows)):
            raise DataError(f"the index of {where} does not name one data member per sample: {REMEDY}")
        ends = np.cumsum(stored_size(self.ends - self.begins))
        if not packed:
            ends = self._require_order(where)
        elif not np.array_equal(np.concatenate([[0], ends[:-1]])[: len(ends)] + BLOCK, self.begins):
            raise DataError(f"the members in the index of {where} do not follow each other without gaps: {REMEDY}")
        self.data_ext = [self._names[code] for code in self._codes[data].tolist()]
        self.data_begins, self.data_ends = self.begins[data], self.ends[data]
        self.starts: Int64s = np.concatenate([self.begins[self.firsts[:-1]] - BLOCK, ends[-1:]])
        self.digests = _digests(index.column("sha256"), where)

    def _require_order(self, where: str) -> Int64s:
        """Return the ends of an adopted tar's members, which must be in order without overlap; links share one place."""
        linked = (self.begins[1:] == self.begins[:-1]) & (self.ends[1:] == self.ends[:-1])
        if (self.begins < BLOCK).any() or ((self.begins[1:] < self.ends[:-1]) & ~linked).any() or (self.ends < self.begins).any():
            raise DataError(f"the members in the index of {where} overlap or are out of order: {REMEDY}")
        return self.ends

    @cached_property
    def keys(self) -> list[str]:
        """Keys of the N samples."""
        keys: Any = self._index.column("key").to_pylist()  # any: pyarrow's stubs make them optional
        return list(keys)

    @cached_property
    def labels(self) -> list[int | None]:
        """Class ids of the N samples."""
        return list(self._index.column("label").to_pylist())

    @cached_property
    def classes(self) -> list[bytes | None]:
        """Contents of the `.cls` members of the N samples, None where a sample has no label."""
        contents = {label: None if label is None else b"%d" % label for label in set(self.labels)}
        return [contents[label] for label in self.labels]

    @cached_property
    def names(self) -> list[bytes]:
        """Names of the M members."""
        suffixes = [f".{name}".encode() for name in self._names]
        keys = zip(self.keys, np.diff(self.firsts).tolist(), strict=True)
        owners = [key for text, count in keys for key in [text.encode()] * count]
        return [owner + suffixes[code] for owner, code in zip(owners, self._codes.tolist(), strict=True)]

    @cached_property
    def members(self) -> list[tuple[tuple[str, int, int], ...]]:
        """Extension, first and last byte of the members of each of the N samples."""
        names = [self._names[code] for code in self._codes.tolist()]
        flat = list(zip(names, self.begins.tolist(), self.ends.tolist(), strict=True))
        bounds = self.firsts.tolist()
        return [tuple(flat[first:last]) for first, last in itertools.pairwise(bounds)]


def _require_columns(index: pa.Table, where: str) -> None:
    """Raise DataError unless the columns that are read have their types and a value in every row (a label may be missing)."""
    for name in ("key", "ordinal", "label", "sha256", "members"):
        wanted = INDEX_SCHEMA.field(name).type
        found = index.schema.field(name).type if name in index.column_names else None
        if found != wanted:
            raise DataError(f"the index of {where} has the column {name!r} of type {found}, expected {wanted}: {REMEDY}")
        if name != "label" and index.column(name).null_count:
            raise DataError(f"the index of {where} has rows without {name}: {REMEDY}")


def _digests(column: Any, where: str) -> NDArray[np.uint8]:  # any: a chunked array of strings
    if not pc.all(pc.match_substring_regex(column, f"^[0-9a-f]{{{2 * DIGEST_BYTES}}}$"), min_count=0).as_py():
        raise DataError(f"the index of {where} does not give a sha256 for every sample: {REMEDY}")
    return np.frombuffer(bytes.fromhex("".join(column.to_pylist())), np.uint8).reshape(-1, DIGEST_BYTES)
