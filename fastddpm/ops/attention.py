"""attention: softmax(q k^T / sqrt(C)) v over the tokens of a feature map, one head of the full width."""

from typing import Any

import torch
from torch import Tensor

from .registry import register, register_gradient


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Attention with one head: q, k, v and the result are (N, L, C) of one floating dtype.

    Scores and softmax are float32 (float64 for float64 inputs). `scale` is C**-0.5 unless given.
    Under torch.autocast q, k and v are brought to its dtype.
    Raises ValueError for other shapes or mixed dtypes.
    """
    if q.ndim != 3 or q.shape != k.shape or q.shape != v.shape:
        raise ValueError(
            f"attention: q, k, v must be (N, L, C), all alike; got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    mixed = not q.dtype == k.dtype == v.dtype and not torch.is_autocast_enabled(q.device.type)
    if mixed or not q.dtype.is_floating_point:
        raise ValueError(f"attention: q, k, v must have one floating dtype; got {q.dtype}, {k.dtype}, {v.dtype}")
    if scale is None:
        scale = q.shape[-1] ** -0.5
    return torch.ops.fastddpm.attention(q, k, v, scale)[0]


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _fake(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=_statistics_dtype(q))


def _fake_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.scale = inputs
    _, lse = output
    ctx.save_for_backward(q, k, v, lse)
    ctx.mark_non_differentiable(lse)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    return *torch.ops.fastddpm.attention_backward(grad, *ctx.saved_tensors, ctx.scale), None


register(
    "attention", "(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor, Tensor)", _fake, autocast=("q", "k", "v")
)
register(
    "attention_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor lse, float scale) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
    operation="attention",
)
register_gradient("attention", _backward, _setup_context)
