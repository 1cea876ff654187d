"""A real S3 server (`server.py`), and a proxy that injects faults (`proxy.py`)."""

import contextlib
import functools
import itertools
import os
import re
import secrets
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.processes import started

REGION, ACCESS_KEY = "us-east-1", "test:tester"
SECRET_KEY = f"canary{secrets.token_hex(12)}"  # no artefact, log, pickle or database may hold it
_numbers = itertools.count(1)


@contextlib.contextmanager
def start_server(folder: Path, latency_s: float = 0.0, *, bare: bool = False) -> Iterator[int]:
    """Start the server in a process of its own and give its port; it ends with the block, or with this process.

    A `bare` one is Swift as it is, whose conditional creates are not atomic.
    """
    command = [
        sys.executable,
        "-W",
        "ignore",
        Path(__file__).with_name("server.py"),
        folder / "server",
        latency_s,
        *(["bare"] if bare else []),
    ]
    environment = {**os.environ, "TEST_S3_REGION": REGION, "TEST_S3_SECRET": SECRET_KEY}
    with started(command, env=environment, stdin=subprocess.PIPE, grace_s=0) as process:  # it has nothing to save
        port = process.wait_for(lambda: re.search(r"ready (\d+)\n", process.out), "the S3 server is ready")
        yield int(port[1])


def s3_environment(port: int, cache: Path) -> dict[str, str]:
    """Return the variables that lead every S3 tool to the server behind `port`."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": REGION,
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AECORE_CACHE": str(cache),
    }


@functools.cache
def _raw_client(port: int) -> Any:
    import botocore.session

    keys = {"aws_access_key_id": ACCESS_KEY, "aws_secret_access_key": SECRET_KEY, "region_name": REGION}
    return botocore.session.Session().create_client("s3", endpoint_url=f"http://127.0.0.1:{port}", **keys)


@dataclass(frozen=True)
class S3:
    """A server, the port that tests reach it by, and a bucket; `raw` is a plain client that passes by any proxy."""

    server: int
    port: int
    bucket: str = ""

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}"

    @property
    def raw(self) -> Any:
        return _raw_client(self.server)

    def with_bucket(self) -> "S3":
        name = f"bucket-{os.getpid()}-{next(_numbers)}"
        self.raw.create_bucket(Bucket=name)
        return S3(self.server, self.port, name)

    def objects(self, prefix: str = "") -> dict[str, bytes]:
        """Return all objects of the bucket below `prefix` by name."""
        client, found = self.raw, dict[str, bytes]()
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix):
            for entry in page.get("Contents", ()):
                found[entry["Key"].removeprefix(prefix)] = client.get_object(Bucket=self.bucket, Key=entry["Key"])["Body"].read()
        return found

    def upload(self, folder: Path, prefix: str) -> None:
        """Put all files below `folder` into the bucket."""
        client, paths = self.raw, [path for path in sorted(folder.rglob("*")) if path.is_file()]

        def put(path: Path) -> None:
            client.put_object(Bucket=self.bucket, Key=f"{prefix}/{path.relative_to(folder)}", Body=path.read_bytes())

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(put, paths))
