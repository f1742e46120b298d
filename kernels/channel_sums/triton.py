"""channel_sums by a Triton kernel, launched once for parts of the pixels and once for the sums of the parts."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import triton_launch
from ..triton_launch import ceil_div, launch, next_power_of_2, unavailable
from . import Arguments, reference

__all__ = ["forward", "unavailable", "unsupported"]

_ROWS, _CHANNELS = 64, 64  # of a tile
_TURNS = 4  # tiles that a program adds up, at least
_PARTS = 512  # at most: their sums are one tile of the second launch
_LAST_CHANNELS = 16  # of a program of the second launch


def unsupported(x: Tensor) -> str | None:
    """Return why this argument is left to another backend, or None."""
    if x.numel() >= 2**31:
        return f"the Triton kernel takes images below 2^31 elements in all, not {tuple(x.shape)}"
    return triton_launch.unsupported(x=x)


@triton.jit
def _channel_sums_kernel(x, out, rows, channels, chunk, R: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr):
    """Sum `chunk` rows of x (rows, channels) into a row of out (parts, channels); grid (parts, blocks of channels).

    EVEN: all tiles are whole, and need no masks, behind which no load would wait for another.
    """
    c = tl.program_id(1) * C + tl.arange(0, C)
    begin = tl.program_id(0) * chunk
    end = tl.minimum(begin + chunk, rows)
    total = tl.zeros([R, C], tl.float32)  # summed over rows once: a sum in each turn would wait for all threads
    for start in range(begin, end, R):
        r = start + tl.arange(0, R)
        at = r[:, None] * channels + c[None, :]
        if EVEN:
            total += tl.load(x + at).to(tl.float32)
        else:
            total += tl.load(x + at, (r < end)[:, None] & (c < channels)[None, :], 0.0).to(tl.float32)
    tl.store(out + tl.program_id(0) * channels + c, tl.sum(total, axis=0), c < channels)


def forward(a: Arguments) -> Tensor:
    """Compute the same as the reference; the same bits on every run."""
    if a.x.numel() == 0:
        return reference.forward(a)
    x = a.x.contiguous(memory_format=torch.channels_last)
    channels = x.shape[1]
    rows = x.numel() // channels
    parts = max(1, min(_PARTS, ceil_div(rows, _TURNS * _ROWS)))
    chunk = ceil_div(ceil_div(rows, parts), _ROWS) * _ROWS
    parts = ceil_div(rows, chunk)
    out = torch.empty(channels, dtype=torch.float32, device=x.device)
    sums = out if parts == 1 else torch.empty(parts, channels, dtype=torch.float32, device=x.device)
    block_c = min(_CHANNELS, next_power_of_2(channels))
    launch(
        _channel_sums_kernel, (parts, ceil_div(channels, block_c)), x.device,
        x, sums, rows, channels, chunk, R=_ROWS, C=block_c, num_warps=4,
        EVEN=rows % chunk == 0 and channels % block_c == 0,
    )  # fmt: skip
    if parts > 1:
        launch(
            _channel_sums_kernel, (1, ceil_div(channels, _LAST_CHANNELS)), x.device,
            sums, out, parts, channels, parts, R=next_power_of_2(parts), C=_LAST_CHANNELS, num_warps=8,
            EVEN=False,
        )  # fmt: skip
    return out
