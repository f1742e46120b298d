"""conv3x3_fp8 by a Triton kernel: an implicit matrix product, pixels by 9 C by output channels.

A program computes BM pixels, of one or more images, by BK output channels. It loops over the nine neighbours of a pixel
and, for each, over the channels, BC at a time. Both operands have adjacent channels, as the matrix unit needs them for
8-bit numbers. Hopper's copy engine fetches tiles of images whose sides are powers of two, and fills in the zeros around
them; elsewhere threads do, for any image.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import triton_launch
from ..triton_launch import ceil_div, launch, next_power_of_2
from ..triton_tiles import chip
from . import Arguments

__all__ = ["forward", "unavailable", "unsupported"]

_OLDEST_CHIP = (8, 9)
_LONGEST_SIDE = 256  # of what the copy engine fetches at a time
_FEW_TILES = 128


def unavailable() -> str | None:
    """Return why the kernel does not run here, or None."""
    reason = triton_launch.unavailable()
    if reason is not None or triton_launch.interpreted():
        return reason
    if torch.version.hip:
        return "e4m3 as PyTorch has it (float8_e4m3fn) is NVIDIA's; AMD's chips take another"
    chip = torch.cuda.get_device_capability()
    if chip < _OLDEST_CHIP:
        return f"the GPU is sm_{chip[0]}{chip[1]}, and 8-bit floating point begins with sm_89"
    return None


def unsupported(x: Tensor, weight: Tensor, **_: object) -> str | None:
    """Return why these arguments are left to another backend, or None."""
    if x.shape[1] % 16 or weight.shape[0] % 16:
        return f"the Triton kernel takes channels in multiples of 16, not {x.shape[1]} and {weight.shape[0]}"
    if x.numel() * 2 >= 2**31 or weight.shape[0] * x.numel() // x.shape[1] >= 2**31:
        return f"the Triton kernel takes images below 2^31 elements in all, not {tuple(x.shape)}"
    return triton_launch.elsewhere(x=x)


@triton.jit
def _conv3x3_fp8_kernel(
    x, weight, scale, bias, out, pixels, height, width, channels, outputs, blocks,
    BM: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr, HAS_BIAS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Compute out (N, H, W, K) from x (N, H, W, C) and weight (K, 9, C); grid (blocks of pixels x of channels,)."""
    pixel = tl.program_id(0) // blocks * BM + tl.arange(0, BM)
    k = tl.program_id(0) % blocks * BK + tl.arange(0, BK)
    column, row = pixel % width, pixel // width % height
    total = tl.zeros([BM, BK], tl.float32)
    chunks = tl.cdiv(channels, BC)
    for i in range(9 * chunks):
        tap, c = i // chunks, i % chunks * BC + tl.arange(0, BC)
        down, right = tap // 3 - 1, tap % 3 - 1
        inside = (pixel < pixels) & (row + down >= 0) & (row + down < height)
        inside &= (column + right >= 0) & (column + right < width)
        neighbour = pixel + down * width + right
        left = tl.load(x + neighbour[:, None] * channels + c[None, :], inside[:, None] & (c < channels)[None, :], 0.0)
        mask = (k < outputs)[:, None] & (c < channels)[None, :]
        of_k = tl.load(weight + (k * 9 + tap)[:, None] * channels + c[None, :], mask, 0.0)
        if WIDEN:  # the interpreter would multiply the bits as integers
            left, of_k = left.to(tl.float32), of_k.to(tl.float32)
        # Ada's and Hopper's matrix units keep 14 bits of this sum. Adding chunks up in float32 would reduce that error
        # tenfold, but it is only a tenth of what rounding to e4m3 costs, and half as many programs would fit.
        total = tl.dot(left, tl.trans(of_k), total)
    total *= tl.load(scale + k, k < outputs, 0.0)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + k, k < outputs, 0.0).to(tl.float32)[None, :]
    at = pixel[:, None] * outputs + k[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), (pixel < pixels)[:, None] & (k < outputs)[None, :])


