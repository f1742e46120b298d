// The weights' gradient of a 3x3 convolution by Winograd's algorithm, transposed. The forward pass is y = A^T [(G g
// G^T) * (B^T d B)] A; the gradient is dg = G^T [sum over tiles of (B^T d B) * (A dy A^T)] G: 36 products per tile
// instead of 144.
//
// The tiles of all images are taken in blocks of about kGradientTiles. For each block
//   1. transforms: B^T d B of the input into V (C / 32, 36, tiles, 32) and A dy A^T of the output's gradient into
//                  U (K / 64, 36, tiles, 64), which all threads share, and the sum of each strip's dy for the bias;
//   2. products:   for 32 input and 64 output channels at a time, the 36 products U^T V, added to M (36, 64, 32); after
//                  the last block G^T M G into the gradient.
// M of one task fits into a core's second-level cache; if there are several blocks, each task's M is kept. An element
// is summed over the tiles of a block in their order, then over the blocks in theirs: the blocks depend on the shape
// alone, so the bits do not depend on the number of threads.
#include "tiles.h"

namespace fastddpm {
namespace FASTDDPM_ISA {
namespace {

constexpr int64_t kGradientTiles = 128;
constexpr int64_t kGradientRows = 64;  // output channels of a task

struct Plan {
    Tiling tiling;
    int64_t channels, channel_lines, k_lines;
    int64_t panels, row_blocks;           // of 32 input channels; of 64 output channels
    int64_t v_plane, u_row, u_plane, m_plane;
    int64_t v_floats, u_floats, m_floats;  // of a panel of V, a row block of U, a task's M
    int64_t sums_row, shared_floats, thread_floats;

    explicit Plan(const fastddpm_conv_args &p)
        : tiling(p, kGradientTiles), channels(p.c1 + p.c2) {
        channel_lines = divide_up(channels, kLine);
        k_lines = divide_up(p.k, kLine);
        panels = divide_up(channels, kColumns);
        row_blocks = divide_up(p.k, kGradientRows);
        v_plane = tiling.block_tiles * kColumns + kPad;
        u_row = smaller(kGradientRows, up_to_lines(p.k));
        u_plane = tiling.block_tiles * u_row + kPad;
        m_plane = u_row * kColumns + kPad;
        v_floats = kProducts * v_plane;
        u_floats = kProducts * u_plane;
        m_floats = kProducts * m_plane;
        sums_row = up_to_lines(p.k);
        const int64_t kept = tiling.blocks > 1 ? tasks() * m_floats : 0;
        shared_floats = panels * v_floats + row_blocks * u_floats + kept + tiling.strips * sums_row;
        thread_floats = larger(tiling.scratch_floats, m_floats);
    }

    int64_t tasks() const { return panels * row_blocks; }
};

// A dy A^T of the tiles of a strip, for sixteen output channels from k, laid out as transform_input does; and the sums
// of dy over the strip.
void transform_gradient(const fastddpm_conv_args &p, const Tiling &tiling, int64_t strip, int64_t k, float *u,
                        int64_t row, int64_t plane, float *sums) {
    const ConvSize size(p);
    const int64_t n = strip / tiling.image_strips;
    const int64_t first = tiling.first_tile(strip), tiles = tiling.first_tile(strip + 1) - first;
    for (int64_t lane = 0; lane < kLine; lane += kWidth) {
        const int64_t count = smaller(kWidth, p.k - k - lane);
        Vec total{};
        for (int64_t t = 0; t < tiles; ++t) {
            const int64_t within = first + t - n * tiling.image_tiles;
            const int64_t y = within / tiling.tiles_wide * kTile, x = within % tiling.tiles_wide * kTile;
            const float *corner = p.grad + ((n * size.out_height + y) * size.out_width + x) * p.k + k + lane;
            Vec columns[kPoints][kTile];  // [point down][pixel across]
            for (int j = 0; j < kTile; ++j) {
                Vec d[kTile], r[kPoints];
                for (int i = 0; i < kTile; ++i) {
                    const float *pixel = corner + (i * size.out_width + j) * p.k;
                    d[i] = y + i >= size.out_height || x + j >= size.out_width ? Vec{}
                           : count >= kWidth                                   ? load(pixel)
                                                                               : load_part(pixel, count);
                    total += d[i];
                }
                gradient_transform(d, r);
                for (int i = 0; i < kPoints; ++i) columns[i][j] = r[i];
            }
            float *to = u + t * row + lane;
            for (int i = 0; i < kPoints; ++i) {
                Vec r[kPoints];
                gradient_transform(columns[i], r);
                for (int j = 0; j < kPoints; ++j) store(to + (i * kPoints + j) * plane, r[j]);
            }
        }
        store(sums + lane, total);
    }
}

// One vector of input channels at c, `count` of them, of one output channel's gradient: `taps` at its weight_stride.
void write_taps(const fastddpm_conv_args &p, int64_t k, int64_t c, int64_t count, const Vec taps[kTaps]) {
    const int64_t *stride = p.weight_stride;
    float *to = p.grad_weight + k * stride[0] + c * stride[1];
    for (int64_t tap = 0; tap < kTaps; ++tap) {
        float *at = to + tap / 3 * stride[2] + tap % 3 * stride[3];
        if (stride[1] != 1)
            for (int64_t i = 0; i < count; ++i) at[i * stride[1]] = taps[tap][i];
        else
            count >= kWidth ? store(at, taps[tap]) : store_part(at, taps[tap], count);
    }
}

// G^T M G of a task.
void finish_gradient(const fastddpm_conv_args &p, const Plan &plan, int64_t k, int64_t rows, int64_t c, int64_t columns,
                     const float *m) {
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t i = 0; i < columns; i += kWidth) {
            const float *from = m + row * kColumns + i;
            Vec across[3][kPoints], taps[kTaps];
            for (int j = 0; j < kPoints; ++j) {
                Vec d[kPoints], r[3];
                for (int point = 0; point < kPoints; ++point)
                    d[point] = load(from + (point * kPoints + j) * plan.m_plane);
                weight_gradient_transform(d, r);
                for (int tap = 0; tap < 3; ++tap) across[tap][j] = r[tap];
            }
            for (int tap = 0; tap < 3; ++tap) weight_gradient_transform(across[tap], taps + 3 * tap);
            write_taps(p, k + row, c + i, smaller(kWidth, columns - i), taps);
        }
}

// The parts of the workspace that all threads share.
struct Shared {
    float *v, *u, *sums, *kept;  // kept: each task's M, where there are several blocks

