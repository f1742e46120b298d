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
#include "tiles.h"
#include "turn.h"

namespace fastddpm {
namespace FASTDDPM_ISA {
namespace {

constexpr int64_t kBlockTiles = 128;
constexpr int64_t kDepth = 128;     // input channels whose transformed weights are held at once
constexpr int64_t kTurned = 16;     // input channels whose weights are turned at once
constexpr int64_t kWeightPlane = kDepth * kColumns + kPad;

struct Plan {
    Tiling tiling;
    ConvSize size;
    int64_t column_blocks, parts, part_tiles;  // a task of the second phase: 32 channels of a part of the block's tiles
    int64_t v_row, v_block, v_plane, m_plane;  // V is (36, C / kDepth, tiles, kDepth)
    int64_t shared_floats, thread_floats;

    Plan(const fastddpm_conv_args &p, int32_t threads) : tiling(p, kBlockTiles), size(p) {
        column_blocks = divide_up(p.k, kColumns);
        const bool even = column_blocks % threads == 0 || column_blocks >= 4 * threads;
        parts = even ? 1 : smaller(threads, divide_up(tiling.block_tiles, kRows));
        part_tiles = divide_up(tiling.block_tiles, parts);
        v_row = smaller(kDepth, up_to_lines(size.channels));
        v_block = tiling.block_tiles * v_row;
        v_plane = divide_up(size.channels, kDepth) * v_block + kPad;
        m_plane = part_tiles * kColumns + kPad;
        shared_floats = up_to_lines(kProducts * v_plane);
        // A thread's scratch image is done with before its U, M and gathered weights are begun.
        const int64_t product_floats =
            kProducts * kWeightPlane + kTaps * kTurned * kColumns + up_to_lines(kProducts * m_plane);
        thread_floats = larger(tiling.scratch_floats, product_floats);
    }
};

// Elements from input channel to input channel, and from tap to tap, of weights whose output channels are adjacent.
struct Order {
    int64_t row, down, across;
};
constexpr Order kPacked{kTaps * kColumns, 3 * kColumns, kColumns};  // (channel, tap, kColumns)

// The weights of `columns` output channels from k and `depth` input channels from c, to g.
void gather_weights(const fastddpm_conv_args &p, int64_t k, int64_t columns, int64_t c, int64_t depth, float *g,
                    const Order &order) {
    const int64_t *stride = p.weight_stride;
    for (int64_t tap = 0; tap < kTaps; ++tap)
        turn(p.weight + k * stride[0] + c * stride[1] + tap / 3 * stride[2] + tap % 3 * stride[3], stride[0], stride[1],
             columns, depth, g + tap / 3 * order.down + tap % 3 * order.across, order.row);
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

void transform_rows(const float *from, const Order &order, int64_t columns, int64_t depth, float *u) {
    for (int64_t d = 0; d < depth; ++d)
        for (int64_t i = 0; i < columns; i += kWidth)
            transform_weight(from + d * order.row + i, order.down, order.across, u + d * kColumns + i);
}

// U (36, depth, kColumns) of `columns` output channels from k and `depth` input channels from c.
void transform_weights(const fastddpm_conv_args &p, int64_t k, int64_t columns, int64_t c, int64_t depth, float *g,
                       float *u) {
    const int64_t *stride = p.weight_stride;
    if (p.packed != nullptr) {
        transform_rows(packed_columns(p, k) + c * kTaps * kColumns, kPacked, columns, depth, u);
        return;
    }
    if (stride[0] == 1 && columns % kWidth == 0) {
        transform_rows(p.weight + k + c * stride[1], {stride[1], stride[2], stride[3]}, columns, depth, u);
        return;
    }
    // A few channels at a time: their turned weights stay in the first-level cache.
    const bool dense = stride[1] == kTaps && stride[2] == 3 && stride[3] == 1;
    for (int64_t d = 0; d < depth; d += kTurned) {
        const int64_t count = smaller(kTurned, depth - d);
        if (dense)  // channels and taps are one row
            turn(p.weight + k * stride[0] + (c + d) * kTaps, stride[0], 1, columns, count * kTaps, g, kColumns);
        else
            gather_weights(p, k, columns, c + d, count, g, kPacked);
        transform_rows(g, kPacked, columns, count, u + d * kColumns);
    }
}

// A^T M A of one tile and what follows it, for the vector of output channels at k.
void finish_tile(const fastddpm_conv_args &p, const Plan &plan, int64_t tile, int64_t k, const float *m) {
    const int64_t n = tile / plan.tiling.image_tiles, within = tile % plan.tiling.image_tiles;
    const int64_t y = within / plan.tiling.tiles_wide * kTile, x = within % plan.tiling.tiles_wide * kTile;
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
    float *u = buffer, *g = u + kProducts * kWeightPlane, *m = g + kTaps * kTurned * kColumns;
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
        gather_weights(p, k, smaller(kColumns, p.k - k), 0, channels, packed, kPacked);
}

int64_t winograd_workspace(const fastddpm_conv_args &p, int32_t threads) {
    const Plan plan(p, threads);
    return (plan.shared_floats + threads * plan.thread_floats) * static_cast<int64_t>(sizeof(float));
}

int32_t conv_winograd(const fastddpm_conv_args &p, int32_t threads) {
    const Plan plan(p, threads);
    const Tiling &tiling = plan.tiling;
    float *v = static_cast<float *>(p.workspace);
    const int64_t channel_lines = divide_up(plan.size.channels, kLine);
#pragma omp parallel num_threads(team_size(threads)) if (threads > 1)
    {
        float *own = v + plan.shared_floats + thread_number() * plan.thread_floats;
        for (int64_t first = 0; first < tiling.strips; first += tiling.block_strips) {
            const int64_t last = smaller(first + tiling.block_strips, tiling.strips);
            const int64_t first_tile = tiling.first_tile(first), tiles = tiling.first_tile(last) - first_tile;
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < (last - first) * channel_lines; ++task) {
                const int64_t strip = first + task / channel_lines, c = task % channel_lines * kLine;
                const int64_t at = tiling.first_tile(strip) - first_tile;
                transform_input(p, tiling, strip, c, own, v + c / kDepth * plan.v_block + at * plan.v_row + c % kDepth,
                                plan.v_row, plan.v_plane);
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
