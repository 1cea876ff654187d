"""encode: every sample of the dataset is one row or one quarantined row, for any number of workers and kills."""

import dataclasses
import errno
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import simplejpeg
import torch
from PIL import Image

from aecore._base.noise import seed_of, step_noise
from aecore.artifact.commit import PartRecord, read_record, recorded_parts, write_record
from aecore.artifact.fanout import serial
from aecore.checkpoint.config import ModelConfig
from aecore.checkpoint.weights import load_model
from aecore.data.dataset import open_dataset
from aecore.data.format.decode import decoder_version
from aecore.data.format.transform import TransformSpec
from aecore.data.sources.folder import FolderSpec
from aecore.data.write.job import shard_dataset
from aecore.encoding.job import EncodePlan, EncodeSpec, EncodeWorker, _num_streams, encode_dataset, plan_encoding
from aecore.errors import ConfigError, DataError, RunFailed, StoreError
from aecore.nn.mlp import MLPSpec
from aecore.registry import from_dict
from aecore.store import AlreadyExists, open_store
from aecore.store._environment import FAULT_STAGES
from aecore.table.part import RefusedRow, commit_part, commit_quarantine, fixed_size_list, numpy_view, part_metadata
from aecore.table.table import LatentTable, open_table
from aecore.table.verify import verify_table
from aecore.variational import VAESpec
from tests.aecore.encoding import (
    DIM,
    SIZE,
    ae_config,
    encode,
    folder_dataset,
    image_folder,
    model_config,
    saved_run,
    sprites_dataset,
    three_workers,
    tree,
    undecodable_png,
)
from tests.processes import children, join


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return sprites_dataset(tmp_path_factory.mktemp("encode") / "dataset")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_run(tmp_path_factory.mktemp("encode") / "run")


def stored_pixels(data: str) -> tuple[list[str], torch.Tensor]:
    """All keys and pixels (0 to 1) of a dataset in manifest order, read without the loader."""
    dataset, keys, pixels = open_dataset(data), [], []
    for shard in dataset.manifest.shards:
        reader = dataset.reader(shard)
        keys += reader.keys
        pixels += [np.asarray(Image.open(io.BytesIO(member))) for member in reader.read_rows(list(range(shard.samples)))]
    return keys, torch.from_numpy(np.stack(pixels)).float().unsqueeze(1) / 255


