"""Real images for tests and benchmarks: class folders unpacked from the archives in AECORE_DATA (default `../shared/data`).

The archives hold `train/<class>/<name>.<ext>` and `test/<class>/<name>.<ext>`; a folder of the same name, already unpacked, does
as well. Nothing is downloaded: where the data are absent, tests that want them skip and say so.
"""

import os
import re
import shutil
import zipfile
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ARCHIVES = {"mnist": "mnist-png", "cifar10": "cifar10-jpg"}
MEMBER = re.compile(r"(train|test)/([\w-]+)/[\w-]+\.(png|jpg)")


class NoRealData(LookupError):
    """The archive is not on this machine."""


def data_folder() -> Path:
    """Return the folder that holds the archives."""
    return Path(os.environ.get("AECORE_DATA") or ROOT.parent / "shared" / "data")


def unpack(name: str, target: Path, *, train_per_class: int | None = None, test_per_class: int | None = None) -> Path:
    """Write `<split>/<class>/<image>` of dataset `name` below `target` and return it; NoRealData if it is absent.

    The limits take the first images of each class by name; None takes all. An unpacked folder is copied: sources follow no links.
    """
    folder, archive = data_folder() / ARCHIVES[name], data_folder() / f"{ARCHIVES[name]}.zip"
    limits = {"train": train_per_class, "test": test_per_class}
    if folder.is_dir():
        for member in _chosen([path.relative_to(folder).as_posix() for path in folder.glob("*/*/*")], limits):
            (target / member).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / member, target / member)
        return target
    if not archive.is_file():
        raise NoRealData(f"no {archive.name} in {data_folder()}: set AECORE_DATA to the folder that holds it")
    with zipfile.ZipFile(archive) as packed:
        for member in _chosen(packed.namelist(), limits):
            (target / member).parent.mkdir(parents=True, exist_ok=True)
            (target / member).write_bytes(packed.read(member))
    return target


def unpack_real(name: str, target: Path, *, train_per_class: int | None = None, test_per_class: int | None = None) -> Path:
    """`unpack` for tests: skip, saying why, where the data are absent."""
    try:
        return unpack(name, target, train_per_class=train_per_class, test_per_class=test_per_class)
    except NoRealData as error:
        pytest.skip(str(error))


def _chosen(members: list[str], limits: dict[str, int | None]) -> list[str]:
    by_class: dict[tuple[str, str], list[str]] = defaultdict(list)
    for member in sorted(members):
        if match := MEMBER.fullmatch(member):
            by_class[match[1], match[2]].append(member)
    return [member for (split, _), found in by_class.items() for member in found[: limits[split]]]
