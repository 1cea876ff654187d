"""Figures: the arrays that are drawn, which figures a model has, and the files."""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from aecore._base.batch import Batch
from aecore.checkpoint.weights import LoadedModel, load_model
from aecore.data.dataset import open_dataset
from aecore.data.format.pictures import require_matplotlib
from aecore.data.format.transform import Transform
from aecore.data.sources.sprites import SpritesSpec
from aecore.data.write.job import shard_dataset
from aecore.data.write.plan import SplitSpec
from aecore.data.write.spec import ShardSpec
from aecore.errors import ConfigError
from aecore.evaluate import EvaluateSpec
from aecore.report import _draw, _maps, _panels, figures
from aecore.report._draw import _strips, draw
from aecore.report._view import NotDrawn, View
from aecore.report.figures import write_figures
from aecore.training.loop import fit
from aecore.vanilla import AE
from aecore.variational import VAESpec
from tests.aecore.encoding import DIM, SHAPE, SIZE, ae_config, encode, model_config, saved_run, tree
from tests.aecore.evaluate.test_scores import arrays
from tests.aecore.test_evaluate import wide
from tests.aecore.training import small_job


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    sprites, out = SpritesSpec(size=SIZE, positions=4), str(tmp_path_factory.mktemp("figures") / "dataset")
    shard_dataset(sprites, out, SplitSpec(by="hash", test=0.25), ShardSpec(max_samples=64))
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    config = model_config(VAESpec(latent_dim=DIM, likelihood="bernoulli"))
    return saved_run(tmp_path_factory.mktemp("figures") / "run", config, change=wide)


@pytest.fixture
def view(run: str, data: str) -> Iterator[View]:
    with View(load_model(run), open_dataset(data), EvaluateSpec(), "cpu") as view:
        yield view


def decoded(view: View, z: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = view.loaded.model.decoder(z).sigmoid()  # type: ignore[operator]
    return found


def test_reconstructions_are_samples_of_every_class_above_what_the_model_makes_of_them(view: View) -> None:
    panel = _panels.reconstructions(view)
    assert panel.values.shape == (2, 10, *SHAPE)
    assert panel.columns[:3] == ("ellipse", "heart", "square")
    originals = panel.values[0]
    assert len({tuple(original.flatten().tolist()) for original in originals}) == 10
    rows = torch.arange(10)
    expected = view.loaded.model.reconstruct(Batch(originals, rows, rows, 10), likelihood="bernoulli")
    torch.testing.assert_close(panel.values[1], expected)
    every = view.batch(np.arange(view.loader.num_samples)).x
    assert all(any(torch.equal(original, x) for x in every) for original in originals)


def test_prior_samples_are_the_decoder_at_the_latents_of_aepipe_sample(view: View) -> None:
    panel = _panels.prior_samples(view)
    assert panel.values.shape == (8, 8, *SHAPE)
    from aecore.sampling import prior_latents

    torch.testing.assert_close(panel.values.flatten(0, 1), decoded(view, prior_latents(0, 64, DIM)))


def test_an_interpolation_begins_and_ends_at_samples_of_two_classes(view: View) -> None:
    panel = _panels.interpolation(view)
    labels, mu = view.latents.labels, torch.from_numpy(view.latents.values)
    assert panel.values.shape == (4, 10, *SHAPE)  # three classes make two pairs, on a line and on an arc
    assert panel.rows == ("ellipse → heart, lerp", "ellipse → heart, slerp", "heart → square, lerp", "heart → square, slerp")
    first = [int(np.flatnonzero(labels == label)[0]) for label in range(3)]
    for row, (start, stop) in enumerate([(0, 1), (0, 1), (1, 2), (1, 2)]):
        torch.testing.assert_close(panel.values[row, 0], decoded(view, mu[first[start]][None])[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(panel.values[row, -1], decoded(view, mu[first[stop]][None])[0], rtol=1e-4, atol=1e-5)
    middle = (4 / 9 * mu[first[1]] + 5 / 9 * mu[first[0]])[None]
    torch.testing.assert_close(panel.values[0, 4], decoded(view, middle)[0])


def test_lines_and_arcs_between_latents() -> None:
    a, b = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 4.0])
    assert _panels.lerp(a, b, 3).tolist() == [[2, 0], [1, 2], [0, 4]]
    torch.testing.assert_close(_panels.slerp(a, b, 3), torch.tensor([[2, 0], [3 / math.sqrt(2), 3 / math.sqrt(2)], [0, 4]]))
    torch.testing.assert_close(_panels.slerp(a, 2 * a, 3), torch.tensor([[2.0, 0], [3, 0], [4, 0]]))
    assert _panels.slerp(a, torch.zeros(2), 4).isfinite().all()
    unit = _panels.slerp(*torch.nn.functional.normalize(torch.randn(2, 5), dim=1), 10)
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(10))


