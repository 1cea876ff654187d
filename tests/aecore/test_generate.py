"""Samples of the prior and decoded latents: what is written, that it is what the model gives, and what is refused."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from aecore._base import Batch
from aecore.checkpoint.weights import load_model
from aecore.errors import AecoreError, ConfigError, DataError
from aecore.sampling import DecodeSpec, SampleSpec, decode_run, prior_latents, sample_run
from aecore.table.table import LatentTable
from aecore.variational import ConditionalVAESpec, VAESpec
from tests.aecore.encoding import DIM, SHAPE, SIZE, ae_config, encode, model_config, saved_run, sprites_dataset, tree


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    config = model_config(VAESpec(latent_dim=DIM, likelihood="bernoulli"))
    return saved_run(tmp_path_factory.mktemp("generate") / "run", config)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory, run: str) -> LatentTable:
    root = tmp_path_factory.mktemp("generate")
    return encode(run, sprites_dataset(root / "dataset", num_samples=40), root / "table")


def arrays(out: Path, name: str = "samples") -> dict[str, np.ndarray]:
    with np.load(out / f"{name}.npz", allow_pickle=False) as read:
        return {key: read[key] for key in read.files}


def test_samples_are_the_decoder_at_standard_normal_latents(tmp_path: Path, run: str) -> None:
    made = sample_run(run, str(tmp_path / "out"), SampleSpec(num=70, batch=16, images=3))
    found, model = arrays(tmp_path / "out"), load_model(run).model
    assert (found["x"].shape, found["x"].dtype, found["z"].shape) == ((70, *SHAPE), np.float32, (70, DIM))
    with torch.no_grad():
        expected = model.decoder(torch.from_numpy(found["z"])).sigmoid()  # type: ignore[operator]
    np.testing.assert_allclose(found["x"], expected.numpy(), atol=1e-6)
    assert abs(found["z"].mean()) < 0.2 and abs(found["z"].std() - 1) < 0.15
    assert made["files"] == 5  # samples.npz, grid.png, three images
    assert sorted(path.name for path in (tmp_path / "out/images").iterdir()) == ["000000.png", "000001.png", "000002.png"]


def test_pictures_show_the_samples(tmp_path: Path, run: str) -> None:
    out = tmp_path / "out"
    sample_run(run, str(out), SampleSpec(num=10, images=10))
    levels = np.rint(arrays(out)["x"][:, 0] * 255).astype(np.uint8)
    assert np.array_equal(np.asarray(Image.open(out / "images/000007.png")), levels[7])
    drawn = np.asarray(Image.open(out / "grid.png"))
    assert drawn.shape == (2 * SIZE + 2, 8 * SIZE + 7 * 2)
    assert np.array_equal(drawn[SIZE + 2 :, SIZE + 2 : 2 * SIZE + 2], levels[9])
    assert (drawn[SIZE + 2 :, 2 * SIZE + 2 :] == 255).all()  # places without an image stay blank


def test_fewer_samples_are_the_first_of_more_and_the_seed_decides() -> None:
    many = prior_latents(0, 200, 3)
    assert torch.equal(prior_latents(0, 10, 3), many[:10])
    assert torch.equal(prior_latents(0, 100, 3), many[:100])
    assert not torch.equal(prior_latents(1, 10, 3), many[:10])
    assert len(many.unique()) == 600


def test_the_same_again_writes_nothing_and_is_the_same_bytes_elsewhere(tmp_path: Path, run: str) -> None:
    spec = SampleSpec(num=5)
    first = sample_run(run, str(tmp_path / "a"), spec)
    before = tree(tmp_path / "a")
    again = sample_run(run, str(tmp_path / "a"), spec)
    sample_run(run, str(tmp_path / "b"), spec)
    assert (first["made"], again["made"], again["files"]) == (7, 0, 7)
    assert tree(tmp_path / "a") == before == tree(tmp_path / "b")
    lineage = json.loads((tmp_path / "a/samples.json").read_text())["lineage"]
    assert lineage["checkpoint"]["sha256"] == load_model(run).sha256


def test_other_samples_in_the_same_place_are_refused(tmp_path: Path, run: str) -> None:
    sample_run(run, str(tmp_path), SampleSpec(num=5))
    with pytest.raises(ConfigError, match=r"holds another set of samples:\n  sample.seed: there 0, asked 1"):
        sample_run(run, str(tmp_path), SampleSpec(num=5, seed=1))


def test_a_dry_run_checks_and_writes_nothing(tmp_path: Path, run: str) -> None:
    assert sample_run(run, str(tmp_path / "out"), SampleSpec(num=5), dry_run=True)["num"] == 5
    assert not (tmp_path / "out").exists()


def test_vectors_have_no_pictures(tmp_path: Path) -> None:
    run = saved_run(tmp_path / "run", model_config(shape=(6,)))
    assert sample_run(run, str(tmp_path / "out"), SampleSpec(num=5))["files"] == 1
    assert arrays(tmp_path / "out")["x"].shape == (5, 6)


def test_colours_come_in_their_order(tmp_path: Path) -> None:
    run = saved_run(tmp_path / "run", model_config(shape=(3, SIZE, SIZE), scale="symmetric"))
    sample_run(run, str(tmp_path / "out"), SampleSpec(num=2))
    x, image = arrays(tmp_path / "out")["x"], np.asarray(Image.open(tmp_path / "out/images/000001.png"))
    levels = np.rint(np.clip((x[1] + 1) / 2, 0, 1) * 255)
    assert np.array_equal(image, levels.transpose(1, 2, 0).astype(np.uint8))


def test_a_model_without_a_prior_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.kind=ae has no prior to draw from \(its latents are z\)"):
        sample_run(saved_run(tmp_path / "ae", ae_config()), str(tmp_path / "out"), SampleSpec())


def test_a_label_for_a_model_that_takes_none_is_refused(tmp_path: Path, run: str) -> None:
    with pytest.raises(ConfigError, match="label=3, and model.kind=vae is not conditional"):
        sample_run(run, str(tmp_path / "out"), SampleSpec(label=3))


def test_a_decoded_table_is_the_reconstruction_of_its_samples(tmp_path: Path, run: str, table: LatentTable) -> None:
    decode_run(run, table.url, str(tmp_path / "out"), DecodeSpec(batch=7))
    found = arrays(tmp_path / "out", "decoded")
    assert found["key"].tolist() == table.keys.to_pylist()
    assert np.array_equal(found["z"], table.numpy("mu"))
    with torch.no_grad():
        expected = load_model(run).model.decoder(torch.from_numpy(found["z"])).sigmoid()  # type: ignore[operator]
    np.testing.assert_allclose(found["x"], expected.numpy(), atol=1e-6)


def test_a_split_and_a_number_of_rows_are_taken(tmp_path: Path, run: str, table: LatentTable) -> None:
    decode_run(run, table.url, str(tmp_path / "out"), DecodeSpec(split="test", num=3))
    assert arrays(tmp_path / "out", "decoded")["key"].tolist() == table.select("test").keys.to_pylist()[:3]


@pytest.mark.parametrize("name", ["latents.npy", "latents.npz"])
def test_a_file_of_latents_is_decoded(tmp_path: Path, name: str) -> None:
    run, z = saved_run(tmp_path / "ae", ae_config()), np.random.default_rng(0).normal(size=(9, DIM))
    np.save(tmp_path / name, z) if name.endswith("npy") else np.savez(tmp_path / name, anything=z)
    decode_run(run, str(tmp_path / name), str(tmp_path / "out"), DecodeSpec(num=4))
    with torch.no_grad():
        expected = load_model(run).model.decoder(torch.from_numpy(z[:4]).float())  # type: ignore[operator]
    np.testing.assert_allclose(arrays(tmp_path / "out", "decoded")["x"], expected.numpy(), atol=1e-6)


def saved(path: Path, **members: np.ndarray) -> str:
    np.savez(path, **members)
    return str(path)


@pytest.mark.parametrize(
    ("members", "spec", "message"),
    [
        ({"z": np.zeros((3, DIM + 1))}, {}, f"holds latents of width {DIM + 1}, and .* decodes {DIM}"),
        ({"z": np.zeros(DIM)}, {}, r"of shape \(4,\), expected numbers \[n, D\]"),
        ({"z": np.full((3, DIM), np.nan)}, {}, "holds 3 latents with NaN or infinite values, of 3: leave such rows out"),
        ({"z": np.array([[0.0] * DIM, [np.inf] * DIM])}, {}, "holds 1 latent with NaN or infinite values, of 2"),
        ({"z": np.zeros((0, DIM))}, {}, "holds no latents"),
        ({"z": np.array([["a"] * DIM])}, {}, "expected numbers"),
        ({"a": np.zeros((3, DIM)), "b": np.zeros((3, DIM))}, {}, "has no array 'mu'"),
        ({"mean": np.zeros((3, DIM))}, {"column": "meen"}, "has no array 'meen' .did you mean 'mean'"),
        ({"z": np.zeros((3, DIM))}, {"split": "test"}, "names the split of a table"),
        ({"z": np.zeros((3, DIM))}, {"label": 2}, "is not conditional"),
    ],
)
def test_latents_that_cannot_be_decoded_are_refused(
    tmp_path: Path, run: str, members: dict[str, np.ndarray], spec: dict[str, Any], message: str
) -> None:
    with pytest.raises(AecoreError, match=message):
        decode_run(run, saved(tmp_path / "z.npz", **members), str(tmp_path / "out"), DecodeSpec(**spec))
    assert not (tmp_path / "out").exists()


def test_a_file_that_has_changed_is_not_taken_for_what_was_decoded(tmp_path: Path, run: str) -> None:
    np.save(tmp_path / "z.npy", np.zeros((4, DIM), np.float32))
    decode_run(run, str(tmp_path / "z.npy"), str(tmp_path / "out"), DecodeSpec())
    before = (tmp_path / "out/decoded.npz").read_bytes()
    np.save(tmp_path / "z.npy", np.ones((7, DIM), np.float32))
    with pytest.raises(ConfigError, match="source.sha256"):
        decode_run(run, str(tmp_path / "z.npy"), str(tmp_path / "out"), DecodeSpec())
    assert (tmp_path / "out/decoded.npz").read_bytes() == before


def test_objects_in_a_file_are_not_loaded(tmp_path: Path, run: str) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (tmp_path / "z.npy").write_bytes(buffer.getvalue())
    with pytest.raises(DataError, match="holds Python objects"):
        decode_run(run, str(tmp_path / "z.npy"), str(tmp_path / "out"), DecodeSpec())


def test_a_table_of_another_checkpoint_is_refused(tmp_path: Path, table: LatentTable) -> None:
    with pytest.raises(DataError, match="the latents of one model mean nothing to another"):
        decode_run(saved_run(tmp_path / "run", seed=3), table.url, str(tmp_path / "out"), DecodeSpec())


def test_a_conditional_model_decodes_with_the_requested_label(tmp_path: Path) -> None:
    run = saved_run(tmp_path / "run", model_config(ConditionalVAESpec(latent_dim=DIM, num_classes=3)))
    spec = SampleSpec(num=4, label=2)
    sample_run(run, str(tmp_path / "two"), spec)
    found, model = arrays(tmp_path / "two"), load_model(run).model
    assert found["label"].tolist() == [2, 2, 2, 2]
    z = torch.from_numpy(found["z"])
    expected = model.decode_latents(z, label=torch.full((4,), 2))
    np.testing.assert_allclose(found["x"], expected.numpy(), atol=1e-6)
    assert not np.allclose(found["x"], model.decode_latents(z, label=torch.full((4,), 1)).numpy(), atol=1e-4)
    with pytest.raises(ConfigError, match="label=3, and this model knows the classes 0 to 2"):
        sample_run(run, str(tmp_path / "x"), SampleSpec(label=3))
    with pytest.raises(ConfigError, match="is conditional: add label=..., one of 0 to 2"):
        sample_run(run, str(tmp_path / "x"), SampleSpec())
    table = encode(run, sprites_dataset(tmp_path / "dataset", num_samples=20), tmp_path / "table")
    decode_run(run, table.url, str(tmp_path / "own"), DecodeSpec())
    assert np.array_equal(arrays(tmp_path / "own", "decoded")["label"], table.numpy("label"))


def test_decode_latents_is_single_rows_through_the_decoder_without_gradients(run: str) -> None:
    model, rows = load_model(run).model, torch.arange(3)
    x = torch.rand(3, *SHAPE)
    z = model.latents(Batch(x, rows, rows, 3))["mu"]
    found = model.decode_latents(z, likelihood="bernoulli")
    assert not found.requires_grad
    torch.testing.assert_close(found, model.reconstruct(Batch(x, rows, rows, 3), likelihood="bernoulli"))
