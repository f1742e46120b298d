"""add_attention by the Triton kernel of attention."""

from torch import Tensor

from ..attention import triton
from ..attention.triton import unavailable
from . import Arguments

__all__ = ["forward", "unavailable", "unsupported"]


def unsupported(q: Tensor, k: Tensor, v: Tensor, residual: Tensor, scale: float) -> str | None:
    """Return why these arguments are left to another backend, or None."""
    return triton.unsupported(q, k, v, scale=scale)


def forward(a: Arguments) -> Tensor:
    """Compute the same as the reference."""
    return triton.forward_added(a.attention, a.residual)[0]
