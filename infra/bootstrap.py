#!/usr/bin/env python3
"""Set up `.venv` from the exact lock, then run one of the project's jobs in it. Needs only the standard library, no make.

    python3 infra/bootstrap.py [JOB] [arguments]

JOB: setup, demo, test, quick, lint, long, accept, bench, chaos, histories, servers, peers or lock.

One pip command installs everything, so nothing differs from the lock; `pip check` verifies the result. A stamp in `.venv` makes
later calls instant. Only torch depends on the machine: with an NVIDIA GPU it is the plain build (CUDA), without one the `+cpu`
build, from the configured indexes or the one that AECORE_TORCH_INDEX names.
System packages (venv, a C compiler, Chromium for one test) are installed only as root, with apt-get, and only if missing;
AECORE_APT=0 forbids it.
"""

from __future__ import annotations  # an old Python has to reach the message that it is too old

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
LOCK = ROOT / "infra" / "requirements.lock"
PEERS_LOCK, PEERS = ROOT / "infra" / "peers.lock", VENV / "peers"
STAMP = VENV / "aecore-setup.json"
NEEDED_BYTES = 4 << 30
PREFERRED = ("python3.11", "python3.12", "python3.13", "python3.14")  # the lock is made on 3.11
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
REMEDIES = {
    r"No space left on device": "the disk is full: free about 4 GB, then run the same command again",
    r"Temporary failure in name resolution|Max retries exceeded|Connection (refused|reset)|timed out": (
        "no package index could be reached: check the network, or set PIP_INDEX_URL / PIP_PROXY, then run the same command again"
    ),
    r"externally-managed-environment": "pip refused the system's Python: remove .venv and run the same command again",
    r"No matching distribution found for": (
        "this Python or platform has no build of that package: use Python 3.11 on Linux x86_64, or move the pin (CONTRIBUTING.md)"
    ),
}


def say(text: str) -> None:
    """Print a line of the set-up."""
    print(f"[setup] {text}", flush=True)


def fail(text: str) -> NoReturn:
    """End with an error message."""
    sys.exit(f"[setup] error: {text}")


def output_of(*command: str) -> str | None:
    """Return the output of a command, None if it fails or times out."""
    try:
        done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def run_quietly(command: list[str], what: str, timeout_s: float = 3600) -> tuple[int, str]:
    """Run a command, print only a line every 15 s; return (exit status, output)."""
    begun, over = time.monotonic(), threading.Event()

    def still_alive() -> None:
        while not over.wait(15):
            say(f"... {what}: {time.monotonic() - begun:.0f} s")

    threading.Thread(target=still_alive, daemon=True).start()
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        try:
            environ = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "DEBIAN_FRONTEND": "noninteractive"}
            status = subprocess.run(
                command, cwd=ROOT, env=environ, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, timeout=timeout_s
            ).returncode
        except subprocess.TimeoutExpired:
            status = 124
        finally:
            over.set()
        output.seek(0)
        return status, output.read()


