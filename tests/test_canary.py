"""The search finds a secret in each of the ways in which one could be hidden, so an empty answer means something."""

import base64
import gzip
import pickle
import urllib.parse
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.canary import find_canary

SECRET = "cAnAry/9f+31=xyz"


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inside", SECRET * 3)


HIDDEN = {
    "plain.log": lambda path: path.write_text(f"key={SECRET}\n"),
    "address.json": lambda path: path.write_text(urllib.parse.quote(f"user:{SECRET}@", safe="")),
    "header-0": lambda path: path.write_bytes(base64.b64encode(f"abc{SECRET} and more".encode())),
    "header-1": lambda path: path.write_bytes(base64.b64encode(f"a{SECRET} and more".encode())),
    "header-2": lambda path: path.write_bytes(base64.b64encode(f"ab{SECRET} and more".encode())),
    "state.pkl": lambda path: path.write_bytes(pickle.dumps({"secret": SECRET})),
    "log.gz": lambda path: path.write_bytes(gzip.compress(SECRET.encode())),
    "model.pt": _zip,
    "part.parquet": lambda path: pq.write_table(pa.table({"key": [SECRET] * 9}), path, compression="zstd"),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_a_hidden_secret_is_found(name: str, tmp_path: Path) -> None:
    (tmp_path / "clean").write_text("nothing here")
    assert find_canary([SECRET], tmp_path) == []
    HIDDEN[name](tmp_path / name)
    assert [found.partition(":")[0] for found in find_canary([SECRET], tmp_path)] == [str(tmp_path / name)]


def test_searching_nothing_is_an_error(tmp_path: Path) -> None:
    for places, texts in (([tmp_path], {}), ([tmp_path / "missing"], {}), ([], {"dump": ""})):
        with pytest.raises(AssertionError):
            find_canary([SECRET], *places, texts=texts)
    assert find_canary([SECRET], texts={"dump": f"x{SECRET}"}) == ["dump: cAnA..."]
