"""Compare two latent tables: keys, the difference of every column, lineage and identity."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from aecore.maintenance.compare._fields import differing
from aecore.maintenance.compare._join import Keys, by_ranges
from aecore.table.manifest import TablePart
from aecore.table.part import numpy_view
from aecore.table.table import LatentTable, open_table

POSITION = ("key", "shard", "ordinal")  # columns that locate a row and are not compared


def compare_tables(a: str, b: str) -> dict[str, Any]:
    """Compare the newest generations of two tables. Reads every part once, and more often those without a counterpart."""
    left, right = open_table(a), open_table(b)
    shared = [name for name in left.columns if name in right.columns and name not in POSITION]
    gaps = {name: _Gap(name, left, right) for name in shared}
    keys = Keys()
    pairs, rest_a, rest_b = _pairs(left, right)
    for part_a, part_b in pairs:
        _compare_rows(keys, gaps, _read(left, part_a, shared), _read(right, part_b, shared))
    readers = [functools.partial(_read_range, table, shared) for table in (left, right)]
    for rows_a, rows_b in by_ranges(rest_a, rest_b, *readers):
        _compare_rows(keys, gaps, rows_a, rows_b)
    columns = {name: gap.to_dict() for name, gap in gaps.items()}
    same_keys = not keys.only_a and not keys.only_b
    return {
        "same_rows": same_keys and left.columns == right.columns and all(gap.rows == 0 and gap.comparable for gap in gaps.values()),
        "generation": [left.manifest.number, right.manifest.number],
        "rows": [left.num_rows, right.num_rows],
        "quarantined": [left.manifest.quarantined, right.manifest.quarantined],
        "keys": keys.to_dict(),
        "columns": columns,
        "columns_only_in_a": [name for name in left.columns if name not in right.columns],
        "columns_only_in_b": [name for name in right.columns if name not in left.columns],
        "lineage": differing(left.manifest.lineage, right.manifest.lineage),
        "identity": differing(left.manifest.identity, right.manifest.identity),
    }


def _pairs(a: LatentTable, b: LatentTable) -> tuple[list[tuple[TablePart, TablePart]], list[TablePart], list[TablePart]]:
    """Return the pairs of parts with the same rows of the same shard, and the other parts of both tables."""
    known = {_rows_of(part): part for part in b.parts}
    pairs = [(part, known[_rows_of(part)]) for part in a.parts if _rows_of(part) in known]
    paired = {_rows_of(part) for part, _ in pairs}
    rest_a, rest_b = ([part for part in table.parts if _rows_of(part) not in paired] for table in (a, b))
    return pairs, rest_a, rest_b


def _rows_of(part: TablePart) -> tuple[str, str, str, str | None, int, int]:
    return part.split, part.shard, part.shard_sha256, part.removed_sha256, part.row_start, part.row_stop  # rows are counted by what is live


def _read(table: LatentTable, part: TablePart, columns: Sequence[str]) -> pa.Table:
    """Read key and columns of a part as the table has them; a column that a later generation added is null in earlier parts."""
    present = set(table.schema_of(part).names)
    rows = table.read(part, ["key", *(name for name in columns if name in present)])
    for name in columns:
        kind = table.schema.field(name).type
        if name not in present:
            rows = rows.append_column(name, pa.nulls(len(rows), kind))
        elif rows.schema.field(name).type != kind:
            rows = rows.set_column(rows.column_names.index(name), name, rows[name].cast(kind))
    return rows


def _read_range(table: LatentTable, shared: Sequence[str], part: TablePart, columns: Sequence[str] | None) -> pa.Table:
    return _read(table, part, shared if columns is None else ())


def _compare_rows(keys: Keys, gaps: Mapping[str, "_Gap"], a: pa.Table, b: pa.Table) -> None:
    rows_a, rows_b = keys.join(a, b)
    for name, gap in gaps.items():
        if len(rows_a) and name in rows_a.column_names:
            gap.add(rows_a, rows_b)


class _Gap:
    """The difference of one column of two tables, over the rows added so far."""

    def __init__(self, name: str, a: LatentTable, b: LatentTable) -> None:
        self.name = name
        self.types = [a.schema.field(name).type, b.schema.field(name).type]
        self.is_latent = name in a.manifest.columns and name in b.manifest.columns
        dims = [table.manifest.columns[name]["dim"] if self.is_latent else None for table in (a, b)]
        self.comparable = dims[0] == dims[1]
        self.rows, self.values, self.total, self.max = 0, 0, 0.0, 0.0
        self.at: str | None = None

    def add(self, a: pa.Table, b: pa.Table) -> None:
        """Add common rows in the same order."""
        if not self.comparable:
            return
        if not self.is_latent:
            left: Any = a[self.name]  # any: pyarrow's stubs know no type of a column of a file
            right: Any = b[self.name]
            if left.type != right.type or pa.types.is_null(left.type):  # compared as text
                left, right = left.cast(pa.string()), right.cast(pa.string())
            equal: Any = pc.fill_null(pc.equal(left, right), False)
            both_null = pc.and_(pc.is_null(left), pc.is_null(right))
            self.rows += len(a) - int(pc.sum(pc.or_(equal, both_null)).as_py() or 0)
            return
        gap = np.abs(_numbers(a, self.name) - _numbers(b, self.name)).reshape(len(a), -1)
        per_row = gap.max(axis=1, initial=0.0)
        worst = int(per_row.argmax())
        if per_row[worst] > self.max:
            self.max, self.at = float(per_row[worst]), str(a["key"][worst].as_py())
        self.rows += int(np.count_nonzero(per_row))
        self.values += gap.size
        self.total += float(gap.sum())

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        if not self.comparable:
            return {"types": [str(kind) for kind in self.types], "comparable": False}
        if not self.is_latent:
            return {"differing_rows": self.rows}
        mean = self.total / self.values if self.values else 0.0
        return {"differing_rows": self.rows, "max_difference": self.max, "mean_difference": mean, "worst_key": self.at}


def _numbers(rows: pa.Table, name: str) -> Any:  # any: an array of float64
    return numpy_view(rows.select([name]).combine_chunks()[name]).astype(np.float64)
