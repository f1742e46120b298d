// The matrix product inside convolutions and attention: a register-blocked kernel over packed panels.
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
template <typename T>
constexpr int64_t kLineOf = 64 / sizeof(T);  // elements of a cache line
constexpr int64_t kLine = kLineOf<float>;
constexpr int64_t kPanel = kVectors * kWidth;  // columns of a panel of b
constexpr int64_t kColumns = 32;  // output channels that are packed together, one or more panels of them
static_assert(kColumns % kPanel == 0, "");

// The factors of a product, and how a step along the depth multiplies them: a column of a step is one word of 32 bits.
template <typename T>
struct Factors;

template <>
struct Factors<float> {
    static constexpr int kDepth = 1;  // elements of a word
    using Word = float;
    using Words = Vec;
    static FASTDDPM_INLINE Words broadcast(Word a) { return splat(a); }
    static FASTDDPM_INLINE Vec multiply_add(Words a, Words b, Vec sum) { return sum + a * b; }
};

// bfloat16: two elements, adjacent along the depth. Both products are exact, and are added one after the other.
template <>
struct Factors<uint16_t> {
    static constexpr int kDepth = 2;
    using Word = uint32_t;
    using Words = UintVec;
    static FASTDDPM_INLINE Words broadcast(Word a) { return a - Words{}; }
    static FASTDDPM_INLINE Vec multiply_add(Words a, Words b, Vec sum) {
#ifdef __AVX512BF16__
        return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
        sum += (Vec)(a & 0xFFFF0000u) * (Vec)(b & 0xFFFF0000u);
        return sum + (Vec)(a << 16) * (Vec)(b << 16);
#endif
    }
};

// Words that hold a depth of factors of type T, and the elements in them.
template <typename T>
constexpr int64_t words_of(int64_t depth) { return divide_up(depth, Factors<T>::kDepth); }
template <typename T>
constexpr int64_t whole_words(int64_t depth) { return words_of<T>(depth) * Factors<T>::kDepth; }

// c (R, V vectors) = [c +] a (R, depth) b (depth, V vectors); rows of words of b lie kColumns apart. With kTurned, a is
// stored as its transpose, (depth, R) words. Every element is summed over depth in order, whatever R and V are.
template <bool kTurned, int R, int V, typename T>
void product_block(const T *a, int64_t a_row, const T *b, int64_t depth, float *c, int64_t c_row, bool add) {
    using F = Factors<T>;
    Vec acc[R][V];
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < V; ++j) acc[i][j] = Vec{};
    for (int64_t d = 0; d < depth; d += F::kDepth, b += kColumns * F::kDepth) {
        // The rows of the next block, where rows lie one behind the other.
        if (!kTurned) __builtin_prefetch(a + R * a_row + d / F::kDepth * kLineOf<T>);
        typename F::Words bv[V];
        memcpy(bv, b, sizeof bv);
#pragma GCC unroll 16
        for (int i = 0; i < R; ++i) {
            typename F::Word word;
            memcpy(&word, kTurned ? a + d * a_row + i * F::kDepth : a + i * a_row + d, sizeof word);
            const typename F::Words av = F::broadcast(word);
#pragma GCC unroll 2
            for (int j = 0; j < V; ++j) acc[i][j] = F::multiply_add(av, bv[j], acc[i][j]);
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

template <bool kTurned, int R, int V, typename T>
inline void product_rows(int64_t rows, const T *a, int64_t a_row, const T *b, int64_t depth, float *c, int64_t c_row,
                         bool add) {
    if (rows == R) return product_block<kTurned, R, V>(a, a_row, b, depth, c, c_row, add);
    if constexpr (R > 1) product_rows<kTurned, R - 1, V>(rows, a, a_row, b, depth, c, c_row, add);
}

// The same for any number of rows, split evenly: 16 rows are 8 + 8 rather than 12 + 4; and for the first `columns` of b,
// or, where there are more, as many as a panel has. `a_row` and `depth` count elements; `depth` is a whole number of
// words.
template <bool kTurned = false, typename T>
inline void product(int64_t rows, int64_t columns, const T *a, int64_t a_row, const T *b, int64_t depth, float *c,
                    int64_t c_row, bool add) {
    for (int64_t blocks = divide_up(rows, kRows), done = 0; blocks > 0; --blocks) {
        const int64_t count = divide_up(rows - done, blocks);
        const T *from = a + done * (kTurned ? Factors<T>::kDepth : a_row);
        if (columns > kWidth)
            product_rows<kTurned, kRows, kVectors>(count, from, a_row, b, depth, c + done * c_row, c_row, add);
        else
            product_rows<kTurned, kRows, 1>(count, from, a_row, b, depth, c + done * c_row, c_row, add);
        done += count;
    }
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
