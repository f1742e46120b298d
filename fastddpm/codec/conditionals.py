"""The distributions that the codec codes with: q(x_t | state below) and p(state below | x_t) of states on grids.

"Below" is the state before x_t in the forward process: the previous timestep of the sampler's chain, or the image.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from fastddpm.errors import DataError
from fastddpm.kernels.reverse_step import StepTable
from fastddpm.sampling.sampler import Sampler

from .quantised import RELEASED, Grid, QuantisedGaussian

_FINENESS = 4  # least number of cells in the smallest standard deviation of a state, drawn or predicted
_RANGE = 8.0  # cells cover |x_t| up to this: 1 for the signal plus 7 standard deviations of the noise


def pixel_cells(levels: int = 256) -> Grid:
    """Return `levels` cells over [-1, 1], the outer two centred at -1 and 1. Default: the 256 pixel values."""
    width = 2.0 / (levels - 1)
    return Grid(-1.0 - width / 2, width, levels)


@dataclass(frozen=True)
class _State:
    """The state x_t. q(x_t | below) has mean signal * below and standard deviation `noise`.

    `posterior`: standard deviation of q(below | x_t, x_0), and about that of p(below | x_t); None for the first state.
    `row`: the sampler's step from x_t to the state below.
    """

    t: int
    signal: float
    noise: float
    posterior: float | None
    row: StepTable


class ChainConditionals:
    """The quantised q and p of each state of the sampler's chain, in ascending order of t, above an image of `cells`.

    Values are arrays (N * C * H * W,), float64. A cell stands for its centre. The variance of x_t must be the one that
    the network was trained on, so q and p leave out the variance within a cell, width^2 / 12 (Sheppard's correction).
    With it, cells of a quarter of a standard deviation cost no more bits than narrower ones, and fewer initial bits.
    `timesteps`: t of each state, ascending. `grids`: the cells of each state.
    """

    def __init__(self, sampler: Sampler, cells: Grid, decoder: float | None = None) -> None:
        """`decoder`: standard deviation of p(x_0 | first state). Default: the model's own at t = 0."""
        self.cells, self._sampler, self._decoder = cells, sampler, decoder
        self._device = sampler.device
        self._states = _states(sampler)
        self.timesteps = [state.t for state in self._states]
        self.grids = [_grid(self._states, i) for i in range(len(self._states))]

    def __len__(self) -> int:
        return len(self._states)

    def forward(self, index: int, below: np.ndarray) -> QuantisedGaussian:
        """Return q(x_t | below) of state `index`. `below`: values of the state below, for state 0 of the image."""
        state, grid = self._states[index], self.grids[index]
        return QuantisedGaussian(grid, state.signal * below, _less_cells(state.noise, grid), everywhere=False)

    def prior(self, count: int) -> QuantisedGaussian:
        """Return p(x_T) for `count` values."""
        return QuantisedGaussian(self.grids[-1], np.zeros(count), _less_cells(1.0, self.grids[-1]))

    def reverse(self, index: int, x_t: np.ndarray, label: np.ndarray | None) -> QuantisedGaussian:
        """Return p(below | x_t) of state `index`; `label`: int64 (N,) or None.

        Raises `DataError` if the network's output is not finite.
        """
        state = self._states[index]
        out, second = self._network(x_t, state.t, label)
        x0 = state.row.x0_from_x * x_t + state.row.x0_from_out * out
        if self._sampler.diffusion.config.clip_x0:
            x0 = np.clip(x0, -1.0, 1.0)
        mean = state.row.mean_from_x0 * x0 + state.row.mean_from_x * x_t + state.row.mean_from_out * out
        if index == 0:
            return QuantisedGaussian(self.cells, mean, self._decoder_deviation(second), cdf=RELEASED)
        grid = self.grids[index - 1]
        return QuantisedGaussian(grid, mean, _less_cells(self._deviation(state, second), grid))

    def denoised(self, x0: np.ndarray, t: int, label: np.ndarray | None) -> np.ndarray:
        """Return the network's x_0 prediction from values whose error has the size of the noise at timestep `t`."""
        diffusion = self._sampler.diffusion
        x_t = math.sqrt(diffusion.alpha_bar[t]) * x0
        from_x, from_out = diffusion.x0_coefficients()
        return from_x[t] * x_t + from_out[t] * self._network(x_t, t, label)[0]

    def _network(self, x_t: np.ndarray, t: int, label: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the network's output for the image and, if the variance is learned, for the variance; float64."""
        shape = self._sampler.interface.shape
        images = x_t.astype(np.float32).reshape(-1, *shape)
        labels = None if label is None else torch.from_numpy(label).to(self._device)
        out = self._sampler.denoise(torch.from_numpy(images).to(self._device), t, labels).float().cpu().numpy()
        if not np.isfinite(out).all():
            raise DataError(f"the network's output at t = {t} is not finite; its weights are damaged")
        channels = shape[0]
        parts = [np.ascontiguousarray(part, np.float64).reshape(-1) for part in (out[:, :channels], out[:, channels:])]
        return parts[0], parts[1] if len(parts[1]) else None

    def _deviation(self, state: _State, second: np.ndarray | None) -> float | np.ndarray:
        """Return the standard deviation of p(below | x_t), from the output `second` if the variance is learned."""
        variance = self._sampler.diffusion.config.variance
        if second is None:
            return float(state.row.sigma)
        if variance == "learned":
            return np.exp(0.5 * second)
        low, high = state.row.log_var_low, state.row.log_var_high
        return np.exp(0.5 * (low + (high - low) * (second + 1) / 2))

    def _decoder_deviation(self, second: np.ndarray | None) -> float | np.ndarray:
        """Return the standard deviation of p(x_0 | first state)."""
        if self._decoder is not None:
            return self._decoder
        diffusion = self._sampler.diffusion
        high = float(diffusion.model_log_variance[0])
        if second is None:
            return math.exp(0.5 * high)
        if diffusion.config.variance == "learned":
            return np.exp(0.5 * second)
        low = float(diffusion.posterior_log_variance[0])
        return np.exp(0.5 * (low + (high - low) * (second + 1) / 2))


def _states(sampler: Sampler) -> list[_State]:
    """Return the states of the sampler's steps, from the last step to the first, so that t ascends."""
    process = sampler.diffusion.respaced(sampler.timesteps)
    steps = reversed(range(sampler.steps))
    return [
        _State(
            t=int(sampler.timesteps[i]), signal=math.sqrt(1 - process.beta[i]), noise=math.sqrt(process.beta[i]),
            posterior=None if i == sampler.steps - 1 else math.sqrt(process.variance[i]),
            row=StepTable(*sampler.table[i]),
        )
        for i in steps
    ]  # fmt: skip


def _grid(states: list[_State], i: int) -> Grid:
    """Return the cells of state i. Their width is a power of two, so that each centre is exactly a float32."""
    above = states[i + 1].posterior if i + 1 < len(states) else None
    narrowest = states[i].noise if above is None else min(states[i].noise, above)
    width = 2.0 ** math.floor(math.log2(narrowest / _FINENESS))
    return Grid(-_RANGE, width, int(2 * _RANGE / width))


def _less_cells(deviation: float | np.ndarray, grid: Grid) -> float | np.ndarray:
    """Return the standard deviation without the variance within a cell, at least a quarter of the cell's width."""
    return np.sqrt(np.maximum(np.square(deviation) - grid.width**2 / 12, grid.width**2 / 16))
