"""Convolutions on the CPU: which algorithm of the compiled library computes which shape.

The rules are those of the measured table in benchmarks/results (`python benchmarks/convolution.py` measures it again).
"""

from ..interface import PATCHES, WINOGRAD

__all__ = ["PATCHES", "WINOGRAD", "algorithm_for", "weight_gradient_wins", "winograd_wins"]

_FEWEST_CHANNELS = 16  # below, the transforms cost as much as the products save
_FEWEST_TILES = 2  # for a single one, transforming the weights does
_FEWEST_CHANNELS_OF_GRADIENT = 8  # of the input: half a vector


def algorithm_for(kernel: int, stride: int, in_channels: int, height: int, width: int) -> int:
    """PATCHES or WINOGRAD for an output of height x width; it does not depend on the batch, so neither do results."""
    one_tile = height <= 4 and width <= 4  # for one image its transformed weights cost more than they save
    return WINOGRAD if kernel == 3 and stride == 1 and in_channels >= _FEWEST_CHANNELS and not one_tile else PATCHES


def winograd_wins(batch: int, in_channels: int, out_channels: int, height: int, width: int) -> bool:
    """Whether a 3x3 convolution with an output of height x width is faster than PyTorch's by the compiled library."""
    return min(in_channels, out_channels) >= _FEWEST_CHANNELS and _tiles(batch, height, width) >= _FEWEST_TILES


def weight_gradient_wins(batch: int, in_channels: int, height: int, width: int) -> bool:
    """The same for the gradient of its weights; few output channels do not matter: they are no vectors there."""
    return in_channels >= _FEWEST_CHANNELS_OF_GRADIENT and _tiles(batch, height, width) >= _FEWEST_TILES


def _tiles(batch: int, height: int, width: int) -> int:
    return batch * -(-height // 4) * -(-width // 4)
