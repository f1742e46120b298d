"""Plots of runs: loss, gradient norm and loss by timestep. Needs matplotlib (the extra "report")."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from fastddpm.errors import printable
from fastddpm.sampling.images import save_png

Records = Sequence[Mapping[str, Any]]  # the lines of a log

_SIZE, _DPI = (5.4, 4.0), 110  # width and height of a panel in inches, dots per inch
_PARTS = 4  # parts of a run, each with its own curve of the loss by timestep


@dataclass(frozen=True)
class Curve:
    """What is plotted of a run: its log, T, and the steps at which options were changed, with the changes as text."""

    records: Records
    timesteps: int
    changes: Sequence[tuple[int, str]] = ()


def loss_by_t(records: Records, timesteps: int, path: Path, caption: str) -> bool:
    """Plot the loss by timestep of each quarter of a run's log into `path`; False, and no file, if the log has none."""
    known = [record for record in records if record.get("loss_by_t")]
    if not known:
        return False
    figure, axes = panel("t", "loss", _as_is(caption))
    parts = [part for part in np.array_split(np.arange(len(known)), _PARTS) if len(part)]
    for i, part in enumerate(parts):
        chosen = [known[j] for j in part]
        t, means = mean_by_t(chosen, timesteps)
        steps = f"to step {chosen[-1]['step']:,}"
        axes.plot(t, means, marker=".", color="tab:blue", alpha=(i + 1) / len(parts), label=steps)
    axes.set_yscale("log")
    axes.legend(fontsize="small")
    save_figure(figure, path)
    return True


def mean_by_t(records: Records, timesteps: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (middle of each bin of t, mean loss in it), float64 (bins,) each; NaN for an empty bin.

    Takes the records that have as many bins as the last one, with equal weights.
    """
    bins = len(records[-1]["loss_by_t"])
    table = np.array([r["loss_by_t"] for r in records if len(r["loss_by_t"]) == bins], dtype=np.float64)
    present = ~np.isnan(table)
    counts = present.sum(0)
    sums = np.where(present, table, 0.0).sum(0)
    means = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    return (np.arange(bins) + 0.5) * timesteps / bins, means


def curves(runs: Mapping[str, Curve], path: Path) -> None:
    """Plot runs into `path`: loss and gradient norm against steps, and loss by t over the last quarter of the log.

    `runs`: by the names in the legend. A vertical line in the run's colour marks each change of its options.
    """
    figure = Figure((3 * _SIZE[0], _SIZE[1]), _DPI, layout="constrained")
    panels = figure.subplots(1, 3)
    _axes(panels[0], "step", "loss", "loss, mean since the line before")
    _axes(panels[1], "step", "gradient norm", "gradient norm before clipping")
    _axes(panels[2], "t", "loss", "loss by timestep, last quarter")
    for name, run in runs.items():
        for axes, field in zip(panels, ("loss", "gradient_norm"), strict=False):
            points = [(r["step"], r[field]) for r in run.records if r.get(field) is not None]
            (line,) = axes.plot(*np.array(points, dtype=np.float64).reshape(-1, 2).T, label=_as_is(name))
            for step, text in run.changes:
                _mark(axes, step, text, line.get_color())
        known = [record for record in run.records if record.get("loss_by_t")]
        if known:
            panels[2].plot(
                *mean_by_t(known[-max(1, len(known) // _PARTS) :], run.timesteps), marker=".", label=_as_is(name)
            )
    for axes in panels:
        axes.set_yscale("log")
        if len(runs) > 1 and axes.lines:
            axes.legend(fontsize="small")
    save_figure(figure, path)


def _mark(axes: Axes, step: int, text: str, color: Any) -> None:
    """Draw a vertical line at a step, with a text along its upper part."""
    axes.axvline(step, color=color, linestyle="--", linewidth=1)
    axes.annotate(
        _as_is(text), (step, 0.98), xycoords=("data", "axes fraction"), xytext=(-3, 0), textcoords="offset points",
        rotation=90, ha="right", va="top", fontsize="x-small", color=color,
    )  # fmt: skip


def _as_is(text: str) -> str:
    """Return a text that matplotlib shows as it is: it would read what stands between two $ as a formula."""
    return printable(text).replace("$", r"\$")


def _axes(axes: Axes, x: str, y: str, title: str) -> Axes:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, fontsize="small")
    axes.grid(alpha=0.3)
    return axes


def panel(x: str, y: str, title: str, dots_per_inch: int = _DPI) -> tuple[Figure, Axes]:
    """Return a figure with one panel, outside pyplot's global state; `x` and `y` are the axis labels."""
    figure = Figure(_SIZE, dots_per_inch, layout="constrained")
    return figure, _axes(figure.add_subplot(), x, y, title)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically. Raises `StorageError` if it cannot be written."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    save_png(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"), path)
