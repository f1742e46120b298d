"""3x3 convolution with stride 1; and which algorithm of the compiled CPU library computes which shape.

The rules follow the measured table in benchmarks/results (`python benchmarks/convolution.py` measures it again).
"""

from typing import NamedTuple

from torch import Tensor

from ..interface import PATCHES, WINOGRAD

__all__ = ["PATCHES", "WINOGRAD", "Arguments", "algorithm_for", "weight_gradient_wins", "winograd_wins"]

_FEWEST_CHANNELS = 16  # with fewer, the transforms cost as much as the products save
_FEWEST_TILES = 2  # for a single tile, transforming the weights costs more than the products save
_FEWEST_CHANNELS_OF_GRADIENT = 8  # of the input: half a vector


class Arguments(NamedTuple):
    """The arguments of `fastddpm.ops.conv3x3`, in the order of the operator's schema.

    The backward pass takes them too, without `bias`.
    """

    x: Tensor  # floating (N, C, H, W)
    weight: Tensor  # x's dtype (K, C, 3, 3)
    bias: Tensor | None = None  # x's dtype (K,)
    doubled: bool = False


def algorithm_for(kernel: int, stride: int, in_channels: int, height: int, width: int) -> int:
    """Return PATCHES or WINOGRAD for an output of height x width pixels.

    The batch size has no influence, so neither has it on the results' bits.
    """
    one_tile = height <= 4 and width <= 4  # for one image, its transformed weights cost more than they save
    return WINOGRAD if kernel == 3 and stride == 1 and in_channels >= _FEWEST_CHANNELS and not one_tile else PATCHES


def winograd_wins(batch: int, in_channels: int, out_channels: int, height: int, width: int) -> bool:
    """Return whether the compiled library beats PyTorch's 3x3 convolution for an output of height x width pixels."""
    return min(in_channels, out_channels) >= _FEWEST_CHANNELS and _tiles(batch, height, width) >= _FEWEST_TILES


def weight_gradient_wins(batch: int, in_channels: int, height: int, width: int) -> bool:
    """Return the same for the gradient of the weights.

    The number of output channels does not matter: they are not in the vectors there.
    """
    return in_channels >= _FEWEST_CHANNELS_OF_GRADIENT and _tiles(batch, height, width) >= _FEWEST_TILES


def _tiles(batch: int, height: int, width: int) -> int:
    return batch * -(-height // 4) * -(-width // 4)
