"""q_sample by the compiled CUDA library, in one kernel."""

import torch
from torch import Tensor

from .. import interface, native_cuda
from ..native_cuda import too_old as unsupported  # not `unsupported`: x0 of another dtype is converted
from ..native_cuda import unavailable
from . import Arguments

__all__ = ["forward", "unavailable", "unsupported"]


def forward(a: Arguments) -> tuple[Tensor, Tensor]:
    """Compute the same as the reference, the noise within 1e-6; a t outside the table gives NaN, not an error."""
    native_cuda.on_one_device("q_sample", *a)
    x0 = a.x0 if a.x0.dtype == torch.uint8 else a.x0.to(torch.float32)
    t, table, images = a.t.contiguous(), a.table.contiguous(), a.images.contiguous()
    flip = None if a.flip is None else a.flip.contiguous()
    noise = None if a.noise is None else a.noise.to(torch.float32).contiguous()
    x_t, eps = (torch.empty(x0.shape, dtype=torch.float32, device=x0.device) for _ in range(2))
    n, c, height, width = x0.shape
    pointer = native_cuda.pointer
    args = interface.QSample(
        x0=pointer(x0), t=pointer(t), table=pointer(table), flip=pointer(flip), noise=pointer(noise),
        x_t=pointer(x_t), eps=pointer(eps), key=native_cuda.key(images, a.seed, a.step),
        n=n, c=c, height=height, width=width, timesteps=len(table), x0_stride=x0.stride(),
        dtype=native_cuda.dtype_code(x0.dtype),
    )  # fmt: skip
    native_cuda.call("q_sample", args, [x0])
    return x_t, eps
