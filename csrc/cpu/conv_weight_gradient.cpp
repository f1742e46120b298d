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
// Where threads can, they work alone, with V and U of their own: a line that goes from one core to another costs more than
// to read or to make it. With few channels a thread takes whole groups of blocks, and M of all channels; these are added
// in the end. With more, on up to kMostSections cores that share no cache, it takes a section of the channels, those of
// the input or of the output, for which it transforms all channels of the other. Otherwise the threads share V and U.
//
// An element is summed over the tiles of a block in their order, over the blocks of a group in theirs, then over the
// groups: all of them depend on the shape alone, so the bits do not depend on the number of threads.
#include "cores.h"
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
constexpr int64_t kFewestGroups = 4, kGroups = 8, kMostGroups = 16;
constexpr int64_t kGroupBlocks = 8;  // of a group, if there are more than kGroups groups
constexpr int64_t kMostSections = 4;
// Tiles that are multiplied at once, so that both factors stay in the first-level cache.
constexpr int64_t kGradientDepth = 128;
constexpr int64_t kGradientRows = 64;    // output channels of a task

template <typename A>
struct Plan {
    using T = typename A::Element;
    Tiling tiling;
    int64_t channels, channel_lines, k_lines;
    int64_t groups, row_sections, panel_sections;
    bool alone;                           // a thread has V and U of its own; otherwise all share them
    int64_t strip_slots;                  // places for a strip's tiles, whole words; those without a tile are zero
    int64_t panels, row_blocks;           // of 32 input channels; of 64 output channels
    int64_t v_plane, u_row, u_plane, m_plane;
    int64_t v_size, u_size, m_floats;     // of a panel of V, a row block of U, a task's M
    int64_t sums_row, v_bytes, u_bytes, kept_bytes, sums_bytes;
    int64_t shared_bytes, thread_bytes;   // V and U are part of either

