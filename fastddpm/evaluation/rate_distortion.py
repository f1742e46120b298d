"""The rate-distortion curve of the model as a progressive code (section 4.3): bits received and error at each step."""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastddpm.runtime.progress import announced, log
from fastddpm.storage.files import write_text

from .bits_per_dim import BitsPerDim, or_none
from .context import EvaluationContext
from .likelihood import bits_of
from .options import BitsOptions

# Number of reverse steps taken, of 1000: bits per dimension and root mean squared error in levels of 255. From table 4
# of the paper's appendix, for CIFAR-10's test set. Of its 3.75 bits/dim, the row of 1000 steps is the part without the
# decoder's term.
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
_Axis = tuple[str, np.ndarray, Sequence[float]]  # label, measured values, the paper's values
_LEVELS = 127.5  # pixel levels per unit of [-1, 1]


@dataclass(frozen=True, eq=False)
class RateDistortion:
    """The curve, arrays (T,) in the order of the reverse process; float64 but for `steps`.

    `steps[i]` = i + 1: reverse steps from T down to t = T - 1 - i. `rate`: bits per dimension received when x_t is
    known. `rmse`: root mean squared error of the clipped x_0 prediction from x_t, in levels of 255. `rmse_errors`: its
    standard error.
    """

    steps: np.ndarray
    rate: np.ndarray
    rmse: np.ndarray
    rmse_errors: np.ndarray


def rate_distortion(result: BitsPerDim) -> RateDistortion:
    """Return the curve: rate(t) = L_T + sum of L_s over s > t, rmse(t) = 127.5 sqrt(mean squared x_0 error at t)."""
    rate = result.prior + np.append(0.0, np.cumsum(result.terms[:0:-1]))
    rmse = np.sqrt(result.mse[::-1])
    with np.errstate(invalid="ignore", divide="ignore"):
        errors = result.mse_errors[::-1] / (2 * rmse)
    return RateDistortion(np.arange(1, len(rate) + 1), rate, _LEVELS * rmse, _LEVELS * errors)


def measure_rate_distortion(context: EvaluationContext, options: BitsOptions) -> dict[str, Any]:
    """Measure the curve, write rate-distortion.csv and plots, and return a summary with the paper's table, for JSON.

    Nothing is evaluated if the bound is known already; see `bits_of`, also for the errors raised. Without matplotlib
    there are no plots, and a line on stderr says so.
    """
    result = bits_of(context, options)
    curve = rate_distortion(result)
    rows = table(curve)
    pictures: list[str] = []
    if context.group.is_main:
        write_text(context.out / _TABLE, _csv(curve))
        with announced("drawing rate and distortion"):
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
    """Return up to ten rows, the whole chain first; if it has 1000 steps, each row has the paper's numbers."""
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
    """Return one line per step."""
    total = len(curve.steps)
    lines = ["reverse_steps,t,bits_per_dim,rmse,rmse_standard_error,paper_bits_per_dim,paper_rmse"]
    columns = (curve.steps, curve.rate, curve.rmse, curve.rmse_errors)
    for steps, *numbers in zip(*(column.tolist() for column in columns), strict=True):
        paper = PAPER_TABLE.get(steps, ("", "")) if total == 1000 else ("", "")
        cells = [str(steps), str(total - steps), *(f"{number:.9g}" for number in numbers), *map(str, paper)]
        lines.append(",".join(cells))
    return "\n".join(lines) + "\n"


def _draw(context: EvaluationContext, curve: RateDistortion, num_images: int) -> list[str]:
    """Draw the paper's figure 5 and return the names of the files; an empty list without matplotlib."""
    try:
        from fastddpm.training.plots import panel, save_figure
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        log(f"no plots: they need matplotlib, pip install 'fastddpm[report]'; {_TABLE} is written")
        return []
    caption = f"{context.name}, {num_images:,} images of {context.dataset.name}, {datetime.date.today().isoformat()}"
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
