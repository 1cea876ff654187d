"""LatentTable: typed for every reader, shared memory where it can be, damage found, every row traced."""

import dataclasses
import json
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from aecore.artifact.documents import sealed
from aecore.data.dataset import open_dataset
from aecore.data.format.parquet import read_parquet
from aecore.encoding.job import EncodeSpec
from aecore.errors import DataError
from aecore.store import AlreadyExists, open_store
from aecore.table.manifest import TableManifest
from aecore.table.part import commit_part, fixed_size_list, numpy_view, part_table
from aecore.table.table import LatentTable, open_table
from aecore.table.verify import verify_table
from tests.aecore.encoding import DIM, encode, saved_run, sprites_dataset
from tests.documents import content, rewrite
from tests.processes import WARM
from tests.processes import run as run_process

NUM = 120


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return sprites_dataset(tmp_path_factory.mktemp("table") / "dataset", NUM)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_run(tmp_path_factory.mktemp("table") / "run")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory, data: str, run: str) -> LatentTable:
    return encode(run, data, tmp_path_factory.mktemp("table") / "table", EncodeSpec(batch=16, kl=True))


@pytest.fixture
def own_table(tmp_path: Path, data: str, run: str) -> LatentTable:
    """A table that a test may damage."""
    return encode(run, data, tmp_path / "table")


def path_of(table: LatentTable, part: int = 0) -> Path:
    return Path(table.url) / table.parts[part].file.name


def files_of(table: LatentTable) -> list[str]:
    return [str(Path(table.url) / part.file.name) for part in table.parts]


def test_columns_have_the_types_that_all_readers_take(table: LatentTable) -> None:
    schema = table.schema
    assert schema.field("mu").type == schema.field("log_var").type == pa.list_(pa.float32(), DIM)
    expected = {
        "key": pa.string(),
        "shard": pa.string(),
        "ordinal": pa.int64(),
        "label": pa.int32(),
        "label_name": pa.string(),
        "kl": pa.float32(),
    }
    assert {name: schema.field(name).type for name in expected} == expected


def test_dictionary_is_on_shard_only_and_statistics_on_key_only(table: LatentTable) -> None:
    group = pq.read_metadata(path_of(table)).row_group(0)
    columns = {group.column(number).path_in_schema: group.column(number) for number in range(group.num_columns)}
    assert [name for name, column in columns.items() if column.has_dictionary_page] == ["shard"]
    assert [name for name, column in columns.items() if column.is_stats_set] == ["key"]
    assert {column.compression for column in columns.values()} == {"ZSTD"}


def test_compression_can_be_off_and_changes_no_value(tmp_path: Path, data: str, run: str, table: LatentTable) -> None:
    plain = encode(run, data, tmp_path / "plain", EncodeSpec(batch=16, compression="none"))
    assert pq.read_metadata(path_of(plain)).row_group(0).column(0).compression == "UNCOMPRESSED"
    assert np.array_equal(plain.numpy("mu"), table.numpy("mu"))


def test_a_part_is_numpy_without_a_copy(table: LatentTable) -> None:
    column = table.read(table.parts[0], ["mu"])["mu"]
    view = numpy_view(column)
    assert view.ctypes.data == column.chunk(0).values.buffers()[1].address
    assert view.shape == (table.parts[0].rows, DIM)
    assert not view.flags.writeable


def test_writing_takes_numpys_memory_without_a_copy() -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    column = fixed_size_list(values)
    assert column.values.buffers()[1].address == values.ctypes.data
    assert column.to_pylist() == values.tolist()


def test_a_table_of_one_part_is_a_view_and_torch_shares_it(tmp_path: Path, data: str, run: str) -> None:
    whole = encode(run, sprites_dataset(tmp_path / "small", 20, 20), tmp_path / "table")
    one = whole.select("test")
    assert len(one.parts) == 1
    array = one.numpy("mu")
    assert not array.flags.owndata
    assert not array.flags.writeable
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(one.torch("mu"), torch.tensor(array.tolist()))


