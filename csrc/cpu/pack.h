// Packs a factor of a matrix product, whose elements are of type T, float or bfloat16: panels of kColumns columns, in
// each of which the columns of a word of the depth are adjacent.
#pragma once
#include "gemm.h"
#include "turn.h"

namespace fastddpm {
namespace FASTDDPM_ISA {

// Rows of single-precision numbers.
struct Rows {
    const float *at;
    int64_t stride;

    const float *row(int64_t i) const { return at + i * stride; }
};

constexpr int64_t whole_columns(int64_t columns) { return divide_up(columns, kColumns) * kColumns; }

// Packs kColumns columns, from `first`, of b (depth, columns), whose column j is row j of `from`.
inline void pack_transposed(const Rows &from, int64_t columns, int64_t depth, int64_t first, float *packed) {
    turn(from.row(first), from.stride, 1, smaller(kColumns, columns - first), depth, packed + first * depth, kColumns);
}
inline void pack_transposed(const Rows &from, int64_t columns, int64_t depth, int64_t first, uint16_t *packed) {
    const int64_t words = words_of<uint16_t>(depth), count = smaller(kColumns, columns - first);
    uint16_t *to = packed + first * 2 * words;
    for (int64_t i = 0; i < count; i += kWidth) {
        int64_t word = 0;
        for (; i + kWidth <= count && 2 * (word + kWidth) <= depth; word += kWidth) {
            Vec block[kWidth];
            for (int j = 0; j < kWidth; ++j) {
                const float *row = from.row(first + i + j) + 2 * word;
                const HalfVec halves[2] = {rounded(load(row)), rounded(load(row + kWidth))};
                memcpy(&block[j], halves, sizeof halves);
            }
            transpose(block);
            for (int j = 0; j < kWidth; ++j) memcpy(to + 2 * ((word + j) * kColumns + i), &block[j], sizeof block[j]);
        }
        for (; word < words; ++word)
            for (int64_t j = 0; j < smaller(kWidth, count - i); ++j) {
                const float *row = from.row(first + i + j) + 2 * word;
                store_part(to + 2 * (word * kColumns + i + j), load_part(row, smaller(2, depth - 2 * word)), 2);
            }
    }
}

// `count` columns of a word: one row, and the next or none.
FASTDDPM_INLINE void pack_word(const float *low, const float *high, int64_t count, uint16_t *to) {
    for (int64_t i = 0; i < count; i += kWidth) {
        const int64_t part = smaller(kWidth, count - i);
        const auto of = [&](const float *row) { return !row ? Vec{} : part == kWidth ? load(row + i) : load_part(row + i, part); };
        store(to + 2 * i, paired(of(low), of(high)));
    }
}

// The same for a b whose row d is row d of `from`.
inline void pack_rows(const Rows &from, int64_t columns, int64_t depth, int64_t first, float *packed) {
    const int64_t count = smaller(kColumns, columns - first);
    float *to = packed + first * depth;
    for (int64_t d = 0; d < depth; ++d, to += kColumns) {
        memcpy(to, from.row(d) + first, static_cast<size_t>(count) * sizeof(float));
        memset(to + count, 0, static_cast<size_t>(kColumns - count) * sizeof(float));
    }
}
inline void pack_rows(const Rows &from, int64_t columns, int64_t depth, int64_t first, uint16_t *packed) {
    const int64_t words = words_of<uint16_t>(depth), count = smaller(kColumns, columns - first);
    uint16_t *to = packed + first * 2 * words;
    for (int64_t word = 0; word < words; ++word, to += 2 * kColumns)
        pack_word(from.row(2 * word) + first, 2 * word + 1 < depth ? from.row(2 * word + 1) + first : nullptr, count, to);
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
