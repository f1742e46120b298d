"""attention by PyTorch's scaled_dot_product_attention, for sequences longer than our kernel takes.

The operators behind it are called directly because they return the log-sum-exp, which the backward pass of another
implementation may need.
"""

from typing import Any

import torch
from torch import Tensor

from . import Arguments

__all__ = ["backward", "forward", "unsupported"]

_FLASH_CHANNELS = 256  # the most channels that its flash kernels take


def unsupported(q: Tensor, bf16: bool = False, **rest: object) -> str | None:
    """Return why these arguments of forward or backward, by name, are left to another backend, or None."""
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"scaled_dot_product_attention takes float32, bfloat16 and float16, not {str(q.dtype).partition('.')[2]}"
    if bf16 and q.dtype != torch.bfloat16:
        return "scaled_dot_product_attention does not round float32 to bfloat16"
    aligned = 16 // q.element_size()
    if q.shape[2] % aligned:
        return f"scaled_dot_product_attention takes multiples of {aligned} channels, not {q.shape[2]}"
    if q.numel() == 0:
        return "scaled_dot_product_attention takes no empty tensors"
    return None


def _one_head(x: Tensor) -> Tensor:
    """Return (N, L, C) as a dense (N, 1, L, C)."""
    return x.contiguous().unsqueeze(1)


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[str, tuple[Any, ...]]:
    """Return the operator's kind, and its results: output, log-sum-exp, and what its backward pass takes."""
    aten = torch.ops.aten
    if q.device.type == "cpu":
        return "cpu", aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    if q.dtype != torch.float32 and q.shape[-1] <= _FLASH_CHANNELS:
        return "flash", aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)
    return "efficient", aten._scaled_dot_product_efficient_attention(q, k, v, None, True, scale=scale)


def forward(a: Arguments) -> tuple[Tensor, Tensor]:
    """Compute the same as the reference: the output in q's dtype, and each score row's log-sum-exp, float32 (N, L)."""
    q, k, v = map(_one_head, a[:3])
    _, (out, lse, *_) = _forward(q, k, v, a.scale)
    # The efficient kernel pads its rows.
    return out.squeeze(1).contiguous(), lse.squeeze(1)[:, : q.shape[2]].contiguous()


def backward(a: Arguments, grad: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the same as the reference. The forward pass runs again: its output was not kept."""
    (q, k, v, grad), scale = map(_one_head, (*a[:3], grad)), a.scale
    kind, results = _forward(q, k, v, scale)
    out, own_lse = results[:2]
    aten = torch.ops.aten
    if kind == "cpu":
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, own_lse, 0.0, False, scale=scale
        )
    elif kind == "flash":
        cumulated_q, cumulated_k, max_q, max_k, seed, offset = results[2:8]
        grads = aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, own_lse, cumulated_q, cumulated_k, max_q, max_k, 0.0, False, seed, offset, scale=scale
        )
    else:
        seed, offset = results[2:4]
        wanted = [True, True, True, False]
        grads = aten._scaled_dot_product_efficient_attention_backward(
            grad, q, k, v, None, out, own_lse, seed, offset, 0.0, wanted, False, scale=scale
        )
    grad_q, grad_k, grad_v = (gradient.squeeze(1).contiguous() for gradient in grads[:3])
    return grad_q, grad_k, grad_v
