// 3x3 convolution by Winograd's algorithms, everything around it in the same pass over cache-sized blocks.
//
// The tiles of all images are taken in blocks of about kBlockTiles. For each block
//   1. input:    activation of a line of channels of a strip of tile rows in a scratch image, B^T d B of its tiles into
//                V (products, tiles, C), which the threads share, or each has of its own blocks;
//   2. products: for 32 output channels at a time, the products V U into M (products, tiles, 32), then A^T M A + bias +
//                temb + residual into the output.
// M belongs to a thread and fits into its second-level cache. Each output is summed in one order, whatever the batch,
// the blocks and the number of threads are.
//
// In float32, U = G g G^T is made for kDepth input channels at a time in a thread's own memory: as a whole, at four
// times the size of the weights, it never exists. In bfloat16 it is kept: as many bytes as the weights in float32.
#include "conv.h"
#include "cores.h"
#include "gemm.h"
#include "shares.h"
#include "tiles.h"
#include "turn.h"

namespace fastddpm {
namespace FASTDDPM_ISA {
namespace {

constexpr int64_t kTurned = 16;     // input channels whose weights are turned at once

// Whether the transformed weights are kept, for all input channels.
template <typename A>
constexpr bool kKept = sizeof(typename A::Element) == 2;
// Tiles of a block, so that V and M stay in the caches.
template <typename A>
constexpr int64_t kBlockTiles = A::kProducts == 36 ? 128 : A::kProducts == 24 ? 192 : 256;
// With as many tiles for each thread, and U kept, the threads share no V: it stays in a core's second-level cache, and no
// line goes from one core to another. A block has at least kFewestTiles, because it reads all of U.
//
// In float32, where U is made for each block, that has to be worth it: V is small, or the cores share no cache.
constexpr int64_t kFewestTiles = 64, kNearBytes = 640 << 10;
template <typename A>
constexpr int64_t kFewestApart = kKept<A> ? 32 : 64;
template <typename A>
constexpr int64_t kApartBytes = kKept<A> ? 640 << 10 : 1280 << 10;
template <typename A>
constexpr int64_t kMostApart = kKept<A> ? int64_t{1} << 40 : 128;
// Input channels that are multiplied at once: all, or those whose weights are transformed at once.
constexpr int64_t kMadeDepth = 128;
template <typename A>
constexpr int64_t kDepth = kKept<A> ? int64_t{1} << 40 : kMadeDepth;
// Elements between the products of U, in a thread's memory. The line keeps them out of one cache set.
constexpr int64_t kWeightPlane = kMadeDepth * kColumns + kLine;

template <typename A>
struct Plan {
    using T = typename A::Element;
    Tiling tiling;
    ConvSize size;
    bool apart;                                // each thread takes whole blocks, and has a V of its own
    int64_t column_blocks, parts, part_tiles;  // a task of the second phase: 32 channels of a part of the block's tiles
    int64_t v_row, v_block, v_plane, m_plane;  // V is (products, C / kDepth, tiles, kDepth)
    int64_t kept_row;                          // elements of U for one product and 32 output channels, where it is kept
    int64_t v_bytes, shared_v_bytes, u_bytes, thread_bytes;  // U is shared