def test_a_traversal_moves_one_dimension_and_keeps_the_others(view: View) -> None:
    panel, mu = _panels.traversals(view), view.latents.values
    assert panel.values.shape == (DIM, 9, *SHAPE)
    order = np.argsort(-mu.std(0))
    assert [int(caption[2]) for caption in panel.rows] == order.tolist()
    z = torch.from_numpy(mu[0]).repeat(9, 1)
    z[:, order[1]] = torch.linspace(-3, 3, 9)
    torch.testing.assert_close(panel.values[1], decoded(view, z))
    assert (panel.columns[0], panel.columns[4], panel.columns[8]) == ("-3", "+0", "+3")


def test_maps_show_the_latents_with_their_classes(view: View) -> None:
    panel, mu = _maps.latents_pca(view), view.latents.values.astype(np.float64)
    values, vectors = np.linalg.eigh(np.cov(mu.T))
    expected = (mu - mu.mean(0)) @ vectors[:, ::-1][:, :2]
    np.testing.assert_allclose(np.abs(panel.xy), np.abs(expected), rtol=1e-6, atol=1e-6)
    assert f"({values[-1] / values.sum():.0%} of the variance)" in panel.axes[0]
    assert panel.names == ("ellipse", "heart", "square")
    assert np.array_equal(panel.groups, view.latents.labels)
    assert len(panel.xy) == view.loader.num_samples


def test_principal_components_have_a_fixed_sign_and_take_what_does_not_vary() -> None:
    values = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    mirrored, _ = _panels.pca(values * np.float32(-1))
    np.testing.assert_allclose(mirrored, -_panels.pca(values)[0], atol=1e-6)
    flat, shares = _panels.pca(np.ones((5, 3), np.float32))
    assert (flat == 0).all() and shares == (0.0, 0.0)


def test_t_sne_keeps_groups_apart_and_repeats(view: View) -> None:
    pytest.importorskip("sklearn")
    first, again = _maps.latents_tsne(view), _maps.latents_tsne(view)
    assert first.xy.shape == (view.loader.num_samples, 2)
    assert np.array_equal(first.xy, again.xy)


