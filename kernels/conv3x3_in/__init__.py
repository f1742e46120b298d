"""The 3x3 convolution of images of few channels, as they come, for sampling."""

from typing import NamedTuple

from torch import Tensor


class Arguments(NamedTuple):
    """The arguments of `fastddpm.ops.conv3x3_in`, in the order of the operator's schema."""

    x: Tensor  # floating (N, C, H, W)
    weight: Tensor  # floating (K, C, 3, 3)
    mirrored: bool
