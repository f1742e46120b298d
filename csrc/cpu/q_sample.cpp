// q_sample on the CPU: scaling, mirroring, noise and equation 4 in one pass.
#include "kernels.h"
#include "noise.h"

namespace fastddpm {
namespace FASTDDPM_ISA {
namespace {

constexpr uint32_t kForwardStream = 2;  // kernels/philox: STREAM_FORWARD

// Elements first .. first + count - 1 of image n, counted in (C, H, W) order, scaled and mirrored.
template <typename T>
void read_images(const fastddpm_q_sample_args &p, int64_t n, int64_t first, int64_t count, float *to) {
    const bool mirrored = p.flip != nullptr && p.flip[n] != 0;
    const T *image = static_cast<const T *>(p.x0) + n * p.x0_stride[0];
    for (int64_t i = 0; i < count;) {
        const int64_t at = first + i, w = at % p.width, h = at / p.width % p.height, c = at / p.width / p.height;
        const int64_t run = smaller(count - i, p.width - w);
        const T *row = image + c * p.x0_stride[1] + h * p.x0_stride[2];
        for (int64_t j = 0; j < run; ++j) {
            const int64_t column = mirrored ? p.width - 1 - w - j : w + j;
            const float value = static_cast<float>(row[column * p.x0_stride[3]]);
            to[i + j] = sizeof(T) == 1 ? value / 127.5f - 1.0f : value;
        }
        i += run;
    }
}

}  // namespace

int32_t q_sample(const fastddpm_q_sample_args &p, int32_t threads) {
    if (p.dtype != FASTDDPM_UINT8 && p.dtype != FASTDDPM_FLOAT32) return FASTDDPM_UNSUPPORTED;
    for (int64_t n = 0; n < p.n; ++n)
        if (p.t[n] < 0 || p.t[n] >= p.timesteps) return FASTDDPM_UNSUPPORTED;
    const int64_t num = p.c * p.height * p.width;
    for_normals(p.n, num, threads, [&](int64_t n, int64_t first) {
        const int64_t count = smaller(kNormals, num - first), at = n * num + first;
        float images[kNormals], drawn[kNormals];
        if (p.dtype == FASTDDPM_UINT8)
            read_images<uint8_t>(p, n, first, count, images);
        else
            read_images<float>(p, n, first, count, images);
        if (p.noise == nullptr)
            normal_lanes(drawn, static_cast<uint32_t>(first / 4),
                         {static_cast<uint32_t>(p.key.images[n]), static_cast<uint32_t>(*p.key.step), kForwardStream,
                          static_cast<uint64_t>(*p.key.seed)});
        const float *noise = p.noise == nullptr ? drawn : p.noise + at;
        const float signal = p.table[2 * p.t[n]], sigma = p.table[2 * p.t[n] + 1];
        for (int64_t i = 0; i < count; ++i) {
            const float eps = noise[i];
            p.x_t[at + i] = signal * images[i] + sigma * eps;
            p.eps[at + i] = eps;
        }
    });
    return FASTDDPM_OK;
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
