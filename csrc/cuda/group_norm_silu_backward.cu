// Gradients of group_norm_silu. With g = dL/dy through dropout and SiLU, x_hat the normalised input and u = g gain:
//     dL/dh = rstd (u - mean(u) - x_hat mean(u x_hat)), means over a group.
// Elements are only centred, t = x_hat / rstd; rstd is applied to sums. With factor = gain rstd that is
//     dL/dh = g factor - flat - t slope, flat = mean(g factor), slope = rstd^2 mean(g factor t).
// Both means, and the gradients of everything that belongs to a channel, follow from three sums over the pixels of
// each image's channels: of g, of g t and of t. No atomics: every sum has a fixed order.
#include "group_norm_silu.cuh"

namespace fastddpm {
namespace group_norm {
namespace {

constexpr int kSums = 3;  // g, g t, t

// The workspace begins with the sums of g x_hat and g with the factor 1 + scale, (2, N, C); the plan's own part
// follows.
FASTDDPM_DEVICE float *image_sums(const Plan &plan) { return plan.memory; }
__host__ __device__ __forceinline__ float *group_means(const Args &a, const Plan &plan) {  // (N, G, 2)
    return plan.memory + 2 * a.n * channels_of(a);
}
__host__ __device__ __forceinline__ float *part_sums(const Args &a, const Plan &plan) {  // (N, parts, kSums, C)
    return group_means(a, plan) + 2 * a.n * a.groups;
}

// Of each channel of a slab: t = x - centre, y = t * factor + offset, dL/dh = g * factor - flat - t * slope.
struct Table {
    float *centre, *factor, *offset, *rstd, *flat, *slope;
};

FASTDDPM_DEVICE Table table_at(float *floats, int channels) {
    return {floats,          floats + channels,     floats + 2 * channels,
            floats + 3 * channels, floats + 4 * channels, floats + 5 * channels};
}

FASTDDPM_DEVICE void fill_statistics(const Args &a, const Share &s, const Table &table) {
    const int per_group = static_cast<int>(channels_of(a) / a.groups);
    for (int c = static_cast<int>(threadIdx.x); c < s.channels; c += static_cast<int>(blockDim.x)) {
        const int64_t group = s.n * a.groups + (s.c0 + c) / per_group;
        const Affine affine = affine_of(a, s.n, s.c0 + c);
        table.centre[c] = a.mean[group] - embedding_of(a, s.n, s.c0 + c);
        table.factor[c] = affine.gain * a.rstd[group];
        table.offset[c] = affine.offset;
        table.rstd[c] = a.rstd[group];
    }
    __syncthreads();
}

// means: of g factor and of g factor t, for the slab's groups.
FASTDDPM_DEVICE void fill_means(const Args &a, const Share &s, const Table &table, const float *means) {
    const int per_group = static_cast<int>(channels_of(a) / a.groups);
    for (int c = static_cast<int>(threadIdx.x); c < s.channels; c += static_cast<int>(blockDim.x)) {
        table.flat[c] = means[2 * (c / per_group)];
        table.slope[c] = table.rstd[c] * table.rstd[c] * means[2 * (c / per_group) + 1];
    }
    __syncthreads();
}

// The numbers of a line's channels that its elements need.
template <int K>
struct ChannelValues {
    float centre[K], factor[K], offset[K];

