"""q_sample by the compiled CPU library, in one pass."""

import ctypes

import torch
from torch import Tensor

from .. import interface, native
from ..native import unavailable

__all__ = ["forward", "unavailable"]


def forward(
    x0: Tensor,
    t: Tensor,
    table: Tensor,
    flip: Tensor | None,
    noise: Tensor | None,
    images: Tensor,
    seed: Tensor,
    step: Tensor,
) -> tuple[Tensor, Tensor]:
    """As the reference, its noise within 1e-6. IndexError for a t outside the table."""
    if len(t) and not (int(t.min()) >= 0 and int(t.max()) < len(table)):
        raise IndexError(f"q_sample: t must be in 0..{len(table) - 1}; got {int(t.min())}..{int(t.max())}")
    if x0.dtype != torch.uint8:
        x0 = x0.to(torch.float32)
    t, table, images = t.contiguous(), table.contiguous(), images.contiguous()
    flip = None if flip is None else flip.contiguous()
    noise = None if noise is None else noise.to(torch.float32).contiguous()
    x_t, eps = (torch.empty(x0.shape, dtype=torch.float32, device="cpu") for _ in range(2))
    n, c, height, width = x0.shape
    args = interface.QSample(
        x0=native.pointer(x0), t=native.pointer(t), table=native.pointer(table), flip=native.pointer(flip),
        noise=native.pointer(noise), x_t=native.pointer(x_t), eps=native.pointer(eps),
        key=native.key(images, seed, step), n=n, c=c, height=height, width=width, timesteps=len(table),
        x0_stride=(ctypes.c_int64 * 4)(*x0.stride()), dtype=native.dtype_code(x0.dtype),
    )  # fmt: skip
    native.call("q_sample", args)
    return x_t, eps
