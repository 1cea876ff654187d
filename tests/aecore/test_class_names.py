"""Classes have names: whoever gives labels to a model maps them by name, and refuses a class that it does not know by name."""

import hashlib
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aecore.artifact.documents import sealed
from aecore.checkpoint.config import ModelConfig
from aecore.checkpoint.weights import load_model
from aecore.data.dataset import open_dataset
from aecore.data.format.transform import TransformSpec
from aecore.data.manifest import DatasetManifest
from aecore.data.read.loader import InputSpec
from aecore.data.sources.folder import FolderSpec
from aecore.data.write.job import shard_dataset
from aecore.encoding.job import EncodeSpec
from aecore.errors import ConfigError, DataError
from aecore.evaluate import Evaluation, evaluate_run
from aecore.nn.mlp import MLPSpec
from aecore.sampling import DecodeSpec, SampleSpec, decode_run, sample_run
from aecore.training.loop import TrainJob, fit
from aecore.variational import ConditionalVAESpec
from tests.aecore.data.test_external_tars import write_tar
from tests.aecore.data.tiny import encoded
from tests.aecore.encoding import encode
from tests.aecore.training import fit_on, losses, small_job
from tests.documents import content, rewrite

GREY = {"cat": 40, "dog": 120, "owl": 220, "fox": 80}


def draw(folder: Path, classes: Sequence[str], numbers: range = range(12), prefix: str = "") -> Path:
    """Write pictures `<folder>/<class>/<prefix><number>.png`, each as grey as its class: the same ones for the same class and number."""
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in numbers:
            pixels = np.random.default_rng([GREY[name], number]).normal(GREY[name], 20, (4, 4))
            (folder / name / f"{prefix}{number}.png").write_bytes(encoded(np.clip(pixels, 0, 255).astype(np.uint8)))
    return folder


def shard(folder: Path, out: Path, **source: Any) -> str:
    made = shard_dataset(FolderSpec(url=str(folder), **source), str(out))
    assert isinstance(made, DatasetManifest)
    return str(out)


def cvae(data: str, out: Path, classes: int = 3, **changes: Any) -> TrainJob:
    model = ConditionalVAESpec(latent_dim=2, num_classes=classes, likelihood="gaussian")
    return small_job(data, out, **{"model": model, "epochs": 40, "global_batch": 16, "seed": 1, **changes})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that was trained on cat, dog and owl."""
    folder = tmp_path_factory.mktemp("named")
    fit(cvae(shard(draw(folder / "in", ("cat", "dog", "owl")), folder / "data"), folder / "run"))
    return str(folder / "run")


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The same pictures of dog and owl, in a dataset whose classes are (dog, owl) and in one that has a cat in another split."""
    folder = tmp_path_factory.mktemp("twins")
    for name, other in (("apart", "dog"), ("with", "cat")):
        draw(folder / name / "test", ("dog", "owl"), range(20, 40))
        draw(folder / name / "train", (other,), range(1), prefix="x")
    first, second = (shard(folder / name, folder / f"{name}-data") for name in ("apart", "with"))
    return first, second


def scores(found: Evaluation) -> dict[str, Any]:
    return {name: value for name, value in found.to_dict().items() if name != "lineage"}


def test_a_checkpoint_has_the_names_of_its_labels_in_order(run: str) -> None:
    assert load_model(run).config.classes == ("cat", "dog", "owl")
    assert content(Path(run) / "run.000001.json")["info"]["classes"] == ["cat", "dog", "owl"]


def test_twin_datasets_give_equal_scores_whatever_the_numbers_of_their_classes(run: str, twins: tuple[str, str]) -> None:
    apart, with_cat = (evaluate_run(run, data, iwae=5) for data in twins)
    assert scores(apart) == scores(with_cat)


def test_twin_datasets_give_equal_latents_and_are_decoded_alike(run: str, twins: tuple[str, str], tmp_path: Path) -> None:
    found = {}
    for name, data in zip("ab", twins, strict=True):
        table = encode(run, data, tmp_path / f"table-{name}", EncodeSpec(batch=16, kl=True)).select("test")
        assert set(table.arrow("label_name").to_pylist()) == {"dog", "owl"}
        decode_run(run, table.url, str(tmp_path / f"decoded-{name}"), DecodeSpec(split="test", images=0))
        with np.load(tmp_path / f"decoded-{name}/decoded.npz") as arrays:
            found[name] = table.numpy("mu"), table.numpy("kl"), arrays["x"], arrays["label"]
    for first, second in zip(found["a"], found["b"], strict=True):
        np.testing.assert_array_equal(first, second)
    assert set(found["a"][3].tolist()) == {1, 2}  # as the model numbers them


