"""attention: softmax(q k^T / sqrt(C)) v over the tokens of a feature map, one head of the full width."""

import functools
from typing import Any

import torch
from torch import Tensor

from fastddpm.kernels.attention import Arguments

from .derivatives import differentiable_backward, transformed
from .registry import evaluate, register, register_gradient


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, *, bf16: bool = False) -> Tensor:
    """Return softmax(scale q k^T) v, attention with one head. q, k, v and the result: (N, L, C) of one floating dtype.

    Scores and softmax are float32 (float64 for float64 inputs). `scale`: default C**-0.5. `bf16`: round the factors of
    the products to bfloat16, the weights among them, here and in the gradients; sums and tensors keep q's dtype. Under
    torch.autocast q, k and v are cast to its dtype. Raises ValueError for other shapes or mixed dtypes.
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
    if transformed(q, k, v):
        return plain(q, k, v, scale, bf16)
    return evaluate("attention", q, k, v, scale, bf16)[0]


def split_heads(tokens: Tensor, heads: int) -> Tensor:
    """Return (N, L, C) as (N heads, L, C / heads): the heads of an image are neighbours in the batch."""
    return tokens if heads == 1 else tokens.unflatten(2, (heads, -1)).transpose(1, 2).flatten(0, 1)


def join_heads(tokens: Tensor, heads: int) -> Tensor:
    """Return what `split_heads` made of (N, L, C) as (N, L, C)."""
    return tokens if heads == 1 else tokens.unflatten(0, (-1, heads)).transpose(1, 2).flatten(2)


def plain(q: Tensor, k: Tensor, v: Tensor, scale: float, bf16: bool) -> Tensor:
    """Return the result in PyTorch's operators: for export, and for derivatives that the kernels do not have."""
    dtype = Arguments(q, k, v, scale).statistics_dtype

    def factor(x: Tensor) -> Tensor:
        return (x.bfloat16() if bf16 else x).to(dtype)

    weights = torch.softmax(torch.matmul(factor(q), factor(k).transpose(1, 2)) * scale, dim=-1)
    return torch.matmul(factor(weights), factor(v)).to(q.dtype)


def _fake(a: Arguments) -> tuple[Tensor, Tensor]:
    return a.q.new_empty(a.q.shape), a.q.new_empty(a.q.shape[:2], dtype=a.statistics_dtype)


def _fake_backward(a: Arguments, grad: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return a.q.new_empty(a.q.shape), a.k.new_empty(a.k.shape), a.v.new_empty(a.v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.scale, ctx.bf16 = inputs
    _, lse = output
    ctx.save_for_backward(q, k, v, lse)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)  # no zeros for it


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * len(Arguments._fields)
    if torch.is_grad_enabled():
        scaled = functools.partial(plain, scale=ctx.scale, bf16=ctx.bf16)
        return *differentiable_backward(scaled, ctx.saved_tensors[:3], grad, ctx.needs_input_grad[:3]), None, None
    return *evaluate("attention_backward", grad, *ctx.saved_tensors, ctx.scale, ctx.bf16), None, None


register(
    "attention",
    Arguments,
    "(Tensor q, Tensor k, Tensor v, float scale, bool bf16) -> (Tensor, Tensor)",
    _fake,
    autocast=("q", "k", "v"),
)
register(
    "attention_backward",
    Arguments,
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor lse, float scale, bool bf16) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
    operation="attention",
)
register_gradient("attention", _backward, _setup_context)
