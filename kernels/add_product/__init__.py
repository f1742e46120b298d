"""A matrix product at every pixel, of the channels of one or two images, added to an image."""

from typing import NamedTuple

from torch import Tensor


class Arguments(NamedTuple):
    """The arguments of `fastddpm.ops.add_product`, in the order of the operator's schema. C = C1 + C2."""

    image: Tensor  # floating (N, K, H, W)
    x: Tensor  # image's dtype (N, C1, H, W)
    skip: Tensor | None  # image's dtype (N, C2, H, W)
    weight: Tensor  # image's dtype (K, C)
    bias: Tensor | None  # floating (K,)
