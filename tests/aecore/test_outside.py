"""What a disk, the memory or an input does to code that expects nothing: a typed error with a remedy; bugs stay bugs."""

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from aecore.artifact.fanout import PartFailure, attempt, collect
from aecore.errors import AecoreError, ClusterError, ConfigError, DataError, RunFailed, StoreError, WorkerDied, from_outside
from aecore.store import absolute_url


class Task:
    stem = "part-0"


def fail_of(code: int) -> OSError:
    return OSError(code, os.strerror(code), "/some/where")


def too_large() -> object:
    return np.empty(1 << 60, np.uint8)


def too_large_for_torch() -> object:
    return torch.empty(1 << 50, dtype=torch.uint8)


def no_parquet() -> object:
    return pq.ParquetFile(pa.BufferReader(b"PAR1" + bytes(40) + b"PAR1"))


def looping() -> object:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "loop")
        path.symlink_to(path)
        return path.read_bytes()


def full() -> object:
    with open("/dev/full", "w") as file:
        return file.write("x")


def no_endpoint() -> object:
    from botocore.exceptions import EndpointConnectionError

    raise EndpointConnectionError(endpoint_url="http://127.0.0.1:1")


@pytest.mark.parametrize(
    ("fails", "kind", "said"),
    [
        (
            lambda: Path("/nowhere/file").read_bytes(),
            StoreError,
            "'/nowhere/file': No such file or directory; it is not there: check the address",
        ),
        (lambda: os.listdir("/proc/self/stat"), StoreError, "'/proc/self/stat': Not a directory; it is not there"),
        (looping, StoreError, "Too many levels of symbolic links; a link there leads to itself"),
        (lambda: Path("/" + "x" * 300).read_bytes(), StoreError, "File name too long; use a shorter name"),
        (full, StoreError, "No space left on device; what is finished is kept: free space there"),
        (too_large, ClusterError, "not enough memory here .*: use less of it"),
        (too_large_for_torch, ClusterError, "not enough memory here"),
        (lambda: Path("a\0b").read_bytes(), ConfigError, "holds a zero byte"),
        (lambda: b"\xff".decode(), DataError, "an input is not utf-8 text"),
        (lambda: "a \udcff".encode(), ConfigError, r"a name cannot be written as utf-8 \('a .udcff': surrogates not allowed\): rename it"),
        (lambda: Path("~nobody-of-that-name/x").expanduser(), ConfigError, "no home directory here"),
        (no_endpoint, StoreError, "EndpointConnectionError: .*127.0.0.1:1"),
    ],
)
def test_a_fault_of_the_outside_gets_a_type_and_a_remedy(fails: Callable[[], object], kind: type[AecoreError], said: str) -> None:
    with pytest.raises(Exception) as raised:
        fails()
    known = from_outside(raised.value)
    assert type(known) is kind
    with pytest.raises(kind, match=said):
        raise known


@pytest.mark.parametrize(
    "error", [KeyError("x"), TypeError("x"), ValueError("x"), RuntimeError("shapes differ"), AssertionError("x"), RecursionError("x")]
)
def test_a_bug_stays_a_bug(error: Exception) -> None:
    assert from_outside(error) is None


def test_a_typed_error_stays_what_it_is() -> None:
    error = DataError("x")
    assert from_outside(error) is error


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENOSPC])
def test_a_part_whose_storage_fails_is_a_storage_error_without_a_traceback(code: int, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> PartFailure:
        raise fail_of(code)

    failure = attempt(fail, Task())
    assert isinstance(failure, PartFailure)
    with pytest.raises(StoreError, match=f"part-0: StoreError: .*'/some/where': {os.strerror(code)}; .*"):
        collect(lambda make, tasks: iter([failure]), lambda: pytest.fail("no worker is needed"), [Task()])
    assert "Traceback" not in caplog.text


def test_parts_that_failed_in_several_ways_end_as_a_dead_worker_if_there_is_one() -> None:
    tasks = [type("Part", (), {"stem": f"part-{number}"})() for number in range(3)]

    def ended(*kinds: str) -> type[AecoreError]:
        failures = [PartFailure(f"part-{number}", kind, "why") for number, kind in enumerate(kinds)]
        with pytest.raises(AecoreError) as raised:
            collect(lambda make, tasks: iter(failures), lambda: pytest.fail("no worker is needed"), tasks[: len(kinds)])
        return type(raised.value)

    assert ended("StoreError", "WorkerDied", "DataError") is WorkerDied
    assert ended("StoreError", "DataError") is RunFailed
    assert ended("KeyError", "TypeError") is RunFailed


@pytest.mark.parametrize("url", ["file:///tmp/a%00b", "/tmp/a\0b"])
def test_a_zero_byte_in_an_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="out '.*' holds a zero byte .*leave it out"):
        absolute_url(url, "out")


def test_the_home_of_an_unknown_user_is_refused() -> None:
    with pytest.raises(ConfigError, match="out '~nobody-of-that-name/x': that user has no home directory here: write the whole path"):
        absolute_url("~nobody-of-that-name/x", "out")
