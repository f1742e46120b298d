// 3x3 convolution by Winograd's F(4x4, 3x3), everything around it in the same pass over cache-sized blocks.
//
// The tiles of all images are taken in blocks of about kBlockTiles. For each block
//   1. input:    activation of 16 channels of a strip of tile rows in a scratch image, B^T d B of its tiles into
//                V (36, tiles, C), which all threads share;
//   2. products: for 32 output channels at a time, G g G^T of the weights for kDepth input channels into U, the
//                36 products V U summed into M (36, tiles, 32), then A^T M A + bias + temb + residual into the output.
// U and M belong to a thread and fit into its second-level cache; the transformed weights of a layer, four times the
// size of the weights, never exist as a whole. Each output is summed in one order, whatever the batch, the blocks and
// the number of threads are.
#include "conv.h"
#include "gemm.h"
#include "turn.h"
#include "winograd.h"

namespace fastddpm {
namespace FASTDDPM_ISA {
namespace {

constexpr int64_t kBlockTiles = 128;
constexpr int64_t kDepth = 128;     // input channels whose transformed weights are held at once
constexpr int64_t kTaps = 9;
constexpr int64_t kPad = kLine;    // keeps the 36 planes of V, U and M out of one cache set
constexpr int64_t kWeightPlane = kDepth * kColumns + kPad;

struct Plan {
    ConvSize size;
    int64_t tiles_high, tiles_wide, image_tiles;
    int64_t strip_rows, image_strips, strips;  // a strip: tile rows of one image
    int64_t block_strips, block_tiles;
    int64_t column_blocks, parts, part_tiles;  // a task of the second phase: 32 channels of a part of the block's tiles
    int64_t v_row, v_block, v_plane, m_plane, scratch_width;  // V is (36, C / kDepth, tiles, kDepth)
    int64_t shared_floats, thread_floats, scratch_floats;

    Plan(const fastddpm_conv_args &p, int32_t threads) : size(p) {
        tiles_high = divide_up(size.out_height, kTile);
        tiles_wide = divide_up(size.out_width, kTile);
        image_tiles = tiles_high * tiles_wide;
        const int64_t most_rows = larger(1, smaller(tiles_high, kBlockTiles / tiles_wide));
        image_strips = divide_up(tiles_high, most_rows);
        strip_rows = divide_up(tiles_high, image_strips);
        image_strips = divide_up(tiles_high, strip_rows);
        strips = p.n * image_strips;
        const int64_t most_strips = larger(1, kBlockTiles / (strip_rows * tiles_wide));
        block_strips = larger(1, divide_up(strips, larger(1, divide_up(strips, most_strips))));
        block_tiles = block_strips * strip_rows * tiles_wide;
        column_blocks = divide_up(p.k, kColumns);
        const bool even = column_blocks % threads == 0 || column_blocks >= 4 * threads;
        parts = even ? 1 : smaller(threads, divide_up(block_tiles, kRows));
        part_tiles = divide_up(block_tiles, parts);
        v_row = smaller(kDepth, up_to_lines(size.channels));
        v_block = block_tiles * v_row;
        v_plane = divide_up(size.channels, kDepth) * v_block + kPad;
        m_plane = part_tiles * kColumns + kPad;
        scratch_width = kTile * tiles_wide + 2;
        scratch_floats = (kTile * strip_rows + 2) * scratch_width * kLine;
        shared_floats = up_to_lines(kProducts * v_plane);
        // A thread's scratch image is done with before its U, M and gathered weights are begun.
        const int64_t product_floats =
            kProducts * kWeightPlane + kTaps * kDepth * kColumns + up_to_lines(kProducts * m_plane);
        thread_floats = larger(scratch_floats, product_floats);
    }

