// The weights' gradient of a 3x3 convolution by Winograd's algorithms, transposed. The forward pass is y = A^T [(G g
// G^T) * (B^T d B)] A; the gradient is dg = G^T [sum over tiles of (B^T d B) * (A dy A^T)] G: with tiles of 4x4, 36
// products per tile instead of 144.
//
// The tiles of all images are taken in blocks of about kGradientTiles. For each block
//   1. transforms: B^T d B of the input into V (C / 32, products, tiles, 32) and A dy A^T of the output's gradient into
//                  U (K / 64, products, tiles, 64), which all threads share, and the sum of each strip's dy for the
//                  bias;
//   2. products:   for 32 input and 64 output channels at a time, the products U^T V, added to M (products, 64, 32);
//                  after the last block G^T M G into the gradient.
// In bfloat16 two adjacent tiles of a channel are a word. M of one task fits into a core's second-level cache; if there
// are several blocks, each task's M is kept. An element is summed over the tiles of a block in their order, then over
// the blocks in theirs: the blocks depend on the shape alone, so the bits do not depend on the number of threads.
#include "tiles.h"

namespace fastddpm {
namespace FASTDDPM_ISA {
namespace {

template <typename A>
constexpr int64_t kGradientTiles = A::kProducts == 36 ? 128 : 256;
// Tiles that are multiplied at once, so that both factors stay in the first-level cache.
constexpr int64_t kGradientDepth = 128;
constexpr int64_t kGradientRows = 64;    // output channels of a task

template <typename A>
struct Plan {
    using T = typename A::Element;
    Tiling tiling;
    int64_t channels, channel_lines, k_lines;
    int64_t strip_slots;                  // places for a strip's tiles, whole words; those without a tile are zero
    int64_t panels, row_blocks;           // of 32 input channels; of 64 output channels
    int64_t v_plane, u_row, u_plane, m_plane;
    int64_t v_size, u_size, m_floats;     // of a panel of V, a row block of U, a task's M
    int64_t sums_row, v_bytes, u_bytes, kept_bytes, sums_bytes, thread_bytes;

    explicit Plan(const fastddpm_conv_args &p)
        : tiling(p, A::kDown, A::kAcross, kGradientTiles<A>), channels(p.c1 + p.c2) {
        channel_lines = divide_up(channels, kLineOf<T>);
        k_lines = divide_up(p.k, kLine);
        strip_slots = whole_words<T>(tiling.strip_rows * tiling.tiles_wide);
        panels = divide_up(channels, kColumns);
        row_blocks = divide_up(p.k, kGradientRows);
        v_plane = tiling.block_strips * strip_slots * kColumns + kLineOf<T>;
        u_row = smaller(kGradientRows, up_to_lines(p.k));
        u_plane = tiling.block_strips * strip_slots * u_row + kLineOf<T>;
        m_plane = u_row * kColumns + kLine;
        v_size = A::kProducts * v_plane;
        u_size = A::kProducts * u_plane;
        m_floats = A::kProducts * m_plane;
        sums_row = up_to_lines(p.k);
        constexpr int64_t kElement = sizeof(T), kFloat = sizeof(float);
        v_bytes = whole_lines(panels * v_size * kElement);
        u_bytes = whole_lines(row_blocks * u_size * kElement);
        kept_bytes = whole_lines(tiling.blocks > 1 ? tasks() * m_floats * kFloat : 0);
        sums_bytes = whole_lines(tiling.strips * sums_row * kFloat);
        thread_bytes = whole_lines(larger(tiling.scratch_floats<T>(), m_floats) * kFloat);
    }

