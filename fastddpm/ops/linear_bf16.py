"""linear_bf16: a linear layer in float32 whose products' factors are rounded to bfloat16."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastddpm.kernels.linear_bf16 import Arguments

from .derivatives import differentiable_backward, transformed
from .registry import evaluate, register, register_gradient


def linear_bf16(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + b in float32, the factors of the products rounded to bfloat16, here and in the gradients.

    `x`: float32 (..., C). `weight`: float32 (K, C). `bias`: float32 (K,). Returns (..., K). Under torch.autocast
    nothing is cast. Raises ValueError for other shapes or dtypes.
    """
    if x.ndim < 2 or x.dtype != torch.float32 or x.shape[-1] == 0:
        raise ValueError(f"linear_bf16: x must be float32 (..., C); got {x.dtype} {tuple(x.shape)}")
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1] or weight.dtype != torch.float32:
        raise ValueError(
            f"linear_bf16: weight must be float32 (K, {x.shape[-1]}); got {weight.dtype} {tuple(weight.shape)}"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != torch.float32):
        raise ValueError(f"linear_bf16: bias must be float32 ({len(weight)},); got {bias.dtype} {tuple(bias.shape)}")
    if transformed(x, weight, bias):
        return plain(x, weight, bias)
    out: Tensor = evaluate("linear_bf16", x, weight, bias)
    return out


def plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the result in PyTorch's operators: for export, and for derivatives that the kernels do not have."""
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.bfloat16().float(), weight.bfloat16().float(), bias)


def _fake(a: Arguments) -> Tensor:
    return a.x.new_empty(*a.x.shape[:-1], len(a.weight))


def _fake_backward(a: Arguments, grad: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    return (
        a.x.new_empty(a.x.shape) if wanted[0] else a.x.new_empty(0),
        torch.empty_like(a.weight) if wanted[1] else a.x.new_empty(0),
        a.weight.new_empty(len(a.weight)) if wanted[2] else a.x.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted, inputs = list(ctx.needs_input_grad), ctx.saved_tensors
    if torch.is_grad_enabled():
        return differentiable_backward(plain, inputs, grad, wanted)
    grads = evaluate("linear_bf16_backward", grad, *inputs[:2], wanted)
    return tuple(gradient if want else None for gradient, want in zip(grads, wanted, strict=True))


register("linear_bf16", Arguments, "(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _fake)
register(
    "linear_bf16_backward",
    Arguments,
    "(Tensor grad, Tensor x, Tensor weight, bool[] wanted) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
    operation="linear_bf16",
)
register_gradient("linear_bf16", _backward, _setup_context)
