// The matrix product inside the convolutions: a register-blocked kernel over packed panels.
#pragma once
#include "vec.h"

namespace fastddpm {
namespace FASTDDPM_ISA {

// Rows and vectors of a register block. kRows * kVectors accumulators, the vectors of b and one broadcast of a fit into
// the registers; the accumulators are enough to hide the latency of a multiply-add (4 cycles, 2 per cycle).
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRows = 12;
#else
constexpr int kRows = 6;
#endif
constexpr int kVectors = 2;
constexpr int64_t kLine = 16;  // floats of a cache line
constexpr int64_t kPanel = kVectors * kWidth;  // columns of a panel of b
constexpr int64_t kColumns = 32;  // output channels that are packed together, one or more panels of them
static_assert(kColumns % kPanel == 0, "");

// c (R, V vectors) = [c +] a (R, depth) b (depth, V vectors); rows of b lie kColumns apart. With kTurned, a is stored as
// its transpose (depth, R). Every element is summed over depth in order, whatever R and V are.
template <bool kTurned, int R, int V>
void product_block(const float *a, int64_t a_row, const float *b, int64_t depth, float *c, int64_t c_row, bool add) {
    Vec acc[R][V];
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < V; ++j) acc[i][j] = Vec{};
    for (int64_t d = 0; d < depth; ++d, b += kColumns) {
        // The rows of the next block, where rows lie one behind the other.
        if (!kTurned) __builtin_prefetch(a + R * a_row + d * kLine);
        Vec bv[V];
#pragma GCC unroll 2
        for (int j = 0; j < V; ++j) bv[j] = load(b + j * kWidth);
#pragma GCC unroll 16
        for (int i = 0; i < R; ++i) {
            const Vec av = splat(kTurned ? a[d * a_row + i] : a[i * a_row + d]);
#pragma GCC unroll 2
            for (int j = 0; j < V; ++j) acc[i][j] += av * bv[j];
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < V; ++j) {
            float *to = c + i * c_row + j * kWidth;
            store(to, add ? load(to) + acc[i][j] : acc[i][j]);
        }
}

template <bool kTurned, int R, int V>
inline void product_rows(int64_t rows, const float *a, int64_t a_row, const float *b, int64_t depth, float *c,
                         int64_t c_row, bool add) {
    if (rows == R) return product_block<kTurned, R, V>(a, a_row, b, depth, c, c_row, add);
    if constexpr (R > 1) product_rows<kTurned, R - 1, V>(rows, a, a_row, b, depth, c, c_row, add);
}

// The same for any number of rows, split evenly: 16 rows are 8 + 8 rather than 12 + 4; and for the first `columns` of b,
// or, where there are more, as many as a panel has.
template <bool kTurned = false>
inline void product(int64_t rows, int64_t columns, const float *a, int64_t a_row, const float *b, int64_t depth,
                    float *c, int64_t c_row, bool add) {
    for (int64_t blocks = divide_up(rows, kRows), done = 0; blocks > 0; --blocks) {
        const int64_t count = divide_up(rows - done, blocks);
        const float *from = a + done * (kTurned ? 1 : a_row);
        if (columns > kWidth)
            product_rows<kTurned, kRows, kVectors>(count, from, a_row, b, depth, c + done * c_row, c_row, add);
        else
            product_rows<kTurned, kRows, 1>(count, from, a_row, b, depth, c + done * c_row, c_row, add);
        done += count;
    }
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