def test_a_class_that_the_model_does_not_know_is_refused_by_name(run: str, tmp_path: Path) -> None:
    data = shard(draw(tmp_path / "in", ("dog", "fox")), tmp_path / "data")
    for refused in (
        lambda: evaluate_run(run, data, "train"),
        lambda: encode(run, data, tmp_path / "table"),
        lambda: fit(cvae(data, tmp_path / "new", init_from=run)),
    ):
        with pytest.raises(DataError, match=r"has 12 samples of the class 'fox', which .* does not have \(it has 'cat', 'dog', 'owl'\)"):
            refused()
    assert not (tmp_path / "table").exists() and not (tmp_path / "new").exists()


def test_a_class_of_a_split_that_the_model_does_not_get_is_no_obstacle(run: str, tmp_path: Path) -> None:
    draw(tmp_path / "in/train", ("fox",))
    draw(tmp_path / "in/test", ("dog", "owl"))
    data = shard(tmp_path / "in", tmp_path / "data")
    assert evaluate_run(run, data, "test").num_samples == 24
    with pytest.raises(DataError, match="'fox'"):
        evaluate_run(run, data, "test", probe=True)  # whose probes are fitted to the split train


def test_training_goes_on_from_weights_with_the_numbers_that_these_know(run: str, tmp_path: Path) -> None:
    """Of two datasets of the same pictures, the second one numbers the classes the other way round."""
    turned = shard(draw(tmp_path / "in", ("owl",)), tmp_path / "turned")  # a class of a later generation comes last
    shard(draw(tmp_path / "in", ("dog",)), tmp_path / "turned")
    plain = shard(tmp_path / "in", tmp_path / "plain")
    assert [open_dataset(data).classes for data in (plain, turned)] == [("dog", "owl"), ("owl", "dog")]
    for name, data in (("a", plain), ("b", turned)):
        fit(cvae(data, tmp_path / name, init_from=run, epochs=1))
        assert load_model(str(tmp_path / name)).config.classes == ("cat", "dog", "owl")
    first, second = (losses(tmp_path / name)[0]["loss"] for name in "ab")
    fresh = fit(cvae(plain, tmp_path / "fresh", epochs=1)).metrics["loss"]
    assert max(first, second) < 0.75 * fresh  # labels that are mixed up cost as much as no training


def test_ranks_and_resumed_attempts_number_the_classes_alike(run: str, tmp_path: Path) -> None:
    data = shard(draw(tmp_path / "in", ("dog", "owl")), tmp_path / "data")
    jobs = [cvae(data, tmp_path / name, init_from=run, epochs=3) for name in ("one", "two", "stopped")]
    fit(jobs[0])
    fit_on(jobs[1], 2)
    with pytest.raises(KeyboardInterrupt):
        fit(jobs[2], on_checkpoint=_stop)
    fit(jobs[2])
    whole, *others = ([row["loss"] for row in losses(job.out)] for job in jobs)
    for found in others:
        np.testing.assert_allclose(found, whole, rtol=1e-5)


def test_a_run_whose_dataset_was_made_anew_with_other_numbers_is_refused_with_the_names(tmp_path: Path) -> None:
    folder = draw(tmp_path / "in", ("dog", "owl"))
    job = cvae(shard(folder, tmp_path / "data"), tmp_path / "run", epochs=2)
    with pytest.raises(KeyboardInterrupt):
        fit(job, on_checkpoint=_stop)
    shutil.rmtree(tmp_path / "data")
    shard(folder, tmp_path / "data", classes=("owl", "dog"))
    with pytest.raises(ConfigError, match="the classes of the dataset are 'owl', 'dog', those of the run 'dog', 'owl'"):
        fit(job)


def _stop(ref: object, metrics: object) -> None:
    raise KeyboardInterrupt


