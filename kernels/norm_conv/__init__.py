"""A convolution with the GroupNorm and SiLU before it and the sums after it, for inference. See reference.py."""

from typing import NamedTuple

from torch import Tensor


class Arguments(NamedTuple):
    """The arguments of `fastddpm.ops.norm_conv`, in the order of the operator's schema."""

    x: Tensor  # floating (N, C, H, W)
    weight: Tensor  # x's dtype (K, C, 3, 3) or (K, C, 1, 1)
    bias: Tensor | None  # (K,)
    norm_weight: Tensor | None  # (C,), given together with norm_bias; None: no norm
    norm_bias: Tensor | None  # (C,)
    groups: int
    eps: float
    scale: Tensor | None  # (N, C), given together with shift: y (1 + scale) + shift after the norm
    shift: Tensor | None  # (N, C)
    silu: bool  # after the norm
    stride: int  # 1 or 2
    pad: int  # zeros above and to the left; as many below and to the right as the output's size takes
    doubled: bool  # upsample by 2, nearest, before the convolution
    temb: Tensor | None  # (N, K), added to the result
    residual: Tensor | None  # x's dtype (N, K, H', W'), added to the result

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """(N, K, H', W'): the size of x, doubled or halved (rounded down)."""
        n, _, height, width = self.x.shape
        factor = 2 if self.doubled else 1
        return n, self.weight.shape[0], height * factor // self.stride, width * factor // self.stride
