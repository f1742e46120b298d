"""Gaussians quantised to integer masses on cells, which encoder and decoder compute to the same last bit.

A cumulative distribution function is tabulated at multiples of 1/256 of a standard deviation and linear between them.
Evaluating it for a symbol takes only + - * / and rounding down, whose results IEEE 754 fixes. It cannot decrease
anywhere, and where probabilities matter its density has a relative error below 1e-5.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .ans import PRECISION

TOTAL = 2**PRECISION
_REACH, _STEPS = 8, 256  # standard deviations to either side of 0, and table steps in each
_SEGMENTS = 2 * _REACH * _STEPS


@dataclass(frozen=True, eq=False)
class Cdf:
    """A tabulated cumulative distribution function.

    `values` (4097,): the function times 2^32, rounded to integers, from -8 to 8 standard deviations. `slopes` (4096,):
    the differences of the values.
    """

    values: np.ndarray
    slopes: np.ndarray

    @staticmethod
    def of(function: Callable[[float], float]) -> "Cdf":
        """Tabulate a function, whose ends are set to exactly 0 and 1."""
        values = np.floor(np.array([function(i / _STEPS - _REACH) for i in range(_SEGMENTS + 1)]) * TOTAL + 0.5)
        values[0], values[-1] = 0, TOTAL
        return Cdf(values, np.diff(values))


def _normal(z: float) -> float:
    return 0.5 * math.erfc(-z / math.sqrt(2))


def _released(z: float) -> float:
    return 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


NORMAL = Cdf.of(_normal)
# The approximation that the released code uses for the decoder's pixels, and with it every published figure.
RELEASED = Cdf.of(_released)


@dataclass(frozen=True)
class Grid:
    """Cells k = 0..bins - 1 of equal `width`, starting at `origin`; the outer two extend to infinity."""

    origin: float
    width: float
    bins: int

    def centres(self, cells: np.ndarray) -> np.ndarray:
        """Return the centre of each cell, float64."""
        return self.origin + (cells + 0.5) * self.width


class QuantisedGaussian:
    """The masses, out of 2^32, of n Gaussians on the cells of a grid: one Gaussian for each of n symbols.

    `mean`: float64 (n,). `deviation`: standard deviation, a number or float64 (n,). With `everywhere` each cell has a
    mass of at least 1, so that any symbol can be coded; without it, cells of mass 0 are never drawn.
    """

    def __init__(
        self,
        grid: Grid,
        mean: np.ndarray,
        deviation: float | np.ndarray,
        *,
        cdf: Cdf = NORMAL,
        everywhere: bool = True,
    ) -> None:
        self._bins, self._cdf, self._least_mass = grid.bins, cdf, int(everywhere)
        self._share = (TOTAL - grid.bins) / TOTAL if everywhere else 1.0  # exact in float64: a multiple of 2^-32
        self._scale = np.broadcast_to(grid.width * _STEPS / np.asarray(deviation), mean.shape)
        self._offset = ((grid.origin - mean) / deviation + _REACH) * _STEPS

    def __len__(self) -> int:
        return len(self._offset)

    def intervals(self, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (start, mass) of the given cell of each Gaussian, uint64 (n,) each."""
        start = self._below(cells, self._scale, self._offset)
        return start, self._below(cells + 1, self._scale, self._offset) - start

    def find(self, value: np.ndarray, part: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the cells, int64, that contain the values 0..2^32 - 1, with their start and mass.

        `part`: which of the n Gaussians the values belong to.
        """
        scale, offset = self._scale[part], self._offset[part]
        cells = self._guess(value, scale, offset)
        start, end = self._below(cells, scale, offset), self._below(cells + 1, scale, offset)
        missed = np.flatnonzero((start > value) | (end <= value))
        if len(missed):
            cells[missed] = self._bisect(value[missed], scale[missed], offset[missed])
            start, end = self._below(cells, scale, offset), self._below(cells + 1, scale, offset)
        return cells, start, end - start

    def _below(self, cells: np.ndarray, scale: np.ndarray, offset: np.ndarray) -> np.ndarray:
        """Return the mass below each cell, uint64; rounding included, it never decreases with the cell."""
        z = np.clip(cells * scale + offset, 0.0, float(_SEGMENTS))
        z[cells <= 0], z[cells >= self._bins] = 0.0, _SEGMENTS
        segment = np.minimum(z.astype(np.int64), _SEGMENTS - 1)
        mass = self._cdf.values[segment] + (z - segment) * self._cdf.slopes[segment]
        return ((mass * self._share).astype(np.int64) + self._least_mass * cells).astype(np.uint64)

    def _guess(self, value: np.ndarray, scale: np.ndarray, offset: np.ndarray) -> np.ndarray:
        """Return the cell that contains each value, neglecting rounding and the least mass."""
        mass = np.minimum(value.astype(np.float64) / self._share, TOTAL - 1.0)
        segment = np.searchsorted(self._cdf.values, mass, side="right") - 1
        z = segment + (mass - self._cdf.values[segment]) / self._cdf.slopes[segment]
        return np.clip((z - offset) / scale, 0, self._bins - 1).astype(np.int64)

    def _bisect(self, value: np.ndarray, scale: np.ndarray, offset: np.ndarray) -> np.ndarray:
        """Return the cell that contains each value exactly, by bisection."""
        low, high = np.zeros(len(value), np.int64), np.full(len(value), self._bins)
        while (high - low > 1).any():
            middle = (low + high) // 2
            right = self._below(middle, scale, offset) <= value
            low, high = np.where(right, middle, low), np.where(right, high, middle)
        return low


class Uniform:
    """The uniform distribution over `count` symbols, for each of n symbols."""

    def __init__(self, count: int, n: int) -> None:
        self._count, self._n = count, n

    def __len__(self) -> int:
        return self._n

    def intervals(self, symbols: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (start, mass) of each symbol, uint64 (n,) each."""
        start = symbols * TOTAL // self._count
        return start.astype(np.uint64), ((symbols + 1) * TOTAL // self._count - start).astype(np.uint64)

    def find(self, value: np.ndarray, part: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return symbols, starts and masses, as `QuantisedGaussian.find` does."""
        symbols = ((value.astype(np.int64) + 1) * self._count - 1) // TOTAL
        return (symbols, *self.intervals(symbols))
