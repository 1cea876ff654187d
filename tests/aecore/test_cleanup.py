"""Reads that fail are tried again and then named; cleaning up after the work neither fails it nor hides its first error."""

import contextlib
import errno
import logging
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from aecore.data.format.parquet import footer_sha256
from aecore.errors import DataError, StoreError
from aecore.store import FileRef, open_store, sha256_file
from aecore.store import _again as again_module
from aecore.store._cache import ObjectCache
from aecore.store._direct import DiskWriter
from aecore.table.files import PartFiles
from aecore.table.part import read_footer, read_part
from tests.filefaults import faults
from tests.s3 import S3


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(again_module, "FIRST_PAUSE_S", 0.001)


@contextlib.contextmanager
def too_many_open_files() -> Iterator[None]:
    """Let this process open no more files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_part_of_a_table_that_cannot_be_opened_is_not_called_damaged(tmp_path: Path) -> None:
    pq.write_table(pa.table({"key": ["a"]}), tmp_path / "part.parquet", write_page_checksum=True)
    size = (tmp_path / "part.parquet").stat().st_size
    ref, store = FileRef("part.parquet", size, sha256_file(tmp_path / "part.parquet")), open_store(tmp_path)
    read_part(store, ref)
    for read in (read_part, read_footer):
        with too_many_open_files(), pytest.raises(StoreError, match=r"part.parquet: .*Too many open files.*tried 3 times.*ulimit -n"):
            read(store, ref)
    (tmp_path / "part.parquet").write_bytes(bytes(size))
    with pytest.raises(DataError, match="is damaged"):
        read_part(store, ref)


def test_what_cannot_be_cleaned_up_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = open_store(tmp_path / "a")
    with store.stage() as staged:
        staged.write_bytes(b"x")
        ref = store.put_staged("name", staged, role="part")
        staged.unlink()
        staged.mkdir()  # `unlink` refuses it
    assert store.read("name", ref=ref) == b"x"
    assert f"cannot remove the temporary file {staged}" in caplog.text
    with pytest.raises(DataError, match="the first error"), store.stage() as staged:
        staged.mkdir()
        raise DataError("the first error")


def test_closing_what_was_read_does_not_hide_the_first_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(DataError, match="the first error"), DiskWriter(tmp_path / "file") as writer:
        os.close(writer._descriptor)
        raise DataError("the first error")
    assert f"cannot close {tmp_path}/file" in caplog.text
    with pytest.raises(StoreError, match="cannot write .*/other: Bad file descriptor"), DiskWriter(tmp_path / "other") as writer:
        os.close(writer._descriptor)


def test_the_copy_of_an_object_that_cannot_be_read_is_fetched_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = ObjectCache(tmp_path, 1 << 20)
    data = b"object"
    (tmp_path / "source").write_bytes(data)
    ref = FileRef("name", len(data), sha256_file(tmp_path / "source"))

    def fetch(ref: FileRef, target: Path) -> None:
        target.write_bytes(data)

    cache.path(ref, fetch)
    (tmp_path / ref.sha256).unlink()
    (tmp_path / ref.sha256).symlink_to("/proc/self/mem")  # opens, and its reads fail with EIO
    caplog.set_level(logging.WARNING)
    assert cache.refetch_if_corrupt(ref)
    assert "is not a regular file" in caplog.text
    assert cache.path(ref, fetch).read_bytes() == data


def test_a_scan_of_a_table_raises_typed_errors_for_files_that_cannot_be_opened(tmp_path: Path) -> None:
    path = tmp_path / "part.parquet"
    pq.write_table(pa.table({"key": ["a"]}), path, write_page_checksum=True)
    ref = FileRef(path.name, path.stat().st_size, sha256_file(path))
    with path.open("rb") as file:
        files = pafs.PyFileSystem(PartFiles(open_store(tmp_path), {str(path): ref}, {str(path): footer_sha256(file)}))
    scan = pads.FileSystemDataset(
        [pads.ParquetFileFormat().make_fragment(str(path), files)], pq.read_schema(path), pads.ParquetFileFormat(), files
    )
    assert scan.to_table().num_rows == 1
    with too_many_open_files(), pytest.raises(StoreError, match="part.parquet: Too many open files .*ulimit -n"):
        scan.to_table()
    with pytest.raises(StoreError, match="read-only: write to another URL"):
        files.delete_file(str(path))
    path.unlink()
    with pytest.raises(DataError, match="part.parquet is missing: the manifest names it"):
        scan.to_table()


def test_a_file_whose_hash_cannot_be_read_is_tried_again_and_then_named(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    ref = store.put("name", b"x", role="part")
    with faults(tmp_path, "read", errno.EIO), pytest.raises(StoreError, match=r"cannot read .*/name: Input/output error \(tried 3 times\)"):
        store.check(ref, verify=True)
    with store.stage() as staged:
        staged.write_bytes(b"x")
        with faults(tmp_path, "stat", errno.EIO), pytest.raises(StoreError, match="cannot write .*/other: Input/output error"):
            store.put_staged("other", staged, role="part")


def test_a_copy_in_the_cache_that_cannot_be_read_is_named_with_its_object(s3: S3, tmp_path: Path) -> None:
    store = open_store(s3.url)
    ref = store.put("name", b"x", role="part")
    with (
        faults(tmp_path / "cache", "read", errno.EIO),
        pytest.raises(StoreError, match="the copy of s3://.*/name in .*: Input/output error"),
    ):
        store.read("name", ref=ref)
    assert store.read("name", ref=ref) == b"x"
