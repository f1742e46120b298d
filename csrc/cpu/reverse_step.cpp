// reverse_step on the CPU: x_0 prediction, clip, posterior mean and noise in one pass, in place.
#include "kernels.h"
#include "noise.h"

namespace fastddpm {
namespace FASTDDPM_ISA {
namespace {

constexpr uint32_t kReverseStream = 1;  // kernels/philox: STREAM_REVERSE
constexpr int64_t kColumns = 9;          // kernels/reverse_step: StepTable

float widened(float v) { return v; }
float widened(uint16_t v) { return bit_cast<float>(static_cast<uint32_t>(v) << 16); }

// Calls body(i, offset in elements) for the elements first .. first + count - 1, counted in (C, H, W) order.
template <typename Body>
FASTDDPM_INLINE void for_elements(const fastddpm_reverse_step_args &p, const int64_t *stride, int64_t first,
                                  int64_t count, Body body) {
    for (int64_t i = 0; i < count;) {
        const int64_t at = first + i, w = at % p.width, h = at / p.width % p.height, c = at / p.width / p.height;
        const int64_t run = smaller(count - i, p.width - w);
        const int64_t row = c * stride[1] + h * stride[2] + w * stride[3];
        for (int64_t j = 0; j < run; ++j) body(i + j, row + j * stride[3]);
        i += run;
    }
}

// The network's output for the same elements; `half` 1 reads the second C channels, which the variance comes from.
template <typename T>
void read_output(const fastddpm_reverse_step_args &p, int64_t n, int64_t half, int64_t first, int64_t count, float *to) {
    const T *from = static_cast<const T *>(p.out) + n * p.out_stride[0] + half * p.c * p.out_stride[1];
    for_elements(p, p.out_stride, first, count, [&](int64_t i, int64_t at) { to[i] = widened(from[at]); });
}

void read_output(const fastddpm_reverse_step_args &p, int64_t n, int64_t half, int64_t first, int64_t count, float *to) {
    if (p.dtype == FASTDDPM_FLOAT32)
        read_output<float>(p, n, half, first, count, to);
    else
        read_output<uint16_t>(p, n, half, first, count, to);
}

// sigma times the learned deviation of each element, from the network's variance output, in place.
void deviations(const fastddpm_reverse_step_args &p, const float *row, float *values) {
    for (int64_t i = 0; i < kNormals; i += kWidth) {
        Vec log_var = load(values + i);
        if (p.variance == 2) log_var = row[6] + (row[7] - row[6]) * (log_var + 1.0f) / 2.0f;
        store(values + i, row[5] * vexp(0.5f * log_var));
    }
}

void step_elements(const fastddpm_reverse_step_args &p, const float *row, int64_t n, int64_t first, int64_t count) {
    // The rest of the last, shorter part is computed and not stored.
    float x[kNormals] = {}, out[kNormals] = {}, sigma[kNormals] = {}, noise[kNormals] = {};
    float *image = p.x + n * p.x_stride[0];
    for_elements(p, p.x_stride, first, count, [&](int64_t i, int64_t at) { x[i] = image[at]; });
    read_output(p, n, 0, first, count, out);
    const int64_t dense = n * p.c * p.height * p.width + first;
    const bool noisy = row[5] > 0;
    if (noisy && p.noise != nullptr) memcpy(noise, p.noise + dense, static_cast<size_t>(count) * sizeof(float));
    if (noisy && p.noise == nullptr)
        normal_lanes(noise, static_cast<uint32_t>(first / 4),
                     {static_cast<uint32_t>(p.key.images[n]), static_cast<uint32_t>(p.timesteps[*p.index]),
                      kReverseStream, static_cast<uint64_t>(*p.key.seed)});
    if (noisy && p.variance != 0) {
        read_output(p, n, 1, first, count, sigma);
        deviations(p, row, sigma);
    }
    const bool multistep = row[8] != 0;
    float x0[kNormals] = {};
    if (multistep && p.x0 != nullptr) memcpy(x0, p.x0 + dense, static_cast<size_t>(count) * sizeof(float));
    if (multistep && p.x0 == nullptr)
        for (float &previous : x0) previous = bit_cast<float>(0x7FC00000u);  // NaN
    for (int64_t i = 0; i < kNormals; i += kWidth) {
        const Vec x_t = load(x + i), prediction = load(out + i);
        Vec clean = row[0] * x_t + row[1] * prediction;
        if (p.clip > 0) {  // comparisons that leave a NaN as it is
            clean = clean > p.clip ? splat(p.clip) : clean;
            clean = clean < -p.clip ? splat(-p.clip) : clean;
        }
        Vec mean = row[2] * clean + row[3] * x_t + row[4] * prediction;
        if (multistep) mean += row[8] * load(x0 + i);
        store(x0 + i, clean);
        if (noisy) mean += (p.variance != 0 ? load(sigma + i) : splat(row[5])) * load(noise + i);
        store(x + i, mean);
    }
    for_elements(p, p.x_stride, first, count, [&](int64_t i, int64_t at) { image[at] = x[i]; });
    if (p.x0 != nullptr) memcpy(p.x0 + dense, x0, static_cast<size_t>(count) * sizeof(float));
}

}  // namespace

int32_t reverse_step(const fastddpm_reverse_step_args &p, int32_t threads) {
    const bool dtypes = p.dtype == FASTDDPM_FLOAT32 || p.dtype == FASTDDPM_BFLOAT16;
    if (!dtypes || p.variance < 0 || p.variance > 2 || *p.index < 0 || *p.index >= p.steps) return FASTDDPM_UNSUPPORTED;
    const float *row = p.table + kColumns * *p.index;
    const int64_t num = p.c * p.height * p.width;
    for_normals(p.n, num, threads, [&](int64_t n, int64_t first) {
        step_elements(p, row, n, first, smaller(kNormals, num - first));
    });
    return FASTDDPM_OK;
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
