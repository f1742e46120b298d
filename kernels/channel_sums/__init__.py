"""The sums of an image's channels over all pixels of all images: the gradient of a bias."""

from typing import NamedTuple

from torch import Tensor


class Arguments(NamedTuple):
    """The argument of `fastddpm.ops.channel_sums`."""

    x: Tensor  # floating (N, C, H, W)
