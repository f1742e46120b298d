"""inference_norm by the Triton kernels of group_norm_silu, in one pass where a program holds all pixels of a group."""

from torch import Tensor

from ..group_norm_silu import triton
from ..group_norm_silu.triton import unavailable
from . import Arguments, reference

__all__ = ["forward", "unavailable", "unsupported"]


def unsupported(x: Tensor, groups: int, skip: Tensor | None, **rest: object) -> str | None:
    """Return why these arguments, by name, are left to another backend, or None."""
    rest.pop("dtype")
    return triton.unsupported(x, groups, skip, **rest)


def forward(a: Arguments) -> tuple[Tensor, Tensor]:
    """Compute the same as the reference, statistics in float32."""
    if a.x.numel() == 0:
        return reference.forward(a)
    y, _, _, total = triton.forward_of_sum(a.norm(a.x), a.residual, a.dtype)
    return y, total
