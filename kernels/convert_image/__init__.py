"""A copy of an image in another dtype, layout and number of channels: for sampling."""

from typing import NamedTuple

import torch
from torch import Tensor


class Arguments(NamedTuple):
    """The arguments of `fastddpm.ops.convert_image`, in the order of the operator's schema."""

    x: Tensor  # floating (N, C, H, W)
    residual: Tensor | None  # like x
    bias: Tensor | None  # floating, (C,) or more
    channels: int
    mirrored: bool
    dtype: torch.dtype  # of the result
    channels_last: bool

    @property
    def layout(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format
