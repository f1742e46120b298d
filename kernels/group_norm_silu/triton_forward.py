"""The forward kernels of group_norm_silu.

A program takes whole groups of one image, in one of three ways:
- all pixels in registers, read once;
- one loop over tiles of pixels for the moments, and a second, which finds the pixels in the cache, for the output;
- one chunk of the pixels, with one kernel for the moments and another for the output.
The variance takes two passes over values in registers; moments of tiles and chunks are combined by Chan's formula.
"""

import triton
import triton.language as tl

from ..philox.triton import words


@triton.jit
def group_sums(values, C: tl.constexpr, CPG: tl.constexpr, G: tl.constexpr):
    """Sum (C,) values of channels over the CPG channels of each group: (G,). CPG need not be a power of two."""
    member = (tl.arange(0, C) // CPG)[:, None] == tl.arange(0, G)[None, :]
    return tl.sum(tl.where(member, values[:, None], 0.0), axis=0)


@triton.jit
def of_groups(values, C: tl.constexpr, CPG: tl.constexpr, G: tl.constexpr):
    """Repeat (G,) values of groups for the channels of each group: (C,)."""
    member = (tl.arange(0, C) // CPG)[:, None] == tl.arange(0, G)[None, :]
    return tl.sum(tl.where(member, values[None, :], 0.0), axis=1)


@triton.jit
def offsets(image, p, c, num_p, num_c, NHWC: tl.constexpr):
    """Return a tile's offsets in a dense (N, C, H, W) tensor: int64 of the image, and int32 of elements inside it."""
    inside = p[:, None] * num_c + c[None, :] if NHWC else c[None, :] * num_p + p[:, None]
    return image.to(tl.int64) * num_p * num_c, inside


@triton.jit
def load_tile(x, skip, n, p, c, mask, pixels, c1, c2, NHWC: tl.constexpr, HAS_SKIP: tl.constexpr):
    """Load channels c of concat(x, skip) as float32, each element from the tensor that has it."""
    base, inside = offsets(n, p, c, pixels, c1, NHWC)
    if HAS_SKIP:
        first = (c < c1)[None, :]
        values = tl.load(x + base + inside, mask & first, 0.0).to(tl.float32)
        base, inside = offsets(n, p, c - c1, pixels, c2, NHWC)
        behind = tl.load(skip + base + inside, mask & ~first, 0.0).to(tl.float32)
        return tl.where(first, values, behind)
    return tl.load(x + base + inside, mask, 0.0).to(tl.float32)


@triton.jit
def gain_and_offset(weight, bias, scale, shift, n, c, mask, channels, HAS_AFFINE: tl.constexpr):
    """Return the factor of x_hat and the number added to the product, both float32 (C,)."""
    gain = tl.load(weight + c, mask, 0.0).to(tl.float32)
    offset = tl.load(bias + c, mask, 0.0).to(tl.float32)
    if HAS_AFFINE:
        factor = 1.0 + tl.load(scale + n.to(tl.int64) * channels + c, mask, 0.0).to(tl.float32)
        gain = gain * factor
        offset = offset * factor + tl.load(shift + n.to(tl.int64) * channels + c, mask, 0.0).to(tl.float32)
    return gain, offset


@triton.jit
def load_temb(temb, n, c, mask, stride):
    return tl.load(temb + n.to(tl.int64) * stride + c, mask, 0.0).to(tl.float32)


@triton.jit
def dropout_factor(p, c0, channels, n, images, seed, step, stream, threshold, C: tl.constexpr, EIGHTS: tl.constexpr):
    """Return 0 or 1/(1-p) for each element of a tile of pixels p and channels c0 .. c0 + C - 1.

    Elements are counted in (H, W, C) order, eight to a Philox block, a half word each: low, then high. With EIGHTS
    (channels and c0 are multiples of 8) a block serves eight channels; otherwise each element draws its own.
    """
    image, key, at = tl.load(images + n), tl.load(seed), tl.load(step)
    if EIGHTS:
        block = p[:, None] * (channels // 8) + (c0 // 8 + tl.arange(0, C // 8))[None, :]
        w0, w1, w2, w3 = words(block, image, at, stream, key)
        # join makes a new last axis: element 4 i + 2 j + k of this is half i of word 2 j + k, counted as 0 1 2 3 | ...
        pairs = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # (P, C / 8, j, k)
        halves = tl.join(pairs & 0xFFFF, pairs >> 16)  # (P, C / 8, j, k, half)
        half = tl.reshape(halves, [p.shape[0], C])
    else:
        element = p[:, None] * channels + (c0 + tl.arange(0, C))[None, :]
        w0, w1, w2, w3 = words(element // 8, image, at, stream, key)
        number = (element % 8) // 2
        word = tl.where(number < 2, tl.where(number == 0, w0, w1), tl.where(number == 2, w2, w3))
        half = tl.where(element % 2 == 0, word & 0xFFFF, word >> 16)
    return tl.where(half.to(tl.int32) >= threshold, 65536.0 / (65536 - threshold), 0.0)


@triton.jit
def sigmoid_of(y, FAST: tl.constexpr):
    """Return 1 / (1 + exp(-y)). FAST: in four instructions of NVIDIA's chips, within 2^-21 of it for |y| <= 10."""
    if FAST:
        return tl.inline_asm_elementwise(
            """{
            .reg .f32 t;
            mul.ftz.f32 t, $1, 0fBFB8AA3B;
            ex2.approx.ftz.f32 t, t;
            add.ftz.f32 t, t, 0f3F800000;
            rcp.approx.ftz.f32 $0, t;
            }""",
            "=f,f", [y], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return 1.0 / (1.0 + tl.exp(-y))


@triton.jit
def group_norm_silu_tile(
    centred, rstd_c, gain, offset, p, c0, n, channels, images, seed, step, stream, threshold,
    C: tl.constexpr, SILU: tl.constexpr, DROPOUT: tl.constexpr, EIGHTS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Return the output of a tile, float32, from the input of the norm minus its mean."""
    y = centred * (rstd_c * gain)[None, :] + offset[None, :]
    if SILU:
        y = y * sigmoid_of(y, FAST)
    if DROPOUT:
        y *= dropout_factor(p, c0, channels, n, images, seed, step, stream, threshold, C, EIGHTS)
    return y


@triton.jit
def rstd_of(variance, eps, FAST: tl.constexpr):
    if FAST:
        return tl.rsqrt(variance + eps)
    else:
        return tl.div_rn(1.0, tl.sqrt_rn(variance + eps))


@triton.jit
def _group_norm_silu_whole_kernel(
    x, skip, temb, weight, bias, scale, shift, residual, total, y, mean_out, rstd_out, images, seed, step,
    blocks, pixels, c1, c2, groups, temb_stride, eps, stream, threshold,
    CPG: tl.constexpr, GB: tl.constexpr, P: tl.constexpr, C: tl.constexpr, G: tl.constexpr, NHWC: tl.constexpr,
    HAS_SKIP: tl.constexpr, HAS_TEMB: tl.constexpr, HAS_AFFINE: tl.constexpr,
    SILU: tl.constexpr, DROPOUT: tl.constexpr, EIGHTS: tl.constexpr, FAST: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, CLAMP: tl.constexpr,
):  # fmt: skip
    """Compute GB groups of one image, all pixels at once; grid (N x blocks of groups,).

    HAS_RESIDUAL: x + residual takes the place of x, and is stored in `total`. CLAMP: to the range of e4m3, in which y
    is stored then.
    """
    n, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    c0, g0 = block * GB * CPG, block * GB
    channels = c1 + c2
    p, c = tl.arange(0, P), c0 + tl.arange(0, C)
    c_mask = (tl.arange(0, C) < GB * CPG) & (c < channels)
    mask = (p < pixels)[:, None] & c_mask[None, :]
    h = load_tile(x, skip, n, p, c, mask, pixels, c1, c2, NHWC, HAS_SKIP)
    if HAS_RESIDUAL:
        base, inside = offsets(n, p, c, pixels, c1, NHWC)
        first = mask & (c < c1)[None, :]
        h += tl.load(residual + base + inside, first, 0.0).to(tl.float32)
        tl.store(total + base + inside, h.to(total.dtype.element_ty), first)
    count = 1.0 * pixels * CPG  # no method of a tensor: one pixel is a constant to the compiler
    sums = tl.sum(h, axis=0)
    if HAS_TEMB:
        added = load_temb(temb, n, c, c_mask, temb_stride)
        sums += added * pixels
    mean = group_sums(sums, C, CPG, G) / count
    mean_c = of_groups(mean, C, CPG, G)
    if HAS_TEMB:
        mean_c -= added
    centred = tl.where(mask, h - mean_c[None, :], 0.0)
    variance = group_sums(tl.sum(centred * centred, axis=0), C, CPG, G) / count
    rstd = rstd_of(variance, eps, FAST)
    rstd_c = of_groups(rstd, C, CPG, G)
    g = tl.arange(0, G)
    g_mask = (g < GB) & (g0 + g < groups)
    tl.store(mean_out + n * groups + g0 + g, mean, g_mask)
    tl.store(rstd_out + n * groups + g0 + g, rstd, g_mask)

    gain, offset = gain_and_offset(weight, bias, scale, shift, n, c, c_mask, channels, HAS_AFFINE)
    out = group_norm_silu_tile(
        centred, rstd_c, gain, offset, p, c0, n, channels,
        images, seed, step, stream, threshold, C, SILU, DROPOUT, EIGHTS, FAST,
    )  # fmt: skip
    base, inside = offsets(n, p, c, pixels, channels, NHWC)
    if CLAMP:
        out = tl.clamp(out, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(y + base + inside, out.to(y.dtype.element_ty), mask)


@triton.jit
def _chunk_moments(
    x, skip, temb, n, piece, chunk, c, c_mask, pixels, c1, c2, temb_stride,
    CPG: tl.constexpr, P: tl.constexpr, C: tl.constexpr, G: tl.constexpr, NHWC: tl.constexpr,
    HAS_SKIP: tl.constexpr, HAS_TEMB: tl.constexpr,
):  # fmt: skip
    """Return each group's mean over one chunk of an image, and the sum of squared deviations from it: both (G,)."""
    mean, squares, count = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32), 0.0
    end = tl.minimum((piece + 1) * chunk, pixels)
    for start in range(piece * chunk, end, P):
        p = start + tl.arange(0, P)
        mask = (p < end)[:, None] & c_mask[None, :]
        h = load_tile(x, skip, n, p, c, mask, pixels, c1, c2, NHWC, HAS_SKIP)
        more = tl.minimum(end - start, P).to(tl.float32)
        tile_mean = tl.sum(h, axis=0) / more
        centred = tl.where(mask, h - tile_mean[None, :], 0.0)
        delta = tile_mean - mean
        total = count + more
        mean += delta * (more / total)
        squares += tl.sum(centred * centred, axis=0) + delta * delta * (count * more / total)
        count = total
    if HAS_TEMB:
        mean += load_temb(temb, n, c, c_mask, temb_stride)
    group_mean = group_sums(mean, C, CPG, G) / CPG
    delta = tl.where(c_mask, mean - of_groups(group_mean, C, CPG, G), 0.0)
    return group_mean, group_sums(squares + count * delta * delta, C, CPG, G)


@triton.jit
def _group_norm_silu_moments_kernel(
    x, skip, temb, partial, blocks, pixels, c1, c2, groups, temb_stride, chunk,
    CPG: tl.constexpr, GB: tl.constexpr, P: tl.constexpr, C: tl.constexpr, G: tl.constexpr, NHWC: tl.constexpr,
    HAS_SKIP: tl.constexpr, HAS_TEMB: tl.constexpr,
):  # fmt: skip
    """Store the moments of GB groups in one chunk of one image; grid (N x blocks, chunks).

    partial: float32 (2, N, chunks, groups), the mean and the sum of squared deviations from it.
    """
    n, piece, g0 = tl.program_id(0) // blocks, tl.program_id(1), tl.program_id(0) % blocks * GB
    num_n, chunks = tl.num_programs(0) // blocks, tl.num_programs(1)
    c = g0 * CPG + tl.arange(0, C)
    c_mask = (tl.arange(0, C) < GB * CPG) & (c < c1 + c2)
    mean, squares = _chunk_moments(
        x, skip, temb, n, piece, chunk, c, c_mask, pixels, c1, c2, temb_stride, CPG, P, C, G, NHWC, HAS_SKIP, HAS_TEMB
    )
    g = tl.arange(0, G)
    g_mask = (g < GB) & (g0 + g < groups)
    at = (n * chunks + piece) * groups + g0 + g
    tl.store(partial + at, mean, g_mask)
    tl.store(partial + num_n * chunks * groups + at, squares, g_mask)


@triton.jit
def _combined_moments(
    partial, n, num_n, chunks, chunk, pixels, groups, g, mask, CPG: tl.constexpr, CHUNKS: tl.constexpr
):
    """Return mean and variance of groups g from the moments of all chunks, by Chan's formula."""
    k = tl.arange(0, CHUNKS)
    at = (n * chunks + k)[:, None] * groups + g[None, :]
    both = (k < chunks)[:, None] & mask[None, :]
    means = tl.load(partial + at, both, 0.0)
    squares = tl.load(partial + num_n * chunks * groups + at, both, 0.0)
    count = tl.maximum(tl.minimum((k + 1) * chunk, pixels) - k * chunk, 0)[:, None].to(tl.float32)
    mean = tl.sum(means * (count / pixels), axis=0)
    delta = tl.where(both, means - mean[None, :], 0.0)
    return mean, tl.sum(squares + count * CPG * delta * delta, axis=0) / (pixels * CPG)


@triton.jit
def _group_norm_silu_apply_kernel(
    x, skip, temb, weight, bias, scale, shift, partial, y, mean_out, rstd_out, images, seed, step,
    blocks, pixels, c1, c2, groups, temb_stride, chunk, eps, stream, threshold,
    CPG: tl.constexpr, GB: tl.constexpr, P: tl.constexpr, C: tl.constexpr, G: tl.constexpr, CHUNKS: tl.constexpr,
    NHWC: tl.constexpr, HAS_SKIP: tl.constexpr, HAS_TEMB: tl.constexpr, HAS_AFFINE: tl.constexpr,
    SILU: tl.constexpr, DROPOUT: tl.constexpr, EIGHTS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Compute the output of one chunk; grid (N x blocks, chunks). The program of the first chunk stores the moments.

    The moments are combined from `partial`; with CHUNKS == 1, a first loop over the image computes them.
    """
    n, piece, g0 = tl.program_id(0) // blocks, tl.program_id(1), tl.program_id(0) % blocks * GB
    channels, c0 = c1 + c2, g0 * CPG
    c = c0 + tl.arange(0, C)
    c_mask = (tl.arange(0, C) < GB * CPG) & (c < channels)
    g = tl.arange(0, G)
    g_mask = (g < GB) & (g0 + g < groups)
    if CHUNKS == 1:
        mean, squares = _chunk_moments(
            x, skip, temb, n, piece, chunk, c, c_mask, pixels, c1, c2, temb_stride, CPG, P, C, G, NHWC, HAS_SKIP,
            HAS_TEMB,
        )  # fmt: skip
        variance = squares / (pixels * CPG)
    else:
        mean, variance = _combined_moments(
            partial, n, tl.num_programs(0) // blocks, tl.num_programs(1), chunk, pixels, groups, g0 + g, g_mask,
            CPG, CHUNKS,
        )  # fmt: skip
    rstd = rstd_of(variance, eps, FAST)
    if piece == 0:
        tl.store(mean_out + n * groups + g0 + g, mean, g_mask)
        tl.store(rstd_out + n * groups + g0 + g, rstd, g_mask)

    mean_c, rstd_c = of_groups(mean, C, CPG, G), of_groups(rstd, C, CPG, G)
    if HAS_TEMB:
        mean_c -= load_temb(temb, n, c, c_mask, temb_stride)
    gain, offset = gain_and_offset(weight, bias, scale, shift, n, c, c_mask, channels, HAS_AFFINE)
    end = tl.minimum((piece + 1) * chunk, pixels)
    for start in range(piece * chunk, end, P):
        p = start + tl.arange(0, P)
        mask = (p < end)[:, None] & c_mask[None, :]
        h = load_tile(x, skip, n, p, c, mask, pixels, c1, c2, NHWC, HAS_SKIP)
        out = group_norm_silu_tile(
            h - mean_c[None, :], rstd_c, gain, offset, p, c0, n, channels,
            images, seed, step, stream, threshold, C, SILU, DROPOUT, EIGHTS, FAST,
        )  # fmt: skip
        base, inside = offsets(n, p, c, pixels, channels, NHWC)
        tl.store(y + base + inside, out.to(y.dtype.element_ty), mask)
