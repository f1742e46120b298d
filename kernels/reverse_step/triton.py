"""reverse_step by one Triton kernel, in place."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import triton_launch
from ..philox import STREAM_REVERSE
from ..philox.triton import normals
from ..triton_launch import ceil_div, launch, unavailable
from . import COLUMNS, FIXED, LEARNED, Arguments

__all__ = ["forward", "unavailable", "unsupported"]

_BLOCKS = 256  # Philox blocks, of four elements each, per program


def unsupported(x: Tensor, out: Tensor, **rest: object) -> str | None:
    """Return why these arguments of forward, by name, are left to another backend, or None."""
    if out[:1].numel() >= 2**31 - 4 * _BLOCKS:
        return f"the Triton kernels take images below 2^31 elements, not {tuple(out.shape[1:])}"
    return triton_launch.elsewhere(x=x, out=out, **rest)


@triton.jit
def _places(i, n, c, height, width, stride_n, stride_c, stride_h, stride_w):
    """Return the offsets of elements i of image n, counted in (C, H, W) order from channel c."""
    row = i // width
    channel = c + row // height
    inside = channel.to(tl.int64) * stride_c + (row % height).to(tl.int64) * stride_h
    return n.to(tl.int64) * stride_n + inside + (i % width).to(tl.int64) * stride_w


@triton.jit
def _reverse_step_kernel(
    x, out, table, timesteps, index, noise, x0, images, seed, num, channels, height, width, steps, pieces,
    x_n, x_c, x_h, x_w, out_n, out_c, out_h, out_w, x0_n, x0_c, x0_h, x0_w, clip, stream,
    B: tl.constexpr, COLUMNS: tl.constexpr, X_DENSE: tl.constexpr, OUT_DENSE: tl.constexpr,
    CLIP: tl.constexpr, LEARNED_VARIANCE: tl.constexpr, RANGE: tl.constexpr,
):  # fmt: skip
    """Take the step for 4 B elements of one image, in (C, H, W) order; grid (N x pieces,)."""
    n, first = tl.program_id(0) // pieces, tl.program_id(0) % pieces * B
    i = 4 * first + tl.arange(0, 4 * B)
    mask = i < num
    at = tl.load(index)
    exists = (at >= 0) & (at < steps)
    row = table + at * COLUMNS
    nan = float("nan")

    x_at = n.to(tl.int64) * num + i if X_DENSE else _places(i, n, 0, height, width, x_n, x_c, x_h, x_w)
    out_at = n.to(tl.int64) * out_n + i if OUT_DENSE else _places(i, n, 0, height, width, out_n, out_c, out_h, out_w)
    x_t = tl.load(x + x_at, mask, 0.0)
    prediction = tl.load(out + out_at, mask, 0.0).to(tl.float32)
    x0_hat = tl.load(row, exists, nan) * x_t + tl.load(row + 1, exists, nan) * prediction
    if CLIP:
        # Comparisons, because they leave NaN as it is.
        x0_hat = tl.where(x0_hat > clip, clip, tl.where(x0_hat < -clip, -clip, x0_hat))
    mean = tl.load(row + 2, exists, nan) * x0_hat + tl.load(row + 3, exists, nan) * x_t
    mean += tl.load(row + 4, exists, nan) * prediction
    from_previous = tl.load(row + 8, exists, nan)
    if x0 is not None:
        x0_at = _places(i, n, 0, height, width, x0_n, x0_c, x0_h, x0_w)
        previous = tl.load(x0 + x0_at, i < tl.where(from_previous != 0, num, 0), 0.0)
    else:
        previous = tl.full([4 * B], nan, tl.float32)
    mean = tl.where(from_previous != 0, mean + from_previous * previous, mean)

    if noise is None:
        t = tl.load(timesteps + at, exists, 0)
        z = normals(first + tl.arange(0, B), tl.load(images + n), t, stream, tl.load(seed))
    else:
        z = tl.load(noise + n.to(tl.int64) * num + i, mask, 0.0)
    switch = tl.load(row + 5, exists, nan)
    sigma = tl.full([4 * B], 1.0, tl.float32) * switch
    if LEARNED_VARIANCE:
        if OUT_DENSE:
            variance_at = n.to(tl.int64) * out_n + num + i
        else:
            variance_at = _places(i, n, channels, height, width, out_n, out_c, out_h, out_w)
        log_variance = tl.load(out + variance_at, mask, 0.0).to(tl.float32)
        if RANGE:
            low, high = tl.load(row + 6, exists, nan), tl.load(row + 7, exists, nan)
            log_variance = low + (high - low) * (log_variance + 1.0) / 2.0
        # sigma is 1 or 0 here: it switches the noise off on the last step.
        sigma *= tl.exp(0.5 * log_variance)
    # On the last step sigma is 0 and the result must be the mean itself, whatever the noise is.
    tl.store(x + x_at, tl.where(switch > 0, mean + sigma * z, mean), mask)
    if x0 is not None:
        tl.store(x0 + x0_at, x0_hat, mask)


def forward(a: Arguments) -> None:
    """Compute the same as the reference, the noise within 1e-6; an index outside the table gives NaN, not an error."""
    x, out = a.x, a.out
    if x.numel() == 0:
        return
    if out.dtype not in triton_launch.DTYPES:
        out = out.to(torch.float32)
    n, c, height, width = x.shape
    num = c * height * width
    pieces = ceil_div(num, 4 * _BLOCKS)
    strides = (*x.stride(), *out.stride(), *(x if a.x0 is None else a.x0).stride())
    launch(
        _reverse_step_kernel, (n * pieces,), x.device,
        x, out, a.table.contiguous(), a.timesteps.contiguous(), a.index,
        None if a.noise is None else a.noise.contiguous(), a.x0, a.images.contiguous(), a.seed,
        num, c, height, width, len(a.table), pieces, *strides, float(a.clip), STREAM_REVERSE,
        B=_BLOCKS, COLUMNS=COLUMNS, X_DENSE=x.is_contiguous(), OUT_DENSE=out.is_contiguous(), CLIP=a.clip > 0,
        LEARNED_VARIANCE=a.variance != FIXED, RANGE=a.variance not in (FIXED, LEARNED), enable_fp_fusion=False,
    )  # fmt: skip
