"""Tables follow their dataset: rows of removed samples go, all others keep their bits, and nobody loads a model for that."""

import dataclasses
import hashlib
import io
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from aecore.artifact.commit import claim_of, read_record
from aecore.data.dataset import open_dataset
from aecore.data.format.parquet import footer_sha256
from aecore.data.manifest import ShardRef
from aecore.data.sources.dataset import DatasetSpec
from aecore.data.sources.folder import FolderSpec
from aecore.data.write.compact import compact_dataset
from aecore.data.write.job import shard_dataset
from aecore.data.write.spec import ShardSpec
from aecore.data.write.splits import SplitSpec
from aecore.encoding.job import EncodePlan, EncodeSpec, encode_dataset
from aecore.errors import ConfigError, DataError
from aecore.maintenance.compare import compare
from aecore.maintenance.gc import DAY_S, collect_garbage
from aecore.store import FileRef, LocalStore
from aecore.table import verify as verify_module
from aecore.table.part import part_metadata
from aecore.table.table import LatentTable, open_table
from aecore.table.verify import verify_table
from tests.aecore.data.removals import live_keys, remove
from tests.aecore.encoding import ae_config, encode, folder_dataset, image_folder, saved_run, sprites_dataset, tree, undecodable_png

SPEC = EncodeSpec(batch=16, reconstruction=True, kl=True, sample=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_run(tmp_path_factory.mktemp("follows") / "run")


@pytest.fixture
def data(tmp_path: Path) -> str:
    images = image_folder(image_folder(tmp_path / "images", "train", range(60)), "test", range(60, 80))
    return folder_dataset(images, tmp_path / "dataset", max_samples=20)


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """From here on a model that is loaded fails the test."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was loaded")

    for module in ("job", "worker"):
        monkeypatch.setattr(f"aecore.encoding.{module}.load_model", refuse)
    return monkeypatch


def some(data: str, every: int, split: str = "train") -> list[str]:
    return live_keys(open_dataset(data), split)[::every]


def rows_of(table: LatentTable) -> dict[str, dict[str, Any]]:
    """Return key -> values of a table that do not say where the row stands."""
    columns = {name: table.arrow(name).to_pylist() for name in table.columns if name not in ("shard", "ordinal")}
    return {key: {name: values[row] for name, values in columns.items()} for row, key in enumerate(columns["key"])}


def require_as_fresh(table: LatentTable, run: str, data: str, fresh: Path, spec: EncodeSpec = SPEC) -> None:
    """The table has the rows, to the bit, of a new one of the same dataset, and verifies."""
    new = encode(run, data, fresh, dataclasses.replace(spec, add_columns=()))
    assert rows_of(table) == rows_of(new) != {}
    assert table.num_rows == len(rows_of(table)), "each key once"
    verify_table(table, read_data=True, dataset_url=data)
    verify_table(new, read_data=True, dataset_url=data)


def test_a_table_follows_removals_to_the_bit_and_without_a_model(tmp_path: Path, data: str, run: str, no_model: pytest.MonkeyPatch) -> None:
    with pytest.MonkeyPatch.context():
        no_model.undo()
        old = encode(run, data, tmp_path / "table", SPEC)
    before = tree(tmp_path / "table")
    gone = [*live_keys(open_dataset(data))[2:9], *some(data, 7, "test")]
    remove(data, gone)
    no_model.setattr("aecore.encoding.job.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    new = encode(run, data, tmp_path / "table", SPEC)
    no_model.undo()
    assert new.manifest.number == 2 and new.num_rows == old.num_rows - len(gone)
    assert not {*gone} & {*new.keys.to_pylist()}
    after = tree(tmp_path / "table")
    assert {name: after[name] for name in before} == before, "nothing was deleted or changed"
    touched = {shard.stem: shard.removed.content_sha256 for shard in open_dataset(data).manifest.shards if shard.removed is not None}
    assert touched and {part.stem for part in new.parts if part.shard in touched} == {f"{stem}-t000002" for stem in touched}
    assert {part for part in old.parts if part.shard not in touched} == {part for part in new.parts if part.shard not in touched} != set()
    known = {part.shard: part for part in old.parts}
    for part in new.parts:
        if part.shard in touched:
            said = (part.removed_sha256, part.copied_from)
            assert said == (touched[part.shard], known[part.shard].file.sha256)
            metadata = part_metadata(pq.read_schema(tmp_path / "table" / part.file.name))
            assert (metadata["removed_sha256"], metadata["copied_from"]) == said
            record = read_record(new.store, part.stem)
            assert record is not None and (record.detail["removed_sha256"], record.detail["copied_from"]) == said
    require_as_fresh(new, run, data, tmp_path / "fresh")
    assert encode(run, data, tmp_path / "table", SPEC).manifest == new.manifest, "nothing new"


def test_three_generations_with_appends_and_removals_equal_a_fresh_table(tmp_path: Path, data: str, run: str) -> None:
    encode(run, data, tmp_path / "table", SPEC)
    folder_dataset(image_folder(tmp_path / "images", "train", range(80, 110)), tmp_path / "dataset", max_samples=20)
    remove(data, some(data, 5))
    second = encode(run, data, tmp_path / "table", SPEC)
    assert any(part.stem.endswith("-t000002") and part.copied_from is None for part in second.parts), "new shards that lost samples"
    assert any(part.stem.endswith("-t000002") and part.copied_from is not None for part in second.parts)
    remove(data, some(data, 7))
    table = encode(run, data, tmp_path / "table", SPEC)
    assert table.manifest.number == 3
    require_as_fresh(table, run, data, tmp_path / "fresh")
    for number in (1, 2):
        verify_table(open_table(table.url, number=number), read_data=True)


def test_all_rows_of_a_shard_may_go(tmp_path: Path, data: str, run: str) -> None:
    encode(run, data, tmp_path / "table", SPEC)
    shard = open_dataset(data).manifest.split("train")[0]
    remove(data, open_dataset(data).index(shard)["key"].to_pylist())
    table = encode(run, data, tmp_path / "table", SPEC)
    assert [part.rows for part in table.parts if part.shard == shard.stem] == [0]
    require_as_fresh(table, run, data, tmp_path / "fresh")


def test_ranges_of_a_shard_follow_too(tmp_path: Path, data: str, run: str) -> None:
    spec = dataclasses.replace(SPEC, batch=4, rows_per_part=4)
    encode(run, data, tmp_path / "table", spec)
    keys = live_keys(open_dataset(data))
    for gone in ([*keys[2:9], keys[11], *keys[20:24]], [keys[0], keys[12], keys[25]]):
        remove(data, gone)
        table = encode(run, data, tmp_path / "table", spec)
        require_as_fresh(table, run, data, tmp_path / f"fresh-{len(gone)}", spec)
    (first,) = {part.shard for part in table.parts if part.stem == "train-000000-r000001-t000003"}
    spans = [(part.row_start, part.row_stop) for part in table.parts if part.shard == first]
    assert spans[0] == (0, 1) and spans[1][0] == 1 and spans[-1][1] == open_dataset(data).manifest.split("train")[0].live


@pytest.mark.parametrize("where", ["", "ordinal in (6, 17, 18, 39, 43)", "ordinal >= 19", "ordinal < 3 or ordinal = 11"])
def test_ranges_stay_within_their_size_whatever_was_chosen_of_them(tmp_path: Path, data: str, run: str, where: str) -> None:
    """A shard is cut once: after that ranges only lose rows, however few of them the predicate chose."""
    spec = dataclasses.replace(SPEC, batch=4, rows_per_part=4, where=where, split="train", columns=("mode",))
    known = {part.stem for part in encode(run, data, tmp_path / "table", spec).parts}
    keys = live_keys(open_dataset(data))
    for number, gone in enumerate(([keys[1], keys[19], keys[45]], [], [keys[0], *keys[3:9], keys[44]]), 2):
        spec = spec if gone else dataclasses.replace(spec, add_columns=("width",))
        remove(data, gone)
        table = encode(run, data, tmp_path / "table", spec)
        assert table.manifest.number == number and {part.stem.partition("-t")[0] for part in table.parts} == known
        assert {part.row_stop - part.row_start for part in table.parts} <= {0, 1, 2, 3, 4}
        spec = dataclasses.replace(spec, columns=("mode", "width"), add_columns=()) if not gone else spec
        fresh = tmp_path / f"fresh-{number}"
        require_as_fresh(table, run, data, fresh, spec)
        assert compare(table.url, str(fresh))["same_rows"]


def test_tables_of_ranges_are_compared_by_key_whatever_was_removed_of_one(tmp_path: Path, data: str, run: str) -> None:
    spec = dataclasses.replace(SPEC, batch=4, rows_per_part=4)
    whole = encode(run, data, tmp_path / "whole", spec)
    remove(data, live_keys(open_dataset(data))[:1])
    found = compare(whole.url, encode(run, data, tmp_path / "fresh", spec).url)
    assert [found["keys"][name] for name in ("in_both", "only_in_a", "only_in_b")] == [whole.num_rows - 1, 1, 0]
    assert not any(column["differing_rows"] for column in found["columns"].values())


def test_the_quarantine_goes_with_the_part(tmp_path: Path, run: str) -> None:
    images = image_folder(tmp_path / "images", "train", range(30))
    for name in ("square/bad-1.png", "square/bad-2.png", "square/bad-3.png"):
        (images / "train" / name).write_bytes(undecodable_png())
    data = folder_dataset(images, tmp_path / "dataset", max_samples=40)
    encode(run, data, tmp_path / "table", SPEC)
    remove(data, ["train/square/bad-1", live_keys(open_dataset(data))[3]])
    table = encode(run, data, tmp_path / "table", SPEC)
    assert table.manifest.quarantined == 2
    refused = pq.read_table(tmp_path / "table/quarantine/train-000000-t000002.parquet")
    assert sorted(refused["key"].to_pylist()) == ["train/square/bad-2", "train/square/bad-3"]
    assert table.quarantine().equals(refused), "not that of the part that was replaced too"
    compact_dataset(data, 0)
    table = encode(run, data, tmp_path / "table", SPEC)
    refused = pq.read_table(tmp_path / "table" / table.parts[0].quarantine.name)
    assert {*refused["shard"].to_pylist()} == {table.parts[0].shard} == {open_dataset(data).manifest.shards[0].stem}
    require_as_fresh(table, run, data, tmp_path / "fresh")
    remove(data, ["train/square/bad-2", "train/square/bad-3"])
    table = encode(run, data, tmp_path / "table", SPEC)
    assert table.quarantine().num_rows == 0 and table.quarantine().schema.equals(refused.schema)
    assert table.manifest.quarantined == 0 and not list((tmp_path / "table/quarantine").glob("*-t000004.parquet"))
    require_as_fresh(table, run, data, tmp_path / "fresh-2")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_are_copied_of_every_type(tmp_path: Path, data: str, dtype: Any) -> None:
    run = saved_run(tmp_path / "run", ae_config())
    spec = EncodeSpec(batch=16, dtype=dtype)
    encode(run, data, tmp_path / "table", spec)
    remove(data, some(data, 4))
    require_as_fresh(encode(run, data, tmp_path / "table", spec), run, data, tmp_path / "fresh", spec)


def test_a_part_that_was_changed_is_not_copied(tmp_path: Path, data: str, run: str) -> None:
    table = encode(run, data, tmp_path / "table", SPEC)
    gone = live_keys(open_dataset(data))[0]
    part = next(part for part in table.parts if gone in table.read(part, ["key"])["key"].to_pylist())
    remove(data, [gone])
    path = tmp_path / "table" / part.file.name
    path.write_bytes(bytes([*path.read_bytes()[:-200], 1, *path.read_bytes()[-199:]]))
    with pytest.raises(DataError, match="is damaged: sha256"):
        encode(run, data, tmp_path / "table", SPEC)
    assert not (tmp_path / "table/table.000002.json").exists()


def test_an_attempt_that_was_overtaken_by_removals_does_not_stop_the_next(tmp_path: Path, data: str, run: str) -> None:
    def first_only(record: Any, done: int, total: int) -> None:
        raise KeyboardInterrupt

    for number in range(3):  # once before the first generation, then between two
        with pytest.raises(KeyboardInterrupt):
            encode_dataset(run, data, str(tmp_path / "table"), SPEC, on_part=first_only)
        remove(data, live_keys(open_dataset(data))[number:40:7])
        if number == 1:
            encode(run, data, tmp_path / "table", SPEC)
            remove(data, live_keys(open_dataset(data))[1:50:9])
    table = encode(run, data, tmp_path / "table", SPEC)
    require_as_fresh(table, run, data, tmp_path / "fresh")
    collect_garbage(table.url, now=time.time() + 30 * DAY_S, unfinished=True, keep_generations=1)
    verify_table(open_table(table.url), read_data=True, dataset_url=data)
    left = {path.name for path in (tmp_path / "table/data").rglob("*.parquet")}
    assert left == {Path(part.file.name).name for part in table.parts}


def test_a_dry_run_says_what_is_encoded_and_what_copied(tmp_path: Path, data: str, run: str) -> None:
    encode(run, data, tmp_path / "table", SPEC)
    remove(data, some(data, 30))
    plan = encode_dataset(run, data, str(tmp_path / "table"), SPEC, dry_run=True)
    assert isinstance(plan, EncodePlan)
    assert (plan.to_dict()["new_parts"], plan.to_dict()["new_rows"], plan.to_dict()["copied_parts"]) == (0, 0, 2)


def test_a_table_of_before_keeps_its_rule_and_follows(tmp_path: Path, data: str, run: str) -> None:
    old = dataclasses.replace(SPEC, bits=1, columns=("metadata",))
    first = encode(run, data, tmp_path / "table", old)
    assert not {"bits", "index_columns", "where", "split"} & first.manifest.identity.keys()
    assert "bits" not in part_metadata(first.schema_of(first.parts[0]))
    folder_dataset(image_folder(tmp_path / "images", "train", range(80, 90)), tmp_path / "dataset", max_samples=20)
    remove(data, some(data, 6))
    table = encode(run, data, tmp_path / "table", SPEC)  # with the defaults of today
    assert table.manifest.identity == first.manifest.identity
    assert table.columns == first.columns
    verify_table(table, read_data=True, dataset_url=data)
    known = rows_of(first)
    assert all(row == known[key] for key, row in rows_of(table).items() if key in known)


def test_a_table_of_a_source_that_changes_equals_that_of_a_fresh_dataset(tmp_path: Path, data: str, run: str) -> None:
    """Files are added, changed, moved to another class and deleted: rows and bits are those of a new dataset's new table."""
    images, spec = tmp_path / "images", SPEC
    for step in range(3):
        table = encode(run, data, tmp_path / "table", spec)
        files = sorted((images / "train").rglob("*.png"))
        files[step].unlink()
        shutil.copy(files[10 + step], files[20 + step])
        files[30].rename(files[30].parents[1] / files[45].parent.name / f"moved-{step}.png")
        image_folder(images, "train", range(80 + 5 * step, 85 + 5 * step))
        folder_dataset(images, tmp_path / "dataset", max_samples=20)
        table = encode(run, data, tmp_path / "table", spec)
        fresh = folder_dataset(images, tmp_path / f"fresh-data-{step}", max_samples=33)
        new = encode(run, fresh, tmp_path / f"fresh-{step}", spec)
        places = ("label",)  # numbers of classes
        found, right = (
            {key: {n: v for n, v in row.items() if n not in places} for key, row in rows_of(each).items()} for each in (table, new)
        )
        assert found == right and len(found) == table.num_rows == open_dataset(data).manifest.num_samples()
        verify_table(table, read_data=True, dataset_url=data)
    assert table.manifest.number == 4


# --- columns

ALWAYS = ["key", "shard", "ordinal", "label", "label_name", "group", "length"]


def test_all_columns_of_the_index_go_along_by_default(tmp_path: Path, data: str, run: str) -> None:
    table = encode(run, data, tmp_path / "table")
    assert list(table.columns) == [*ALWAYS, "source", "sample_sha256", "width", "height", "mode", "mu", "log_var"]
    index = {row["key"]: row for shard in open_dataset(data).manifest.shards for row in open_dataset(data).index(shard).to_pylist()}
    for key, row in rows_of(table).items():
        names = {"sample_sha256": "sha256"}
        assert all(row[name] == index[key][names.get(name, name)] for name in ("source", "sample_sha256", "width", "mode", "label_name"))


def test_columns_are_chosen_and_are_part_of_the_identity(tmp_path: Path, data: str, run: str) -> None:
    spec = EncodeSpec(batch=16, columns=("width", "source"))
    table = encode(run, data, tmp_path / "table", spec)
    assert list(table.columns) == [*ALWAYS, "source", "width", "mu", "log_var"]
    verify_table(table, read_data=True, dataset_url=data)
    with pytest.raises(ConfigError, match=r"encode.columns: there \['width', 'source'\], asked \['mode'\]"):
        encode(run, data, tmp_path / "table", EncodeSpec(batch=16, columns=("mode",)))
    with pytest.raises(ConfigError, match="encode.columns names 'widht', .*(did you mean|nearest).*'?width"):
        encode(run, data, tmp_path / "other", EncodeSpec(batch=16, columns=("widht",)))


@pytest.mark.parametrize(("before", "rows_per_part"), [(("metadata",), 0), (("mode",), 0), (("metadata",), 16)])
def test_columns_are_added_without_the_model(
    tmp_path: Path, data: str, run: str, before: Any, rows_per_part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = dataclasses.replace(SPEC, columns=before, rows_per_part=rows_per_part)
    old = encode(run, data, tmp_path / "table", spec)
    adding = dataclasses.replace(spec, columns=EncodeSpec().columns, add_columns=("source", "width"))
    with monkeypatch.context() as patch:
        patch.setattr("aecore.encoding.job.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
        new = encode(run, data, tmp_path / "table", adding)
    assert new.manifest.number == 2 and {*new.columns} - {*old.columns} == {"source", "width"}
    known, found = rows_of(old), rows_of(new)
    assert known.keys() == found.keys() and all(known[key].items() <= found[key].items() for key in known)
    verify_table(new, read_data=True, dataset_url=data)
    verify_table(open_table(old.url, number=1), read_data=True, dataset_url=data)
    assert encode(run, data, tmp_path / "table", adding).manifest == new.manifest, "they are there"
    folder_dataset(image_folder(tmp_path / "images", "train", range(80, 90)), tmp_path / "dataset", max_samples=20)
    remove(data, some(data, 8))
    table = encode(run, data, tmp_path / "table", dataclasses.replace(adding, add_columns=()))
    fresh = dataclasses.replace(spec, columns=(*before, "source", "width"))
    assert table.manifest.number == 3
    require_as_fresh(table, run, data, tmp_path / "fresh", fresh)


def test_columns_are_added_where_there_is_a_table_that_lacks_them(tmp_path: Path, data: str, run: str) -> None:
    with pytest.raises(ConfigError, match="no table to which columns"):
        encode_dataset(run, data, str(tmp_path / "table"), EncodeSpec(add_columns=("source",)))
    table = encode(run, data, tmp_path / "table", SPEC)
    assert encode(run, data, tmp_path / "table", dataclasses.replace(SPEC, add_columns=("source",))).manifest == table.manifest


def test_a_killed_addition_of_columns_does_not_stop_the_table(tmp_path: Path, data: str, run: str) -> None:
    spec = dataclasses.replace(SPEC, columns=("metadata",))
    encode(run, data, tmp_path / "table", spec)
    folder_dataset(image_folder(tmp_path / "images", "train", range(80, 100)), tmp_path / "dataset", max_samples=20)

    def stop(record: Any, done: int, total: int) -> None:
        if done == total - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_dataset(run, data, str(tmp_path / "table"), dataclasses.replace(spec, add_columns=("source",)), on_part=stop)
    verify_table(open_table(str(tmp_path / "table")), read_data=True)  # what the attempt left is noted
    table = encode(run, data, tmp_path / "table", spec)
    assert "source" not in table.columns
    require_as_fresh(table, run, data, tmp_path / "fresh", spec)


# --- split and where


def test_one_split_is_encoded(tmp_path: Path, data: str, run: str) -> None:
    spec = EncodeSpec(batch=16, split="test")
    table = encode(run, data, tmp_path / "table", spec)
    assert {*table.keys.to_pylist()} == {*live_keys(open_dataset(data), "test")}
    verify_table(table, read_data=True, dataset_url=data)
    remove(data, [*some(data, 9), *some(data, 9, "test")])
    require_as_fresh(encode(run, data, tmp_path / "table", spec), run, data, tmp_path / "fresh", spec)
    with pytest.raises(ConfigError, match="encode.split: there 'test', asked ''"):
        encode(run, data, tmp_path / "table")
    with pytest.raises(ConfigError, match="encode.split is 'tset'.*test"):
        encode(run, data, tmp_path / "other", EncodeSpec(split="tset"))


@pytest.mark.parametrize("rows_per_part", [0, 16])
def test_chosen_rows_have_the_bits_of_the_whole_table_and_follow(tmp_path: Path, data: str, run: str, rows_per_part: int) -> None:
    whole = encode(run, data, tmp_path / "whole", SPEC)
    spec = dataclasses.replace(SPEC, where="label_name in ('ellipse', \"square\") and not width < 3", rows_per_part=rows_per_part)
    table = encode(run, data, tmp_path / "table", spec)
    expected = {key: row for key, row in rows_of(whole).items() if row["label_name"] in ("ellipse", "square")}
    assert rows_of(table) == expected and 0 < len(expected) < whole.num_rows
    verify_table(table, read_data=True, dataset_url=data)
    folder_dataset(image_folder(tmp_path / "images", "train", range(80, 90)), tmp_path / "dataset", max_samples=20)
    remove(data, some(data, 4))
    require_as_fresh(encode(run, data, tmp_path / "table", spec), run, data, tmp_path / "fresh", spec)
    with pytest.raises(ConfigError, match="encode.where: there .*, asked ''"):
        encode(run, data, tmp_path / "table", SPEC)
    with pytest.raises(DataError, match="encode.where='width > 1000' chooses no sample"):
        encode(run, data, tmp_path / "none", EncodeSpec(where="width > 1000"))
    with pytest.raises(ConfigError, match="names a column 'widht' that no index of the dataset has.*width"):
        encode(run, data, tmp_path / "other", EncodeSpec(where="widht > 3"))


def test_verify_finds_rows_that_the_predicate_does_not_choose(tmp_path: Path, data: str, run: str) -> None:
    table = encode(run, data, tmp_path / "table", dataclasses.replace(SPEC, where="label_name = 'square'"))
    identity = {**table.manifest.identity, "where": "label_name = 'heart'"}
    other = LatentTable(table.store, dataclasses.replace(table.manifest, identity=identity))
    with pytest.raises(DataError, match=r"it has where \"label_name = 'square'\"(.|\n)*the keys differ from those in"):
        verify_table(other, dataset_url=data)


# --- bits


def test_the_bits_of_a_row_depend_on_no_other_row_and_on_no_place(tmp_path: Path, run: str) -> None:
    """Ninety samples in shards of 90, 37 and 7, and after removals: the same bits of each."""
    images = image_folder(tmp_path / "images", "train", range(90))
    found = []
    for max_samples in (90, 37, 7):
        data = folder_dataset(images, tmp_path / f"data-{max_samples}", max_samples=max_samples)
        found.append(rows_of(encode(run, data, tmp_path / f"table-{max_samples}", EncodeSpec(batch=64, sample=True, kl=True))))
    remove(data, some(data, 3))
    found.append(rows_of(encode(run, data, tmp_path / "left", EncodeSpec(batch=64, sample=True, kl=True))))
    differing = [[key for key in rows if rows[key] != found[0][key]] for rows in found]
    assert [len(rows) for rows in found] == [90, 90, 90, 60] and differing == [[], [], [], []]


# --- readers of generations that are collected


def three_generations(tmp_path: Path, data: str, run: str) -> LatentTable:
    encode(run, data, tmp_path / "table", SPEC)
    for every in (9, 5):
        remove(data, some(data, every))
        table = encode(run, data, tmp_path / "table", SPEC)
    return table


def collect(table: LatentTable, days: float = 8, **options: Any) -> list[str]:
    return [item.name for item in collect_garbage(table.url, now=time.time() + days * DAY_S, **options).garbage]


def test_gc_removes_replaced_parts_after_their_retention_and_never_those_of_kept_generations(tmp_path: Path, data: str, run: str) -> None:
    table = three_generations(tmp_path, data, run)
    named = [{ref.name for ref in open_table(table.url, number=number).manifest.files} for number in (1, 2, 3)]
    assert collect(table, 6.9) == [] == collect(table, 30, retention_s=31 * DAY_S) == collect(table, 8, keep_generations=3)
    report = collect_garbage(table.url, now=time.time() + 6 * DAY_S)
    assert [waiting.what for waiting in report.waiting] == ["replaced parts"]
    gone = {name for name in collect(table, 8) if name.startswith("data/")}
    assert gone == named[0] - named[1] - named[2] != set(), "generation 2 is one of the two that are kept"
    for number in (2, 3):
        verify_table(open_table(table.url, number=number), read_data=True)
    assert {name for name in collect(table, 8, keep_generations=1) if name.startswith("data/")} == named[1] - named[2] != set()
    assert collect(table, 8, keep_generations=1) == []
    verify_table(open_table(table.url), read_data=True, dataset_url=data)
    with pytest.raises(ConfigError, match="keep_generations is 0"):
        collect_garbage(table.url, keep_generations=0)
    remove(data, some(data, 4))
    require_as_fresh(encode(run, data, tmp_path / "table", SPEC), run, data, tmp_path / "fresh")


READS = {
    "numpy": lambda table: table.numpy("mu"),
    "torch": lambda table: table.torch("mu"),
    "keys": lambda table: np.array(table.keys.to_pylist()),
    "dataset": lambda table: np.array(table.dataset().to_table()["key"].to_pylist()),
    "lineage": lambda table: np.array(list(table.lineage(table.keys[0].as_py()))),
    "columns": lambda table: np.array(table.columns),
}


@pytest.mark.parametrize("read", READS)
def test_a_reader_of_which_nothing_was_asked_yet_goes_on_with_the_newest(tmp_path: Path, data: str, run: str, read: str) -> None:
    encode(run, data, tmp_path / "table", SPEC)
    opened, pinned = open_table(str(tmp_path / "table")), open_table(str(tmp_path / "table"), number=1)
    split = open_table(str(tmp_path / "table")).select("test")
    scanned, used = open_table(str(tmp_path / "table")), open_table(str(tmp_path / "table"))
    scan = scanned.dataset()
    used.numpy("kl")
    table = three_generations(tmp_path, data, run)
    assert collect(table, 8, keep_generations=1)
    assert np.array_equal(READS[read](opened), READS[read](table)) and opened.manifest.number == table.manifest.number
    assert np.array_equal(READS[read](split), READS[read](table.select("test")))
    for expired in (pinned, open_table(table.url, number=1), used):
        with pytest.raises(DataError, match=f"generation 1 has expired .*: open the newest, which is {table.manifest.number}"):
            READS["numpy"](expired)
    with pytest.raises(DataError, match="generation 1 has expired .*: open the newest"):
        scan.to_table()


def test_a_file_that_is_lost_is_still_damage(tmp_path: Path, data: str, run: str) -> None:
    table = three_generations(tmp_path, data, run)
    (tmp_path / "table" / table.parts[0].file.name).unlink()
    with pytest.raises(DataError, match="is missing: the manifest names it"):
        open_table(table.url).numpy("mu")


# --- verify


def forged(table: LatentTable, part: int, **changes: Any) -> LatentTable:
    parts = list(table.manifest.parts)
    parts[part] = dataclasses.replace(parts[part], **changes)
    return LatentTable(table.store, dataclasses.replace(table.manifest, parts=tuple(parts)))


def test_verify_compares_what_a_copy_states(tmp_path: Path, data: str, run: str) -> None:
    table = three_generations(tmp_path, data, run)
    number = next(number for number, part in enumerate(table.parts) if part.copied_from)
    with pytest.raises(DataError, match="follows the removal 000000000000 of its shard, the dataset has"):
        verify_table(forged(table, number, removed_sha256="0" * 64), dataset_url=data)
    with pytest.raises(DataError, match="follows the removal none of its shard"):
        verify_table(forged(table, number, removed_sha256=None), dataset_url=data)
    with pytest.raises(DataError, match="copied from a part with the sha256 000000000000, which no generation before names"):
        verify_table(forged(table, number, copied_from="0" * 64), read_data=True, dataset_url=data)
    stale = open_table(table.url, number=1).manifest
    with pytest.raises(DataError, match="follows the removal none of its shard"):
        verify_table(LatentTable(table.store, dataclasses.replace(table.manifest, parts=stale.parts)), dataset_url=data)


def test_verify_finds_copied_rows_with_other_values(tmp_path: Path, data: str, run: str) -> None:
    encode(run, data, tmp_path / "table", SPEC)
    remove(data, some(data, 9))
    other = saved_run(tmp_path / "other", seed=3)
    made = encode(other, data, tmp_path / "made", SPEC)
    table = encode(run, data, tmp_path / "table", SPEC)
    number = next(number for number, part in enumerate(table.parts) if part.copied_from)
    values = made.read(made.parts[number])["mu"]
    part = table.parts[number]
    path = tmp_path / "table" / part.file.name
    rows = pq.read_table(path)
    pq.write_table(rows.set_column(rows.column_names.index("mu"), "mu", values), path, write_page_checksum=True)
    content = path.read_bytes()
    file = FileRef(part.file.name, len(content), hashlib.sha256(content).hexdigest())
    table = forged(table, number, file=file, footer_sha256=footer_sha256(io.BytesIO(content)))
    with pytest.raises(DataError, match="the values of mu differ from those in .*, from which it was copied"):
        verify_table(table, read_data=True, dataset_url=data)


def test_a_table_follows_a_compaction_to_the_bit_and_without_a_model(
    tmp_path: Path, data: str, run: str, no_model: pytest.MonkeyPatch
) -> None:
    with pytest.MonkeyPatch.context():
        no_model.undo()
        old = encode(run, data, tmp_path / "table", SPEC)
    keys = live_keys(open_dataset(data))
    remove(data, [*keys[:15], *keys[20:40], *some(data, 9, "test")])  # most of a shard, and all of one
    compact_dataset(data, 0.5)
    remove(data, [keys[16]])
    compact_dataset(data, 0.1)
    remove(data, [keys[17]])
    number = open_dataset(data).number
    no_model.setattr("aecore.encoding.job.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    new = encode(run, data, tmp_path / "table", SPEC)
    no_model.undo()
    shards = open_dataset(data).manifest.shards
    assert [part.shard for part in new.parts] == [shard.stem for shard in shards], "of a shard of which nothing is left there is no part"
    assert {part.shard for part in old.parts} - {shard.stem for shard in shards}
    assert all(part.copied_from is not None for part in new.parts if part.stem.endswith("-t000002")) and new.manifest.number == 2
    assert {part.stem for part in old.parts} & {part.stem for part in new.parts}, "a shard that lost nothing keeps its part"
    require_as_fresh(new, run, data, tmp_path / "fresh")
    assert encode(run, data, tmp_path / "table", SPEC).manifest == new.manifest, "nothing new"
    collect_garbage(data, keep_generations=1, retention_s=0, older_than_s=0, now=time.time() + DAY_S)
    verify_table(open_table(new.url), read_data=True)
    assert rows_of(open_table(new.url)) == rows_of(encode(run, data, tmp_path / "fresh", SPEC))
    shutil.move(data, tmp_path / "elsewhere")
    verify_table(open_table(new.url), read_data=True)
    assert number == open_dataset(str(tmp_path / "elsewhere")).number


def test_ranges_of_a_compacted_shard_follow_too(tmp_path: Path, data: str, run: str) -> None:
    spec = dataclasses.replace(SPEC, batch=4, rows_per_part=4)
    encode(run, data, tmp_path / "table", spec)
    keys = live_keys(open_dataset(data))
    for gone in ([*keys[2:9], keys[11], *keys[20:24], *keys[40:60]], [keys[0], keys[12], keys[25]]):
        remove(data, gone)
        compact_dataset(data, 0)
        table = encode(run, data, tmp_path / "table", spec)
        require_as_fresh(table, run, data, tmp_path / f"fresh-{len(gone)}", spec)
    assert {part.stem.rpartition("-t")[2] for part in table.parts if part.copied_from is not None} >= {"000003"}


def test_a_table_that_names_another_shard_than_its_dataset_retired_does_not_verify(tmp_path: Path, data: str, run: str) -> None:
    encode(run, data, tmp_path / "table", SPEC)
    keys = live_keys(open_dataset(data))
    remove(data, [*keys[:15], *keys[20:35]])
    compact_dataset(data, 0.5)
    table = encode(run, data, tmp_path / "table", SPEC)
    heirs = open_dataset(data).manifest.heirs()
    assert len(heirs) == 2
    wrong = dict(zip(heirs, reversed(heirs.values()), strict=True))
    (first, *_) = [part for part in table.parts if part.copied_from is not None]
    (source,) = [part for part in open_table(table.url, number=1).parts if part.file.sha256 == first.copied_from]
    rows = pq.read_table(tmp_path / "table" / first.file.name)
    sources = {source.file.sha256: source}
    assert [*verify_module._copy_problems(table, first, rows, sources, heirs)] == []
    assert "of another shard" in [*verify_module._copy_problems(table, first, rows, sources, wrong)][0]


def test_a_table_has_none_of_the_samples_whose_content_others_have(tmp_path: Path, run: str) -> None:
    images, out = image_folder(tmp_path / "images", "train", range(12)), str(tmp_path / "dataset")
    first = min(images.rglob("*.png"))
    for name in ("zz", "zy"):
        shutil.copyfile(first, first.with_name(f"{name}.png"))

    def follow() -> LatentTable:
        shard_dataset(FolderSpec(url=str(images)), out, SplitSpec(), ShardSpec(max_samples=8, duplicates="drop"))
        return encode(run, out, tmp_path / "table", SPEC)

    table = follow()
    assert (table.num_rows, open_dataset(out).manifest.num_samples()) == (12, 12)
    require_as_fresh(table, run, out, tmp_path / "fresh-1")
    first.unlink()
    table = follow()
    assert table.num_rows == 12
    assert [key for key in rows_of(table) if "/z" in key] == [f"train/{first.parent.name}/zy"]
    require_as_fresh(table, run, out, tmp_path / "fresh-2")


def test_a_table_follows_a_compaction_of_shards_with_different_columns(tmp_path: Path, data: str, run: str) -> None:
    more = sprites_dataset(tmp_path / "sprites", num_samples=40, max_samples=20)  # whose index has factors
    out = str(tmp_path / "merged")
    for url in (data, f"{data}::{more}"):
        shard_dataset(DatasetSpec(url=url, name="all"), out, SplitSpec(by="folders"), ShardSpec(max_samples=20))
    encode(run, out, tmp_path / "table", SPEC)
    dataset = open_dataset(out)
    remove(out, [key for shard in dataset.manifest.split("train") for key in dataset.index(shard)["key"].to_pylist()[:12]])
    compact_dataset(out, 0.3)
    shards = [shard for shard in open_dataset(out).manifest.split("train") if shard.lost]
    claims, columns = ({each(shard) for shard in shards} for each in (lambda shard: claim_of(shard.stem), _columns(out)))
    assert len(claims) == 1 < len(columns), "one claim wrote shards with different columns"
    table = encode(run, out, tmp_path / "table", SPEC)
    assert "factor_scale" in table.columns
    require_as_fresh(table, run, out, tmp_path / "fresh")


def _columns(data: str) -> Callable[[ShardRef], frozenset[str]]:
    return lambda shard: frozenset(open_dataset(data).index(shard).column_names)


def test_gc_asks_for_no_part_that_was_collected_before(tmp_path: Path, data: str, run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table = three_generations(tmp_path, data, run)
    gone = {*collect(table, 8)}
    asked, size = list[str](), LocalStore.size

    def sized(store: LocalStore, name: str) -> int | None:
        asked.append(name)
        return size(store, name)

    monkeypatch.setattr(LocalStore, "size", sized)
    assert gone and collect(table, 8) == [] and not gone & {*asked}
