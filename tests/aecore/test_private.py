"""Folders in places that others can write to: ours and real, or not used."""

import contextlib
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from aecore.errors import StoreError
from aecore.store import FileRef, named_folder, open_store, own_folder, private_folder
from aecore.store import _race as race_module
from aecore.store import _scratch as scratch_module
from aecore.store._cache import ObjectCache

OTHER_UID = 65534
as_root = pytest.mark.skipif(os.getuid() != 0, reason="gives a folder to another user")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A private folder of this user, where nothing may be written."""
    folder = tmp_path / "elsewhere"
    folder.mkdir(0o700)
    return folder


SPOILS: dict[str, Callable[[Path, Path], object]] = {
    "a link to a folder": lambda path, elsewhere: path.symlink_to(elsewhere),
    "a link to nothing": lambda path, elsewhere: path.symlink_to(elsewhere / "missing"),
    "a file": lambda path, elsewhere: path.touch(),
    "a pipe": lambda path, elsewhere: os.mkfifo(path),
    "a folder that all can write": lambda path, elsewhere: (path.mkdir(), path.chmod(0o777)),
    "a folder that the group can write": lambda path, elsewhere: (path.mkdir(), path.chmod(0o770)),
}


def test_a_folder_is_made_with_its_parents_and_closed_to_others(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        assert private_folder(tmp_path / "a" / "b", "x") == tmp_path / "a" / "b"
    finally:
        os.umask(before)
    assert mode(tmp_path / "a" / "b") == 0o700
    (tmp_path / "a" / "b").chmod(0o755)
    private_folder(tmp_path / "a" / "b", "x")
    assert mode(tmp_path / "a" / "b") == 0o700, "what others could only read was not filled by them"


def test_who_may_read_a_folder_that_the_user_named_is_the_users_choice(tmp_path: Path) -> None:
    (tmp_path / "named").mkdir()
    (tmp_path / "named").chmod(0o755)
    named_folder(tmp_path / "named", "x")
    assert mode(tmp_path / "named") == 0o755
    (tmp_path / "link").symlink_to(tmp_path / "named")
    named_folder(tmp_path / "link", "x")
    with pytest.raises(StoreError, match="is a link, expected a folder of this user: set X"):
        private_folder(tmp_path / "link", "set X")


@pytest.mark.parametrize("spoil", SPOILS)
def test_what_others_could_have_put_there_is_refused(spoil: str, tmp_path: Path, elsewhere: Path) -> None:
    SPOILS[spoil](tmp_path / "name", elsewhere)
    before = mode(tmp_path / "name")
    with pytest.raises(StoreError, match=f"{tmp_path}/name .*, expected .*(: |, or )set X"):
        private_folder(tmp_path / "name", "set X")
    assert mode(tmp_path / "name") == before
    assert list(elsewhere.iterdir()) == []


@as_root
def test_a_folder_or_link_of_another_user_is_refused(tmp_path: Path, elsewhere: Path) -> None:
    (tmp_path / "theirs").mkdir(0o700)
    (tmp_path / "link").symlink_to(elsewhere)
    for name in ("theirs", "link"):
        os.chown(tmp_path / name, OTHER_UID, OTHER_UID, follow_symlinks=False)
        for function in (private_folder, named_folder):
            with pytest.raises(StoreError, match=r"belongs to user 65534|is a link"):
                function(tmp_path / name, "set X")


@pytest.mark.parametrize("spoil", SPOILS)
def test_nothing_is_staged_where_others_could_have_been_first(
    spoil: str, tmp_path: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch_module.tempfile, "tempdir", str(tmp_path))
    SPOILS[spoil](tmp_path / f"aecore-staged-{os.getuid()}", elsewhere)
    with pytest.raises(StoreError, match="set TMPDIR to a folder of your own"), open_store("s3://bucket/x").stage() as staged:
        staged.write_bytes(b"content")
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("spoil", ["a file", "a folder that all can write"])
def test_an_object_that_others_could_have_put_into_the_cache_is_not_read(spoil: str, tmp_path: Path, elsewhere: Path) -> None:
    ref, root = FileRef("a", 4, "0" * 64), tmp_path / "cache"
    SPOILS[spoil](root, elsewhere)
    if root.is_dir():
        (root / ref.sha256).write_bytes(b"evil")
    with pytest.raises(StoreError, match="set AECORE_CACHE to a folder of your own"):
        ObjectCache(root, 1000).open(ref, lambda ref, target: target.write_bytes(b"good"))


VOLUMES = {  # of root: (owner, group, mode), whether a folder of ours below it is used
    "an fsGroup volume": ((0, 2000, 0o2775), True),
    "a closed fsGroup volume": ((0, 2000, 0o2770), True),
    "like /tmp": ((0, 0, 0o1777), True),
    "writable by all": ((0, 0, 0o777), False),
    "writable by all, setgid": ((0, 2000, 0o2777), False),
    "of another user": ((OTHER_UID, 2000, 0o2775), False),
    "of another user, like /tmp": ((OTHER_UID, 0, 0o1777), False),
    "only readable": ((0, 2000, 0o2755), False),
}
USER = 1234  # a member of group 2000


@pytest.fixture
def mounted() -> Iterator[Path]:
    """A folder that other users reach, unlike those of pytest."""
    with tempfile.TemporaryDirectory(prefix="aecore-", dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def as_user(work: Callable[[], object]) -> str:
    """Return the error of `work` in a child of uid `USER`, "" if it has none."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([2000])
            os.setgid(USER)
            os.setuid(USER)
            work()
        except BaseException as error:
            os.write(writing, f"{type(error).__name__}: {error}"[:4000].encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as said:
        text = said.read().decode()
    os.waitpid(pid, 0)
    return text


@as_root
@pytest.mark.parametrize("volume", VOLUMES)
def test_in_a_volume_that_several_users_share_the_cache_is_a_private_folder(volume: str, mounted: Path) -> None:
    (owner, group, bits), used = VOLUMES[volume]
    root = mounted / "volume"
    root.mkdir()
    os.chown(root, owner, group)
    root.chmod(bits)
    ref = FileRef("a", 4, "0" * 64)

    def work() -> None:
        for _ in range(2):
            assert ObjectCache(root, 1000).path(ref, lambda ref, target: target.write_bytes(b"good") and None).read_bytes() == b"good"
            race_module.remember("bucket", root)
            assert race_module._remembered("bucket", root)

    said = as_user(work)
    if not used:
        assert said.startswith("StoreError") and "set AECORE_CACHE to a folder of your own" in said, said
        assert list(root.iterdir()) == []
        return
    assert said == ""
    assert [path.name for path in root.iterdir()] == [f"aecore-{USER}"]
    assert (mode(root / f"aecore-{USER}") & 0o777, (root / f"aecore-{USER}").stat().st_uid) == (0o700, USER)


@as_root
@pytest.mark.parametrize("spoil", [*SPOILS, "a folder of another user"])
def test_what_another_member_of_the_group_puts_under_our_name_is_not_used(spoil: str, tmp_path: Path, elsewhere: Path) -> None:
    root = tmp_path / "volume"
    root.mkdir()
    root.chmod(0o2775)
    theirs = root / f"aecore-{os.getuid()}"
    SPOILS.get(spoil, lambda path, elsewhere: path.mkdir())(theirs, elsewhere)
    os.chown(theirs, OTHER_UID, OTHER_UID, follow_symlinks=False)
    with pytest.raises(StoreError, match="set AECORE_CACHE to a folder of your own"):
        ObjectCache(root, 1000).open(FileRef("a", 4, "0" * 64), lambda ref, target: target.write_bytes(b"good") and None)
    assert list(elsewhere.iterdir()) == []


@as_root
@pytest.mark.parametrize("name", ["0" * 64, f"{'0' * 64}.part", "lock"])
@pytest.mark.parametrize("how", ["a file", "a link"])
def test_what_comes_into_the_folder_after_it_was_checked_is_not_believed(
    name: str, how: str, tmp_path: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another member of the group swaps the private folder for one of theirs just after its check."""
    (elsewhere / "ours").write_bytes(b"dear")
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(ObjectCache, "root", tmp_path / "cache")
    if how == "a link":
        (tmp_path / "cache" / name).symlink_to(elsewhere / "ours")
    else:
        (tmp_path / "cache" / name).write_bytes(b"evil")
        os.chown(tmp_path / "cache" / name, OTHER_UID, OTHER_UID)
    with contextlib.suppress(StoreError):  # refused, or its own
        path = ObjectCache(limit=1000).path(FileRef("a", 4, "0" * 64), lambda ref, target: target.write_bytes(b"good") and None)
        assert path.read_bytes() == b"good" and path.stat().st_uid == os.getuid()
    assert (elsewhere / "ours").read_bytes() == b"dear"


def test_a_shared_folder_that_a_user_names_for_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o2775)
    with pytest.raises(StoreError, match="can be written by others"):
        named_folder(tmp_path / "shared", "set X")
    (tmp_path / "link").symlink_to(tmp_path / "shared")
    assert own_folder(tmp_path / "link", "set X") == tmp_path / "shared" / f"aecore-{os.getuid()}"
    (tmp_path / "own").mkdir(0o700)
    assert own_folder(tmp_path / "own", "set X") == tmp_path / "own"


def test_a_note_that_others_could_have_written_is_not_believed(tmp_path: Path) -> None:
    race_module.remember("bucket", tmp_path / "cache")
    assert race_module._remembered("bucket", tmp_path / "cache")
    (tmp_path / "cache").chmod(0o777)
    assert not race_module._remembered("bucket", tmp_path / "cache")
    race_module.remember("other", tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.timeout(60)
@pytest.mark.parametrize("spoil", ["a link to a folder", "a link to nothing", "a pipe"])
def test_a_note_that_is_no_file_is_not_believed_and_not_waited_for(spoil: str, tmp_path: Path, elsewhere: Path) -> None:
    race_module.remember("bucket", tmp_path / "cache")
    (note,) = (tmp_path / "cache").iterdir()
    note.unlink()
    SPOILS[spoil](note, elsewhere)
    assert not race_module._remembered("bucket", tmp_path / "cache")
    race_module.remember("bucket", tmp_path / "cache")
    assert not race_module._remembered("bucket", tmp_path / "cache") and list(elsewhere.iterdir()) == []