    // `far`: the threads' cores share no cache.
    Plan(const fastddpm_conv_args &p, int32_t threads, bool far)
        : tiling(p, A::kDown, A::kAcross, kGradientTiles<A>),
          channels(p.c1 + p.c2),
          groups(1),
          row_sections(1),
          panel_sections(1) {
        channel_lines = divide_up(channels, kLineOf<T>);
        k_lines = divide_up(p.k, kLine);
        panels = divide_up(channels, kColumns);
        row_blocks = divide_up(p.k, kGradientRows);
        u_row = smaller(kGradientRows, up_to_lines(p.k));
        m_plane = u_row * kColumns + kLine;
        m_floats = A::kProducts * m_plane;
        constexpr int64_t kElement = sizeof(T), kFloat = sizeof(float);
        if (tasks() * m_floats * kFloat <= kGroupBytes) {
            const int64_t tiles = tiling.image_tiles * p.n;
            const Tiling of_groups(p, A::kDown, A::kAcross, smaller(kGroupTiles<A>, divide_up(tiles, kFewestGroups)));
            if (of_groups.blocks >= kFewestGroups) {
                tiling = of_groups;
                groups = smaller(tiling.blocks, larger(kGroups, smaller(tiling.blocks / kGroupBlocks, kMostGroups)));
            }
        }
        if (groups == 1 && far && threads <= kMostSections) {  // of the larger factor, as the other is transformed anew in each
            int64_t &sections = channels > p.k ? panel_sections : row_sections;
            const int64_t least = channels > p.k ? kGradientRows / kColumns : 1;
            if ((channels > p.k ? panels : row_blocks) % (least * threads) == 0) sections = threads;
        }
        alone = groups > 1 || row_sections * panel_sections == threads;
        strip_slots = whole_words<T>(tiling.strip_rows * tiling.tiles_wide);
        v_plane = tiling.block_strips * strip_slots * kColumns + kLineOf<T>;
        u_plane = tiling.block_strips * strip_slots * u_row + kLineOf<T>;
        v_size = A::kProducts * v_plane;
        u_size = A::kProducts * u_plane;
        sums_row = up_to_lines(p.k);
        v_bytes = whole_lines(panels / panel_sections * v_size * kElement);
        u_bytes = whole_lines(row_blocks / row_sections * u_size * kElement);
        kept_bytes = whole_lines(tiling.blocks > 1 ? groups * tasks() * m_floats * kFloat : 0);
        sums_bytes = whole_lines(tiling.strips * sums_row * kFloat);
        shared_bytes = kept_bytes + sums_bytes + (alone ? 0 : v_bytes + u_bytes);
        thread_bytes = whole_lines(larger(tiling.scratch_floats<T>(), m_floats) * kFloat) + (alone ? v_bytes + u_bytes : 0);
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

// A dy A^T of the tiles of a strip, for sixteen output channels from k, and unless null the sums of dy over the strip.
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
        if (sums != nullptr) store(sums + lane, total);
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

// Parts of the workspace. The last is the thread's own; so are V and U, if it is alone.
template <typename A>
struct Buffers {
    typename A::Element *v, *u;
    float *kept, *sums;  // kept: M of each group's tasks, where there are several blocks
    float *own;          // a scratch image, or M of a task

    Buffers(const Plan<A> &plan, char *workspace, int64_t thread) {
        char *of_thread = workspace + plan.shared_bytes + thread * plan.thread_bytes;
        kept = reinterpret_cast<float *>(workspace);
        sums = reinterpret_cast<float *>(workspace + plan.kept_bytes);
        char *factors = plan.alone ? of_thread : workspace + plan.kept_bytes + plan.sums_bytes;
        v = reinterpret_cast<typename A::Element *>(factors);
        u = reinterpret_cast<typename A::Element *>(factors + plan.v_bytes);
        own = reinterpret_cast<float *>(of_thread + (plan.alone ? plan.v_bytes + plan.u_bytes : 0));
    }
};

// The channels whose V and U are in the buffers: blocks of 32 of the input's, and of 64 of the output's.
struct Section {
    int64_t first_panel, end_panel, first_rows, end_rows;

    int64_t tasks() const { return (end_panel - first_panel) * (end_rows - first_rows); }
};

template <typename A>
Section section_of(const Plan<A> &plan, int64_t i) {
    const int64_t panels = plan.panels / plan.panel_sections, rows = plan.row_blocks / plan.row_sections;
    const int64_t panel = plan.panel_sections > 1 ? i * panels : 0, row = plan.row_sections > 1 ? i * rows : 0;
    return {panel, panel + panels, row, row + rows};
}

// Lines of channels of a section, first the input's, then the gradient's.
template <typename A>
struct Lines {
    int64_t first, inputs, first_of_gradient, count;

    Lines(const Plan<A> &plan, const Section &of) {
        constexpr int64_t kOfPanel = kColumns / kLineOf<typename A::Element>, kOfRows = kGradientRows / kLine;
        first = of.first_panel * kOfPanel;
        inputs = smaller(plan.channel_lines, of.end_panel * kOfPanel) - first;
        first_of_gradient = of.first_rows * kOfRows;
        count = inputs + smaller(plan.k_lines, of.end_rows * kOfRows) - first_of_gradient;
    }
};

// Line i of a strip, which is number `at` of the block.
template <typename A>
void transform(const fastddpm_conv_args &p, const Plan<A> &plan, const Buffers<A> &buffers, const Section &of,
               const Lines<A> &lines, int64_t i, int64_t strip, int64_t at) {
    using T = typename A::Element;
    const int64_t slot = at * plan.strip_slots;
    if (i < lines.inputs) {
        const int64_t c = (lines.first + i) * kLineOf<T>;
        T *v = buffers.v + (c / kColumns - of.first_panel) * plan.v_size + slot * kColumns + c % kColumns * Factors<T>::kDepth;
        transform_input(p, plan, strip, c, buffers.own, v);
    } else {
        const int64_t k = (lines.first_of_gradient + i - lines.inputs) * kLine;
        T *u = buffers.u + (k / kGradientRows - of.first_rows) * plan.u_size + slot * plan.u_row +
               k % kGradientRows * Factors<T>::kDepth;
        float *sums = of.first_panel == 0 ? buffers.sums + strip * plan.sums_row + k : nullptr;  // of one section
        transform_gradient(p, plan, strip, k, u, sums);
    }
}

// M of task i of a section: what the block's tiles add to it, or begin it with. With `finish`, the gradient.
template <typename A>
void multiply(const fastddpm_conv_args &p, const Plan<A> &plan, const Buffers<A> &buffers, const Section &of, int64_t i,
              int64_t group, int64_t slots, bool add, bool finish) {
    const int64_t panels = of.end_panel - of.first_panel;
    const int64_t panel = of.first_panel + i % panels, row_block = of.first_rows + i / panels;
    const int64_t c = panel * kColumns, columns = smaller(kColumns, plan.channels - c);
    const int64_t k = row_block * kGradientRows, rows = smaller(kGradientRows, p.k - k);
    const int64_t task = row_block * plan.panels + panel;
    const auto *u = buffers.u + i / panels * plan.u_size, *v = buffers.v + i % panels * plan.v_size;
    float *m = plan.tiling.blocks > 1 ? buffers.kept + (group * plan.tasks() + task) * plan.m_floats : buffers.own;
    for (int64_t point = 0; point < A::kProducts; ++point)
        for (int64_t t = 0; t < larger(1, slots); t += kGradientDepth)  // without tiles, once: M is zero
            for (int64_t j = 0; j < columns; j += kPanel)
                product<true>(rows, columns - j, u + point * plan.u_plane + t * plan.u_row, plan.u_row,
                              v + point * plan.v_plane + t * kColumns + j * Factors<typename A::Element>::kDepth,
                              smaller(kGradientDepth, slots - t), m + point * plan.m_plane + j, kColumns, add || t > 0);
    if (finish) finish_gradient(p, plan, k, rows, c, columns, m);
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
    const Section all = section_of(plan, 0);
    const Lines<A> lines(plan, all);
    const int64_t last = plan.tiling.blocks - 1;
    for (int64_t block = 0; block <= last; ++block) {
        const Tiling::Block of = plan.tiling.block(block);
        const int64_t strips = of.last - of.first;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < strips * lines.count; ++task)
            transform(p, plan, buffers, all, lines, task % lines.count, of.first + task / lines.count, task / lines.count);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < plan.tasks(); ++task)
            multiply(p, plan, buffers, all, task, 0, strips * plan.strip_slots, block > 0, block == last);
    }
}

