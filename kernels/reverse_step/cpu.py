"""reverse_step by the compiled CPU library, in one pass."""

import ctypes

import torch
from torch import Tensor

from .. import interface, native
from ..native import unavailable

__all__ = ["forward", "unavailable"]


def forward(
    x: Tensor,
    out: Tensor,
    table: Tensor,
    timesteps: Tensor,
    index: Tensor,
    images: Tensor,
    seed: Tensor,
    clip: float,
    variance: int,
    noise: Tensor | None,
    x0: Tensor | None,
) -> None:
    """As the reference, its noise within 1e-6. IndexError for an index outside the table."""
    if not 0 <= int(index) < len(table):
        raise IndexError(f"reverse_step: index must be in 0..{len(table) - 1}; got {int(index)}")
    if native.unsupported_dtype(out) is not None:
        out = out.to(torch.float32)
    table, timesteps, images = table.contiguous(), timesteps.contiguous(), images.contiguous()
    noise = None if noise is None else noise.contiguous()
    dense_x0 = x0 if x0 is None or x0.is_contiguous() else torch.empty(x0.shape, dtype=torch.float32, device="cpu")
    n, c, height, width = x.shape
    args = interface.ReverseStep(
        x=native.pointer(x), out=native.pointer(out), table=native.pointer(table),
        timesteps=native.pointer(timesteps), index=native.pointer(index), noise=native.pointer(noise),
        # The library takes the noise's step from timesteps.
        x0=native.pointer(dense_x0), key=native.key(images, seed, index),
        n=n, c=c, height=height, width=width, steps=len(table), clip=clip, variance=variance,
        x_stride=(ctypes.c_int64 * 4)(*x.stride()), out_stride=(ctypes.c_int64 * 4)(*out.stride()),
        dtype=native.dtype_code(out.dtype),
    )  # fmt: skip
    native.call("reverse_step", args)
    if x0 is not None and dense_x0 is not None and dense_x0 is not x0:
        x0.copy_(dense_x0)
