"""attention by the compiled CPU library."""

import ctypes

import torch
from torch import Tensor

from .. import interface, native
from ..native import unavailable
from . import Arguments, reference

__all__ = ["backward", "forward", "unavailable", "unsupported"]


def unsupported(q: Tensor, **_: object) -> str | None:
    """Return why these arguments are left to PyTorch, or None."""
    return native.unsupported_dtype(q)


def _rows(x: Tensor) -> Tensor:
    """Return x, copied unless its channels are adjacent, as they are in the parts of one projection's output."""
    return x if x.stride(2) == 1 else x.contiguous()


def _structure(q: Tensor, k: Tensor, v: Tensor, scale: float, bf16: bool) -> interface.Attention:
    n, length, c = q.shape
    args = interface.Attention(n=n, l=length, c=c, heads=1, scale=scale, dtype=native.dtype_code(q.dtype))
    if bf16 or (q.dtype == torch.bfloat16 and native.has_bf16()):  # then q, k and v are rounded already
        args.precision = interface.BFLOAT16
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        setattr(args, name, native.pointer(tensor))
        setattr(args, f"{name}_stride", (ctypes.c_int64 * 2)(*tensor.stride()[:2]))
    return args


def forward(a: Arguments) -> tuple[Tensor, Tensor]:
    """Compute the same as the reference."""
    if a.q.numel() == 0:
        return reference.forward(a)
    q, k, v = map(_rows, a[:3])
    out = torch.empty(q.shape, dtype=q.dtype, device="cpu")
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device="cpu")
    args = _structure(q, k, v, a.scale, a.bf16)
    args.out, args.lse = native.pointer(out), native.pointer(lse)
    args.out_stride = (ctypes.c_int64 * 2)(*out.stride()[:2])
    native.call("attention", args)
    return out, lse


def backward(a: Arguments, grad: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the same as the reference; the same bits with any number of threads."""
    if a.q.numel() == 0:
        return reference.backward(a, grad, lse)
    q, k, v = map(_rows, a[:3])
    grad, lse = grad.to(q.dtype).contiguous(), lse.contiguous()
    grads = [torch.empty(q.shape, dtype=q.dtype, device="cpu") for _ in range(3)]
    args = _structure(q, k, v, a.scale, a.bf16)
    args.grad, args.lse = native.pointer(grad), native.pointer(lse)
    args.grad_q, args.grad_k, args.grad_v = map(native.pointer, grads)
    native.call("attention_backward", args)
    return grads[0], grads[1], grads[2]
