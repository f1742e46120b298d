"""inference_norm by the compiled CUDA library: a sum, and group_norm_silu."""

from torch import Tensor

from ..group_norm_silu import cuda
from ..native_cuda import unavailable
from . import Arguments

__all__ = ["forward", "unavailable", "unsupported"]


def unsupported(x: Tensor, groups: int, skip: Tensor | None, **rest: object) -> str | None:
    """Return why these arguments, by name, are left to another backend, or None."""
    rest.pop("dtype")
    return cuda.unsupported(x, groups, skip, **rest)


def forward(a: Arguments) -> tuple[Tensor, Tensor]:
    """Compute the same as the reference, up to rounding."""
    if a.residual is None:
        return a.rounded(cuda.forward(a.norm(a.x))[0]), a.x.new_empty(0)
    total = (a.x + a.residual).contiguous(memory_format=a.memory_format)
    return a.rounded(cuda.forward(a.norm(total))[0]), total