def test_many_parts_become_one_array_in_row_order(table: LatentTable) -> None:
    assert len(table.parts) > 2
    expected = [row for part in table.parts for row in table.read(part, ["mu"])["mu"].to_pylist()]
    assert table.numpy("mu").tolist() == expected
    assert table.numpy("mu").dtype == np.float32
    tensor = table.torch("mu")
    assert tensor.shape == (NUM, DIM)
    assert table.numpy("kl").shape == (NUM,)
    assert table.numpy("label").shape == (NUM,)


def test_float16_is_half_the_bytes_and_rounds_the_float32_values(tmp_path: Path, data: str, run: str, table: LatentTable) -> None:
    half = encode(run, data, tmp_path / "half", EncodeSpec(batch=16, dtype="float16"))
    assert half.schema.field("mu").type == pa.list_(pa.float16(), DIM)
    assert np.array_equal(half.numpy("mu"), table.numpy("mu").astype(np.float16))
    assert half.torch("mu").dtype == torch.float16


def test_select_gives_the_rows_of_one_split_and_names_the_known_ones(table: LatentTable, data: str) -> None:
    test = table.select("test")
    assert test.num_rows == open_dataset(data).manifest.num_samples("test")
    assert test.numpy("mu").shape == (test.num_rows, DIM)
    with pytest.raises(DataError, match="no split 'tets' \\(did you mean 'test'"):
        table.select("tets")


def test_an_unknown_column_names_the_nearest(table: LatentTable) -> None:
    with pytest.raises(DataError, match="no column 'log_va' \\(did you mean 'log_var'"):
        table.numpy("log_va")


def test_pyarrow_dataset_has_split_as_a_column(table: LatentTable) -> None:
    rows = table.dataset().to_table(columns=["key", "split", "mu"])
    assert rows.num_rows == NUM
    assert set(rows["split"].to_pylist()) == {"train", "test"}
    assert rows["key"].to_pylist() == table.keys.to_pylist()


def test_duckdb_opens_it_typed(table: LatentTable) -> None:
    import duckdb

    with duckdb.connect() as connection:
        query = (
            f"select split, count(*), min(len(mu)), max(len(mu)), any_value(typeof(mu)) from '{table.url}/data/**/*.parquet' group by split"
        )
        rows = {row[0]: row[1:] for row in connection.execute(query).fetchall()}
    assert rows["train"][0] + rows["test"][0] == NUM
    assert {row[1:] for row in rows.values()} == {(DIM, DIM, "FLOAT[]")}  # DuckDB drops the length of the type, not the values


def test_polars_opens_it_typed(table: LatentTable) -> None:
    import polars

    frame = polars.read_parquet(f"{table.url}/data/**/*.parquet", hive_partitioning=True).sort("split", "shard", "ordinal")
    assert frame.schema["mu"] == polars.Array(polars.Float32, DIM)
    assert frame.filter(polars.col("split") == "test").height == table.select("test").num_rows
    assert frame["mu"].to_numpy().shape == (NUM, DIM)


def test_pandas_opens_it(table: LatentTable) -> None:
    import pandas

    frame = pandas.read_parquet(f"{table.url}/data")
    assert len(frame) == NUM
    assert set(frame["split"].unique()) == {"train", "test"}
    assert np.stack(frame["mu"].to_list()).shape == (NUM, DIM)


@pytest.mark.filterwarnings("ignore")  # the library's own warnings are not ours to fix
def test_hf_datasets_opens_it_typed(tmp_path: Path, table: LatentTable) -> None:
    import datasets

    loaded: Any = datasets.load_dataset("parquet", data_files=files_of(table), split="train", cache_dir=str(tmp_path))
    assert loaded.num_rows == NUM
    assert loaded.features["mu"].length == DIM
    assert loaded.features["mu"].feature.dtype == "float32"
    assert loaded.with_format("torch")[0]["mu"].shape == (DIM,)