    // `far`: the threads' cores share no cache.
    Plan(const fastddpm_conv_args &p, int32_t threads, bool far)
        : tiling(p, A::kDown, A::kAcross, kBlockTiles<A>), size(p), apart(false) {
        const int64_t tile_bytes = A::kProducts * size.channels * static_cast<int64_t>(sizeof(T));
        const bool gains = kKept<A> || far || kFewestTiles * tile_bytes <= kNearBytes;
        if (gains && tiling.image_tiles * p.n >= threads * kFewestApart<A>) {
            const int64_t most_tiles = smaller(kMostApart<A>, larger(kFewestTiles, kApartBytes<A> / tile_bytes));
            const Tiling of_threads(p, A::kDown, A::kAcross, most_tiles, threads);
            apart = of_threads.blocks >= threads;
            if (apart) tiling = of_threads;
        }
        column_blocks = divide_up(p.k, kColumns);
        const bool even = column_blocks % threads == 0 || column_blocks >= 4 * threads;
        parts = even || apart ? 1 : smaller(threads, divide_up(tiling.block_tiles, kRows));
        part_tiles = divide_up(tiling.block_tiles, parts);
        v_row = smaller(kDepth<A>, divide_up(size.channels, kLineOf<T>) * kLineOf<T>);
        v_block = tiling.block_tiles * v_row;
        v_plane = divide_up(size.channels, kDepth<A>) * v_block + kLineOf<T>;
        m_plane = part_tiles * kColumns + kLine;
        kept_row = whole_words<T>(size.channels) * kColumns;
        v_bytes = whole_lines(A::kProducts * v_plane * static_cast<int64_t>(sizeof(T)));
        u_bytes = kKept<A> && p.packed == nullptr ? column_blocks * A::kProducts * kept_row * static_cast<int64_t>(sizeof(T)) : 0;
        // A thread's scratch image is done with before its U, M and turned weights are begun.
        const int64_t u_floats = kKept<A> ? 0 : A::kProducts * kWeightPlane;
        const int64_t product_floats = u_floats + kTaps * kTurned * kColumns + A::kProducts * m_plane;
        thread_bytes = whole_lines(larger(tiling.scratch_floats<T>(), product_floats) * static_cast<int64_t>(sizeof(float)));
        shared_v_bytes = apart ? 0 : v_bytes;
        if (apart) thread_bytes += v_bytes;
    }
};

// Elements from input channel to input channel, and from tap to tap, of weights whose output channels are adjacent.
struct Order {
    int64_t row, down, across;
};
constexpr Order kPacked{kTaps * kColumns, 3 * kColumns, kColumns};  // (channel, tap, kColumns)

struct Weights {
    const float *from;
    Order order;
};

// The weights of `columns` output channels from k and `depth` input channels from c, to g, (channel, tap, kColumns).
void gather_weights(const fastddpm_conv_args &p, int64_t k, int64_t columns, int64_t c, int64_t depth, float *g) {
    const int64_t *stride = p.weight_stride;
    if (stride[1] == kTaps && stride[2] == 3 && stride[3] == 1) {  // channels and taps are one row
        turn(p.weight + k * stride[0] + c * kTaps, stride[0], 1, columns, depth * kTaps, g, kColumns);
        return;
    }
    for (int64_t tap = 0; tap < kTaps; ++tap)
        turn(p.weight + k * stride[0] + c * stride[1] + tap / 3 * stride[2] + tap % 3 * stride[3], stride[0], stride[1],
             columns, depth, g + tap * kColumns, kPacked.row);
}

// The same where they are, if their output channels are adjacent, and else in g.
Weights weights_of(const fastddpm_conv_args &p, int64_t k, int64_t columns, int64_t c, int64_t depth, float *g) {
    const int64_t *stride = p.weight_stride;
    if (stride[0] == 1 && columns % kWidth == 0)
        return {p.weight + k + c * stride[1], {stride[1], stride[2], stride[3]}};
    gather_weights(p, k, columns, c, depth, g);
    return {g, kPacked};
}

// G g G^T of one vector of output channels: calls emit(point, of it).
template <typename A, typename Emit>
FASTDDPM_INLINE void transform_weight(const float *g, const Order &order, Emit emit) {
    Vec columns[A::kPointsDown][3];
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j) {
        Vec d[3], r[A::kPointsDown];
        for (int i = 0; i < 3; ++i) d[i] = load(g + i * order.down + j * order.across);
        A::Down::weight(d, r);
        for (int i = 0; i < A::kPointsDown; ++i) columns[i][j] = r[i];
    }
#pragma GCC unroll 6
    for (int i = 0; i < A::kPointsDown; ++i) {
        Vec r[A::kPointsAcross];
        A::Across::weight(columns[i], r);
        for (int j = 0; j < A::kPointsAcross; ++j) emit(i * A::kPointsAcross + j, r[j]);
    }
}

// U of `columns` output channels and `depth` input channels: (products, words of them, kColumns), of `plane` elements
// each.
template <typename A>
void transform_rows(const Weights &weights, int64_t columns, int64_t depth, typename A::Element *u, int64_t plane) {
    constexpr int64_t kWord = Factors<typename A::Element>::kDepth;
    for (int64_t d = 0; d < depth; d += kWord)
        for (int64_t i = 0; i < columns; i += kWidth) {
            const float *from = weights.from + d * weights.order.row + i;
            write_products<A>(depth - d, u + d * kColumns + i * kWord, plane, [&](int64_t j, auto emit) {
                transform_weight<A>(from + j * weights.order.row, weights.order, emit);
            });
        }
}

// The same of input channels from c, a few at a time: turned, they stay in the first-level cache.
template <typename A>
void transform_weights(const fastddpm_conv_args &p, int64_t k, int64_t columns, int64_t c, int64_t depth, float *g,
                       typename A::Element *u, int64_t plane) {
    for (int64_t d = 0; d < depth; d += kTurned) {
        const int64_t count = smaller(kTurned, depth - d);
        const Weights weights = kKept<A> || p.packed == nullptr
                                    ? weights_of(p, k, columns, c + d, count, g)
                                    : Weights{packed_columns(p, k) + (c + d) * kPacked.row, kPacked};
        transform_rows<A>(weights, columns, count, u + d * kColumns, plane);
    }
}

// U of kColumns output channels from k, where it is kept.
template <typename A>
void keep_weights(const fastddpm_conv_args &p, int64_t kept_row, int64_t k, uint16_t *kept) {
    float g[kTaps * kTurned * kColumns];
    transform_weights<A>(p, k, smaller(kColumns, p.k - k), 0, p.c1 + p.c2, g,
                         kept + k / kColumns * A::kProducts * kept_row, kept_row);
}

// A^T M A of the tiles first .. first + tiles - 1 and what follows it, for `columns` output channels from k.
template <typename A>
void finish_tiles(const fastddpm_conv_args &p, const Plan<A> &plan, int64_t first, int64_t tiles, int64_t k,
                  int64_t columns, const float *m) {
    const Finish finish(p, k, columns);
    const ConvSize size = plan.size;
    const int64_t image_tiles = plan.tiling.image_tiles, tiles_wide = plan.tiling.tiles_wide, plane = plan.m_plane;
    const int64_t tiles_high = plan.tiling.tiles_high;
    int64_t n = first / image_tiles, down = first % image_tiles / tiles_wide, right = first % tiles_wide;
    for (int64_t t = 0; t < tiles; ++t, m += kColumns) {
        const int64_t y = down * A::kDown, x = right * A::kAcross;
        const int64_t pixel = (n * size.out_height + y) * size.out_width + x;
        const int64_t rows = smaller(A::kDown, size.out_height - y), across = smaller(A::kAcross, size.out_width - x);
        for (int64_t lane = 0; lane < columns; lane += kWidth) {
            Vec of_rows[A::kDown][A::kPointsAcross];
#pragma GCC unroll 6
            for (int j = 0; j < A::kPointsAcross; ++j) {
                Vec d[A::kPointsDown], r[A::kDown];
                for (int i = 0; i < A::kPointsDown; ++i) d[i] = load(m + (i * A::kPointsAcross + j) * plane + lane);
                A::Down::output(d, r);
                for (int i = 0; i < A::kDown; ++i) of_rows[i][j] = r[i];
            }
            for (int i = 0; i < rows; ++i) {
                Vec r[A::kAcross];
                A::Across::output(of_rows[i], r);
                for (int64_t j = 0; j < across; ++j) finish(n, pixel + i * size.out_width + j, lane, r[j]);
            }
        }
        if (++right < tiles_wide) continue;
        right = 0;
        if (++down < tiles_high) continue;
        down = 0;
        ++n;
    }
}

// Output channels k .. k + 31 of the tiles first .. first + tiles - 1, whose transformed inputs begin at v. `kept`: all
// of U, where it is kept.
template <typename A>
void products(const fastddpm_conv_args &p, const Plan<A> &plan, int64_t k, int64_t first, int64_t tiles,
              const typename A::Element *v, const typename A::Element *kept, float *buffer) {
    using T = typename A::Element;
    const int64_t columns = smaller(kColumns, p.k - k);
    float *m = buffer, *g = m + A::kProducts * plan.m_plane;
    const auto multiply = [&](const T *u, int64_t plane, int64_t c, int64_t depth) {
        for (int64_t point = 0; point < A::kProducts; ++point)
            for (int64_t i = 0; i < columns; i += kPanel)
                product(tiles, columns - i, v + point * plan.v_plane + c / kDepth<A> * plan.v_block, plan.v_row,
                        u + point * plane + i * Factors<T>::kDepth, depth, m + point * plan.m_plane + i, kColumns, c > 0);
    };
    if constexpr (kKept<A>) {
        multiply(kept + k / kColumns * A::kProducts * plan.kept_row, plan.kept_row, 0, plan.kept_row / kColumns);
    } else {
        float *u = g + kTaps * kTurned * kColumns;
        for (int64_t c = 0; c < plan.size.channels; c += kDepth<A>) {
            const int64_t depth = smaller(kDepth<A>, plan.size.channels - c);
            transform_weights<A>(p, k, columns, c, depth, g, u, kWeightPlane);
            multiply(u, kWeightPlane, c, depth);
        }
    }
    finish_tiles(p, plan, first, tiles, k, columns, m);
}

template <typename A>
void convolve(const fastddpm_conv_args &p, int32_t threads) {
    using T = typename A::Element;
    const Plan<A> plan(p, threads, cores_are_far(threads));
    const Tiling &tiling = plan.tiling;
    char *workspace = static_cast<char *>(p.workspace);
    T *made = reinterpret_cast<T *>(workspace + plan.shared_v_bytes);
    const T *kept = p.packed == nullptr ? made : static_cast<const T *>(p.packed);
    const int64_t lines = divide_up(plan.size.channels, kLineOf<T>);
    Shares shares(tiling.blocks, threads);  // where threads are apart
#pragma omp parallel num_threads(team_size(threads)) if (threads > 1)
    {
        char *own = workspace + plan.shared_v_bytes + plan.u_bytes + thread_number() * plan.thread_bytes;
        float *buffer = reinterpret_cast<float *>(own + (plan.apart ? plan.v_bytes : 0));
        T *v = reinterpret_cast<T *>(plan.apart ? own : workspace);
        // A line of channels of a strip, of the block that begins with tile `first_tile`.
        const auto transform = [&](int64_t strip, int64_t c, int64_t first_tile) {
            const int64_t at = tiling.first_tile(strip) - first_tile;
            transform_input<A>(p, tiling, strip, c, buffer,
                               v + c / kDepth<A> * plan.v_block + at * plan.v_row + c % kDepth<A>, plan.v_row, plan.v_plane);
        };
        if constexpr (kKept<A>) {
            if (p.packed == nullptr) {
#pragma omp for schedule(dynamic)
                for (int64_t block = 0; block < plan.column_blocks; ++block)
                    keep_weights<A>(p, plan.kept_row, block * kColumns, made);
            }
        }
        if (plan.apart) {
            shares.run([&](int64_t block) {
                const Tiling::Block of = tiling.block(block);
                for (int64_t strip = of.first; strip < of.last; ++strip)
                    for (int64_t line = 0; line < lines; ++line) transform(strip, line * kLineOf<T>, of.first_tile);
                for (int64_t k = 0; k < p.k; k += kColumns) products(p, plan, k, of.first_tile, of.tiles, v, kept, buffer);
            });
        } else {
            for (int64_t block = 0; block < tiling.blocks; ++block) {
                const Tiling::Block of = tiling.block(block);
#pragma omp for schedule(dynamic)
                for (int64_t task = 0; task < (of.last - of.first) * lines; ++task)
                    transform(of.first + task / lines, task % lines * kLineOf<T>, of.first_tile);
#pragma omp for schedule(dynamic)
                for (int64_t task = 0; task < plan.column_blocks * plan.parts; ++task) {
                    const int64_t begin = task % plan.parts * plan.part_tiles;
                    const int64_t count = smaller(plan.part_tiles, of.tiles - begin);
                    if (count > 0)
                        products(p, plan, task / plan.parts * kColumns, of.first_tile + begin, count,
                                 v + begin * plan.v_row, kept, buffer);
                }
            }
        }
    }
}

}  // namespace

bool winograd_supported(const fastddpm_conv_args &p) {
    if (p.kernel != 3 || p.stride != 1 || p.pad != 1 || p.x_stride[3] != 1) return false;
    if (p.precision == FASTDDPM_FLOAT32) return p.algorithm == FASTDDPM_WINOGRAD_4X4;
    return p.algorithm == FASTDDPM_WINOGRAD_2X2 || p.algorithm == FASTDDPM_WINOGRAD_2X4;
}

int64_t winograd_packed_bytes(const fastddpm_conv_args &p) {
    return with_algorithm(p, [&](auto algorithm) -> int64_t {
        using A = decltype(algorithm);
        using T = typename A::Element;
        const int64_t depth = whole_words<T>(p.c1 + p.c2);
        const int64_t row = depth * (kKept<A> ? A::kProducts : kTaps) * static_cast<int64_t>(sizeof(T));
        return divide_up(p.k, kColumns) * kColumns * row;
    });
}

// (K / kColumns, C, 9, kColumns) of the weights; or of U, where it is kept, (K / kColumns, products, C / 2, kColumns, 2).
void pack_winograd(const fastddpm_conv_args &p, void *packed) {
    with_algorithm(p, [&](auto algorithm) -> int64_t {
        using A = decltype(algorithm);
        const int64_t channels = p.c1 + p.c2;
        for (int64_t k = 0; k < p.k; k += kColumns) {
            if constexpr (kKept<A>)
                keep_weights<A>(p, whole_words<uint16_t>(channels) * kColumns, k, static_cast<uint16_t *>(packed));
            else
                gather_weights(p, k, smaller(kColumns, p.k - k), 0, channels,
                               static_cast<float *>(packed) + k * channels * kTaps);
        }
        return 0;
    });
}

int64_t winograd_workspace(const fastddpm_conv_args &p, int32_t threads) {
    return with_algorithm(p, [&](auto algorithm) -> int64_t {
        using A = decltype(algorithm);
        const auto bytes = [&](const Plan<A> &plan) {
            return plan.shared_v_bytes + plan.u_bytes + threads * plan.thread_bytes;
        };
        return larger(bytes(Plan<A>(p, threads, false)), bytes(Plan<A>(p, threads, true)));
    });
}

int32_t conv_winograd(const fastddpm_conv_args &p, int32_t threads) {
    return static_cast<int32_t>(with_algorithm(p, [&](auto algorithm) -> int64_t {
        convolve<decltype(algorithm)>(p, threads);
        return FASTDDPM_OK;
    }));
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