def test_rows_are_the_datasets_samples_with_the_posterior_of_each(tmp_path: Path, data: str, run: str) -> None:
    table = encode(run, data, tmp_path / "table")
    keys, pixels = stored_pixels(data)
    expected: Any = load_model(run).model.encode(pixels, sample=False)
    assert table.keys.to_pylist() == keys
    torch.testing.assert_close(table.torch("mu"), expected.mu, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(table.torch("log_var"), expected.log_var, rtol=1e-5, atol=1e-6)


def test_index_metadata_passes_through_and_byte_facts_stay_behind(tmp_path: Path, data: str, run: str) -> None:
    table = encode(run, data, tmp_path / "table")
    dataset = open_dataset(data)
    indexes = [dataset.reader(shard).index for shard in dataset.manifest.shards]
    for name in ("ordinal", "label", "label_name", "factor_scale", "factor_x"):
        assert table.arrow(name).to_pylist() == [value for index in indexes for value in index[name].to_pylist()], name
    assert table.arrow("shard").to_pylist() == [shard.stem for shard in dataset.manifest.shards for _ in range(shard.samples)]
    plain = encode(run, data, tmp_path / "plain", EncodeSpec(batch=16, columns=("metadata",)))
    assert not {"source", "sha256", "sample_sha256", "members", "width", "height", "mode"} & set(plain.columns)
    assert "index_columns" not in plain.manifest.identity, "as tables of before"


def test_equal_bytes_for_any_number_of_workers(tmp_path: Path, data: str, run: str) -> None:
    spec = EncodeSpec(batch=16, reconstruction=True, kl=True, sample=True)
    encode(run, data, tmp_path / "one", spec)
    encode(run, data, tmp_path / "three", spec, fan_out=three_workers)
    one, three = (tree(tmp_path / name, without=("records", ".tmp")) for name in ("one", "three"))
    assert one.keys() == three.keys()
    assert [name for name in one if one[name] != three[name]] == []


def test_equal_bytes_for_any_number_of_streams(tmp_path: Path, data: str, run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row_bytes = 4 * int(np.prod(open_dataset(data).input_shape()))
    monkeypatch.setattr("aecore.encoding.encoder.CACHED_BYTES", 5 * row_bytes)  # five rows at once
    spec, trees = EncodeSpec(batch=16, reconstruction=True, kl=True, sample=True), []
    for num_streams in (1, 2, 5):
        monkeypatch.setattr("aecore.encoding.job._num_streams", lambda device, threads, num_streams=num_streams: num_streams)
        encode(run, data, tmp_path / f"{num_streams}", spec)
        trees.append(tree(tmp_path / f"{num_streams}", without=("records", ".tmp")))
    assert trees[0] == trees[1] == trees[2]
    usual = encode(run, data, tmp_path / "usual", dataclasses.replace(spec, batch=5))
    table = open_table(str(tmp_path / "5"))
    np.testing.assert_allclose(table.numpy("mu"), usual.numpy("mu"), rtol=1e-5, atol=1e-6)


def test_state_that_a_model_keeps_while_it_works_is_not_shared_between_streams(tmp_path: Path, data: str, run: str) -> None:
    plan = plan_encoding(run, data, str(tmp_path / "table"), EncodeSpec())
    worker = EncodeWorker(plan.setup, num_streams=3)
    models = [worker.free.get().model for _ in range(3)]
    assert len({id(module) for model in models for module in model.modules()}) == 3 * len(list(models[0].modules()))
    for first, *others in zip(*(model.parameters() for model in models), strict=True):
        assert all(other is first for other in others)


def test_a_model_that_cannot_be_copied_is_encoded_by_one_lane(tmp_path: Path, data: str, run: str) -> None:
    plan = plan_encoding(run, data, str(tmp_path / "table"), EncodeSpec())
    loaded = load_model(run)
    loaded.model.lock = threading.Lock()  # type: ignore[assignment]  # as a user's model may have
    assert EncodeWorker(plan.setup, loaded, num_streams=3).free.qsize() == 1
    del loaded.model.lock
    assert EncodeWorker(plan.setup, loaded, num_streams=3).free.qsize() == 3


@pytest.mark.parametrize(("device", "threads", "num_streams"), [("cpu", 1, 3), ("cpu", 2, 1), ("cpu", 4, 1), ("cuda", 1, 1)])
def test_number_of_streams_is_what_the_cpus_of_this_process_carry(
    device: str, threads: int, num_streams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 2, 5})
    assert _num_streams(device, threads) == num_streams


def test_a_worker_in_another_process_has_one_lane(tmp_path: Path, data: str, run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1, 2})
    make_worker = plan_encoding(run, data, str(tmp_path / "table"), EncodeSpec()).make_worker
    assert make_worker().num_streams == 3
    assert pickle.loads(pickle.dumps(make_worker))().num_streams == 1


def test_ranges_of_a_shard_hold_the_same_bits_as_the_whole(tmp_path: Path, data: str, run: str) -> None:
    whole = encode(run, data, tmp_path / "whole", EncodeSpec(batch=8, sample=True))
    ranges = encode(run, data, tmp_path / "ranges", EncodeSpec(batch=8, sample=True, rows_per_part=10))
    assert [part.row_start for part in ranges.parts[:2]] == [0, 16], "10 rows are rounded up to two batches of 8"
    assert ranges.parts[1].file.name == "data/split=train/train-000000-r000001.parquet"
    assert ranges.keys.to_pylist() == whole.keys.to_pylist()
    for name in ("mu", "log_var", "z"):
        assert np.array_equal(ranges.numpy(name), whole.numpy(name)), name
    verify_table(ranges, read_data=True, dataset_url=data)


def test_nothing_new_changes_nothing(tmp_path: Path, data: str, run: str) -> None:
    first = encode(run, data, tmp_path / "table")
    before = tree(tmp_path / "table")
    assert encode(run, data, tmp_path / "table").manifest == first.manifest
    assert tree(tmp_path / "table") == before


