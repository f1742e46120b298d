// Shared by the forward and the backward pass of group_norm_silu: the division of the work, and sums per channel.
//
// A block works on a share: one image, a slab of channels (whole groups) and a part of the pixels. It reads its share
// in vectors of V elements: V channels of a pixel in NHWC, V pixels of a channel in NCHW. A thread works on lines: in
// NHWC one vector of channels through many pixels, in NCHW one channel's pixels, which the threads of a part of a warp
// take in turns. Therefore the parameters of a channel are read once per line, its sums are kept in registers, groups
// may have any number of channels, and x and skip need no copy: no vector crosses the seam between them.
#pragma once
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "common.cuh"

namespace fastddpm {
namespace group_norm {

using Args = fastddpm_group_norm_silu_args;

constexpr int kThreads = 256;  // at most, of a block; 128 registers each let two blocks share a multiprocessor

// The division of one call, made on the host. On chip: the parts of a slab are one cluster, whose shared memory holds
// the slab, so that memory is read once. Otherwise one kernel writes the sums of each part to the workspace, a second
// adds them up, and a third reads the input again and writes the output.
struct Plan {
    int channels, slabs;  // channels of a slab, slabs of an image
    int pixels, parts;    // pixels of a part, parts of an image
    int threads, vector;
    bool on_chip;
    // Shared memory: the stash of raw inputs in bytes, the rest in floats.
    int stash, scratch;
    int64_t blocks, shared, workspace;  // shared and workspace in bytes
    float *memory;                      // the workspace
};

// The plan, or why there is none. `backward` also stashes grad, and sums three quantities instead of one.
int32_t make_plan(const Args &a, bool backward, Plan *plan);

struct DropoutRule {
    uint32_t threshold;  // keep where a 16-bit half is at least this
    float factor;
};

__host__ __device__ __forceinline__ int pixels_of(const Args &a) { return static_cast<int>(a.height * a.width); }
__host__ __device__ __forceinline__ int channels_of(const Args &a) { return static_cast<int>(a.c1 + a.c2); }

#define FASTDDPM_DEVICE __device__ __forceinline__

// A block's share. `columns`: vectors in a row, where rows are pixels in NHWC and channels in NCHW.
struct Share {
    int64_t n;
    int part, c0, channels, p0, pixels, columns;
};

template <bool kNhwc, int V>
FASTDDPM_DEVICE Share share_of_block(const Args &a, const Plan &plan) {
    const unsigned part = blockIdx.x % plan.parts, rest = blockIdx.x / plan.parts;
    Share s;
    s.n = rest / plan.slabs;
    s.part = static_cast<int>(part);
    s.c0 = static_cast<int>(rest % plan.slabs) * plan.channels;
    s.channels = plan.channels;
    s.p0 = s.part * plan.pixels;
    s.pixels = min(plan.pixels, pixels_of(a) - s.p0);
    s.columns = (kNhwc ? s.channels : s.pixels) / V;
    return s;
}

// Vectors first, first + step, .. below count of one line. Vector i is number stash + i * stash_step of the share.
struct Line {
    int c;  // first channel, counted in the slab
    int first, count, step;
    int stash, stash_step;
    bool real;  // false: a line without vectors, for threads that only take part in shuffles
};

__host__ __device__ __forceinline__ int lanes_in_rows(int columns, int threads) {
    return columns < threads ? columns : threads;
}

// Threads of a warp that share a channel in NCHW: a power of two.
FASTDDPM_DEVICE int lanes_in_columns(int columns) {
    int lanes = 1;
    while (lanes < 32 && 2 * lanes <= columns) lanes *= 2;
    return lanes;
}

template <bool kNhwc, int V, typename Visit>
FASTDDPM_DEVICE void for_each_line(const Share &s, Visit visit) {
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    if constexpr (kNhwc) {
        const int lanes = lanes_in_rows(s.columns, threads), rows = threads / lanes, row = thread / lanes;
        if (row < rows)
            for (int column = thread % lanes; column < s.columns; column += lanes)
                visit(Line{column * V, row, s.pixels, rows, column, s.columns, true});
    } else {
        const int lanes = lanes_in_columns(s.columns), lane = thread % lanes;
        // The bound is on the warp's first channel, so that all threads of a warp make the same number of turns.
        for (int c = thread / lanes; c - thread % 32 / lanes < s.channels; c += threads / lanes) {
            const bool real = c < s.channels;
            const int channel = real ? c : 0;
            visit(Line{channel, lane, real ? s.columns : 0, lanes, channel * s.columns, 1, real});
        }
    }
}

// The addresses of a line's vectors in one image tensor, or in two as if they were concatenated.
template <typename T>
struct Cursor {
    T *base;
    int step;
    FASTDDPM_DEVICE T *at(int i) const { return base + i * step; }
};

template <bool kNhwc, int V, typename T, typename Void>
FASTDDPM_DEVICE Cursor<T> cursor(const Args &a, const Share &s, const Line &line, Void *first, Void *second, int c1) {
    int c = s.c0 + line.c, width = c1;
    T *tensor = static_cast<T *>(first);
    if (c >= c1) {
        c -= c1;
        width = channels_of(a) - c1;
        tensor = static_cast<T *>(second);
    }
    const int64_t image = s.n * pixels_of(a) * width;
    if constexpr (kNhwc) return {tensor + image + static_cast<int64_t>(s.p0) * width + c, width};
    return {tensor + image + static_cast<int64_t>(c) * pixels_of(a) + s.p0, V};
}

template <bool kNhwc, int V, typename T>
FASTDDPM_DEVICE Cursor<const T> input_cursor(const Args &a, const Share &s, const Line &line) {
    return cursor<kNhwc, V, const T>(a, s, line, a.x, a.skip, static_cast<int>(a.c1));
}

// Pixel of vector i of a line, counted in the image; in NCHW the first of V.
template <bool kNhwc, int V>
FASTDDPM_DEVICE int pixel_of(const Share &s, int i) {
    return s.p0 + (kNhwc ? i : i * V);
}

// S sums over the pixels of the share for each of its channels, in an order that depends on the plan only:
// sums[s * channels + c], complete in all threads when this returns. add(line, partial) sums one line.
template <bool kNhwc, int V, int S, typename Add>
FASTDDPM_DEVICE void channel_sums(const Share &s, float *scratch, float *sums, Add add) {
    const int threads = static_cast<int>(blockDim.x), rows = threads / lanes_in_rows(s.columns, threads);
    for_each_line<kNhwc, V>(s, [&](const Line &line) {
        float partial[S][V] = {};
        add(line, partial);
        if constexpr (kNhwc) {
#pragma unroll
            for (int q = 0; q < S; ++q)
#pragma unroll
                for (int j = 0; j < V; ++j) scratch[(q * rows + line.first) * s.channels + line.c + j] = partial[q][j];
        } else {
#pragma unroll
            for (int q = 0; q < S; ++q) {
                float sum = partial[q][0];
#pragma unroll
                for (int j = 1; j < V; ++j) sum += partial[q][j];
                for (int mask = line.step / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
                if (line.first == 0 && line.real) sums[q * s.channels + line.c] = sum;
            }
        }
    });
    __syncthreads();
    if constexpr (kNhwc) {
        for (int i = static_cast<int>(threadIdx.x); i < S * s.channels; i += threads) {
            const float *column = scratch + i / s.channels * rows * s.channels + i % s.channels;
            float sum = 0.0f;
#pragma unroll 8
            for (int row = 0; row < rows; ++row) sum += column[row * s.channels];
            sums[i] = sum;
        }
        __syncthreads();
    }
}

// visit(g, sum) in one thread for each of `groups` groups, sum being that of value(c) over the group's channels.
template <typename Value, typename Visit>
FASTDDPM_DEVICE void for_each_group(int groups, int per_group, Value value, Visit visit) {
    const int lane = static_cast<int>(threadIdx.x) % 32, warps = static_cast<int>(blockDim.x) / 32;
    for (int g = static_cast<int>(threadIdx.x) / 32; g < groups; g += warps) {
        float sum = 0.0f;
        for (int c = g * per_group + lane; c < (g + 1) * per_group; c += 32) sum += value(c);
        sum = warp_sum(sum);
        if (lane == 0) visit(g, sum);
    }
}

// Gain and offset of channel c of image n: weight (1 + scale), bias (1 + scale) + shift.
struct Affine {
    float gain, offset;
};
FASTDDPM_DEVICE Affine affine_of(const Args &a, int64_t n, int c) {
    Affine affine{element(a.weight, c, a.param_dtype), element(a.bias, c, a.param_dtype)};
    if (a.scale) {
        const int64_t i = n * channels_of(a) + c;
        const float factor = 1.0f + element(a.scale, i, a.param_dtype);
        affine = {affine.gain * factor, affine.offset * factor + element(a.shift, i, a.param_dtype)};
    }
    return affine;
}

FASTDDPM_DEVICE float embedding_of(const Args &a, int64_t n, int c) {
    return a.temb ? element(a.temb, n * a.temb_stride + c, a.param_dtype) : 0.0f;
}

// Within 2^-21 of the sigmoid for |y| <= 10, where its derivative matters; 0 or 1 far out; NaN only for NaN.
FASTDDPM_DEVICE float sigmoid(float y) {
#ifdef FASTDDPM_EMULATE
    return __fdividef(1.0f, 1.0f + __expf(-y));
#else
    // Four instructions: __expf and __fdividef also keep denormal numbers, which no output has digits for.
    float power, inverse;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(y * -1.44269504f));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.0f + power));
    return inverse;
#endif
}

