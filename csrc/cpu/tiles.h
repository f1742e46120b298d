// The division of images into tiles for Winograd's algorithms, and B^T d B of the input's tiles.
#pragma once
#include "conv.h"
#include "winograd.h"

namespace fastddpm {
namespace FASTDDPM_ISA {

constexpr int64_t kTaps = 9;
constexpr int64_t kPad = kLine;  // keeps the 36 planes of the transformed tiles out of one cache set

// The tiles of all images. A strip is some tile rows of one image; a block is whole strips, about `most_tiles` tiles.
struct Tiling {
    int64_t tiles_high, tiles_wide, image_tiles;
    int64_t strip_rows, image_strips, strips;
    int64_t block_strips, block_tiles, blocks;
    int64_t scratch_width, scratch_floats;  // of an image that holds sixteen channels of a strip's input

    Tiling(const fastddpm_conv_args &p, int64_t most_tiles) {
        const ConvSize size(p);
        tiles_high = divide_up(size.out_height, kTile);
        tiles_wide = divide_up(size.out_width, kTile);
        image_tiles = tiles_high * tiles_wide;
        const int64_t most_rows = larger(1, smaller(tiles_high, most_tiles / tiles_wide));
        image_strips = divide_up(tiles_high, most_rows);
        strip_rows = divide_up(tiles_high, image_strips);
        image_strips = divide_up(tiles_high, strip_rows);
        strips = p.n * image_strips;
        const int64_t most_strips = larger(1, most_tiles / (strip_rows * tiles_wide));
        block_strips = larger(1, divide_up(strips, larger(1, divide_up(strips, most_strips))));
        block_tiles = block_strips * strip_rows * tiles_wide;
        blocks = larger(1, divide_up(strips, block_strips));
        scratch_width = kTile * tiles_wide + 2;
        scratch_floats = (kTile * strip_rows + 2) * scratch_width * kLine;
    }

    int64_t first_tile(int64_t strip) const {
        return strip / image_strips * image_tiles + strip % image_strips * strip_rows * tiles_wide;
    }
};

// Sixteen channels of the input of a strip, activated, with the convolution's zeros around the image.
inline void fill_scratch(const fastddpm_conv_args &p, const Tiling &tiling, int64_t strip, int64_t c, float *scratch) {
    const ConvSize size(p);
    const int64_t n = strip / tiling.image_strips, first_row = strip % tiling.image_strips * tiling.strip_rows;
    const int64_t rows = smaller(tiling.strip_rows, tiling.tiles_high - first_row);
    const int64_t count = smaller(kLine, size.channels - c);
    const int64_t before_seam = c < p.c1 ? smaller(count, p.c1 - c) : 0;
    if (count < kLine) memset(scratch, 0, static_cast<size_t>(tiling.scratch_floats) * sizeof(float));
    for (int64_t i = 0; i < kTile * rows + 2; ++i) {
        const int64_t y = kTile * first_row - 1 + i;
        float *to = scratch + i * tiling.scratch_width * kLine;
        if (y < 0 || y >= size.height) {
            memset(to, 0, static_cast<size_t>(tiling.scratch_width * kLine) * sizeof(float));
            continue;
        }
        memset(to, 0, kLine * sizeof(float));
        for (int64_t x = 0; x < size.width; ++x) {
            float *pixel = to + (x + 1) * kLine;
            if (before_seam == kLine || (before_seam == 0 && count == kLine)) {
                read_pixel(p, size, n, y, x, c, kLine, pixel);
                continue;
            }
            if (before_seam > 0) read_pixel(p, size, n, y, x, c, before_seam, pixel);
            if (before_seam < count)
                read_pixel(p, size, n, y, x, c + before_seam, count - before_seam, pixel + before_seam);
        }
        float *end = to + (size.width + 1) * kLine;
        memset(end, 0, static_cast<size_t>((tiling.scratch_width - size.width - 1) * kLine) * sizeof(float));
    }
}

// B^T d B of the tiles of a strip, for sixteen channels from c: point i, j of its tile t at
// v[(6 i + j) plane + t row]. `scratch` has scratch_floats.
inline void transform_input(const fastddpm_conv_args &p, const Tiling &tiling, int64_t strip, int64_t c, float *scratch,
                            float *v, int64_t row, int64_t plane) {
    fill_scratch(p, tiling, strip, c, scratch);
    const int64_t tiles = tiling.first_tile(strip + 1) - tiling.first_tile(strip);
    for (int64_t t = 0; t < tiles; ++t) {
        const float *corner =
            scratch + kTile * (t / tiling.tiles_wide * tiling.scratch_width + t % tiling.tiles_wide) * kLine;
        for (int64_t lane = 0; lane < kLine; lane += kWidth) {
            Vec columns[kPoints][kPoints];  // [point down][pixel across]
            for (int j = 0; j < kPoints; ++j) {
                Vec d[kPoints], r[kPoints];
                for (int i = 0; i < kPoints; ++i) d[i] = load(corner + (i * tiling.scratch_width + j) * kLine + lane);
                input_transform(d, r);
                for (int i = 0; i < kPoints; ++i) columns[i][j] = r[i];
            }
            float *to = v + t * row + lane;
            for (int i = 0; i < kPoints; ++i) {
                Vec r[kPoints];
                input_transform(columns[i], r);
                for (int j = 0; j < kPoints; ++j) store(to + (i * kPoints + j) * plane, r[j]);
            }
        }
    }
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
