"""compare: what differs between two artefacts, against independent references; the same address twice differs in nothing."""

import dataclasses
import functools
import shutil

import numpy as np
import pyarrow as pa
import pytest

from aecore.checkpoint.weights import load_model
from aecore.data.dataset import open_dataset
from aecore.data.sources.arrays import ArraysSpec
from aecore.data.sources.folder import FolderSpec
from aecore.data.write.job import shard_dataset
from aecore.data.write.spec import ShardSpec
from aecore.data.write.splits import SplitSpec
from aecore.encoding.job import EncodeSpec
from aecore.errors import ConfigError, DataError
from aecore.evaluate import EvaluateSpec, evaluate
from aecore.maintenance.compare import _join, _runs, compare
from aecore.maintenance.compare._join import Keys, by_ranges
from aecore.nn.mlp import MLPSpec
from aecore.table.table import open_table
from aecore.training.loop import fit
from aecore.training.metrics import epoch_means
from aecore.training.optimizer import OptimSpec
from aecore.variational import VAESpec
from tests.aecore.data.test_living import V1
from tests.aecore.data.tiny import encoded
from tests.aecore.encoding import encode, folder_dataset, image_folder, model_config, saved_run
from tests.aecore.training import losses, small_job, sprites_dataset


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Two datasets (one has more samples and other shards), two runs, tables of both."""
    root = tmp_path_factory.mktemp("compare")
    few, many = image_folder(root / "few", "train", range(30)), image_folder(root / "many", "train", range(36))
    folder_dataset(few, root / "a/dataset", max_samples=8)
    folder_dataset(many, root / "b/dataset", max_samples=11)
    for name, seed in (("a", 0), ("b", 1)):
        saved_run(root / name / "run", seed=seed)
        encode(str(root / name / "run"), str(root / name / "dataset"), root / name / "table")
    encode(str(root / "b/run"), str(root / "a/dataset"), root / "other-weights")
    return root


@pytest.mark.parametrize("kind", ["dataset", "table"])
def test_an_artefact_and_itself_differ_in_nothing(places, kind):
    found = compare(str(places / "a" / kind), str(places / "a" / kind))
    assert found["kind"] == kind
    assert (found["keys"]["in_both"], found["keys"]["only_in_a"], found["keys"]["only_in_b"]) == (30, 0, 0)
    assert found["identity"] == {}
    assert found["same_content" if kind == "dataset" else "same_rows"] is True


@pytest.mark.parametrize("range_rows", [64, 1, 500_000])
@pytest.mark.parametrize("where", ["b/table", "other-weights"])
def test_columns_of_tables_are_compared_as_numpy_would(places, monkeypatch, where, range_rows):
    monkeypatch.setattr(_join, "_SAMPLE", 1)
    monkeypatch.setattr(_join.by_ranges, "__kwdefaults__", {"rows": range_rows})
    a, b = open_table(str(places / "a/table")), open_table(str(places / where))
    found = compare(a.url, b.url)
    rows = {key: row for row, key in enumerate(b.keys.to_pylist())}
    at = [rows[key] for key in a.keys.to_pylist()]
    assert found["rows"] == [a.num_rows, b.num_rows]
    assert found["keys"]["only_in_b"] == b.num_rows - 30
    assert len(found["keys"]["examples_only_in_b"]) == min(5, b.num_rows - 30)
    for name in ("mu", "log_var"):
        gap = np.abs(a.numpy(name).astype(np.float64) - b.numpy(name)[at].astype(np.float64))
        assert found["columns"][name]["max_difference"] == pytest.approx(gap.max(), rel=1e-12)
        assert found["columns"][name]["mean_difference"] == pytest.approx(gap.mean(), rel=1e-9)
        assert found["columns"][name]["differing_rows"] == 30
        assert found["columns"][name]["worst_key"] == a.keys.to_pylist()[int(gap.max(axis=1).argmax())]
    assert found["columns"]["label_name"] == {"differing_rows": 0}
    assert found["identity"].keys() == {"checkpoint_sha256"}
    assert found["lineage"]["checkpoint.sha256"][0] == a.manifest.lineage["checkpoint"]["sha256"]


def test_latents_of_other_sizes_are_named_and_not_compared(places, tmp_path):
    config = model_config()
    wide = dataclasses.replace(config, model=dataclasses.replace(config.model, latent_dim=6))
    encode(saved_run(tmp_path / "run", wide), str(places / "a/dataset"), tmp_path / "table", EncodeSpec(batch=16))
    found = compare(str(places / "a/table"), str(tmp_path / "table"))
    assert found["columns"]["mu"]["comparable"] is False
    assert found["same_rows"] is False


def test_data_sets_name_keys_contents_classes_and_splits_that_changed(tmp_path, places):
    images = image_folder(tmp_path / "images", "train", range(30))
    files = sorted(images.rglob("*.png"))
    files[0].write_bytes(files[1].read_bytes())
    files[2].unlink()
    moved = files[5]
    (images / "test" / moved.parent.name).mkdir(parents=True)
    moved.rename(images / "test" / moved.parent.name / moved.name)
    shard_dataset(FolderSpec(url=str(images)), str(tmp_path / "dataset"), SplitSpec(by="folders"), ShardSpec(max_samples=8))
    found = compare(str(places / "a/dataset"), str(tmp_path / "dataset"))
    assert found["same_content"] is False
    assert found["changed_content"]["samples"] == 1
    assert found["keys"]["only_in_a"] == 2, "the split folder is a part of the key"
    assert found["keys"]["only_in_b"] == 1
    assert found["splits"]["train"] == [30, 28]
    assert found["splits"]["test"] == [None, 1]
    larger = compare(str(places / "a/dataset"), str(places / "b/dataset"))
    assert larger["keys"]["only_in_b"] == 6
    assert larger["identity"] == {"shards.max_samples": [8, 11]}


def test_the_same_samples_in_other_shards_are_the_same_content(tmp_path):
    images = image_folder(tmp_path / "images", "train", range(20))
    for name, size in (("few", 12), ("many", 5)):
        folder_dataset(images, tmp_path / name, max_samples=size)
    found = compare(str(tmp_path / "few"), str(tmp_path / "many"))
    assert found["dataset_sha256"][0] != found["dataset_sha256"][1]
    assert found["equal_shards"] == 0
    assert found["same_content"] is True


def test_runs_show_config_curves_weights_and_best(tmp_path):
    data = sprites_dataset(tmp_path / "data", val=0.1)
    options = {"max_steps": 24, "every_steps": 6, "log_every_s": 0.0, "val_split": "val"}
    job = small_job(data, tmp_path / "a", **options)
    fit(job)
    fit(small_job(data, tmp_path / "same", **options))
    fit(small_job(data, tmp_path / "b", **options, optim=OptimSpec(lr=3e-3)))
    same = compare(str(tmp_path / "a"), str(tmp_path / "same"))
    assert same["same_weights"] is True
    assert (same["identity"], same["curves"]["max_relative_difference"], same["curves"]["first_differing_step"]) == ({}, 0.0, None)
    found = compare(str(tmp_path / "a"), str(tmp_path / "b"))
    assert found["identity"] == {"optim.lr": [1e-3, 3e-3]}
    rows = [losses(tmp_path / name) for name in ("a", "b")]
    curves = [np.array([row["loss"] for row in each]) for each in rows]
    expected = np.abs(curves[0] - curves[1]) / np.maximum(curves[0], curves[1])
    assert found["curves"]["common_steps"] == 24
    assert found["curves"]["max_relative_difference"] == pytest.approx(expected.max())
    assert found["curves"]["at_step"] == int(expected.argmax()) + 1
    means = [np.average([row["loss"] for row in each], weights=[row["samples"] for row in each]) for each in rows]
    assert found["epochs"] == [1, 1]
    assert found["final"]["loss"]["delta"] == pytest.approx(means[1] - means[0])
    assert found["best"]["validation.loss"]["a"] == min(row["validation"]["loss"] for row in rows[0] if "validation" in row)
    weights = [load_model(str(tmp_path / name)).model.state_dict() for name in ("a", "b")]
    gap = max(float((weights[0][name].double() - weights[1][name].double()).abs().max()) for name in weights[0])
    assert found["weights"]["max_difference"] == pytest.approx(gap)
    assert found["same_weights"] is False
    assert found["checkpoints"]["weights_by_step"].keys() == {"18", "24"}


def test_the_best_epoch_without_validation_is_that_of_the_lowest_mean(tmp_path):
    data = sprites_dataset(tmp_path / "data", val=0.1)
    fit(small_job(data, tmp_path / "run", epochs=3, optim=OptimSpec(lr=1e-3)))
    found = compare(str(tmp_path / "run"), str(tmp_path / "run"))
    rows = losses(tmp_path / "run")
    epochs = [[row for row in rows if row["epoch"] == epoch] for epoch in range(3)]
    means = [np.average([row["loss"] for row in each], weights=[row["samples"] for row in each]) for each in epochs]
    assert found["best"]["loss"]["a"] == pytest.approx(min(means))
    assert found["best"]["step"]["a"] == epochs[int(np.argmin(means))][-1]["step"]


def test_tensors_of_other_shapes_are_named_in_one_order(tmp_path):
    data = sprites_dataset(tmp_path / "data", val=0.1)
    for name, hidden in (("a", (16, 8)), ("b", (24, 12))):
        fit(small_job(data, tmp_path / name, max_steps=1, backbone=MLPSpec(hidden=hidden)))
    names = list(compare(str(tmp_path / "a"), str(tmp_path / "b"))["weights"]["differing_shapes"])
    assert len(names) > 6
    assert names == sorted(names)


def test_roots_are_compared_stage_by_stage_and_two_kinds_are_refused(places, tmp_path):
    with pytest.raises(ConfigError, match=r"a/dataset is a dataset and .*b/table is a table: give two of one kind"):
        compare(str(places / "a/dataset"), str(places / "b/table"))
    with pytest.raises(DataError, match="holds no dataset, run or table to compare"):
        compare(str(places / "a/dataset"), str(tmp_path))


def test_every_key_is_in_exactly_one_range():
    generator = np.random.default_rng(0)
    tables = [pa.table({"key": [f"k{value:05d}" for value in generator.permutation(5000)[:count]]}) for count in (3000, 4000)]
    parts = [[table.slice(start, 700) for start in range(0, len(table), 700)] for table in tables]
    read = functools.partial(lambda part, names: part)
    keys, most = Keys(), 0
    for left, right in by_ranges(*parts, read, read, rows=640):
        keys.join(left, right)
        most = max(most, len(left) + len(right))
    ours, theirs = (set(table["key"].to_pylist()) for table in tables)
    assert (keys.in_both, keys.only_a, keys.only_b) == (len(ours & theirs), len(ours - theirs), len(theirs - ours))
    assert most < 1500, "a range holds a bounded number of rows"


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Two runs that differ in beta only, and their data."""
    root = tmp_path_factory.mktemp("sweep")
    data = sprites_dataset(root / "sprites", val=0.1)
    for name, beta in (("low", 0.02), ("high", 2.0)):
        model = VAESpec(latent_dim=8, beta=beta, likelihood="bernoulli")
        fit(small_job(data, root / name, epochs=6, model=model, optim=OptimSpec(lr=3e-3)))
    return root


