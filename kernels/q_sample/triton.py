"""q_sample by one Triton kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import triton_launch
from ..philox import STREAM_FORWARD
from ..philox.triton import normals
from ..triton_launch import ceil_div, launch, unavailable
from . import Arguments

__all__ = ["forward", "unavailable", "unsupported"]

_BLOCKS = 256  # Philox blocks, of four elements each, per program


def unsupported(x0: Tensor, **rest: object) -> str | None:
    """Return why these arguments of forward, by name, are left to another backend, or None."""
    if x0[:1].numel() >= 2**31 - 4 * _BLOCKS:
        return f"the Triton kernels take images below 2^31 elements, not {tuple(x0.shape[1:])}"
    return triton_launch.elsewhere(x0=x0, **rest)


@triton.jit
def _q_sample_kernel(
    x0, t, table, flip, noise, images, seed, step, x_t, eps, num, height, width, steps, pieces,
    stride_n, stride_c, stride_h, stride_w, stream,
    B: tl.constexpr, DENSE: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """Compute 4 B elements of one image, in (C, H, W) order; grid (N x pieces,). DENSE: contiguous and not flipped."""
    n, first = tl.program_id(0) // pieces, tl.program_id(0) % pieces * B
    base, i = n.to(tl.int64) * num, 4 * first + tl.arange(0, 4 * B)
    mask = i < num
    if DENSE:
        x = tl.load(x0 + base + i, mask, 0)
    else:
        column = i % width
        if flip is not None:
            column = tl.where(tl.load(flip + n), width - 1 - column, column)
        row = i // width
        inside = (row // height).to(tl.int64) * stride_c + (row % height).to(tl.int64) * stride_h
        x = tl.load(x0 + n.to(tl.int64) * stride_n + inside + column.to(tl.int64) * stride_w, mask, 0)
    x = x.to(tl.float32)
    if BYTES:
        x = tl.div_rn(x, tl.full(x.shape, 127.5, tl.float32)) - 1.0
    if noise is None:
        z = normals(first + tl.arange(0, B), tl.load(images + n), tl.load(step), stream, tl.load(seed))
    else:
        z = tl.load(noise + base + i, mask, 0.0)
    at = tl.load(t + n)
    exists = (at >= 0) & (at < steps)
    signal = tl.load(table + 2 * at, exists, float("nan"))
    sigma = tl.load(table + 2 * at + 1, exists, float("nan"))
    tl.store(x_t + base + i, signal * x + sigma * z, mask)
    tl.store(eps + base + i, z, mask)


def forward(a: Arguments) -> tuple[Tensor, Tensor]:
    """Compute the same as the reference, the noise within 1e-6; a t outside the table gives NaN, not an error."""
    x0 = a.x0
    x_t, eps = (torch.empty(x0.shape, dtype=torch.float32, device=x0.device) for _ in range(2))
    if x0.numel() == 0:
        return x_t, eps
    if x0.dtype not in (torch.uint8, *triton_launch.DTYPES):
        x0 = x0.to(torch.float32)
    n, c, height, width = x0.shape
    num = c * height * width
    pieces = ceil_div(num, 4 * _BLOCKS)
    launch(
        _q_sample_kernel, (n * pieces,), x0.device,
        x0, a.t.contiguous(), a.table.contiguous(), None if a.flip is None else a.flip.contiguous(),
        None if a.noise is None else a.noise.to(torch.float32).contiguous(), a.images.contiguous(), a.seed, a.step,
        x_t, eps, num, height, width, len(a.table), pieces, *x0.stride(), STREAM_FORWARD,
        B=_BLOCKS, DENSE=x0.is_contiguous() and a.flip is None, BYTES=x0.dtype == torch.uint8, enable_fp_fusion=False,
    )  # fmt: skip
    return x_t, eps