@triton.jit
def _conv3x3_fp8_tiled_kernel(
    x, weight, scale, bias, out, pixels, height, channels, outputs, blocks,
    N: tl.constexpr, H: tl.constexpr, W: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
    HAS_BIAS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Compute the same for H rows, W pixels wide, of N images; x and weight (K, 9 C) are descriptors of such tiles."""
    k0 = tl.program_id(0) % blocks * BK
    first = tl.program_id(0) // blocks * (N * H)  # row, of all images
    total = tl.zeros([N * H * W, BK], tl.float32)
    chunks = tl.cdiv(channels, BC)
    for i in range(9 * chunks):
        tap, c = i // chunks, i % chunks * BC
        left = x.load([first // height, first % height + tap // 3 - 1, tap % 3 - 1, c])
        of_k = weight.load([k0, tap * channels + c])
        left = tl.reshape(left, [N * H * W, BC])
        if INTERPRETED:  # it would multiply the bits as integers
            total = tl.dot(left.to(tl.float32), tl.trans(of_k.to(tl.float32)), total)
        else:
            total = tl.dot(left, tl.trans(of_k), total)
            # A use of the sum, for which the compiler waits. Without it, Triton 3.6 loads the next tile into registers
            # that the matrix unit may still be reading.
            total = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [total], tl.float32, is_pure=True, pack=1)
    k = k0 + tl.arange(0, BK)
    total *= tl.load(scale + k, k < outputs, 0.0)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + k, k < outputs, 0.0).to(tl.float32)[None, :]
    pixel = first * W + tl.arange(0, N * H * W)
    at = pixel[:, None] * outputs + k[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), (pixel < pixels)[:, None] & (k < outputs)[None, :])


def forward(a: Arguments) -> Tensor:
    """Compute the same as the reference; with 14-bit sums on sm_89 and sm_90, see `fastddpm.ops.conv3x3_fp8`."""
    x, weight, scale, bias, dtype = a
    n, channels, height, width = x.shape
    outputs, pixels = weight.shape[0], n * height * width
    out = torch.empty((n, outputs, height, width), dtype=dtype, device=x.device, memory_format=torch.channels_last)
    if out.numel() == 0:
        return out
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    if _tiles(height, width, channels, x, weight):
        return _forward_by_tiles(a._replace(x=x, weight=weight), out)
    block_m, block_k = min(128, max(16, next_power_of_2(pixels))), min(128, max(16, next_power_of_2(outputs)))
    blocks = ceil_div(outputs, block_k)
    launch(
        _conv3x3_fp8_kernel, (ceil_div(pixels, block_m) * blocks,), x.device,
        x, weight, scale.contiguous(), None if bias is None else bias.contiguous(), out, pixels, height, width,
        channels, outputs, blocks, BM=block_m, BK=block_k, BC=min(64, max(32, next_power_of_2(channels))),
        HAS_BIAS=bias is not None, WIDEN=triton_launch.interpreted(),
        num_warps=8 if block_m * block_k >= 128 * 128 else 4, num_stages=4,
    )  # fmt: skip
    return out


def _tiles(height: int, width: int, channels: int, *tensors: Tensor) -> bool:
    """Return whether the copy engine can fetch the image: sm_90, sides of 2, 4 .. 256, rows of channels of 32 bytes.

    It takes memory that begins at a multiple of 16 bytes.
    """
    powers = all(1 < side <= _LONGEST_SIDE and side & (side - 1) == 0 for side in (height, width))
    aligned = all(tensor.data_ptr() % 16 == 0 for tensor in tensors)
    here = triton_launch.interpreted() or chip(tensors[0].device) == "sm_90"
    return powers and aligned and channels % 32 == 0 and here


def _forward_by_tiles(a: Arguments, out: Tensor) -> Tensor:
    """Compute `out` by tiles of 128 pixels, 64 if these were few, or one row: rows of an image, or small images."""
    n, channels, height, width = a.x.shape
    outputs = len(a.weight)
    # From sizes: where a size is 1, a stride may be anything.
    image, strides = [n, height, width, channels], [height * width * channels, width * channels, channels, 1]
    block_c, block_k = min(128, channels & -channels), min(128, max(16, next_power_of_2(outputs)))
    blocks = ceil_div(outputs, block_k)
    few = n * height * width * blocks < _FEW_TILES * 128
    rows = max(1, (64 if few else 128) // width)
    images, rows = max(1, rows // height), min(rows, height)
    launch(
        _conv3x3_fp8_tiled_kernel, (ceil_div(n * height, images * rows) * blocks,), a.x.device,
        TensorDescriptor(a.x, image, strides, [images, rows, width, block_c]),
        TensorDescriptor(a.weight, [outputs, 9 * channels], [9 * channels, 1], [block_k, block_c]),
        a.scale.contiguous(),
        None if a.bias is None else a.bias.contiguous(), out, n * height * width, height, channels, outputs, blocks,
        N=images, H=rows, W=width, BK=block_k, BC=block_c, HAS_BIAS=a.bias is not None,
        INTERPRETED=triton_launch.interpreted(), num_warps=4 if few else 8, num_stages=3,
    )  # fmt: skip
    return out
