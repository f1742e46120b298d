// Vectors of floats as wide as the instruction set has them, by GCC's and clang's vector extensions: the same source
// becomes SSE2, AVX2, AVX-512 or NEON.
#pragma once
#include <stdint.h>
#include <string.h>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace fastddpm {
namespace FASTDDPM_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Vec __attribute__((vector_size(kWidth * 4)));
typedef int32_t IntVec __attribute__((vector_size(kWidth * 4)));
typedef uint32_t UintVec __attribute__((vector_size(kWidth * 4)));
typedef uint16_t HalfVec __attribute__((vector_size(kWidth * 2)));
typedef uint8_t ByteVec __attribute__((vector_size(kWidth)));

#define FASTDDPM_INLINE inline __attribute__((always_inline))

FASTDDPM_INLINE Vec load(const float *p) {
    Vec v;
    memcpy(&v, p, sizeof v);
    return v;
}
FASTDDPM_INLINE void store(float *p, Vec v) { memcpy(p, &v, sizeof v); }
FASTDDPM_INLINE Vec splat(float x) { return x - Vec{}; }  // x + 0 would be an addition: it turns -0 into 0

// The first `count` < kWidth elements; the others are 0, or are left as they are.
FASTDDPM_INLINE Vec load_part(const float *p, int64_t count) {
    Vec v{};
    for (int64_t i = 0; i < count; ++i) v[i] = p[i];
    return v;
}
FASTDDPM_INLINE void store_part(float *p, Vec v, int64_t count) {
    for (int64_t i = 0; i < count; ++i) p[i] = v[i];
}

// Rounds a product by itself: the compiler must not fuse it with an addition.
FASTDDPM_INLINE Vec apart(Vec v) {
    __asm__("" : "+m"(v));
    return v;
}

FASTDDPM_INLINE Vec vmax(Vec a, Vec b) { return a > b ? a : b; }
FASTDDPM_INLINE Vec vmin(Vec a, Vec b) { return a < b ? a : b; }

FASTDDPM_INLINE float sum(Vec v) {
    float s = 0;
    for (int i = 0; i < kWidth; ++i) s += v[i];
    return s;
}

// bfloat16, stored as uint16_t, is the upper half of a float; rounding is to nearest even, and NaN stays NaN. The
// instruction for it takes numbers below 2^-126 for 0.
FASTDDPM_INLINE Vec load(const uint16_t *p) {
    HalfVec h;
    memcpy(&h, p, sizeof h);
    const UintVec bits = __builtin_convertvector(h, UintVec) << 16;
    return (Vec)bits;
}
FASTDDPM_INLINE HalfVec rounded(Vec v) {
#ifdef __AVX512BF16__
    return (HalfVec)_mm512_cvtneps_pbh((__m512)v);
#else
    const UintVec bits = (UintVec)v;
    const UintVec upper = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    const UintVec nan = (bits >> 16) | 0x40;
    return __builtin_convertvector((UintVec)(v == v ? (IntVec)upper : (IntVec)nan), HalfVec);
#endif
}
// Two bfloat16 in each word, `low` in the lower half.
FASTDDPM_INLINE UintVec paired(Vec low, Vec high) {
#ifdef __AVX512BF16__
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                           5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return (UintVec)_mm512_permutexvar_epi16(order, halves);
#else
    return __builtin_convertvector(rounded(low), UintVec) | __builtin_convertvector(rounded(high), UintVec) << 16;
#endif
}
FASTDDPM_INLINE void store(uint16_t *p, Vec v) {
    const HalfVec h = rounded(v);
    memcpy(p, &h, sizeof h);
}
FASTDDPM_INLINE Vec load_part(const uint16_t *p, int64_t count) {
    HalfVec h{};
    for (int64_t i = 0; i < count; ++i) h[i] = p[i];
    uint16_t whole[kWidth];
    memcpy(whole, &h, sizeof h);
    return load(whole);
}
FASTDDPM_INLINE void store_part(uint16_t *p, Vec v, int64_t count) {
    const HalfVec h = rounded(v);
    for (int64_t i = 0; i < count; ++i) p[i] = h[i];
}

FASTDDPM_INLINE void store(uint16_t *p, UintVec words) { memcpy(p, &words, sizeof words); }

// e^x to 2 units in the last place; 0 below -87.3, infinity above 88.7, NaN for NaN.
FASTDDPM_INLINE Vec vexp(Vec x) {
    const Vec lowest = splat(-87.33654f), highest = splat(88.72283f);
    const Vec clamped = x < lowest ? lowest : (x > highest ? highest : x);
    const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const Vec k = (clamped * 1.44269504088896341f + magic) - magic;
    // ln 2 in two parts, the first with few enough bits that k times it is exact.
    Vec r = clamped - k * 0.693359375f;
    r = r - k * -2.12194440e-4f;
    Vec p = splat(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    // 2^k in two factors: k may be 128, for which one factor would be infinite.
    const Vec safe = k == k ? k : Vec{};
    const IntVec n = __builtin_convertvector(safe, IntVec), half = n >> 1;
    const Vec result = p * (Vec)((half + 127) << 23) * (Vec)((n - half + 127) << 23);
    const Vec low = x < lowest ? Vec{} : result;
    return x > highest ? splat(__builtin_inff()) : low;
}

FASTDDPM_INLINE Vec vsilu(Vec x) { return x / (1.0f + vexp(-x)); }

// The same to 1e-5, for results that are rounded to bfloat16: e^-x as 2^k 2^f by a polynomial of degree 4. Below -87 a
// result is not 0, but smaller than 1e-35.
FASTDDPM_INLINE Vec vsilu_to_bf16(Vec x) {
    const Vec power = vmax(vmin(x * -1.44269504088896341f, splat(126.0f)), splat(-126.0f));
    const Vec magic = splat(12582912.0f), k = (power + magic) - magic, f = power - k;
    Vec p = splat(0.009618129107628477f);
    p = p * f + 0.05550410866482158f;
    p = p * f + 0.2402265069591007f;
    p = p * f + 0.6931471805599453f;
    p = p * f + 1.0f;
    return x / (1.0f + (Vec)((IntVec)p + (__builtin_convertvector(k, IntVec) << 23)));
}

// Plain arithmetic of sizes, without the standard library's templates.
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
