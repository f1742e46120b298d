// The weights' gradient of a 3x3 convolution by Winograd's algorithms, transposed. The forward pass is y = A^T [(G g
// G^T) * (B^T d B)] A; the gradient is dg = G^T [sum over tiles of (B^T d B) * (A dy A^T)] G: with tiles of 4x4, 36
// products per tile instead of 144.
//
// The tiles of all images are taken in blocks. For each block
//   1. transforms: B^T d B of the input into V (C / 32, products, tiles, 32) and A dy A^T of the output's gradient into
//                  U (K / 64, products, tiles, 64), and the sum of each strip's dy for the bias;
//   2. products:   for 32 input and 64 output channels at a time, the products U^T V, added to M (products, 64, 32);
//                  after the last block G^T M G into the gradient.
// In bfloat16 two adjacent tiles of a channel are a word.
//
// With few channels a thread takes whole groups of blocks, with V, U and M of its own, so that no line goes from one core
// to another; M of the groups are added in the end. With many, M would be too large: the threads share V and U of a
// block, and M of one pair of channels' blocks fits into a core's second-level cache. An element is summed over the tiles
// of a block in their order, over the blocks of a group in theirs, then over the groups: all of them depend on the shape
// alone, so the bits do not depend on the number of threads.
#include "shares.h"
#include "tiles.h"

namespace fastddpm {
namespace FASTDDPM_ISA {
namespace {

template <typename A>
constexpr int64_t kGradientTiles = A::kProducts == 36 ? 128 : 256;
// With groups: tiles of a block, and how much M of all channels may take.
template <typename A>
constexpr int64_t kGroupTiles = A::kProducts == 36 ? 64 : 128;
constexpr int64_t kGroupBytes = 1280 << 10;
constexpr int64_t kFewestGroups = 8, kMostGroups = 16;
constexpr int64_t kGroupBlocks = 8;  // of a group, if there are more groups than the fewest
// Tiles that are multiplied at once, so that both factors stay in the first-level cache.
constexpr int64_t kGradientDepth = 128;
constexpr int64_t kGradientRows = 64;    // output channels of a task

template <typename A>
struct Plan {
    using T = typename A::Element;
    Tiling tiling;
    int64_t channels, channel_lines, k_lines;
    int64_t groups;                       // or 0: all threads share V and U
    int64_t strip_slots;                  // places for a strip's tiles, whole words; those without a tile are zero
    int64_t panels, row_blocks;           // of 32 input channels; of 64 output channels
    int64_t v_plane, u_row, u_plane, m_plane;
    int64_t v_size, u_size, m_floats;     // of a panel of V, a row block of U, a task's M
    int64_t sums_row, v_bytes, u_bytes, kept_bytes, sums_bytes;
    int64_t shared_bytes, thread_bytes;   // V and U belong to all threads, or to each

    explicit Plan(const fastddpm_conv_args &p)
        : tiling(p, A::kDown, A::kAcross, kGradientTiles<A>), channels(p.c1 + p.c2), groups(0) {
        channel_lines = divide_up(channels, kLineOf<T>);
        k_lines = divide_up(p.k, kLine);
        panels = divide_up(channels, kColumns);
        row_blocks = divide_up(p.k, kGradientRows);
        u_row = smaller(kGradientRows, up_to_lines(p.k));
        m_plane = u_row * kColumns + kLine;
        m_floats = A::kProducts * m_plane;
        constexpr int64_t kElement = sizeof(T), kFloat = sizeof(float);
        if (tasks() * m_floats * kFloat <= kGroupBytes) {
            const Tiling of_groups(p, A::kDown, A::kAcross, kGroupTiles<A>);
            const int64_t wanted = larger(kFewestGroups, smaller(of_groups.blocks / kGroupBlocks, kMostGroups));
            if (of_groups.blocks >= kFewestGroups) {
                tiling = of_groups;
                groups = wanted;
            }
        }
        strip_slots = whole_words<T>(tiling.strip_rows * tiling.tiles_wide);
        v_plane = tiling.block_strips * strip_slots * kColumns + kLineOf<T>;
        u_plane = tiling.block_strips * strip_slots * u_row + kLineOf<T>;
        v_size = A::kProducts * v_plane;
        u_size = A::kProducts * u_plane;
        sums_row = up_to_lines(p.k);
        v_bytes = whole_lines(panels * v_size * kElement);
        u_bytes = whole_lines(row_blocks * u_size * kElement);
        const int64_t kept = groups > 0 ? groups : tiling.blocks > 1 ? 1 : 0;
        kept_bytes = whole_lines(kept * tasks() * m_floats * kFloat);
        sums_bytes = whole_lines(tiling.strips * sums_row * kFloat);
        shared_bytes = kept_bytes + sums_bytes + (groups > 0 ? 0 : v_bytes + u_bytes);
        thread_bytes = whole_lines(larger(tiling.scratch_floats<T>(), m_floats) * kFloat) + (groups > 0 ? v_bytes + u_bytes : 0);
    }

