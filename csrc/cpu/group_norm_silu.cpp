// group_norm_silu on the CPU: one pass for the statistics of every chunk of pixels, one that normalizes and writes.
#include "group_norm_silu.h"

namespace fastddpm {
namespace FASTDDPM_ISA {
namespace {

// y = (x - mean) gain + offset, per image and channel; the time embedding is part of the mean.
struct Coefficients {
    float *mean, *gain, *offset;  // (N, C)
};

template <bool kNhwc, typename T>
void normalize_chunk(const NormArgs &p, const Coefficients &k, int64_t n, int64_t first, int64_t count,
                     const DropoutMask &mask) {
    const int64_t channels = p.c1 + p.c2, begin = n * p.height * p.width + first;
    for_runs<kNhwc>(p, n, first, count, [&](int side, int64_t from, int64_t c, int64_t at, int64_t length) {
        const T *x = static_cast<const T *>(side ? p.skip : p.x) + from;
        T *y = static_cast<T *>(p.y) + at;
        const int64_t pixel = kNhwc ? at / channels - begin : 0;
        const float *mean = k.mean + n * channels + c, *gain = k.gain + n * channels + c;
        const float *offset = k.offset + n * channels + c;
        for (int64_t i = 0; i < length; i += kWidth) {
            const int64_t part = length - i;
            Vec v = part < kWidth ? load_part(x + i, part) : load(x + i);
            v = (v - per_channel<kNhwc>(mean, i, part)) * per_channel<kNhwc>(gain, i, part) +
                per_channel<kNhwc>(offset, i, part);
            if (p.silu) v = vsilu(v);
            if (p.dropout > 0) v *= mask.factors<kNhwc>(pixel, c, i, part);
            part < kWidth ? store_part(y + i, v, part) : store(y + i, v);
        }
    });
}

template <bool kNhwc, typename T>
int32_t forward(const NormArgs &p, int32_t threads) {
    const TwoInputs<T> in = norm_inputs<T>(p);
    const int64_t channels = in.channels(), width = channels / p.groups, chunks = in.chunks(), tasks = in.tasks();
    const int64_t image = Memory::lines(p.n * channels * static_cast<int64_t>(sizeof(float)));
    const int64_t moment_bytes = Memory::lines(p.n * in.floats() * static_cast<int64_t>(sizeof(float)));
    Memory memory(moment_bytes + 3 * image + threads * DropoutMask::bytes(p));
    if (memory.failed()) return FASTDDPM_NO_MEMORY;
    float *moments = memory.take<float>(p.n * in.floats());
    const Coefficients k{memory.take<float>(p.n * channels), memory.take<float>(p.n * channels),
                         memory.take<float>(p.n * channels)};
    uint8_t *masks = memory.take<uint8_t>(threads * DropoutMask::bytes(p));
    const float *temb = static_cast<const float *>(p.temb);
#pragma omp parallel num_threads(team_size(threads)) if (threads > 1 && norm_is_large(p))
    {
#pragma omp for
        for (int64_t task = 0; task < p.n * tasks; ++task)
            moments_task(in, task / tasks, task % tasks, moments + task / tasks * in.floats());
#pragma omp for
        for (int64_t task = 0; task < p.n * p.groups; ++task) {
            const int64_t n = task / p.groups, first = task % p.groups * width;
            const Statistics group = statistics_of_group(in, moments + n * in.floats(),
                                                         temb ? temb + n * p.temb_stride : nullptr, first, width, p.eps);
            p.mean[task] = static_cast<float>(group.mean);
            p.rstd[task] = static_cast<float>(group.rstd);
            for (int64_t c = first; c < first + width; ++c) {
                const Affine affine = norm_affine_of(p, n, c);
                k.mean[n * channels + c] = static_cast<float>(group.mean - norm_temb_of(p, n, c));
                k.gain[n * channels + c] = static_cast<float>(affine.gain * group.rstd);
                k.offset[n * channels + c] = static_cast<float>(affine.offset);
            }
        }
        DropoutMask mask(p, masks + thread_number() * DropoutMask::bytes(p));
#pragma omp for
        for (int64_t task = 0; task < p.n * chunks; ++task) {
            const int64_t n = task / chunks, first = task % chunks * kChunk, count = smaller(kChunk, in.pixels - first);
            mask.draw(n, first, count);
            normalize_chunk<kNhwc, T>(p, k, n, first, count, mask);
        }
    }
    return FASTDDPM_OK;
}

}  // namespace

int32_t group_norm_silu(const fastddpm_group_norm_silu_args &p, int32_t threads) {
    if (!norm_supported(p)) return FASTDDPM_UNSUPPORTED;
    const bool nhwc = p.layout == FASTDDPM_NHWC;
    if (p.dtype == FASTDDPM_FLOAT32) return nhwc ? forward<true, float>(p, threads) : forward<false, float>(p, threads);
    return nhwc ? forward<true, uint16_t>(p, threads) : forward<false, uint16_t>(p, threads);
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