def apt_install(*packages: str) -> bool:
    """Install Debian packages if this is root on a system with apt-get and AECORE_APT allows it; return whether that succeeded."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None or os.environ.get("AECORE_APT") == "0":
        return False
    names = " ".join(packages)
    say(f"apt-get install {names}")
    run_quietly(["apt-get", "update"], "apt-get update", 300)
    status, output = run_quietly(["apt-get", "install", "-y", "--no-install-recommends", *packages], f"apt-get install {names}", 600)
    if status != 0:
        say(f"apt-get could not install {names}: {(output.strip().splitlines() or ['no output'])[-1]}")
    return status == 0


def choose_python() -> tuple[str, str]:
    """Return command and version of a Python >= 3.11 that runs (a pyenv shim may not), preferably 3.11."""
    for candidate in (*PREFERRED, sys.executable, "python3"):
        version = output_of(candidate, "-c", "import sys; print('%d.%d' % sys.version_info[:2])")
        if version and tuple(map(int, version.split("."))) >= (3, 11):
            return shutil.which(candidate) or candidate, version.strip()
    fail(f"Python 3.11 or newer is needed, found only {sys.version.split()[0]}: install python3.11 (Debian: apt-get install python3)")


def make_venv() -> list[str]:
    """Create or repair `.venv`; return the pip command that installs into it."""
    own_pip = [str(PYTHON), "-m", "pip"]
    if output_of(*own_pip, "--version"):
        return own_pip
    python, version = choose_python()
    system_pip: list[str] = []
    say(f"making .venv with Python {version}")
    if output_of(python, "-c", "import ensurepip, venv") is None and not apt_install(f"python{version}-venv"):
        if output_of(python, "-c", "import venv") is None or output_of(python, "-m", "pip", "--version") is None:
            fail(f"Python {version} has no venv module: run `sudo apt-get install python{version}-venv`, then the same command again")
        say("ensurepip is missing: the system's pip puts pip into .venv")
        system_pip = [python, "-m", "pip", "--python", str(PYTHON)]
    require_success(*run_quietly([python, "-m", "venv", *(["--without-pip"] if system_pip else []), str(VENV)], "venv"))
    if system_pip:
        require_success(*run_quietly([*system_pip, "install", "-qq", "pip"], "pip"))
    return own_pip


def has_gpu() -> bool:
    """Return whether the NVIDIA driver lists a GPU."""
    return "GPU " in (output_of("nvidia-smi", "-L") or "") if shutil.which("nvidia-smi") else False


def pinned(name: str) -> str:
    """Return the version of a package in the lock."""
    found = re.search(rf"^{name}==(\S+)", LOCK.read_text(), re.MULTILINE)
    return found.group(1) if found else fail(f"{LOCK} does not pin {name}")


def torch_choices(gpu: bool) -> list[tuple[str, str]]:
    """Return the requirements of torch to try in order, each with a warning to print before."""
    plain = f"torch=={pinned('torch')}"
    if gpu:
        return [(plain, "")]
    warning = (
        f"no {plain}+cpu on the configured indexes: installing {plain}, which may bring about 2.7 GB of CUDA packages. "
        "To avoid it stop here and set AECORE_TORCH_INDEX to the address of PyTorch's index of CPU builds"
    )
    return [(f"{plain}+cpu", ""), (plain, warning)]


def install(pip: list[str], gpu: bool) -> None:
    """Install the lock and torch in one resolve, then the project itself in development mode, and check the result."""
    index = os.environ.get("AECORE_TORCH_INDEX")
    extra = ["--extra-index-url", index] if index else []
    for torch, warning in torch_choices(gpu):
        if warning:
            say(warning)
        status, output = run_quietly([*pip, "install", "-qq", *extra, torch, "-r", str(LOCK)], "installing")
        if status == 0 or f"No matching distribution found for {torch}" not in output:
            break
    require_success(status, output)
    if shutil.which("cc") is None and not apt_install("gcc", "libc6-dev"):
        say("no C compiler: shards are written and read more slowly, all else is the same (Debian: sudo apt-get install gcc libc6-dev)")
    for old in (ROOT / "aecore").glob("_native*.so"):
        old.unlink()  # a failed build must not leave the previous one
    require_success(*run_quietly([*pip, "install", "-qq", "--no-deps", "--no-build-isolation", "-e", str(ROOT)], "installing aecore"))
    require_success(*run_quietly([*pip, "check"], "pip check"))


def require_success(status: int, output: str) -> None:
    """End with the output of a failed command and a remedy."""
    if status == 0:
        return
    print("\n".join(output.strip().splitlines()[-25:]), file=sys.stderr)
    for pattern, remedy in REMEDIES.items():
        if re.search(pattern, output):
            fail(remedy)
    fail("the set-up failed (its last lines are above); what is installed is kept, the same command continues")


def wanted_stamp(gpu: bool) -> dict[str, object]:
    """Return the stamp of an up-to-date `.venv`: a hash of its inputs and the properties of the machine."""
    digest = hashlib.sha256()
    for path in (LOCK, ROOT / "pyproject.toml", *sorted((ROOT / "aecore" / "native" / "src").iterdir()), Path(__file__)):
        digest.update(path.read_bytes())
    return {"inputs_sha256": digest.hexdigest(), "gpu": gpu, "root": str(ROOT), "compiler": shutil.which("cc") is not None}


def setup() -> None:
    """Install the lock into `.venv`, unless its stamp is up to date. Concurrent set-ups wait for each other."""
    gpu = has_gpu()
    stamp = wanted_stamp(gpu)
    guard = os.open(LOCK.parent, os.O_RDONLY)
    try:
        fcntl.flock(guard, fcntl.LOCK_EX)
        if STAMP.is_file() and os.access(PYTHON, os.X_OK) and json.loads(STAMP.read_text()) == stamp:
            return
        begun = time.monotonic()
        if shutil.disk_usage(ROOT).free < NEEDED_BYTES and not VENV.exists():
            say(f"only {shutil.disk_usage(ROOT).free >> 20} MiB of disk are free, about 4 GiB are needed")
        pip = make_venv()
        STAMP.unlink(missing_ok=True)
        packages = sum(1 for line in LOCK.read_text().splitlines() if "==" in line)
        say(f"installing {packages} locked packages and torch for {'CUDA' if gpu else 'the CPU'} into .venv (a few minutes the first time)")
        install(pip, gpu)
        STAMP.write_text(json.dumps(wanted_stamp(gpu)))  # a compiler may have been installed
        say(f"ready in {time.monotonic() - begun:.0f} s")
    finally:
        os.close(guard)


def job(*command: str, **environ: str) -> int:
    """Run a command of `.venv` in the root of the project; return its exit status."""
    path = os.pathsep.join([str(PYTHON.parent), os.environ.get("PATH", "")])
    try:
        return subprocess.run(
            [str(PYTHON.parent / command[0]), *command[1:]], cwd=ROOT, env={**os.environ, "PATH": path, **environ}
        ).returncode
    except KeyboardInterrupt:
        return 130


def demo(args: list[str]) -> int:
    """Run `aepipe demo`."""
    return job("aepipe", "demo", *args)


def lint(args: list[str]) -> int:
    """Run ruff and mypy, all of them even if one fails."""
    statuses = [job("ruff", "check", "--quiet", "."), job("ruff", "format", "--check", "--quiet", "."), job("mypy")]
    if any(statuses):
        print("lint: failed (`.venv/bin/ruff check --fix . && .venv/bin/ruff format .` fixes most of ruff's)", flush=True)
    return max(statuses)


def test(args: list[str]) -> int:
    """Run all tests but the long and the full-size ones, and lint beside them, whose complaints come last.

    Without arguments in four processes, because tests of services wait more than they compute; all tests of a file that starts
    services run in one of them.
    """
    servers([])
    peers([])
    options = args or ("-n", "4", "--dist", "loadgroup")
    with tempfile.TemporaryFile("w+") as said:
        linting = subprocess.Popen([sys.executable, "-P", __file__, "lint"], stdout=said, stderr=subprocess.STDOUT)
        # hundreds of processes import the sources: with an empty variable, which counts as none, only the first ones compile them
        tested = job("python", "-m", "pytest", *options, PYTHONDONTWRITEBYTECODE="")
        linted = linting.wait()
        if linted:
            said.seek(0)
            print(said.read(), end="", flush=True)
    return tested or linted


def quick(args: list[str]) -> int:
    """Run the tests that find most faults in at most 90 s, without lint and services."""
    return job("python", "-m", "pytest", "-m", "quick", "-n", "2", *args)


def long(args: list[str]) -> int:
    """Run the tests of many cases, of which `make test` runs few."""
    servers([])
    peers([])
    return job("python", "-m", "pytest", "-m", "long", *(args or ("-n", "3", "--dist", "loadgroup")), AECORE_LONG="1")


def accept(args: list[str]) -> int:
    """Run the full-size acceptance tests."""
    servers([])
    peers([])
    return job("python", "-m", "pytest", "-m", "accept", "--timeout=5400", *args, AECORE_ACCEPT="1")


def bench(args: list[str]) -> int:
    """Run the benchmarks."""
    peers([])
    return job("python", "-m", "tests.benchmarks", *args)


def chaos(args: list[str]) -> int:
    """Run commands under random faults: seconds=600 seed=7 store=local|s3."""
    return job("python", "-m", "tests.chaos", *args)


def histories(args: list[str]) -> int:
    """Run datasets and tables that follow sources through random histories: count=500 seed=1 store=local|s3."""
    return job("python", "-m", "tests.chaos", "histories", *args)


def servers(args: list[str]) -> int:
    """Install the programs that tests start, if they are missing and it is possible; tests skip without them."""
    if not any(map(shutil.which, BROWSERS)) and not apt_install("chromium"):
        say("no Chromium: the test that opens Prefect's page will be skipped (Debian: sudo apt-get install chromium)")
    if not any(Path("/usr/share/postgresql").glob("*/extension/pg_trgm.control")) and not apt_install("postgresql"):
        say("no PostgreSQL: the tests of deployments will be skipped (Debian: sudo apt-get install postgresql)")
    return 0


def peers(args: list[str]) -> int:
    """Install the libraries of the comparisons into a separate folder, if possible; tests skip without them."""
    stamp = PEERS / PEERS_LOCK.name
    if stamp.is_file() and stamp.read_bytes() == PEERS_LOCK.read_bytes():
        return 0
    shutil.rmtree(PEERS, ignore_errors=True)
    command = [str(PYTHON), "-m", "pip", "install", "-qq", "--no-deps", "--target", str(PEERS), "-r", str(PEERS_LOCK)]
    status, output = run_quietly(command, "installing the libraries of the comparisons")
    if status == 0:
        shutil.copy(PEERS_LOCK, stamp)
    else:
        say(f"the tests against other libraries will be skipped: {(output.strip().splitlines() or ['no output'])[-1]}")
    return 0


def lock(args: list[str]) -> int:
    """Resolve pyproject.toml and rewrite the lock for a machine without GPU (no local versions, no CUDA packages)."""
    report = Path(tempfile.mkdtemp()) / "report.json"
    torch = torch_choices(gpu=False)[0][0]
    command = [str(PYTHON), "-m", "pip", "install", "-qq", "--dry-run", "--ignore-installed", "--report", str(report)]
    require_success(*run_quietly([*command, torch, "setuptools", f"{ROOT}[test,bench]"], "resolving"))
    found = {item["metadata"]["name"]: item["metadata"]["version"] for item in json.loads(report.read_text())["install"]}
    ours = {name: version.split("+")[0] for name, version in found.items() if name != "aecore"}
    if any(name.startswith("nvidia") for name in ours):
        fail("the resolve took a CUDA build of torch: set AECORE_TORCH_INDEX or find a CPU build")
    lines = [f"{name}=={version}" for name, version in sorted(ours.items(), key=lambda item: item[0].lower())]
    header = "# Made by `python3 infra/bootstrap.py lock`; do not edit. infra/bootstrap.py chooses torch's CPU or CUDA build."
    LOCK.write_text("\n".join([header, *lines]) + "\n")
    say(f"{len(lines)} packages in {LOCK.name}")
    return 0


JOBS = {
    "setup": lambda args: 0,
    "demo": demo,
    "test": test,
    "quick": quick,
    "lint": lint,
    "long": long,
    "accept": accept,
    "bench": bench,
    "chaos": chaos,
    "histories": histories,
    "servers": servers,
    "peers": peers,
    "lock": lock,
}


def main(argv: list[str]) -> int:
    """Set up, then run the named job."""
    name, args = (argv[0], argv[1:]) if argv else ("setup", [])
    if name not in JOBS:
        print(__doc__)
        return 0 if name in ("-h", "--help", "help") else 2
    if os.name != "posix":
        fail("Linux (or WSL) is needed")
    try:
        setup()
    except KeyboardInterrupt:
        return 130
    return JOBS[name](args)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
