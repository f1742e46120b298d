"""Fewer levels of a pixel, as coarse as the noise at a timestep, and the network's guess between them.

The paper's code would send x_t, noise included (section 4.3). Dithered (x_0 plus shared uniform noise, rounded), that
costs a quarter of a bit, 1/2 log2(2 pi e / 12), for each dimension even where the model is sure. Rounding x_0 itself
costs next to nothing there: the chain begins at t, where the noise is of the order of the rounding error, and the first
state says which of the coarse cells a pixel is in.
"""

import numpy as np

from fastddpm.diffusion import Diffusion
from fastddpm.errors import UsageError

from .quantised import Grid

_DEVIATIONS = 2.0  # of the noise at t, relative to the signal, in a cell


def levels_at(diffusion: Diffusion, t: int) -> int:
    """How many levels a pixel has at timestep t; `UsageError` where that is none but one."""
    width = _DEVIATIONS / np.sqrt(diffusion.snr[min(max(t, 0), diffusion.timesteps - 1)])
    levels = round(2.0 / width) + 1
    if levels < 2:
        last = int(np.flatnonzero(np.round(2.0 * np.sqrt(diffusion.snr) / _DEVIATIONS) >= 1)[-1])
        raise UsageError(f"at t = {t} the noise is wider than the range of pixels; lossy goes up to {last}")
    return min(levels, 256)


def to_cells(images: np.ndarray, cells: Grid) -> np.ndarray:
    """The cell of each pixel, int64, for uint8 images: the nearest level."""
    return (images.astype(np.int64) * (cells.bins - 1) * 2 + 255) // 510


def as_noisy(diffusion: Diffusion, cells: Grid) -> int:
    """The timestep whose noise, relative to the signal, has the variance of a cell, width^2 / 12."""
    return int(np.abs(np.log(diffusion.snr * cells.width**2 / 12)).argmin())


def reconstruct(symbols: np.ndarray, prediction: np.ndarray, cells: Grid) -> np.ndarray:
    """uint8 of an x_0 prediction, moved into the cell that a pixel is known to be in."""
    low = np.maximum(cells.origin + symbols * cells.width, -1.0)
    x0 = np.clip(prediction, low, np.minimum(cells.origin + (symbols + 1) * cells.width, 1.0))
    return np.round((x0 + 1) * 127.5).astype(np.uint8)
