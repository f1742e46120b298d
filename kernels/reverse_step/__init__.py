"""One step of the reverse chain, in place. Parameterizations, variances and methods are rows of a table, not code."""

from typing import Any, NamedTuple

from torch import Tensor


class StepTable(NamedTuple):
    """The coefficients of reverse steps: arrays (S,), or the numbers of one step.

    The operation reads them as a table (S, 9), with the columns in this order.

        x_0 prediction = x0_from_x x_t + x0_from_out out
        mean = mean_from_x0 clip(x_0 prediction) + mean_from_x x_t + mean_from_out out
               + mean_from_previous (clipped x_0 prediction of the step before)

    `sigma`: standard deviation of the noise, 0 on the last step; with a learned variance 1 or 0, a switch.
    `log_var_low`, `log_var_high`: the logarithms of the variances between which "learned_range" interpolates.
    `mean_from_previous`: 0 in methods of one step. Where it is 0, no earlier prediction is read.
    """

    x0_from_x: Any
    x0_from_out: Any
    mean_from_x0: Any
    mean_from_x: Any
    mean_from_out: Any
    sigma: Any
    log_var_low: Any
    log_var_high: Any
    mean_from_previous: Any


COLUMNS = len(StepTable._fields)
FIXED, LEARNED, LEARNED_RANGE = 0, 1, 2


class Arguments(NamedTuple):
    """The arguments of `fastddpm.ops.reverse_step`, in the order of the operator's schema."""

    x: Tensor  # float32 (N, C, H, W): x_t, replaced by x_{t-1}
    out: Tensor  # floating (N, C, H, W) or (N, 2C, H, W)
    table: Tensor  # float32 (S, 9): columns of StepTable
    timesteps: Tensor  # int64 (S,): the Philox step of each row's noise
    index: Tensor  # type: ignore[assignment]  # int64 (): the row to apply; hides tuple.index
    images: Tensor  # int64 (N,)
    seed: Tensor  # int64 ()
    clip: float  # <= 0: no clipping
    variance: int  # FIXED, LEARNED or LEARNED_RANGE
    noise: Tensor | None = None  # float32 (N, C, H, W); None: drawn
    x0: Tensor | None = None  # float32 (N, C, H, W): x_0 prediction of the step before, replaced by this step's
