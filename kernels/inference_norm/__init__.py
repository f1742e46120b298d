"""group_norm_silu for sampling: it takes the sum of two images, stores that sum, and may round its output to e4m3."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..group_norm_silu import Arguments as Norm

LARGEST = 448.0  # of e4m3


class Arguments(NamedTuple):
    """The arguments of `fastddpm.ops.inference_norm`, in the order of the operator's schema. C = C1 + C2."""

    x: Tensor  # floating (N, C1, H, W)
    residual: Tensor | None  # like x
    weight: Tensor  # (C,)
    bias: Tensor  # (C,)
    groups: int
    eps: float
    skip: Tensor | None  # x's dtype (N, C2, H, W)
    temb: Tensor | None  # (N, C)
    scale: Tensor | None  # (N, C), given together with shift
    shift: Tensor | None  # (N, C)
    silu: bool
    dtype: torch.dtype  # of y: x's, or float8_e4m3fn

    def norm(self, x: Tensor) -> Norm:
        """Return the arguments of group_norm_silu for `x` in the place of x + residual."""
        return Norm(
            x, self.weight, self.bias, self.groups, self.eps, self.skip, self.temb, self.scale, self.shift, self.silu
        )  # fmt: skip

    @property
    def memory_format(self) -> torch.memory_format:
        return self.norm(self.x).memory_format

    def rounded(self, y: Tensor) -> Tensor:
        """Return y in the output's dtype, clamped to its range."""
        return y if y.dtype == self.dtype else y.clamp(-LARGEST, LARGEST).to(self.dtype)
