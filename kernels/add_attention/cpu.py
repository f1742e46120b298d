"""add_attention by the compiled CPU library, and a sum."""

from torch import Tensor

from ..attention import cpu
from ..native import unavailable
from . import Arguments

__all__ = ["forward", "unavailable", "unsupported"]


def unsupported(q: Tensor, k: Tensor, v: Tensor, residual: Tensor, scale: float) -> str | None:
    """Return why these arguments are left to another backend, or None."""
    return cpu.unsupported(q=q, k=k, v=v, scale=scale)


def forward(a: Arguments) -> Tensor:
    """Compute the same as the reference, up to rounding."""
    return cpu.forward(a.attention)[0].add_(a.residual)
