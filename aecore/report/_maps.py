"""Maps of the latents, and the curves of a training run."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aecore.checkpoint.files import newest_checkpoint
from aecore.report._panels import Curves, Line, Points, pca
from aecore.report._view import NotDrawn, View
from aecore.store import Store
from aecore.training.metrics import read_rows

GROUPS = 20  # classes that a map has colours for
Metrics = Sequence[Mapping[str, Any]]  # any: numbers, and the numbers of a validation


def latents_pca(view: View) -> Points:
    """Show the latents along their two directions of most variance."""
    values = view.latents.values
    if values.shape[1] < 3:
        raise NotDrawn(f"the latent has {values.shape[1]} dimensions: see latents_2d")
    xy, shares = pca(values)
    first, second = (f"component {number} ({share:.0%} of the variance)" for number, share in enumerate(shares, 1))
    return _points(view, "Latents, principal components", xy, (first, second))


def latents_2d(view: View) -> Points:
    """Show the latents of a model with two dimensions as they are."""
    values = view.latents.values
    if values.shape[1] != 2:
        raise NotDrawn(f"the latent has {values.shape[1]} dimensions, a plane has 2")
    return _points(view, "Latents", values.astype(np.float64), ("z[0]", "z[1]"))


def latents_tsne(view: View) -> Points:
    """Show the latents by t-SNE (van der Maaten & Hinton 2008); neighbourhoods have a meaning, distances between groups have none."""
    try:
        from sklearn.manifold import TSNE
    except ImportError as missing:
        raise NotDrawn("t-SNE needs scikit-learn: pip install 'aecore[report]'") from missing
    values = view.latents.values
    if len(values) < 10:
        raise NotDrawn(f"t-SNE of {len(values)} samples says nothing")
    perplexity = min(30.0, (len(values) - 1) / 3)
    layout: NDArray[np.float32] = TSNE(
        perplexity=perplexity, init="pca" if values.shape[1] > 1 else "random", random_state=view.spec.seed
    ).fit_transform(values)
    return _points(view, f"Latents, t-SNE (perplexity {perplexity:.0f})", layout.astype(np.float64), ("", ""))


def _points(view: View, title: str, xy: NDArray[np.float64], axes: tuple[str, str]) -> Points:
    known = np.unique(view.latents.labels[view.latents.labels >= 0])
    title = f"{title}: {len(xy):,} samples of {view.spec.split}"
    if not 0 < len(known) <= GROUPS:
        return Points(title, xy, np.full(len(xy), -1), (), axes)
    groups = np.where(view.latents.labels < 0, -1, np.searchsorted(known, view.latents.labels))
    return Points(title, xy, groups, tuple(view.label_name(int(label)) for label in known), axes)


def losses(store: Store, run_sha256: str | None) -> Curves:
    """Show total loss, reconstruction and KL over the steps of a run, each step and the mean of each epoch, with the validation."""
    newest = newest_checkpoint(store, run_sha256)
    if newest is None or not newest.metrics:
        raise NotDrawn("the metrics of a run are in its folder: give the run, not one checkpoint of it")
    return loss_curves(read_rows(store, newest.metrics))


def loss_curves(metrics: Metrics) -> Curves:
    """Return the panels of rows of metrics; terms of a pair are added up, a panel without values is left out."""
    panels = {}
    for title, names, sign in (
        ("total loss", ("loss",), 1.0),
        ("reconstruction, -log p(x|z)", ("log_likelihood", "log_likelihood_x1", "log_likelihood_x2"), -1.0),
        ("KL divergence", ("kl_divergence", "kl_divergence_x1", "kl_divergence_x2"), 1.0),
    ):
        own = [name for name in names if name in metrics[0]]
        if own:
            panels[title] = _lines(metrics, own, names, sign)
    return Curves("Training", panels, "step")


def _lines(metrics: Metrics, own: Sequence[str], names: Sequence[str], sign: float) -> tuple[Line, ...]:
    steps, epochs = (np.array([row[name] for row in metrics], np.float64) for name in ("step", "epoch"))
    values = sign * np.sum([[row[name] for row in metrics] for name in own], axis=0)
    each, samples = [epochs == epoch for epoch in np.unique(epochs)], np.array([row["samples"] for row in metrics])
    middles = np.array([steps[rows].mean() for rows in each])
    means = np.array([np.average(values[rows], weights=samples[rows]) for rows in each])
    lines = [Line("each step", steps, values), Line("mean of an epoch", middles, means)]
    validated = [row for row in metrics if any(name in row.get("validation", {}) for name in names)]
    if validated:
        y = [sign * sum(row["validation"].get(name, 0.0) for name in names) for row in validated]
        lines.append(Line("validation", np.array([row["step"] for row in validated], np.float64), np.array(y), points=True))
    return tuple(lines)
