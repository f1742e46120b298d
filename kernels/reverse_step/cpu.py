"""reverse_step by the compiled CPU library, in one pass."""

import ctypes

import torch

from .. import interface, native
from ..native import unavailable
from . import Arguments

__all__ = ["forward", "unavailable"]


def forward(a: Arguments) -> None:
    """Compute the same as the reference, the noise within 1e-6. Raises IndexError for an index outside the table."""
    steps = len(a.table)
    if not 0 <= int(a.index) < steps:
        raise IndexError(f"reverse_step: index must be in 0..{steps - 1}; got {int(a.index)}")
    out = a.out if native.unsupported_dtype(a.out) is None else a.out.to(torch.float32)
    table, timesteps, images = a.table.contiguous(), a.timesteps.contiguous(), a.images.contiguous()
    noise = None if a.noise is None else a.noise.contiguous()
    x0 = None if a.x0 is None else a.x0.contiguous()
    n, c, height, width = a.x.shape
    args = interface.ReverseStep(
        x=native.pointer(a.x), out=native.pointer(out), table=native.pointer(table),
        timesteps=native.pointer(timesteps), index=native.pointer(a.index), noise=native.pointer(noise),
        x0=native.pointer(x0),
        key=native.key(images, a.seed, a.index),  # the library takes the noise's step from timesteps
        n=n, c=c, height=height, width=width, steps=steps, clip=a.clip, variance=a.variance,
        x_stride=(ctypes.c_int64 * 4)(*a.x.stride()), out_stride=(ctypes.c_int64 * 4)(*out.stride()),
        dtype=native.dtype_code(out.dtype),
    )  # fmt: skip
    native.call("reverse_step", args)
    if a.x0 is not None and x0 is not None and x0 is not a.x0:
        a.x0.copy_(x0)
