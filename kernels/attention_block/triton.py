"""attention_block by two Triton kernels: one reads the image for its norm's moments, one computes all of the block.

Softmax ignores what belongs to a row alone, and the weights of a row sum to 1. So with n = gain x + offset per channel
the scores are (gain q) . x, the mixed rows gain (P x) + offset: the image itself, which is also what the block adds to,
takes the place of keys and values, and no normalised image is stored. Rows of keys are taken a piece at a time, with a
running maximum (Milakov and Gimelshein 2018). There are no atomics: the same bits on every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import triton_launch
from ..group_norm_silu.triton_even import load_part, unit_sums, wide
from ..group_norm_silu.triton_forward import group_sums, of_groups
from ..triton_launch import ceil_div, launch, next_power_of_2, unavailable
from ..triton_tiles import chip
from . import CHANNEL_BYTES, Arguments, reference

__all__ = ["forward", "unavailable", "unsupported"]

_TOKENS = 1024
_ROW = 64  # bytes of a row of channels that a program of the moments reads at least


def unsupported(x: Tensor, **rest: object) -> str | None:
    """Return why these arguments, by name, are left to another backend, or None."""
    channels, tokens = x.shape[1], x.shape[2] * x.shape[3]
    most = CHANNEL_BYTES // x.element_size()
    if tokens > _TOKENS or channels > most:
        return f"the Triton kernels take up to {_TOKENS} tokens of {most} channels, not {tokens} of {channels}"
    return triton_launch.unsupported(x=x, **rest)


@triton.jit
def _norm_moments_kernel(
    x, residual, total, added, weight, bias, gain_out, offset_out, pixels, channels, groups, blocks, eps,
    CPG: tl.constexpr, GB: tl.constexpr, P: tl.constexpr, C: tl.constexpr, G: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_ADDED: tl.constexpr,
):  # fmt: skip
    """Store the norm of GB groups of one image as a gain and an offset of each channel; grid (N x blocks of groups,).

    HAS_RESIDUAL: x + residual takes the place of x, and is stored in `total`.
    """
    n, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    p, c = tl.arange(0, P), block * GB * CPG + tl.arange(0, C)
    c_mask = (tl.arange(0, C) < GB * CPG) & (c < channels)
    mask = (p < pixels)[:, None] & c_mask[None, :]
    at = n.to(tl.int64) * pixels * channels + p[:, None] * channels + c[None, :]
    h = tl.load(x + at, mask, 0.0).to(tl.float32)
    if HAS_RESIDUAL:
        h += tl.load(residual + at, mask, 0.0).to(tl.float32)
        tl.store(total + at, h.to(total.dtype.element_ty), mask)
    sums, count = tl.sum(h, axis=0), 1.0 * pixels * CPG
    if HAS_ADDED:
        more = tl.load(added + c, c_mask, 0.0).to(tl.float32)
        sums += more * pixels
    mean = of_groups(group_sums(sums, C, CPG, G) / count, C, CPG, G)
    if HAS_ADDED:
        mean -= more
    centred = tl.where(mask, h - mean[None, :], 0.0)
    variance = group_sums(tl.sum(centred * centred, axis=0), C, CPG, G) / count
    gain = of_groups(1.0 / tl.sqrt(variance + eps), C, CPG, G) * tl.load(weight + c, c_mask, 0.0).to(tl.float32)
    offset = tl.load(bias + c, c_mask, 0.0).to(tl.float32) - mean * gain
    tl.store(gain_out + n * channels + c, gain, c_mask)
    tl.store(offset_out + n * channels + c, offset, c_mask)


@triton.jit
def _norm_moments_even_kernel(
    x, residual, total, added, weight, bias, gain_out, offset_out, groups, blocks, eps,
    CPG: tl.constexpr, GB: tl.constexpr, P: tl.constexpr, CHANNELS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_ADDED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Store the same for tiles without borders. PACKED: x is bfloat16, and stays so in registers."""
    n, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    C: tl.constexpr = GB * CPG
    c = block * C + tl.arange(0, C)
    kept = load_part(x, None, residual, total, n, block * C, P, C, CHANNELS, 0, True, False, HAS_RESIDUAL)
    sums, count = unit_sums(wide(kept, 0, PACKED), CPG), 1.0 * P * CPG
    if HAS_ADDED:
        more = tl.load(added + c).to(tl.float32)
        sums += unit_sums(more, CPG) * P
    mean = tl.reshape(tl.broadcast_to((sums / count)[:, None], [GB, CPG]), [C])
    if HAS_ADDED:
        mean -= more
    centred = wide(kept, groups >> 31, PACKED) - mean[None, :]
    rstd = 1.0 / tl.sqrt(unit_sums(centred * centred, CPG) / count + eps)
    gain = tl.reshape(tl.broadcast_to(rstd[:, None], [GB, CPG]), [C]) * tl.load(weight + c).to(tl.float32)
    offset = tl.load(bias + c).to(tl.float32) - mean * gain
    tl.store(gain_out + n * CHANNELS + c, gain)
    tl.store(offset_out + n * CHANNELS + c, offset)


