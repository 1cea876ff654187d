"""A real S3 server for tests: OpenStack Swift with its s3api, all four servers in one process on loopback.

`python tests/s3/server.py FOLDER [LATENCY [bare]]` prints `ready PORT` and serves until its standard input ends; every request waits
LATENCY seconds. TEST_S3_REGION and TEST_S3_SECRET are the region and the secret key of the user `test:tester`.
Swift looks whether a name is taken before it reads the body, and never again: of conditional creates that overlap all may win. So those of
one name wait for each other here; with `bare` they do not. The folder needs a file system with user xattrs.
"""

# ruff: noqa: E402
import argparse
import os
from pathlib import Path


def arguments() -> argparse.Namespace:
    """Return the arguments of the command line, before anything is patched: `--help` needs nothing of it."""
    parser = argparse.ArgumentParser("python tests/s3/server.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where its files are written; the file system needs user xattrs")
    parser.add_argument("latency", type=float, nargs="?", default=0.0, help="seconds that every request waits")
    parser.add_argument("bare", nargs="?", choices=["bare"], help="conditional creates of one name do not wait for each other")
    found = parser.parse_args()
    if missing := [name for name in ("TEST_S3_REGION", "TEST_S3_SECRET") if name not in os.environ]:
        parser.error(f"set {' and '.join(missing)}: the region, and the secret key of the user test:tester")
    return found


ARGS = arguments() if __name__ == "__main__" else None

import eventlet

eventlet.monkey_patch()  # before anything else is imported: it changes what others would hold already

import json
import sys
from time import monotonic
from typing import Any

from eventlet import listen, semaphore, tpool, wsgi

SERVERS = ("account", "container", "object")
STORAGE_CONF = """\
[DEFAULT]
swift_dir = {etc}
devices = {devices}
mount_check = false
bind_ip = 127.0.0.1
bind_port = {port}
log_level = ERROR
fallocate_reserve = 0
disable_fallocate = true
[pipeline:main]
pipeline = {name}-server
[app:{name}-server]
use = egg:swift#{name}
"""
PROXY_CONF = """\
[DEFAULT]
swift_dir = {etc}
bind_ip = 127.0.0.1
bind_port = {port}
log_level = ERROR
[pipeline:main]
pipeline = catch_errors listing_formats s3api tempauth bulk slo proxy-server
[app:proxy-server]
use = egg:swift#proxy
allow_account_management = true
account_autocreate = true
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:bulk]
use = egg:swift#bulk
[filter:slo]
use = egg:swift#slo
[filter:s3api]
use = egg:swift#s3api
s3_acl = no
location = {region}
auth_pipeline_check = false
dns_compliant_bucket_names = true
min_segment_size = 1
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = {secret} .admin
"""


def late(app: Any, latency_s: float) -> Any:
    """Return the WSGI application, answering `latency_s` later."""

    def answer(environ: Any, start_response: Any) -> Any:
        eventlet.sleep(latency_s)
        return app(environ, start_response)

    return answer


class Memory:
    """What Swift keeps in memcached: that accounts and buckets are there. Without it every request asks two more servers."""

    def __init__(self, app: Any) -> None:
        self.app, self._kept = app, dict[str, tuple[float, str]]()

    def __call__(self, environ: Any, start_response: Any) -> Any:
        environ["swift.cache"] = self
        return self.app(environ, start_response)

    def get(self, key: str, **_: Any) -> Any:
        until, text = self._kept.get(key, (0.0, "null"))
        return json.loads(text) if monotonic() < until else None

    def set(self, key: str, value: Any, *, time: float, **_: Any) -> None:
        self._kept[key] = (monotonic() + time, json.dumps(value))

    def delete(self, key: str, **_: Any) -> None:
        self._kept.pop(key, None)


def atomic(app: Any) -> Any:
    """Return the WSGI application, in which the conditional creates of one name wait for each other."""
    locks: dict[str, semaphore.Semaphore] = {}

    def answer(environ: Any, start_response: Any) -> Any:
        if "HTTP_IF_NONE_MATCH" not in environ:
            return app(environ, start_response)
        with locks.setdefault(environ["PATH_INFO"], semaphore.Semaphore()):
            return list(app(environ, start_response))

    return answer


def serve(root: Path, latency_s: float, bare: bool, region: str, secret: str) -> None:
    etc, devices = root / "etc", root / "devices"
    etc.mkdir(parents=True)
    (devices / "disk").mkdir(parents=True)
    (etc / "swift.conf").write_text(
        "[swift-hash]\nswift_hash_path_prefix = a\nswift_hash_path_suffix = b\n[storage-policy:0]\nname = only\ndefault = yes\n"
    )
    import swift.common.utils

    swift.common.utils.SWIFT_CONF_FILE = str(etc / "swift.conf")
    from swift.common import storage_policy
    from swift.common.ring.builder import RingBuilder
    from swift.common.wsgi import loadapp

    storage_policy.reload_storage_policies()
    sockets = {name: listen(("127.0.0.1", 0), backlog=512) for name in (*SERVERS, "proxy")}
    ports = {name: socket.getsockname()[1] for name, socket in sockets.items()}
    for name in SERVERS:
        ring = RingBuilder(2, 1, 0)
        place = {"ip": "127.0.0.1", "port": ports[name], "replication_ip": "127.0.0.1", "replication_port": ports[name]}
        ring.add_dev({"id": 0, "region": 1, "zone": 1, "weight": 1, "device": "disk", "meta": "", **place})
        ring.rebalance()
        ring.get_ring().save(str(etc / f"{name}.ring.gz"))
        (etc / f"{name}.conf").write_text(STORAGE_CONF.format(etc=etc, devices=devices, port=ports[name], name=name))
    (etc / "proxy.conf").write_text(PROXY_CONF.format(etc=etc, port=ports["proxy"], region=region, secret=secret))
    with open(os.devnull, "w") as nothing:
        for name in (*SERVERS, "proxy"):
            app = loadapp(str(etc / f"{name}.conf"))
            if name == "proxy":
                app = Memory(app if bare else atomic(app))
                app = late(app, latency_s) if latency_s else app
            eventlet.spawn(wsgi.server, sockets[name], app, log=nothing, log_output=False, max_size=512)
        print("ready", ports["proxy"], flush=True)
        tpool.execute(sys.stdin.buffer.read)  # until it ends: the server never outlives the test run that started it


if ARGS is not None:
    serve(ARGS.folder, ARGS.latency, ARGS.bare == "bare", os.environ["TEST_S3_REGION"], os.environ["TEST_S3_SECRET"])
    os._exit(0)
