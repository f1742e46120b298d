"""The model as a progressive code: how many bits have arrived at each step, and how good the image is (section 4.3)."""

import datetime
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastddpm.storage.files import write_text

from .bits_per_dim import BitsPerDim, or_none
from .context import EvaluationContext
from .likelihood import bits_of
from .options import BitsOptions

# Reverse steps taken, of 1000: bits per dimension, and the root of the mean squared error in levels of 255. CIFAR-10's
# test set, table 4 of the paper's appendix. Its first row is the lossy part of 3.75 bits; the decoder takes the rest.
PAPER_TABLE = {
    1000: (1.77581, 0.95136),
    900: (0.11994, 12.02),
    800: (0.05415, 18.47),
    700: (0.02866, 24.44),
    600: (0.01507, 30.81),
    500: (0.00716, 38.03),
    400: (0.00282, 46.13),
    300: (0.00081, 54.19),
    200: (0.00013, 60.97),
    100: (0.0, 67.60),
}
PAPER_SET = "CIFAR-10 test"
_TABLE = "rate-distortion.csv"
_Axis = tuple[str, np.ndarray, Sequence[float]]  # its text, our values, the paper's
_LEVELS = 127.5  # from [-1, 1] to pixel values


@dataclass(frozen=True, eq=False)
class RateDistortion:
    """The curve, float64 (T,) each, in the order of the reverse process.

    `steps`: 1..T, reverse steps of which the first k - 1 have been taken when x_t with t = T - k is known. `rate`: bits
    per dimension that made it known. `rmse`: of the clipped x_0 prediction made from it, in levels of 255, with its
    standard error `rmse_errors`.
    """

    steps: np.ndarray
    rate: np.ndarray
    rmse: np.ndarray
    rmse_errors: np.ndarray


def rate_distortion(result: BitsPerDim) -> RateDistortion:
    """rate(t) = L_T + the sum of L_s over s > t; distortion(t) = 127.5 sqrt(mean squared error of x_0 from x_t)."""
    rate = result.prior + np.append(0.0, np.cumsum(result.terms[:0:-1]))
    rmse = np.sqrt(result.mse[::-1])
    with np.errstate(invalid="ignore", divide="ignore"):
        errors = result.mse_errors[::-1] / (2 * rmse)
    return RateDistortion(np.arange(1, len(rate) + 1), rate, _LEVELS * rmse, _LEVELS * errors)


def measure_rate_distortion(context: EvaluationContext, options: BitsOptions) -> dict[str, Any]:
    """The curve of the context's images: for JSON, with the paper's table beside it; rate-distortion.csv and plots.

    Evaluates nothing where the bound is known already (`bits_of`, and what it raises). Plots need matplotlib; without
    it a line on stderr says so.
    """
    result = bits_of(context, options)
    curve = rate_distortion(result)
    rows = table(curve)
    pictures: list[str] = []
    if context.group.is_main:
        write_text(context.out / _TABLE, _csv(curve))
        pictures = _draw(context, curve, result.num_images)
    return {
        "rate": or_none(float(curve.rate[-1])),
        "rmse": or_none(float(curve.rmse[-1])),
        "table": rows,
        "paper": PAPER_SET,
        "per_step": _TABLE,
        "pictures": pictures,
        "conditioning": result.conditioning,
        "num_images": result.num_images,
    }


def table(curve: RateDistortion) -> list[dict[str, float | None]]:
    """Ten rows, the whole chain first; for a chain of 1000 steps each has the paper's numbers too."""
    total = len(curve.steps)
    wanted = dict.fromkeys(max(1, round(total * tenth / 10)) for tenth in range(10, 0, -1))
    rows: list[dict[str, float | None]] = []
    for steps in wanted:
        paper = PAPER_TABLE[steps] if total == 1000 else (None, None)
        ours = or_none(float(curve.rate[steps - 1])), or_none(float(curve.rmse[steps - 1]))
        names = ("rate", "rmse", "paper_rate", "paper_rmse")
        rows.append({"steps": steps, **dict(zip(names, (*ours, *paper), strict=True))})
    return rows


def _csv(curve: RateDistortion) -> str:
    total = len(curve.steps)
    lines = ["reverse_steps,t,bits_per_dim,rmse,rmse_standard_error,paper_bits_per_dim,paper_rmse"]
    columns = (curve.steps, curve.rate, curve.rmse, curve.rmse_errors)
    for steps, *numbers in zip(*(column.tolist() for column in columns), strict=True):
        paper = PAPER_TABLE.get(steps, ("", "")) if total == 1000 else ("", "")
        cells = [str(steps), str(total - steps), *(f"{number:.9g}" for number in numbers), *map(str, paper)]
        lines.append(",".join(cells))
    return "\n".join(lines) + "\n"


def _draw(context: EvaluationContext, curve: RateDistortion, num_images: int) -> list[str]:
    try:
        from fastddpm.training.plots import panel, save_figure
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        print(f"no plots: they need matplotlib, pip install 'fastddpm[report]'; {_TABLE} is written", file=sys.stderr)
        return []
    caption = (
        f"{context.model.preset.name}, {num_images:,} images of {context.dataset.name}, "
        f"{datetime.date.today().isoformat()}"
    )
    paper = PAPER_TABLE if len(curve.steps) == 1000 else {}
    steps: _Axis = ("reverse steps", curve.steps, list(paper))
    rate: _Axis = ("rate (bits/dim)", curve.rate, [rate for rate, _ in paper.values()])
    distortion: _Axis = (
        "distortion (root mean squared error, levels of 255)", curve.rmse, [rmse for _, rmse in paper.values()]
    )  # fmt: skip
    panels = {
        "distortion.png": (steps, distortion),
        "rate.png": (steps, rate),
        "rate-distortion.png": (rate, distortion),
    }
    for name, ((x_text, x, paper_x), (y_text, y, paper_y)) in panels.items():
        figure, axes = panel(x_text, y_text, caption, dots_per_inch=150)
        axes.plot(x, y, label="measured")
        if paper:
            axes.plot(paper_x, paper_y, "x", color="tab:red", label=f"paper, {PAPER_SET}")
        axes.legend()
        save_figure(figure, context.out / name)
    return list(panels)
