"""Panels to PNG files with matplotlib, which is imported here only, and without its global state. The same panels give the same bytes."""

import io
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aecore.data.format.pictures import GAP, grid, is_image, pixels
from aecore.data.format.transform import Transform
from aecore.report._panels import Curves, Histograms, Panel, Points, Samples

DPI = 120
FRAMES = 4  # of a video
MARKED = 20  # epochs whose means have a marker each: a line of two points without markers is hard to read
INK, SOFT, STRONG, ACCENT = "#222222", "#b8c4d6", "#2456a6", "#d1495b"
STYLE = {
    "figure.facecolor": "white",
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.edgecolor": "#888888",
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}
Figure = Any  # any: matplotlib's; the checker takes the extra as missing


def draw(panel: Panel, transform: Transform, subtitle: str = "") -> bytes:
    """Return the PNG of a panel; `subtitle` says what the figure is of."""
    from matplotlib import style

    with style.context(["default", STYLE], after_reset=True):  # whatever the user's matplotlibrc holds
        if isinstance(panel, Samples):
            figure = _samples(panel, transform)
        elif isinstance(panel, Curves):
            figure = _curves(panel)
        elif isinstance(panel, Points):
            figure = _points(panel)
        else:
            figure = _histograms(panel)
        figure.suptitle(panel.title, fontsize=11, fontweight="bold")
        note = ", ".join(part for part in (getattr(panel, "note", ""), subtitle) if part)
        figure.supxlabel(note, fontsize=7, color="#777777")
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=DPI, metadata={"Software": None})
    return data.getvalue()


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Made

    figure = Made(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _samples(panel: Samples, transform: Transform) -> Figure:
    values = _strips(panel.values)
    rows, columns = values.shape[:2]
    shape = values.shape[2:]
    if not is_image(shape):
        return _plots(panel)
    picture = grid(pixels(values.flatten(0, 1), transform), columns)
    cell = min(0.85 * max(1.0, shape[2] / shape[1]), 10.0 / columns)  # inches
    caption = 0.12 + 0.075 * max((len(name) for name in panel.rows), default=0)
    figure = _figure(cell * columns + caption + 0.3, cell * rows * shape[1] / shape[2] + 0.9)
    axes = figure.add_subplot()
    axes.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest" if cell * DPI >= shape[2] else "antialiased")
    across, down = ([(side + GAP) * n + side / 2 for n in range(count)] for side, count in ((shape[2], columns), (shape[1], rows)))
    _captions(axes, panel, across, down, 8.0 if cell >= 0.7 else 7.0)
    if max((len(name) for name in panel.columns), default=0) > cell * 13:
        axes.tick_params(axis="x", rotation=30)
    return figure


def _strips(values: Tensor) -> Tensor:
    """Return videos `[R, C, T, channels, H, W]` (or channels before T) as images, some of their frames side by side; all else as it is."""
    shape = values.shape[2:]
    if len(shape) != 4 or not (is_image(shape[1:]) or shape[0] in (1, 3)):
        return values
    frames = values if is_image(shape[1:]) else values.transpose(2, 3)
    shown = torch.linspace(0, frames.shape[2] - 1, FRAMES).round().long()
    return frames[:, :, shown].nan_to_num().permute(0, 1, 3, 4, 2, 5).flatten(4)  # without a value behind the end: black


def _plots(panel: Samples) -> Figure:
    """Draw samples that are no images, a small plot each on one scale: a vector is a line, a sequence a line for each of its values.

    All cells share one pair of axes: a hundred axes would take ten seconds to lay out.
    """
    rows, columns = panel.values.shape[:2]
    low, high = (float(np.nan_to_num(limit(panel.values.numpy()))) for limit in (np.nanmin, np.nanmax))
    scale = (high - low) or 1.0
    figure = _figure(1.1 * columns + 1.4, 0.85 * rows + 1.0)
    axes = figure.add_subplot()
    for row in range(rows):
        for column in range(columns):
            sample = panel.values[row, column].numpy()
            values = sample.reshape(-1, 1) if sample.ndim <= 1 else sample.reshape(len(sample), -1)[:, :16]
            x = column + 0.05 + 0.9 * np.linspace(0, 1, len(values))
            axes.plot(x, rows - 1 - row + 0.08 + 0.84 * (values - low) / scale, linewidth=0.8, color=STRONG, alpha=0.9)
    for place in range(rows + 1):
        axes.axhline(place, color="#dddddd", linewidth=0.5)
    for place in range(columns + 1):
        axes.axvline(place, color="#dddddd", linewidth=0.5)
    axes.set(xlim=(0, columns), ylim=(0, rows))
    _captions(axes, panel, [column + 0.5 for column in range(columns)], [rows - 0.5 - row for row in range(rows)], 8.0)
    axes.set_xlabel(f"every plot from {low:.3g} to {high:.3g}", fontsize=7)
    return figure


def _captions(axes: Any, panel: Samples, columns: list[float], rows: list[float], size: float) -> None:  # any: matplotlib's
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xticks(columns[: len(panel.columns)], list(panel.columns))
    axes.set_yticks(rows[: len(panel.rows)], list(panel.rows))
    axes.tick_params(length=0, labelsize=size, labeltop=True, labelbottom=False)


def _curves(panel: Curves) -> Figure:
    figure = _figure(3.6 * len(panel.panels) + 0.3, 3.2)
    for number, (title, lines) in enumerate(panel.panels.items(), 1):
        axes = figure.add_subplot(1, len(panel.panels), number)
        for line in lines:
            if line.points:
                axes.plot(line.x, line.y, "o", markersize=3.5, color=ACCENT, label=line.name)
            else:
                each = line.name == "each step"
                marker = "" if each or len(line.x) > MARKED else "o"
                look = {"linewidth": 0.6 if each else 1.8, "color": SOFT if each else STRONG, "marker": marker, "markersize": 4.0}
                axes.plot(line.x, line.y, label=line.name, **look)
        axes.set_title(title)
        axes.set_xlabel(panel.x_label)
        axes.set_ylabel("nats per sample" if number == 1 else "")
        axes.set_ylim(*_limits(lines))
        _mark_peak(axes, lines)
        axes.grid(True, linewidth=0.3, color="#dddddd")
        if number == 1:
            axes.legend(fontsize=8)
    return figure


def _mark_peak(axes: Any, lines: Any) -> None:  # any: matplotlib's; the lines of a panel
    """Annotate the height of the peak that the limits leave out."""
    line = max(lines, key=lambda line: line.y.max())
    top, at = axes.get_ylim()[1], int(line.y.argmax())
    if line.y[at] > top:
        axes.plot(line.x[at], top, "^", markersize=4.5, color=ACCENT, clip_on=False)
        axes.annotate(f"{line.y[at]:.4g}", (line.x[at], top), (6, -9), textcoords="offset points", fontsize=7, color=ACCENT)


def _limits(lines: Any) -> tuple[float, float]:  # any: the lines of a panel
    """Return limits that leave out the first steps' peak, so that later steps can be read."""
    every = np.concatenate([line.y for line in lines])
    low, high = float(every.min()), float(np.quantile(every, 0.98))
    high = max(high, *(float(line.y.max()) for line in lines if line.name != "each step"))
    margin = 0.05 * (high - low) or 1.0
    return low - margin, high + margin


def _points(panel: Points) -> Figure:
    from matplotlib import colormaps

    named = bool(panel.names)
    figure = _figure(6.6 if named else 5.6, 5.4)
    axes = figure.add_subplot()
    colours = colormaps["tab10" if len(panel.names) <= 10 else "tab20"].colors
    bare = panel.groups < 0
    axes.scatter(*panel.xy[bare].T, s=7, color=STRONG if not named else "#bbbbbb", alpha=0.6, linewidths=0)
    for number, name in enumerate(panel.names):
        chosen = panel.groups == number
        axes.scatter(*panel.xy[chosen].T, s=9, color=colours[number], alpha=0.75, linewidths=0, label=name)
    if named:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, markerscale=2.0, handletextpad=0.2)
    axes.set(xlabel=panel.axes[0], ylabel=panel.axes[1])
    if not any(panel.axes):
        axes.set(xticks=[], yticks=[])
        axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_aspect("equal", adjustable="datalim")
    return figure


def _histograms(panel: Histograms) -> Figure:
    figure = _figure(3.5 * len(panel.panels), 3.0)
    for number, (caption, values, mean, deviation) in enumerate(panel.panels, 1):
        axes = figure.add_subplot(1, len(panel.panels), number)
        axes.hist(values, bins=80, density=True, color=SOFT)
        low, high = axes.get_xlim()
        x = np.linspace(float(low), float(high), 400)
        density = np.exp(-0.5 * ((x - mean) / deviation) ** 2) / (deviation * np.sqrt(2 * np.pi))
        axes.plot(x, density, color=ACCENT, linewidth=1.4)
        axes.set_title(caption, fontsize=8.5)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
    return figure
