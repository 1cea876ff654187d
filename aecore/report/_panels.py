"""What a figure shows, as plain arrays: computed here and in `_maps.py`, drawn in `_draw.py`. So a test can look at what is drawn.

Legend: R rows, C columns, n points, D latent.
"""

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aecore._base.batch import Batch
from aecore._base.noise import seed_of, step_noise
from aecore._base.trainable import has_posterior
from aecore.report._view import NotDrawn, View
from aecore.sampling import prior_latents

SAMPLES = 10  # columns of a figure of samples
STEPS = 10  # of an interpolation
MOVES = 9  # of a traversal, the middle one at 0
SIDE = 8  # of the grid of prior samples
MANIFOLD = 15  # of the grid of a plane of latents
PAIRS = 3  # of classes that are interpolated
TRAVERSED = 10  # dimensions


@dataclass(frozen=True, eq=False)
class Samples:
    """Samples in rows `[R, C, *shape]` (network scale, float32, NaN is blank), a caption for each row and each column (or none)."""

    title: str
    values: Tensor
    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True, eq=False)
class Line:
    """Values over x; `points` are drawn as dots."""

    name: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    points: bool = False


@dataclass(frozen=True, eq=False)
class Curves:
    """Panels side by side: title -> its lines."""

    title: str
    panels: dict[str, tuple[Line, ...]]
    x_label: str


@dataclass(frozen=True, eq=False)
class Points:
    """Points of a plane `[n, 2]` and what they belong to: a number of `names`, or -1."""

    title: str
    xy: NDArray[np.float64]
    groups: NDArray[np.int64]
    names: tuple[str, ...]
    axes: tuple[str, str]


@dataclass(frozen=True, eq=False)
class Histograms:
    """Panels side by side: caption, values, and mean and deviation of the normal density that is drawn over them."""

    title: str
    panels: tuple[tuple[str, NDArray[np.float64], float, float], ...]


Panel = Samples | Curves | Points | Histograms


def reconstructions(view: View) -> Samples:
    """Show samples of the split above their reconstructions."""
    batch = view.batch(view.by_class(SAMPLES))
    names = _class_names(view, batch.label)
    values = torch.stack([_cut(batch.x.cpu(), batch), _cut(view.reconstruct(batch), batch)])
    return Samples("Reconstructions", values, ("original", "reconstruction"), names)


def denoising(view: View) -> Samples:
    """Show samples, corrupted as in training, and their reconstructions; for a model that is trained on corrupted inputs."""
    batch = view.batch(view.by_class(SAMPLES))
    eps = step_noise(seed_of("figures", view.spec.seed), 0, tuple(batch.x.shape)).to(batch.x.device)
    noisy = view.loaded.model.add_noise(batch.x, eps)
    if torch.equal(noisy, batch.x):
        raise NotDrawn(f"model.kind={view.loaded.config.model.kind} is trained on clean inputs")
    denoised = view.reconstruct(replace(batch, x=noisy))
    values = torch.stack([_cut(x, batch) for x in (batch.x.cpu(), noisy.detach().cpu(), denoised)])
    return Samples("Denoising", values, ("original", "noisy", "denoised"), _class_names(view, batch.label))


def prior_samples(view: View) -> Samples:
    """Show a grid of samples of the prior; for a conditional model one class per row."""
    dim = view.prior_dim
    rows = min(view.num_classes, SAMPLES) if view.conditional else SIDE
    z = prior_latents(view.spec.seed, rows * SIDE, dim).view(rows, SIDE, dim)
    values = torch.stack([view.decode(row, label) for label, row in enumerate(z)])
    captions = tuple(view.label_name(label) for label in range(rows)) if view.conditional else ()
    return Samples("Samples of the prior", values, captions)


def interpolation(view: View) -> Samples:
    """Move from a sample of one class to one of another, on a straight line and on an arc; a conditional model keeps the first class."""
    latents, labels = view.decodable, view.decodable.labels
    first = {int(label): int(np.flatnonzero(labels == label)[0]) for label in np.unique(labels)}
    starts = list(first.values()) if len(first) > 1 else list(range(min(PAIRS + 1, len(labels))))
    if len(starts) < 2:
        raise NotDrawn("an interpolation needs two samples")
    values, rows = [], []
    for a, b in itertools.islice(itertools.pairwise(starts), PAIRS):
        z_a, z_b = torch.from_numpy(latents.values[a]), torch.from_numpy(latents.values[b])
        names = [view.label_name(int(labels[place])) for place in (a, b)]
        for way, steps in (("lerp", lerp(z_a, z_b, STEPS)), ("slerp", slerp(z_a, z_b, STEPS))):
            values.append(view.decode(steps, int(labels[a])))
            rows.append(f"{names[0]} \N{RIGHTWARDS ARROW} {names[1]}, {way}" if all(names) else way)
    columns = tuple(f"{t:.2f}" for t in np.linspace(0, 1, STEPS))
    return Samples("Interpolation between latents", torch.stack(values), tuple(rows), columns)


def lerp(a: Tensor, b: Tensor, steps: int) -> Tensor:
    """Return `[steps, D]` points on the line from `a` to `b`, both ends included."""
    t = torch.linspace(0, 1, steps).unsqueeze(1)
    return (1 - t) * a + t * b


