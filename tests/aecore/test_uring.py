import os
import sys

import pytest

import aecore.uring as uring_module
from aecore.uring import Ring, open_ring

FLAGS = os.O_RDONLY | os.O_NONBLOCK
ROOM = 1000


@pytest.fixture
def ring() -> Ring:
    ring = open_ring(8, ROOM, FLAGS)
    if ring is None:
        pytest.skip("this kernel offers no io_uring")
    return ring


def joined(paths) -> bytes:
    return b"".join(os.fsencode(path) + b"\0" for path in paths)


def test_batches_of_all_lengths_give_every_file_in_order(tmp_path, ring):
    contents = [os.urandom(size) for size in (0, 1, 2, ROOM - 1, ROOM, ROOM + 1, 3 * ROOM, 17, 300, 999, 5, 64)]
    for number, content in enumerate(contents):
        (tmp_path / f"ü{number}").write_bytes(content)
    for turn in range(200):  # the queues are rings: batches begin anywhere in them
        count = 1 + turn % 8
        chosen = [(turn + step * 5) % len(contents) for step in range(count)]
        assert ring.read(joined(tmp_path / f"ü{number}" for number in chosen)) == [contents[number][:ROOM] for number in chosen]


def test_what_cannot_be_read_is_none_and_the_others_are_there(tmp_path, ring):
    (tmp_path / "a").write_bytes(b"first")
    (tmp_path / "b").write_bytes(b"second")
    (tmp_path / "folder").mkdir()
    os.symlink("nowhere", tmp_path / "link")
    names = ["a", "missing", "folder", "b", "link", "a/below"]
    for _ in range(3):  # a slot that held a file in the batch before gives nothing of it
        assert ring.read(joined(tmp_path / name for name in names)) == [b"first", None, None, b"second", None, None]
        assert ring.read(joined(tmp_path / name for name in names[::-1])) == [None, None, b"second", None, None, b"first"]


def test_a_pipe_does_not_hold_up_the_others(tmp_path, ring):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a").write_bytes(b"first")
    assert ring.read(joined([tmp_path / "pipe", tmp_path / "a"])) in ([b"", b"first"], [None, b"first"])


def test_no_ring_where_the_system_has_none(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert open_ring(8, ROOM, FLAGS) is None
    monkeypatch.undo()
    monkeypatch.setattr(uring_module, "_SETUP", 100_000)  # a system call that no kernel knows
    assert open_ring(8, ROOM, FLAGS) is None


def test_no_ring_on_an_old_kernel(monkeypatch):
    monkeypatch.setattr(uring_module, "_FEATURES", 1 << 31)
    assert open_ring(8, ROOM, FLAGS) is None


def test_a_ring_leaves_no_descriptor_behind(ring):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        assert open_ring(8, ROOM, FLAGS) is not None
    assert len(os.listdir("/proc/self/fd")) == before
