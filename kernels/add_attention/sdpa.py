"""add_attention by PyTorch's scaled_dot_product_attention, and a sum."""

from torch import Tensor

from ..attention import sdpa
from . import Arguments

__all__ = ["forward", "unsupported"]


def unsupported(q: Tensor, k: Tensor, v: Tensor, residual: Tensor, scale: float) -> str | None:
    """Return why these arguments are left to another backend, or None."""
    return sdpa.unsupported(q=q, k=k, v=v, scale=scale)


def forward(a: Arguments) -> Tensor:
    """Compute the same as the reference, up to rounding."""
    return sdpa.forward(a.attention)[0].add_(a.residual)
