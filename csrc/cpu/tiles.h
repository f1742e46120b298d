// The division of images into tiles for Winograd's algorithms, and B^T d B of the input's tiles. `A` is the algorithm, a
// Tile of winograd.h.
#pragma once
#include "conv.h"
#include "winograd.h"

namespace fastddpm {
namespace FASTDDPM_ISA {

// The tiles of all images. A strip is some tile rows of one image; a block is whole strips, about `most_tiles` tiles.
struct Tiling {
    int64_t tiles_high, tiles_wide, image_tiles;
    int64_t strip_rows, image_strips, strips;
    int64_t block_strips, block_tiles, blocks;
    int64_t scratch_height, scratch_width;  // of an image that holds a line of channels of a strip's input

    // `teams`: the number of blocks is a multiple of it, if there are strips enough.
    Tiling(const fastddpm_conv_args &p, int down, int across, int64_t most_tiles, int64_t teams = 1) {
        const ConvSize size(p);
        tiles_high = divide_up(size.out_height, down);
        tiles_wide = divide_up(size.out_width, across);
        image_tiles = tiles_high * tiles_wide;
        const int64_t most_rows = larger(1, smaller(tiles_high, most_tiles / tiles_wide));
        image_strips = divide_up(tiles_high, most_rows);
        strip_rows = divide_up(tiles_high, image_strips);
        image_strips = divide_up(tiles_high, strip_rows);
        strips = p.n * image_strips;
        const int64_t most_strips = larger(1, most_tiles / (strip_rows * tiles_wide));
        const int64_t fewest = divide_up(larger(1, divide_up(strips, most_strips)), teams) * teams;
        block_strips = larger(1, divide_up(strips, fewest));
        block_tiles = block_strips * strip_rows * tiles_wide;
        blocks = larger(1, divide_up(strips, block_strips));
        scratch_height = down * strip_rows + 2;
        scratch_width = across * tiles_wide + 2;
    }

