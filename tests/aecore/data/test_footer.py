"""A changed bit in the footer of a Parquet file ends no process, and no file with one is taken for what was written."""

import io
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aecore.data.format.footer import MAX_BYTES, parse_footer
from aecore.data.format.index import INDEX_SCHEMA, LISTING_SCHEMA, make_table
from aecore.data.format.parquet import footer_of, read_metadata, read_parquet
from aecore.data.format.thrift import read_struct
from aecore.data.write.shard import put_table
from aecore.errors import DataError
from aecore.store import AlreadyExists, Store, open_store
from aecore.table.part import commit_part, part_table
from tests.processes import WARM, run

ROWS = 6
Commit = Callable[[Store], object]


def listing() -> tuple[str, Commit]:
    columns = {"key": [f"a/{row}" for row in range(ROWS)], "source": [f"a/{row}.png" for row in range(ROWS)], "bytes": list(range(ROWS))}
    table = make_table(LISTING_SCHEMA, columns, ROWS)
    return "listings/000001.parquet", lambda store: put_table(store, "listings/000001.parquet", table, {"claim": 1}, "listing")


def index_table() -> pa.Table:
    columns: dict[str, Any] = {
        "key": [f"a/{row}" for row in range(ROWS)],
        "ordinal": list(range(ROWS)),
        "label": [row % 2 for row in range(ROWS)],
        "label_name": ["x", "y"] * (ROWS // 2),
        "source": [f"a/{row}.png" for row in range(ROWS)],
        "sha256": [f"{row:064x}" for row in range(ROWS)],
        "members": [[{"ext": "png", "offset": 512 * row, "size": 100}] for row in range(ROWS)],
    }
    return make_table(INDEX_SCHEMA, columns, ROWS)


def index() -> tuple[str, Commit]:
    name, metadata = "shards/train-000000.parquet", {"format": 1, "split": "train", "stem": "train-000000", "tar_sha256": "ab" * 32}
    return name, lambda store: put_table(store, name, index_table(), metadata, "index")


def part() -> tuple[str, Commit]:
    mu = np.random.default_rng(0).normal(size=(ROWS, 4)).astype(np.float32)
    metadata = {"checkpoint_sha256": "cd" * 32, "device": "cpu", "threads": "1", "versions": "{}"}
    table = part_table(index_table(), np.arange(ROWS), "train-000000", {"mu": mu}, metadata)
    name = "data/split=train/train-000000.parquet"
    return name, lambda store: commit_part(store, name, table, compression="zstd")


KINDS = {"listing": listing, "index": index, "part": part}


def flip(folder: Path, kind: str, step: int) -> Counter[str]:
    """Flip bits of the footer of a file that an attempt left, each as long as it takes to commit the same again; count what came of it."""
    name, commit = KINDS[kind]()
    store, path = open_store(str(folder)), folder / name
    commit(store)
    good, rows = path.read_bytes(), read_parquet(path)
    found = Counter[str]()
    for bit in range(8 * (len(good) - len(footer_of(io.BytesIO(good)))), 8 * len(good), step):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        try:
            commit(store)
        except (AlreadyExists, DataError) as error:
            found["refused" if name in str(error) else f"not named: {error}"] += 1
        else:
            require_same(path, rows, bytes(good), bytes(bad))
            found["taken"] += 1
        assert path.read_bytes() == bad, "nothing is overwritten"
    return found


def require_same(path: Path, rows: pa.Table, good: bytes, bad: bytes) -> None:
    """A file that was taken says the same to every reader: another size or place that none looks at, or another version of its writer."""
    wanted = rows.to_pylist()
    assert pq.read_table(path, partitioning=None).to_pylist() == wanted
    assert duckdb.sql(f"select * from read_parquet('{path}', hive_partitioning=false)").arrow().read_all().to_pylist() == wanted
    assert polars.read_parquet(path, hive_partitioning=False).to_arrow().to_pylist() == wanted
    before, after = (read_metadata(io.BytesIO(data)) for data in (good, bad))
    assert re.fullmatch(r"parquet-cpp-arrow version [\d.]+", after.created_by)
    assert [group.num_rows for group in after.row_groups] == [group.num_rows for group in before.row_groups]
    assert after.metadata.keys() == before.metadata.keys()
    assert all(after.metadata[key] == before.metadata[key] for key in before.metadata if key != b"ARROW:schema")


FLIP = """
import json, sys
from pathlib import Path
from tests.aecore.data.test_footer import flip
print(json.dumps(flip(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))))
"""


@pytest.mark.parametrize("step", [127, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_bit_in_the_footer_of_a_file_that_was_left_is_refused_or_changes_nothing(tmp_path: Path, kind: str, step: int) -> None:
    done = run([*WARM, "-c", FLIP, tmp_path, kind, step], timeout_s=3000)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() <= {"refused", "taken"} and found["refused"] > 10 * found.get("taken", 0), found


def test_a_footer_says_what_pyarrow_says_of_a_whole_file() -> None:
    sink = io.BytesIO()
    pq.write_table(index_table().append_column("score", pa.array(np.arange(ROWS) / 4)), sink, row_group_size=4)
    found, right = read_metadata(sink), pq.read_metadata(sink)
    assert (found.num_rows, found.created_by, found.metadata) == (right.num_rows, right.created_by, right.metadata)
    for number, group in enumerate(found.row_groups):
        columns = [right.row_group(number).column(at) for at in range(right.num_columns)]
        assert group.num_rows == right.row_group(number).num_rows
        for column, known in zip(group.columns, columns, strict=True):
            assert (column.path, column.physical_type, column.codec) == (known.path_in_schema, known.physical_type, known.compression)
            assert (column.num_values, column.has_dictionary) == (known.num_values, known.has_dictionary_page)
            assert column.start == (known.dictionary_page_offset or known.data_page_offset)
            sizes = known.total_compressed_size, known.total_uncompressed_size
            assert (column.compressed_bytes, column.uncompressed_bytes) == sizes
            assert (column.statistics is None) == (known.statistics is None)
            if column.statistics is not None:
                assert column.statistics.null_count == known.statistics.null_count
                assert (column.statistics.min is not None) == known.statistics.has_min_max


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x19" * 40, "nested more than 16 deep"),  # a list of a list of a list ...
        (b"\x1c" * 40, "nested more than 16 deep"),
        (b"\x19\xfc" + b"\xff" * 10, "does not end"),
        (b"\x19\xfc\xff\xff\xff\x7f\x00", "a list of 268435455 values, and 1 bytes follow"),
        (b"\x18\xff\xff\xff\x7f\x00", "a text of 268435455 bytes, and 1 bytes follow"),
        (b"\x1b\x00", "a value of kind 11"),
        (b"\x10\x00", "a value of kind 0"),
        (b"\x17\x00", "ends inside"),
        (b"", "ends inside"),
    ],
)
def test_bytes_that_are_no_struct_of_thrift_are_refused_before_they_take_memory(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_struct(data)


def test_a_footer_that_is_too_large_is_not_parsed() -> None:
    with pytest.raises(ValueError, match="expected at most 8388608"):
        parse_footer(bytes(MAX_BYTES + 1))


def test_nothing_asks_pyarrow_for_a_row_group_of_a_footer() -> None:
    """`FileMetaData.row_group` and what it returns end the process at some footers: see `aecore.data.format.footer`."""
    product = [path for folder in ("aecore", "pipelines") for path in Path(folder).rglob("*.py")]
    assert len(product) > 200
    assert not [str(path) for path in product if re.search(r"\.row_group\(", path.read_text())]
