import errno
import mmap
import os
from pathlib import Path

import pytest

import aecore.store._direct as disk_module
from aecore.errors import StoreError
from aecore.store._direct import DiskWriter

PAGE = mmap.PAGESIZE


def pages(count: int, seed: int) -> memoryview:
    memory = mmap.mmap(-1, count * PAGE)
    memory[:] = bytes((seed + number) % 251 for number in range(PAGE)) * count
    return memoryview(memory)


def write(path: Path) -> bytes:
    """Write three lots of pages and an end of odd size; return what should be there."""
    parts = [pages(3, 1), pages(1, 2), pages(300, 3)]
    with DiskWriter(path) as file:
        for part in parts:
            file.pages(part)
        file.end(b"the end")
    return b"".join(map(bytes, parts)) + b"the end"


@pytest.mark.parametrize("sync_bytes", [1 << 24, 0])
def test_pages_and_the_end_are_the_file(tmp_path, monkeypatch, sync_bytes):
    monkeypatch.setattr(disk_module, "SYNC_BYTES", sync_bytes)
    expected = write(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == expected


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no file system in memory")
def test_a_file_system_in_memory_is_written_too():
    path = Path("/dev/shm") / f"aecore-test-{os.getpid()}"
    try:
        expected = write(path)
        assert path.read_bytes() == expected
    finally:
        path.unlink(missing_ok=True)


@pytest.mark.parametrize("sync_bytes", [1 << 24, 0])
def test_without_o_direct_the_file_is_the_same(tmp_path, monkeypatch, sync_bytes):
    monkeypatch.setattr(disk_module, "_DIRECT", 0)
    monkeypatch.setattr(disk_module, "SYNC_BYTES", sync_bytes)
    expected = write(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == expected


def test_a_file_system_that_refuses_o_direct_when_opening_is_written_through_the_cache(tmp_path, monkeypatch):
    real = os.open

    def refusing(path, flags, *args):
        if flags & os.O_DIRECT:
            real(path, flags & ~os.O_DIRECT, *args)  # made, and refused all the same
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *args)

    monkeypatch.setattr(os, "open", refusing)
    expected = write(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == expected


@pytest.mark.parametrize("before", [0, 1, 2])  # pages that are written before: the rest is not written twice
def test_a_file_system_that_refuses_a_direct_write_is_written_through_the_cache(tmp_path, monkeypatch, before):
    real, calls = os.write, list[int]()

    def refusing(descriptor, data):
        calls.append(len(data))
        if len(calls) == 1 and before:
            return real(descriptor, data[: before * PAGE])
        if len(calls) == 1 + bool(before):
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", refusing)
    expected = write(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == expected and calls[0] == 3 * PAGE


def test_other_errors_are_not_hidden(tmp_path, monkeypatch):
    (tmp_path / "there").write_bytes(b"mine")
    with pytest.raises(StoreError, match="there: File exists"):
        DiskWriter(tmp_path / "there")
    assert (tmp_path / "there").read_bytes() == b"mine"
    with DiskWriter(tmp_path / "file") as file:

        def full(descriptor, data):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(StoreError, match="No space left"):
            file.pages(pages(1, 0))
