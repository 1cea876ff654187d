"""`aepipe verify --read-data` against somebody who changes artefacts and makes all hashes anew: what is stated twice has to agree."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aecore.artifact.documents import sealed
from aecore.data.dataset import open_dataset, read_listings
from aecore.data.format.index import LEDGER_SCHEMA, content_sha256, table_bytes
from aecore.data.format.parquet import footer_sha256
from aecore.data.manifest import shards_sha256 as dataset_sha256
from aecore.data.sources.folder import FolderSpec
from aecore.data.sources.sprites import SpritesSpec
from aecore.data.write.job import shard_dataset
from aecore.data.write.plan import SplitSpec
from aecore.data.write.spec import ShardSpec
from aecore.encoding.job import EncodeSpec, encode_dataset
from aecore.errors import DataError
from aecore.store import FileRef, canonical_json, open_store, sha256_file, sha256_json
from aecore.table.table import LatentTable, open_table
from aecore.table.verify import verify_table
from aecore.training.loop import fit
from aecore.training.verify import verify_run
from pipelines.cli.main import main as aepipe
from pipelines.steps.show import show
from tests.aecore.data.removals import live_keys, remove
from tests.aecore.encoding import image_folder, undecodable_png
from tests.aecore.training import small_job
from tests.documents import content, rewrite

Change = Callable[[Path], None]
PART, OTHER = "data/split=train/train-000000.parquet", "data/split=train/train-000001.parquet"
INDEX = "shards/train-000000.parquet"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset and a table of two generations with a sample in quarantine each, a run of the first; a copy of the dataset from which two
    more generations removed samples; and a dataset split by hash."""
    root = tmp_path_factory.mktemp("forged")
    images = root / "images"

    def shard() -> None:
        shard_dataset(FolderSpec(url=str(images)), str(root / "dataset"), SplitSpec(by="folders"), ShardSpec(max_samples=12, max_bad=0.5))

    def encode() -> None:
        encode_dataset(str(root / "run"), str(root / "dataset"), str(root / "table"), EncodeSpec(batch=16, kl=True))

    image_folder(images, "train", range(0, 80, 4))
    (image_folder(images, "test", range(1, 79, 13)) / "train/square/broken.png").write_bytes(b"\x89PNG broken")
    shard()
    job = small_job(str(root / "dataset"), root / "run", epochs=3, val_split="test", global_batch=16, best=True)
    fit(job)
    encode()
    (image_folder(images, "train", range(2, 80, 14)) / "train/square/white.png").write_bytes(undecodable_png())
    shard()
    encode()
    shutil.copytree(root / "dataset", root / "living")
    first = live_keys(open_dataset(str(root / "living")))
    remove(root / "living", {first[1]: "gone", first[2]: "changed", first[-1]: "gone", "train/square/broken": "retried"})
    remove(root / "living", {first[0]: "relabelled", "train/square/white": "gone"})
    shard_dataset(SpritesSpec(positions=2), str(root / "hashed"), SplitSpec(by="hash", test=0.3), ShardSpec(max_samples=20))
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """A copy that may be changed, as somebody moved it."""
    return Path(shutil.copytree(made, tmp_path / "root"))


Output = Callable[[Path, str], str]


@pytest.fixture
def output_of(made: Path, capsys: pytest.CaptureFixture[str]) -> Output:
    """Return a function that returns what `aepipe verify --read-data` says of a stage below a root; "" if it finds it whole."""

    def run(root: Path, stage: str) -> str:
        where = ["--dataset", str(made / "dataset")] if stage == "table" else []  # a root takes its own
        code, printed = aepipe(["verify", str(root / stage), "--read-data", *where]), capsys.readouterr()
        assert (code, printed.out[:3]) in ((0, "ok\n"), (3, "")), printed
        return printed.err if code else ""

    return run


@pytest.mark.parametrize("stage", ["dataset", "living", "hashed", "run", "table", "."])
def test_what_was_written_has_no_problems(made: Path, output_of: Output, stage: str) -> None:
    assert output_of(made, stage) == ""


def refs_in(data: Any) -> Iterator[dict[str, Any]]:
    if isinstance(data, dict):
        if data.keys() == {"name", "bytes", "sha256"}:
            yield data
        for value in data.values():
            yield from refs_in(value)
    elif isinstance(data, list):
        for value in data:
            yield from refs_in(value)