    int64_t first_tile(int64_t strip) const {
        return strip / image_strips * image_tiles + strip % image_strips * strip_rows * tiles_wide;
    }
};

// Sixteen channels of the input of a strip, activated, with the convolution's zeros around the image.
void fill_scratch(const fastddpm_conv_args &p, const Plan &plan, int64_t strip, int64_t c, float *scratch) {
    const int64_t n = strip / plan.image_strips, first_row = strip % plan.image_strips * plan.strip_rows;
    const int64_t rows = smaller(plan.strip_rows, plan.tiles_high - first_row);
    const int64_t count = smaller(kLine, plan.size.channels - c);
    const int64_t before_seam = c < p.c1 ? smaller(count, p.c1 - c) : 0;
    if (count < kLine) memset(scratch, 0, static_cast<size_t>(plan.scratch_floats) * sizeof(float));
    for (int64_t i = 0; i < kTile * rows + 2; ++i) {
        const int64_t y = kTile * first_row - 1 + i;
        float *to = scratch + i * plan.scratch_width * kLine;
        if (y < 0 || y >= plan.size.height) {
            memset(to, 0, static_cast<size_t>(plan.scratch_width * kLine) * sizeof(float));
            continue;
        }
        memset(to, 0, kLine * sizeof(float));
        for (int64_t x = 0; x < plan.size.width; ++x) {
            float *pixel = to + (x + 1) * kLine;
            if (before_seam == kLine || (before_seam == 0 && count == kLine)) {
                read_pixel(p, plan.size, n, y, x, c, kLine, pixel);
                continue;
            }
            if (before_seam > 0) read_pixel(p, plan.size, n, y, x, c, before_seam, pixel);
            if (before_seam < count)
                read_pixel(p, plan.size, n, y, x, c + before_seam, count - before_seam, pixel + before_seam);
        }
        float *end = to + (plan.size.width + 1) * kLine;
        memset(end, 0, static_cast<size_t>((plan.scratch_width - plan.size.width - 1) * kLine) * sizeof(float));
    }
}

// B^T d B of the tiles of a strip: sixteen channels of V, from the strip's first tile on.
void transform_input(const Plan &plan, int64_t tiles, const float *scratch, float *v) {
    for (int64_t t = 0; t < tiles; ++t) {
        const int64_t row = t / plan.tiles_wide, column = t % plan.tiles_wide;
        const float *corner = scratch + kTile * (row * plan.scratch_width + column) * kLine;
        for (int64_t lane = 0; lane < kLine; lane += kWidth) {
            Vec columns[kPoints][kPoints];  // [point down][pixel across]
            for (int j = 0; j < kPoints; ++j) {
                Vec d[kPoints], r[kPoints];
                for (int i = 0; i < kPoints; ++i) d[i] = load(corner + (i * plan.scratch_width + j) * kLine + lane);
                input_transform(d, r);
                for (int i = 0; i < kPoints; ++i) columns[i][j] = r[i];
            }
            float *to = v + t * plan.v_row + lane;
            for (int i = 0; i < kPoints; ++i) {
                Vec r[kPoints];
                input_transform(columns[i], r);
                for (int j = 0; j < kPoints; ++j) store(to + (i * kPoints + j) * plan.v_plane, r[j]);
            }
        }
    }
}

// The weights of `columns` output channels from k and `depth` input channels from c as (9, depth, kColumns), tap_stride
// elements from tap to tap and row elements from input channel to input channel.
void gather_weights(const fastddpm_conv_args &p, int64_t k, int64_t columns, int64_t c, int64_t depth, float *g,
                    int64_t tap_stride, int64_t row) {
    const int64_t *stride = p.weight_stride;
    for (int64_t tap = 0; tap < kTaps; ++tap)
        turn(p.weight + k * stride[0] + c * stride[1] + tap / 3 * stride[2] + tap % 3 * stride[3], stride[0], stride[1],
             columns, depth, g + tap * tap_stride, row);
}

// G g G^T of one vector of output channels.
FASTDDPM_INLINE void transform_weight(const float *g, int64_t row_stride, int64_t column_stride, float *u) {
    Vec columns[kPoints][3];
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j) {
        Vec d[3], r[kPoints];
        for (int i = 0; i < 3; ++i) d[i] = load(g + i * row_stride + j * column_stride);
        weight_transform(d, r);
        for (int i = 0; i < kPoints; ++i) columns[i][j] = r[i];
    }
#pragma GCC unroll 6
    for (int i = 0; i < kPoints; ++i) {
        Vec r[kPoints];
        weight_transform(columns[i], r);
        for (int j = 0; j < kPoints; ++j) store(u + (i * kPoints + j) * kWeightPlane, r[j]);
    }
}

// U (36, depth, kColumns) of `columns` output channels from k and `depth` input channels from c.
void transform_weights(const fastddpm_conv_args &p, int64_t k, int64_t columns, int64_t c, int64_t depth, float *g,
                       float *u) {
    const float *from = g;
    int64_t row = kColumns, down = 3 * kDepth * kColumns, across = kDepth * kColumns;
    if (p.packed != nullptr) {
        from = packed_columns(p, k) + c * kTaps * kColumns;
        row = kTaps * kColumns, down = 3 * kColumns, across = kColumns;
    } else if (p.weight_stride[0] == 1 && columns % kWidth == 0) {
        from = p.weight + k + c * p.weight_stride[1];
        row = p.weight_stride[1], down = p.weight_stride[2], across = p.weight_stride[3];
    } else {
        gather_weights(p, k, columns, c, depth, g, kDepth * kColumns, kColumns);
    }
    for (int64_t d = 0; d < depth; ++d)
        for (int64_t i = 0; i < columns; i += kWidth)
            transform_weight(from + d * row + i, down, across, u + d * kColumns + i);
}

// A^T M A of one tile and what follows it, for the vector of output channels at k.
void finish_tile(const fastddpm_conv_args &p, const Plan &plan, int64_t tile, int64_t k, const float *m) {
    const int64_t n = tile / plan.image_tiles, within = tile % plan.image_tiles;
    const int64_t y = within / plan.tiles_wide * kTile, x = within % plan.tiles_wide * kTile;
    Vec columns[kTile][kPoints];
    for (int j = 0; j < kPoints; ++j) {
        Vec d[kPoints], r[kTile];
        for (int i = 0; i < kPoints; ++i) d[i] = load(m + (i * kPoints + j) * plan.m_plane);
        output_transform(d, r);
        for (int i = 0; i < kTile; ++i) columns[i][j] = r[i];
    }
    const int64_t rows = smaller(kTile, plan.size.out_height - y), across = smaller(kTile, plan.size.out_width - x);
    const int64_t count = smaller(kWidth, p.k - k);
    for (int64_t i = 0; i < rows; ++i) {
        Vec r[kTile];
        output_transform(columns[i], r);
        const int64_t pixel = (n * plan.size.out_height + y + i) * plan.size.out_width + x;
        for (int64_t j = 0; j < across; ++j) finish(p, n, pixel + j, k, r[j], count);
    }
}

// Output channels k .. k + 31 of the tiles first .. first + tiles - 1, whose transformed inputs begin at v.
void products(const fastddpm_conv_args &p, const Plan &plan, int64_t k, int64_t first, int64_t tiles, const float *v,
              float *buffer) {
    float *u = buffer, *g = u + kProducts * kWeightPlane, *m = g + kTaps * kDepth * kColumns;
    const int64_t columns = smaller(kColumns, p.k - k);
    for (int64_t c = 0; c < plan.size.channels; c += kDepth) {
        const int64_t depth = smaller(kDepth, plan.size.channels - c);
        transform_weights(p, k, columns, c, depth, g, u);
        for (int product_index = 0; product_index < kProducts; ++product_index)
            for (int64_t i = 0; i < columns; i += kPanel)
                product(tiles, columns - i, v + product_index * plan.v_plane + c / kDepth * plan.v_block, plan.v_row,
                        u + product_index * kWeightPlane + i, depth, m + product_index * plan.m_plane + i, kColumns,
                        c > 0);
    }
    for (int64_t t = 0; t < tiles; ++t)
        for (int64_t i = 0; i < columns; i += kWidth) finish_tile(p, plan, first + t, k + i, m + t * kColumns + i);
}

}  // namespace

// (K / kColumns, C, 9, kColumns)
void pack_winograd(const fastddpm_conv_args &p, float *packed) {
    const int64_t channels = p.c1 + p.c2;
    for (int64_t k = 0; k < p.k; k += kColumns, packed += channels * kTaps * kColumns)
        gather_weights(p, k, smaller(kColumns, p.k - k), 0, channels, packed, kColumns, kTaps * kColumns);
}

int64_t winograd_workspace(const fastddpm_conv_args &p, int32_t threads) {
    const Plan plan(p, threads);
    return (plan.shared_floats + threads * plan.thread_floats) * static_cast<int64_t>(sizeof(float));
}

int32_t conv_winograd(const fastddpm_conv_args &p, int32_t threads) {
    const Plan plan(p, threads);
    float *v = static_cast<float *>(p.workspace);
    const int64_t channel_blocks = divide_up(plan.size.channels, kLine);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *own = v + plan.shared_floats + thread_number() * plan.thread_floats;
        for (int64_t first = 0; first < plan.strips; first += plan.block_strips) {
            const int64_t last = smaller(first + plan.block_strips, plan.strips);
            const int64_t first_tile = plan.first_tile(first), tiles = plan.first_tile(last) - first_tile;
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < (last - first) * channel_blocks; ++task) {
                const int64_t strip = first + task / channel_blocks, c = task % channel_blocks * kLine;
                const int64_t begin = plan.first_tile(strip);
                fill_scratch(p, plan, strip, c, own);
                transform_input(plan, plan.first_tile(strip + 1) - begin, own,
                                v + c / kDepth * plan.v_block + (begin - first_tile) * plan.v_row + c % kDepth);
            }
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < plan.column_blocks * plan.parts; ++task) {
                const int64_t begin = task % plan.parts * plan.part_tiles;
                const int64_t count = smaller(plan.part_tiles, tiles - begin);
                if (count > 0)
                    products(p, plan, task / plan.parts * kColumns, first_tile + begin, count, v + begin * plan.v_row,
                             own);
            }
        }
    }
    return FASTDDPM_OK;
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
