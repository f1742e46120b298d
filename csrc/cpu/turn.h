// Transposition of weights: their input channels are adjacent, and a matrix product needs adjacent output channels.
#pragma once
#include "vec.h"

namespace fastddpm {
namespace FASTDDPM_ISA {

// A vector whose every four elements are four of the eight of a and b there: i0 and i1 count a's from 0 and b's from 4.
template <int i0, int i1, int i2, int i3>
FASTDDPM_INLINE Vec mix_fours(Vec a, Vec b) {
    constexpr int from[4] = {i0, i1, i2, i3};
    IntVec mask;
    for (int j = 0; j < kWidth; ++j) mask[j] = from[j % 4] % 4 + j / 4 * 4 + (from[j % 4] < 4 ? 0 : kWidth);
    return __builtin_shuffle(a, b, mask);
}

// Transposes kWidth vectors, as a matrix, in place: blocks of 4x4 each by itself, which takes instructions that leave
// elements in their four, then blocks of 4, 8, ... elements are swapped.
FASTDDPM_INLINE void transpose(Vec rows[kWidth]) {
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; i += 4) {
        const Vec a = mix_fours<0, 4, 1, 5>(rows[i], rows[i + 1]), b = mix_fours<2, 6, 3, 7>(rows[i], rows[i + 1]);
        const Vec c = mix_fours<0, 4, 1, 5>(rows[i + 2], rows[i + 3]), d = mix_fours<2, 6, 3, 7>(rows[i + 2], rows[i + 3]);
        rows[i] = mix_fours<0, 1, 4, 5>(a, c);
        rows[i + 1] = mix_fours<2, 3, 6, 7>(a, c);
        rows[i + 2] = mix_fours<0, 1, 4, 5>(b, d);
        rows[i + 3] = mix_fours<2, 3, 6, 7>(b, d);
    }
#pragma GCC unroll 4
    for (int s = 4; s < kWidth; s *= 2) {
        IntVec low, high;
        for (int j = 0; j < kWidth; ++j) {
            low[j] = j & s ? kWidth + j - s : j;
            high[j] = j & s ? kWidth + j : j + s;
        }
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) {
            if (i & s) continue;
            const Vec a = rows[i], b = rows[i + s];
            rows[i] = __builtin_shuffle(a, b, low);
            rows[i + s] = __builtin_shuffle(a, b, high);
        }
    }
}

// Writes `to` (depth, columns rounded up to kWidth); element (column, d) is read at from[column * column_stride +
// d * d_stride]. The last vector is padded with zeros.
inline void turn(const float *from, int64_t column_stride, int64_t d_stride, int64_t columns, int64_t depth, float *to,
                 int64_t to_row) {
    for (int64_t i = 0; i < columns; i += kWidth) {
        const float *first = from + i * column_stride;
        const int64_t count = smaller(kWidth, columns - i);
        int64_t d = 0;
        for (; d_stride == 1 && count == kWidth && d + kWidth <= depth; d += kWidth) {
            Vec block[kWidth];
#pragma GCC unroll 16
            for (int j = 0; j < kWidth; ++j) block[j] = load(first + j * column_stride + d);
            transpose(block);
#pragma GCC unroll 16
            for (int j = 0; j < kWidth; ++j) store(to + (d + j) * to_row + i, block[j]);
        }
        for (; d < depth; ++d) {
            float *row = to + d * to_row + i;
            for (int64_t j = 0; j < count; ++j) row[j] = first[j * column_stride + d * d_stride];
            for (int64_t j = count; j < kWidth; ++j) row[j] = 0;
        }
    }
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
