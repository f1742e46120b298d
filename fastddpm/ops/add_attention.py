"""add_attention: an image plus attention, for sampling."""

import torch
from torch import Tensor

from fastddpm.kernels.add_attention import Arguments

from .registry import register, register_without_gradient


def add_attention(q: Tensor, k: Tensor, v: Tensor, residual: Tensor, scale: float | None = None) -> Tensor:
    """Return residual + softmax(scale q k^T) v, attention with one head; all (N, L, C) of one floating dtype.

    Scores, softmax and the sum are float32 (float64 for float64 inputs). `scale`: default C**-0.5. Without gradients.
    Raises ValueError for other shapes or mixed dtypes.
    """
    tensors = (q, k, v, residual)
    if q.ndim != 3 or any(x.shape != q.shape or x.dtype != q.dtype for x in tensors) or not q.dtype.is_floating_point:
        found = ", ".join(f"{x.dtype} {tuple(x.shape)}" for x in tensors)
        raise ValueError(f"add_attention: q, k, v, residual must be floating (N, L, C), all alike; got {found}")
    out: Tensor = torch.ops.fastddpm.add_attention(*tensors, q.shape[-1] ** -0.5 if scale is None else scale)
    return out


def _fake(a: Arguments) -> Tensor:
    return a.q.new_empty(a.q.shape)


register(
    "add_attention",
    Arguments,
    "(Tensor q, Tensor k, Tensor v, Tensor residual, float scale) -> Tensor",
    _fake,
)
register_without_gradient("add_attention")
