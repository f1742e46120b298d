"""add_product by a Triton kernel: a matrix product, pixels by channels, that begins with the image it is added to."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import triton_launch
from ..triton_launch import ceil_div, launch, next_power_of_2, unavailable
from . import Arguments, reference

__all__ = ["forward", "unavailable", "unsupported"]

_FEW_TILES = 128


def unsupported(image: Tensor, x: Tensor, skip: Tensor | None, weight: Tensor, **_: object) -> str | None:
    """Return why these arguments are left to another backend, or None."""
    largest = max(tensor.numel() for tensor in (image, x, x if skip is None else skip))
    if largest >= 2**31:
        return f"the Triton kernel takes images below 2^31 elements in all, not {tuple(image.shape)}"
    return triton_launch.unsupported(image=image, x=x, weight=weight)


@triton.jit
def _added(
    total, x, weight, pixel, k, pixels, outputs, channels, first, width,
    BC: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add x's product with its columns of the weight, from `first`; x (pixels, channels), weight (outputs, width)."""
    for start in range(0, channels, BC):
        c = start + tl.arange(0, BC)
        at = pixel[:, None] * channels + c[None, :]
        columns = k[None, :] * width + (first + c)[:, None]
        if EVEN:
            left, right = tl.load(x + at), tl.load(weight + columns)
        else:
            left = tl.load(x + at, (pixel < pixels)[:, None] & (c < channels)[None, :], 0.0)
            right = tl.load(weight + columns, (c < channels)[:, None] & (k < outputs)[None, :], 0.0)
        if PRECISION == "interpreted":  # the interpreter multiplies the bits of bfloat16 as if they were integers
            total = tl.dot(left.to(tl.float32), right.to(tl.float32), total)
        else:
            total = tl.dot(left, right, total, input_precision=PRECISION)
    return total


@triton.jit
def _add_product_kernel(
    image, x, skip, weight, bias, out, pixels, outputs, c1, c2, blocks,
    BM: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr, HAS_SKIP: tl.constexpr, HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute BM pixels by BK output channels; grid (blocks of pixels x of channels,). EVEN: tiles have no borders."""
    pixel = tl.program_id(0) // blocks * BM + tl.arange(0, BM)
    k = tl.program_id(0) % blocks * BK + tl.arange(0, BK)
    total = tl.zeros([BM, BK], tl.float32)
    width = c1 + c2
    total = _added(total, x, weight, pixel, k, pixels, outputs, c1, 0, width, BC, EVEN, PRECISION)
    if HAS_SKIP:
        total = _added(total, skip, weight, pixel, k, pixels, outputs, c2, c1, width, BC, EVEN, PRECISION)
    if HAS_BIAS:
        total += tl.load(bias + k, k < outputs, 0.0).to(tl.float32)[None, :]
    at = pixel[:, None] * outputs + k[None, :]
    mask = (pixel < pixels)[:, None] & (k < outputs)[None, :]
    total += tl.load(image + at, mask, 0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask)


def forward(a: Arguments) -> Tensor:
    """Compute the same as the reference; float32 keeps its digits."""
    if a.image.numel() == 0:
        return reference.forward(a)
    image, x = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (a.image, a.x))
    skip = None if a.skip is None else a.skip.contiguous(memory_format=torch.channels_last)
    n, outputs, height, width = image.shape
    pixels, c1, c2 = n * height * width, x.shape[1], 0 if skip is None else skip.shape[1]
    out = torch.empty(image.shape, dtype=image.dtype, device=image.device, memory_format=torch.channels_last)
    wide = image.dtype == torch.float32
    block_m = min(128, max(16, next_power_of_2(pixels)))
    block_k = min(64 if wide else 128, max(16, next_power_of_2(outputs)))
    if block_m == 128 and pixels * outputs < _FEW_TILES * block_m * block_k:
        block_m = 64
    block_c = min(32 if wide else 64, max(16, next_power_of_2(min(c1, c2 or c1))))
    even = pixels % block_m == 0 and outputs % block_k == 0 and c1 % block_c == 0 and c2 % block_c == 0
    blocks = ceil_div(outputs, block_k)
    launch(
        _add_product_kernel, (ceil_div(pixels, block_m) * blocks,), image.device,
        image, x, skip, a.weight.contiguous(), a.bias, out, pixels, outputs, c1, c2, blocks,
        BM=block_m, BK=block_k, BC=block_c, HAS_SKIP=skip is not None, HAS_BIAS=a.bias is not None, EVEN=even,
        PRECISION=triton_launch.precision(image.dtype), num_stages=3,
        num_warps=8 if wide or block_m * block_k >= 128 * 128 else 4,
    )  # fmt: skip
    return out