    struct Block {
        int64_t first, last;        // strips, the last excluded
        int64_t first_tile, tiles;
    };
    Block block(int64_t i) const {
        const int64_t first = i * block_strips, last = smaller(first + block_strips, strips);
        return {first, last, first_tile(first), first_tile(last) - first_tile(first)};
    }
    int64_t first_tile(int64_t strip) const {
        return strip / image_strips * image_tiles + strip % image_strips * strip_rows * tiles_wide;
    }
    // For factors of type T; a line of them is kLineOf<T> channels.
    template <typename T>
    int64_t scratch_floats() const {
        return scratch_height * scratch_width * kLineOf<T>;
    }
};

// Calls run with the algorithm that the arguments name.
template <typename Run>
int64_t with_algorithm(const fastddpm_conv_args &p, Run run) {
    if (p.precision == FASTDDPM_FLOAT32) return run(Tile<float, 4, 4>());
    return p.algorithm == FASTDDPM_WINOGRAD_2X4 ? run(Tile<uint16_t, 2, 4>()) : run(Tile<uint16_t, 2, 2>());
}

// Reads kChannels channels from c of the input's row (n, y), as read_pixel does. They are adjacent, all in x or all in
// skip.
template <typename T, int64_t kChannels>
FASTDDPM_INLINE void read_row(const fastddpm_conv_args &p, const ConvSize &size, int64_t n, int64_t y, int64_t c,
                              float *to) {
    constexpr int64_t kVecs = kChannels / kWidth;
    const int64_t row = p.doubled ? y >> 1 : y, step = c < p.c1 ? p.x_stride[2] : p.c2;
    const float *from = c < p.c1 ? p.x + n * p.x_stride[0] + row * p.x_stride[1] + c
                                 : p.skip + (n * p.height + row) * p.width * p.c2 + (c - p.c1);
    Vec gain[kVecs], offset[kVecs];
    for (int64_t i = 0; i < kVecs && p.gain; ++i) {
        gain[i] = load(p.gain + n * size.channels + c + i * kWidth);
        offset[i] = load(p.offset + n * size.channels + c + i * kWidth);
    }
    for (int64_t x = 0; x < size.width; ++x, to += kChannels) {
        const float *pixel = from + (p.doubled ? x >> 1 : x) * step;
#pragma GCC unroll 8
        for (int64_t i = 0; i < kVecs; ++i) {
            Vec v = load(pixel + i * kWidth);
            if (p.gain) v = v * gain[i] + offset[i];
            store(to + i * kWidth, p.gain && p.silu ? activated<T>(v) : v);
        }
    }
}

// A line of channels of the input of a strip, activated, with the convolution's zeros around the image.
template <typename A>
inline void fill_scratch(const fastddpm_conv_args &args, const Tiling &tiling, int64_t strip, int64_t c, float *scratch) {
    using T = typename A::Element;
    constexpr int64_t kChannels = kLineOf<T>;
    const fastddpm_conv_args p = args;  // which the compiler knows that no store changes
    const ConvSize size(p);
    const int64_t n = strip / tiling.image_strips, first_row = strip % tiling.image_strips * tiling.strip_rows;
    const int64_t rows = smaller(tiling.strip_rows, tiling.tiles_high - first_row);
    const int64_t count = smaller(kChannels, size.channels - c);
    const int64_t before_seam = c < p.c1 ? smaller(count, p.c1 - c) : 0;
    const bool whole = count == kChannels && (before_seam == 0 || before_seam == kChannels);  // all in x or all in skip
    const int64_t row_floats = tiling.scratch_width * kChannels;
    if (count < kChannels) memset(scratch, 0, static_cast<size_t>(tiling.scratch_height * row_floats) * sizeof(float));
    for (int64_t i = 0; i < A::kDown * rows + 2; ++i) {
        const int64_t y = A::kDown * first_row - 1 + i;
        float *to = scratch + i * row_floats;
        if (y < 0 || y >= size.height) {
            memset(to, 0, static_cast<size_t>(row_floats) * sizeof(float));
            continue;
        }
        memset(to, 0, kChannels * sizeof(float));
        if (whole) {
            read_row<T, kChannels>(p, size, n, y, c, to + kChannels);
        } else {
            for (int64_t x = 0; x < size.width; ++x) {
                float *pixel = to + (x + 1) * kChannels;
                if (before_seam > 0) read_pixel<T>(p, size, n, y, x, c, before_seam, pixel);
                if (before_seam < count)
                    read_pixel<T>(p, size, n, y, x, c + before_seam, count - before_seam, pixel + before_seam);
            }
        }
        float *end = to + (size.width + 1) * kChannels;
        memset(end, 0, static_cast<size_t>(row_floats - (size.width + 1) * kChannels) * sizeof(float));
    }
}

// Calls emit(point, B^T d B there) for one vector of channels of a tile, whose input begins at `corner`.
template <typename A, typename Emit>
FASTDDPM_INLINE void transform_tile(const float *corner, int64_t row, int64_t column, Emit emit) {
    Vec columns[A::kPointsDown][A::kPointsAcross];  // [point down][pixel across]
#pragma GCC unroll 6
    for (int j = 0; j < A::kPointsAcross; ++j) {
        Vec d[A::kPointsDown], r[A::kPointsDown];
        for (int i = 0; i < A::kPointsDown; ++i) d[i] = load(corner + i * row + j * column);
        A::Down::input(d, r);
        for (int i = 0; i < A::kPointsDown; ++i) columns[i][j] = r[i];
    }
#pragma GCC unroll 6
    for (int i = 0; i < A::kPointsDown; ++i) {
        Vec r[A::kPointsAcross];
        A::Across::input(columns[i], r);
        for (int j = 0; j < A::kPointsAcross; ++j) emit(i * A::kPointsAcross + j, r[j]);
    }
}

// Writes a word of each product, `plane` elements from one to the next, for one vector of channels. transform(i, emit)
// calls emit(point, vector) for each product of the word's element i; elements from `count` on are zero.
template <typename A, typename Transform>
FASTDDPM_INLINE void write_products(int64_t count, typename A::Element *to, int64_t plane, Transform transform) {
    if constexpr (Factors<typename A::Element>::kDepth == 1) {
        if (count > 0)
            transform(0, [&](int point, Vec r) { store(to + point * plane, r); });
        else
            for (int point = 0; point < A::kProducts; ++point) store(to + point * plane, Vec{});
    } else {
        Vec low[A::kProducts] = {}, high[A::kProducts] = {};
        if (count > 0) transform(0, [&](int point, Vec r) { low[point] = r; });
        if (count > 1) transform(1, [&](int point, Vec r) { high[point] = r; });
        for (int point = 0; point < A::kProducts; ++point) store(to + point * plane, paired(low[point], high[point]));
    }
}

// Where the input of tile t of a strip begins in its scratch image.
template <typename A>
FASTDDPM_INLINE const float *corner_of(const Tiling &tiling, const float *scratch, int64_t t) {
    const int64_t pixel = A::kDown * (t / tiling.tiles_wide) * tiling.scratch_width + A::kAcross * (t % tiling.tiles_wide);
    return scratch + pixel * kLineOf<typename A::Element>;
}

// B^T d B of the tiles of a strip, for a line of channels from c: point i of its tile t at v[i plane + t row].
template <typename A>
inline void transform_input(const fastddpm_conv_args &p, const Tiling &tiling, int64_t strip, int64_t c, float *scratch,
                            typename A::Element *v, int64_t row, int64_t plane) {
    constexpr int64_t kChannels = kLineOf<typename A::Element>;
    fill_scratch<A>(p, tiling, strip, c, scratch);
    const int64_t tiles = tiling.first_tile(strip + 1) - tiling.first_tile(strip);
    for (int64_t t = 0; t < tiles; ++t) {
        const float *corner = corner_of<A>(tiling, scratch, t);
        for (int64_t lane = 0; lane < kChannels; lane += kWidth) {
            typename A::Element *to = v + t * row + lane;
            transform_tile<A>(corner + lane, tiling.scratch_width * kChannels, kChannels,
                              [&](int point, Vec r) { store(to + point * plane, r); });
        }
    }
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