def settle(folder: Path) -> None:
    """Make all hashes of an artefact anew, as somebody would who hides a change."""
    known: dict[str, str] = {}  # hashes of the identities of claims, before and now
    for path in sorted(folder.glob("run.*.json")):
        known[path.name] = sha256_json(content(path)["identity"])
    for path in sorted(folder.rglob("*.json")):
        data = content(path)
        for ref in refs_in(data):
            file = (path.parent if path.name == "checkpoint.json" and not ref["name"].startswith("metrics/") else folder) / ref["name"]
            if file.exists():
                ref |= {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
        if path.parent.name == "records" and "content_sha256" in data["detail"]:
            removal = folder / f"removed/{data['part']}.parquet"
            rows = removal if removal.exists() else folder / f"shards/{data['part']}.parquet"
            data["detail"]["content_sha256"] = content_sha256(pq.read_table(rows, partitioning=None))
        for part in [part for part in data.get("parts", ()) if "footer_sha256" in part]:
            part["footer_sha256"] = footer_of_part(folder, part["stem"])
        if path.parent.name == "records" and "footer_sha256" in data["detail"]:
            data["detail"]["footer_sha256"] = footer_of_part(folder, data["part"])
        if path.name == "checkpoint.json":
            data["info"]["run_sha256"] = known["run.000001.json"]
        path.write_bytes(sealed(data))
    _settle_manifests(folder, known)


def footer_of_part(folder: Path, stem: str) -> str:
    with next(folder.glob(f"data/*/{stem}.parquet")).open("rb") as file:
        return footer_sha256(file)


def _hashed(shard: dict[str, Any]) -> dict[str, Any]:
    """Return what the hash of a dataset is made of."""
    removed = SimpleNamespace(**shard["removed"]) if "removed" in shard else None
    return {**shard, "tar": FileRef(**shard["tar"]), "removed": removed}


def _settle_manifests(folder: Path, claims: dict[str, str]) -> None:
    parent = None
    for path in sorted(folder.glob("dataset.0*.json")):
        data = content(path)
        for shard in data["shards"]:
            shard["index_content_sha256"] = content_sha256(pq.read_table(folder / shard["index"]["name"], partitioning=None))
        for removed in [part["removed"] for part in (*data["shards"], *data["rejected"]) if "removed" in part]:
            removed["content_sha256"] = content_sha256(pq.read_table(folder / removed["file"]["name"], partitioning=None))
        shards = [
            SimpleNamespace(**_hashed(shard))
            for name in dict.fromkeys(["train", "val", "test", *(shard["split"] for shard in data["shards"])])
            for shard in data["shards"]
            if shard["split"] == name
        ]
        data["dataset_sha256"] = dataset_sha256(shards, data["classes"])
        data["parent_sha256"], parent = parent if data["parent"] else data["parent_sha256"], data["dataset_sha256"]
        data["claim_sha256"] = claims[f"run.{data['listings'][-1]['name'][9:15]}.json"]
        path.write_bytes(sealed(data))
    for path in sorted(folder.glob("table.0*.json")):
        data = content(path)
        if parent is not None and data["parent"]:
            data["parent_sha256"] = parent
        data["claim_sha256"] = sha256_json({"table": data["identity"], "dataset_sha256": data["lineage"]["dataset"]["sha256"]})
        path.write_bytes(sealed(data))
        parent = sha256_file(path)


def edited(pattern: str, change: Callable[[Any], object], *, hide: bool = True) -> Change:
    """Return a forgery of what JSON files say, with or without all hashes that follow."""

    def apply(folder: Path) -> None:
        paths = sorted(folder.glob(pattern))
        assert paths
        for path in paths:
            data = content(path)
            change(data)
            path.write_bytes(sealed(data))
        if hide:
            settle(folder)

    return apply


def both(*changes: Change) -> Change:
    def apply(folder: Path) -> None:
        for change in changes:
            change(folder)

    return apply


def everywhere(setting: str, value: Any) -> Change:
    """Change a setting in the manifests of a dataset and in their claims."""
    return both(edited(DATASETS, put(f"identity.{setting}", value)), edited(CLAIMS, put(f"identity.dataset.{setting}", value)))


def put(key: str, value: Any) -> Callable[[Any], None]:
    """Return what sets a dotted key; a value that can be called gets the old one."""

    def apply(data: Any) -> None:
        *path, last = key.split(".")
        for name in path:
            data = data[int(name)] if isinstance(data, list) else data[name]
        known = data.get(last) if isinstance(data, dict) else data[int(last)]
        data[last if isinstance(data, dict) else int(last)] = value(known) if callable(value) else value

    return apply


def moved(counts: dict[str, int]) -> dict[str, int]:
    """Return counts of which one went from the first name to the last."""
    first, *_, last = counts
    return {**counts, first: counts[first] - 1, last: counts[last] + 1}


def renamed(counts: dict[str, int]) -> dict[str, int]:
    (first, count), *rest = counts.items()
    return dict(rest) | {f"x{first}": count}


OURS: dict[str, Any] = {"use_dictionary": ["shard"], "write_statistics": ["key"], "write_page_checksum": True, "compression": "zstd"}


def part(change: Callable[[pa.Table], pa.Table], names: tuple[str, ...] = (PART,), **options: Any) -> Change:
    """Return a forgery of parts of a table: other rows or columns, or another way to write them."""

    def apply(folder: Path) -> None:
        for name in names:
            rows = change(pq.read_table(folder / name, partitioning=None))
            columns = {**OURS, "row_group_size": len(rows), **options}
            pq.write_table(rows, folder / name, **columns)
        settle(folder)

    return apply


def rows_of(name: str, change: Callable[[pa.Table], pa.Table], metadata: Callable[[Any], Any] = dict, **options: Any) -> Change:
    """Return a forgery of an index, a quarantine or a listing."""

    def apply(folder: Path) -> None:
        path = next(folder.glob(name))
        known = pq.read_table(path, partitioning=None)
        rows = change(known)
        path.write_bytes(table_bytes(rows, metadata(json.loads(known.schema.metadata[b"aecore"]))))
        if options:
            pq.write_table(pq.read_table(path, partitioning=None), path, **options)
        settle(folder)

    return apply


def with_column(name: str, make: Callable[[Any], Any]) -> Callable[[pa.Table], pa.Table]:
    """Return what replaces a column by what `make` makes of its values."""

    def apply(rows: pa.Table) -> pa.Table:
        at = rows.schema.get_field_index(name)
        field = rows.schema.field(at)
        return rows.set_column(at, field, pa.array(make(rows.column(name).to_pylist()), field.type))

    return apply


def same(rows: pa.Table) -> pa.Table:
    return rows


def replaced(first: Any) -> Callable[[list[Any]], list[Any]]:
    """Return what puts another value in the place of the first."""
    return lambda values: [first(values[0]) if callable(first) else first, *values[1:]]


def with_metadata(**changes: str | None) -> Callable[[pa.Table], pa.Table]:
    def apply(rows: pa.Table) -> pa.Table:
        known = {key.decode(): value.decode() for key, value in rows.schema.metadata.items()}
        known |= {f"aecore.{name}": value for name, value in changes.items() if value is not None}
        return rows.replace_schema_metadata({key: value for key, value in known.items() if changes.get(key[7:], "") is not None})

    return apply


def added(place: int) -> Callable[[pa.Table], pa.Table]:
    return lambda rows: rows.add_column(place if place >= 0 else rows.num_columns, "note", pa.array(["x"] * len(rows)))


def swapped_samples(index: pa.Table) -> pa.Table:
    """Exchange the class names of the first sample and of one of another class."""
    names = index.column("label_name").to_pylist()
    other = next(row for row, name in enumerate(names) if name != names[0])
    names[0], names[other] = names[other], names[0]
    return with_column("label_name", lambda _: names)(index)


def other_metrics(folder: Path) -> None:
    path = min((folder / "metrics").iterdir())
    rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    rows[0]["step"] += 1
    path.write_bytes(b"".join(canonical_json(row) + b"\n" for row in rows))
    settle(folder)


def other_config(folder: Path) -> None:
    path = folder / "model/config.json"
    rewrite(path, transform={**content(path)["transform"], "scale": "symmetric"})
    settle(folder)


def other_refused(folder: Path) -> None:
    path = next((folder / "quarantine").iterdir())
    rows = with_column("sha256", replaced("0" * 64))(pq.read_table(path, partitioning=None))
    pq.write_table(rows, path, compression="none", write_page_checksum=True)
    settle(folder)


def other_removed(name: str) -> Change:
    """Return a forgery that removes another sample of a part in the place of one that was removed."""

    def apply(folder: Path) -> None:
        path = folder / name
        known, index = pq.read_table(path, partitioning=None), pq.read_table(folder / INDEX, partitioning=None)
        gone = known["ordinal"].to_pylist()
        row = [row for row in index.select(["ordinal", "key"]).to_pylist() if row["ordinal"] not in gone][-1]
        rows = [{**row, "reason": "gone"}, *(each for each in known.to_pylist() if each["key"] not in unrefused(index, known)[:1])]
        rows.sort(key=lambda row: row["ordinal"])
        path.write_bytes(
            table_bytes(pa.Table.from_pylist(rows, known.schema.remove_metadata()), json.loads(known.schema.metadata[b"aecore"]))
        )
        settle(folder)

    return apply


def unrefused(index: pa.Table, removed: pa.Table) -> list[str]:
    keys = set(index["key"].to_pylist())
    return [key for key in removed["key"].to_pylist() if key in keys]


def listed_again(name: str, value: Any) -> Change:
    """Return a forgery that lists a live sample again with another value."""

    def apply(folder: Path) -> None:
        dataset = open_dataset(str(folder))
        shard = dataset.manifest.split("train")[0]
        row = dataset.index(shard).to_pylist()[0]
        known = {
            "split": "train",
            "quarantined": False,
            "sample_sha256": row["sha256"],
            **{key: row[key] for key in LEDGER_SCHEMA.names if key in row},
        }
        path = folder / "listings/000004.parquet"
        path.write_bytes(table_bytes(pa.Table.from_pylist([{**known, name: value}], LEDGER_SCHEMA), {"claim": 4}))
        settle(folder)

    return apply


FIRST, SECOND, LAST = "dataset.000001.json", "dataset.000002.json", "dataset.000004.json"
BEFORE, REMOVED = "removed/train-000000-g000003.parquet", "removed/train-000000-g000004.parquet"
REMOVAL = "records/train-000000-g000004.json"
CLAIM, RECORD = "run.000001.json", "records/train-000000.json"
DATASETS, TABLES, CLAIMS, CHECKPOINTS = "dataset.0*.json", "table.0*.json", "run.0*.json", "**/checkpoint.json"

# stage, name -> (change, the file that is named, what is said of it)
FORGERIES: dict[str, dict[str, tuple[Change, str, str]]] = {
    "dataset": {
        # 1. statistics and counts
        "samples": (edited(SECOND, put("statistics.train.samples", lambda n: n + 1)), SECOND, "statistics are not those of its parts"),
        "bytes": (edited(SECOND, put("statistics.train.bytes", 1)), SECOND, "statistics are not those of its parts"),
        "quarantined": (edited(SECOND, put("statistics.test.quarantined", 1)), SECOND, "statistics are not those of its parts"),
        "classes": (edited(SECOND, put("statistics.train.classes", moved)), SECOND, "does not follow from its parts and its parent"),
        "classes of all": (edited(DATASETS, put("statistics.train.classes", moved)), FIRST, "does not follow from its parts"),
        "classes of a record": (edited(RECORD, put("detail.classes", moved)), RECORD, "does not say what its files hold: detail.classes"),
        "classes everywhere": (
            both(edited(DATASETS, put("statistics.train.classes", moved)), edited(RECORD, put("detail.classes", moved))),
            FIRST,
            "does not follow from its parts",
        ),
        "shapes": (edited(DATASETS, put("sample.shapes", renamed)), FIRST, "sample.shapes"),
        "extensions": (edited(DATASETS, put("sample.extensions", renamed)), FIRST, "sample.extensions"),
        "reasons": (edited(DATASETS, put("reasons", renamed)), FIRST, "reasons"),
        "more reasons": (edited(SECOND, put("reasons", lambda known: known | {"x": 1})), SECOND, "reasons is 2, its parts have 1"),
        "rows of a record": (edited(RECORD, put("rows", lambda n: n + 1)), RECORD, "does not say what its files hold: rows"),
        "reasons of a record": (edited(RECORD, put("detail.reasons", {"x": 1})), RECORD, "detail.reasons"),
        "ordinals": (edited(DATASETS, put("shards.0.first_ordinal", 3)), SECOND, "begins at ordinal 3"),
        # 2. identity
        "splits": (
            edited(SECOND, put("identity.splits.seed", 7)),
            SECOND,
            "does not claim this generation: dataset.splits.seed 0 instead of 7",
        ),
        "splits of a claim": (edited("run.000002.json", put("identity.dataset.splits.by", "none"), hide=False), SECOND, "claim_sha256"),
        "splits of a hidden claim": (
            edited("run.000002.json", put("identity.dataset.splits.by", "none")),
            SECOND,
            "dataset.splits.by 'none'",
        ),
        "splits of a generation": (
            both(edited(SECOND, put("identity.splits.seed", 7)), edited("run.000002.json", put("identity.dataset.splits.seed", 7))),
            SECOND,
            "its identity is not that of generation 1: splits.seed 7 instead of 0",
        ),
        "splits everywhere": (
            everywhere("splits.by", "none"),
            "shards/test-000000.parquet",
            "make no split test",
        ),
        "resize everywhere": (
            everywhere("shards.resize", 8),
            INDEX,
            "the settings say shards.resize=8",
        ),
        "most samples": (
            everywhere("shards.max_samples", 4),
            INDEX,
            "the settings say shards.max_samples=4",
        ),
        "source of a claim": (edited(CLAIM, put("identity.dataset.source.extensions", ["x"])), FIRST, "does not claim this generation"),
        # 3. parents
        "parent of the first": (
            edited(FIRST, put("parent_sha256", "0" * 64), hide=False),
            FIRST,
            "states the parent 0 with the sha256 '0000",
        ),
        "parent's number": (edited(SECOND, put("parent", 0), hide=False), SECOND, "generation 2 states the parent 0"),
        "no parent": (edited(SECOND, put("parent_sha256", None), hide=False), SECOND, "states the parent 1 with the sha256 None"),
        "another parent": (
            edited(SECOND, put("parent_sha256", "0" * 64), hide=False),
            "dataset",
            "another generation 1 than the stored one",
        ),
        "parent of a claim": (edited("run.000002.json", put("identity.parent", 0)), SECOND, "parent 0 instead of 1"),
        # 4. columns and rows
        "width": (rows_of(INDEX, with_column("width", replaced(99))), INDEX, "the column width is not what the samples' headers say"),
        "mode": (rows_of(INDEX, with_column("mode", replaced("RGB"))), INDEX, "the column mode is not"),
        "class names": (rows_of(INDEX, swapped_samples), INDEX, "labels are not the numbers of their class names"),
        "sources": (rows_of(INDEX, with_column("source", replaced("x.png"))), "dataset", "comes from 'x.png', its listing says"),
        "no mode": (rows_of(INDEX, lambda rows: rows.drop_columns("mode")), INDEX, "'mode' is missing"),
        "mode of numbers": (
            rows_of(INDEX, lambda rows: rows.set_column(9, "mode", pa.array([1] * len(rows)))),
            INDEX,
            "'mode' is of type int64, expected string",
        ),
        "listed source": (
            rows_of("listings/000001.parquet", with_column("source", replaced("x.png"))),
            "dataset",
            "its listing says 'x.png'",
        ),
        "listed columns": (rows_of("listings/000001.parquet", added(-1)), "listings/000001.parquet", "'note' is unexpected"),
        "reason": (rows_of("quarantine/*", with_column("reason", replaced("x"))), RECORD, "detail.reasons"),
        "split of a refused": (rows_of("quarantine/*", with_column("split", replaced("test"))), INDEX, "rows of other splits than train"),
        "stem": (rows_of(INDEX, same, lambda known: known | {"stem": "x"}), INDEX, "its metadata say stem 'x' instead of 'train-000000'"),
        "tar of an index": (rows_of(INDEX, same, lambda known: known | {"tar_sha256": "x"}), INDEX, "its metadata say tar_sha256 'x'"),
        "number of a listing": (rows_of("listings/*1.parquet", same, lambda known: {"claim": 9}), "listings/000001.parquet", "claim 9"),
        # 5. form
        "unchecked index": (rows_of(INDEX, same, compression="zstd"), INDEX, "have pages without a checksum"),
        "unchecked listing": (
            rows_of("listings/*1.parquet", same, compression="zstd"),
            "listings/000001.parquet",
            "pages without a checksum",
        ),
        "packed otherwise": (
            rows_of("quarantine/*", same, compression="gzip", write_page_checksum=True),
            "quarantine/",
            "compressed with GZIP",
        ),
    },
    "living": {
        "samples": (edited(LAST, put("shards.0.removed.samples", 1)), LAST, "statistics are not those of its parts"),
        "samples for refused": (
            edited(LAST, both(put("shards.0.removed.samples", 4), put("shards.0.removed.quarantined", 0))),
            LAST,
            "quarantined is 0, its parts have 1",
        ),
        "classes": (edited(LAST, put("statistics.train.classes", moved)), LAST, "does not follow from its parts and its parent"),
        "classes of before": (
            edited("dataset.000003.json", put("statistics.train.classes", moved)),
            "dataset.000003.json",
            "does not follow",
        ),
        "classes of a record": (edited(REMOVAL, put("detail.classes", moved)), REMOVAL, "does not say what its files hold: detail.classes"),
        "classes everywhere": (
            both(edited(LAST, put("statistics.train.classes", moved)), edited(REMOVAL, put("detail.classes", moved))),
            LAST,
            "does not follow from its parts",
        ),
        "removed of a record": (edited(REMOVAL, put("detail.removed_samples", 1)), REMOVAL, "detail.removed_samples 1 instead of 3"),
        "rows of a record": (edited(REMOVAL, put("rows", 1)), REMOVAL, "rows 1 instead of"),
        "shapes of a record": (edited(REMOVAL, put("detail.shapes", renamed)), REMOVAL, "detail.shapes"),
        "bags": (edited(LAST, put("shards.0.removed.groups", 1)), LAST, "1 bags are removed"),
        "reason": (
            rows_of(REMOVED, with_column("reason", replaced("bored"))),
            REMOVED,
            "it gives the reason 'bored', expected one of gone",
        ),
        "no reason": (rows_of(REMOVED, with_column("reason", replaced(None))), REMOVED, "it gives the reason None"),
        "key": (rows_of(REMOVED, with_column("key", replaced("x"))), REMOVED, "it names the sample 'x' of ordinal"),
        "ordinal": (
            rows_of(REMOVED, with_column("ordinal", replaced(-1))),
            REMOVED,
            "it names the ordinal -1, which the part does not have",
        ),
        "no ordinal": (rows_of(REMOVED, with_column("ordinal", replaced(None))), REMOVED, "not in the order of their ordinals"),
        "order": (rows_of(REMOVED, lambda rows: rows.take([1, 0, 2, 3])), REMOVED, "not in the order of their ordinals"),
        "twice": (rows_of(REMOVED, lambda rows: rows.take([0, 0, 2, 3])), REMOVED, "not in the order of their ordinals"),
        "one less": (rows_of(REMOVED, lambda rows: rows.slice(1)), REMOVED, "not a readable Parquet file"),
        "another sample": (other_removed(REMOVED), "living", "content_sha256 of the manifest is"),
        "another sample before": (other_removed(BEFORE), REMOVED, "which a generation before removed"),
        "reason of before": (rows_of(BEFORE, with_column("reason", replaced("bored"))), BEFORE, "it gives the reason 'bored'"),
        "columns": (rows_of(REMOVED, added(-1)), REMOVED, "'note' is unexpected"),
        "stem": (rows_of(REMOVED, same, lambda known: known | {"stem": "x"}), REMOVED, "its metadata say stem 'x'"),
        "unchecked": (rows_of(REMOVED, same, compression="zstd"), REMOVED, "have pages without a checksum"),
        "content": (edited(LAST, put("content_sha256", "0" * 64)), "living", "content_sha256 of the manifest is 0000"),
        "no removal": (edited(LAST, put("removal", None)), LAST, "does not say what removes samples"),
        "parent of a claim": (edited("run.000004.json", put("identity.parent", 1)), LAST, "parent 1 instead of 3"),
        "listed key": (listed_again("key", "x"), "listings", "they say 'x' as key"),
        "listed class": (listed_again("label_name", "x"), "listings", "they say 'x' as label_name"),
        "listed hash": (listed_again("sample_sha256", "0" * 64), "listings", "as sample_sha256"),
        "listed as bad": (listed_again("quarantined", True), "listings", "they say True as quarantined"),
        "listed nowhere": (listed_again("ordinal", 10_000), "listings", "they name 1 samples that belong to no part"),
        "listed split": (listed_again("split", "x"), "listings", "they name 1 samples that belong to no part"),
        "listed without": (listed_again("ordinal", None), "listings/000004.parquet", "has rows without key, split, ordinal"),
        "listed below": (listed_again("ordinal", -3), "listings/000004.parquet", "has rows without key, split, ordinal"),
    },
    "hashed": {
        "seed of splits": (
            everywhere("splits.seed", 7),
            INDEX,
            "its samples belong to",
        ),
        "share of a split": (
            everywhere("splits.test", 0.9),
            INDEX,
            "by val=0, test=0.9 and seed=0 of splits",
        ),
        "seed of shards": (
            everywhere("shards.seed", 7),
            INDEX,
            "its samples are not in the order of shards.seed=7",
        ),
    },
    "run": {
        "beta": (
            edited(CLAIM, put("identity.model.beta", 4.0), hide=False),
            "run/model",
            "belongs to another run, or was changed: run_sha256",
        ),
        "beta everywhere": (edited(CLAIM, put("identity.model.beta", 4.0)), "config.json", "model.beta 1.0 instead of 4.0"),
        "split": (edited(CLAIM, put("identity.train.split", "test")), "checkpoint.json", "train_split 'train' instead of 'test'"),
        "data": (edited(CLAIM, put("identity.data.train", "0" * 64)), CLAIM, "names other data than"),
        "data's names": (
            edited(CLAIM, put("identity.data", lambda known: {"train": known["train"]})),
            CLAIM,
            "has the splits train and test",
        ),
        "epochs": (edited(CLAIM, put("identity.train.epochs", 9)), CLAIM, "says 6 steps, its settings and the dataset give 18"),
        "steps": (edited(CLAIM, put("info.total_steps", 60)), "checkpoint.json", "total_steps 6 instead of 60"),
        "dataset": (edited(CLAIM, put("info.dataset_sha256", "0" * 64)), "checkpoint.json", "dataset_sha256"),
        "dataset everywhere": (
            both(edited(CLAIM, put("info.dataset_sha256", "0" * 64)), edited(CHECKPOINTS, put("info.dataset_sha256", "0" * 64))),
            CLAIM,
            "names dataset_sha256 '0000",
        ),
        "step": (edited("model/checkpoint.json", put("step", 2)), "run/model", "is of step 2, expected"),
        "checkpoint of others": (edited("model/checkpoint.json", put("info.run_sha256", "0" * 64), hide=False), "model", "another run"),
        "best": (edited("checkpoints/*6-*/checkpoint.json", put("best.loss", 1.0)), "checkpoint.json", "a best loss of 1.0"),
        "metrics": (other_metrics, "metrics/", "does not hold the rows of steps"),
        "metrics left out": (
            edited("checkpoints/*6-*/checkpoint.json", put("metrics", [])),
            "checkpoint.json",
            "names metrics up to step 0",
        ),
        "config": (other_config, "model/config.json", "transform.scale 'symmetric' instead of 'unit'"),
    },
    "table": {
        # 1. and 2. counts, identity, lineage
        "batch": (edited(TABLES, put("identity.batch", 4)), TABLES[:5], "it has batch '16', the manifest '4'"),
        "batch of a claim": (edited("run.000002.json", put("identity.table.batch", 4)), "table.000002.json", "which no claim has"),
        "batch, hash kept": (edited("table.000002.json", put("identity.batch", 4), hide=False), "table.000002.json", "claim_sha256 is"),
        "transform everywhere": (
            both(
                edited(TABLES, put("identity.preprocessing.transform.scale", "none")),
                edited(CLAIMS, put("identity.table.preprocessing.transform.scale", "none")),
            ),
            PART,
            "its config is not of the table's preprocessing: transform.scale 'unit' instead of 'none'",
        ),
        "seed": (
            edited("table.000002.json", put("identity.seed", 5)),
            "table.000002.json",
            "its identity is not that of generation 1: seed 5",
        ),
        "rows per part everywhere": (edited(TABLES, put("identity.rows_per_part", 32)), TABLES[:5], "the part 'train-000000'"),
        "dtype everywhere": (edited(TABLES, put("identity.dtype", "float16")), TABLES[:5], "expected a dtype of float16 or int32"),
        "columns": (edited(TABLES, put("columns.mu.dim", 3)), TABLES[:5], "columns are not those of its identity"),
        "columns everywhere": (edited(TABLES, both(put("columns.mu.dim", 3), put("identity.columns.mu.dim", 3))), PART, "'mu' is of type"),
        "split": (edited(TABLES, put("parts.0.split", "test")), TABLES[:5], "the part 'train-000000'"),
        "split of a record": (edited(RECORD, put("detail.split", "test")), RECORD, "detail.split 'test' instead of 'train'"),
        "index of a record": (edited(RECORD, put("detail.index_content_sha256", "x")), RECORD, "detail.index_content_sha256 'x'"),
        "producer of a record": (edited(RECORD, put("detail.encoded_by.threads", "9")), RECORD, "detail.encoded_by.threads '9'"),
        "rows of a record": (edited(RECORD, put("rows", 1)), RECORD, "rows 1 instead of"),
        "step": (edited(TABLES, put("lineage.checkpoint.step", 9)), PART, "it has checkpoint_step"),
        "info": (
            edited(TABLES, put("lineage.checkpoint.info.total_steps", 9)),
            "table.00000",
            "checkpoint.info.total_steps 6 instead of 9",
        ),
        "run": (edited(TABLES, put("lineage.run", "/x")), TABLES[:5], "its lineage names the run '/x'"),
        "number": (edited(TABLES, put("lineage.dataset.number", 1)), "table.000002.json", "says another lineage"),
        "lineage of a claim": (edited(CLAIM, put("info.lineage.checkpoint.step", 9)), CLAIM, "says another lineage: checkpoint.step 9"),
        "producers": (edited(TABLES, put("lineage.encoded_by", lambda known: [*known, {"device": "x"}])), "table.00000", "encoded by"),
        # 3. parents
        "parent of the first": (edited("table.000001.json", put("parent_sha256", "0" * 64)), "table.000001.json", "states the parent 0"),
        "parent's number": (edited("table.000002.json", put("parent", 0)), "table.000002.json", "generation 2 states the parent 0"),
        "another parent": (
            edited("table.000002.json", put("parent_sha256", "0" * 64), hide=False),
            "table",
            "another generation 1 than the stored one",
        ),
        # 4. columns and rows
        "a column": (part(added(-1)), PART, "its columns are"),
        "a column among the others": (part(added(7)), PART, "'note'"),
        "a column in all": (part(added(7), (PART, OTHER, "data/split=test/test-000000.parquet")), PART, "columns 'note', which neither"),
        "no log_var": (part(lambda rows: rows.drop_columns("log_var")), PART, "'log_var' is missing"),
        "no label": (part(lambda rows: rows.drop_columns("label")), PART, "'label' is missing"),
        "other order": (part(lambda rows: rows.select([*reversed(rows.column_names)])), PART, "its columns are"),
        "label": (part(with_column("label", lambda values: [0] * len(values))), PART, "the labels differ from those in"),
        "label_name": (part(with_column("label_name", replaced("x"))), PART, "the label_names differ from those in"),
        "key": (part(with_column("key", replaced("x"))), PART, "the keys differ from those in"),
        "ordinal": (part(with_column("ordinal", replaced(99))), PART, "the ordinals differ from those in"),
        "NaN": (part(with_column("mu", replaced([np.nan] * 4))), PART, "column mu has values that are not finite"),
        "infinity": (part(with_column("log_var", replaced([np.inf] * 4))), PART, "column log_var has values that are not finite"),
        "no value": (part(with_column("mu", replaced(None))), PART, "has rows without mu"),
        "no number": (part(with_column("mu", replaced([None, 0, 0, 0]))), PART, "has rows without mu"),
        "kl": (part(with_column("kl", replaced(lambda value: value + 1))), PART, "column kl is not that of mu and log_var"),
        "mu": (part(with_column("mu", replaced([9, 9, 9, 9]))), PART, "column kl is not that of mu and log_var"),
        "float64": (
            part(lambda rows: rows.set_column(rows.column_names.index("kl"), "kl", rows["kl"].cast(pa.float64()))),
            PART,
            "'kl' is of type double, expected float",
        ),
        "refused row": (
            other_refused,
            "quarantine/",
            "keys, ordinals or hashes differ from those in",
        ),
        # 5. form
        "no checksums": (part(same, write_page_checksum=False), PART, "have pages without a checksum"),
        "codec": (part(same, compression="gzip"), PART, "compressed with GZIP, expected UNCOMPRESSED or ZSTD"),
        "statistics": (part(same, write_statistics=True), PART, "have statistics"),
        "no statistics": (part(same, write_statistics=False), PART, "its column key has no statistics"),
        "dictionaries": (part(same, use_dictionary=True), PART, "have dictionaries"),
        "row groups": (part(same, row_group_size=4), PART, "row groups, expected one"),
        "seal": (part(with_metadata(producer_sha256=None)), PART, "has no producer_sha256"),
        "producer": (part(with_metadata(threads="9")), PART, "its producer_sha256 is"),
        "preprocessing": (part(with_metadata(preprocessing_sha256="x")), PART, "it has preprocessing_sha256 'x'"),
        "index": (part(with_metadata(index_content_sha256="x")), PART, "has index_content_sha256 'x', its shard"),
        "latent shape": (part(with_metadata(latent_shape="{}")), PART, "it has latent_shape '{}'"),
        "config": (part(with_metadata(config="{}")), PART, "its metadata cannot be read"),
        "nested config": (part(with_metadata(config="[" * 100_000)), PART, "its metadata cannot be read"),
        "seed of a part": (part(with_metadata(seed="0")), PART, "it has seed '0', the manifest None"),
    },
}


CASES = [(stage, name) for stage, forgeries in FORGERIES.items() for name in forgeries]


@pytest.mark.parametrize(("stage", "name"), CASES, ids=[f"{stage}-{name.replace(' ', '_')}" for stage, name in CASES])
def test_a_forgery_with_new_hashes_is_named(made: Path, tmp_path: Path, output_of: Output, stage: str, name: str) -> None:
    change, file, what = FORGERIES[stage][name]
    change(Path(shutil.copytree(made / stage, tmp_path / stage)))
    found = output_of(tmp_path, stage)
    assert file in found and what in found, found


READS: dict[str, Callable[[LatentTable], object]] = {
    "numpy": lambda table: table.numpy("mu"),
    "arrow": lambda table: table.keys,
    "dataset": lambda table: table.dataset().to_table(),
}
# a column among the others is found by verify, which has the index: a compaction writes shards with different columns
REFUSED = ["a column", "no log_var", "no label", "other order", "float64", "row groups"]


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("name", REFUSED)
def test_a_reader_refuses_a_part_with_other_columns(made: Path, tmp_path: Path, name: str, read: str) -> None:
    FORGERIES["table"][name][0](Path(shutil.copytree(made / "table", tmp_path / "table")))
    with pytest.raises(DataError, match=r"train-000000\.parquet"):
        READS[read](open_table(str(tmp_path / "table")))


@pytest.mark.parametrize("name", ["no value", "no number"])
def test_a_reader_refuses_vectors_with_gaps(root: Path, name: str) -> None:
    FORGERIES["table"][name][0](root / "table")
    with pytest.raises(DataError, match=r"train-000000\.parquet has rows without mu"):
        open_table(str(root / "table")).numpy("mu")


@pytest.mark.parametrize("versions", ["[" * 100_000, json.dumps({"torch": {"deep": 1}}), "no JSON", "3"])
def test_versions_that_are_no_section_are_shown_as_they_are_stated(root: Path, versions: str) -> None:
    edited(TABLES, put("lineage.encoded_by.0.versions", versions))(root / "table")
    (encoder,) = show(str(root / "table"))["lineage"]["encoded_by"]
    assert encoder["versions"] == versions


@pytest.mark.parametrize(("name", "read"), [("no mode", "index"), ("mode of numbers", "index"), ("listed columns", "listings")])
def test_a_reader_refuses_an_index_or_a_listing_with_other_columns(root: Path, name: str, read: str) -> None:
    FORGERIES["dataset"][name][0](root / "dataset")
    dataset = open_dataset(str(root / "dataset"))
    with pytest.raises(DataError, match="has other columns than aecore writes"):
        if read == "index":
            dataset.reader(dataset.manifest.shards[0]).read_rows([0])
        else:
            read_listings(dataset.store, dataset.manifest)


def test_verify_says_what_it_could_not_compare_without_the_dataset(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    edited(TABLES, put("lineage.dataset.url", str(root / "gone")))(root / "table")
    edited(CLAIM, put("info.data", str(root / "gone")))(root / "run")
    FORGERIES["table"]["label"][0](root / "table")
    report = verify_table(open_table(str(root / "table")), read_data=True)
    assert report.dataset is None
    assert "so keys, labels and metadata columns were not compared" in caplog.text
    caplog.clear()
    assert verify_run(open_store(str(root / "run")), read_data=True).problems == ()
    assert "so what the run was trained on was not compared" in caplog.text


def test_a_root_compares_run_and_table_with_its_own_dataset(root: Path, output_of: Output) -> None:
    edited(CLAIM, put("info.data", str(root / "gone")))(root / "run")
    edited(CLAIM, put("identity.data.train", "0" * 64))(root / "run")
    assert "names other data than" in output_of(root, ".")
