"""Single-head attention over the tokens of one feature map."""

from typing import NamedTuple

import torch
from torch import Tensor


class Arguments(NamedTuple):
    """The arguments of `fastddpm.ops.attention`, in the order of the operator's schema."""

    q: Tensor  # floating (N, L, C)
    k: Tensor  # like q
    v: Tensor  # like q
    scale: float  # of the scores
    bf16: bool = False  # round the factors of the products, forward and backward, to bfloat16

    @property
    def statistics_dtype(self) -> torch.dtype:
        """The dtype of the log-sum-exp and of the scores: float64 for float64 q, otherwise float32."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32