def slerp(a: Tensor, b: Tensor, steps: int) -> Tensor:
    """Return `[steps, D]` points on the arc from `a` to `b`: direction and length change evenly; (nearly) parallel ones and 0 as `lerp`."""
    lengths = a.norm(), b.norm()
    cosine = (a @ b / (lengths[0] * lengths[1]).clamp_min(1e-12)).clamp(-1, 1)
    angle = torch.arccos(cosine)
    if min(lengths) == 0 or torch.sin(angle) < 1e-4:
        return lerp(a, b, steps)
    t = torch.linspace(0, 1, steps).unsqueeze(1)
    direction = torch.sin((1 - t) * angle) * (a / lengths[0]) + torch.sin(t * angle) * (b / lengths[1])
    found: Tensor = direction / torch.sin(angle) * ((1 - t) * lengths[0] + t * lengths[1])
    return found


def traversals(view: View) -> Samples:
    """Move one latent dimension of a sample at a time over its range, the dimensions that vary most first."""
    values = view.decodable.values
    deviations, means = values.std(0), values.mean(0)
    order = np.argsort(-deviations, kind="stable")[:TRAVERSED]
    base, label = torch.from_numpy(values[0]), int(view.latents.labels[0])
    unit = has_posterior(view.loaded.config.model.columns)
    offsets = np.linspace(-3, 3, MOVES) if unit else np.linspace(-2, 2, MOVES)
    rows = []
    for dimension in order.tolist():
        z = base.repeat(MOVES, 1)
        moved = offsets if unit else means[dimension] + offsets * deviations[dimension]
        z[:, dimension] = torch.from_numpy(moved).float()
        rows.append(view.decode(z, label))
    captions = tuple(f"z[{dimension}], sd {deviations[dimension]:.2f}" for dimension in order)
    columns = tuple(f"{offset:+.3g}" + ("" if unit else " sd") for offset in offsets)
    return Samples("Traversals of single latent dimensions", torch.stack(rows), captions, columns)


def manifold(view: View) -> Samples:
    """Decode the plane of a model with two latents: at quantiles of the prior, or over the range of the data's latents."""
    values = view.decodable.values
    if values.shape[1] != 2:
        raise NotDrawn(f"the latent has {values.shape[1]} dimensions, a plane has 2")
    shares = torch.linspace(0.02, 0.98, MANIFOLD, dtype=torch.float64)
    if has_posterior(view.loaded.config.model.columns):
        x = y = torch.special.ndtri(shares)
        note = "at even quantiles of the prior"
    else:
        spread = torch.from_numpy(values.astype(np.float64)).quantile(torch.tensor([0.02, 0.98], dtype=torch.float64), dim=0)
        x, y = (torch.linspace(float(low), float(high), MANIFOLD, dtype=torch.float64) for low, high in spread.T)
        note = "over the range of the data's latents"
    z = torch.stack(torch.meshgrid(x, y.flip(0), indexing="xy"), dim=2)  # rows from the top: y falls
    flat = view.decode(z.flatten(0, 1).float(), 0)
    columns, rows = (tuple(f"{round(float(place), 1) + 0.0:.1f}" for place in axis) for axis in (x, y.flip(0)))
    return Samples("Decoded plane of latents", flat.view(MANIFOLD, MANIFOLD, *view.shape), rows, columns, note)


def reparameterisation(view: View) -> Histograms:
    """Show draws of the sampling layer: the noise, z of one input in its most informative dimension, and that dimension over all inputs."""
    batch = view.batch(view.chosen)
    latents = view.loaded.model.latents(batch)
    if not has_posterior(latents):
        raise NotDrawn(f"model.kind={view.loaded.config.model.kind} has no posterior to draw from")
    mu, sd = latents["mu"].cpu().double(), (latents["log_var"].cpu().double() / 2).exp()
    dimension = int((mu.square() + sd.square() - 1 - 2 * sd.log()).mean(0).argmax())
    eps = step_noise(seed_of("figures", view.spec.seed), 1, (20_000,)).double()
    one = mu[0, dimension] + sd[0, dimension] * eps
    rows = torch.arange(len(eps)) % len(mu)
    every = mu[rows, dimension] + sd[rows, dimension] * eps
    mean, deviation = float(mu[0, dimension]), float(sd[0, dimension])
    return Histograms(
        f"Reparameterisation, z[{dimension}] = mu + sd * eps",
        (
            ("eps, against N(0, 1)", eps.numpy(), 0.0, 1.0),
            (f"z of one input, against N({mean:.2f}, {deviation:.2f}\N{SUPERSCRIPT TWO})", one.numpy(), mean, deviation),
            ("z over all inputs, against the prior", every.numpy(), 0.0, 1.0),
        ),
    )


def _cut(x: Tensor, batch: Batch) -> Tensor:
    """Return samples `[n, T, ...]` with NaN behind the ends of sequences."""
    if batch.lengths is None:
        return x
    valid = torch.arange(x.shape[1]) < batch.lengths.cpu()[:, None]
    return torch.where(valid.view(*valid.shape, *[1] * (x.ndim - 2)), x, torch.nan)


def _class_names(view: View, labels: Tensor | None) -> tuple[str, ...]:
    return () if labels is None else tuple(view.label_name(int(label)) for label in labels)


def pca(values: NDArray[np.float32]) -> tuple[NDArray[np.float64], tuple[float, float]]:
    """Return `[n, 2]` coordinates along the two directions of most variance, and their shares of it; signs are fixed."""
    centred = values.astype(np.float64) - values.mean(0, dtype=np.float64)
    _, singular, directions = np.linalg.svd(centred, full_matrices=False)
    directions = directions[:2] * np.sign(directions[:2][np.arange(len(directions[:2])), np.abs(directions[:2]).argmax(1)])[:, None]
    total = float(np.square(singular).sum()) or math.inf
    shares = np.square(singular[:2]) / total
    return centred @ directions.T, (float(shares[0]), float(shares[1]))
