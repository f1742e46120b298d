"""q_sample by the compiled CPU library, in one pass."""

import ctypes

import torch
from torch import Tensor

from .. import interface, native
from ..native import unavailable
from . import Arguments

__all__ = ["forward", "unavailable"]


def forward(a: Arguments) -> tuple[Tensor, Tensor]:
    """Compute the same as the reference, the noise within 1e-6. Raises IndexError for a t outside the table."""
    if len(a.t) and not (int(a.t.min()) >= 0 and int(a.t.max()) < len(a.table)):
        raise IndexError(f"q_sample: t must be in 0..{len(a.table) - 1}; got {int(a.t.min())}..{int(a.t.max())}")
    x0 = a.x0 if a.x0.dtype == torch.uint8 else a.x0.to(torch.float32)
    t, table, images = a.t.contiguous(), a.table.contiguous(), a.images.contiguous()
    flip = None if a.flip is None else a.flip.contiguous()
    noise = None if a.noise is None else a.noise.to(torch.float32).contiguous()
    x_t, eps = (torch.empty(x0.shape, dtype=torch.float32, device="cpu") for _ in range(2))
    n, c, height, width = x0.shape
    args = interface.QSample(
        x0=native.pointer(x0), t=native.pointer(t), table=native.pointer(table), flip=native.pointer(flip),
        noise=native.pointer(noise), x_t=native.pointer(x_t), eps=native.pointer(eps),
        key=native.key(images, a.seed, a.step), n=n, c=c, height=height, width=width, timesteps=len(table),
        x0_stride=(ctypes.c_int64 * 4)(*x0.stride()), dtype=native.dtype_code(x0.dtype),
    )  # fmt: skip
    native.call("q_sample", args)
    return x_t, eps
