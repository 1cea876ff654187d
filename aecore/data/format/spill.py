"""Tables that are too large for the memory, in scratch files that are mapped: the kernel drops their pages and reads them again.

Rows of a mapped file in another order cost a page each. So a table is gathered in two passes: batch by batch its rows are written to the
bucket of their places in the result, then each bucket is put in order in memory. A file is unlinked as soon as it is mapped.
"""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from aecore.store import scratch_path

LARGE = 1 << 18  # rows; what has fewer stays in memory
BUCKET = 1 << 17  # rows that are put in order in memory, or written, at a time
_PLACE = "\0place"  # the column of places in a bucket


def is_large(rows: int) -> bool:
    """Return whether a table of so many rows is kept in a scratch file."""
    return rows >= LARGE


class Spill(contextlib.AbstractContextManager["Spill"]):
    """A scratch file that tables of one schema are appended to."""

    def __init__(self, schema: pa.Schema) -> None:
        self.rows, self._schema, self._path = 0, schema.remove_metadata(), scratch_path()
        self._sink = pa.OSFile(str(self._path), "wb")
        self._writer: Any = pa.ipc.new_file(self._sink, self._schema)  # any: pyarrow's stubs do not know it

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the file; what is mapped of it stays."""
        with contextlib.suppress(pa.ArrowException, OSError):
            self._sink.close()
        self._path.unlink(missing_ok=True)

    def add(self, table: pa.Table) -> None:
        """Append the rows of a table."""
        for start in range(0, len(table), BUCKET):
            self._writer.write_table(table.slice(start, BUCKET).combine_chunks())
        self.rows += len(table)

    def table(self) -> pa.Table:
        """Return all rows, mapped; nothing can be added after that."""
        self._writer.close()
        self._sink.close()
        return _mapped(self._path)


def spilled(tables: Iterable[pa.Table], schema: pa.Schema) -> pa.Table:
    """Return all rows of these tables in one that is mapped."""
    with Spill(schema) as file:
        for table in tables:
            file.add(table)
        return file.table()


def take_rows(table: pa.Table, rows: NDArray[Any]) -> pa.Table:  # any: integers of any width
    """Return `table.take(rows)`: a part of the table itself if that are consecutive rows, and mapped if they are many."""
    if len(rows) and int(rows[-1]) - int(rows[0]) == len(rows) - 1 and bool((rows[1:] - rows[:-1] == 1).all()):
        return table.slice(int(rows[0]), len(rows))
    if is_large(len(rows)):
        return spilled(gathered(table, rows), table.schema)
    return _concat(table, gathered(table, rows)) if is_large(len(table)) else table.take(pa.array(rows, pa.int64()))


def gathered(table: pa.Table, rows: NDArray[Any]) -> Iterator[pa.Table]:
    """Yield the rows of `table.take(rows)`, `BUCKET` of them at a time; a mapped table is read once from its beginning to its end."""
    order = narrow(np.argsort(rows, kind="stable"))
    at = rows[order]
    schema = table.schema.remove_metadata().append(pa.field(_PLACE, pa.int64()))
    with contextlib.ExitStack() as stack:
        buckets = [stack.enter_context(Spill(schema)) for _ in range(0, len(rows), BUCKET)]
        for start in range(0, len(table), BUCKET):
            part = table.slice(start, BUCKET)
            places = order[slice(*np.searchsorted(at, [start, start + len(part)]))].astype(np.int64)
            if not len(places):
                continue
            places = places[np.argsort(places // BUCKET, kind="stable")]
            taken = part.combine_chunks().take(pa.array(rows[places] - start, pa.int64())).append_column(_PLACE, pa.array(places))
            bounds = np.searchsorted(places // BUCKET, np.arange(len(buckets) + 1))
            for bucket, first, stop in zip(buckets, bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
                if stop > first:
                    bucket.add(taken.slice(first, stop - first))
        for bucket in buckets:
            found = bucket.table().combine_chunks()
            yield found.drop_columns([_PLACE]).take(pa.array(np.argsort(found[_PLACE].to_numpy()), pa.int64()))


def narrow(rows: NDArray[Any]) -> NDArray[Any]:  # any: integers of any width
    """Return numbers of rows in half the memory, where they fit."""
    return rows.astype(np.int32) if len(rows) < 1 << 31 and rows.max(initial=0) < 1 << 31 else rows


def filtered(table: pa.Table, mask: NDArray[np.bool_]) -> pa.Table:
    """Return the rows of a table where `mask` is set: itself if that is everywhere, and mapped if they are many."""
    count = int(np.count_nonzero(mask))
    if count == len(table):
        return table
    if not count:
        return table.schema.empty_table()
    pieces = (table.slice(at, BUCKET).filter(pa.array(mask[at : at + BUCKET])) for at in range(0, len(table), BUCKET))
    return spilled(pieces, table.schema) if is_large(count) else _concat(table, pieces)


def ranges(count: int) -> Iterator[tuple[int, int]]:
    """Yield [start, stop) of `BUCKET` of so many rows at a time."""
    yield from ((start, min(start + BUCKET, count)) for start in range(0, count, BUCKET))


def slices(*tables: pa.Table) -> Iterator[tuple[pa.Table, ...]]:
    """Yield the same `BUCKET` rows of each of these tables, which are of one length, at a time."""
    for start in range(0, len(tables[0]), BUCKET):
        yield tuple(table.slice(start, BUCKET) for table in tables)


def _concat(table: pa.Table, pieces: Iterable[pa.Table]) -> pa.Table:
    return pa.concat_tables([table.schema.empty_table(), *pieces]).combine_chunks()


def _mapped(path: Path) -> pa.Table:
    table: pa.Table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    path.unlink(missing_ok=True)
    return table
