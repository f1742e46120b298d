"""attention by the compiled CPU library."""

import ctypes

import torch
from torch import Tensor

from .. import interface, native
from ..native import unavailable
from . import reference

__all__ = ["backward", "forward", "unavailable", "unsupported"]


def unsupported(q: Tensor, **_: object) -> str | None:
    """Why these arguments are left to PyTorch, or None."""
    return native.unsupported_dtype(q)


def _rows(x: Tensor) -> Tensor:
    """x itself where its channels are adjacent, as the parts of one projection's output are."""
    return x if x.stride(2) == 1 else x.contiguous()


def _arguments(q: Tensor, k: Tensor, v: Tensor, scale: float) -> interface.Attention:
    n, length, c = q.shape
    args = interface.Attention(n=n, l=length, c=c, scale=scale, dtype=native.dtype_code(q.dtype))
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        setattr(args, name, native.pointer(tensor))
        setattr(args, f"{name}_stride", (ctypes.c_int64 * 2)(*tensor.stride()[:2]))
    return args


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """As the reference."""
    if q.numel() == 0:
        return reference.forward(q, k, v, scale)
    q, k, v = _rows(q), _rows(k), _rows(v)
    out = torch.empty(q.shape, dtype=q.dtype, device="cpu")
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device="cpu")
    args = _arguments(q, k, v, scale)
    args.out, args.lse = native.pointer(out), native.pointer(lse)
    args.out_stride = (ctypes.c_int64 * 2)(*out.stride()[:2])
    native.call("attention", args)
    return out, lse


def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference; the same bits with any number of threads."""
    if q.numel() == 0:
        return reference.backward(grad, q, k, v, lse, scale)
    q, k, v, grad, lse = _rows(q), _rows(k), _rows(v), grad.to(q.dtype).contiguous(), lse.contiguous()
    grads = [torch.empty(q.shape, dtype=q.dtype, device="cpu") for _ in range(3)]
    args = _arguments(q, k, v, scale)
    args.grad, args.lse = native.pointer(grad), native.pointer(lse)
    args.grad_q, args.grad_k, args.grad_v = map(native.pointer, grads)
    native.call("attention_backward", args)
    return grads[0], grads[1], grads[2]
