"""Check external arrays that are samples, labels or factors, and write one row as a member."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np

from aecore.data.format.png import COLOUR_TYPES, StoredPng
from aecore.data.sources._arrayfile import Array, Rows
from aecore.errors import ConfigError, DataError
from aecore.native.texts import Texts


def require_samples(array: Array, where: str) -> Array:
    """Return `array`, N rows of numbers; DataError if it is something else."""
    if array.ndim < 2 or not array.size:
        raise DataError(
            f"{where} has shape {array.shape}: expected [N, ...] with at least one row, a sample each; if each file is one sample, set "
            "source.kind=folder and source.extensions=[npy] (or [npz])"
        )
    if array.dtype.kind not in "biufc":
        remedy = "say which array they are with source.images" if "(array " in where else "save numbers"
        raise DataError(f"{where} holds {array.dtype}: samples are booleans or numbers; {remedy}")
    return array


def require_rows(values: Array, count: int, where: str, of: str) -> Array:
    """Return `values`; DataError unless there are `count` of them, one for each of the samples `of`."""
    if not values.ndim or len(values) != count:
        found = f"{len(values)} rows" if values.ndim else "one number"
        raise DataError(f"{where} has {found}, {of} has {count}: they must belong to each other, row by row (or move one of them away)")
    return values


def native(values: Array) -> Array:
    """Return values in this machine's byte order, strings as objects, as a column of an index needs them."""
    if values.dtype.kind == "S":
        return np.array([value.decode("utf-8", "backslashreplace") for value in values.tolist()], dtype=object)
    if values.dtype.kind == "U":
        return values.astype(object)
    if values.dtype.kind == "c":
        raise DataError("factors are complex numbers: give their parts as two arrays")
    return np.ascontiguousarray(values, values.dtype.newbyteorder("="))


def class_names(values: Array, where: str) -> Texts:
    """Return the class names of an array of labels: whole numbers or strings, `[N]` or `[N, 1]`.

    Bytes that are no UTF-8 become lone surrogates, of which `_labels.bad_label` says that they name no class.
    """
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1:
        raise DataError(f"{where} has shape {values.shape}: labels are one number or name for each sample; one-hot rows need argmax(1)")
    require_characters(values, where, halves=True)  # a label with half a pair makes its own sample unusable (`bad_label`)
    if values.dtype.kind == "f":
        values = values.astype(np.promote_types(values.dtype, np.float64))
        other = np.flatnonzero(~(np.isfinite(values) & (values == np.floor(values))))
        if len(other):
            row = int(other[0])
            raise DataError(f"{where} holds {values[row]!s} in row {row}, which is no whole number: labels are whole numbers or names")
        large = np.flatnonzero(np.abs(values) >= 2.0**63)
        if len(large):
            row = int(large[0])
            raise DataError(f"{where} holds {values[row]!s} in row {row}, which is no 64-bit integer: labels are whole numbers or names")
        values = values.astype(np.int64)
    if values.dtype.kind == "c":
        raise DataError(f"{where} holds complex numbers: labels are whole numbers or names")
    if values.dtype.kind == "S":
        return Texts.of([value.decode("utf-8", "surrogateescape") for value in values.tolist()])
    values = native(values if values.dtype.kind != "b" else values.astype(np.uint8))
    if values.dtype.kind in "iu":
        numbers, codes = np.unique(values, return_inverse=True)
        return Texts.coded([str(number) for number in numbers.tolist()], codes)
    return Texts.of([str(value) for value in values.tolist()])


def require_characters(values: Array, where: str, *, halves: bool = False) -> None:
    """Raise DataError if a text of an array has what is no character: any number, or (unless `halves` may be) half a surrogate pair."""
    if values.dtype.kind != "U" or not values.dtype.itemsize or not values.size:
        return
    codes = np.ascontiguousarray(values, values.dtype.newbyteorder("=")).reshape(len(values), -1).view(np.uint32)
    wrong = np.argwhere((codes > 0x10FFFF) | ((codes >= 0xD800) & (codes <= 0xDFFF) & (not halves)))
    if len(wrong):
        row, at = wrong[0].tolist()
        raise DataError(f"{where} has {int(codes[row, at]):#x} in row {row}, which is no character: save its texts again (numpy.array)")


def require_lengths(values: Array, samples: Array, where: str, of: str) -> Array:
    """Return the valid steps of each row of `samples` as int64 `[N]`; DataError unless they are whole numbers from 1 to its second axis."""
    lengths = require_rows(values, len(samples), where, of)
    if lengths.ndim != 1 or lengths.dtype.kind not in "iu":
        raise DataError(f"{where} has shape {lengths.shape} and dtype {lengths.dtype}: lengths are one whole number for each row")
    if not 1 <= int(lengths.min()) <= int(lengths.max()) <= samples.shape[1]:
        row = int(np.flatnonzero((lengths < 1) | (lengths > samples.shape[1]))[0])
        raise DataError(
            f"{where} gives {int(lengths[row])} steps for row {row}, the rows of {of} have 1 to {samples.shape[1]}: leave empty rows out"
        )
    return lengths.astype(np.int64)


def row_writer(array: Rows, store_as: str, where: str, lengths: Array | None = None) -> Callable[[int], tuple[str, bytes]]:
    """Return the function from a row's number to its extension and bytes; with `lengths` to those of its valid steps, as `.npy`."""
    if lengths is not None:
        return _sequence_writer(array, lengths, store_as, where)
    num_dims = len(array.shape)
    is_image = array.dtype == np.uint8 and (num_dims == 3 or (num_dims == 4 and array.shape[3] in COLOUR_TYPES))
    if store_as == "png" and not is_image:
        raise ConfigError(
            f"source.store_as=png needs uint8 images [N, H, W] or [N, H, W, 1 | 3 | 4], {where} has shape {array.shape} "
            f"and dtype {array.dtype}: use source.store_as=auto"
        )
    if is_image and store_as != "npy":
        png = StoredPng(array.shape[1:])
        return lambda row: ("png", png(array[row]))
    dtype = array.dtype.newbyteorder("=")
    start = _npy_start(dtype, array.shape[1:])
    return lambda row: ("npy", start + array[row].astype(dtype, copy=False).tobytes())


def _sequence_writer(array: Rows, lengths: Array, store_as: str, where: str) -> Callable[[int], tuple[str, bytes]]:
    if store_as == "png":
        raise ConfigError(f"source.store_as=png stores images, {where} has source.lengths: use source.store_as=auto")
    dtype, steps = array.dtype.newbyteorder("="), lengths.tolist()
    starts = {length: _npy_start(dtype, (length, *array.shape[2:])) for length in set(steps)}
    return lambda row: ("npy", starts[steps[row]] + array[row][: steps[row]].astype(dtype, copy=False).tobytes())


def _npy_start(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """Return the header of a `.npy` file."""
    head = io.BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(head, fields)
    return head.getvalue()
