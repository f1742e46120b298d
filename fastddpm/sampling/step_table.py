"""The steps of Algorithm 2 and of DDIM as coefficients, which `reverse_step` applies."""

import numpy as np

from fastddpm.diffusion import Diffusion
from fastddpm.errors import UsageError
from fastddpm.kernels.reverse_step import StepTable


def spread_timesteps(timesteps: int, steps: int) -> np.ndarray:
    """`steps` of 0..timesteps-1, descending, evenly spread with both ends included; int64 (steps,)."""
    if not 1 <= steps <= timesteps:
        raise UsageError(f"steps must be in 1..{timesteps}; got {steps}")
    return np.round(np.linspace(timesteps - 1, 0, steps)).astype(np.int64)


def step_table(diffusion: Diffusion, timesteps: np.ndarray, method: str, eta: float) -> StepTable:
    """The coefficients of each step, float64 (S,), for descending `timesteps` (S,).

    "ancestral": equation 7 of the paper for the re-spaced process (`Diffusion.respaced`). "ddim": equation 12 of
    Song et al. 2021, with eps taken from the clipped x_0 prediction.
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
            # The network gives the mean itself, but only of the very next timestep.
            single = np.append(timesteps[1:], -1) == timesteps - 1
            mean_from_x0, mean_from_x = (np.where(single, 0.0, column) for column in (mean_from_x0, mean_from_x))
            mean_from_out = np.where(single, 1.0, 0.0)
        if config.learned_variance:
            sigma = np.ones_like(process.beta)  # 1: the noise is on, its size is the network's
            log_var_low = np.log(np.maximum(process.variance, 1e-20))
            log_var_high = np.log(process.beta)
        else:
            sigma = np.sqrt(process.variance if config.variance == "fixedsmall" else process.beta)
    sigma[-1] = 0.0
    return StepTable(x0_from_x, x0_from_out, mean_from_x0, mean_from_x, mean_from_out, sigma, log_var_low, log_var_high)
