"""The product at full size with everything in a bucket: three datasets, and a kill at every fault point. Part of `make accept`."""

import hashlib
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from aecore.data.dataset import open_dataset
from aecore.errors import DataError
from aecore.store import open_store
from aecore.table.table import open_table
from tests.accept.test_acceptance import FAULTS, ROOT, aepipe, command, hashes, small  # noqa: F401  # `small` is a fixture
from tests.aecore.training import losses
from tests.pipelines.cluster.heads import ray_head
from tests.realdata import unpack as unpack_real
from tests.s3 import S3

pytestmark = [pytest.mark.accept, pytest.mark.timeout(5400)]
NOT_COMPARED = (".tmp/", "records/", "report/", "checkpoints/", "metrics/", "run.", "table.0")  # times, addresses, names of attempts


def content(objects: dict[str, bytes]) -> dict[str, str]:
    """Return name -> sha256 of what does not depend on the place."""
    kept = {name: data for name, data in objects.items() if not name.partition("/")[2].startswith(NOT_COMPARED)}
    return {name: hashlib.sha256(data).hexdigest() for name, data in kept.items()}


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


SETS = {
    "mnist": ("mnist_vae", "train.epochs=1", 70_000),
    "cifar10": ("cifar_ae", "train.epochs=1", 60_000),
    "sprites": ("sprites_adagvae", "train.max_steps=300", 3_072),
}


@pytest.mark.parametrize("name", SETS)
def test_a_data_set_gives_the_same_shards_losses_and_table_from_a_folder_and_in_a_bucket(s3: S3, name: str, request, tmp_path: Path):
    recipe, less, rows = SETS[name]
    choice = [less, "cluster.num_workers=0"]
    source, uploaded = [], []
    if name != "sprites":
        folder = request.getfixturevalue(f"real_{name}")
        begun = time.monotonic()
        s3.upload(folder, "images")
        print(f"{name}: uploaded in {time.monotonic() - begun:.0f} s")
        source, uploaded = [f"source.url={folder}"], [f"source.url={s3.url}/images"]
    seconds = {}
    for place, address, out in (("folder", source, f"{tmp_path}/out"), ("bucket", uploaded, f"{s3.url}/out")):
        begun = time.monotonic()
        answer = aepipe("run", recipe, f"out={out}", *address, *choice)
        seconds[place] = time.monotonic() - begun
        assert answer["encode"]["rows"] == rows
    print(f"{name}: {seconds['folder']:.0f} s in a folder, {seconds['bucket']:.0f} s in a bucket")
    assert content(s3.objects("out/")) == content(files(tmp_path / "out"))
    assert losses(f"{s3.url}/out/run") == losses(tmp_path / "out/run")
    assert open_table(f"{s3.url}/out/table").keys.equals(open_table(str(tmp_path / "out/table")).keys)
    verified = aepipe("verify", f"{s3.url}/out", "--read-data")
    assert verified


def test_one_recipe_makes_the_same_table_here_on_a_named_cluster_and_as_a_job(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    s3.upload(unpack_real("mnist", tmp_path / "images", train_per_class=100, test_per_class=10), "images")
    choice = [f"source.url={s3.url}/images", "train.epochs=2", "shards.max_samples=200", "cluster.num_workers=2"]
    found = {"local": aepipe("run", "mnist_vae", f"out={s3.url}/local", *choice)["encode"]["rows"]}
    with ray_head(num_cpus=2) as head:
        for name, value in head.environment.items():
            monkeypatch.setenv(name, value)
        clusters = {"address": head.address, "job": head.dashboard}
        for kind, address in clusters.items():
            where = [f"out={s3.url}/{kind}", f"cluster.kind={kind}", f"cluster.address={address}"]
            found[kind] = aepipe("run", "mnist_vae", *where, *choice)["encode"]["rows"]
    assert found == dict.fromkeys(("local", "address", "job"), 1100)
    contents = {kind: content(s3.objects(f"{kind}/")) for kind in found}
    assert any(name.startswith("table/data/") for name in contents["local"])
    assert contents["address"] == contents["job"] == contents["local"]


@contextmanager
def polling(url: str, verb: str) -> Iterator[list[str]]:
    """Open the artefact again and again meanwhile; yields what went wrong: a manifest that names something that is not there."""
    wrong: list[str] = []
    stop, store = Event(), open_store(url)

    def poll() -> None:
        while not stop.wait(0.2):
            if not any(name.startswith(("dataset.", "table.")) for name in store.list()):
                continue
            try:
                if verb == "shard":
                    for shard in open_dataset(url).manifest.shards:
                        store.check(shard.tar, verify=True)
                        store.check(shard.index, verify=True)
                elif verb == "encode":
                    assert open_table(url).num_rows == 1099
            except (DataError, AssertionError) as error:
                wrong.append(str(error))

    with ThreadPoolExecutor(1) as pool:
        polled = pool.submit(poll)
        try:
            yield wrong
        finally:
            stop.set()
            polled.result()


@pytest.mark.parametrize(("verb", "role"), [(verb, role) for verb, roles in FAULTS.items() for role in roles])
def test_a_verb_killed_at_any_fault_point_in_a_bucket_ends_like_one_in_a_folder(s3: S3, small: dict[str, Any], verb: str, role: str):  # noqa: F811
    make, whole = small["arguments"][verb], small["base"] / verb
    for stage in ("staged", "synced", "linked"):
        out = f"{s3.url}/{stage}"
        with polling(out, verb) as wrong:
            killed = command(*make(out), fault=f"{role}.{stage}")
            assert killed.returncode == -signal.SIGKILL, (role, stage, killed.stderr[-2000:])
            done = command(*make(out))
            assert done.returncode == 0, done.stderr[-2000:]
        assert not wrong, wrong[:3]
        objects = s3.objects(f"{stage}/")
        expected = {name: sha256 for name, sha256 in hashes(whole).items() if not name.startswith(("run.", "table.0"))}
        assert {name: hashlib.sha256(objects[name]).hexdigest() for name in expected} == expected
        shown = {name for name in objects if not name.startswith(NOT_COMPARED)}
        assert shown == {name for name in expected if not name.startswith(NOT_COMPARED)}
        if verb == "train":
            assert losses(out) == losses(whole)
