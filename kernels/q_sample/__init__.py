"""The forward process: x_t and eps from images, in one pass."""

from typing import NamedTuple

from torch import Tensor


class Arguments(NamedTuple):
    """The arguments of `fastddpm.ops.q_sample`, in the order of the operator's schema."""

    x0: Tensor  # uint8 or floating (N, C, H, W)
    t: Tensor  # int64 (N,)
    table: Tensor  # float32 (T, 2): sqrt(alpha_bar_t), sqrt(1 - alpha_bar_t)
    flip: Tensor | None  # bool (N,)
    noise: Tensor | None  # floating (N, C, H, W); None: drawn
    images: Tensor  # int64 (N,)
    seed: Tensor  # int64 ()
    step: Tensor  # int64 ()
