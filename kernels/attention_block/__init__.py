"""A whole attention block of one head, whose four linear layers were multiplied to two: for sampling."""

from typing import NamedTuple

import torch
from torch import Tensor

CHANNEL_BYTES = 512  # of a pixel, at most, where the block is one kernel: all channels are in registers at once


class Arguments(NamedTuple):
    """The arguments of `fastddpm.ops.attention_block`, in the order of the operator's schema."""

    x: Tensor  # floating (N, C, H, W)
    residual: Tensor | None  # like x
    norm_weight: Tensor  # (C,)
    norm_bias: Tensor  # (C,)
    groups: int
    eps: float
    added: Tensor | None  # floating (C,)
    query: Tensor  # x's dtype (C, C)
    query_bias: Tensor  # floating (C,)
    value: Tensor  # x's dtype (C, C)
    value_bias: Tensor  # floating (C,)
    scale: float  # of the scores

    @property
    def statistics_dtype(self) -> torch.dtype:
        return torch.float64 if self.x.dtype == torch.float64 else torch.float32