def test_runs_of_a_beta_sweep_are_ranked_by_their_elbo(sweep):
    final = compare(str(sweep / "low"), str(sweep / "high"))["final"]
    scores = [evaluate(str(sweep / name), str(sweep / "sprites"), EvaluateSpec(split="train")).elbo for name in ("low", "high")]
    assert (final["elbo"]["delta"] > 0) == (scores[1] > scores[0])
    assert [final["elbo"][side] for side in "ab"] == pytest.approx(scores, rel=0.1), "up to what the last epoch still learned"
    weighted = [final["log_likelihood"][side] - beta * final["kl_divergence"][side] for side, beta in (("a", 0.02), ("b", 2.0))]
    assert (weighted[1] > weighted[0]) != (scores[1] > scores[0]), "by the objective the other one would be the better one"


def test_rows_from_before_version_2_are_named_and_their_elbo_is_not_subtracted(sweep, monkeypatch):
    read = _runs.read_rows

    def older(store, parts):
        rows = read(store, parts)
        return [{name: row[name] for name in row if name != "metrics"} for row in rows] if store.url.endswith("low") else rows

    monkeypatch.setattr(_runs, "read_rows", older)
    found = compare(str(sweep / "low"), str(sweep / "high"))
    assert found["metrics"] == [1, 2]
    assert found["final"]["elbo"].keys() == {"a", "b"}
    assert "delta" in found["final"]["log_likelihood"]


