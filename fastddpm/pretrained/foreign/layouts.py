"""How other implementations store a layer's numbers, as pairs of functions: theirs to ours, and back.

Shapes of ours: 3x3 convolutions (out, in, 3, 3), shortcuts (out, in, 1, 1), linear layers (out, in), also the attention
blocks' projections; norms and biases (C,).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """`read` makes our tensors of one of theirs; `write` is its inverse, also on the meta device, for its shape."""

    read: Callable[[Tensor], Sequence[Tensor]]
    write: Callable[[Sequence[Tensor]], Tensor]


def _permuted(*order: int) -> Layout:
    back = [order.index(i) for i in range(len(order))]
    return Layout(lambda t: [t.permute(*order)], lambda ours: ours[0].permute(*back))


def _pixel(dimensions: int) -> Layout:
    """A linear layer that is stored as a convolution with a kernel of one pixel, of 1 or 2 dimensions."""
    ones = (1,) * dimensions
    return Layout(lambda t: [t.reshape(t.shape[:2])], lambda ours: ours[0].reshape(*ours[0].shape, *ones))


SAME = Layout(lambda t: [t], lambda ours: ours[0])
PIXEL_1D, PIXEL_2D = _pixel(1), _pixel(2)
# TensorFlow's: convolutions (height, width, in, out), linear layers (in, out).
CONV_TF, LINEAR_TF = _permuted(3, 2, 0, 1), _permuted(1, 0)
SHORTCUT_TF = Layout(lambda t: [t.T[:, :, None, None]], lambda ours: ours[0][:, :, 0, 0].T)


# The layer after the sinusoids. Ours are all sines, then all cosines.
COSINES_FIRST = Layout(
    lambda t: [torch.cat(t.chunk(2, 1)[::-1], 1)], lambda ours: torch.cat(ours[0].chunk(2, 1)[::-1], 1)
)
INTERLEAVED = Layout(
    lambda t: [torch.cat([t[:, ::2], t[:, 1::2]], 1)],
    lambda ours: torch.stack(ours[0].chunk(2, 1), 2).flatten(1),
)


def joined(heads: int = 1, *, by_head: bool = False, dimensions: int = 2) -> Layout:
    """Queries, keys and values as one layer, whose rows are (q|k|v, head, channel).

    `by_head`: the rows are (head, q|k|v, channel). `dimensions`: of the one-pixel kernel, of which a bias has none.
    """

    def read(t: Tensor) -> Sequence[Tensor]:
        if by_head:
            t = t.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
        return (t.reshape(t.shape[:2]) if t.ndim > 1 else t).chunk(3)

    def write(ours: Sequence[Tensor]) -> Tensor:
        t = torch.cat(list(ours))
        if by_head:
            t = t.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)
        return t.reshape(*t.shape, *(1,) * dimensions) if t.ndim > 1 else t

    return Layout(read, write)
