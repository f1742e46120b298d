"""Standard normal images from the counter-based generator."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Arguments(NamedTuple):
    """The arguments of `fastddpm.ops.random_normal`, in the order of the operator's schema."""

    shape: Sequence[int]  # of one image
    images: Tensor  # int64 (N,)
    seed: Tensor  # int64 ()
    step: Tensor  # int64 ()
    stream: int