    FASTDDPM_DEVICE ChannelValues(const Table &table, int c) {
#pragma unroll
        for (int j = 0; j < K; ++j) {
            centre[j] = table.centre[c + j];
            factor[j] = table.factor[c + j];
            offset[j] = table.offset[c + j];
        }
    }
};

// Replaces x by t and grad by g.
template <bool kNhwc, int V, int K>
FASTDDPM_DEVICE void through_activation(const Args &a, const ChannelValues<K> &channel, const DropoutKey &key,
                                        DropoutRule rule, int pixel, int c, float (&x)[V], float (&grad)[V]) {
    if (a.dropout > 0.0f) {
        const uint32_t kept = kept_of_vector<kNhwc, V>(a, key, rule.threshold, pixel, c);
#pragma unroll
        for (int j = 0; j < V; ++j) grad[j] *= kept >> j & 1 ? rule.factor : 0.0f;
    }
    const bool silu = a.silu != 0;
#pragma unroll
    for (int j = 0; j < V; ++j) {
        const int k = kNhwc ? j : 0;
        x[j] -= channel.centre[k];
        if (silu) {
            const float y = fmaf(x[j], channel.factor[k], channel.offset[k]), sigma = sigmoid(y);
            grad[j] *= sigma * fmaf(y, 1.0f - sigma, 1.0f);
        }
    }
}

// The three sums of the share's channels; with a stash, x and grad stay there.
template <typename T, bool kNhwc, int V>
FASTDDPM_DEVICE void sum_share(const Args &a, const Share &s, const Table &table, DropoutRule rule, float *scratch,
                               float *sums, Pack<T, V> *stash, int stash_of_grad) {
    const DropoutKey key = dropout_key(a, s.n);
    channel_sums<kNhwc, V, kSums>(s, scratch, sums, [&](const Line &line, float (&sum)[kSums][V]) {
        const ChannelValues<kNhwc ? V : 1> channel(table, line.c);
        const auto x = input_cursor<kNhwc, V, T>(a, s, line);
        const auto grad = cursor<kNhwc, V, const T>(a, s, line, a.grad, a.grad, channels_of(a));
#pragma unroll 1
        for (int i = line.first; i < line.count; i += line.step) {
            const auto raw_x = load<V>(x.at(i)), raw_grad = load<V>(grad.at(i));
            if (stash) {
                stash[line.stash + i * line.stash_step] = raw_x;
                stash[stash_of_grad + line.stash + i * line.stash_step] = raw_grad;
            }
            float t[V], g[V];
            raw_x.unpack(t);
            raw_grad.unpack(g);
            through_activation<kNhwc, V>(a, channel, key, rule, pixel_of<kNhwc, V>(s, i), s.c0 + line.c, t, g);
#pragma unroll
            for (int j = 0; j < V; ++j) {
                sum[0][j] += g[j];
                sum[1][j] = fmaf(g[j], t[j], sum[1][j]);
                sum[2][j] += t[j];
            }
        }
    });
}

// Writes dL/dh of the share; the table is complete.
template <typename T, bool kNhwc, int V, bool kStash>
FASTDDPM_DEVICE void apply(const Args &a, const Share &s, const Table &table, DropoutRule rule,
                           const Pack<T, V> *stash, int stash_of_grad) {
    const DropoutKey key = dropout_key(a, s.n);
    for_each_line<kNhwc, V>(s, [&](const Line &line) {
        constexpr int kChannels = kNhwc ? V : 1;
        const ChannelValues<kChannels> channel(table, line.c);
        float flat[kChannels], slope[kChannels];
#pragma unroll
        for (int j = 0; j < kChannels; ++j) {
            flat[j] = table.flat[line.c + j];
            slope[j] = table.slope[line.c + j];
        }
        const auto x = input_cursor<kNhwc, V, T>(a, s, line);
        const auto grad = cursor<kNhwc, V, const T>(a, s, line, a.grad, a.grad, channels_of(a));
        const auto out = cursor<kNhwc, V, T>(a, s, line, a.grad_x, a.grad_skip, static_cast<int>(a.c1));
#pragma unroll 1
        for (int i = line.first; i < line.count; i += line.step) {
            const int at = line.stash + i * line.stash_step;
            const auto raw_x = kStash ? stash[at] : load<V>(x.at(i));
            const auto raw_grad = kStash ? stash[stash_of_grad + at] : load<V>(grad.at(i));
            float t[V], g[V];
            raw_x.unpack(t);
            raw_grad.unpack(g);
            through_activation<kNhwc, V>(a, channel, key, rule, pixel_of<kNhwc, V>(s, i), s.c0 + line.c, t, g);
#pragma unroll
            for (int j = 0; j < V; ++j) {
                const int k = kNhwc ? j : 0;
                g[j] = fmaf(-t[j], slope[k], fmaf(g[j], channel.factor[k], -flat[k]));
            }
            store<V>(out.at(i), g);
        }
    });
}

// From the sums over all pixels: the groups' means of g factor and of g factor t.
FASTDDPM_DEVICE void group_means_of(const Args &a, const Share &s, const Table &table, const float *sums,
                                    float *means) {
    const int per_group = static_cast<int>(channels_of(a) / a.groups);
    const float count = static_cast<float>(pixels_of(a)) * static_cast<float>(per_group);
    for (int q = 0; q < 2; ++q)
        for_each_group(
            s.channels / per_group, per_group, [&](int c) { return table.factor[c] * sums[q * s.channels + c]; },
            [&](int g, float sum) { means[2 * g + q] = sum / count; });
    __syncthreads();
}

// From the sums over all pixels: gradients of temb, scale and shift, and this image's part of weight's and bias's.
FASTDDPM_DEVICE void write_channels(const Args &a, const Plan &plan, const Share &s, const Table &table,
                                    const float *sums) {
    const float pixels = static_cast<float>(pixels_of(a));
    for (int c = static_cast<int>(threadIdx.x); c < s.channels; c += static_cast<int>(blockDim.x)) {
        const int64_t i = s.n * channels_of(a) + s.c0 + c;
        const float sum_g = sums[c], sum_gx = sums[s.channels + c] * table.rstd[c];
        float factor = 1.0f;
        if (a.grad_temb)
            a.grad_temb[i] =
                sum_g * table.factor[c] - pixels * table.flat[c] - sums[2 * s.channels + c] * table.slope[c];
        if (a.scale) {
            factor += element(a.scale, i, a.param_dtype);
            a.grad_scale[i] = sum_gx * element(a.weight, s.c0 + c, a.param_dtype) +
                              sum_g * element(a.bias, s.c0 + c, a.param_dtype);
            a.grad_shift[i] = sum_g;
        }
        image_sums(plan)[i] = sum_gx * factor;
        image_sums(plan)[a.n * channels_of(a) + i] = sum_g * factor;
    }
}

// On chip: everything but the sums over images. In parts: the three sums of each channel in each part.
template <typename T, bool kNhwc, int V>
__global__ void __launch_bounds__(kThreads, 2)
    differentiate(const __grid_constant__ Args a, const __grid_constant__ Plan plan, const DropoutRule rule) {
    FASTDDPM_SHARED(memory);
    const Share s = share_of_block<kNhwc, V>(a, plan);
    const int groups = static_cast<int>(s.channels / (channels_of(a) / a.groups));
    auto *stash = plan.on_chip ? reinterpret_cast<Pack<T, V> *>(memory) : nullptr;
    const int stash_of_grad = plan.stash / 2 / static_cast<int>(sizeof(Pack<T, V>));
    float *scratch = reinterpret_cast<float *>(memory + plan.stash);
    float *sums = scratch + plan.scratch, *total = sums + kSums * s.channels;
    float *means = total + kSums * s.channels;
    const Table table = table_at(means + 2 * groups, s.channels);

    fill_statistics(a, s, table);
    sum_share<T, kNhwc, V>(a, s, table, rule, scratch, sums, stash, stash_of_grad);
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    if (!plan.on_chip) {
        float *partial = part_sums(a, plan) + (s.n * plan.parts + s.part) * kSums * channels_of(a) + s.c0;
        for (int i = thread; i < kSums * s.channels; i += threads)
            partial[i / s.channels * channels_of(a) + i % s.channels] = sums[i];
        return;
    }
    if (plan.parts > 1) {
        cluster_sync();
        for (int i = thread; i < kSums * s.channels; i += threads) {
            float sum = 0.0f;
            for (int rank = 0; rank < plan.parts; ++rank) sum += of_rank(sums, rank)[i];
            total[i] = sum;
        }
        // A block must not end, and lose its shared memory, before the other blocks have read it.
        cluster_sync();
    } else {
        total = sums;
    }
    group_means_of(a, s, table, total, means);
    fill_means(a, s, table, means);
    if (s.part == 0) write_channels(a, plan, s, table, total);
    apply<T, kNhwc, V, true>(a, s, table, rule, stash, stash_of_grad);
}

// One block for each group of each image: adds up the parts.
__global__ void __launch_bounds__(kThreads)
    add_parts(const __grid_constant__ Args a, const __grid_constant__ Plan plan) {
    FASTDDPM_SHARED(memory);
    const int channels = channels_of(a), per_group = static_cast<int>(channels / a.groups);
    // Channels as those of a row and parts as its pixels: the sum over pixels is that over parts.
    Share s{};
    s.n = blockIdx.x / a.groups;
    s.c0 = static_cast<int>(blockIdx.x % a.groups) * per_group;
    s.channels = s.columns = per_group;
    s.pixels = plan.parts;
    float *sums = reinterpret_cast<float *>(memory), *means = sums + kSums * per_group;
    const Table table = table_at(means + 2, per_group);
    float *scratch = means + 2 + 6 * per_group;

    fill_statistics(a, s, table);
    const float *partial = part_sums(a, plan) + s.n * plan.parts * kSums * channels + s.c0;
    channel_sums<true, 1, kSums>(s, scratch, sums, [&](const Line &line, float (&sum)[kSums][1]) {
        for (int i = line.first; i < line.count; i += line.step) {
            const float *of_part = partial + static_cast<int64_t>(i) * kSums * channels + line.c;
#pragma unroll
            for (int q = 0; q < kSums; ++q) sum[q][0] += of_part[q * channels];
        }
    });
    group_means_of(a, s, table, sums, means);
    fill_means(a, s, table, means);
    write_channels(a, plan, s, table, sums);
    if (threadIdx.x < 2) group_means(a, plan)[2 * static_cast<int64_t>(blockIdx.x) + threadIdx.x] = means[threadIdx.x];
}

template <typename T, bool kNhwc, int V>
__global__ void __launch_bounds__(kThreads, 2)
    apply_parts(const __grid_constant__ Args a, const __grid_constant__ Plan plan, const DropoutRule rule) {
    FASTDDPM_SHARED(memory);
    const Share s = share_of_block<kNhwc, V>(a, plan);
    const Table table = table_at(reinterpret_cast<float *>(memory), s.channels);
    const int64_t group = s.n * a.groups + s.c0 / (channels_of(a) / a.groups);
    fill_statistics(a, s, table);
    fill_means(a, s, table, group_means(a, plan) + 2 * group);
    apply<T, kNhwc, V, false>(a, s, table, rule, nullptr, 0);
}

constexpr int kColumns = 32, kRows = 16;

// The weight's and the bias's gradients from those of the images. A block takes kColumns channels: kRows threads for
// each add up every kRows-th image, then one of them the kRows sums.
__global__ void __launch_bounds__(kColumns *kRows)
    add_images(const __grid_constant__ Args a, const __grid_constant__ Plan plan) {
    FASTDDPM_SHARED(memory);
    float *scratch = reinterpret_cast<float *>(memory);  // (2, kRows, kColumns)
    const int channels = channels_of(a);
    const int column = static_cast<int>(threadIdx.x) % kColumns, row = static_cast<int>(threadIdx.x) / kColumns;
    const int c = static_cast<int>(blockIdx.x) * kColumns + column;
    for (int q = 0; q < 2; ++q) {
        float sum = 0.0f;
        if (c < channels) {
            const float *of_images = image_sums(plan) + q * a.n * channels + c;
#pragma unroll 4
            for (int64_t n = row; n < a.n; n += kRows) sum += of_images[n * channels];
        }
        scratch[(q * kRows + row) * kColumns + column] = sum;
    }
    __syncthreads();
    if (row >= 2 || c >= channels) return;
    float sum = 0.0f;
    for (int r = 0; r < kRows; ++r) sum += scratch[(row * kRows + r) * kColumns + column];
    (row == 0 ? a.grad_weight : a.grad_bias)[c] = sum;
}

int32_t add_parts_of_groups(const Args &a, const Plan &plan, void *stream) {
    const int per_group = static_cast<int>(channels_of(a) / a.groups);
    const size_t scratch = static_cast<size_t>(kSums) * std::max(kThreads / lanes_in_rows(per_group, kThreads), 1);
    const size_t shared = ((kSums + 6 + scratch) * per_group + 2) * sizeof(float);
    return launch(add_parts, {a.n * a.groups, kThreads, shared}, stream, a, plan);
}

}  // namespace

int32_t backward(const Args &a, void *workspace, int64_t workspace_bytes, void *stream) {
    Plan plan{};
    if (const int32_t code = make_plan(a, true, &plan)) return code;
    if (workspace_bytes < plan.workspace) return FASTDDPM_NO_MEMORY;
    plan.memory = static_cast<float *>(workspace);
    const DropoutRule rule = dropout_rule(a);
    const int32_t code = dispatch(a, plan, [&](auto type, auto nhwc, auto vector) -> int32_t {
        using T = decltype(type);
        constexpr bool kNhwc = decltype(nhwc)::value;
        constexpr int V = decltype(vector)::value;
        const LaunchShape shape{plan.blocks, plan.threads, static_cast<size_t>(plan.shared),
                                plan.on_chip ? plan.parts : 1};
        const int32_t error = launch(differentiate<T, kNhwc, V>, shape, stream, a, plan, rule);
        if (error || plan.on_chip) return error;
        if (const int32_t failed = add_parts_of_groups(a, plan, stream)) return failed;
        const size_t table = static_cast<size_t>(plan.channels) * 6 * sizeof(float);
        return launch(apply_parts<T, kNhwc, V>, {plan.blocks, plan.threads, table}, stream, a, plan, rule);
    });
    if (code) return code;
    constexpr size_t kScratch = 2 * kRows * kColumns * sizeof(float);
    return launch(add_images, {divide_up(channels_of(a), kColumns), kColumns * kRows, kScratch}, stream, a, plan);
}

}  // namespace group_norm
}  // namespace fastddpm

FASTDDPM_API int32_t fastddpm_cuda_group_norm_silu_backward(const fastddpm_group_norm_silu_args *args, void *workspace,
                                                            int64_t workspace_bytes, void *stream) {
    return fastddpm::group_norm::backward(*args, workspace, workspace_bytes, stream);
}
