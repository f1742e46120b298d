"""add_bias by one Triton kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import triton_launch
from ..triton_launch import ceil_div, launch, next_power_of_2, unavailable
from . import Arguments, reference

__all__ = ["forward", "unavailable", "unsupported"]

_ELEMENTS = 4096  # of a program
_CHANNELS = 128  # of a program, at most


def unsupported(x: Tensor, **rest: object) -> str | None:
    """Return why these arguments are left to another backend, or None."""
    if x.numel() >= 2**31:
        return f"the Triton kernel takes images below 2^31 elements in all, not {tuple(x.shape)}"
    return triton_launch.unsupported(x=x, **rest)


@triton.jit
def _add_bias_kernel(x, bias, first, second, out, rows, channels, R: tl.constexpr, C: tl.constexpr):
    """Compute R pixels by C channels of images in channels_last; grid (blocks of pixels, blocks of channels)."""
    r, c = tl.program_id(0) * R + tl.arange(0, R), tl.program_id(1) * C + tl.arange(0, C)
    mask = (r < rows)[:, None] & (c < channels)[None, :]
    at = r[:, None] * channels + c[None, :]
    total = tl.load(x + at, mask, 0.0).to(tl.float32)
    total += tl.load(bias + c, c < channels, 0.0).to(tl.float32)[None, :]
    if first is not None:
        total += tl.load(first + at, mask, 0.0).to(tl.float32)
    if second is not None:
        total += tl.load(second + at, mask, 0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask)


def forward(a: Arguments) -> Tensor:
    """Compute the same as the reference."""
    if a.x.numel() == 0:
        return reference.forward(a)
    images = [
        None if image is None else image.contiguous(memory_format=torch.channels_last)
        for image in (a.x, a.first, a.second)
    ]
    out = torch.empty_like(a.x, memory_format=torch.channels_last)
    channels = a.x.shape[1]
    rows = a.x.numel() // channels
    block_c = min(_CHANNELS, next_power_of_2(channels))
    block_r = _ELEMENTS // block_c
    launch(
        _add_bias_kernel, (ceil_div(rows, block_r), ceil_div(channels, block_c)), a.x.device,
        images[0], a.bias.contiguous(), *images[1:], out, rows, channels, R=block_r, C=block_c, num_warps=4,
    )  # fmt: skip
    return out
