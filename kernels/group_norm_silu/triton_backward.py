"""The backward kernels of group_norm_silu. They take an image whole or in chunks, as the forward kernels do.

With g the gradient before SiLU and dropout and u = g gain: dx = (u - mean(u) - x_hat mean(u x_hat)) / deviation, means
over the group. Sums over pixels are kept per channel, because the gradients of scale, shift, weight and bias need them.
"""

import triton
import triton.language as tl

from .triton_forward import (
    dropout_factor,
    gain_and_offset,
    group_sums,
    load_temb,
    load_tile,
    of_groups,
    offsets,
    sigmoid_of,
)


@triton.jit
def _load_inside(x, skip, n, p, c0, c, pixels, c1, c2, NHWC: tl.constexpr, HAS_SKIP: tl.constexpr):
    """Load a tile without borders, which lies in one of the two tensors, as float32."""
    base, inside = offsets(n, p, c, pixels, c1, NHWC)
    if HAS_SKIP:
        if c0 < c1:
            values = tl.load(x + base + inside).to(tl.float32)
        else:
            base, inside = offsets(n, p, c - c1, pixels, c2, NHWC)
            values = tl.load(skip + base + inside).to(tl.float32)
    else:
        values = tl.load(x + base + inside).to(tl.float32)
    return values