// Visits a line's vectors in batches whose loads are in flight together: use(i, load(i)) for each vector i.
template <typename Load, typename Use>
FASTDDPM_DEVICE void in_flight(const Line &line, Load load_at, Use use) {
    constexpr int kFlight = 4;
    int i = line.first;
    for (; i + (kFlight - 1) * line.step < line.count; i += kFlight * line.step) {
        decltype(load_at(0)) raw[kFlight];
#pragma unroll
        for (int u = 0; u < kFlight; ++u) raw[u] = load_at(i + u * line.step);
#pragma unroll
        for (int u = 0; u < kFlight; ++u) use(i + u * line.step, raw[u]);
    }
#pragma unroll 1
    for (; i < line.count; i += line.step) use(i, load_at(i));
}

struct DropoutKey {
    uint64_t seed;
    uint32_t image, step, stream;
};
FASTDDPM_DEVICE DropoutKey dropout_key(const Args &a, int64_t n) {
    if (a.dropout <= 0.0f) return {};
    return {static_cast<uint64_t>(*a.key.seed), static_cast<uint32_t>(a.key.images[n]),
            static_cast<uint32_t>(*a.key.step), static_cast<uint32_t>(a.dropout_stream)};
}

// Bit i: whether element 8 * block + i of the image, counted in (H, W, C) order, is kept.
FASTDDPM_DEVICE uint32_t kept_of_block(const DropoutKey &key, uint32_t threshold, int64_t block) {
    const philox_block words = philox(static_cast<uint32_t>(block), key.image, key.step, key.stream, key.seed);
    uint32_t kept = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i)
        kept |= static_cast<uint32_t>((words.w[i / 2] >> (16 * (i % 2)) & 0xFFFF) >= threshold) << i;
    return kept;
}