def test_a_plane_of_two_latents_is_drawn_directly_and_decoded(tmp_path: Path, data: str) -> None:
    run = saved_run(tmp_path / "run", model_config(VAESpec(latent_dim=2, likelihood="bernoulli")), change=wide)
    with View(load_model(run), open_dataset(data), EvaluateSpec(), "cpu") as view:
        assert np.array_equal(_maps.latents_2d(view).xy, view.latents.values.astype(np.float64))
        panel = _panels.manifold(view)
        corner = float(torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(0.98)))
        assert panel.values.shape == (15, 15, *SHAPE)
        torch.testing.assert_close(panel.values[0, 0], decoded(view, torch.tensor([[-corner, corner]]))[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(panel.values[14, 7], decoded(view, torch.tensor([[0.0, -corner]]))[0], rtol=1e-4, atol=1e-5)
        with pytest.raises(NotDrawn, match="see latents_2d"):
            _maps.latents_pca(view)


def test_the_histograms_are_draws_of_the_densities_over_them(view: View) -> None:
    noise, one, every = _panels.reparameterisation(view).panels
    for _, values, mean, deviation in (noise, one):
        assert abs(values.mean() - mean) < 4 * deviation / math.sqrt(len(values))
        assert values.std() == pytest.approx(deviation, rel=0.03)
    latents = view.loaded.model.latents(view.batch(view.chosen))
    found = [(float(mu), math.exp(float(log_var) / 2)) for mu, log_var in zip(latents["mu"][0], latents["log_var"][0], strict=True)]
    assert any((one[2], one[3]) == pytest.approx(pair, rel=1e-5) for pair in found)
    assert every[2:] == (0.0, 1.0)


class Corrupting(AE):
    """Is trained on halved inputs with noise."""

    def add_noise(self, x: torch.Tensor, eps: torch.Tensor | None = None) -> torch.Tensor:
        assert eps is not None
        return 0.5 * x + 0.1 * eps


def test_denoising_shows_clean_noisy_and_what_is_made_of_the_noisy(tmp_path: Path, data: str) -> None:
    loaded = load_model(saved_run(tmp_path / "run", ae_config()))
    model: Any = loaded.model
    noisy_model = LoadedModel(Corrupting(model.encoder, model.decoder).eval(), loaded.config, loaded.checkpoint, loaded.url)
    with View(noisy_model, open_dataset(data), EvaluateSpec(), "cpu") as view:
        panel, again = _panels.denoising(view), _panels.denoising(view)
    clean, noisy, denoised = panel.values
    assert torch.equal(panel.values, again.values)
    assert float((noisy - 0.5 * clean).std()) == pytest.approx(0.1, rel=0.1)
    with torch.no_grad():
        torch.testing.assert_close(denoised, model.decoder(model.encoder(noisy)))


def rows_of(num: int, **terms: list[float]) -> list[dict[str, Any]]:
    return [
        {"step": n + 1, "epoch": n // 2, "samples": 30 - 20 * (n % 2), **{name: values[n] for name, values in terms.items()}}
        for n in range(num)
    ]


def test_loss_curves_hold_every_step_the_means_of_epochs_and_the_validation() -> None:
    metrics = rows_of(4, loss=[9.0, 7, 5, 3], log_likelihood=[-8.0, -6, -4, -2], kl_divergence=[1.0, 1, 1, 1])
    metrics[3]["validation"] = {"loss": 2.5, "log_likelihood": -2.0, "kl_divergence": 0.5}
    panels = _maps.loss_curves(metrics).panels
    total, reconstruction, kl = panels.values()
    assert [line.y.tolist() for line in total] == [[9, 7, 5, 3], [8.5, 4.5], [2.5]], "30 samples weigh more than 10"
    assert [line.x.tolist() for line in total] == [[1, 2, 3, 4], [1.5, 3.5], [4]]
    assert [line.y.tolist() for line in reconstruction] == [[8, 6, 4, 2], [7.5, 3.5], [2]]
    assert [line.y.tolist() for line in kl] == [[1, 1, 1, 1], [1, 1], [0.5]]


def test_few_epochs_have_markers_and_a_peak_that_is_cut_off_is_annotated() -> None:
    pytest.importorskip("matplotlib")
    falling = [20.0, *([3.0] * 99)]
    peak, flat = (_draw._curves(_maps.loss_curves(rows_of(100, loss=loss))).axes[0] for loss in (falling, [3.0] * 100))
    assert peak.get_ylim()[1] < 20
    assert [text.get_text() for text in peak.texts] == ["20"]
    assert [line.get_marker() for line in peak.lines if line.get_label() == "_child2"] == ["^"]
    assert not flat.texts
    two = _draw._curves(_maps.loss_curves(rows_of(4, loss=[4.0, 3, 2, 1]))).axes[0]
    assert {line.get_label(): line.get_marker() for line in two.lines} == {"each step": "", "mean of an epoch": "o"}


def test_the_terms_of_a_pair_are_added_and_an_autoencoder_has_no_kl() -> None:
    pair = {f"{name}_x{view}": [sign * view] * 2 for name, sign in (("log_likelihood", -1.0), ("kl_divergence", 1.0)) for view in (1, 2)}
    panels = _maps.loss_curves(rows_of(2, loss=[6.0, 6.0], **pair)).panels
    assert [lines[0].y.tolist() for lines in panels.values()] == [[6, 6], [3, 3], [3, 3]]
    assert list(_maps.loss_curves(rows_of(2, loss=[1.0, 1], log_likelihood=[-1.0, -1])).panels) == [
        "total loss",
        "reconstruction, -log p(x|z)",
    ]


def test_the_files_are_written_once_and_are_the_same_bytes_elsewhere(tmp_path: Path, data: str) -> None:
    pytest.importorskip("matplotlib")
    job = small_job(data, tmp_path / "run", epochs=2)
    fit(job)
    made = write_figures(job.out, data, str(tmp_path / "a"))
    names = [
        "losses",
        "reconstructions",
        "prior_samples",
        "interpolation",
        "traversals",
        "latents_pca",
        "latents_tsne",
        "reparameterisation",
    ]
    assert made["files"] == [f"{name}.png" for name in names]
    assert sorted(made["left_out"]) == ["denoising", "latents_2d", "manifold"]
    assert all(image_of(tmp_path / f"a/{name}").shape[2] >= 3 for name in made["files"])
    before = tree(tmp_path / "a")
    assert write_figures(job.out, data, str(tmp_path / "a")) == made
    write_figures(job.out, data, str(tmp_path / "b"))
    assert tree(tmp_path / "a") == before == tree(tmp_path / "b")
    assert json.loads((tmp_path / "a/figures.json").read_text())["identity"]["checkpoint_sha256"] == load_model(job.out).sha256
    with pytest.raises(ConfigError, match="holds another set of figures:\n  evaluate.seed: there 0, asked 1"):
        write_figures(job.out, data, str(tmp_path / "a"), EvaluateSpec(seed=1))


def test_every_figure_says_what_it_is_of(tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    job, said = small_job(data, tmp_path / "run", max_steps=2), {}

    def listening(panel: _panels.Panel, transform: Transform, subtitle: str = "") -> bytes:
        said[panel.title] = subtitle
        return draw(panel, transform, subtitle)

    monkeypatch.setattr(figures, "draw", listening)
    fit(job)
    write_figures(job.out, data, str(tmp_path / "figures"))
    dataset = open_dataset(data).manifest.dataset_sha256[:12]
    assert said["Training"].endswith(f"; trained on train of dataset {dataset}")
    assert said["Reconstructions"].endswith(f"; test of dataset {dataset}, seed 0")


def image_of(path: Path) -> NDArray[np.uint8]:
    from PIL import Image

    return np.asarray(Image.open(path))


def test_the_drawn_picture_holds_the_pixels_of_the_samples(view: View) -> None:
    pytest.importorskip("matplotlib")
    from io import BytesIO

    from PIL import Image

    panel = _panels.reconstructions(view)
    drawn = np.asarray(Image.open(BytesIO(draw(panel, view.transform))).convert("L"))
    white = Transform(view.transform.spec)
    blank = _panels.Samples(panel.title, torch.ones_like(panel.values), panel.rows, panel.columns)
    empty = np.asarray(Image.open(BytesIO(draw(blank, white))).convert("L"))
    assert drawn.shape == empty.shape
    dark = 2 * 10 * SIZE * SIZE - float(panel.values.sum())  # of 2 x 10 samples, in samples' pixels
    cell = 0.85 * 120 / SIZE  # pixels of the picture for one of a sample, roughly: the layout decides
    assert (255.0 - drawn).sum() / 255 - (255.0 - empty).sum() / 255 == pytest.approx(dark * cell**2, rel=0.25)


def test_an_autoencoder_of_vectors_has_its_figures_too(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    data = arrays(tmp_path, np.random.default_rng(0).random((60, 6)).astype(np.float32), y=np.arange(60) % 3)
    made = write_figures(saved_run(tmp_path / "run", ae_config(shape=(6,))), data, str(tmp_path / "out"))
    assert made["files"] == ["reconstructions.png", "interpolation.png", "traversals.png", "latents_pca.png", "latents_tsne.png"]
    assert made["left_out"]["losses"].startswith("the metrics of a run are in its folder")
    assert "has no prior" in made["left_out"]["prior_samples"]


def test_the_view_reads_the_latents_of_the_table(tmp_path: Path, run: str, data: str, view: View) -> None:
    table = encode(run, data, tmp_path / "table").select("test")
    known = {tuple(np.round(row, 4)) for row in table.numpy("mu")}
    assert {tuple(np.round(row, 4)) for row in view.latents.values} == known


def test_without_matplotlib_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"figures need matplotlib .*pip install 'aecore\[report\]'"):
        require_matplotlib()


def test_a_sequence_ends_where_it_ends_and_a_video_is_shown_by_frames() -> None:
    rows = torch.arange(2)
    batch = Batch(torch.ones(2, 5, 3), rows, rows, 2, lengths=torch.tensor([5, 2]))
    cut = _panels._cut(batch.x, batch)
    assert torch.equal(cut.isnan()[:, :, 0], torch.tensor([[False] * 5, [False, False, True, True, True]]))
    videos = torch.rand(1, 2, 7, 1, 4, 6)  # [R, C, T, channels, H, W]
    for video in (videos, videos.transpose(2, 3)):
        strip = _strips(video)
        assert strip.shape == (1, 2, 1, 4, 24)
        assert torch.equal(strip[0, 1, 0], torch.cat([videos[0, 1, frame, 0] for frame in (0, 2, 4, 6)], dim=1))


def test_sequences_with_blank_ends_are_drawn(view: View) -> None:
    pytest.importorskip("matplotlib")
    values = torch.rand(2, 3, 6, 1)
    values[1, 2, 4:] = torch.nan
    assert draw(_panels.Samples("series", values), view.transform).startswith(b"\x89PNG")
