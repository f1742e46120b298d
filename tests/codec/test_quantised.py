"""Integer masses of Gaussians: against SciPy, and exact in what the codec relies on."""

import math

import numpy as np
import pytest
from helpers import oracle
from scipy.stats import norm

from fastddpm.codec.conditionals import pixel_cells
from fastddpm.codec.quantised import RELEASED, Grid, QuantisedGaussian

TOTAL = 2**32
EVERYWHERE = [True, False]


def all_masses(grid: Grid, mean: float, deviation: float, **options: object) -> np.ndarray:
    masses = QuantisedGaussian(grid, np.full(grid.bins, mean), deviation, **options)  # type: ignore[arg-type]
    start, mass = masses.intervals(np.arange(grid.bins))
    assert start[0] == 0 and (start[1:] == start[:-1] + mass[:-1]).all()
    return mass.astype(np.int64)


@pytest.mark.parametrize("everywhere", EVERYWHERE)
@pytest.mark.parametrize("deviation", [1e-4, 0.006, 0.05, 0.3, 1.0, 5.0])
@pytest.mark.parametrize("mean", [-40.0, -7.99, -0.3, 0.0, 0.123456, 8.0])
def test_masses_are_the_normal_distributions(mean: float, deviation: float, everywhere: bool) -> None:
    grid = Grid(-8.0, 2.0**-8, 4096)
    mass = all_masses(grid, mean, deviation, everywhere=everywhere)
    assert mass.sum() == TOTAL and mass.min() >= int(everywhere)
    edges = -8.0 + np.arange(4097) / 256
    edges[0], edges[-1] = -np.inf, np.inf
    expected = np.diff(norm.cdf(edges, mean, deviation))
    # 1e-6: the density is constant between multiples of 1/256 of a deviation, and each cell may get 1 of 2^32
    np.testing.assert_allclose(mass / TOTAL, expected, rtol=1e-5 if deviation > 1e-3 else 1e-3, atol=4e-6)


@pytest.mark.parametrize("deviation", [0.002, 0.0074, 0.05, 1.0])
@pytest.mark.parametrize("mean", [-1.0, -0.5, 0.003, 0.9, 1.0, 1.2])
def test_pixels_masses_are_equation_13s(mean: float, deviation: float) -> None:
    mass = all_masses(pixel_cells(), mean, deviation, cdf=RELEASED)
    x0 = np.arange(256) / 127.5 - 1
    expected = oracle.bin_mass(x0, np.array(mean), np.array(2 * math.log(deviation)))
    assert mass.sum() == TOTAL and mass.min() >= 1
    np.testing.assert_allclose(mass / TOTAL, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("everywhere", EVERYWHERE)
def test_every_value_has_its_cell(everywhere: bool, rng: np.random.Generator) -> None:
    """Values drawn, next to the edges of intervals, and in tails where cells have a mass of 1."""
    n = 20000
    grid = Grid(-8.0, 2.0**-10, 16384)
    deviation = np.exp(rng.uniform(math.log(1e-4), math.log(2.0), n))
    masses = QuantisedGaussian(grid, rng.uniform(-9, 9, n), deviation, everywhere=everywhere)
    value = rng.integers(0, TOTAL, n).astype(np.uint64)
    value[: n // 4] = rng.integers(0, 20000, n // 4)
    value[n // 4 : n // 2] = TOTAL - 1 - rng.integers(0, 20000, n // 4)
    cells, start, mass = masses.find(value, slice(0, n))
    for shift in (None, -1, 0):
        if shift is not None:  # the last value of the interval below, and the first of its own
            value = np.where(start > 0, start - np.uint64(-shift), start)
            cells, start, mass = masses.find(value, slice(0, n))
        assert ((start <= value) & (value < start + mass)).all()
        again = masses.intervals(cells)
        np.testing.assert_array_equal(again[0], start)
        np.testing.assert_array_equal(again[1], mass)
        assert cells.min() >= 0 and cells.max() < grid.bins


def test_a_part_is_the_same_as_the_whole(rng: np.random.Generator) -> None:
    grid = Grid(-8.0, 2.0**-6, 1024)
    masses = QuantisedGaussian(grid, rng.normal(size=1000), np.full(1000, 0.2))
    value = rng.integers(0, TOTAL, 1000).astype(np.uint64)
    whole = masses.find(value, slice(0, 1000))
    for part in (slice(0, 10), slice(333, 666), slice(999, 1000)):
        for ours, expected in zip(masses.find(value[part], part), whole, strict=True):
            np.testing.assert_array_equal(ours, expected[part])
