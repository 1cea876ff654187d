"""The small JSON files: nothing in them is believed, and none of version 1 is lost."""

import contextlib
import copy
import dataclasses
import functools
import json
import logging
import operator
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from aecore.artifact.commit import read_record
from aecore.artifact.documents import problems_of, read_json, sealed
from aecore.checkpoint import load_model
from aecore.data.dataset import open_dataset
from aecore.data.sources.sprites import SpritesSpec
from aecore.data.write.job import shard_dataset
from aecore.data.write.plan import SplitSpec
from aecore.data.write.spec import ShardSpec
from aecore.encoding.job import encode_dataset
from aecore.errors import ConfigError, DataError, StoreError
from aecore.store import FileRef, LocalStore, open_store
from aecore.table.table import open_table
from aecore.training.loop import fit
from aecore.training.result import finished_run
from tests.aecore.training import small_job
from tests.documents import content, rewrite

V1 = Path(__file__).parent.parent / "fixtures/v1"


def shard(root: Path) -> None:
    shard_dataset(SpritesSpec(positions=2), str(root / "dataset"), SplitSpec(by="hash", test=0.3), ShardSpec(max_samples=20))


def train(root: Path, out: Path, seed: int = 0) -> None:
    fit(small_job(str(root / "dataset"), out, epochs=4, every_steps=2, seed=seed))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small dataset, run and table; read only."""
    root = tmp_path_factory.mktemp("documents")
    shard(root)
    train(root, root / "run")
    encode_dataset(str(root / "run"), str(root / "dataset"), str(root / "table"))
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """A copy of `made` that may be changed."""
    return Path(shutil.copytree(made, tmp_path / "root"))


def documents(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*.json"))


def read(path: Path) -> dict[str, object]:
    """Read a file as the product does: by its address."""
    for up in path.parents:
        if (up / "run.000001.json").exists() or up.name.startswith("step-"):
            return read_json(open_store(up), path.relative_to(up).as_posix())
    raise AssertionError(path)


def test_every_file_of_a_chain_states_its_format_and_its_hash(made):
    kinds = {path.name.split(".")[0] for path in documents(made)}
    assert kinds >= {"run", "dataset", "table", "checkpoint", "config"}
    for path in documents(made):
        data = json.loads(path.read_bytes())
        assert data["format"] == 2 and len(data["sha256"]) == 64, path
        assert read(path) == content(path)


def flipped(data: bytes, places: int) -> Iterator[bytes]:
    random = np.random.default_rng(0)
    for bit in random.choice(8 * len(data), min(places, 8 * len(data)), replace=False).tolist():
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        yield bytes(changed)


def test_every_flipped_bit_of_every_file_is_found_or_changes_nothing(root):
    for path in documents(root):
        good, said, unseen = path.read_bytes(), content(path), 0
        for bad in flipped(good, 60):
            path.write_bytes(bad)
            try:
                assert read(path) == said  # 1e-05 and 1E-05 are one number
                unseen += 1
            except DataError:
                continue
        assert unseen < 3
        path.write_bytes(good)


def test_a_flipped_bit_in_the_name_of_the_hash_is_no_file_of_version_1(root):
    for path in documents(root):
        path.write_bytes(path.read_bytes().replace(b'"sha256":', b'"sha257":').replace(b'"format":2', b'"format":1'))
        with pytest.raises(DataError, match="states no sha256, and its keys are not those of version 1"):
            read(path)


def test_unknown_missing_and_double_keys_and_a_newer_format_are_named(root):
    path = root / "run/run.000001.json"
    good = content(path)
    rewrite(path, note="x")
    with pytest.raises(DataError, match="keys are not those of this kind of file, unknown: 'note'"):
        read(path)
    path.write_bytes(sealed({key: value for key, value in good.items() if key != "info"}))
    with pytest.raises(DataError, match="missing: 'info'"):
        read(path)
    path.write_bytes(sealed(good).replace(b'"claim":1,', b'"claim":1,"claim":1,'))
    with pytest.raises(DataError, match="the key 'claim' stands there twice"):
        read(path)
    path.write_bytes(sealed(good).replace(b'"seed":0', b'"seed":0,"seed":1', 1))
    with pytest.raises(DataError, match="the key 'seed' stands there twice"):
        read(path)
    path.write_bytes(newer(good))
    with pytest.raises(DataError, match="has format 3, this version reads up to 2: upgrade aecore"):
        read(path)


def newer(data: dict[str, object]) -> bytes:
    """Return what a later version would write."""
    from aecore.store import canonical_json, sha256_json

    body = {**data, "format": 3}
    return canonical_json({**body, "sha256": sha256_json(body)})


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"null", b'{"format": true}', b'{"format": -1}', b"[" * 100_000, b'{"a": NaN}', b"\xff\xfe"]
)
def test_what_is_no_file_of_ours_is_a_data_error(tmp_path, text):
    (tmp_path / "run.000001.json").write_bytes(text)
    with pytest.raises(DataError, match=r"run\.000001\.json is damaged"):
        read_json(open_store(tmp_path), "run.000001.json")


def test_a_file_under_another_name_is_not_what_it_says(root):
    shutil.copy(root / "dataset/dataset.000001.json", root / "dataset/dataset.000002.json")
    with pytest.raises(DataError, match="states number 1, which its name does not"):
        open_dataset(str(root / "dataset"))
    with pytest.raises(DataError, match="states number 1, which its name does not"):  # and no append is written on top of it
        shard(root)
    (first, second, *_) = sorted((root / "dataset/records").iterdir())
    shutil.copy(first, second)
    with pytest.raises(DataError, match="states part"):
        read(second)
    (folder, *_) = sorted((root / "run/checkpoints").iterdir())
    rewrite(folder / "checkpoint.json", step=3)
    with pytest.raises(DataError, match="states step 3, which its name does not"):
        read(folder / "checkpoint.json")


def test_a_read_that_arrives_damaged_is_repeated_past_the_caches(root, monkeypatch, caplog):
    store, reads = open_store(root / "run"), []

    def spoiled(name, *, ref=None, fresh=False, limit=None):
        reads.append(fresh)
        data = (root / "run" / name).read_bytes()
        return data if fresh else data.replace(b'"seed":0', b'"seed":1', 1)

    monkeypatch.setattr(store, "read", spoiled)
    assert read_json(store, "run.000001.json") == content(root / "run/run.000001.json")
    assert reads == [False, True] and "arrived damaged and was read again" in caplog.text


def test_files_of_version_1_open_with_one_note(tmp_path, caplog):
    shutil.copytree(V1, tmp_path / "v1")
    caplog.set_level(logging.INFO)
    paths = [path for path in documents(tmp_path / "v1") if "samples" not in path.parts]
    assert len(paths) > 30
    for path in paths:
        assert read_json(open_store(path.parent), path.name) if path.parent.name != "records" else read(path)
    assert caplog.text.count("was written by version 1") == len({record.getMessage() for record in caplog.records})


def test_a_model_of_another_run_is_not_taken_for_this_runs(root, tmp_path):
    train(root, tmp_path / "other", seed=1)
    shutil.rmtree(root / "run/model")
    shutil.copytree(tmp_path / "other/model", root / "run/model")
    with pytest.raises(DataError, match="model belongs to another run"):
        load_model(str(root / "run"))
    with pytest.raises(DataError, match="model belongs to another run"):
        finished_run(open_store(root / "run"))
    assert load_model(str(root / "run/model")).checkpoint.step >= 4  # a model alone is a model


def test_a_changed_record_commits_no_manifest(root):
    (root / "dataset/dataset.000001.json").unlink()  # as if it had been killed just before
    path = root / "dataset/records/train-000000.json"
    good = content(path)
    for changes in ({"rows": good["rows"] + 1}, {"quarantined": 1}, {"detail": {**good["detail"], "content_sha256": "0" * 64}}):
        rewrite(path, **{**good, **changes})
        with pytest.raises((DataError, ConfigError), match=r"train-000000"):
            shard(root)
        assert not (root / "dataset/dataset.000001.json").exists()
    rewrite(path, **good)
    shard(root)


def test_a_changed_record_of_a_table_commits_no_table(root):
    (root / "table/table.000001.json").unlink()
    path = next((root / "table/records").iterdir())
    good = content(path)
    rewrite(path, rows=good["rows"] - 1, quarantined=1)
    with pytest.raises(DataError, match="its files"):
        encode_dataset(str(root / "run"), str(root / "dataset"), str(root / "table"))
    rewrite(path, **good)
    rows = open_dataset(str(root / "dataset")).manifest.num_samples()
    assert encode_dataset(str(root / "run"), str(root / "dataset"), str(root / "table")).num_rows == rows


def test_a_damaged_listing_of_an_attempt_is_not_committed(root):
    path, manifest = root / "dataset/listings/000001.parquet", root / "dataset/dataset.000001.json"
    good, rows, refused = path.read_bytes(), pq.read_table(path), 0
    for bad in flipped(good, 25):
        manifest.unlink(missing_ok=True)  # as if it had been killed just before
        path.write_bytes(bad)
        try:
            shard(root)
        except (DataError, StoreError):
            refused += 1
            assert not manifest.exists()
        else:  # a bit that no reader looks at
            assert pq.read_table(path).equals(rows)
    assert refused > 5


def test_a_manifest_that_names_a_shard_twice_is_refused(root):
    path = root / "dataset/dataset.000001.json"
    shards = content(path)["shards"]
    rewrite(path, shards=[*shards, shards[0]])
    with pytest.raises(DataError, match="names a shard twice"):
        open_dataset(str(root / "dataset"))


def test_a_part_of_another_checkpoint_is_not_read(root, tmp_path):
    from aecore.encoding.encoder import EncodeSpec
    from aecore.table import open_table

    tables = dict[int, Path]()  # by the size of their part: one checksum of a page in 16 takes 4 bytes instead of 5
    for seed in range(20):
        train(root, tmp_path / f"run-{seed}", seed=seed)
        out = tmp_path / f"table-{seed}"
        encode_dataset(str(tmp_path / f"run-{seed}"), str(root / "dataset"), str(out), EncodeSpec(compression="none"))
        part = open_table(str(out)).parts[0].file
        if part.bytes in tables:
            break
        tables[part.bytes] = out
    shutil.copy(tables[part.bytes] / part.name, out / part.name)
    assert (out / part.name).stat().st_size == part.bytes
    for use in (
        lambda table: table.numpy("mu"),
        lambda table: table.dataset().to_table(),
        lambda table: table.lineage("heart"),
    ):
        with pytest.raises(DataError, match=rf"{part.name} is damaged \(its footer has the sha256 [0-9a-f]+, expected "):
            use(open_table(str(out)))


def test_a_dataset_cannot_send_signed_requests_to_a_place_that_nobody_named(root, monkeypatch):
    dataset = open_dataset(str(root / "dataset"))
    elsewhere = dataclasses.replace(dataset.manifest.shards[0], tar_base_url="s3://somewhere/else")
    with pytest.raises(DataError, match=r"AECORE_TAR_PREFIXES=s3://somewhere/else"):
        dataset.tars(elsewhere)
    monkeypatch.setenv("AECORE_TAR_PREFIXES", "s3://other/one,s3://somewhere/el")
    with pytest.raises(DataError, match="nobody here has named"):
        dataset.tars(elsewhere)
    monkeypatch.setenv("AECORE_TAR_PREFIXES", "s3://other/one,s3://somewhere")
    assert dataset.tars(elsewhere).url == "s3://somewhere/else"


WRONG = [True, -1, 1 << 70, 1.5, "x", None, [], {}]


@pytest.mark.parametrize("name", ["dataset/dataset.000001.json", "table/table.000001.json", "dataset/records/train-000000.json"])
def test_a_value_of_another_type_is_named_whoever_computed_the_hash(root, name):
    """The hash fits; every number, text and list of the first two levels becomes something else, which is refused or means the same."""
    path, folder = root / name, root / name.partition("/")[0]
    good = content(path)
    reads = {"dataset": lambda: open_dataset(str(folder)), "table": lambda: open_table(str(folder))}[folder.name]
    if "records" in name:
        reads = lambda: read_record(open_store(folder), path.stem)  # noqa: E731
    refused = 0
    for keys in [(key,) for key in good] + [
        (key, 0, inner) for key in ("shards", "parts", "files") for inner in (good.get(key) or [{}])[0]
    ]:
        for wrong in WRONG:
            changed = copy.deepcopy(good)
            place = functools.reduce(operator.getitem, keys[:-1], changed)
            if type(place[keys[-1]]) is type(wrong):
                continue
            place[keys[-1]] = wrong
            rewrite(path, **changed)
            with contextlib.suppress(DataError):
                reads()
                continue
            refused += 1
    assert refused > 25


@pytest.mark.parametrize("folder", ["records", "x/records", "checkpoints/step-00000007-aa"])
def test_an_artefact_may_lie_in_a_folder_of_any_name(folder: str, made: Path, tmp_path: Path) -> None:
    for kind in ("dataset", "run", "table"):
        shutil.copytree(made / kind, tmp_path / kind / folder)
        assert problems_of(open_store(tmp_path / kind / folder)) == []
    assert open_dataset(str(tmp_path / "dataset" / folder)).manifest == open_dataset(str(made / "dataset")).manifest
    assert len(open_table(str(tmp_path / "table" / folder))) == len(open_table(str(made / "table")))
    assert load_model(str(tmp_path / "run" / folder)).checkpoint.step == load_model(str(made / "run")).checkpoint.step


def test_what_file_managers_leave_is_no_problem_of_an_artefact(root: Path) -> None:
    for name in (".DS_Store", ".nfs000001", "notes.txt", "a b.json.tmp"):
        (root / "dataset" / name).write_text("x")
        (root / "dataset/records" / name).write_text("x")
    assert problems_of(open_store(root / "dataset")) == []


def test_what_is_read_again_must_be_the_file_that_was_meant(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(root / "table")
    ref, other = (store.put(f"other/{number}/config.json", content, role="x") for number, content in enumerate((b"{", sealed({"a": 1}))))
    monkeypatch.setattr(type(store), "read", _first_this_then_that(type(store).read, other.name))
    with pytest.raises(DataError, match="the manifest says"):
        read_json(store, ref.name, ref=ref)


def _first_this_then_that(real: Callable[..., bytes], other: str) -> Callable[..., bytes]:
    def read(store: LocalStore, name: str, *, ref: FileRef | None = None, fresh: bool = False, **options: int) -> bytes:
        return real(store, other if fresh else name, ref=ref, fresh=fresh, **options)

    return read
