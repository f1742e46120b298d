"""The forward kernel of group_norm_silu for tiles without borders, which need no masks.

A program holds all pixels of its channels in registers, read once. Values of 16 bits stay so: as float32 they would
take twice the registers, and the fewer programs would run at once, the less loads, arithmetic and stores overlap.
"""

import triton
import triton.language as tl

from .triton_forward import gain_and_offset, group_norm_silu_tile, load_temb, rstd_of


@triton.jit
def wide(kept, zero, OPAQUE: tl.constexpr):
    """Return bfloat16 values as float32. OPAQUE: by instructions that depend on `zero`, a 0 unknown to the compiler.

    Without it, the compiler finds the values of an earlier pass again and keeps all of them in float32.
    """
    if OPAQUE:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $2, 0, $3; and.b32 $1, $2, $5;", "=f,=f,r,r,r,r,r",
            [kept, zero + 0x1044, zero - 0x10000], dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return kept.to(tl.float32)


@triton.jit
def _offsets(
    n, c0, num_c, P: tl.constexpr, C: tl.constexpr, NHWC: tl.constexpr, p0: tl.constexpr = 0, rows: tl.constexpr = None
):
    """Return the offsets of `rows` pixels from p0: int64 of the tile's first element, and int32 from there.

    They are apart so that the second are numbers of the thread plus constants, which loads and stores add themselves.
    """
    p, c = (p0 + tl.arange(0, P if rows is None else rows))[:, None], tl.arange(0, C)[None, :]
    first = n.to(tl.int64) * P * num_c + (c0 if NHWC else c0 * P)
    return first, (p * num_c + c if NHWC else c * P + p)


