"""A linear layer, or a 1x1 convolution of channels_last images, whose products' factors are rounded to bfloat16."""

from typing import NamedTuple

from torch import Tensor


class Arguments(NamedTuple):
    """The arguments of `fastddpm.ops.linear_bf16`, in the order of the operator's schema.

    The backward pass takes them too, without `bias`.
    """

    x: Tensor  # float32 (..., C)
    weight: Tensor  # float32 (K, C)
    bias: Tensor | None = None  # float32 (K,)
