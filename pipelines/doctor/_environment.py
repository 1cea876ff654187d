"""Checks the versions of Python and packages, and which GPUs torch sees."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from aecore.errors import ConfigError
from pipelines.doctor._check import Check, Finding, failed, ok, skipped, warning

OLDEST = (3, 11)
LOCK = Path(__file__).resolve().parent.parent.parent / "infra" / "requirements.lock"
INSTALL = "set it up again with `python3 infra/bootstrap.py setup`, or install the versions of infra/requirements.lock"
# an import shows none of these; each was seen with the pinned Prefect and a version above the required range
KNOWN_BAD = (
    ("prefect", "<3.9", "fastapi", "every flow fails at its start"),
    ("prefect", "<3.9", "sqlalchemy", "cron schedules never fire"),
)


def environment_checks() -> list[Check]:
    return [
        Check("python", python, ConfigError),
        Check("packages", packages, ConfigError),
        Check("known conflicts", conflicts, ConfigError),
        Check("torch", torch, ConfigError, timeout_s=120),
    ]


def python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] < OLDEST:
        return failed("python", f"Python {version}, needs {OLDEST[0]}.{OLDEST[1]} or newer", INSTALL)
    return ok("python", f"Python {version}")


def installed(name: str) -> Version | None:
    """Return the version of an installed package, None if it is not installed."""
    try:
        return Version(metadata.version(name))
    except metadata.PackageNotFoundError:
        return None


def _requirements() -> list[Requirement] | None:
    """Return the requirements of aecore, None if it is not installed as a package."""
    try:
        wanted = [Requirement(text) for text in metadata.requires("aecore") or ()]
    except metadata.PackageNotFoundError:
        return None
    return [need for need in wanted if need.marker is None or need.marker.evaluate({"extra": ""})]


def packages() -> Iterator[Finding]:
    """Compare the installed versions with the requirements of aecore, and with the lock of a development checkout."""
    wanted = _requirements()
    if wanted is None:
        yield skipped("packages", "aecore runs from its sources and is not installed: its requirements are unknown")
        return
    fitting = 0
    for need in wanted:
        version = installed(need.name)
        if version is None or not need.specifier.contains(version, prereleases=True):
            there = "is not installed" if version is None else f"is {version}"
            yield failed("packages", f"{need.name} {there}, needs {need.specifier}", INSTALL)
        else:
            fitting += 1
    if fitting == len(wanted):
        yield ok("packages", f"all {fitting} have a required version")
    yield from _drift()


def _drift() -> Iterator[Finding]:
    if not LOCK.is_file():
        return
    pins = [Requirement(line.split("#")[0].strip()) for line in LOCK.read_text().splitlines() if "==" in line and line[0].isalnum()]
    others = [f"{pin.name} {version} ({pin.specifier})" for pin in pins if (version := installed(pin.name)) and not _public(pin, version)]
    if others:
        more = f", and {len(others) - 5} more" if len(others) > 5 else ""
        yield warning("packages", f"other versions than in the lock: {', '.join(others[:5])}{more}", INSTALL)


def _public(pin: Requirement, version: Version) -> bool:
    """Return whether a version is the pinned one, apart from a local suffix such as `+cpu`."""
    return pin.specifier.contains(version.public, prereleases=True) or pin.specifier.contains(version, prereleases=True)


def conflicts() -> Iterator[Finding]:
    """Look for pairs of versions that are known to be incompatible."""
    wanted = _requirements()
    if wanted is None:
        yield skipped("known conflicts", "aecore runs from its sources and is not installed: its requirements are unknown")
        return
    needs, clean = {need.name: need for need in wanted}, True
    for owner, owner_range, name, what in KNOWN_BAD:
        first, second, need = installed(owner), installed(name), needs[name]
        if first is None or second is None:
            continue
        if SpecifierSet(owner_range).contains(first, prereleases=True) and not need.specifier.contains(second, prereleases=True):
            clean = False
            message = f"{owner} {first} with {name} {second}, needs {need.specifier}: with newer ones {what}"
            yield failed("known conflicts", message, f"pip install '{need}'")
    if clean:
        yield ok("known conflicts", "none among " + ", ".join(f"{owner} and {name}" for owner, _, name, _ in KNOWN_BAD))


def torch() -> Iterator[Finding]:
    """Report the version of torch and the GPUs that it sees."""
    import torch

    cuda, driver = torch.cuda.is_available(), _driver()
    if cuda:
        names = ", ".join(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))
        yield ok("torch", f"torch {torch.__version__}, CUDA {torch.version.cuda}, {torch.cuda.device_count()} GPU: {names}")
    elif driver:
        build = f"its build is for CUDA {torch.version.cuda}" if torch.version.cuda else "it is a build for CPUs"
        message = f"torch {torch.__version__} sees no GPU although the driver knows {driver}: {build}"
        yield warning("torch", message, "install the CUDA build that fits the driver: python3 infra/bootstrap.py setup on this machine")
    else:
        yield ok("torch", f"torch {torch.__version__}, no GPU on this machine (cluster.use_gpu=false)")


def _driver() -> str:
    """Return the names of the GPUs that the NVIDIA driver lists, "" without any."""
    if shutil.which("nvidia-smi") is None:
        return ""
    try:
        done = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return ", ".join(done.stdout.split("\n")).strip(", ") if done.returncode == 0 else ""
