"""reverse_step by the compiled CUDA library, in one kernel."""

import torch
from torch import Tensor

from .. import interface, native_cuda
from ..native_cuda import too_old as unsupported  # any dtype: out is converted
from ..native_cuda import unavailable

__all__ = ["forward", "unavailable", "unsupported"]


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
    """As the reference, its noise within 1e-6; an index outside the table gives NaN instead of an error."""
    native_cuda.on_one_device("reverse_step", x, out, table, timesteps, index, images, seed, noise, x0)
    if out.dtype not in native_cuda.FLOATS:
        out = out.to(torch.float32)
    table, timesteps, images = table.contiguous(), timesteps.contiguous(), images.contiguous()
    noise = None if noise is None else noise.contiguous()
    dense_x0 = None if x0 is None else x0 if x0.is_contiguous() else torch.empty(x0.shape, device=x0.device)
    n, c, height, width = x.shape
    pointer = native_cuda.pointer
    args = interface.ReverseStep(
        x=pointer(x), out=pointer(out), table=pointer(table), timesteps=pointer(timesteps), index=pointer(index),
        noise=pointer(noise), x0=pointer(dense_x0),
        # The kernel takes the noise's step from timesteps.
        key=interface.Key(images=pointer(images), seed=pointer(seed), step=None),
        n=n, c=c, height=height, width=width, steps=len(table), x_stride=x.stride(), out_stride=out.stride(),
        clip=clip, variance=variance, dtype=native_cuda.dtype_code(out.dtype),
    )  # fmt: skip
    native_cuda.call("reverse_step", args, [x, out])
    if x0 is not None and dense_x0 is not None and dense_x0 is not x0:
        x0.copy_(dense_x0)
