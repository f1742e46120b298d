"""An image plus a bias of its channels, and one or two more images."""

from typing import NamedTuple

from torch import Tensor


class Arguments(NamedTuple):
    """The arguments of `fastddpm.ops.add_bias`, in the order of the operator's schema."""

    x: Tensor  # floating (N, C, H, W)
    bias: Tensor  # floating (C,)
    first: Tensor | None  # like x
    second: Tensor | None  # like x
