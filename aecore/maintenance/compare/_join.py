"""Join the rows of many parts by key in bounded memory: one range of keys at a time.

The ranges come from every 64th key of each part, so that each holds about `RANGE_ROWS` rows. The price: one pass over
the parts per range. Corresponding parts (the same rows of the same shard) are joined separately and need no ranges.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

RANGE_ROWS = 500_000
_SAMPLE = 64
SHOWN = 5
Read = Callable[[Any, Sequence[str] | None], pa.Table]  # any: the part type of the artefact


def keys_of(table: pa.Table) -> Any:  # any: pyarrow's stubs know no type of a column of a file
    """Return the keys as one array of strings."""
    return table["key"].combine_chunks()


def first_keys(keys: Any) -> Any:  # any: as above
    """Return the keys, sorted: those of one range come before those of the next."""
    return keys.take(pc.sort_indices(keys))


@dataclass
class Keys:
    """Counts and examples of the keys on both sides."""

    in_both: int = 0
    only_a: int = 0
    only_b: int = 0
    examples_a: list[str] = field(default_factory=list)
    examples_b: list[str] = field(default_factory=list)

    def join(self, a: pa.Table, b: pa.Table) -> tuple[pa.Table, pa.Table]:
        """Count the keys of two tables and return their common rows, in the same order."""
        left, right = keys_of(a), keys_of(b)
        at = pc.index_in(left, value_set=right)
        known = at.is_valid()
        lost, extra = first_keys(left.filter(pc.invert(known))), first_keys(right.filter(pc.invert(pc.is_in(right, value_set=left))))
        self.in_both += len(left) - len(lost)
        self.only_a += len(lost)
        self.only_b += len(extra)
        self.examples_a += lost.slice(0, max(0, SHOWN - len(self.examples_a))).to_pylist()
        self.examples_b += extra.slice(0, max(0, SHOWN - len(self.examples_b))).to_pylist()
        return a.filter(known), b.take(at.drop_null())

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {
            "in_both": self.in_both,
            "only_in_a": self.only_a,
            "only_in_b": self.only_b,
            "examples_only_in_a": self.examples_a,
            "examples_only_in_b": self.examples_b,
        }


def by_ranges(
    a: Sequence[Any], b: Sequence[Any], read_a: Read, read_b: Read, *, rows: int = RANGE_ROWS
) -> Iterator[tuple[pa.Table, pa.Table]]:
    """Yield the rows of both sides, one range of keys after the other; each key is in exactly one of the pairs."""
    if not a and not b:
        return
    bounds: list[str | None] = [None, *_bounds([(part, read_a) for part in a] + [(part, read_b) for part in b], rows), None]
    for low, high in itertools.pairwise(bounds):
        yield _rows(a, read_a, low, high), _rows(b, read_b, low, high)


def _bounds(parts: Sequence[tuple[Any, Read]], rows: int) -> list[str]:
    sample: list[str] = []
    for part, read in parts:
        keys = keys_of(read(part, ["key"]))
        sample += keys.take(pa.array(range(0, len(keys), _SAMPLE), pa.int64())).to_pylist()
    sample.sort()
    every = max(1, rows // _SAMPLE)
    return sorted(set(sample[every::every]))


def _rows(parts: Sequence[Any], read: Read, low: str | None, high: str | None) -> pa.Table:
    tables = []
    for part in parts:
        table = read(part, None)
        if low is not None:
            table = table.filter(pc.greater_equal(keys_of(table), pa.scalar(low)))
        if high is not None:
            table = table.filter(pc.less(keys_of(table), pa.scalar(high)))
        tables.append(table)
    return pa.concat_tables(tables, promote_options="default") if tables else pa.table({"key": pa.array([], pa.string())})
