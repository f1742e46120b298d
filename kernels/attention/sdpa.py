"""attention by PyTorch's scaled_dot_product_attention, for what our kernel does not take: long sequences.

The operators behind it are called by name because they give the log-sum-exp, which the backward pass of another
implementation may need.
"""

from typing import Any

import torch
from torch import Tensor

__all__ = ["backward", "forward", "unsupported"]

_FLASH_CHANNELS = 256  # of which its flash kernels take up to so many


def unsupported(q: Tensor, **rest: object) -> str | None:
    """Why arguments of forward or backward, by name, are left to another backend, or None."""
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"scaled_dot_product_attention takes float32, bfloat16 and float16, not {str(q.dtype).partition('.')[2]}"
    aligned = 16 // q.element_size()
    if q.shape[2] % aligned:
        return f"scaled_dot_product_attention takes multiples of {aligned} channels, not {q.shape[2]}"
    if q.numel() == 0:
        return "scaled_dot_product_attention takes no empty tensors"
    return None


def _one_head(x: Tensor) -> Tensor:
    """(N, L, C) as (N, 1, L, C)."""
    return x.contiguous().unsqueeze(1)


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[str, tuple[Any, ...]]:
    """Which operator was used, and what it returned: output, log-sum-exp and what its gradient asks for."""
    aten = torch.ops.aten
    if q.device.type == "cpu":
        return "cpu", aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    if q.dtype != torch.float32 and q.shape[-1] <= _FLASH_CHANNELS:
        return "flash", aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)
    return "efficient", aten._scaled_dot_product_efficient_attention(q, k, v, None, True, scale=scale)


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """As the reference: the output in q's dtype, and the log-sum-exp of each score row, float32 (N, L)."""
    _, (out, lse, *_) = _forward(_one_head(q), _one_head(k), _one_head(v), scale)
    # The efficient kernel pads its rows.
    return out.squeeze(1).contiguous(), lse.squeeze(1)[:, : q.shape[1]].contiguous()


def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference. The forward pass runs again: its output was not kept."""
    q, k, v, grad = map(_one_head, (q, k, v, grad))
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
