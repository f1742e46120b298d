"""Coefficients of the steps of Algorithm 2, DDIM and DPM-Solver++, in the form that `reverse_step` applies."""

import numpy as np

from fastddpm.diffusion import Diffusion
from fastddpm.kernels.reverse_step import StepTable

MULTISTEP = ("dpm2m", "dpm2m-sde")  # the methods whose step uses the x_0 prediction of the step before


def step_table(diffusion: Diffusion, timesteps: np.ndarray, method: str, eta: float) -> StepTable:
    """Return the coefficients of each reverse step, float64 (S,) each, for descending `timesteps` (S,).

    `method` "ancestral": equation 7 of the paper for the re-spaced process (`Diffusion.respaced`). "ddim": equation 12
    of Song et al. 2021, with eps derived from the clipped x_0 prediction; `eta` scales its noise. "dpm2m": algorithm 2
    of Lu et al. 2022, DPM-Solver++(2M); "dpm2m-sde": its form with noise, SDE-DPM-Solver++(2M). Their first and last
    steps are first-order (`first_order`).
    """
    config, process = diffusion.config, diffusion.respaced(timesteps)
    x0_from_x, x0_from_out = (coefficient[timesteps] for coefficient in diffusion.x0_coefficients())
    mean_from_out, log_var_low, log_var_high, mean_from_previous = np.zeros((4, len(timesteps)))
    if method != "ancestral":
        # DPM-Solver++ of first order is DDIM: without noise, or in the SDE form with eta 1.
        sigma = {"ddim": eta, "dpm2m": 0.0, "dpm2m-sde": 1.0}[method] * np.sqrt(process.variance)
        direction = np.sqrt(np.maximum(1 - process.alpha_bar_prev - sigma**2, 0.0) / (1 - process.alpha_bar))
        mean_from_x0 = np.sqrt(process.alpha_bar_prev) - direction * np.sqrt(process.alpha_bar)
        mean_from_x = direction
        if method in MULTISTEP:
            # Second order: x_0 is extrapolated linearly in lambda = log(alpha / sigma) to the middle of the step.
            # A first timestep without signal is infinitely far away: the second step stays first-order, too.
            length = np.diff(diffusion.log_signal_to_noise[timesteps])
            mean_from_previous[1:-1] = -mean_from_x0[1:-1] * length[1:] / (2 * length[:-1])
            mean_from_x0 = mean_from_x0 - mean_from_previous
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
    return StepTable(
        x0_from_x, x0_from_out, mean_from_x0, mean_from_x, mean_from_out, sigma, log_var_low, log_var_high,
        mean_from_previous,
    )  # fmt: skip


def first_order(table: np.ndarray) -> np.ndarray:
    """Return the steps of `table`, float64 (S, 9), as they are taken without the x_0 prediction of the step before."""
    rows = StepTable(*table.T)
    none = np.zeros_like(rows.mean_from_previous)
    return np.stack(
        rows._replace(mean_from_x0=rows.mean_from_x0 + rows.mean_from_previous, mean_from_previous=none), axis=1
    )


def of_x0(table: np.ndarray) -> np.ndarray:
    """Return the steps of `table`, float64 (S, 9), as they are taken if the network's output is the x_0 prediction."""
    rows = StepTable(*table.T)
    return np.stack(
        rows._replace(x0_from_x=np.zeros_like(rows.x0_from_x), x0_from_out=np.ones_like(rows.x0_from_out)), axis=1
    )
