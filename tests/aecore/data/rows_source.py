"""A source of listings that a test makes: arrays of four numbers that follow from their names."""

import io
import zlib
from collections.abc import Sequence
from typing import Literal

import numpy as np

from aecore.data.sources import Listing
from aecore.registry import SOURCES, knob, spec

ROWS: dict[str, Listing] = {}


@spec
class RowsSpec:
    """The listing of this name in `ROWS`."""

    kind: Literal["rows-of-a-test"] = "rows-of-a-test"
    rows: str = knob("", "name of the listing", identity=False)


@SOURCES.register(RowsSpec)
class RowsSource:
    """The samples of a listing of a test."""

    def __init__(self, rows: RowsSpec) -> None:
        self._rows = rows.rows

    def listing(self) -> Listing:
        """Return the listing."""
        return ROWS[self._rows]

    def read(self, source: str) -> tuple[str, bytes]:
        """Return four numbers that follow from the name."""
        sink = io.BytesIO()
        np.save(sink, np.full(4, zlib.crc32(source.encode()) % 1000, np.float32))
        return "npy", sink.getvalue()

    def read_states(self, sources: Sequence[str]) -> list[str]:
        """Return their states, which are always the same."""
        return ["1"] * len(sources)