def test_without_validation_the_best_epoch_is_that_of_the_highest_elbo(sweep, tmp_path):
    model = VAESpec(latent_dim=8, beta=2.0, beta_warmup_steps=10_000, likelihood="bernoulli")
    run = fit(small_job(str(sweep / "sprites"), tmp_path / "rising", epochs=3, model=model)).url
    epochs = epoch_means(losses(run))
    best = compare(run, run)["best"]
    assert best["elbo"]["a"] == max(epoch["elbo"] for epoch in epochs)


class TestContentAndValues:
    IMAGES = np.random.default_rng(5).integers(0, 255, (12, 7, 9), dtype=np.uint8)

    @staticmethod
    def shard(source, out, **options):
        shard_dataset(source, str(out), options.pop("splits", None), ShardSpec(max_bad=1.0, **options))
        return str(out)

    def folder(self, root, images=None, name="{label}/{number}.png", format="PNG"):
        for number, each in enumerate(self.IMAGES if images is None else images):
            path = root / name.format(label=number % 3, number=number)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(each, format))
        return FolderSpec(url=str(root))

    def idx(self, root):
        root.mkdir()
        labels = (np.arange(len(self.IMAGES)) % 3).astype(np.uint8)
        for name, values, kind in (("images-idx3-ubyte", self.IMAGES, 3), ("labels-idx1-ubyte", labels, 1)):
            sides = b"".join(side.to_bytes(4, "big") for side in values.shape)
            (root / f"train-{name}").write_bytes(bytes([0, 0, 8, kind]) + sides + values.tobytes())
        return ArraysSpec(url=str(root))

    def test_first_keys_of_what_differs_are_named_by_kind(self, tmp_path):
        a = self.shard(self.folder(tmp_path / "src"), tmp_path / "a")
        root = tmp_path / "src"
        (root / "0/0.png").unlink()
        (root / "1/1.png").write_bytes((root / "2/2.png").read_bytes())
        (root / "0/new.png").write_bytes((root / "2/2.png").read_bytes())
        b = self.shard(FolderSpec(url=str(root)), tmp_path / "b")
        found = compare(a, b)
        assert {name: each["first"] for name, each in found["differences"].items() if each["samples"]} == {
            "added": ["0/new"],
            "removed": ["0/0"],
            "changed": ["1/1"],
        }
        assert found["content_sha256"] == [open_dataset(a).manifest.content_sha256, open_dataset(b).manifest.content_sha256]
        assert found["same_content"] is False
        again = compare(a, self.shard(FolderSpec(url=str(root)), tmp_path / "c", max_samples=2))
        assert again["differences"] == found["differences"], "whatever shards they are in"

    def test_a_changed_column_is_another_content(self, tmp_path):
        for name, value in (("a", 1), ("b", 2)):
            np.savez(tmp_path / f"{name}.npz", x=self.IMAGES, factor_x=np.full(12, value))
        urls = []
        for name in "ab":
            (tmp_path / name).mkdir()
            (tmp_path / f"{name}.npz").rename(tmp_path / name / "data.npz")
            urls.append(self.shard(ArraysSpec(url=str(tmp_path / name / "data.npz")), tmp_path / f"{name}-out"))
        found = compare(*urls)
        assert found["same_content"] == (open_dataset(urls[0]).manifest.content_sha256 == open_dataset(urls[1]).manifest.content_sha256)
        assert bool(found["differences"]["changed_columns"]["samples"]) != found["same_content"]

    def test_datasets_of_before_are_compared_by_content_too(self, tmp_path):
        shutil.copytree(V1 / "dataset", tmp_path / "old")
        found = compare(str(tmp_path / "old"), str(tmp_path / "old"))
        assert found["same_content"] and len(found["content_sha256"][0]) == 64

    def test_png_npz_and_idx_of_the_same_images_have_one_hash_of_values(self, tmp_path):
        np.savez(tmp_path / "data.npz", x=self.IMAGES, y=np.arange(12) % 3)
        urls = [
            self.shard(self.folder(tmp_path / "png"), tmp_path / "of-png"),
            self.shard(ArraysSpec(url=str(tmp_path / "data.npz")), tmp_path / "of-npz", max_samples=5),
            self.shard(self.idx(tmp_path / "idx"), tmp_path / "of-idx"),
            self.shard(self.folder(tmp_path / "tif", name="{label}/x{number}.tif", format="TIFF"), tmp_path / "of-tif"),
        ]
        for other in urls[1:]:
            found = compare(urls[0], other, values=True)
            assert found["same_values"], other
            assert not found["same_content"]
            assert found["samples_compared_by_bytes"] == [0, 0]
        changed = self.IMAGES.copy()
        changed[3, 0, 0] ^= 1
        other = self.shard(self.folder(tmp_path / "png2", changed), tmp_path / "of-png2")
        assert not compare(urls[0], other, values=True)["same_values"]

    def test_labels_splits_and_repetitions_count(self, tmp_path):
        one = self.shard(self.folder(tmp_path / "a"), tmp_path / "a-out")
        relabelled = self.shard(self.folder(tmp_path / "b", name="z{label}/{number}.png"), tmp_path / "b-out")
        split = self.shard(self.folder(tmp_path / "c", name="val/{label}/{number}.png"), tmp_path / "c-out")
        twice = self.shard(self.folder(tmp_path / "d", np.concatenate([self.IMAGES, self.IMAGES[:3]])), tmp_path / "d-out")
        assert not any(compare(one, other, values=True)["same_values"] for other in (relabelled, split, twice))
        jpegs = []
        for name in "ef":
            source = self.folder(tmp_path / name, name="{label}/" + name + "{number}.jpg", format="JPEG")
            jpegs.append(self.shard(source, tmp_path / f"{name}-out"))
        found = compare(*jpegs, values=True)
        assert found["same_values"] and found["samples_compared_by_bytes"] == [12, 12]

    def test_only_datasets_have_values(self, places):
        with pytest.raises(ConfigError, match="leave --values out"):
            compare(str(places / "a/table"), str(places / "b/table"), values=True)
