"""Folders in places that others can write to: ours and real, or not used."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from aecore.errors import StoreError
from aecore.store import FileRef, named_folder, open_store, private_folder
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


def test_a_note_that_others_could_have_written_is_not_believed(tmp_path: Path) -> None:
    race_module.remember("bucket", tmp_path / "cache")
    assert race_module._remembered("bucket", tmp_path / "cache")
    (tmp_path / "cache").chmod(0o777)
    assert not race_module._remembered("bucket", tmp_path / "cache")
    race_module.remember("other", tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 1