    int64_t tasks() const { return panels * row_blocks; }
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

// Parts of the workspace. The last is the thread's own, and so are V and U with groups.
template <typename A>
struct Buffers {
    typename A::Element *v, *u;
    float *kept, *sums;  // kept: M of each group's tasks, or where there are several blocks, of each task
    float *own;          // a scratch image, or M of a task

    Buffers(const Plan<A> &plan, char *workspace, int64_t thread) {
        char *of_thread = workspace + plan.shared_bytes + thread * plan.thread_bytes;
        kept = reinterpret_cast<float *>(workspace);
        sums = reinterpret_cast<float *>(workspace + plan.kept_bytes);
        char *factors = plan.groups > 0 ? of_thread : workspace + plan.kept_bytes + plan.sums_bytes;
        v = reinterpret_cast<typename A::Element *>(factors);
        u = reinterpret_cast<typename A::Element *>(factors + plan.v_bytes);
        own = reinterpret_cast<float *>(of_thread + (plan.groups > 0 ? plan.v_bytes + plan.u_bytes : 0));
    }
};

// One line of channels, first the input's, then the gradient's, of a strip, which is number `at` of the block.
template <typename A>
void transform(const fastddpm_conv_args &p, const Plan<A> &plan, const Buffers<A> &buffers, int64_t strip, int64_t line,
               int64_t at) {
    using T = typename A::Element;
    const int64_t slot = at * plan.strip_slots;
    if (line < plan.channel_lines) {
        const int64_t c = line * kLineOf<T>;
        T *v = buffers.v + c / kColumns * plan.v_size + slot * kColumns + c % kColumns * Factors<T>::kDepth;
        transform_input(p, plan, strip, c, buffers.own, v);
    } else {
        const int64_t k = (line - plan.channel_lines) * kLine;
        T *u = buffers.u + k / kGradientRows * plan.u_size + slot * plan.u_row + k % kGradientRows * Factors<T>::kDepth;
        transform_gradient(p, plan, strip, k, u, buffers.sums + strip * plan.sums_row + k);
    }
}

// The channels of a task.
template <typename A>
struct Channels {
    int64_t panel, row_block, c, columns, k, rows;

