"""The chain that is coded: its states on grids, q(x_t | the state below), and the model's p(the state below | x_t)."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from fastddpm.errors import DataError
from fastddpm.kernels.reverse_step import StepTable
from fastddpm.sampling.sampler import Sampler

from .quantised import RELEASED, Grid, QuantisedGaussian

_FINENESS = 4  # cells in the smallest deviation that a state is drawn or predicted with, at least
_RANGE = 8.0  # |x_t| that cells reach to: 1 + more deviations than the table of the normal distribution has


def pixel_cells(levels: int = 256) -> Grid:
    """`levels` cells over [-1, 1], the outer two with their middle at the ends; 256 of them are the pixel values."""
    width = 2.0 / (levels - 1)
    return Grid(-1.0 - width / 2, width, levels)


@dataclass(frozen=True)
class _Level:
    """The state at `t`. q(x_t | below) has the mean signal * below and the deviation `noise`.

    `posterior`: deviation of q(below | x_t, x_0), which p's is of the order of; None at the first level.
    """

    t: int
    signal: float
    noise: float
    posterior: float | None
    row: StepTable


class ChainConditionals:
    """The states of `sampler`'s timesteps, ascending, above an image of `cells`; arrays are (N * C * H * W,), float64.

    A cell stands for its middle. So that x_t has the variance that the network was trained on, q and p leave out that
    of the cells themselves, width^2 / 12 (Sheppard's correction): cells a quarter of a deviation wide then cost no more
    bits than narrow ones, and fewer to begin with.
    """

    def __init__(self, sampler: Sampler, cells: Grid, decoder: float | None = None) -> None:
        """`decoder`: deviation of p(x_0 | first state); at t = 0 the model's own unless given."""
        self.cells, self._sampler, self._decoder = cells, sampler, decoder
        self._config = sampler.unet.config
        self._device = next(sampler.unet.parameters()).device
        self._levels = _levels(sampler)
        self.timesteps = [level.t for level in self._levels]
        self.grids = [_grid(self._levels, i) for i in range(len(self._levels))]

    def __len__(self) -> int:
        return len(self._levels)

    def forward(self, level: int, below: np.ndarray) -> QuantisedGaussian:
        """q(x_t | below), `below` being the values of the state before, or of the image at the first level."""
        here = self._levels[level]
        deviation = _less_cells(here.noise, self.grids[level])
        return QuantisedGaussian(self.grids[level], here.signal * below, deviation, everywhere=False)

    def prior(self, count: int) -> QuantisedGaussian:
        """p(x_T) of `count` values."""
        return QuantisedGaussian(self.grids[-1], np.zeros(count), _less_cells(1.0, self.grids[-1]))

    def reverse(self, level: int, x_t: np.ndarray, label: np.ndarray | None) -> QuantisedGaussian:
        """p(below | x_t); `label` int64 (N,) or None. `DataError` where the network's output is not finite."""
        here = self._levels[level]
        out, second = self._network(x_t, here.t, label)
        x0 = here.row.x0_from_x * x_t + here.row.x0_from_out * out
        if self._sampler.diffusion.config.clip_x0:
            x0 = np.clip(x0, -1.0, 1.0)
        mean = here.row.mean_from_x0 * x0 + here.row.mean_from_x * x_t + here.row.mean_from_out * out
        if level == 0:
            return QuantisedGaussian(self.cells, mean, self._decoder_deviation(second), cdf=RELEASED)
        grid = self.grids[level - 1]
        return QuantisedGaussian(grid, mean, _less_cells(self._deviation(here, second), grid))

    def denoised(self, x0: np.ndarray, t: int, label: np.ndarray | None) -> np.ndarray:
        """The network's x_0 prediction for values that are off by as much as the noise at `t`."""
        diffusion = self._sampler.diffusion
        x_t = math.sqrt(diffusion.alpha_bar[t]) * x0
        from_x, from_out = diffusion.x0_coefficients()
        return from_x[t] * x_t + from_out[t] * self._network(x_t, t, label)[0]

    def _network(self, x_t: np.ndarray, t: int, label: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
        """The network's output for the image, and for the variance if it has one."""
        config = self._config
        images = x_t.astype(np.float32).reshape(-1, config.image_channels, config.image_size, config.image_size)
        labels = None if label is None else torch.from_numpy(label).to(self._device)
        out = self._sampler.denoise(torch.from_numpy(images).to(self._device), t, labels).float().cpu().numpy()
        if not np.isfinite(out).all():
            raise DataError(f"the network's output at t = {t} is not finite; its weights are damaged")
        channels = config.image_channels
        parts = [np.ascontiguousarray(part, np.float64).reshape(-1) for part in (out[:, :channels], out[:, channels:])]
        return parts[0], parts[1] if len(parts[1]) else None

    def _deviation(self, level: _Level, second: np.ndarray | None) -> float | np.ndarray:
        variance = self._sampler.diffusion.config.variance
        if second is None:
            return float(level.row.sigma)
        if variance == "learned":
            return np.exp(0.5 * second)
        low, high = level.row.log_var_low, level.row.log_var_high
        return np.exp(0.5 * (low + (high - low) * (second + 1) / 2))

    def _decoder_deviation(self, second: np.ndarray | None) -> float | np.ndarray:
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


def _levels(sampler: Sampler) -> list[_Level]:
    """The sampler's steps from the last to the first: states ascend."""
    process = sampler.diffusion.respaced(sampler.timesteps)
    steps = reversed(range(sampler.steps))
    return [
        _Level(
            t=int(sampler.timesteps[i]), signal=math.sqrt(1 - process.beta[i]), noise=math.sqrt(process.beta[i]),
            posterior=None if i == sampler.steps - 1 else math.sqrt(process.variance[i]),
            row=StepTable(*sampler.table[i]),
        )
        for i in steps
    ]  # fmt: skip


def _grid(levels: list[_Level], i: int) -> Grid:
    """Of a power of two, so that each middle is a float32: the network reads exactly what is coded."""
    above = levels[i + 1].posterior if i + 1 < len(levels) else None
    narrowest = levels[i].noise if above is None else min(levels[i].noise, above)
    width = 2.0 ** math.floor(math.log2(narrowest / _FINENESS))
    return Grid(-_RANGE, width, int(2 * _RANGE / width))


def _less_cells(deviation: float | np.ndarray, grid: Grid) -> float | np.ndarray:
    """The deviation without what the cells add to it; at least a quarter of a cell."""
    return np.sqrt(np.maximum(np.square(deviation) - grid.width**2 / 12, grid.width**2 / 16))
