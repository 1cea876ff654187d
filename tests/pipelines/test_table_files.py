"""The readers of README and guides after three generations with new and removed samples: each key once."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import duckdb
import pandas
import polars
import pyarrow.parquet as pq
import pytest

from aecore.data.dataset import open_dataset
from aecore.encoding.job import EncodeSpec
from aecore.table.table import LatentTable, open_table
from pipelines.cli.main import main
from tests.aecore.data.removals import live_keys, remove
from tests.aecore.encoding import encode, folder_dataset, image_folder, saved_run

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "pipelines/README.md", "pipelines/cli/demo.py")
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SPEC = EncodeSpec(batch=16, kl=True, reconstruction=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root `out` whose table has three generations, in a folder with characters that patterns and SQL know."""
    place = tmp_path_factory.mktemp("files") / "it's [1] of*?"
    images = image_folder(image_folder(place / "images", "train", range(40)), "test", range(40, 60))
    run, data = saved_run(place / "out/run"), folder_dataset(images, place / "out/dataset", max_samples=20)
    encode(run, data, place / "out/table", SPEC)
    folder_dataset(image_folder(images, "train", range(60, 80)), place / "out/dataset", max_samples=20)
    for every in (5, 7):
        remove(data, [key for split in ("train", "test") for key in live_keys(open_dataset(data), split)[::every]])
        encode(run, data, place / "out/table", SPEC)
    return place


def keys_of(place: Path, *splits: str) -> list[str]:
    dataset = open_dataset(str(place / "out/dataset"))
    return sorted(key for split in splits or ("train", "test") for key in live_keys(dataset, split))


def test_the_files_of_the_newest_generation_have_each_key_once(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = str(place / "out/table")
    assert open_table(url).manifest.number == 3
    everything = [key for path in Path(url).rglob("data/**/*.parquet") for key in pq.read_table(path, columns=["key"])["key"].to_pylist()]
    assert len(everything) > len({*everything}), "a pattern reads what was replaced as well"
    assert main(["show", url, "--files"]) == 0
    files = capsys.readouterr().out.splitlines()
    assert files == open_table(url).files() and sorted(pq.read_table(files[0], partitioning=None).column_names)
    assert sorted(key for path in files for key in pq.read_table(path, columns=["key"])["key"].to_pylist()) == keys_of(place)
    assert main(["show", str(place / "out"), "--files", "--json"]) == 0, "a root with a table"
    assert json.loads(capsys.readouterr().out)["files"] == files
    assert open_table(url).select("test").files() == [path for path in files if "split=test" in path]
    assert main(["show", str(place / "out/dataset"), "--files"]) == 2
    assert "--files and --sql are of a latent table" in capsys.readouterr().err


def test_sql_makes_a_view_of_them(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(place / "out/table"), "--sql"]) == 0
    with duckdb.connect() as connection:
        connection.sql(capsys.readouterr().out)
        rows = connection.sql("SELECT key, split, len(mu) FROM latents").fetchall()
    assert sorted(key for key, _, _ in rows) == keys_of(place)
    assert sorted(key for key, split, _ in rows if split == "test") == keys_of(place, "test") and {size for _, _, size in rows} == {4}


def test_every_reader_of_the_guide_finds_each_key_once(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(place / "out", tmp_path / "out")  # Polars and datasets take paths for patterns
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    guide = (ROOT / "pipelines/README.md").read_text()
    section = guide[guide.index("## Opening the table") : guide.index("## Lineage and verification")]
    blocks, names = BLOCK.findall(section), dict[str, Any]()
    assert len(blocks) == 4, "DuckDB; Polars and pandas; datasets; aecore"
    for block in blocks:
        exec(block, names)
    assert sorted(key for (key,) in duckdb.sql("SELECT key FROM latents").fetchall()) == keys_of(place)
    frame = polars.read_parquet(names["files"], hive_partitioning=True)
    assert sorted(frame["key"]) == keys_of(place) and len(names["latents"]) == len(frame)
    assert isinstance(names["frame"], pandas.DataFrame) and sorted(names["frame"]["key"]) == keys_of(place)
    assert sorted(names["rows"]["key"]) == keys_of(place, "train")
    assert isinstance(names["table"], LatentTable) and sorted(names["table"].keys.to_pylist()) == keys_of(place)
    duckdb.sql("DROP VIEW latents")


def test_no_page_shows_a_pattern_over_the_folder_as_a_way_to_read_a_table() -> None:
    for page in PAGES:
        assert not re.findall(r"table/data\b.*", (ROOT / page).read_text()), page


def test_columns_are_added_and_replaced_parts_collected_by_command(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, data, table = (str(place / "out/run"), str(place / "out/dataset"), str(tmp_path / "table"))
    command = ["encode", run, data, table, "cluster.num_workers=0"]
    assert main([*command, "encode.columns=[mode]", "encode.split=test", "encode.where=width >= 3"]) == 0
    before = open_table(table)
    again = [*command, "encode.split=test", "encode.where=width >= 3", "--add-columns", "source, width"]
    assert main([*again, "--dry-run"]) == 0
    assert "copied_parts: 1" in capsys.readouterr().out and open_table(table).manifest.number == 1
    assert main(again) == 0
    assert {*open_table(table).columns} - {*before.columns} == {"source", "width"}
    assert sorted(open_table(table).keys.to_pylist()) == keys_of(place, "test")
    assert main([*command, "encode.split=test", "encode.where=width >= 3"]) == 0, "without the option: the columns that are there"
    assert open_table(table).manifest.number == 2
    capsys.readouterr()
    assert main(["verify", table, "--read-data"]) == 0
    for generations, files in ((2, 0), (1, 2)):  # the part and its record
        capsys.readouterr()
        assert main(["gc", table, "--keep-generations", str(generations), "--retention", "0s", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["files"] == files
    assert not (Path(table) / before.parts[0].file.name).exists()
    assert main(["verify", table, "--read-data"]) == 0
    assert main(["gc", table, "--retention", "soon"]) == 2
    assert "--retention soon is no duration" in capsys.readouterr().err