def test_an_append_encodes_the_new_shards_only(tmp_path: Path, run: str) -> None:
    images = image_folder(tmp_path / "images", "train", range(40))
    data = folder_dataset(images, tmp_path / "dataset")
    old = encode(run, data, tmp_path / "table")
    before = tree(tmp_path / "table")
    folder_dataset(image_folder(image_folder(images, "train", range(40, 70)), "test", range(70, 80)), tmp_path / "dataset")
    made: list[str] = []
    new = encode(run, data, tmp_path / "table", on_part=lambda record, done, total: made.append(record.part))
    assert (old.num_rows, new.num_rows, new.manifest.number) == (40, 80, 2)
    known = {part.stem for part in old.parts}
    assert made == [part.stem for part in new.parts if part.stem not in known]
    assert [part for part in new.parts if part.stem in known] == list(old.parts)
    after = tree(tmp_path / "table")
    assert {name: after[name] for name in before} == before
    assert [shard.stem for shard in open_dataset(data).manifest.shards] == [part.shard for part in new.parts]
    verify_table(new, read_data=True, dataset_url=data)
    assert open_table(str(tmp_path / "table"), number=1).keys.to_pylist() == old.keys.to_pylist()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"batch": 8}, "\n  encode.batch: there 16, asked 8\n"),
        ({"dtype": "float16"}, "\n  encode.dtype: there 'float32', asked 'float16'\n"),
        ({"kl": True}, ":\n  encode.kl: there False, asked True\n"),
        ({"reconstruction": True}, ":\n  encode.reconstruction: there False, asked True\n"),
        ({"sample": True}, ":\n  encode.sample: there False, asked True\n"),
        ({"rows_per_part": 16}, "\n  encode.rows_per_part: there 0, asked 16\n"),
    ],
)
def test_a_table_of_another_identity_is_refused_and_the_fields_are_named(
    tmp_path: Path, data: str, run: str, changes: Any, field: str
) -> None:
    encode(run, data, tmp_path / "table")
    before = tree(tmp_path / "table")
    with pytest.raises(ConfigError, match="holds another table:") as error:
        encode_dataset(run, data, str(tmp_path / "table"), from_dict(EncodeSpec, {"batch": 16, **changes}))
    assert field in str(error.value) and ("columns." in str(error.value)) == ("dtype" in changes)
    assert tree(tmp_path / "table") == before
    full = EncodeSpec(batch=16, kl=True, reconstruction=True, sample=True)
    encode(run, data, tmp_path / "full", full)
    with pytest.raises(ConfigError) as error:
        encode_dataset(run, data, str(tmp_path / "full"), EncodeSpec(batch=16, reconstruction=True, sample=True))
    assert ":\n  encode.kl: there True, asked False\nwrite to another URL" in str(error.value)


