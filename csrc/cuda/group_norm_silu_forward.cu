// y = dropout(silu(scale_shift(group_norm(concat(x, skip) + temb)))).
#include "group_norm_silu.cuh"

namespace fastddpm {
namespace group_norm {
namespace {

// The map of a channel's elements: y = (x - centre) * factor + offset. x is without temb, which centre accounts for.
struct Table {
    float *centre, *factor, *offset;
};

FASTDDPM_DEVICE void fill_table(const Args &a, const Share &s, const Table &table, const float *mean,
                                const float *rstd) {
    const int per_group = static_cast<int>(channels_of(a) / a.groups);
    for (int c = static_cast<int>(threadIdx.x); c < s.channels; c += static_cast<int>(blockDim.x)) {
        const Affine affine = affine_of(a, s.n, s.c0 + c);
        table.centre[c] = mean[c / per_group] - embedding_of(a, s.n, s.c0 + c);
        table.factor[c] = affine.gain * rstd[c / per_group];
        table.offset[c] = affine.offset;
    }
    __syncthreads();
}

// Writes y of the share. The inputs come from the stash, or without one from memory.
template <typename T, bool kNhwc, int V, bool kStash>
FASTDDPM_DEVICE void apply(const Args &a, const Share &s, const Table &table, DropoutRule rule,
                           const Pack<T, V> *stash) {
    const DropoutKey key = dropout_key(a, s.n);
    const bool silu = a.silu != 0, dropout = a.dropout > 0.0f;
    for_each_line<kNhwc, V>(s, [&](const Line &line) {
        constexpr int kChannels = kNhwc ? V : 1;
        float centre[kChannels], factor[kChannels], offset[kChannels];
#pragma unroll
        for (int j = 0; j < kChannels; ++j) {
            centre[j] = table.centre[line.c + j];
            factor[j] = table.factor[line.c + j];
            offset[j] = table.offset[line.c + j];
        }
        const auto x = input_cursor<kNhwc, V, T>(a, s, line);
        const auto y = cursor<kNhwc, V, T>(a, s, line, a.y, a.y, channels_of(a));
        const auto load_at = [&](int i) {
            if constexpr (kStash) return stash[line.stash + i * line.stash_step];
            else return load<V>(x.at(i));
        };
        // The choices are the call's: made outside of the loop, as two more copies of it.
        const auto write = [&](auto with_silu, auto with_dropout) {
            constexpr bool kSilu = decltype(with_silu)::value, kDropout = decltype(with_dropout)::value;
            in_flight(line, load_at, [&](int i, const Pack<T, V> &raw) {
                float v[V];
                raw.unpack(v);
#pragma unroll
                for (int j = 0; j < V; ++j) {
                    const int k = kNhwc ? j : 0;
                    v[j] = fmaf(v[j] - centre[k], factor[k], offset[k]);
                    if (kDropout ? silu : kSilu) v[j] *= sigmoid(v[j]);
                }
                if constexpr (kDropout) {
                    const uint32_t kept =
                        kept_of_vector<kNhwc, V>(a, key, rule.threshold, pixel_of<kNhwc, V>(s, i), s.c0 + line.c);
#pragma unroll
                    for (int j = 0; j < V; ++j) v[j] = kept >> j & 1 ? v[j] * rule.factor : v[j] * 0.0f;
                }
                store<V>(y.at(i), v);
            });
        };
        if (dropout) write(std::true_type{}, std::true_type{});
        else if (silu) write(std::true_type{}, std::false_type{});
        else write(std::false_type{}, std::false_type{});
    });
}

FASTDDPM_DEVICE float rstd_of(const Args &a, float squares, float count) {
    return 1.0f / sqrtf(squares / count + a.eps);
}

// On chip: everything. In parts: mean and sum of squared deviations of each group in each part, to the workspace,
// (N, parts, G, 2). Deviations are from the part's own mean, and Chan's formula combines parts: no digits are lost
// where the mean is large, as they are in E[x^2] - E[x]^2.
template <typename T, bool kNhwc, int V>
__global__ void __launch_bounds__(kThreads, 2)
    normalize(const __grid_constant__ Args a, const __grid_constant__ Plan plan, const DropoutRule rule) {
    FASTDDPM_SHARED(memory);
    const Share s = share_of_block<kNhwc, V>(a, plan);
    const int per_group = static_cast<int>(channels_of(a) / a.groups), groups = s.channels / per_group;
    auto *stash = reinterpret_cast<Pack<T, V> *>(memory);
    float *scratch = reinterpret_cast<float *>(memory + plan.stash);
    float *sums = scratch + plan.scratch, *local = sums + s.channels;
    float *mean = local + 2 * groups, *rstd = mean + groups;
    const Table table{rstd + groups, rstd + groups + s.channels, rstd + groups + 2 * s.channels};

    channel_sums<kNhwc, V, 1>(s, scratch, sums, [&](const Line &line, float (&sum)[1][V]) {
        const auto x = input_cursor<kNhwc, V, T>(a, s, line);
        in_flight(
            line, [&](int i) { return load<V>(x.at(i)); },
            [&](int i, const Pack<T, V> &raw) {
                stash[line.stash + i * line.stash_step] = raw;
                float v[V];
                raw.unpack(v);
#pragma unroll
                for (int j = 0; j < V; ++j) sum[0][j] += v[j];
            });
    });
    const float pixels = static_cast<float>(s.pixels), count = pixels * static_cast<float>(per_group);
    for_each_group(
        groups, per_group, [&](int c) { return sums[c] + pixels * embedding_of(a, s.n, s.c0 + c); },
        [&](int g, float sum) { local[2 * g] = sum / count; });
    __syncthreads();
    for (int c = static_cast<int>(threadIdx.x); c < s.channels; c += static_cast<int>(blockDim.x))
        table.centre[c] = local[2 * (c / per_group)] - embedding_of(a, s.n, s.c0 + c);
    __syncthreads();
    channel_sums<kNhwc, V, 1>(s, scratch, sums, [&](const Line &line, float (&sum)[1][V]) {
        float centre[kNhwc ? V : 1];
#pragma unroll
        for (int j = 0; j < (kNhwc ? V : 1); ++j) centre[j] = table.centre[line.c + j];
        in_flight(
            line, [&](int i) { return stash[line.stash + i * line.stash_step]; },
            [&](int, const Pack<T, V> &raw) {
                float v[V];
                raw.unpack(v);
#pragma unroll
                for (int j = 0; j < V; ++j) {
                    const float deviation = v[j] - centre[kNhwc ? j : 0];
                    sum[0][j] = fmaf(deviation, deviation, sum[0][j]);
                }
            });
    });
    float *partial = plan.memory + ((s.n * plan.parts + s.part) * a.groups + s.c0 / per_group) * 2;
    for_each_group(
        groups, per_group, [&](int c) { return sums[c]; },
        [&](int g, float squares) {
            local[2 * g + 1] = squares;
            if (plan.on_chip) return;
            partial[2 * g] = local[2 * g];
            partial[2 * g + 1] = squares;
        });
    if (!plan.on_chip) return;

    if (plan.parts > 1) cluster_sync();
    else __syncthreads();
    for (int g = static_cast<int>(threadIdx.x); g < groups; g += static_cast<int>(blockDim.x)) {
        float group_mean = local[2 * g], squares = local[2 * g + 1];
        const float total = static_cast<float>(pixels_of(a)) * static_cast<float>(per_group);
        if (plan.parts > 1) {
            const auto share_of = [&](int rank) {
                return static_cast<float>(min(plan.pixels, pixels_of(a) - rank * plan.pixels) * per_group);
            };
            group_mean = squares = 0.0f;
            for (int rank = 0; rank < plan.parts; ++rank)
                group_mean += of_rank(local, rank)[2 * g] * (share_of(rank) / total);
            for (int rank = 0; rank < plan.parts; ++rank) {
                const float *other = of_rank(local, rank);
                const float deviation = other[2 * g] - group_mean;
                squares += fmaf(share_of(rank) * deviation, deviation, other[2 * g + 1]);
            }
        }
        mean[g] = group_mean;
        rstd[g] = rstd_of(a, squares, total);
        if (s.part == 0) {
            a.mean[s.n * a.groups + s.c0 / per_group + g] = mean[g];
            a.rstd[s.n * a.groups + s.c0 / per_group + g] = rstd[g];
        }
    }
    // A block must not end, and lose its shared memory, before the other blocks have read it.
    if (plan.parts > 1) cluster_sync();
    else __syncthreads();
    fill_table(a, s, table, mean, rstd);
    apply<T, kNhwc, V, true>(a, s, table, rule, stash);
}

// One warp for each group of each image: mean and rstd from those of the parts.
__global__ void combine_parts(const __grid_constant__ Args a, const __grid_constant__ Plan plan) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int64_t i = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
    if (i >= a.n * a.groups) return;
    const float *partial = plan.memory + (i / a.groups * plan.parts * a.groups + i % a.groups) * 2;
    const int per_group = static_cast<int>(channels_of(a) / a.groups);
    const float total = static_cast<float>(pixels_of(a)) * static_cast<float>(per_group);
    const auto share_of = [&](int part) {
        return static_cast<float>(min(plan.pixels, pixels_of(a) - part * plan.pixels) * per_group);
    };
    float mean = 0.0f, squares = 0.0f;
    for (int part = lane; part < plan.parts; part += 32)
        mean += partial[part * a.groups * 2] * (share_of(part) / total);
    mean = warp_sum(mean);
    for (int part = lane; part < plan.parts; part += 32) {
        const float deviation = partial[part * a.groups * 2] - mean;
        squares += fmaf(share_of(part) * deviation, deviation, partial[part * a.groups * 2 + 1]);
    }
    squares = warp_sum(squares);
    if (lane != 0) return;
    a.mean[i] = mean;
    a.rstd[i] = rstd_of(a, squares, total);
}

template <typename T, bool kNhwc, int V>
__global__ void __launch_bounds__(kThreads, 2)
    apply_parts(const __grid_constant__ Args a, const __grid_constant__ Plan plan, const DropoutRule rule) {
    FASTDDPM_SHARED(memory);
    const Share s = share_of_block<kNhwc, V>(a, plan);
    float *floats = reinterpret_cast<float *>(memory);
    const Table table{floats, floats + s.channels, floats + 2 * s.channels};
    const int64_t group = s.n * a.groups + s.c0 / (channels_of(a) / a.groups);
    fill_table(a, s, table, a.mean + group, a.rstd + group);
    apply<T, kNhwc, V, false>(a, s, table, rule, nullptr);
}

}  // namespace

int32_t forward(const Args &a, void *workspace, int64_t workspace_bytes, void *stream) {
    Plan plan{};
    if (const int32_t code = make_plan(a, false, &plan)) return code;
    if (workspace_bytes < plan.workspace) return FASTDDPM_NO_MEMORY;
    plan.memory = static_cast<float *>(workspace);
    const DropoutRule rule = dropout_rule(a);
    return dispatch(a, plan, [&](auto type, auto nhwc, auto vector) -> int32_t {
        using T = decltype(type);
        constexpr bool kNhwc = decltype(nhwc)::value;
        constexpr int V = decltype(vector)::value;
        const LaunchShape shape{plan.blocks, plan.threads, static_cast<size_t>(plan.shared),
                                plan.on_chip ? plan.parts : 1};
        const int32_t code = launch(normalize<T, kNhwc, V>, shape, stream, a, plan, rule);
        if (code || plan.on_chip) return code;
        if (const int32_t error = launch(combine_parts, {divide_up(a.n * a.groups, 4), 128}, stream, a, plan))
            return error;
        const size_t table = static_cast<size_t>(plan.channels) * 3 * sizeof(float);
        return launch(apply_parts<T, kNhwc, V>, {plan.blocks, plan.threads, table}, stream, a, plan, rule);
    });
}

}  // namespace group_norm
}  // namespace fastddpm

FASTDDPM_API int32_t fastddpm_cuda_group_norm_silu(const fastddpm_group_norm_silu_args *args, void *workspace,
                                                   int64_t workspace_bytes, void *stream) {
    return fastddpm::group_norm::forward(*args, workspace, workspace_bytes, stream);
}