@triton.jit
def load_part(
    x, skip, residual, total, n, c0, P: tl.constexpr, C: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr,
    NHWC: tl.constexpr, HAS_SKIP: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Load channels c0 .. c0 + C - 1, all of one tensor, in x's dtype; with a residual, store and return the sum."""
    if HAS_SKIP:
        of_x = c0 < C1
        first, others = _offsets(n, c0 - tl.where(of_x, 0, C1), C1 if C1 == C2 else tl.where(of_x, C1, C2), P, C, NHWC)
        values = tl.load(tl.where(of_x, x, skip) + first + others)
        if HAS_RESIDUAL:
            mask = tl.full([1, 1], 1, tl.int1) & of_x
            exact = values.to(tl.float32) + tl.load(residual + first + others, mask, 0.0).to(tl.float32)
            values = exact.to(values.dtype)
            tl.store(total + first + others, values, mask)
    else:
        first, others = _offsets(n, c0, C1, P, C, NHWC)
        values = tl.load(x + first + others)
        if HAS_RESIDUAL:
            exact = values.to(tl.float32) + tl.load(residual + first + others).to(tl.float32)
            values = exact.to(values.dtype)
            tl.store(total + first + others, values)
    return values


@triton.jit
def unit_sums(values, UNIT: tl.constexpr):
    """Sum (P, C) or (C,) values over the pixels and each UNIT channels: (C / UNIT,)."""
    if len(values.shape) == 2:
        units = tl.sum(tl.reshape(values, [values.shape[0], values.shape[1] // UNIT, UNIT]), axis=2)
        return tl.sum(units, axis=0)
    else:
        return tl.sum(tl.reshape(values, [values.shape[0] // UNIT, UNIT]), axis=1)


@triton.jit
def _group_sums(sums, CPG: tl.constexpr, GB: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr, UNIT: tl.constexpr):
    """Sum the units of all parts over each group: one tensor (GB,), or with several parts GB numbers.

    Numbers have no layout: a tensor of groups would be moved between layouts, tile by tile.
    """
    if PARTS == 1:
        return (sums[0],)
    else:
        groups = ()
        for g in tl.static_range(GB):
            units = tl.zeros_like(sums[0])
            for k in tl.static_range(PARTS):
                units += tl.where((k * C + tl.arange(0, C // UNIT) * UNIT) // CPG == g, sums[k], 0.0)
            groups += (tl.sum(units, axis=0),)
        return groups


@triton.jit
def _of_part(
    values, k: tl.constexpr, zero, CPG: tl.constexpr, GB: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Repeat the values of groups for the channels of part k: (C,). With another `zero`, they are made anew."""
    if PARTS == 1:
        return tl.reshape(tl.broadcast_to(values[0][:, None], [C // UNIT, UNIT]), [C])
    else:
        group = (k * C + tl.arange(0, C)) // CPG
        of_channels = tl.full([C], 0.0, tl.float32) + values[0]
        for g in tl.static_range(1, GB):
            of_channels = tl.where(group == g + zero, values[g], of_channels)
        return of_channels


@triton.jit
def _group_norm_silu_even_kernel(
    x, skip, temb, weight, bias, scale, shift, residual, total, y, mean_out, rstd_out, images, seed, step,
    blocks, groups, temb_stride, eps, stream, threshold,
    CPG: tl.constexpr, GB: tl.constexpr, P: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr, UNIT: tl.constexpr,
    C1: tl.constexpr, C2: tl.constexpr,
    NHWC: tl.constexpr, HAS_SKIP: tl.constexpr, HAS_TEMB: tl.constexpr, HAS_AFFINE: tl.constexpr,
    SILU: tl.constexpr, DROPOUT: tl.constexpr, EIGHTS: tl.constexpr, FAST: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, CLAMP: tl.constexpr, PACKED: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """Compute GB groups of one image, all P pixels at once; grid (N x blocks of groups,).

    The GB CPG channels are 1 or 3 PARTS of C, each of one tensor; a group is made of UNITs of channels, which divide C.
    HAS_RESIDUAL: x + residual takes the place of x, and is stored in `total`. CLAMP: to the range of e4m3, in which y
    is stored then. PACKED: x is bfloat16 and each pass makes float32 of it anew. HALVES: the output is made in
    two halves of the pixels, because dropout's random words would take too many registers all at once.
    """
    n, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    c0, g0 = block * GB * CPG, block * GB
    channels: tl.constexpr = C1 + C2
    count = 1.0 * P * CPG
    rows: tl.constexpr = P // 2 if HALVES else P
    every = tl.full([C], 1, tl.int1)  # known to be true: the compiler leaves this mask out
    zero1, zero2 = threshold >> 31, groups >> 31

    kept = ()
    for k in tl.static_range(PARTS):
        kept += (
            load_part(
                x, skip, residual, total, n, c0 + k * C, P, C, C1, C2, NHWC, HAS_SKIP, HAS_RESIDUAL
            ),
        )  # fmt: skip
    sums = ()
    for k in tl.static_range(PARTS):
        part = unit_sums(wide(kept[k], 0, PACKED), UNIT)
        if HAS_TEMB:
            added = load_temb(temb, n, c0 + k * C + tl.arange(0, C), every, temb_stride)
            part += unit_sums(added, UNIT) * P
        sums += (part,)
    pieces: tl.constexpr = 1 if PARTS == 1 else GB
    at = n * groups + g0 + (tl.arange(0, GB) if PARTS == 1 else 0)
    sums = _group_sums(sums, CPG, GB, C, PARTS, UNIT)
    mean = ()
    for i in tl.static_range(pieces):
        mean += (sums[i] / count,)
        tl.store(mean_out + at + i, mean[i])

    squares, means = (), ()
    for k in tl.static_range(PARTS):
        mean_c = _of_part(mean, k, 0, CPG, GB, C, PARTS, UNIT)
        if HAS_TEMB:
            mean_c -= load_temb(temb, n, c0 + k * C + tl.arange(0, C), every, temb_stride)
        centred = wide(kept[k], zero1, PACKED) - mean_c[None, :]
        means += (mean_c,)
        squares += (unit_sums(centred * centred, UNIT),)
    sums = _group_sums(squares, CPG, GB, C, PARTS, UNIT)
    rstd = ()
    for i in tl.static_range(pieces):
        rstd += (rstd_of(sums[i] / count, eps, FAST),)
        tl.store(rstd_out + at + i, rstd[i])

    for k in tl.static_range(PARTS):
        c = c0 + k * C + tl.arange(0, C)
        gain, offset = gain_and_offset(weight, bias, scale, shift, n, c, every, channels, HAS_AFFINE)
        rstd_c = _of_part(rstd, k, 0, CPG, GB, C, PARTS, UNIT)
        mean_c = means[k]
        if PARTS > 1:  # the means of all parts would take too many registers
            mean_c = _of_part(mean, k, zero2, CPG, GB, C, PARTS, UNIT)
            if HAS_TEMB:
                mean_c -= load_temb(temb, n, c, every, temb_stride)
        if PACKED:  # one instruction less for each value, with an error far below bfloat16's
            offset -= mean_c * (rstd_c * gain)
        halves = (kept[k],)
        if HALVES:
            halves = tl.split(tl.permute(tl.reshape(kept[k], [2, P // 2, C]), [1, 2, 0]))
        for half in tl.static_range(2 if HALVES else 1):
            p = half * rows + tl.arange(0, rows)
            values = wide(halves[half], zero2, PACKED)
            if not PACKED:
                values -= mean_c[None, :]
            out = group_norm_silu_tile(
                values, rstd_c, gain, offset, p, c0 + k * C, n, channels,
                images, seed, step, stream, threshold, C, SILU, DROPOUT, EIGHTS, FAST,
            )  # fmt: skip
            if CLAMP:
                out = tl.clamp(out, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
            first, others = _offsets(n, c0 + k * C, channels, P, C, NHWC, half * rows, rows)
            tl.store(y + first + others, out.to(y.dtype.element_ty))
