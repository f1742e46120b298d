// Mean and variance of GroupNorm's groups, over two inputs in either layout.
//
// For each chunk of pixels and each channel: the mean, rounded to single precision, and the sums of the deviations from
// it and of their squares. These are two passes, so that a mean far from zero costs no digits. Chunks, and the channels
// of a group, are combined in double. Nothing depends on the number of threads.
#pragma once
#include "vec.h"

namespace fastddpm {
namespace FASTDDPM_ISA {

constexpr int64_t kChunk = 128;         // pixels whose sums are kept in single precision
constexpr int64_t kColumnBlock = 128;   // channels of a task

// x (N, C1, H, W) and skip (N, C2, H, W), dense, of one layout.
template <typename T>
struct TwoInputs {
    const T *x, *skip;
    int64_t c1, c2, pixels;
    bool nhwc;

    int64_t channels() const { return c1 + c2; }
    int64_t chunks() const { return divide_up(pixels, kChunk); }
    int64_t blocks() const { return divide_up(c1, kColumnBlock) + divide_up(c2, kColumnBlock); }
    int64_t tasks() const { return chunks() * blocks(); }
    // The size of one image's moments: mean, sum and squares of each chunk's channels.
    int64_t floats() const { return chunks() * 3 * channels(); }
};

// One vector of channels per V of `count` pixels, `row` elements apart; with kPart the first `part` elements of it.
template <int V, bool kPart, typename T>
FASTDDPM_INLINE void moments_of_columns(const T *x, int64_t row, int64_t count, int64_t part, float *mean, float *sum,
                                        float *squares) {
    Vec total[V] = {}, s[V] = {}, q[V] = {};
    for (int64_t i = 0; i < count; ++i)
        for (int j = 0; j < V; ++j)
            total[j] += kPart ? load_part(x + i * row, part) : load(x + i * row + j * kWidth);
    for (int j = 0; j < V; ++j) total[j] /= static_cast<float>(count);
    for (int64_t i = 0; i < count; ++i)
        for (int j = 0; j < V; ++j) {
            const Vec d = (kPart ? load_part(x + i * row, part) : load(x + i * row + j * kWidth)) - total[j];
            s[j] += d;
            q[j] += d * d;
        }
    for (int j = 0; j < V; ++j) {
        if (kPart) {
            store_part(mean, total[j], part);
            store_part(sum, s[j], part);
            store_part(squares, q[j], part);
        } else {
            store(mean + j * kWidth, total[j]);
            store(sum + j * kWidth, s[j]);
            store(squares + j * kWidth, q[j]);
        }
    }
}

template <typename T>
FASTDDPM_INLINE void moments_of_pixels(const T *x, int64_t channels, int64_t count, int64_t row, float *mean,
                                       float *sum, float *squares) {
    constexpr int V = 4;
    int64_t c = 0;
    for (; c + V * kWidth <= channels; c += V * kWidth)
        moments_of_columns<V, false>(x + c, row, count, 0, mean + c, sum + c, squares + c);
    for (; c + kWidth <= channels; c += kWidth)
        moments_of_columns<1, false>(x + c, row, count, 0, mean + c, sum + c, squares + c);
    if (c < channels)
        moments_of_columns<1, true>(x + c, row, count, channels - c, mean + c, sum + c, squares + c);
}

// The same for pixels that are adjacent, of one channel.
template <typename T>
FASTDDPM_INLINE void moments_of_row(const T *x, int64_t count, float *mean, float *sums, float *squares) {
    const int64_t whole = count / kWidth * kWidth;
    Vec total = load_part(x + whole, count - whole), s{}, q{};
    for (int64_t i = 0; i < whole; i += kWidth) total += load(x + i);
    const float average = sum(total) / static_cast<float>(count);
    for (int64_t i = 0; i < whole; i += kWidth) {
        const Vec d = load(x + i) - average;
        s += d;
        q += d * d;
    }
    float sum_of_rest = 0, squares_of_rest = 0;
    const Vec rest = load_part(x + whole, count - whole);
    for (int64_t i = 0; i < count - whole; ++i) {
        const float d = rest[i] - average;
        sum_of_rest += d;
        squares_of_rest += d * d;
    }
    *mean = average;
    *sums = sum(s) + sum_of_rest;
    *squares = sum(q) + squares_of_rest;
}

// Task 0 .. tasks() - 1 of image n; `moments` are the image's.
template <typename T>
inline void moments_task(const TwoInputs<T> &in, int64_t n, int64_t task, float *moments) {
    const int64_t chunk = task / in.blocks(), block = task % in.blocks(), blocks1 = divide_up(in.c1, kColumnBlock);
    const bool second = block >= blocks1;
    const T *x = second ? in.skip : in.x;
    const int64_t channels = second ? in.c2 : in.c1, c = (second ? block - blocks1 : block) * kColumnBlock;
    const int64_t width = smaller(kColumnBlock, channels - c), first = chunk * kChunk;
    const int64_t count = smaller(kChunk, in.pixels - first);
    float *mean = moments + chunk * 3 * in.channels() + (second ? in.c1 : 0) + c;
    float *sums = mean + in.channels(), *squares = sums + in.channels();
    if (in.nhwc) {
        moments_of_pixels(x + (n * in.pixels + first) * channels + c, width, count, channels, mean, sums, squares);
        return;
    }
    for (int64_t i = 0; i < width; ++i)
        moments_of_row(x + (n * channels + c + i) * in.pixels + first, count, mean + i, sums + i, squares + i);
}

struct Statistics {
    double mean, rstd;
};

// Of the `width` channels from `first`, to each of which `temb`, unless null, adds its element.
template <typename T>
inline Statistics statistics_of_group(const TwoInputs<T> &in, const float *moments, const float *temb, int64_t first,
                                      int64_t width, float eps) {
    const int64_t channels = in.channels(), last = in.pixels - (in.chunks() - 1) * kChunk;
    // Relative to one of the means: in double that is near enough for the difference of the squares below.
    const double origin = static_cast<double>(moments[first]) + (temb ? temb[first] : 0);
    double sums = 0, squares = 0;
    for (int64_t chunk = 0; chunk < in.chunks(); ++chunk) {
        const float *at = moments + chunk * 3 * channels;
        const double count = static_cast<double>(chunk + 1 < in.chunks() ? kChunk : last), share = 1 / count;
        for (int64_t c = first; c < first + width; ++c) {
            const double s = at[channels + c];
            const double away = static_cast<double>(at[c]) + (temb ? temb[c] : 0) - origin + s * share;
            sums += count * away;
            squares += at[2 * channels + c] - s * s * share + count * away * away;
        }
    }
    const double total = static_cast<double>(width * in.pixels), difference = sums / total;
    const double variance = squares / total - difference * difference;
    // Rounding must not make it negative, but NaN stays.
    return {origin + difference, 1 / __builtin_sqrt((variance < 0 ? 0 : variance) + eps)};
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
