"""Plots of what was measured, each with its model, data, count and date. Needs matplotlib (the extra "report")."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from fastddpm.figures import save_png

from .rate_distortion import PAPER_SET, RateDistortion

_SIZE, _DPI = (5.4, 4.0), 150  # inches, dots per inch
_STEPS = "reverse steps"
_RATE = "rate (bits/dim)"
_DISTORTION = "distortion (root mean squared error, levels of 255)"

PaperTable = Mapping[int, tuple[float, float]]  # reverse steps: rate, distortion


def distortion(curve: RateDistortion, paper: PaperTable, caption: str, path: Path) -> None:
    """Distortion against reverse steps, with the paper's points if any: the left panel of figure 5."""
    figure, axes = _panel(_STEPS, _DISTORTION, caption)
    axes.plot(curve.steps, curve.rmse, label="measured")
    _points(axes, [(steps, rmse) for steps, (_, rmse) in paper.items()])
    _save(figure, path)


def rate(curve: RateDistortion, paper: PaperTable, caption: str, path: Path) -> None:
    """Rate against reverse steps: the middle panel of figure 5."""
    figure, axes = _panel(_STEPS, _RATE, caption)
    axes.plot(curve.steps, curve.rate, label="measured")
    _points(axes, [(steps, bits) for steps, (bits, _) in paper.items()])
    _save(figure, path)


def rate_against_distortion(curve: RateDistortion, paper: PaperTable, caption: str, path: Path) -> None:
    """Distortion against rate: the right panel of figure 5."""
    figure, axes = _panel(_RATE, _DISTORTION, caption)
    axes.plot(curve.rate, curve.rmse, label="measured")
    _points(axes, list(paper.values()))
    _save(figure, path)


def _panel(x: str, y: str, caption: str) -> tuple[Figure, Axes]:
    """A figure that no window and no global state knows of."""
    figure = Figure(_SIZE, _DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(caption, fontsize="small")
    axes.grid(alpha=0.3)
    return figure, axes


def _points(axes: Axes, points: list[tuple[float, float]]) -> None:
    if points:
        axes.plot(*np.transpose(points), "x", color="tab:red", label=f"paper, {PAPER_SET}")
    axes.legend()


def _save(figure: Figure, path: Path) -> None:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    save_png(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"), path)