@triton.jit
def _product(a, b, total, PRECISION: tl.constexpr):
    """Return a b + total by the matrix unit, summed in float32."""
    if PRECISION == "interpreted":  # the interpreter multiplies the bits of bfloat16 as if they were integers
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _attention_block_kernel(
    x, gain, offset, query, query_bias, value, value_bias, out, tokens, channels, blocks, scale,
    BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute BM rows of one image; grid (N x blocks,). BN: rows of keys at a time, BK: columns of the linear layers.

    BC: all channels. query, value: (channels, channels), of outputs by inputs.
    """
    n = tl.program_id(0) // blocks
    i, d = tl.program_id(0) % blocks * BM + tl.arange(0, BM), tl.arange(0, BC)
    dtype = x.dtype.element_ty
    x += n.to(tl.int64) * tokens * channels
    inside = d < channels
    by_channel = tl.load(gain + n * channels + d, inside, 0.0)
    shift = tl.load(offset + n * channels + d, inside, 0.0)

    q = tl.zeros([BM, BC], tl.float32)
    for start in range(0, channels, BK):
        e = start + tl.arange(0, BK)
        some = e < channels
        rows = tl.load(x + i[:, None] * channels + e[None, :], (i < tokens)[:, None] & some[None, :], 0.0)
        normed = rows.to(tl.float32) * tl.load(gain + n * channels + e, some, 0.0)[None, :]
        normed += tl.load(offset + n * channels + e, some, 0.0)[None, :]
        weight = tl.load(query + d[None, :] * channels + e[:, None], some[:, None] & inside[None, :], 0.0)
        q = _product(normed.to(dtype), weight, q, PRECISION)
    q += tl.load(query_bias + d, inside, 0.0).to(tl.float32)[None, :]
    q = (q * (by_channel * scale)[None, :]).to(dtype)

    highest, weights = tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32)
    mixed = tl.zeros([BM, BC], tl.float32)
    for start in range(0, tokens, BN):
        j = start + tl.arange(0, BN)
        keys = tl.load(x + j[:, None] * channels + d[None, :], (j < tokens)[:, None] & inside[None, :], 0.0)
        scores = _product(q, tl.trans(keys), tl.zeros([BM, BN], tl.float32), PRECISION)
        scores = tl.where((j < tokens)[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        shrunk = tl.exp(highest - higher)
        # Divided by the sum of the rounded weights: the output stays a mean of the values.
        part = tl.exp(scores - higher[:, None]).to(dtype)
        weights = weights * shrunk + tl.sum(part.to(tl.float32), axis=1)
        mixed = _product(part, keys, mixed * shrunk[:, None], PRECISION)
        highest = higher
    mixed = (mixed / weights[:, None] * by_channel[None, :] + shift[None, :]).to(dtype)

    for start in range(0, channels, BK):
        f = start + tl.arange(0, BK)
        some = f < channels
        weight = tl.load(value + f[None, :] * channels + d[:, None], inside[:, None] & some[None, :], 0.0)
        result = _product(mixed, weight, tl.zeros([BM, BK], tl.float32), PRECISION)
        result += tl.load(value_bias + f, some, 0.0).to(tl.float32)[None, :]
        at, mask = i[:, None] * channels + f[None, :], (i < tokens)[:, None] & some[None, :]
        result += tl.load(x + at, mask, 0.0).to(tl.float32)
        tl.store(out + n.to(tl.int64) * tokens * channels + at, result.to(dtype), mask)


def forward(a: Arguments) -> Tensor:
    """Compute the same as the reference; float32 keeps its digits."""
    if a.x.numel() == 0:
        return reference.forward(a)
    x = a.x.contiguous(memory_format=torch.channels_last)
    residual = None if a.residual is None else a.residual.contiguous(memory_format=torch.channels_last)
    n, channels, height, width = x.shape
    tokens, cpg = height * width, channels // a.groups
    total = None if residual is None else torch.empty_like(x)
    gain, offset = (torch.empty((n, channels), dtype=torch.float32, device=x.device) for _ in range(2))
    together = min(a.groups, max(1, _ROW // x.element_size() // cpg))
    blocks, block_p, block_c = ceil_div(a.groups, together), next_power_of_2(tokens), next_power_of_2(together * cpg)
    norm = (x, residual, total, a.added, a.norm_weight, a.norm_bias, gain, offset)
    options = {
        "CPG": cpg, "GB": together, "P": block_p, "HAS_RESIDUAL": residual is not None,
        "HAS_ADDED": a.added is not None, "num_warps": min(16, max(1, block_p * block_c // 2048)),
    }  # fmt: skip
    if block_p == tokens and block_c == together * cpg and blocks * block_c == channels:
        packed = not triton_launch.interpreted() and torch.version.hip is None and x.dtype == torch.bfloat16
        launch(
            _norm_moments_even_kernel, (n * blocks,), x.device,
            *norm, a.groups, blocks, a.eps, CHANNELS=channels, PACKED=packed, **options,
        )  # fmt: skip
    else:
        launch(
            _norm_moments_kernel, (n * blocks,), x.device,
            *norm, tokens, channels, a.groups, blocks, a.eps, C=block_c, G=next_power_of_2(together), **options,
        )  # fmt: skip
    image = x if total is None else total
    out = torch.empty_like(x)
    wide = x.dtype == torch.float32
    amd = chip(x.device).startswith("gfx")
    # The most that the registers hold: the rows' queries, and later their mixed keys, of all channels.
    rows, step = (32, 32 if channels <= 64 else 16) if wide else (32, 32) if amd else (64, 64)
    rows = min(rows, max(16, next_power_of_2(tokens)))
    pieces = ceil_div(tokens, rows)
    launch(
        _attention_block_kernel, (n * pieces,), x.device,
        image, gain, offset, a.query.contiguous(), a.query_bias, a.value.contiguous(), a.value_bias, out,
        tokens, channels, pieces, a.scale,
        BM=rows, BN=min(step, max(16, next_power_of_2(tokens))), BC=max(16, next_power_of_2(channels)),
        BK=min(step, max(16, next_power_of_2(channels))), PRECISION=triton_launch.precision(x.dtype),
        num_warps=8 if rows >= 32 and not amd else 4, num_stages=2,
    )  # fmt: skip
    return out
