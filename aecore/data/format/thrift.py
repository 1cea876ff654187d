"""Read structs of Thrift's compact protocol, in which Parquet writes its footers and the headers of its pages; bytes are not trusted.

Every length is compared with the bytes that are there before anything is allocated, and nesting is bounded. Maps, which Parquet has none
of, are refused. The price: pure Python, about 1.5 MB/s.
"""

import struct
from typing import Any

Fields = dict[tuple[int, int], Any]  # any: int, bool, float, bytes, list or Fields, as the kind of the field says
BOOL, I32, I64, BINARY, LIST, STRUCT = 1, 5, 6, 8, 9, 12
_FALSE, _BYTE, _I16, _DOUBLE, _SET = 2, 3, 4, 7, 10
_MAX_NESTED, _MAX_VARINT = 16, 10


def read_struct(data: bytes | memoryview, at: int = 0) -> tuple[Fields, int]:
    """Return the fields of a struct by number and kind, and where it ends; ValueError if it does not follow the protocol.

    A field of another kind is another field: Thrift's readers skip it.
    """
    try:
        return _struct(data, at, 0)
    except (IndexError, struct.error):
        raise ValueError("it ends inside a Thrift struct") from None


def _struct(data: bytes | memoryview, at: int, nested: int) -> tuple[Fields, int]:
    if nested > _MAX_NESTED:
        raise ValueError(f"its Thrift structs are nested more than {_MAX_NESTED} deep")
    found: Fields = {}
    number = 0
    while head := data[at]:
        kind, step, at = head & 15, head >> 4, at + 1
        if step:
            number += step
        else:
            number, at = _signed(data, at)
        if kind in (BOOL, _FALSE):  # the kind is the value
            found[number, BOOL] = kind == BOOL
        else:
            found[number, kind], at = _value(data, at, kind, nested)
    return found, at + 1


def _value(data: bytes | memoryview, at: int, kind: int, nested: int) -> tuple[Any, int]:  # any: see Fields
    if kind in (_I16, I32, I64):
        return _signed(data, at)
    if kind == BINARY:
        size, at = _varint(data, at)
        if size > len(data) - at:
            raise ValueError(f"its Thrift structs hold a text of {size} bytes, and {len(data) - at} bytes follow")
        return bytes(data[at : at + size]), at + size
    if kind == STRUCT:
        return _struct(data, at, nested + 1)
    if kind in (LIST, _SET):
        return _list(data, at, nested + 1)
    if kind in (BOOL, _FALSE):  # in a list; a field has no bytes for it
        return data[at] == BOOL, at + 1
    if kind == _BYTE:
        return int.from_bytes(data[at : at + 1], "little", signed=True), at + 1
    if kind == _DOUBLE:
        return struct.unpack_from("<d", data, at)[0], at + 8
    raise ValueError(f"its Thrift structs hold a value of kind {kind}")


def _list(data: bytes | memoryview, at: int, nested: int) -> tuple[list[Any], int]:  # any: see Fields
    if nested > _MAX_NESTED:
        raise ValueError(f"its Thrift structs are nested more than {_MAX_NESTED} deep")
    kind, size, at = data[at] & 15, data[at] >> 4, at + 1
    if size == 15:
        size, at = _varint(data, at)
    if size > len(data) - at:  # every value has at least one byte
        raise ValueError(f"its Thrift structs hold a list of {size} values, and {len(data) - at} bytes follow")
    values = []
    for _ in range(size):
        value, at = _value(data, at, kind, nested)
        values.append(value)
    return values, at


def _signed(data: bytes | memoryview, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return value >> 1 ^ -(value & 1), at


def _varint(data: bytes | memoryview, at: int) -> tuple[int, int]:
    byte = data[at]
    if byte < 128:  # most are
        return byte, at + 1
    value = byte & 127
    for number in range(1, _MAX_VARINT):
        byte = data[at + number]
        value |= (byte & 127) << 7 * number
        if byte < 128:
            return value, at + number + 1
    raise ValueError("its Thrift structs hold a number that does not end")