// One thread: the blocks of a group, for a section of the channels.
template <typename A>
void differentiate_alone(const fastddpm_conv_args &p, const Plan<A> &plan, const Buffers<A> &buffers, int64_t group,
                         const Section &section) {
    const Lines<A> lines(plan, section);
    const int64_t blocks = plan.tiling.blocks;
    const int64_t first = blocks * group / plan.groups, end = blocks * (group + 1) / plan.groups;
    for (int64_t block = first; block < end; ++block) {
        const Tiling::Block of = plan.tiling.block(block);
        for (int64_t i = 0; i < lines.count; ++i)
            for (int64_t strip = of.first; strip < of.last; ++strip)
                transform(p, plan, buffers, section, lines, i, strip, strip - of.first);
        for (int64_t task = 0; task < section.tasks(); ++task)
            multiply(p, plan, buffers, section, task, group, (of.last - of.first) * plan.strip_slots, block > first,
                     plan.groups == 1 && block + 1 == end);
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
    const int64_t c = task % plan.panels * kColumns, k = task / plan.panels * kGradientRows;
    finish_gradient(p, plan, k, smaller(kGradientRows, p.k - k), c, smaller(kColumns, plan.channels - c), buffers.own);
}

template <typename A>
void differentiate(const fastddpm_conv_args &p, int32_t threads) {
    const Plan<A> plan(p, threads, cores_are_far(threads));
    char *workspace = static_cast<char *>(p.workspace);
    const int64_t sections = plan.row_sections * plan.panel_sections;
    Shares shares(plan.groups * sections, threads);
#pragma omp parallel num_threads(team_size(threads)) if (threads > 1)
    {
        const Buffers<A> buffers(plan, workspace, thread_number());
        if (!plan.alone) {
            differentiate_together(p, plan, buffers);
        } else {
            shares.run([&](int64_t i) {
                differentiate_alone(p, plan, buffers, i / sections, section_of(plan, i % sections));
            });
        }
        if (plan.groups > 1) {
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
        using A = decltype(algorithm);
        const auto bytes = [&](const Plan<A> &plan) { return plan.shared_bytes + threads * plan.thread_bytes; };
        return larger(bytes(Plan<A>(p, threads, false)), bytes(Plan<A>(p, threads, true)));
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