def test_every_row_is_traced_to_shard_dataset_and_checkpoint(table: LatentTable, data: str) -> None:
    dataset = open_dataset(data)
    for shard in dataset.manifest.shards:
        for key, ordinal in zip(dataset.reader(shard).keys[::11], dataset.reader(shard).index["ordinal"].to_pylist()[::11], strict=True):
            row = table.lineage(key)
            assert row["shard"] == {"split": shard.split, "stem": shard.stem, "sha256": shard.tar.sha256}
            assert row["ordinal"] == ordinal
            assert row["dataset"]["sha256"] == dataset.manifest.dataset_sha256
            assert row["checkpoint"]["sha256"] == row["produced_by"]["checkpoint_sha256"]
    with pytest.raises(DataError, match="no row with the key 'nobody'"):
        table.lineage("nobody")


def test_the_manifest_survives_json(table: LatentTable) -> None:
    manifest = table.manifest
    assert TableManifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest


def test_verify_counts_rows_and_quarantine_against_the_dataset(table: LatentTable, data: str) -> None:
    report = verify_table(table, read_data=True, dataset_url=data)
    assert (report.num_rows, report.quarantined, report.parts) == (NUM, 0, len(table.parts))
    assert verify_table(table).read_data is False


def test_verify_follows_the_lineage_and_says_where_it_ended(table: LatentTable, data: str) -> None:
    report = verify_table(table)
    assert report.dataset == data
    assert report.checkpoint == table.manifest.lineage["checkpoint"]["url"]
    elsewhere = {**table.manifest.lineage, "dataset": {**table.manifest.lineage["dataset"], "url": "/moved/away"}}
    moved = LatentTable(table.store, dataclasses.replace(table.manifest, lineage=elsewhere))
    assert verify_table(moved).dataset is None
    assert verify_table(moved, dataset_url=data).dataset == data


def test_verify_finds_another_checkpoint_in_the_place_of_the_first(table: LatentTable, tmp_path: Path) -> None:
    lineage = {**table.manifest.lineage, "checkpoint": {**table.manifest.lineage["checkpoint"], "url": str(tmp_path)}}
    moved = LatentTable(table.store, dataclasses.replace(table.manifest, lineage=lineage))
    assert verify_table(moved).checkpoint is None
    (tmp_path / "checkpoint.json").write_bytes(sealed({"step": 1, "files": [], "metrics": [], "best": None, "info": {}}))
    with pytest.raises(DataError, match="is another checkpoint"):
        verify_table(moved)
    (tmp_path / "checkpoint.json").write_text("{}")
    with pytest.raises(DataError, match="checkpoint.json is damaged: it states no sha256"):
        verify_table(moved)


def changed_lineage(table: LatentTable, name: str, **fields: Any) -> LatentTable:
    lineage = {**table.manifest.lineage, name: {**table.manifest.lineage[name], **fields}}
    return LatentTable(table.store, dataclasses.replace(table.manifest, lineage=lineage))


def test_verify_finds_a_lineage_that_is_not_that_of_the_rows(table: LatentTable) -> None:
    unnamed = LatentTable(table.store, dataclasses.replace(table.manifest, lineage={**table.manifest.lineage, "encoded_by": []}))
    cases = {
        r"has dataset_sha256 .*, the lineage names 000000000000": changed_lineage(table, "dataset", sha256="0" * 64),
        r"lineage names the checkpoint with sha256 000000000000, ": changed_lineage(table, "checkpoint", sha256="0" * 64),
        r"has checkpoint_step '0', the manifest '7'": changed_lineage(table, "checkpoint", step=7),
        r"was encoded on 'cpu .*' with versions that the lineage does not name": unnamed,
    }
    for problem, changed in cases.items():
        with pytest.raises(DataError, match=problem):
            verify_table(changed)


