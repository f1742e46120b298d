"""Images to bits at the price of the variational bound: bits-back coding along the chain.

The latents x_1 .. x_T of an image are popped from the stack, as if what lies there were random, and pushed again with
the model's probabilities; who decodes gets the popped bits back. An image costs -log2 p(x_0 .. x_T) + log2 q(x_1 .. x_T
given x_0), whose expectation is the bound (equation 3 of the paper). A latent is popped only when the one before it is
there, and that is pushed at once, so that few bits must be on the stack to begin with (Bit-Swap, Kingma et al. 2019).

What lies on top of the stack is not random: it was pushed just before, and says by how much the model was wrong. Noise
made of it drives x_t away from x_0 and can double the length. So popped values pass through a pad of Philox bits.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fastddpm.kernels.philox import STREAM_PAD
from fastddpm.kernels.philox.reference import philox

from .ans import AnsStack
from .conditionals import ChainConditionals

Progress = Callable[[int], None]


@dataclass(frozen=True)
class RandomPads:
    """Random bits of one chunk of images: a function of its number, the timestep and the place in the chunk."""

    chunk: int

    def at(self, t: int, count: int) -> np.ndarray:
        """32 bits each, uint64 (count,)."""
        blocks = np.arange(-(-count // 4))
        words = philox(blocks, np.array(self.chunk), np.array(t), np.array(STREAM_PAD), 0)
        return np.stack(words, axis=-1).reshape(-1)[:count].astype(np.uint64)


def encode(
    stack: AnsStack,
    levels: ChainConditionals,
    symbols: np.ndarray,
    label: np.ndarray | None,
    pads: RandomPads,
    progress: Progress,
) -> None:
    """Push images, cells int64 (n * C * H * W,). `label`: int64 (n,) or None.

    `progress` is told how many of the levels are done.
    """
    below, values = symbols, levels.cells.centres(symbols)
    for level, (t, grid) in enumerate(zip(levels.timesteps, levels.grids, strict=True)):
        drawn = stack.pop(len(below), levels.forward(level, values).find, pads.at(t, len(below)))
        values = grid.centres(drawn)
        stack.push(*levels.reverse(level, values, label).intervals(below))
        below = drawn
        progress(level + 1)
    stack.push(*levels.prior(len(below)).intervals(below))


def decode(
    stack: AnsStack,
    levels: ChainConditionals,
    count: int,
    label: np.ndarray | None,
    pads: RandomPads,
    progress: Progress,
) -> np.ndarray:
    """Pop images of `count` pixels altogether, int64 (count,): `encode` backwards."""
    above = stack.pop(count, levels.prior(count).find)
    for level in reversed(range(len(levels))):
        masses = levels.reverse(level, levels.grids[level].centres(above), label)
        below = stack.pop(count, masses.find)
        grid = levels.grids[level - 1] if level else levels.cells
        q = levels.forward(level, grid.centres(below))
        stack.push(*q.intervals(above), pads.at(levels.timesteps[level], count))
        above = below
        progress(len(levels) - level)
    return above
