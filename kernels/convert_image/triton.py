"""convert_image by one Triton kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import triton_launch
from ..triton_launch import ceil_div, launch, next_power_of_2, unavailable
from . import Arguments, reference

__all__ = ["forward", "unavailable", "unsupported"]

_ELEMENTS = 4096  # of a program


def unsupported(x: Tensor, channels: int, **rest: object) -> str | None:
    """Return why these arguments are left to another backend, or None."""
    if max(x[:1].numel(), channels * x[0, :1].numel() if len(x) else 0) >= 2**31:
        return f"the Triton kernel takes images below 2^31 elements, not {tuple(x.shape[1:])}"
    return triton_launch.unsupported(x=x, **rest)


@triton.jit
def _convert_image_kernel(
    x, residual, bias, out, pixels, given, channels, blocks, x_n, x_p, x_c, residual_n, residual_p, residual_c,
    out_n, out_p, out_c,
    P: tl.constexpr, C: tl.constexpr, MIRRORED: tl.constexpr,
):  # fmt: skip
    """Compute P pixels of one image, and C of its channels; grid (N x blocks of pixels, blocks of channels)."""
    n = (tl.program_id(0) // blocks).to(tl.int64)
    p, c = tl.program_id(0) % blocks * P + tl.arange(0, P), tl.program_id(1) * C + tl.arange(0, C)
    source = pixels - 1 - p if MIRRORED else p
    inside = (p < pixels)[:, None] & (c < channels)[None, :]
    read = inside & (c < given)[None, :]
    value = tl.load(x + n * x_n + source[:, None] * x_p + c[None, :] * x_c, read, 0.0).to(tl.float32)
    if residual is not None:
        at = n * residual_n + source[:, None] * residual_p + c[None, :] * residual_c
        value += tl.load(residual + at, read, 0.0).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + c, c < tl.minimum(given, channels), 0.0).to(tl.float32)[None, :]
    tl.store(out + n * out_n + p[:, None] * out_p + c[None, :] * out_c, value.to(out.dtype.element_ty), inside)


def _strides(tensor: Tensor) -> tuple[int, int, int]:
    """Return the strides of images, pixels and channels of a dense image."""
    n, channels, height, width = tensor.stride()
    return n, width if tensor.shape[3] > 1 else height, channels


def _dense(tensor: Tensor) -> Tensor:
    """Return the image with rows of pixels side by side, as contiguous and channels_last images have them."""
    dense = tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)
    return tensor if dense else tensor.contiguous()


def forward(a: Arguments) -> Tensor:
    """Compute the same as the reference."""
    if a.x.numel() == 0:
        return reference.forward(a)
    x, residual = _dense(a.x), None if a.residual is None else _dense(a.residual)
    n, given, height, width = x.shape
    out = torch.empty((n, a.channels, height, width), dtype=a.dtype, device=x.device, memory_format=a.layout)
    pixels, block_c = height * width, next_power_of_2(min(a.channels, 256))
    block_p = min(next_power_of_2(pixels), max(1, _ELEMENTS // block_c))
    blocks = ceil_div(pixels, block_p)
    launch(
        _convert_image_kernel, (n * blocks, ceil_div(a.channels, block_c)), x.device,
        x, residual, a.bias, out, pixels, given, a.channels, blocks,
        *_strides(x), *_strides(x if residual is None else residual), *_strides(out),
        P=block_p, C=block_c, MIRRORED=a.mirrored, num_warps=4,
    )  # fmt: skip
    return out