@triton.jit
def _x_hat_and_g(
    grad, x, skip, mean_c, rstd_c, gain, offset, images, seed, step, n, p, c0, c, mask, pixels, c1, c2,
    stream, threshold, C: tl.constexpr, NHWC: tl.constexpr,
    HAS_SKIP: tl.constexpr, SILU: tl.constexpr, DROPOUT: tl.constexpr, EIGHTS: tl.constexpr, FAST: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Return the normalised input, and the gradient before SiLU and dropout, whose input and mask are recomputed."""
    if EVEN:
        h = _load_inside(x, skip, n, p, c0, c, pixels, c1, c2, NHWC, HAS_SKIP)
    else:
        h = load_tile(x, skip, n, p, c, mask, pixels, c1, c2, NHWC, HAS_SKIP)
    x_hat = tl.where(mask, (h - mean_c[None, :]) * rstd_c[None, :], 0.0)
    base, inside = offsets(n, p, c, pixels, c1 + c2, NHWC)
    g = tl.load(grad + base + inside, mask, 0.0).to(tl.float32)
    if DROPOUT:
        g *= dropout_factor(p, c0, c1 + c2, n, images, seed, step, stream, threshold, C, EIGHTS)
    if SILU:
        y = x_hat * gain[None, :] + offset[None, :]
        sigmoid = sigmoid_of(y, FAST)
        g *= sigmoid * (1.0 + y * (1.0 - sigmoid))
    return x_hat, g


@triton.jit
def _moments(
    mean, rstd, temb, temb_stride, n, g0, groups, c, c_mask,
    GB: tl.constexpr, CPG: tl.constexpr, C: tl.constexpr, G: tl.constexpr, HAS_TEMB: tl.constexpr,
):  # fmt: skip
    """Return the number subtracted from x and the factor of the difference, both (C,)."""
    g = tl.arange(0, G)
    g_mask = (g < GB) & (g0 + g < groups)
    mean_c = of_groups(tl.load(mean + n * groups + g0 + g, g_mask, 0.0), C, CPG, G)
    rstd_c = of_groups(tl.load(rstd + n * groups + g0 + g, g_mask, 0.0), C, CPG, G)
    if HAS_TEMB:
        mean_c -= load_temb(temb, n, c, c_mask, temb_stride)
    return mean_c, rstd_c


@triton.jit
def _store_sum(grad, added, values, at, mask):
    """Store values, or values + added."""
    if added is not None:
        values += tl.load(added + at, mask, 0.0).to(tl.float32)
    tl.store(grad + at, values.to(grad.dtype.element_ty), mask)


@triton.jit
def _store_tile(
    grad_x, grad_skip, added_x, added_skip, values, n, p, c0, c, mask, pixels, c1, c2,
    NHWC: tl.constexpr, HAS_SKIP: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Store each channel to the gradient of x or of skip, where it belongs. EVEN: all belong to one of them."""
    base, inside = offsets(n, p, c, pixels, c1, NHWC)
    if not HAS_SKIP:
        _store_sum(grad_x, added_x, values, base + inside, mask)
    elif EVEN:
        if c0 < c1:
            _store_sum(grad_x, added_x, values, base + inside, mask)
        else:
            base, inside = offsets(n, p, c - c1, pixels, c2, NHWC)
            _store_sum(grad_skip, added_skip, values, base + inside, mask)
    else:
        first = (c < c1)[None, :]
        _store_sum(grad_x, added_x, values, base + inside, mask & first)
        base, inside = offsets(n, p, c - c1, pixels, c2, NHWC)
        _store_sum(grad_skip, added_skip, values, base + inside, mask & ~first)


@triton.jit
def _store_parameters(
    grad_gain, grad_offset, weight, bias, scale, parts, grad_scale, grad_shift, n, num_n, c, mask, channels,
    HAS_AFFINE: tl.constexpr,
):  # fmt: skip
    """Store an image's gradients of scale and shift, and its part of those of weight and bias in parts (2, N, C)."""
    at = n.to(tl.int64) * channels + c
    if HAS_AFFINE:
        w, b = tl.load(weight + c, mask, 0.0).to(tl.float32), tl.load(bias + c, mask, 0.0).to(tl.float32)
        tl.store(grad_scale + at, (grad_gain * w + grad_offset * b).to(grad_scale.dtype.element_ty), mask)
        tl.store(grad_shift + at, grad_offset.to(grad_shift.dtype.element_ty), mask)
        factor = 1.0 + tl.load(scale + at, mask, 0.0).to(tl.float32)
        grad_gain *= factor
        grad_offset *= factor
    tl.store(parts + at, grad_gain, mask)
    tl.store(parts + num_n.to(tl.int64) * channels + at, grad_offset, mask)


@triton.jit
def _group_norm_silu_backward_whole_kernel(
    grad, x, skip, temb, weight, bias, scale, shift, mean, rstd, images, seed, step,
    added_x, added_skip, grad_x, grad_skip, grad_temb, grad_scale, grad_shift, parts,
    blocks, pixels, c1, c2, groups, temb_stride, stream, threshold,
    CPG: tl.constexpr, GB: tl.constexpr, P: tl.constexpr, C: tl.constexpr, G: tl.constexpr, NHWC: tl.constexpr,
    HAS_SKIP: tl.constexpr, HAS_TEMB: tl.constexpr, HAS_AFFINE: tl.constexpr,
    SILU: tl.constexpr, DROPOUT: tl.constexpr, EIGHTS: tl.constexpr, EVEN: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Compute all gradients of GB groups of one image, all pixels at once; grid (N x blocks of groups,).

    EVEN: the tile has P pixels and GB CPG channels, of one tensor, and needs no masks.
    """
    n, g0 = tl.program_id(0) // blocks, tl.program_id(0) % blocks * GB
    channels, c0 = c1 + c2, g0 * CPG
    p, c = tl.arange(0, P), c0 + tl.arange(0, C)
    c_mask = tl.full([C], 1, tl.int1) if EVEN else (tl.arange(0, C) < GB * CPG) & (c < channels)
    mask = tl.full([P, C], 1, tl.int1) if EVEN else (p < pixels)[:, None] & c_mask[None, :]
    mean_c, rstd_c = _moments(mean, rstd, temb, temb_stride, n, g0, groups, c, c_mask, GB, CPG, C, G, HAS_TEMB)
    gain, offset = gain_and_offset(weight, bias, scale, shift, n, c, c_mask, channels, HAS_AFFINE)
    x_hat, g = _x_hat_and_g(
        grad, x, skip, mean_c, rstd_c, gain, offset, images, seed, step, n, p, c0, c, mask, pixels, c1, c2,
        stream, threshold, C, NHWC, HAS_SKIP, SILU, DROPOUT, EIGHTS, FAST, EVEN,
    )  # fmt: skip
    grad_gain, grad_offset = tl.sum(g * x_hat, axis=0), tl.sum(g, axis=0)
    _store_parameters(
        grad_gain, grad_offset, weight, bias, scale, parts, grad_scale, grad_shift, n, tl.num_programs(0) // blocks,
        c, c_mask, channels, HAS_AFFINE,
    )  # fmt: skip
    ux_mean = of_groups(group_sums(grad_gain * gain, C, CPG, G) / (pixels * CPG), C, CPG, G)
    u_mean = of_groups(group_sums(grad_offset * gain, C, CPG, G) / (pixels * CPG), C, CPG, G)
    dx = (g * gain[None, :] - u_mean[None, :] - x_hat * ux_mean[None, :]) * rstd_c[None, :]
    if HAS_TEMB:
        total = tl.sum(tl.where(mask, dx, 0.0), axis=0)
        tl.store(grad_temb + n.to(tl.int64) * channels + c, total.to(grad_temb.dtype.element_ty), c_mask)
    _store_tile(grad_x, grad_skip, added_x, added_skip, dx, n, p, c0, c, mask, pixels, c1, c2, NHWC, HAS_SKIP, EVEN)


@triton.jit
def _chunk_sums(
    grad, x, skip, mean_c, rstd_c, gain, offset, images, seed, step, n, piece, chunk, c0, c, c_mask, pixels, c1, c2,
    stream, threshold, P: tl.constexpr, C: tl.constexpr, NHWC: tl.constexpr,
    HAS_SKIP: tl.constexpr, SILU: tl.constexpr, DROPOUT: tl.constexpr, EIGHTS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Return the sums of g x_hat and of g over one chunk of pixels, per channel: both (C,)."""
    grad_gain, grad_offset = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    end = tl.minimum((piece + 1) * chunk, pixels)
    for start in range(piece * chunk, end, P):
        p = start + tl.arange(0, P)
        mask = (p < end)[:, None] & c_mask[None, :]
        x_hat, g = _x_hat_and_g(
            grad, x, skip, mean_c, rstd_c, gain, offset, images, seed, step, n, p, c0, c, mask, pixels, c1, c2,
            stream, threshold, C, NHWC, HAS_SKIP, SILU, DROPOUT, EIGHTS, FAST, False,
        )  # fmt: skip
        grad_gain += tl.sum(g * x_hat, axis=0)
        grad_offset += tl.sum(g, axis=0)
    return grad_gain, grad_offset


@triton.jit
def _group_norm_silu_backward_sums_kernel(
    grad, x, skip, temb, weight, bias, scale, shift, mean, rstd, images, seed, step, sums,
    blocks, pixels, c1, c2, groups, temb_stride, chunk, stream, threshold,
    CPG: tl.constexpr, GB: tl.constexpr, P: tl.constexpr, C: tl.constexpr, G: tl.constexpr, NHWC: tl.constexpr,
    HAS_SKIP: tl.constexpr, HAS_TEMB: tl.constexpr, HAS_AFFINE: tl.constexpr,
    SILU: tl.constexpr, DROPOUT: tl.constexpr, EIGHTS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Store `_chunk_sums` in sums, float32 (2, N, chunks, channels); grid (N x blocks, chunks)."""
    n, piece, g0 = tl.program_id(0) // blocks, tl.program_id(1), tl.program_id(0) % blocks * GB
    num_n, chunks = tl.num_programs(0) // blocks, tl.num_programs(1)
    channels, c0 = c1 + c2, g0 * CPG
    c = c0 + tl.arange(0, C)
    c_mask = (tl.arange(0, C) < GB * CPG) & (c < channels)
    mean_c, rstd_c = _moments(mean, rstd, temb, temb_stride, n, g0, groups, c, c_mask, GB, CPG, C, G, HAS_TEMB)
    gain, offset = gain_and_offset(weight, bias, scale, shift, n, c, c_mask, channels, HAS_AFFINE)
    grad_gain, grad_offset = _chunk_sums(
        grad, x, skip, mean_c, rstd_c, gain, offset, images, seed, step, n, piece, chunk, c0, c, c_mask, pixels,
        c1, c2, stream, threshold, P, C, NHWC, HAS_SKIP, SILU, DROPOUT, EIGHTS, FAST,
    )  # fmt: skip
    at = (n.to(tl.int64) * chunks + piece) * channels + c
    tl.store(sums + at, grad_gain, c_mask)
    tl.store(sums + num_n.to(tl.int64) * chunks * channels + at, grad_offset, c_mask)


@triton.jit
def _group_norm_silu_backward_apply_kernel(
    grad, x, skip, temb, weight, bias, scale, shift, mean, rstd, images, seed, step, sums,
    added_x, added_skip, grad_x, grad_skip, temb_sums, grad_scale, grad_shift, parts,
    blocks, pixels, c1, c2, groups, temb_stride, chunk, stream, threshold,
    CPG: tl.constexpr, GB: tl.constexpr, P: tl.constexpr, C: tl.constexpr, G: tl.constexpr, NHWC: tl.constexpr,
    HAS_SKIP: tl.constexpr, HAS_TEMB: tl.constexpr, HAS_AFFINE: tl.constexpr,
    SILU: tl.constexpr, DROPOUT: tl.constexpr, EIGHTS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Compute dx of one chunk; grid (N x blocks, chunks). temb_sums: (N, chunks, channels), the sums of dx per chunk.

    The sums over all pixels are added up from `sums`; if that is None, a first loop over the image computes them.
    """
    n, piece, g0 = tl.program_id(0) // blocks, tl.program_id(1), tl.program_id(0) % blocks * GB
    num_n, chunks = tl.num_programs(0) // blocks, tl.num_programs(1)
    channels, c0 = c1 + c2, g0 * CPG
    c = c0 + tl.arange(0, C)
    c_mask = (tl.arange(0, C) < GB * CPG) & (c < channels)
    mean_c, rstd_c = _moments(mean, rstd, temb, temb_stride, n, g0, groups, c, c_mask, GB, CPG, C, G, HAS_TEMB)
    gain, offset = gain_and_offset(weight, bias, scale, shift, n, c, c_mask, channels, HAS_AFFINE)
    if sums is None:
        grad_gain, grad_offset = _chunk_sums(
            grad, x, skip, mean_c, rstd_c, gain, offset, images, seed, step, n, piece, chunk, c0, c, c_mask, pixels,
            c1, c2, stream, threshold, P, C, NHWC, HAS_SKIP, SILU, DROPOUT, EIGHTS, FAST,
        )  # fmt: skip
    else:
        grad_gain, grad_offset = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
        for k in range(0, chunks):
            at = (n.to(tl.int64) * chunks + k) * channels + c
            grad_gain += tl.load(sums + at, c_mask, 0.0)
            grad_offset += tl.load(sums + num_n.to(tl.int64) * chunks * channels + at, c_mask, 0.0)
    if piece == 0:
        _store_parameters(
            grad_gain, grad_offset, weight, bias, scale, parts, grad_scale, grad_shift, n, num_n, c, c_mask, channels,
            HAS_AFFINE,
        )  # fmt: skip
    ux_mean = of_groups(group_sums(grad_gain * gain, C, CPG, G) / (pixels * CPG), C, CPG, G)
    u_mean = of_groups(group_sums(grad_offset * gain, C, CPG, G) / (pixels * CPG), C, CPG, G)
    total = tl.zeros([C], tl.float32)
    end = tl.minimum((piece + 1) * chunk, pixels)
    for start in range(piece * chunk, end, P):
        p = start + tl.arange(0, P)
        mask = (p < end)[:, None] & c_mask[None, :]
        x_hat, g = _x_hat_and_g(
            grad, x, skip, mean_c, rstd_c, gain, offset, images, seed, step, n, p, c0, c, mask, pixels, c1, c2,
            stream, threshold, C, NHWC, HAS_SKIP, SILU, DROPOUT, EIGHTS, FAST, False,
        )  # fmt: skip
        dx = (g * gain[None, :] - u_mean[None, :] - x_hat * ux_mean[None, :]) * rstd_c[None, :]
        if HAS_TEMB:
            total += tl.sum(tl.where(mask, dx, 0.0), axis=0)
        _store_tile(
            grad_x, grad_skip, added_x, added_skip, dx, n, p, c0, c, mask, pixels, c1, c2, NHWC, HAS_SKIP, False
        )
    if HAS_TEMB:
        at = (n.to(tl.int64) * chunks + piece) * channels + c
        tl.store(temb_sums + at, total.to(temb_sums.dtype.element_ty), c_mask)


@triton.jit
def _group_norm_silu_sum_kernel(values, out0, out1, rows, channels, R: tl.constexpr, C: tl.constexpr):
    """Sum values (M, rows, channels) over the rows, in a fixed order; grid (blocks of channels, M).

    out0: (M, channels). With out1, M is 2: the first sum goes to out0 (channels,), the second to out1 (channels,).
    """
    which, c = tl.program_id(1), tl.program_id(0) * C + tl.arange(0, C)
    total = tl.zeros([C], tl.float32)
    for start in range(0, rows, R):
        r = start + tl.arange(0, R)
        at = (which.to(tl.int64) * rows + r)[:, None] * channels + c[None, :]
        total += tl.sum(tl.load(values + at, (r < rows)[:, None] & (c < channels)[None, :], 0.0), axis=0)
    if out1 is None:
        tl.store(out0 + which.to(tl.int64) * channels + c, total.to(out0.dtype.element_ty), c < channels)
    else:
        if which == 0:
            tl.store(out0 + c, total.to(out0.dtype.element_ty), c < channels)
        else:
            tl.store(out1 + c, total.to(out1.dtype.element_ty), c < channels)
