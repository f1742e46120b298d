"""reverse_step by the compiled CUDA library, in one kernel."""

import torch

from .. import interface, native_cuda
from ..native_cuda import too_old as unsupported  # not `unsupported`: `out` of another dtype is converted
from ..native_cuda import unavailable
from . import Arguments

__all__ = ["forward", "unavailable", "unsupported"]


def forward(a: Arguments) -> None:
    """Compute the same as the reference, the noise within 1e-6; an index outside the table gives NaN, not an error."""
    native_cuda.on_one_device(
        "reverse_step", a.x, a.out, a.table, a.timesteps, a.index, a.images, a.seed, a.noise, a.x0
    )
    out = a.out if a.out.dtype in native_cuda.FLOATS else a.out.to(torch.float32)
    table, timesteps, images = a.table.contiguous(), a.timesteps.contiguous(), a.images.contiguous()
    noise = None if a.noise is None else a.noise.contiguous()
    x0 = None if a.x0 is None else a.x0.contiguous()
    n, c, height, width = a.x.shape
    pointer = native_cuda.pointer
    args = interface.ReverseStep(
        x=pointer(a.x), out=pointer(out), table=pointer(table), timesteps=pointer(timesteps), index=pointer(a.index),
        noise=pointer(noise), x0=pointer(x0),
        # The kernel takes the noise's step from timesteps.
        key=interface.Key(images=pointer(images), seed=pointer(a.seed), step=None),
        n=n, c=c, height=height, width=width, steps=len(table), x_stride=a.x.stride(), out_stride=out.stride(),
        clip=a.clip, variance=a.variance, dtype=native_cuda.dtype_code(out.dtype),
    )  # fmt: skip
    native_cuda.call("reverse_step", args, [a.x, out])
    if a.x0 is not None and x0 is not None and x0 is not a.x0:
        a.x0.copy_(x0)