def test_another_checkpoint_is_another_table_also_before_the_first_commit(tmp_path: Path, data: str, run: str) -> None:
    def fail(make_worker: Any, tasks: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_dataset(run, data, str(tmp_path / "table"), fan_out=fail)
    other = saved_run(tmp_path / "other", seed=1)
    with pytest.raises(ConfigError, match=rf"checkpoint_sha256: there {run}/model \(.*asked {other}/model \("):
        encode_dataset(other, data, str(tmp_path / "table"))


def test_another_dataset_is_refused(tmp_path: Path, data: str, run: str) -> None:
    encode(run, data, tmp_path / "table")
    other = sprites_dataset(tmp_path / "other", num_samples=60)
    with pytest.raises(ConfigError, match="a table belongs to one dataset"):
        encode(run, other, tmp_path / "table")


def test_data_that_does_not_fit_the_checkpoint_is_refused_before_any_work(tmp_path: Path, data: str) -> None:
    run = saved_run(tmp_path / "run", model_config(shape=(3, 32, 32)))
    with pytest.raises(DataError, match=r"of shape \(1, 12, 12\); checkpoint .* expects \(3, 32, 32\)"):
        encode_dataset(run, data, str(tmp_path / "table"))
    assert not (tmp_path / "table").exists()


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(tmp_path: Path, data: str, run: str) -> None:
    plan = encode_dataset(run, data, str(tmp_path / "table"), dry_run=True)
    assert isinstance(plan, EncodePlan)
    assert (plan.to_dict()["new_rows"], plan.to_dict()["new_parts"]) == (120, len(open_dataset(data).manifest.shards))
    assert not (tmp_path / "table").exists()


def test_rows_that_do_not_decode_are_quarantined_and_accounted_for(tmp_path: Path, run: str) -> None:
    images = image_folder(tmp_path / "images", "train", range(40))
    for name in ("square/bad-1.png", "square/bad-2.png"):
        (images / "train" / name).write_bytes(undecodable_png())
    data = folder_dataset(images, tmp_path / "dataset", max_samples=42)
    table = encode(run, data, tmp_path / "table", EncodeSpec(batch=16, sample=True))
    assert (table.num_rows, table.manifest.quarantined) == (40, 2)
    refused = pq.read_table(tmp_path / "table/quarantine/train-000000.parquet")
    assert sorted(refused["key"].to_pylist()) == ["train/square/bad-1", "train/square/bad-2"]
    assert set(refused["stage"].to_pylist()) == {"decode"}
    index = open_dataset(data).reader(open_dataset(data).manifest.shards[0]).index
    bytes_sha256 = dict(zip(index["key"].to_pylist(), index["sha256"].to_pylist(), strict=True))
    assert refused["sha256"].to_pylist() == [bytes_sha256[key] for key in refused["key"].to_pylist()]
    report = verify_table(table, read_data=True, dataset_url=data)
    assert report.num_rows + report.quarantined == open_dataset(data).manifest.num_samples()


def test_latents_beyond_float16_are_quarantined_not_written_as_infinity(tmp_path: Path, data: str, run: str) -> None:
    largest = np.abs(encode(run, data, tmp_path / "float32").numpy("mu")).max(1)

    def blow_up(model: Any) -> None:
        model.sampling_layer.mu.weight.mul_(65504 / np.median(largest))
        model.sampling_layer.mu.bias.mul_(65504 / np.median(largest))

    big = saved_run(tmp_path / "big", change=blow_up)
    table = encode(big, data, tmp_path / "float16", EncodeSpec(batch=16, dtype="float16"))
    assert 40 < table.num_rows < 80
    assert np.isfinite(table.numpy("mu")).all()
    assert table.numpy("mu").dtype == np.float16
    verify_table(table, read_data=True, dataset_url=data)


def test_a_model_without_a_finite_latent_makes_no_table(tmp_path: Path, data: str) -> None:
    run = saved_run(tmp_path / "run", change=lambda model: model.sampling_layer.mu.weight.fill_(float("nan")))
    with pytest.raises(RunFailed, match="all 120 rows were refused"):
        encode_dataset(run, data, str(tmp_path / "table"))
    with pytest.raises(DataError, match="unfinished encoding"):
        open_table(str(tmp_path / "table"))


def test_a_damaged_shard_fails_its_part_and_keeps_the_others(tmp_path: Path, run: str) -> None:
    data = sprites_dataset(tmp_path / "dataset")
    victim = tmp_path / "dataset/shards/train-000001.tar"
    good = victim.read_bytes()
    place = pq.read_table(tmp_path / "dataset/shards/train-000001.parquet")["members"][0].as_py()
    damaged = bytearray(good)
    damaged[next(member["offset"] for member in place if member["ext"] == "png") + 60] ^= 1
    victim.write_bytes(damaged)
    with pytest.raises(DataError, match="1 of 4 parts failed(.|\n)*train-000001"):
        encode(run, data, tmp_path / "table")
    victim.write_bytes(good)
    made: list[str] = []
    table = encode(run, data, tmp_path / "table", on_part=lambda record, done, total: made.append(record.part))
    assert made == ["train-000001"]
    verify_table(table, read_data=True, dataset_url=data)


def test_sampled_latents_follow_from_seed_key_and_sample(tmp_path: Path, data: str, run: str) -> None:
    table = encode(run, data, tmp_path / "table", EncodeSpec(batch=16, sample=True, seed=5))
    mu, log_var, z = (table.numpy(name) for name in ("mu", "log_var", "z"))
    samples = zip(table.keys.to_pylist(), table.arrow("sample_sha256").to_pylist(), strict=True)
    eps = torch.cat([step_noise(seed_of("encode", 5, key, sha256), 0, (1, DIM)) for key, sha256 in samples])
    np.testing.assert_allclose(z, mu + np.exp(log_var / 2) * eps.numpy(), rtol=1e-4, atol=1e-6)


def test_sampled_latents_of_a_table_of_before_follow_from_seed_shard_and_batch(tmp_path: Path, data: str, run: str) -> None:
    table = encode(run, data, tmp_path / "table", EncodeSpec(batch=16, sample=True, seed=5, bits=1))
    part = table.parts[0]
    mu, log_var, z = (table.numpy(name)[: part.rows] for name in ("mu", "log_var", "z"))
    cuts = [(number, min(16, part.rows - 16 * number)) for number in range(-(-part.rows // 16))]
    eps = torch.cat([step_noise(seed_of("encode", 5, part.shard_sha256), number, (rows, 1, DIM)) for number, rows in cuts]).squeeze(1)
    np.testing.assert_allclose(z, mu + np.exp(log_var / 2) * eps.numpy(), rtol=1e-5)
    other = encode(run, data, tmp_path / "other", EncodeSpec(batch=16, sample=True, seed=6, bits=1))
    assert np.array_equal(other.numpy("mu"), table.numpy("mu"))
    assert not np.array_equal(other.numpy("z"), table.numpy("z"))


def test_optional_columns_are_what_their_names_say(tmp_path: Path, data: str, run: str) -> None:
    table = encode(run, data, tmp_path / "table", EncodeSpec(batch=16, reconstruction=True, kl=True))
    pixels = stored_pixels(data)[1]
    model: Any = load_model(run).model
    with torch.no_grad():
        error = (model(pixels, sample=False).x_hat.squeeze(1) - pixels).square().flatten(1).mean(1)
    posterior = torch.distributions.Normal(table.torch("mu"), (table.torch("log_var") / 2).exp())
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(table.torch("recon_error"), error, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(table.torch("kl"), kl, rtol=1e-4, atol=1e-6)


def test_a_plain_autoencoder_gives_z_and_refuses_what_needs_a_posterior(tmp_path: Path, data: str) -> None:
    run = saved_run(tmp_path / "ae", ae_config())
    table = encode(run, data, tmp_path / "table")
    assert dict(table.manifest.columns) == {"z": {"dtype": "float32", "dim": DIM}}
    assert table.numpy("z").shape == (120, DIM)
    with pytest.raises(ConfigError, match="has no posterior"):
        encode_dataset(run, data, str(tmp_path / "other"), EncodeSpec(kl=True))


def test_every_part_says_what_it_was_made_of(tmp_path: Path, data: str, run: str) -> None:
    table = encode(run, data, tmp_path / "table")
    loaded = load_model(run)
    for part in table.parts:
        metadata = part_metadata(pq.read_schema(tmp_path / "table" / part.file.name))
        assert metadata["checkpoint_sha256"] == loaded.sha256
        assert metadata["shard_sha256"] == part.shard_sha256
        assert {
            "checkpoint_step",
            "config",
            "preprocessing_sha256",
            "latent_shape",
            "dtype",
            "batch",
            "device",
            "threads",
            "versions",
        } <= metadata.keys()
    lineage = table.metadata["lineage"]
    assert lineage["checkpoint"]["sha256"] == loaded.sha256
    assert lineage["dataset"] == {"url": data, "number": 1, "sha256": open_dataset(data).manifest.dataset_sha256}


def test_a_part_of_other_floats_from_a_lost_attempt_is_taken_as_it_is(tmp_path: Path, data: str, run: str) -> None:
    """A GPU attempt that wrote its part and died before the record: the bytes there stay, and are the ones recorded."""
    table = encode(run, data, tmp_path / "first")
    name = table.parts[0].file.name
    there = table.read(table.parts[0])
    other = fixed_size_list(np.nextafter(numpy_view(there["mu"]), np.float32(9)))
    log_var = fixed_size_list(numpy_view(there["log_var"]))  # as it was written: a list that was read has another name inside
    part = there.drop_columns(["mu", "log_var"]).append_column("mu", other).append_column("log_var", log_var)
    commit_part(open_store(str(tmp_path / "second")), name, part, compression="none")
    left = (tmp_path / "second" / name).read_bytes()
    second = encode(run, data, tmp_path / "second")
    assert (tmp_path / "second" / name).read_bytes() == left
    assert (second.numpy("mu")[:3] > table.numpy("mu")[:3]).all()
    assert second.parts[0].file.bytes == len(left)
    verify_table(second, read_data=True, dataset_url=data)


def test_a_part_name_taken_by_other_rows_is_refused(tmp_path: Path, data: str, run: str) -> None:
    table = encode(run, data, tmp_path / "first")
    name = table.parts[0].file.name
    (tmp_path / "second" / name).parent.mkdir(parents=True)
    pq.write_table(table.read(table.parts[0]).slice(1), tmp_path / "second" / name, write_page_checksum=True)
    with pytest.raises(AlreadyExists, match="is another part \\(differs in keys\\): nothing was overwritten. .* remove this file"):
        encode(run, data, tmp_path / "second")


def _die_at(fault: str, run: str, data: str, out: str) -> None:
    os.environ["AECORE_FAULT"] = fault
    torch.set_num_threads(1)
    encode_dataset(run, data, out, EncodeSpec(batch=16))
    os._exit(0)


def test_killed_anywhere_and_run_again_gives_the_same_bytes(tmp_path: Path, run: str) -> None:
    images = image_folder(tmp_path / "images", "train", range(40))
    (images / "train/square/bad.png").write_bytes(undecodable_png())
    data = folder_dataset(images, tmp_path / "dataset", max_samples=21)
    expected = encode(run, data, tmp_path / "whole")
    whole = tree(tmp_path / "whole", without=("records", ".tmp"))
    points = [f"{role}.{stage}" for role in ("run", "part", "quarantine", "record", "manifest") for stage in FAULT_STAGES]
    context = multiprocessing.get_context("fork")
    for fault in [*points, "part.linked:2", "record.staged:2", "record.linked:2"]:
        out = tmp_path / fault
        process = context.Process(target=_die_at, args=(fault, run, data, str(out)))
        with children(process):
            (exitcode,) = join(process)
        assert exitcode == -9, f"{fault} was not reached"
        if not fault.startswith("manifest.linked"):
            with pytest.raises(DataError, match="unfinished encoding|no latent table"):
                open_table(str(out))
        assert encode(run, data, out).keys.to_pylist() == expected.keys.to_pylist()
        again = tree(out, without=("records", ".tmp"))
        assert again.keys() == whole.keys(), fault
        assert [name for name in whole if again[name] != whole[name]] == [], fault


class Killed(BaseException):
    """The end of a process, as far as the work in it can tell."""


def killed_after(parts: int, run: str, data: str, out: Path) -> None:
    """Start to encode, and be killed after some parts."""

    def die(record: Any, done: int, total: int) -> None:
        if done == parts:
            raise Killed

    with pytest.raises(Killed):
        encode_dataset(run, data, str(out), EncodeSpec(batch=16), on_part=die)


def test_finished_parts_of_a_killed_attempt_are_not_made_again(
    tmp_path: Path, data: str, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aecore.artifact.fanout.COMMITS", 1)
    killed_after(2, run, data, tmp_path / "table")
    known = recorded_parts(open_store(str(tmp_path / "table")))
    assert 2 <= len(known) <= 3  # the one that was being committed was let end
    made: list[str] = []
    table = encode(run, data, tmp_path / "table", on_part=lambda record, done, total: made.append(record.part))
    assert made == [part.stem for part in table.parts if part.stem not in known] != []


@pytest.fixture
def older_decoder(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Let artefacts record what earlier versions recorded: imagecodecs, and nothing of simplejpeg."""
    with monkeypatch.context() as patch:
        for module in ("aecore.encoding.worker", "aecore.data.format.transform"):
            patch.setattr(f"{module}.decoder_version", lambda name, pixels: decoder_version(name, 1))
        yield patch


def decoders(table: LatentTable) -> list[str]:
    """The decoders that the parts of a table name, each once."""
    schemas = [pq.read_schema(Path(table.url) / part.file.name) for part in table.parts]
    return list(dict.fromkeys(json.loads(part_metadata(schema)["versions"])["decoder"] for schema in schemas))


def test_a_part_names_what_decodes_its_jpegs(tmp_path: Path, data: str, run: str) -> None:
    both = f"imagecodecs {imagecodecs.__version__}, simplejpeg {simplejpeg.__version__}"
    assert decoders(encode(run, data, tmp_path / "table")) == [both]
    old = saved_run(tmp_path / "run", config=dataclasses.replace(model_config(), transform=TransformSpec(pixels=1)))
    assert decoders(encode(old, data, tmp_path / "old")) == [f"imagecodecs {imagecodecs.__version__}"]


def test_a_table_that_names_fewer_decoders_goes_on(tmp_path: Path, run: str, older_decoder: pytest.MonkeyPatch) -> None:
    images = image_folder(tmp_path / "images", "train", range(40))
    data = folder_dataset(images, tmp_path / "dataset", max_samples=21)
    first = encode(run, data, tmp_path / "table")
    before = tree(tmp_path / "table")
    killed_after(1, run, data, tmp_path / "begun")
    encode(run, data, tmp_path / "unrecorded")
    for left in ("table.000001.json", *(f"records/{part.stem}.json" for part in first.parts)):
        (tmp_path / "unrecorded" / left).unlink()  # as if it had been killed between a part and its record
    (old,) = decoders(first)
    older_decoder.undo()
    for name in ("begun", "unrecorded"):
        table = encode(run, data, tmp_path / name)
        assert table.keys.to_pylist() == first.keys.to_pylist() and old in decoders(table)
        verify_table(table, read_data=True, dataset_url=data)
    folder_dataset(image_folder(images, "train", range(40, 60)), tmp_path / "dataset", max_samples=21)
    table = encode(run, data, tmp_path / "table")
    assert decoders(table) == [old, f"{old}, simplejpeg {simplejpeg.__version__}"]
    verify_table(table, read_data=True, dataset_url=data)
    after = tree(tmp_path / "table")
    assert {name: after[name] for name in before} == before


def test_parts_of_another_dataset_from_a_killed_attempt_are_refused(tmp_path: Path, data: str, run: str) -> None:
    other = sprites_dataset(tmp_path / "other", num_samples=60)
    killed_after(1, run, data, tmp_path / "table")
    before = tree(tmp_path / "table")
    there, ours = (open_dataset(url).manifest.shards[0].tar.sha256[:12] for url in (data, other))
    for dry_run in (True, False):
        with pytest.raises(ConfigError, match=f"parts of another dataset.* train-000000 (.*){there}(.*){ours}(.*)write to another URL"):
            encode_dataset(run, other, str(tmp_path / "table"), EncodeSpec(batch=16), dry_run=dry_run)
    assert tree(tmp_path / "table") == before
    verify_table(encode(run, data, tmp_path / "table"), read_data=True, dataset_url=data)


def test_of_two_datasets_encoded_at_once_one_is_told_what_is_there_now(tmp_path: Path, data: str, run: str) -> None:
    out = str(tmp_path / "table")
    one, other = (folder_dataset(image_folder(tmp_path / split, split, range(9)), tmp_path / f"{split}-data") for split in ("train", "val"))

    def meanwhile(make_worker: Any, tasks: Any) -> Any:
        encode_dataset(run, other, out)
        yield from serial(make_worker, tasks)

    with pytest.raises(ConfigError, match="another command committed table.000001.json .*: a table belongs to one dataset"):
        encode_dataset(run, one, out, fan_out=meanwhile)


def test_an_append_of_another_dataset_with_the_same_first_shards_is_refused(tmp_path: Path, run: str) -> None:
    urls = []
    for name, new in (("one", range(40, 70)), ("two", range(80, 110))):
        images = image_folder(tmp_path / f"images-{name}", "train", range(40))
        urls.append(folder_dataset(images, tmp_path / name))
        if name == "one":
            first = encode(run, urls[0], tmp_path / "table")
        folder_dataset(image_folder(images, "train", new), tmp_path / name)
    killed_after(1, run, urls[0], tmp_path / "table")
    with pytest.raises(ConfigError, match="parts of another dataset"):
        encode(run, urls[1], tmp_path / "table")
    table = encode(run, urls[0], tmp_path / "table")
    assert table.num_rows > first.num_rows
    verify_table(table, read_data=True, dataset_url=urls[0])


@pytest.mark.parametrize("field", ["split", "shard_sha256", "index_content_sha256", "row_start", "row_stop", "checkpoint_sha256"])
def test_a_record_is_reused_only_if_it_is_of_the_same_rows_and_checkpoint(tmp_path: Path, data: str, run: str, field: str) -> None:
    killed_after(1, run, data, tmp_path / "table")
    store = open_store(str(tmp_path / "table"))
    record = read_record(store, "train-000000")
    assert record is not None
    store.remove("records/train-000000.json")
    write_record(store, dataclasses.replace(record, detail={**record.detail, field: "another"}))
    with pytest.raises(ConfigError, match=f"differ in {field}\\)"):
        encode(run, data, tmp_path / "table")


def test_a_record_that_another_attempt_wrote_meanwhile_is_checked_too(
    tmp_path: Path, data: str, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_encoding(run, data, str(tmp_path / "table"), EncodeSpec(batch=16))

    def late(store: Any, record: PartRecord) -> PartRecord:
        return dataclasses.replace(record, detail={**record.detail, "shard_sha256": "0" * 64})

    monkeypatch.setattr("aecore.encoding.writer.write_record", late)
    with pytest.raises(ConfigError, match="parts of another dataset"):
        plan.make_worker()(plan.tasks[0])()


def test_storage_that_takes_no_more_bytes_is_a_storage_error(tmp_path: Path, data: str, run: str) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(make_worker: Any, tasks: Any) -> Any:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            yield from serial(make_worker, tasks)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with pytest.raises(StoreError, match=r"4 of 4 parts failed(.|\n)*cannot write .*/split=train/train-000000.parquet: .*File too large"):
        encode_dataset(run, data, str(tmp_path / "table"), EncodeSpec(batch=16), fan_out=limited)
    assert list((tmp_path / "table/.tmp").iterdir()) == []
    verify_table(encode(run, data, tmp_path / "table"), read_data=True, dataset_url=data)


def test_a_quarantine_that_cannot_be_written_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pq, "write_table", full)
    index = pa.table({"key": ["a"], "ordinal": [0], "sha256": ["0"]})
    with pytest.raises(StoreError, match=r"cannot write .*quarantine/train-000000.parquet: No space left"):
        commit_quarantine(open_store(str(tmp_path)), "train-000000", "train-000000", index, [RefusedRow(0, "decode", "format", "")])


def test_records_hold_times_and_the_manifest_none(tmp_path: Path, data: str, run: str) -> None:
    table = encode(run, data, tmp_path / "table")
    record = read_record(open_store(str(tmp_path / "table")), table.parts[0].stem)
    assert record is not None
    assert set(record.timings) == {"encode_s", "commit_s"}
    assert b'_s"' not in (tmp_path / "table/table.000001.json").read_bytes()


def test_workers_share_the_model_in_this_process_and_load_their_own_elsewhere(tmp_path: Path, data: str, run: str) -> None:
    plan = plan_encoding(run, data, str(tmp_path / "table"), EncodeSpec())
    here, travelled = plan.make_worker, pickle.loads(pickle.dumps(plan.make_worker))
    assert here().encoder.model is here().encoder.model
    assert len(pickle.dumps(here)) < 5000
    assert travelled().encoder.model is not here().encoder.model


def test_thread_count_is_restored_and_recorded(tmp_path: Path, data: str, run: str) -> None:
    torch.set_num_threads(1)
    table = encode(run, data, tmp_path / "table", threads=2)
    assert torch.get_num_threads() == 1
    assert table.lineage(table.keys[0].as_py())["produced_by"]["threads"] == "2"


def test_refused_rows_that_another_version_of_parquet_wrote_are_taken_and_others_are_not(tmp_path: Path) -> None:
    index = pa.table({"key": ["a", "b"], "ordinal": pa.array([0, 1], pa.int64()), "sha256": ["0" * 64, "1" * 64]})
    store, row = open_store(str(tmp_path)), RefusedRow(1, "decode", "format", "no image")
    first = commit_quarantine(store, "train-000000", "train-000000", index, [row])
    assert first is not None
    path = tmp_path / first.name
    pq.write_table(pq.read_table(path), path, compression="zstd", write_page_checksum=True)
    again = commit_quarantine(store, "train-000000", "train-000000", index, [row])
    assert again is not None and again.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() != first.sha256
    with pytest.raises(StoreError, match="exists with other content"):
        commit_quarantine(store, "train-000000", "train-000000", index, [RefusedRow(0, "decode", "format", "no image")])


def test_a_model_of_three_channels_encodes_images_with_alpha_over_the_background(tmp_path):
    random = np.random.default_rng(0)
    rgba = random.integers(0, 256, (6, SIZE, SIZE, 4), dtype=np.uint8)
    for number, pixels in enumerate(rgba):
        for name, image in (("rgba", pixels), ("black", np.rint(pixels[..., :3] * (pixels[..., 3:] / 255)).astype(np.uint8))):
            path = tmp_path / name / f"{number}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(image).save(path)
    config = ModelConfig(VAESpec(latent_dim=DIM), MLPSpec(hidden=(16,)), TransformSpec(background="black"), (3, SIZE, SIZE))
    run, tables = saved_run(tmp_path / "run", config), {}
    for name in ("rgba", "black"):
        shard_dataset(FolderSpec(url=str(tmp_path / name)), str(tmp_path / f"{name}-data"))
        table = encode(run, str(tmp_path / f"{name}-data"), tmp_path / f"{name}-table")
        tables[name] = dict(zip(table.keys.to_pylist(), table.numpy("mu"), strict=True))
    assert tables["rgba"].keys() == tables["black"].keys() == {str(number) for number in range(6)}
    for key, mu in tables["rgba"].items():
        np.testing.assert_allclose(mu, tables["black"][key], atol=0.02)  # a level of rounding
    before = ModelConfig(config.model, config.backbone, TransformSpec(pixels=1), config.input_shape)
    with pytest.raises(DataError, match="holds samples of shape"):
        encode(saved_run(tmp_path / "before", before), str(tmp_path / "rgba-data"), tmp_path / "table")
