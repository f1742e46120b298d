"""q_sample by the compiled CUDA library, in one kernel."""

import torch
from torch import Tensor

from .. import interface, native_cuda
from ..native_cuda import too_old as unsupported  # any dtype: what is neither uint8 nor float32 is converted
from ..native_cuda import unavailable

__all__ = ["forward", "unavailable", "unsupported"]


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
    """As the reference, its noise within 1e-6; a t outside the table gives NaN instead of an error."""
    native_cuda.on_one_device("q_sample", x0, t, table, flip, noise, images, seed, step)
    if x0.dtype != torch.uint8:
        x0 = x0.to(torch.float32)
    t, table, images = t.contiguous(), table.contiguous(), images.contiguous()
    flip = None if flip is None else flip.contiguous()
    noise = None if noise is None else noise.to(torch.float32).contiguous()
    x_t, eps = (torch.empty(x0.shape, dtype=torch.float32, device=x0.device) for _ in range(2))
    n, c, height, width = x0.shape
    pointer = native_cuda.pointer
    args = interface.QSample(
        x0=pointer(x0), t=pointer(t), table=pointer(table), flip=pointer(flip), noise=pointer(noise),
        x_t=pointer(x_t), eps=pointer(eps), key=native_cuda.key(images, seed, step),
        n=n, c=c, height=height, width=width, timesteps=len(table), x0_stride=x0.stride(),
        dtype=native_cuda.dtype_code(x0.dtype),
    )  # fmt: skip
    native_cuda.call("q_sample", args, [x0])
    return x_t, eps
