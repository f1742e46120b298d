"""The stack of bits beside exact integers of any size, and beside entropies."""

import math

import numpy as np
import pytest

from fastddpm.codec.ans import EMPTY, AnsStack
from fastddpm.codec.quantised import NORMAL, Grid, QuantisedGaussian, Uniform
from fastddpm.errors import DataError

BITS = 32


def distribution(rng: np.random.Generator, symbols: int) -> np.ndarray:
    """Return masses that sum to 2^32, none of them 0, very uneven."""
    masses = np.maximum(rng.dirichlet(np.full(symbols, 0.7)) * (2**BITS - symbols), 1).astype(np.int64)
    masses[-1] += 2**BITS - masses.sum()
    return masses


def exact_length(start: list[int], mass: list[int]) -> float:
    """Return the bits of all symbols in one integer of any size, by the definition of range ANS."""
    state = 2**64
    for low, own in zip(start, mass, strict=True):
        state = (state // own << BITS) + state % own + low
    return math.log2(state) - 64


def content(stack: AnsStack) -> float:
    """Return the bits on a stack with one lane."""
    return 16 * stack.balance + math.log2(stack.head / EMPTY)


@pytest.mark.parametrize("lanes", [1, 16, 256])
@pytest.mark.parametrize("symbols", [2, 256])
def test_length_is_that_of_exact_integers_and_of_the_entropy(
    symbols: int, lanes: int, rng: np.random.Generator
) -> None:
    mass = distribution(rng, symbols)
    start = np.cumsum(mass) - mass
    drawn = rng.choice(symbols, size=8000, p=mass / 2**BITS)
    stack = AnsStack(rng.integers(0, 2**16, 2000).astype(np.uint16))
    stack.resize(lanes)
    stack.push(start[drawn].astype(np.uint64), mass[drawn].astype(np.uint64))
    stack.resize(1)
    ideal = (BITS - np.log2(mass[drawn])).sum()
    exact = exact_length(start[drawn].tolist(), mass[drawn].tolist())
    assert abs(exact - ideal) < 1e-3 * ideal
    assert abs(content(stack) - 16 * 2000 - exact) < 1e-3 * exact


@pytest.mark.parametrize("lanes", [1, 8, 64, 1024])
def test_what_was_pushed_is_popped_and_the_stack_is_as_before(lanes: int, rng: np.random.Generator) -> None:
    mass = distribution(rng, 300)
    start = np.cumsum(mass) - mass
    words = rng.integers(0, 2**16, 9000).astype(np.uint16)
    stack = AnsStack(words, head=EMPTY + 12345)
    stack.resize(lanes)
    parts = [rng.integers(0, 300, size) for size in (1, 7, lanes, 1000)]  # with the rarest as often as the others
    for part in parts:
        stack.push(start[part].astype(np.uint64), mass[part].astype(np.uint64))

    def find(value: np.ndarray, _part: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        found = np.searchsorted(start, value.astype(np.int64), side="right") - 1
        return found, start[found].astype(np.uint64), mass[found].astype(np.uint64)

    for part in reversed(parts):
        np.testing.assert_array_equal(stack.pop(len(part), find), part)
    stack.resize(1)
    np.testing.assert_array_equal(stack.words, words)
    assert stack.head == EMPTY + 12345


def test_popping_draws_from_the_distribution_whatever_lies_there(rng: np.random.Generator) -> None:
    """All words are zero: only the pad makes the symbols random."""
    stack = AnsStack(lending=True)
    stack.resize(64)
    grid = Grid(-8.0, 1 / 16, 256)
    pad = rng.integers(0, 2**32, 20000).astype(np.uint64)
    cells = stack.pop(20000, QuantisedGaussian(grid, np.full(20000, 0.3), 0.5, everywhere=False).find, pad)
    values = grid.centres(cells)
    assert abs(values.mean() - 0.3) < 4 * 0.5 / 20000**0.5
    assert abs(values.std() - 0.5) < 4 * 0.5 / 40000**0.5
    assert abs(np.corrcoef(values[:-64], values[64:])[0, 1]) < 4 / 20000**0.5
    # Pushing them again restores the stack to the last word.
    stack.push(*QuantisedGaussian(grid, np.full(20000, 0.3), 0.5, everywhere=False).intervals(cells), pad)
    stack.resize(1)
    assert stack.head == EMPTY and not stack.words.any() and stack.balance == 0


def test_popping_costs_what_pushing_gains(rng: np.random.Generator) -> None:
    grid = Grid(-8.0, 1 / 64, 1024)
    masses = QuantisedGaussian(grid, rng.normal(size=4000), 0.1, everywhere=False)
    stack = AnsStack(rng.integers(0, 2**16, 20000).astype(np.uint16))
    stack.resize(16)
    cells = stack.pop(4000, masses.find)
    stack.resize(1)
    entropy = math.log2(0.1 * math.sqrt(2 * math.pi * math.e) * 64)
    ideal = (BITS - np.log2(masses.intervals(cells)[1].astype(np.float64))).sum()
    assert abs(16 * 20000 - content(stack) - ideal) < 1e-4 * ideal
    assert abs(ideal / 4000 - entropy) < 0.05


@pytest.mark.parametrize("count", [2, 3, 10, 1000])
def test_uniform_symbols(count: int, rng: np.random.Generator) -> None:
    symbols = np.append(rng.integers(0, count, 500), [0, count - 1])
    stack = AnsStack(lending=True)
    uniform = Uniform(count, len(symbols))
    start, mass = uniform.intervals(np.arange(count))
    assert int(mass.sum()) == 2**32 and (start[1:] == start[:-1] + mass[:-1]).all() and start[0] == 0
    stack.push(*uniform.intervals(symbols))
    assert abs(content(stack) - len(symbols) * math.log2(count)) < 1
    np.testing.assert_array_equal(stack.pop(len(symbols), uniform.find), symbols)


def test_lanes_cost_nothing(rng: np.random.Generator) -> None:
    """A thousand bits in 256 lanes are a thousand bits when the lanes are joined, up to chance."""
    stack = AnsStack(rng.integers(0, 2**16, 5000).astype(np.uint16))
    stack.resize(256)
    stack.push(np.full(1000, 5, np.uint64), np.full(1000, 2**31, np.uint64))
    stack.resize(1)
    assert abs(content(stack) - 16 * 5000 - 1000) < 30  # 0.3 a lane, of either sign


def test_a_stack_that_lends_nothing_ends() -> None:
    uniform = Uniform(256, 100)
    with pytest.raises(DataError, match="ends too early"):
        AnsStack(np.arange(10, dtype=np.uint16)).pop(100, uniform.find)
    assert NORMAL.values[-1] == 2**32


def test_an_empty_interval_is_refused() -> None:
    with pytest.raises(DataError, match="symbol of probability 0"):
        AnsStack().push(np.zeros(2, np.uint64), np.array([1, 0], np.uint64))
