"""Lossy coding: pixels rounded to levels as coarse as the noise at a timestep, and refined by the network afterwards.

The paper's code would send x_t, noise included (section 4.3). With dithering (x_0 plus shared uniform noise, rounded)
that costs 1/2 log2(2 pi e / 12), a quarter of a bit, per dimension even if the model is certain. Rounding x_0 itself
costs next to nothing then: the chain begins at t, whose noise is about as large as the rounding error, and the first
state tells which coarse cell a pixel is in.
"""

import numpy as np

from fastddpm.diffusion import Diffusion
from fastddpm.errors import UsageError

from .quantised import Grid

_DEVIATIONS = 2.0  # width of a cell, in standard deviations of the noise at t relative to the signal


def levels_at(diffusion: Diffusion, t: int) -> int:
    """Return the number of pixel levels at timestep t, at most 256. Raises `UsageError` if only one is left."""
    width = _DEVIATIONS / np.sqrt(diffusion.snr[min(max(t, 0), diffusion.timesteps - 1)])
    levels = round(2.0 / width) + 1
    if levels < 2:
        last = int(np.flatnonzero(np.round(2.0 * np.sqrt(diffusion.snr) / _DEVIATIONS) >= 1)[-1])
        raise UsageError(f"lossy must be at most {last}; at t = {t} the noise is wider than the range of pixels")
    return min(levels, 256)


def to_cells(images: np.ndarray, cells: Grid) -> np.ndarray:
    """Return the cell of each pixel of uint8 images, int64: the nearest level."""
    return (images.astype(np.int64) * (cells.bins - 1) * 2 + 255) // 510


def as_noisy(diffusion: Diffusion, cells: Grid) -> int:
    """Return the timestep whose noise, relative to the signal, has a variance nearest to a cell's, width^2 / 12."""
    return int(np.abs(np.log(diffusion.snr * cells.width**2 / 12)).argmin())


def reconstruct(symbols: np.ndarray, prediction: np.ndarray, cells: Grid) -> np.ndarray:
    """Return an x_0 prediction as uint8, clipped to the cell that each pixel is known to be in."""
    low = np.maximum(cells.origin + symbols * cells.width, -1.0)
    x0 = np.clip(prediction, low, np.minimum(cells.origin + (symbols + 1) * cells.width, 1.0))
    return np.round((x0 + 1) * 127.5).astype(np.uint8)