    int64_t tasks() const { return panels * row_blocks; }
    int64_t shared_bytes() const { return v_bytes + u_bytes + kept_bytes + sums_bytes; }
};

// Writes one vector of channels of a strip's tiles, and zeros for the slots without one. transform(tile, emit) calls
// emit(point, vector) for each product. A row is the words of a slot, `plane` elements from product to product.
template <typename A, typename Transform>
FASTDDPM_INLINE void write_tiles(int64_t tiles, int64_t slots, typename A::Element *to, int64_t row, int64_t plane,
                                 Transform transform) {
    for (int64_t t = 0; t < slots; t += Factors<typename A::Element>::kDepth)
        write_products<A>(tiles - t, to + t * row, plane, [&](int64_t i, auto emit) { transform(t + i, emit); });
}

// B^T d B of the tiles of a strip, for a line of channels from c.
template <typename A>
void transform_input(const fastddpm_conv_args &p, const Plan<A> &plan, int64_t strip, int64_t c, float *scratch,
                     typename A::Element *v) {
    constexpr int64_t kChannels = kLineOf<typename A::Element>;
    const Tiling &tiling = plan.tiling;
    fill_scratch<A>(p, tiling, strip, c, scratch);
    const int64_t tiles = tiling.first_tile(strip + 1) - tiling.first_tile(strip);
    for (int64_t lane = 0; lane < kChannels; lane += kWidth)
        write_tiles<A>(tiles, plan.strip_slots, v + lane * Factors<typename A::Element>::kDepth, kColumns, plan.v_plane,
                       [&](int64_t t, auto emit) {
                           transform_tile<A>(corner_of<A>(tiling, scratch, t) + lane, tiling.scratch_width * kChannels,
                                             kChannels, emit);
                       });
}

// A dy A^T of the tiles of a strip, for sixteen output channels from k, and the sums of dy over the strip.
template <typename A>
void transform_gradient(const fastddpm_conv_args &p, const Plan<A> &plan, int64_t strip, int64_t k,
                        typename A::Element *u, float *sums) {
    const Tiling &tiling = plan.tiling;
    const ConvSize size(p);
    const int64_t n = strip / tiling.image_strips;
    const int64_t first = tiling.first_tile(strip), tiles = tiling.first_tile(strip + 1) - first;
    for (int64_t lane = 0; lane < kLine; lane += kWidth) {
        const int64_t count = smaller(kWidth, p.k - k - lane);
        Vec total{};
        const auto transform = [&](int64_t t, auto emit) {
            const int64_t within = first + t - n * tiling.image_tiles;
            const int64_t y = within / tiling.tiles_wide * A::kDown, x = within % tiling.tiles_wide * A::kAcross;
            const float *corner = p.grad + ((n * size.out_height + y) * size.out_width + x) * p.k + k + lane;
            Vec columns[A::kPointsDown][A::kAcross];  // [point down][pixel across]
            for (int j = 0; j < A::kAcross; ++j) {
                Vec d[A::kDown], r[A::kPointsDown];
                for (int i = 0; i < A::kDown; ++i) {
                    const float *pixel = corner + (i * size.out_width + j) * p.k;
                    d[i] = y + i >= size.out_height || x + j >= size.out_width ? Vec{}
                           : count >= kWidth                                   ? load(pixel)
                                                                               : load_part(pixel, count);
                    total += d[i];
                }
                A::Down::gradient(d, r);
                for (int i = 0; i < A::kPointsDown; ++i) columns[i][j] = r[i];
            }
            for (int i = 0; i < A::kPointsDown; ++i) {
                Vec r[A::kPointsAcross];
                A::Across::gradient(columns[i], r);
                for (int j = 0; j < A::kPointsAcross; ++j) emit(i * A::kPointsAcross + j, r[j]);
            }
        };
        write_tiles<A>(tiles, plan.strip_slots, u + lane * Factors<typename A::Element>::kDepth, plan.u_row, plan.u_plane,
                       transform);
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
template <typename A>
void finish_gradient(const fastddpm_conv_args &p, const Plan<A> &plan, int64_t k, int64_t rows, int64_t c,
                     int64_t columns, const float *m) {
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t i = 0; i < columns; i += kWidth) {
            const float *from = m + row * kColumns + i;
            Vec across[3][A::kPointsAcross], taps[kTaps];
            for (int j = 0; j < A::kPointsAcross; ++j) {
                Vec d[A::kPointsDown], r[3];
                for (int point = 0; point < A::kPointsDown; ++point)
                    d[point] = load(from + (point * A::kPointsAcross + j) * plan.m_plane);
                A::Down::weight_gradient(d, r);
                for (int tap = 0; tap < 3; ++tap) across[tap][j] = r[tap];
            }
            for (int tap = 0; tap < 3; ++tap) A::Across::weight_gradient(across[tap], taps + 3 * tap);
            write_taps(p, k + row, c + i, smaller(kWidth, columns - i), taps);
        }
}

// The parts of the workspace that all threads share.
template <typename A>
struct Shared {
    typename A::Element *v, *u;
    float *kept, *sums;  // kept: each task's M, where there are several blocks

    Shared(const Plan<A> &plan, char *workspace)
        : v(reinterpret_cast<typename A::Element *>(workspace)),
          u(reinterpret_cast<typename A::Element *>(workspace + plan.v_bytes)),
          kept(reinterpret_cast<float *>(workspace + plan.v_bytes + plan.u_bytes)),
          sums(reinterpret_cast<float *>(workspace + plan.v_bytes + plan.u_bytes + plan.kept_bytes)) {}
};

// One line of channels, first the input's, then the gradient's, of a strip, which is number `at` of the block.
template <typename A>
void transform(const fastddpm_conv_args &p, const Plan<A> &plan, const Shared<A> &shared, int64_t strip, int64_t line,
               int64_t at, float *scratch) {
    using T = typename A::Element;
    const int64_t slot = at * plan.strip_slots;
    if (line < plan.channel_lines) {
        const int64_t c = line * kLineOf<T>;
        T *v = shared.v + c / kColumns * plan.v_size + slot * kColumns + c % kColumns * Factors<T>::kDepth;
        transform_input(p, plan, strip, c, scratch, v);
    } else {
        const int64_t k = (line - plan.channel_lines) * kLine;
        T *u = shared.u + k / kGradientRows * plan.u_size + slot * plan.u_row + k % kGradientRows * Factors<T>::kDepth;
        transform_gradient(p, plan, strip, k, u, shared.sums + strip * plan.sums_row + k);
    }
}

// What the block's tiles add to a task's M, or the first block's begin it with; after the last the gradient.
template <typename A>
void multiply(const fastddpm_conv_args &p, const Plan<A> &plan, const Shared<A> &shared, int64_t task, int64_t block,
              int64_t slots, float *own) {
    const int64_t panel = task % plan.panels, row_block = task / plan.panels;
    const int64_t c = panel * kColumns, columns = smaller(kColumns, plan.channels - c);
    const int64_t k = row_block * kGradientRows, rows = smaller(kGradientRows, p.k - k);
    const auto *u = shared.u + row_block * plan.u_size, *v = shared.v + panel * plan.v_size;
    float *m = plan.tiling.blocks > 1 ? shared.kept + task * plan.m_floats : own;
    for (int64_t point = 0; point < A::kProducts; ++point)
        for (int64_t t = 0; t < larger(1, slots); t += kGradientDepth)  // without tiles, once: M is zero
            for (int64_t i = 0; i < columns; i += kPanel)
                product<true>(rows, columns - i, u + point * plan.u_plane + t * plan.u_row, plan.u_row,
                              v + point * plan.v_plane + t * kColumns + i * Factors<typename A::Element>::kDepth,
                              smaller(kGradientDepth, slots - t), m + point * plan.m_plane + i, kColumns,
                              block > 0 || t > 0);
    if (block + 1 == plan.tiling.blocks) finish_gradient(p, plan, k, rows, c, columns, m);
}

template <typename A>
void write_bias_gradient(const fastddpm_conv_args &p, const Plan<A> &plan, const float *sums) {
    for (int64_t k = 0; k < p.k; ++k) {
        double total = 0;
        for (int64_t strip = 0; strip < plan.tiling.strips; ++strip) total += sums[strip * plan.sums_row + k];
        p.grad_bias[k] = static_cast<float>(total);
    }
}

template <typename A>
void differentiate(const fastddpm_conv_args &p, int32_t threads) {
    const Plan<A> plan(p);
    const Tiling &tiling = plan.tiling;
    char *workspace = static_cast<char *>(p.workspace);
    const Shared<A> shared(plan, workspace);
    const int64_t lines = plan.channel_lines + plan.k_lines;
#pragma omp parallel num_threads(team_size(threads)) if (threads > 1)
    {
        float *own = reinterpret_cast<float *>(workspace + plan.shared_bytes() + thread_number() * plan.thread_bytes);
        for (int64_t block = 0; block < tiling.blocks; ++block) {
            const Tiling::Block of = tiling.block(block);
            const int64_t strips = of.last - of.first;
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < strips * lines; ++task)
                transform(p, plan, shared, of.first + task / lines, task % lines, task / lines, own);
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < plan.tasks(); ++task)
                multiply(p, plan, shared, task, block, strips * plan.strip_slots, own);
        }
    }
    if (p.grad_bias != nullptr) write_bias_gradient(p, plan, shared.sums);
}

}  // namespace

int64_t winograd_gradient_workspace(const fastddpm_conv_args &p, int32_t threads) {
    return with_algorithm(p, [&](auto algorithm) -> int64_t {
        const Plan<decltype(algorithm)> plan(p);
        return plan.shared_bytes() + threads * plan.thread_bytes;
    });
}

int32_t winograd_weight_gradient(const fastddpm_conv_args &p, int32_t threads) {
    with_algorithm(p, [&](auto algorithm) -> int64_t {
        differentiate<decltype(algorithm)>(p, threads);
        return 0;
    });
    return FASTDDPM_OK;
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
