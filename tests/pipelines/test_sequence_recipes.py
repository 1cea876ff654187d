"""Recipes of sequences and videos as their headers say it: the data they make, a few steps of training, the table, the evaluation."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from pipelines.recipe.yaml import shipped_recipes
from tests.pipelines.test_cli import HERE, printed
from tests.processes import WARM, run

SNIPPET = re.compile(r"^#   python - <<'EOF'\n(.*?)^#   EOF$", re.DOTALL | re.MULTILINE)
FILE = re.compile(r"source.url=(\S+)")
FEW = ("train.max_steps=3", "train.global_batch=16", "encode.batch=64")


@pytest.mark.parametrize("recipe", ["series_rvae", "tokens_rvae", "video_rvae", "video_conv_vae"])
def test_a_recipe_runs_on_the_data_that_its_header_makes(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shipped_recipes()[recipe]
    found, name = SNIPPET.search(text), FILE.search(text)
    assert found
    assert name
    code = re.sub(r"\b[12]000\b", "120", found[1].replace("#   ", ""))  # fewer samples: the shapes are what is tried
    run([*WARM, "-c", code], cwd=tmp_path, check=True)
    data, trained, table = (str(tmp_path / place) for place in ("dataset", "trained", "table"))
    printed(capsys, "shard", str(tmp_path / name[1]), data, "--recipe", recipe, HERE)
    printed(capsys, "train", recipe, f"data={data}", f"out={trained}", *FEW, HERE)
    made = json.loads(printed(capsys, "encode", trained, data, table, "encode.batch=64", "--json", HERE))
    assert made["rows"] == 120
    scores = json.loads(printed(capsys, "evaluate", trained, data, "--json", HERE))
    assert scores["elbo"] < 0
    drawn = json.loads(printed(capsys, "sample", trained, str(tmp_path / "drawn"), "sample.num=3", "--json"))
    assert drawn
    shape = np.load(tmp_path / "drawn/samples.npz")["x"].shape
    assert shape == {
        "series_rvae": (3, 48, 1), "tokens_rvae": (3, 24), "video_rvae": (3, 10, 1, 16, 16), "video_conv_vae": (3, 1, 10, 16, 16),
    }[recipe]  # fmt: skip
