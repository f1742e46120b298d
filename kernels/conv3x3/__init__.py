"""3x3 convolution with stride 1; and which algorithm of the compiled CPU library computes which shape.

The rules follow the measured table in benchmarks/results (`python benchmarks/convolution.py` measures it again).
"""

from typing import Literal, NamedTuple

from torch import Tensor

from ..interface import PATCHES, WINOGRAD_2X2, WINOGRAD_2X4, WINOGRAD_4X4

__all__ = [
    "PATCHES", "WINOGRAD_2X2", "WINOGRAD_2X4", "WINOGRAD_4X4", "Arguments", "Role", "algorithm_for",
    "bf16_algorithm_for", "weight_gradient_wins", "winograd_wins",
]  # fmt: skip

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
    bf16: bool = False  # round the factors of the products, forward and backward, to bfloat16


def algorithm_for(kernel: int, stride: int, in_channels: int, height: int, width: int) -> int:
    """Return PATCHES or WINOGRAD_4X4, in float32, for an output of height x width pixels.

    The batch size has no influence, so neither has it on the results' bits.
    """
    one_tile = height <= 4 and width <= 4  # for one image, its transformed weights cost more than they save
    return WINOGRAD_4X4 if kernel == 3 and stride == 1 and in_channels >= _FEWEST_CHANNELS and not one_tile else PATCHES


Role = Literal["inference", "training", "input gradient", "weight gradient"]


def bf16_algorithm_for(
    role: Role, kernel: int, stride: int, in_channels: int, out_channels: int, height: int, width: int, doubled: bool
) -> int | None:
    """Return PATCHES, WINOGRAD_2X2 or WINOGRAD_2X4, in bfloat16, for an output of height x width pixels.

    None: float32 is better. The first and the last convolution take little time, and the error of the last is the
    network's. `role`: "training" is the forward pass of an operation with gradients; the input of "input gradient" is
    the gradient of the convolution's output.
    """
    if min(in_channels, out_channels) < _FEWEST_CHANNELS or in_channels % 2 != 0:
        return None
    if kernel != 3 or stride != 1:
        return PATCHES
    larger = _takes_larger_tiles(role, in_channels, out_channels, max(height, width), doubled)
    return WINOGRAD_2X4 if larger else WINOGRAD_2X2


def _takes_larger_tiles(role: Role, in_channels: int, out_channels: int, size: int, doubled: bool) -> bool:
    """Return whether tiles of 2x4 are taken: faster by up to a quarter, and their error is larger by half.

    They are taken where they are faster, as long as the error of the network, or of the gradient of the loss, stays
    below that of PyTorch's bfloat16 (docs/measurements/cpu.md, training.md). In gradients errors add up over one layer
    of weights, not over the network.
    """
    if role == "weight gradient":
        return 4 < size <= 16 or doubled
    if role == "input gradient":
        return size > 8
    return not doubled and in_channels <= out_channels and size > 8 and (role == "training" or size <= 16)


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
