"""Bits-back coding along the chain, which encodes images at the rate of the variational bound.

The encoder draws the latents x_1 .. x_T of an image by popping them from the stack, as if its bits were random, and
pushes them again with the model's probabilities. Decoding restores the popped bits. An image therefore costs
-log2 p(x_0 .. x_T) + log2 q(x_1 .. x_T | x_0) bits, whose expectation is the bound (equation 3 of the paper). Each
latent is popped right after the one below it, which is then pushed at once, so that few bits must be on the stack at
the start (Bit-Swap, Kingma et al. 2019).

The bits on top of the stack are not random: they were pushed just before, and depend on the model's error. Used as
noise, they drive x_t away from x_0 and can double the length. Popped values are therefore combined with a pad of Philox
bits.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fastddpm.kernels.philox import STREAM_PAD
from fastddpm.kernels.philox.reference import philox

from .ans import AnsStack
from .conditionals import ChainConditionals

Progress = Callable[[int], None]
"""Takes the number of finished timesteps."""


@dataclass(frozen=True)
class RandomPads:
    """Random bits for one chunk of images: a function of the chunk's number, the timestep and the position in it."""

    chunk: int

    def at(self, t: int, count: int) -> np.ndarray:
        """Return `count` pads of 32 random bits for timestep `t`, uint64 (count,)."""
        blocks = np.arange(-(-count // 4))
        words = philox(blocks, np.array(self.chunk), np.array(t), np.array(STREAM_PAD), 0)
        return np.stack(words, axis=-1).reshape(-1)[:count].astype(np.uint64)


def encode(
    stack: AnsStack,
    conditionals: ChainConditionals,
    symbols: np.ndarray,
    label: np.ndarray | None,
    pads: RandomPads,
    progress: Progress,
) -> None:
    """Push n images, given as cells int64 (n * C * H * W,). `label`: int64 (n,) or None."""
    below, values = symbols, conditionals.cells.centres(symbols)
    for index, (t, grid) in enumerate(zip(conditionals.timesteps, conditionals.grids, strict=True)):
        drawn = stack.pop(len(below), conditionals.forward(index, values).find, pads.at(t, len(below)))
        values = grid.centres(drawn)
        stack.push(*conditionals.reverse(index, values, label).intervals(below))
        below = drawn
        progress(index + 1)
    stack.push(*conditionals.prior(len(below)).intervals(below))


def decode(
    stack: AnsStack,
    conditionals: ChainConditionals,
    count: int,
    label: np.ndarray | None,
    pads: RandomPads,
    progress: Progress,
) -> np.ndarray:
    """Pop images of `count` = n * C * H * W values in total and return their cells, int64 (count,): undo `encode`."""
    above = stack.pop(count, conditionals.prior(count).find)
    for index in reversed(range(len(conditionals))):
        p = conditionals.reverse(index, conditionals.grids[index].centres(above), label)
        below = stack.pop(count, p.find)
        grid = conditionals.grids[index - 1] if index else conditionals.cells
        q = conditionals.forward(index, grid.centres(below))
        stack.push(*q.intervals(above), pads.at(conditionals.timesteps[index], count))
        above = below
        progress(len(conditionals) - index)
    return above