def test_verify_finds_another_dataset_in_the_place_of_the_first(table: LatentTable, tmp_path: Path) -> None:
    other = sprites_dataset(tmp_path / "other", NUM // 2)
    with pytest.raises(DataError, match="has dataset_sha256 "):
        verify_table(table, dataset_url=other)


def test_every_flipped_bit_of_the_manifest_is_found(own_table: LatentTable) -> None:
    path = Path(own_table.url) / "table.000001.json"
    good = path.read_bytes()
    assert content(path) == own_table.manifest.to_json()
    generator = np.random.default_rng(0)
    for place in [good.rindex(b'"sha256":') + 2, *generator.integers(0, len(good), 100).tolist()]:
        bad = bytearray(good)
        bad[place] ^= 1 << int(generator.integers(8))
        path.write_bytes(bad)
        with pytest.raises(DataError, match="damaged|upgrade aecore"):
            open_table(own_table.url)
    path.write_bytes(good)
    open_table(own_table.url)


def without_claim(data: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest as the first version wrote it."""
    return {key: value for key, value in data.items() if key not in ("sha256", "claim_sha256")}


def test_a_changed_manifest_is_refused_and_an_early_one_without_a_hash_is_read(own_table: LatentTable) -> None:
    path = Path(own_table.url) / "table.000001.json"
    data = json.loads(path.read_bytes())
    data["lineage"]["run"] = "/somewhere/else"
    path.write_text(json.dumps(data))
    with pytest.raises(DataError, match=r"table.000001.json is damaged"):
        open_table(own_table.url)
    path.write_text(json.dumps({**without_claim(data), "format": 1}))
    assert open_table(own_table.url).manifest.lineage["run"] == "/somewhere/else"


def test_an_unfinished_generation_is_not_part_of_the_table(own_table: LatentTable) -> None:
    rows = own_table.read(own_table.parts[0])
    commit_part(own_table.store, "data/split=train/train-g000002-000000.parquet", rows, compression="none")
    assert pq.read_table(f"{own_table.url}/data").num_rows == NUM + len(rows)
    assert open_table(own_table.url).dataset().to_table().num_rows == NUM


def test_every_flipped_bit_is_found(own_table: LatentTable) -> None:
    path = path_of(own_table, 1)
    good = path.read_bytes()
    generator = np.random.default_rng(0)
    for place in [0, 5, len(good) - 1, *generator.integers(0, len(good), 40).tolist()]:
        bad = bytearray(good)
        bad[place] ^= 1 << int(generator.integers(8))
        path.write_bytes(bad)
        with pytest.raises(DataError):
            verify_table(own_table, read_data=True)
    path.write_bytes(good)
    verify_table(own_table, read_data=True)


def test_a_flipped_bit_in_a_page_raises_where_it_is_read(tmp_path: Path, data: str, run: str) -> None:
    table = encode(run, data, tmp_path / "table", EncodeSpec(batch=16, compression="none"))
    column = next(
        column
        for column in (pq.read_metadata(path_of(table)).row_group(0).column(number) for number in range(30))
        if column.path_in_schema.startswith("mu")
    )
    bad = bytearray(path_of(table).read_bytes())
    bad[column.data_page_offset + column.total_compressed_size - 3] ^= 1
    path_of(table).write_bytes(bad)
    with pytest.raises(DataError, match="is damaged"):
        table.numpy("mu")
    with pytest.raises(OSError, match="CRC"):
        table.dataset().to_table(columns=["mu"])


SHRINKING = """
import os, sys
from pathlib import Path
from aecore.data.format.parquet import open_parquet
file = open_parquet(Path(sys.argv[1]))
os.truncate(sys.argv[1], 4096)
try:
    file.read(use_threads=False)
except Exception as error:
    print(type(error).__name__)
"""


def test_a_file_that_cannot_be_read_any_more_is_an_error_and_no_signal(tmp_path: Path) -> None:
    """As with a read error of a disk: in a memory map both are a SIGBUS, which ends the process."""
    rows = pa.table({"key": [f"{number:09d}" for number in range(20_000)], "mu": np.random.default_rng(0).standard_normal(20_000)})
    pq.write_table(rows, tmp_path / "part.parquet", compression="none", write_page_checksum=True)
    done = run_process([*WARM, "-c", SHRINKING, tmp_path / "part.parquet"])
    assert done.returncode == 0 and done.stdout.split() in (["OSError"], ["ArrowInvalid"]), (done.returncode, done.stdout, done.stderr)


def test_missing_and_truncated_parts_are_found_without_reading_data(own_table: LatentTable) -> None:
    data = path_of(own_table, 0).read_bytes()
    path_of(own_table, 0).write_bytes(data[:-10])
    path_of(own_table, 1).unlink()
    with pytest.raises(DataError, match=r"2 problems:(.|\n)*truncated(.|\n)*is missing"):
        verify_table(own_table)


def test_verify_finds_rows_that_the_manifest_does_not_account_for(own_table: LatentTable, data: str) -> None:
    manifest = own_table.manifest

    def changed(number: int, **fields: Any) -> LatentTable:
        parts = [dataclasses.replace(part, **fields) if place == number else part for place, part in enumerate(manifest.parts)]
        return LatentTable(own_table.store, dataclasses.replace(manifest, parts=tuple(parts)))

    cases = {
        r"32 rows, the manifest says 31": changed(0, rows=31),
        r"32 rows and 1 quarantined of 32 samples": changed(0, quarantined=1),
        r"has shard_sha256 ": changed(0, shard_sha256="0" * 64),
        r"the table covers 0 of them": LatentTable(own_table.store, dataclasses.replace(manifest, parts=manifest.parts[1:])),
        r"overlap or leave rows out": LatentTable(
            own_table.store, dataclasses.replace(manifest, parts=(*manifest.parts, manifest.parts[0]))
        ),
    }
    for problem, table in cases.items():
        with pytest.raises(DataError, match=problem):
            verify_table(table, read_data=True, dataset_url=data)


def test_verify_finds_a_key_that_stands_twice(own_table: LatentTable) -> None:
    first, second = own_table.parts[:2]
    rows = own_table.read(second)
    keys = own_table.read(first)["key"].slice(0, 1).to_pylist() + rows["key"].to_pylist()[1:]
    doubled = rows.set_column(0, rows.schema.field(0), pa.array(keys))
    file, _, footer = commit_part(own_table.store, "data/split=train/doubled.parquet", doubled, compression="none")
    parts = (first, dataclasses.replace(second, file=file, footer_sha256=footer), *own_table.parts[2:])
    with pytest.raises(DataError, match="1 row has a key that another row has too"):
        verify_table(LatentTable(own_table.store, dataclasses.replace(own_table.manifest, parts=parts)), read_data=True)


def test_a_metadata_column_with_the_name_of_ours_is_refused() -> None:
    index = pa.table({"key": ["a"], "ordinal": [0], "mu": [1.5]})
    with pytest.raises(DataError, match="metadata column 'mu'"):
        part_table(index, np.arange(1), "train-000000", {"mu": np.zeros((1, 2), np.float32)}, {})


def test_no_table_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no latent table: check the address, or write one with aecore.encoding.job.encode_dataset"):
        open_table(str(tmp_path))


def test_an_unknown_generation_is_refused(table: LatentTable) -> None:
    with pytest.raises(DataError, match="no generation 7 \\(the newest is 1\\)"):
        open_table(table.url, number=7)


def test_a_manifest_of_something_else_is_refused(tmp_path: Path) -> None:
    open_store(str(tmp_path)).put("table.000001.json", b'{"format":1}', role="manifest")
    with pytest.raises(DataError, match=r"table\.000001\.json is damaged: .* missing: 'columns'"):
        open_table(str(tmp_path))


@pytest.mark.parametrize(("text", "what"), [(b"", "footer"), (b'"torch":', "producer"), (b"checkpoint_sha256", "checkpoint_sha256")])
def test_a_part_with_a_changed_bit_in_what_its_footer_says_is_not_adopted(
    own_table: LatentTable, tmp_path: Path, text: bytes, what: str
) -> None:
    """No page checksum covers the footer: a query believes its statistics, the lineage its versions."""
    path = path_of(own_table)
    rows, data = pq.read_table(path, partitioning=None), bytearray(path.read_bytes())
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    found = data.find(min(rows["key"].to_pylist()).encode() if what == "footer" else text, footer)
    assert found > 0
    data[found + len(text) + 1 if what == "producer" else found] ^= 1
    name = "data/split=train/train-000000.parquet"
    (tmp_path / "other" / name).parent.mkdir(parents=True)
    (tmp_path / "other" / name).write_bytes(data)
    with pytest.raises(AlreadyExists, match=rf"is another part \(differs in .*{what}"):
        commit_part(open_store(tmp_path / "other"), name, rows, compression="none")
    assert (tmp_path / "other" / name).read_bytes() == data


def answers(table: LatentTable, dataset: Any = None) -> list[Any]:
    """Return what every way to read a table says."""
    dataset = dataset or table.dataset()
    key = table.select("train").keys[-1].as_py()
    filters = (pc.field("key") == key, pc.field("label") == 0, pc.field("ordinal") > 3)
    scans = [dataset.to_table().to_pylist(), *(dataset.to_table(["key", "label"], filter=each).to_pylist() for each in filters)]
    return [*scans, *(table.arrow(name).to_pylist() for name in ("key", "label", "mu")), table.numpy("mu").tolist(), table.lineage(key)]


@pytest.mark.parametrize("name", ["key", "mu", "label"])
def test_a_changed_bit_in_a_page_or_its_header_gives_no_other_rows(name: str) -> None:
    """No checksum covers the header of a page: Arrow itself returns a column of no rows for some of its bits."""
    mu = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(64, dtype=np.float32)), 4)
    table = pa.table({"key": [f"k{row}" for row in range(16)], "mu": mu, "label": pa.array(range(16))})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True, use_dictionary=False)
    data, short = sink.getvalue().to_pybytes(), 0
    column = pq.read_metadata(pa.BufferReader(data)).row_group(0).column(table.column_names.index(name))
    for bit in range(column.data_page_offset * 8, (column.data_page_offset + column.total_compressed_size) * 8):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            found = read_parquet(pa.py_buffer(bytes(changed)), 16, [name])
        except (ValueError, OSError, pa.ArrowException) as error:
            short += "has 0 rows, its footer says 16" in str(error)
        else:
            assert found.equals(table.select([name])), bit
    assert short


def footer_bits(path: Path) -> tuple[bytes, list[int]]:
    """Return the bytes of a file and the numbers of the bits of its footer."""
    data = path.read_bytes()
    return data, list(range(8 * (len(data) - 8 - int.from_bytes(data[-8:-4], "little")), 8 * len(data)))


def with_a_changed_bit(data: bytes, bit: int) -> bytes:
    return data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]


@pytest.mark.parametrize("of_version_1", [False, True])
@pytest.mark.parametrize("opened", ["before", "after"])
def test_a_changed_bit_in_a_footer_changes_no_answer(tmp_path: Path, run: str, opened: str, of_version_1: bool) -> None:
    """No page checksum covers it: a bit of a column's name returned nulls, one of the key's maximum no rows for a filter."""
    first = encode(run, sprites_dataset(tmp_path / "small", 24, 24), tmp_path / "table", EncodeSpec(batch=16, compression="none"))
    if of_version_1:
        manifest = tmp_path / "table/table.000001.json"
        parts = [{name: value for name, value in part.items() if name != "footer_sha256"} for part in content(manifest)["parts"]]
        rewrite(manifest, parts=parts)
    right, part = answers(first), first.select("train").parts[0]
    path, rng = Path(first.url) / part.file.name, random.Random(5)
    data, bits = footer_bits(path)
    at = [8 * data.find(text, bits[0] // 8) for text in (b"label", max(first.select("train").keys.to_pylist()).encode())]
    for bit in (*at, *rng.sample(bits, 75)):
        path.write_bytes(data)
        table = open_table(first.url)
        dataset = table.dataset() if opened == "before" else None
        path.write_bytes(with_a_changed_bit(data, bit))
        with pytest.raises(DataError, match=path.name):
            answers(table, dataset)
    path.write_bytes(data)
    assert answers(open_table(first.url)) == right


def test_a_changed_footer_of_an_unfinished_table_is_not_committed(own_table: LatentTable, data: str, run: str) -> None:
    path = path_of(own_table)
    (Path(own_table.url) / "table.000001.json").unlink()  # as if it had been killed just before
    good, bits = footer_bits(path)
    for bit in random.Random(6).sample(bits, 8):
        path.write_bytes(with_a_changed_bit(good, bit))
        with pytest.raises(DataError, match=path.name):
            encode(run, data, own_table.url)
    path.write_bytes(good)
    assert answers(encode(run, data, own_table.url, EncodeSpec(batch=16))) == answers(own_table)