// Bit j: whether element j of the vector at pixel p and channel c is kept. In NHWC one Philox block serves a vector;
// in NCHW each element needs its own, since the mask's order is that of NHWC.
template <bool kNhwc, int V>
FASTDDPM_DEVICE uint32_t kept_of_vector(const Args &a, const DropoutKey &key, uint32_t threshold, int p, int c) {
    const int64_t first = static_cast<int64_t>(p) * channels_of(a) + c;
    if constexpr (kNhwc) return kept_of_block(key, threshold, first >> 3) >> (first & 7);
    uint32_t kept = 0;
#pragma unroll 1
    for (int j = 0; j < V; ++j) {
        const int64_t e = first + static_cast<int64_t>(j) * channels_of(a);
        kept |= (kept_of_block(key, threshold, e >> 3) >> (e & 7) & 1) << j;
    }
    return kept;
}

inline DropoutRule dropout_rule(const Args &a) {
    // Rounded to even, as Python's round does.
    const auto threshold = static_cast<uint32_t>(nearbyint(static_cast<double>(a.dropout) * 65536.0));
    return {threshold, static_cast<float>(65536.0 / (65536 - threshold))};
}

// Calls body(T{}, kNhwc, V), the latter as constants, for the dtype, layout and vector length of a call.
template <typename Body>
int32_t dispatch(const Args &a, const Plan &plan, Body body) {
    const auto for_layout = [&](auto type, auto vector) {
        return a.layout == FASTDDPM_NHWC ? body(type, std::true_type{}, vector) : body(type, std::false_type{}, vector);
    };
    const auto for_vector = [&](auto type) {
        constexpr int kLong = 16 / sizeof(type);
        return plan.vector == 1 ? for_layout(type, std::integral_constant<int, 1>{})
                                : for_layout(type, std::integral_constant<int, kLong>{});
    };
    switch (a.dtype) {
        case FASTDDPM_FLOAT32: return for_vector(float{});
        case FASTDDPM_BFLOAT16: return for_vector(bf16{});
        case FASTDDPM_FLOAT16: return for_vector(f16{});
        default: return FASTDDPM_UNSUPPORTED;
    }
}

}  // namespace group_norm
}  // namespace fastddpm
