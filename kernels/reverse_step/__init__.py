"""One step of the reverse process, in place. Every parameterization, every variance and DDIM are rows, not code."""

from typing import Any, NamedTuple


class StepTable(NamedTuple):
    """The coefficients of a sampler's steps: arrays (S,), or the numbers of one step. The operation reads them as a
    table (S, 8) in this order.

        x_0 prediction = x0_from_x x_t + x0_from_out out
        mean = mean_from_x0 clip(x_0 prediction) + mean_from_x x_t + mean_from_out out

    `sigma`: standard deviation of the noise (fixed variances and DDIM), 0 on the last step. `log_var_low`,
    `log_var_high`: the ends between which a learned variance interpolates its logarithm.
    """

    x0_from_x: Any
    x0_from_out: Any
    mean_from_x0: Any
    mean_from_x: Any
    mean_from_out: Any
    sigma: Any
    log_var_low: Any
    log_var_high: Any


COLUMNS = len(StepTable._fields)
FIXED, LEARNED, LEARNED_RANGE = 0, 1, 2
