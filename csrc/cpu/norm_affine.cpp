// GroupNorm's statistics as a gain and an offset per image and channel, for a convolution to apply to its input.
//
// Each chunk of pixels sums x - s and (x - s)^2 per channel, s the channel's first value in the image: a mean far from
// zero costs no digits. Chunks, and channels of a group, are put together in double. The chunks do not depend on the
// number of threads.
#include "conv.h"

namespace fastddpm {
namespace FASTDDPM_ISA {
namespace {

constexpr int64_t kChunk = 128;  // pixels whose sums are kept in single precision

int64_t chunks_of(const fastddpm_norm_affine_args &p) { return divide_up(p.pixels, kChunk); }

// Sums of the pixels first .. first + count - 1 of `channels` channels of one input.
void sum_chunk(const float *x, int64_t channels, int64_t first, int64_t count, float *sums, float *squares) {
    int64_t c = 0;
    for (; c + kWidth <= channels; c += kWidth) {
        const Vec shift = load(x + c);
        Vec s{}, q{};
        for (int64_t i = first; i < first + count; ++i) {
            const Vec d = load(x + i * channels + c) - shift;
            s += d;
            q += d * d;
        }
        store(sums + c, s);
        store(squares + c, q);
    }
    for (; c < channels; ++c) {
        float s = 0, q = 0;
        for (int64_t i = first; i < first + count; ++i) {
            const float d = x[i * channels + c] - x[c];
            s += d;
            q += d * d;
        }
        sums[c] = s;
        squares[c] = q;
    }
}

struct Channel {
    double mean, squares;  // squares: the sum of (x - mean)^2
};

Channel of_channel(const fastddpm_norm_affine_args &p, int64_t n, int64_t c, const float *sums) {
    const int64_t channels = p.c1 + p.c2, chunks = chunks_of(p);
    const float shift = c < p.c1 ? p.x[n * p.pixels * p.c1 + c] : p.skip[n * p.pixels * p.c2 + (c - p.c1)];
    double s = 0, q = 0;
    for (int64_t i = 0; i < chunks; ++i) {
        const float *chunk = sums + (n * chunks + i) * 2 * channels;
        s += chunk[c];
        q += chunk[channels + c];
    }
    const double difference = s / static_cast<double>(p.pixels);
    return {shift + difference, q - s * difference};
}

void affine_of_group(const fastddpm_norm_affine_args &p, int64_t n, int64_t group, const float *sums) {
    const int64_t channels = p.c1 + p.c2, width = channels / p.groups, first = group * width;
    double mean = 0, squares = 0;
    for (int64_t c = first; c < first + width; ++c) mean += of_channel(p, n, c, sums).mean;
    mean /= static_cast<double>(width);
    for (int64_t c = first; c < first + width; ++c) {
        const Channel channel = of_channel(p, n, c, sums);
        const double away = channel.mean - mean;
        squares += channel.squares + away * away * static_cast<double>(p.pixels);
    }
    const double variance = squares / static_cast<double>(width * p.pixels);
    const double rstd = 1 / __builtin_sqrt((variance > 0 || variance != variance ? variance : 0) + p.eps);
    for (int64_t c = first; c < first + width; ++c) {
        const double gain = p.weight[c] * rstd;
        p.gain[n * channels + c] = static_cast<float>(gain);
        p.offset[n * channels + c] = static_cast<float>(p.bias[c] - mean * gain);
    }
}

}  // namespace

int64_t norm_affine_workspace(const fastddpm_norm_affine_args &p) {
    return p.n * chunks_of(p) * 2 * (p.c1 + p.c2) * static_cast<int64_t>(sizeof(float));
}

int32_t norm_affine(const fastddpm_norm_affine_args &p, int32_t threads) {
    const int64_t channels = p.c1 + p.c2, chunks = chunks_of(p);
    if (p.groups < 1 || channels % p.groups) return FASTDDPM_UNSUPPORTED;
    if (p.workspace_bytes < norm_affine_workspace(p)) return FASTDDPM_NO_MEMORY;
    float *sums = static_cast<float *>(p.workspace);
#pragma omp parallel num_threads(threads) if (threads > 1 && p.n * p.pixels * channels > 32768)
    {
#pragma omp for
        for (int64_t task = 0; task < p.n * chunks; ++task) {
            const int64_t n = task / chunks, first = task % chunks * kChunk, count = smaller(kChunk, p.pixels - first);
            float *to = sums + task * 2 * channels;
            sum_chunk(p.x + n * p.pixels * p.c1, p.c1, first, count, to, to + channels);
            if (p.c2 > 0)
                sum_chunk(p.skip + n * p.pixels * p.c2, p.c2, first, count, to + p.c1, to + channels + p.c1);
        }
#pragma omp for
        for (int64_t task = 0; task < p.n * p.groups; ++task)
            affine_of_group(p, task / p.groups, task % p.groups, sums);
    }
    return FASTDDPM_OK;
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