    Channels(const fastddpm_conv_args &p, const Plan<A> &plan, int64_t task)
        : panel(task % plan.panels),
          row_block(task / plan.panels),
          c(panel * kColumns),
          columns(smaller(kColumns, plan.channels - c)),
          k(row_block * kGradientRows),
          rows(smaller(kGradientRows, p.k - k)) {}
};

// What the block's tiles add to a task's M, or begin it with.
template <typename A>
void multiply(const Plan<A> &plan, const Buffers<A> &buffers, const Channels<A> &of, int64_t slots, bool add, float *m) {
    const auto *u = buffers.u + of.row_block * plan.u_size, *v = buffers.v + of.panel * plan.v_size;
    for (int64_t point = 0; point < A::kProducts; ++point)
        for (int64_t t = 0; t < larger(1, slots); t += kGradientDepth)  // without tiles, once: M is zero
            for (int64_t i = 0; i < of.columns; i += kPanel)
                product<true>(of.rows, of.columns - i, u + point * plan.u_plane + t * plan.u_row, plan.u_row,
                              v + point * plan.v_plane + t * kColumns + i * Factors<typename A::Element>::kDepth,
                              smaller(kGradientDepth, slots - t), m + point * plan.m_plane + i, kColumns, add || t > 0);
}

template <typename A>
void write_bias_gradient(const fastddpm_conv_args &p, const Plan<A> &plan, const float *sums) {
    for (int64_t k = 0; k < p.k; ++k) {
        double total = 0;
        for (int64_t strip = 0; strip < plan.tiling.strips; ++strip) total += sums[strip * plan.sums_row + k];
        p.grad_bias[k] = static_cast<float>(total);
    }
}

// All threads: each a part of the transforms and of the products of a block.
template <typename A>
void differentiate_together(const fastddpm_conv_args &p, const Plan<A> &plan, const Buffers<A> &buffers) {
    const int64_t lines = plan.channel_lines + plan.k_lines, last = plan.tiling.blocks - 1;
    for (int64_t block = 0; block <= last; ++block) {
        const Tiling::Block of = plan.tiling.block(block);
        const int64_t strips = of.last - of.first;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < strips * lines; ++task)
            transform(p, plan, buffers, of.first + task / lines, task % lines, task / lines);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < plan.tasks(); ++task) {
            const Channels<A> channels(p, plan, task);
            float *m = last > 0 ? buffers.kept + task * plan.m_floats : buffers.own;
            multiply(plan, buffers, channels, strips * plan.strip_slots, block > 0, m);
            if (block == last) finish_gradient(p, plan, channels.k, channels.rows, channels.c, channels.columns, m);
        }
    }
}

// One thread: M of a group's blocks.
template <typename A>
void differentiate_group(const fastddpm_conv_args &p, const Plan<A> &plan, const Buffers<A> &buffers, int64_t group) {
    const int64_t lines = plan.channel_lines + plan.k_lines, blocks = plan.tiling.blocks;
    const int64_t first = blocks * group / plan.groups, end = blocks * (group + 1) / plan.groups;
    for (int64_t block = first; block < end; ++block) {
        const Tiling::Block of = plan.tiling.block(block);
        for (int64_t line = 0; line < lines; ++line)
            for (int64_t strip = of.first; strip < of.last; ++strip)
                transform(p, plan, buffers, strip, line, strip - of.first);
        for (int64_t task = 0; task < plan.tasks(); ++task)
            multiply(plan, buffers, Channels<A>(p, plan, task), (of.last - of.first) * plan.strip_slots, block > first,
                     buffers.kept + (group * plan.tasks() + task) * plan.m_floats);
    }
}

// The gradient of a task's weights, from M of all groups.
template <typename A>
void add_groups(const fastddpm_conv_args &p, const Plan<A> &plan, const Buffers<A> &buffers, int64_t task) {
    const float *from = buffers.kept + task * plan.m_floats;
    for (int64_t i = 0; i < plan.m_floats; i += kWidth) {
        Vec total = load(from + i);
        for (int64_t group = 1; group < plan.groups; ++group) total += load(from + group * plan.tasks() * plan.m_floats + i);
        store(buffers.own + i, total);
    }
    const Channels<A> channels(p, plan, task);
    finish_gradient(p, plan, channels.k, channels.rows, channels.c, channels.columns, buffers.own);
}

template <typename A>
void differentiate(const fastddpm_conv_args &p, int32_t threads) {
    const Plan<A> plan(p);
    char *workspace = static_cast<char *>(p.workspace);
    Shares groups(plan.groups, threads);
#pragma omp parallel num_threads(team_size(threads)) if (threads > 1)
    {
        const Buffers<A> buffers(plan, workspace, thread_number());
        if (plan.groups == 0) {
            differentiate_together(p, plan, buffers);
        } else {
            groups.run([&](int64_t group) { differentiate_group(p, plan, buffers, group); });
#pragma omp barrier
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < plan.tasks(); ++task) add_groups(p, plan, buffers, task);
        }
    }
    if (p.grad_bias != nullptr) write_bias_gradient(p, plan, Buffers<A>(plan, workspace, 0).sums);
}

}  // namespace

int64_t winograd_gradient_workspace(const fastddpm_conv_args &p, int32_t threads) {
    return with_algorithm(p, [&](auto algorithm) -> int64_t {
        const Plan<decltype(algorithm)> plan(p);
        return plan.shared_bytes + threads * plan.thread_bytes;
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
