"""conv3x3_in by a Triton kernel: a matrix product, pixels by the 9 C numbers around each by output channels.

cuDNN needs a copy of the image with its channels filled up to 8, and its kernels for so few are slow.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import triton_launch
from ..triton_launch import ceil_div, launch, next_power_of_2, unavailable
from . import Arguments, reference

__all__ = ["forward", "unavailable", "unsupported"]

_AROUND = 64  # the most numbers around a pixel: 7 channels
_PIXELS = 64  # of a program; on an H200 as fast as 128 and 256


def unsupported(x: Tensor, weight: Tensor, **_: object) -> str | None:
    """Return why these arguments are left to another backend, or None."""
    if 9 * x.shape[1] > _AROUND:
        return f"the Triton kernel takes up to {_AROUND // 9} channels, not {x.shape[1]}"
    if max(x.numel(), len(weight) * x.numel() // max(1, x.shape[1])) >= 2**31:
        return f"the Triton kernel takes images below 2^31 elements in all, not {tuple(x.shape)}"
    return triton_launch.unsupported(x=x, weight=weight)


@triton.jit
def _conv3x3_in_kernel(
    x, weight, out, pixels, channels, height, width, outputs, blocks,
    BM: tl.constexpr, BK: tl.constexpr, AROUND: tl.constexpr, MIRRORED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute out (N, H, W, K) from x (N, C, H, W) and weight (K, 9, C); grid (blocks of pixels x of channels,)."""
    m = tl.program_id(0) // blocks * BM + tl.arange(0, BM)
    k = tl.program_id(0) % blocks * BK + tl.arange(0, BK)
    size = height * width
    n, p = m // size, m % size
    j = tl.arange(0, AROUND)
    tap, c = j // channels, j % channels
    row, column = (p // width)[:, None] + (tap // 3)[None, :] - 1, (p % width)[:, None] + (tap % 3)[None, :] - 1
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    inside &= (m < pixels)[:, None] & (tap < 9)[None, :]
    source = size - 1 - row * width - column if MIRRORED else row * width + column
    left = tl.load(x + (n[:, None] * channels + c[None, :]) * size + source, inside, 0.0)
    around = 9 * channels
    right = tl.load(weight + k[None, :] * around + j[:, None], (j < around)[:, None] & (k < outputs)[None, :], 0.0)
    left = left.to(right.dtype)
    if PRECISION == "interpreted":  # the interpreter multiplies the bits of bfloat16 as if they were integers
        total = tl.dot(left.to(tl.float32), right.to(tl.float32))
    else:
        total = tl.dot(left, right, input_precision=PRECISION)
    mask = (m < pixels)[:, None] & (k < outputs)[None, :]
    tl.store(out + m[:, None] * outputs + k[None, :], total.to(out.dtype.element_ty), mask)


def forward(a: Arguments) -> Tensor:
    """Compute the same as the reference; float32 keeps its digits."""
    if a.x.numel() == 0:
        return reference.forward(a)
    x, weight = a.x.contiguous(), a.weight.contiguous(memory_format=torch.channels_last)
    n, channels, height, width = x.shape
    pixels, outputs = n * height * width, len(weight)
    out = torch.empty(
        (n, outputs, height, width), dtype=weight.dtype, device=x.device, memory_format=torch.channels_last
    )
    block_k = min(128, max(16, next_power_of_2(outputs)))
    blocks = ceil_div(outputs, block_k)
    launch(
        _conv3x3_in_kernel, (ceil_div(pixels, _PIXELS) * blocks,), x.device,
        x, weight, out, pixels, channels, height, width, outputs, blocks,
        BM=_PIXELS, BK=block_k, AROUND=max(16, next_power_of_2(9 * channels)), MIRRORED=a.mirrored,
        PRECISION=triton_launch.precision(weight.dtype), num_warps=4,
    )  # fmt: skip
    return out
