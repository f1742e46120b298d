"""Philox4x32-10 and its normals as Triton device functions.

Normals are computed in float64 by the same operations, in the same order, as in csrc/cpu/noise.h: only + - * / and
sqrt, which IEEE 754 fixes to the last bit. A kernel that draws them is launched with enable_fp_fusion=False (no
a * b + c in one rounding): then every GPU gives the same bits, and so do the compiled CPU and CUDA libraries.
"""

import triton
import triton.language as tl


@triton.jit
def _natural_log(u):
    """Return ln u for normal u > 0: u = m 2^e with m in [sqrt 1/2, sqrt 2), ln m = 2 artanh((m - 1) / (m + 1))."""
    sqrt_half: tl.constexpr = 0x3FE6A09E667F3BCD
    one: tl.constexpr = 0x3FF0000000000000
    shifted = u.to(tl.int64, bitcast=True) - sqrt_half + one
    m = ((shifted & 0x000FFFFFFFFFFFFF) + sqrt_half).to(tl.float64, bitcast=True)
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    series = z * (1.0 / 13) + 1.0 / 11
    series = series * z + 1.0 / 9
    series = series * z + 1.0 / 7
    series = series * z + 1.0 / 5
    series = series * z + 1.0 / 3
    series = series * z + 1.0
    exponent = ((shifted >> 52) - 1023).to(tl.float64)
    return exponent * 0.693147180559945309417232121458 + 2.0 * s * series


@triton.jit
def _normal_pair(w, v):
    """Return a Box-Muller pair from two uint32: radius sqrt(-2 ln(w / 2^32 + 2^-33)), angle 2 pi v / 2^32."""
    radius = tl.sqrt(-2.0 * _natural_log(w.to(tl.float64) * 2.3283064365386963e-10 + 1.1641532182693481e-10))
    # The nearest quarter turn, exactly. The rest is at most an eighth turn, for which Taylor's series are short.
    quarter = (v + 0x20000000) >> 30
    rest = (v - (quarter << 30)).to(tl.int32, bitcast=True)
    x = rest.to(tl.float64) * (6.283185307179586477 * 2.3283064365386963e-10)
    z = x * x
    s = z * (-1.0 / 39916800) + 1.0 / 362880
    s = s * z - 1.0 / 5040
    s = s * z + 1.0 / 120
    s = s * z - 1.0 / 6
    s = (s * z + 1.0) * x
    c = z * (1.0 / 479001600) - 1.0 / 3628800
    c = c * z + 1.0 / 40320
    c = c * z - 1.0 / 720
    c = c * z + 1.0 / 24
    c = c * z - 1.0 / 2
    c = c * z + 1.0
    a = tl.where((quarter & 1) == 1, s, c)
    b = tl.where((quarter & 1) == 1, c, s)
    cosine = radius * tl.where(((quarter + 1) & 2) == 2, -a, a)
    sine = radius * tl.where((quarter & 2) == 2, -b, b)
    return cosine.to(tl.float32), sine.to(tl.float32)


@triton.jit
def words(block, image, step, stream, seed):
    """Return the four uint32 words of each `block`. seed is int64; of the counter's words the low 32 bits are read."""
    c0 = block.to(tl.uint32)
    # Added to zeros because all four words must have one shape, and a `stream` of 1 is a constant of the compiler.
    zero = c0 * 0
    return tl.philox(seed, c0, zero + image.to(tl.uint32), zero + step.to(tl.uint32), (zero + stream).to(tl.uint32))


@triton.jit
def normals(block, image, step, stream, seed):
    """Return normals 4 block .. 4 block + 3 of an image for a vector of B blocks: float32 (4 B,)."""
    w0, w1, w2, w3 = words(block, image, step, stream, seed)
    z0, z1 = _normal_pair(w0, w1)
    z2, z3 = _normal_pair(w2, w3)
    # join puts its arguments on a new last axis: (z0, z1, z2, z3) in C order.
    return tl.join(tl.join(z0, z2), tl.join(z1, z3)).reshape(4 * block.shape[0])