    Shared(const Plan &plan, void *workspace)
        : v(static_cast<float *>(workspace)),
          u(v + plan.panels * plan.v_floats),
          sums(u + plan.row_blocks * plan.u_floats),
          kept(sums + plan.tiling.strips * plan.sums_row) {}
};

// One line of channels, first the input's, then the gradient's, of a strip whose tiles begin at tile `at` of the block.
void transform(const fastddpm_conv_args &p, const Plan &plan, const Shared &shared, int64_t strip, int64_t line,
               int64_t at, float *scratch) {
    if (line < plan.channel_lines) {
        const int64_t c = line * kLine;
        float *v = shared.v + c / kColumns * plan.v_floats + at * kColumns + c % kColumns;
        transform_input(p, plan.tiling, strip, c, scratch, v, kColumns, plan.v_plane);
    } else {
        const int64_t k = (line - plan.channel_lines) * kLine;
        float *u = shared.u + k / kGradientRows * plan.u_floats + at * plan.u_row + k % kGradientRows;
        transform_gradient(p, plan.tiling, strip, k, u, plan.u_row, plan.u_plane,
                           shared.sums + strip * plan.sums_row + k);
    }
}

// What the block's tiles add to a task's M, or the first block's begin it with; after the last the gradient.
void multiply(const fastddpm_conv_args &p, const Plan &plan, const Shared &shared, int64_t task, int64_t block,
              int64_t tiles, float *own) {
    const int64_t panel = task % plan.panels, row_block = task / plan.panels;
    const int64_t c = panel * kColumns, columns = smaller(kColumns, plan.channels - c);
    const int64_t k = row_block * kGradientRows, rows = smaller(kGradientRows, p.k - k);
    const float *u = shared.u + row_block * plan.u_floats, *v = shared.v + panel * plan.v_floats;
    float *m = plan.tiling.blocks > 1 ? shared.kept + task * plan.m_floats : own;
    for (int64_t point = 0; point < kProducts; ++point)
        for (int64_t i = 0; i < columns; i += kPanel)
            product<true>(rows, columns - i, u + point * plan.u_plane, plan.u_row, v + point * plan.v_plane + i, tiles,
                          m + point * plan.m_plane + i, kColumns, block > 0);
    if (block + 1 == plan.tiling.blocks) finish_gradient(p, plan, k, rows, c, columns, m);
}

void write_bias_gradient(const fastddpm_conv_args &p, const Plan &plan, const float *sums) {
    for (int64_t k = 0; k < p.k; ++k) {
        double total = 0;
        for (int64_t strip = 0; strip < plan.tiling.strips; ++strip) total += sums[strip * plan.sums_row + k];
        p.grad_bias[k] = static_cast<float>(total);
    }
}

}  // namespace

int64_t weight_gradient_workspace(const fastddpm_conv_args &p, int32_t threads) {
    const Plan plan(p);
    return (plan.shared_floats + threads * plan.thread_floats) * static_cast<int64_t>(sizeof(float));
}

int32_t winograd_weight_gradient(const fastddpm_conv_args &p, int32_t threads) {
    const Plan plan(p);
    const Tiling &tiling = plan.tiling;
    const Shared shared(plan, p.workspace);
    const int64_t lines = plan.channel_lines + plan.k_lines;
#pragma omp parallel num_threads(team_size(threads)) if (threads > 1)
    {
        float *own = shared.v + plan.shared_floats + thread_number() * plan.thread_floats;
        for (int64_t block = 0; block < tiling.blocks; ++block) {
            const int64_t first = block * tiling.block_strips;
            const int64_t last = smaller(first + tiling.block_strips, tiling.strips);
            const int64_t first_tile = tiling.first_tile(first), tiles = tiling.first_tile(last) - first_tile;
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < (last - first) * lines; ++task) {
                const int64_t strip = first + task / lines;
                transform(p, plan, shared, strip, task % lines, tiling.first_tile(strip) - first_tile, own);
            }
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < plan.tasks(); ++task) multiply(p, plan, shared, task, block, tiles, own);
        }
    }
    if (p.grad_bias != nullptr) write_bias_gradient(p, plan, shared.sums);
    return FASTDDPM_OK;
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
