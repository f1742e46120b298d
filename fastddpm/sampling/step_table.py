"""Coefficients of the reverse steps of Algorithm 2 and DDIM, in the form that `reverse_step` applies."""

import numpy as np

from fastddpm.config import integer
from fastddpm.diffusion import Diffusion
from fastddpm.errors import UsageError
from fastddpm.kernels.reverse_step import StepTable


def spread_timesteps(timesteps: int, steps: int) -> np.ndarray:
    """Return `steps` of the timesteps 0..timesteps-1, int64 (steps,), descending and evenly spread, both ends included.

    A single step is timestep timesteps - 1. Raises `UsageError` unless 1 <= `steps` <= `timesteps`.
    """
    if not 1 <= integer(steps, "steps") <= timesteps:
        raise UsageError(f"steps must be in 1..{timesteps}; got {steps}")
    return np.round(np.linspace(timesteps - 1, 0, steps)).astype(np.int64)


def step_table(diffusion: Diffusion, timesteps: np.ndarray, method: str, eta: float) -> StepTable:
    """Return the coefficients of each reverse step, float64 (S,) each, for descending `timesteps` (S,).

    `method` "ancestral": equation 7 of the paper for the re-spaced process (`Diffusion.respaced`). "ddim": equation 12
    of Song et al. 2021, with eps derived from the clipped x_0 prediction; `eta` scales its noise.
    """
    config, process = diffusion.config, diffusion.respaced(timesteps)
    x0_from_x, x0_from_out = (coefficient[timesteps] for coefficient in diffusion.x0_coefficients())
    mean_from_out, log_var_low, log_var_high = np.zeros((3, len(timesteps)))
    if method == "ddim":
        sigma = eta * np.sqrt(process.variance)
        direction = np.sqrt(np.maximum(1 - process.alpha_bar_prev - sigma**2, 0.0) / (1 - process.alpha_bar))
        mean_from_x0 = np.sqrt(process.alpha_bar_prev) - direction * np.sqrt(process.alpha_bar)
        mean_from_x = direction
    else:
        mean_from_x0, mean_from_x = process.from_x0, process.from_xt
        if config.prediction == "xprev":
            # The network predicts the mean of x_{t-1} itself, which is of use only where no timestep is skipped.
            adjacent = np.append(timesteps[1:], -1) == timesteps - 1
            mean_from_x0, mean_from_x = (np.where(adjacent, 0.0, column) for column in (mean_from_x0, mean_from_x))
            mean_from_out = np.where(adjacent, 1.0, 0.0)
        if config.learned_variance:
            sigma = np.ones_like(process.beta)  # 1 turns the noise on; the network gives its scale
            log_var_low = np.log(np.maximum(process.variance, 1e-20))
            log_var_high = np.log(process.beta)
        else:
            sigma = np.sqrt(process.variance if config.variance == "fixedsmall" else process.beta)
    sigma[-1] = 0.0
    return StepTable(x0_from_x, x0_from_out, mean_from_x0, mean_from_x, mean_from_out, sigma, log_var_low, log_var_high)
