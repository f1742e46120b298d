// Philox blocks and normals, kLanes blocks at a time.
//
// The normals are the same on every machine, with every instruction set and number of threads: only + - * / and sqrt
// are used, which IEEE 754 fixes to the last bit, and sources that draw normals are compiled with -ffp-contract=off.
// The error before rounding, against exact logarithms and sines, is below 1e-10.
#pragma once
#include "../philox.h"
#include "team.h"
#include "vec.h"

namespace fastddpm {
namespace FASTDDPM_ISA {

constexpr int64_t kLanes = 64;  // blocks computed together; loops over lanes become vector instructions

struct Counter {
    uint32_t image, step, stream;
    uint64_t seed;
};

using Words = uint32_t[4][kLanes];

template <typename To, typename From>
FASTDDPM_INLINE To bit_cast(From from) {
    To to;
    static_assert(sizeof(to) == sizeof(from));
    memcpy(&to, &from, sizeof(to));
    return to;
}

// An integer below 2^52 as a double, by placing it in the mantissa of 2^52: every instruction set vectorizes this.
inline double to_double(uint64_t i) { return bit_cast<double>(i | 0x4330000000000000u) - 4503599627370496.0; }

// ln u for normal u > 0: u = m 2^e with m in [sqrt 1/2, sqrt 2), ln m = 2 artanh((m - 1) / (m + 1)) by its series.
inline double natural_log(double u) {
    constexpr uint64_t kSqrtHalf = 0x3FE6A09E667F3BCDu, kOne = 0x3FF0000000000000u;
    const uint64_t shifted = bit_cast<uint64_t>(u) - kSqrtHalf + kOne;
    const double m = bit_cast<double>((shifted & 0x000FFFFFFFFFFFFFu) + kSqrtHalf);
    const double s = (m - 1.0) / (m + 1.0), z = s * s;
    double series = 1.0 / 13;
    series = series * z + 1.0 / 11;
    series = series * z + 1.0 / 9;
    series = series * z + 1.0 / 7;
    series = series * z + 1.0 / 5;
    series = series * z + 1.0 / 3;
    series = series * z + 1.0;
    return (to_double(shifted >> 52) - 1023.0) * 0.693147180559945309417232121458 + 2.0 * s * series;
}

// One Box-Muller pair from two words: radius sqrt(-2 ln(w / 2^32 + 2^-33)), angle 2 pi v / 2^32.
inline void normal_pair(uint32_t w, uint32_t v, float *cosine, float *sine) {
    const double radius = __builtin_sqrt(-2.0 * natural_log(to_double(w) * 0x1p-32 + 0x1p-33));
    // The nearest quarter turn, exactly; the rest lies within an eighth, where Taylor's series are short.
    const uint32_t quarter = (v + 0x20000000u) >> 30;
    const double x = static_cast<double>(static_cast<int32_t>(v - (quarter << 30))) * (6.283185307179586477 * 0x1p-32);
    const double z = x * x;
    double s = -1.0 / 39916800;
    s = s * z + 1.0 / 362880;
    s = s * z - 1.0 / 5040;
    s = s * z + 1.0 / 120;
    s = s * z - 1.0 / 6;
    s = (s * z + 1.0) * x;
    double c = 1.0 / 479001600;
    c = c * z - 1.0 / 3628800;
    c = c * z + 1.0 / 40320;
    c = c * z - 1.0 / 720;
    c = c * z + 1.0 / 24;
    c = c * z - 1.0 / 2;
    c = c * z + 1.0;
    const double a = quarter & 1 ? s : c, b = quarter & 1 ? c : s;
    *cosine = static_cast<float>(radius * ((quarter + 1) & 2 ? -a : a));
    *sine = static_cast<float>(radius * (quarter & 2 ? -b : b));
}

// The output words of blocks first .. first + kLanes - 1.
#ifdef __AVX512DQ__
// Where 64-bit products are instructions: words stay in 64-bit elements, without a conversion in every round.
FASTDDPM_INLINE void words_of_lanes(Words &words, uint32_t first, const Counter &counter) {
    constexpr int kHalf = kWidth / 2;
    constexpr uint64_t kLow = 0xFFFFFFFFu;
    typedef uint64_t LongVec __attribute__((vector_size(kWidth * 4)));
    typedef uint32_t HalfWords __attribute__((vector_size(kHalf * 4)));
    for (int64_t lane = 0; lane < kLanes; lane += kHalf) {
        LongVec c0, c1 = counter.image - LongVec{}, c2 = counter.step - LongVec{}, c3 = counter.stream - LongVec{};
        for (int i = 0; i < kHalf; ++i) c0[i] = static_cast<uint32_t>(first + lane + i);
        uint32_t k0 = static_cast<uint32_t>(counter.seed), k1 = static_cast<uint32_t>(counter.seed >> 32);
        for (int round = 0; round < 10; ++round) {
            const LongVec p0 = c0 * uint64_t{0xD2511F53}, p1 = c2 * uint64_t{0xCD9E8D57};
            c0 = (p1 >> 32) ^ c1 ^ uint64_t{k0};
            c2 = (p0 >> 32) ^ c3 ^ uint64_t{k1};
            c1 = p1 & kLow;
            c3 = p0 & kLow;
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        const LongVec out[4] = {c0, c1, c2, c3};
        for (int i = 0; i < 4; ++i) {
            const HalfWords word = __builtin_convertvector(out[i], HalfWords);
            memcpy(&words[i][lane], &word, sizeof word);
        }
    }
}
#else
FASTDDPM_INLINE void words_of_lanes(Words &words, uint32_t first, const Counter &counter) {
    for (uint32_t lane = 0; lane < kLanes; ++lane) {
        const philox_block w = philox(first + lane, counter.image, counter.step, counter.stream, counter.seed);
        for (int i = 0; i < 4; ++i) words[i][lane] = w.w[i];
    }
}
#endif

// The normals of blocks first .. first + kLanes - 1, four of each.
inline void normal_lanes(float *out, uint32_t first, const Counter &counter) {
    Words words;
    words_of_lanes(words, first, counter);
    for (int pair = 0; pair < 2; ++pair)
        for (int64_t lane = 0; lane < kLanes; ++lane)
            normal_pair(words[2 * pair][lane], words[2 * pair + 1][lane], &out[4 * lane + 2 * pair],
                        &out[4 * lane + 2 * pair + 1]);
}

constexpr int64_t kNormals = 4 * kLanes;

// Calls body(n, first) for each kNormals elements of each of `images` images, `first` being the first of them. Each call
// writes its own part of the output, so the result does not depend on the number of threads.
template <typename Body>
inline void for_normals(int64_t images, int64_t num, int32_t threads, Body body) {
    const int64_t groups = divide_up(num, kNormals), total = groups * images;
    // For fewer than about ten thousand normals, waking threads costs more than they save.
#pragma omp parallel for schedule(static) num_threads(team_size(threads)) if (total > 64)
    for (int64_t i = 0; i < total; ++i) body(i / groups, i % groups * kNormals);
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
