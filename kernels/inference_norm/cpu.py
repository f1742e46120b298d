"""inference_norm by the compiled CPU library: a sum, and group_norm_silu."""

from torch import Tensor

from ..group_norm_silu import cpu
from ..native import unavailable
from . import Arguments

__all__ = ["forward", "unavailable", "unsupported"]


def unsupported(x: Tensor, **_: object) -> str | None:
    """Return why these arguments are left to PyTorch, or None."""
    return cpu.unsupported(x)


def forward(a: Arguments) -> tuple[Tensor, Tensor]:
    """Compute the same as the reference, up to rounding."""
    if a.residual is None:
        return a.rounded(cpu.forward(a.norm(a.x))[0]), a.x.new_empty(0)
    total = (a.x + a.residual).contiguous(memory_format=a.memory_format)
    return a.rounded(cpu.forward(a.norm(total))[0]), total
