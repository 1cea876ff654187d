"""Files that are something else than their name says: the quarantine names what they are, and what to do."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import re
import sqlite3
import tarfile
import wave
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from aecore.data.format.bad_sample import BadSample
from aecore.data.format.file_kinds import TABLE, remedy_for
from aecore.data.format.foreign import what_it_is
from aecore.data.sources._arrayfile import ArrayFile
from aecore.data.write.convert import prepare
from aecore.data.write.spec import ShardSpec
from aecore.errors import DataError
from tests.aecore.data.tiny import encoded, image

LFS = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)
HTML = (
    b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>",
    b"<html>\n<body>404</body></html>",
    b"\xef\xbb\xbf\r\n <HTML lang='en'>",
    b"<!-- saved -->\n<html>",
    b"<!doctype HTML PUBLIC '-//W3C//DTD HTML 4.01//EN'>",
)


def bad(data: bytes, ext: str = "png") -> BadSample:
    with pytest.raises(BadSample) as raised:
        prepare(data, ext, ShardSpec())
    return raised.value


@pytest.mark.parametrize("ext", ["png", "jpg", "tif", "npy", "webp"])
def test_a_pointer_of_git_lfs_is_named(ext: str) -> None:
    found = bad(LFS, ext)
    assert found.reason == "lfs_pointer" and found.message == "a Git LFS pointer, not the file itself: fetch it with `git lfs pull`"
    assert bad(b"/annex/objects/SHA256E-s3--00.jpg\n", ext).reason == "annex_pointer"


@pytest.mark.parametrize("ext", ["jpg", "npy"])
@pytest.mark.parametrize("page", HTML)
def test_a_page_in_place_of_a_file_is_named(page: bytes, ext: str) -> None:
    found = bad(page + b" " * 5000, ext)
    assert found.reason == "html" and "download it again" in found.message
    assert bad(b"<?xml version='1.0'?>\n<Error><Code>NoSuchKey</Code></Error>", ext).reason == "xml"


def written(kind: str) -> bytes:
    """Return a small file of a kind, as the libraries of that kind write it."""
    file, picture = io.BytesIO(), Image.fromarray(np.zeros((9, 9, 3), np.uint8))
    if kind in ("jpeg2000", "ico", "ppm", "dds", "pdf", "eps"):
        picture.save(file, kind.upper())
    elif kind == "tar":
        with tarfile.open(fileobj=file, mode="w") as tar:
            tar.addfile(tarfile.TarInfo("x"))
    elif kind == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("x", "x")
    elif kind == "parquet":
        pq.write_table(pa.table({"x": [1]}), file)
    elif kind == "arrow":
        feather.write_feather(pa.table({"x": [1]}), file)
    elif kind == "wav":
        with wave.open(file, "wb") as sound:
            sound.setparams((1, 2, 8000, 4, "NONE", ""))
            sound.writeframes(bytes(8))
    else:
        return {
            "gz": lambda: gzip.compress(b"x"),
            "bz2": lambda: bz2.compress(b"x"),
            "xz": lambda: lzma.compress(b"x"),
            "zstd": lambda: bytes(pa.compress(b"x", "zstd", asbytes=True)),
            "pickle": lambda: pickle.dumps({"x": list(range(9))}, 4),
            "json": lambda: json.dumps({"error": "not found"}).encode(),
            "text": lambda: b"../../blobs/0a1b2c\n",
            "svg": lambda: b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"></svg>',
            "heic": lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
            "avif": lambda: b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf",
            "mp4": lambda: b"\0\0\0\x20ftypisom\0\0\x02\0isomiso2avc1mp41",
            "dicom": lambda: bytes(128) + b"DICM" + bytes(20),
            "hdf5": lambda: b"\x89HDF\r\n\x1a\n" + bytes(40),
            "npy": lambda: npy(),
        }[kind]()
    return file.getvalue()


def npy() -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros(3))
    return file.getvalue()


NAMED = {
    "jpeg2000": "JPEG 2000",
    "ico": "ICO",
    "ppm": "PNM",
    "dds": "DDS",
    "pdf": "PDF",
    "eps": "PostScript",
    "tar": "a tar",
    "zip": "zip archive",
    "parquet": "Parquet",
    "arrow": "Arrow",
    "wav": "WAV",
    "gz": "gzip",
    "bz2": "bzip2",
    "xz": "xz",
    "zstd": "zstd",
    "pickle": "pickle",
    "json": "JSON",
    "text": "plain text",
    "svg": "SVG",
    "heic": "HEIC",
    "avif": "AVIF",
    "mp4": "video",
    "dicom": "DICOM",
    "hdf5": "HDF5",
    "npy": ".npy array",
}


@pytest.mark.parametrize("kind", NAMED)
def test_other_files_under_the_name_of_an_image_are_named(kind: str) -> None:
    found = bad(written(kind))
    assert NAMED[kind] in found.message and ": " in found.message.partition("it is ")[2]


@pytest.mark.parametrize("kind", [kind for kind in NAMED if kind != "npy"])
def test_other_files_under_the_name_of_an_array_are_named(kind: str) -> None:
    assert NAMED[kind] in bad(written(kind), "npy").message
    assert "a PNG image: name it .png" in bad(encoded(image(1)), "npy").message


@pytest.mark.parametrize(
    "before", [b"\n", b"\r\n\r\n", b"\0" * 700, b"--boundary\r\nContent-Type: image/jpeg\r\n\r\n", bytes(range(1, 200))]
)
@pytest.mark.parametrize("kind", ["jpg", "png", "npy"])
def test_bytes_before_the_beginning_say_how_many_to_cut_off(before: bytes, kind: str) -> None:
    whole = npy() if kind == "npy" else encoded(image(1, 64), "JPEG" if kind == "jpg" else "PNG")
    found = bad(before + whole, kind)
    advice = re.search(r" with (\d+) bytes? before its beginning: cut these off \(`tail -c \+(\d+) NAME > NEW`\)", found.message)
    assert advice is not None and int(advice[1]) == len(before)
    assert (before + whole)[int(advice[2]) - 1 :] == whole


def test_an_image_inside_a_damaged_one_is_not_taken_for_it() -> None:
    for start in (b"II*\0", b"GIF89a", b"RIFF\0\0\0\0WEBP", b"BM"):
        assert "before its beginning" not in bad(start + bytes(50) + encoded(image(1), "JPEG"), "tif").message


def test_the_kinds_of_files_are_one_table() -> None:
    extensions = [ext for kind in TABLE for ext in kind.extensions.split()]
    assert len(set(extensions)) == len(extensions)
    for kind in TABLE:
        assert "{" not in remedy_for(kind, one=True) + remedy_for(kind, one=False)
        for offset, start, what in kind.starts:
            assert what_it_is(bytes(offset) + start + bytes(20)).endswith(f"; it is {what}: {remedy_for(kind, one=True)}")


def test_a_database_is_named(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "x") as database:
        database.execute("create table t (x)")
    database.close()
    assert "SQLite" in bad((tmp_path / "x").read_bytes()).message


@pytest.mark.parametrize(("data", "ext"), [(encoded(image(1))[:50], "png"), (encoded(image(1), "JPEG")[:-9], "jpg"), (npy()[:90], "npy")])
def test_a_damaged_image_or_array_keeps_the_reason_of_its_damage(data: bytes, ext: str) -> None:
    assert bad(data, ext).reason in ("truncated", "checksum", "format") and "it is" not in bad(data, ext).message


@given(st.binary(max_size=1200))
def test_any_bytes_have_an_answer(data: bytes) -> None:
    assert isinstance(what_it_is(data), str)


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a-idx3-ubyte"])
def test_arrays_of_rows_name_it_too(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(LFS)
    with pytest.raises(DataError, match="it is a Git LFS pointer: fetch it with `git lfs pull`"):
        file = ArrayFile(tmp_path / name, name)
        file.array(file.names()[0])
