// Transposition of weights: their input channels are adjacent, and a matrix product needs adjacent output channels.
#pragma once
#include "vec.h"

namespace fastddpm {
namespace FASTDDPM_ISA {

// Transposes kWidth vectors, as a matrix, in place, by swapping blocks of 1, 2, 4, ... elements.
FASTDDPM_INLINE void transpose(Vec rows[kWidth]) {
#pragma GCC unroll 4
    for (int s = 1; s < kWidth; s *= 2) {
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
