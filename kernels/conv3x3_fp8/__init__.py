"""3x3 convolution of 8-bit floating-point numbers (e4m3): four bits of sign and mantissa, up to 448."""

from typing import NamedTuple

import torch
from torch import Tensor


class Arguments(NamedTuple):
    """The arguments of `fastddpm.ops.conv3x3_fp8`, in the order of the operator's schema."""

    x: Tensor  # float8_e4m3fn (N, C, H, W)
    weight: Tensor  # float8_e4m3fn (K, C, 3, 3)
    scale: Tensor  # float32 (K,)
    bias: Tensor | None  # floating (K,)
    dtype: torch.dtype  # of the output