def test_samples_are_drawn_of_a_class_by_its_name_or_number(run: str, tmp_path: Path) -> None:
    drawn = {}
    for name, label in (("name", "owl"), ("number", 2), ("other", "cat")):
        sample_run(run, str(tmp_path / name), SampleSpec(num=4, label=label, images=0))
        with np.load(tmp_path / name / "samples.npz") as arrays:
            drawn[name] = arrays["x"]
    np.testing.assert_array_equal(drawn["name"], drawn["number"])
    assert drawn["name"].mean() - drawn["other"].mean() > 0.2  # owls are light, cats are dark
    with pytest.raises(ConfigError, match=r"label=owll, and this model has no such class \(did you mean 'owl'\? known: cat, dog, owl\)"):
        sample_run(run, str(tmp_path / "x"), SampleSpec(label="owll"))
    with pytest.raises(ConfigError, match="is conditional: add label=..., one of 'cat', 'dog', 'owl'"):
        sample_run(run, str(tmp_path / "x"), SampleSpec())


def test_a_checkpoint_without_names_takes_numbers_as_before_and_says_so(
    run: str, twins: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = Path(shutil.copytree(Path(run) / "model", tmp_path / "old"))
    written = content(old / "config.json")
    del written["classes"]
    data = sealed(written)
    (old / "config.json").write_bytes(data)
    files = [file for file in content(old / "checkpoint.json")["files"] if file["name"] != "config.json"]
    files.append({"name": "config.json", "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})
    rewrite(old / "checkpoint.json", files=files)
    with caplog.at_level(logging.WARNING):
        assert evaluate_run(str(old), twins[1]).elbo == pytest.approx(evaluate_run(run, twins[1]).elbo)
    assert "has no class names" in caplog.text and "being 'cat', 'dog', 'owl' of" in caplog.text
    with pytest.raises(ConfigError, match="written without class names: give the number of a class, 0 to 2"):
        sample_run(str(old), str(tmp_path / "x"), SampleSpec(label="owl"))


class TestTarsWithoutAnIndex:
    def job(self, folder: Path, out: Path, classes: int = 8, **changes: Any) -> TrainJob:
        reader = InputSpec(reader="webdataset", shuffle=4)
        return cvae(str(folder), out, classes, **{"input": reader, "max_steps": 4, "epochs": 1, **changes})

    def tars(self, folder: Path, labels: Sequence[str]) -> Path:
        files = []
        for number in range(24):
            label = labels[number % len(labels)]
            pixels = np.full((4, 4), 9 * number, np.uint8)
            files += [(f"{number:03d}.png", encoded(pixels)), (f"{number:03d}.cls", label.encode())]
        write_tar(folder / "0.tar", files)
        return folder

    def test_numbers_are_names(self, tmp_path: Path) -> None:
        folder = self.tars(tmp_path / "in", ("5", "7"))
        fit(self.job(folder, tmp_path / "run"))
        assert load_model(str(tmp_path / "run")).config.classes == tuple("01234567")
        draw(tmp_path / "images", ("dog", "owl"))
        for old, new in (("dog", "7"), ("owl", "0")):
            (tmp_path / "images" / old).rename(tmp_path / "images" / new)
        data = shard(tmp_path / "images", tmp_path / "data")
        assert evaluate_run(str(tmp_path / "run"), data, "train").num_samples == 24
        (tmp_path / "images/7").rename(tmp_path / "images/11")
        with pytest.raises(DataError, match="the class '11', which"):
            evaluate_run(str(tmp_path / "run"), shard(tmp_path / "images", tmp_path / "other"), "train")

    def test_names_are_those_of_the_weights_that_training_begins_with(self, run: str, tmp_path: Path) -> None:
        folder = self.tars(tmp_path / "in", ("owl", "dog"))
        assert fit(self.job(folder, tmp_path / "run", classes=3, init_from=run)).step == 4
        with pytest.raises(DataError, match=r"is of class '(owl|dog)', which the model does not have \(it has '0', '1', '2'\)"):
            fit(self.job(folder, tmp_path / "fresh", classes=3))

    def test_a_number_that_the_model_does_not_have_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="is of class '7', which the model does not have"):
            fit(self.job(self.tars(tmp_path / "in", ("5", "7")), tmp_path / "run", classes=6))


@pytest.mark.parametrize("classes", ["cat", {"cat": 0}, [1, 2], ["cat", "cat"], ["a", "b", "c", "d"], [["cat"]]], ids=str)
def test_a_config_whose_classes_are_no_names_is_refused(classes: Any) -> None:
    config = ModelConfig(ConditionalVAESpec(num_classes=3), MLPSpec(), TransformSpec(), (1, 4, 4), ("cat", "dog"))
    assert ModelConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match="classes is .*, expected a list of up to 3 different names"):
        ModelConfig.from_dict({**config.to_dict(), "classes": classes})
