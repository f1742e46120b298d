// x_{t-1} from x_t and the network's output, in place, by the row of a coefficient table that *index names.
#include <cmath>

#include "noise.cuh"

namespace fastddpm {
namespace {

constexpr int64_t kStreamReverse = 1;  // kernels/philox
enum { kFixed = 0, kLearned = 1 };     // kernels/reverse_step
constexpr int kColumns = 9;            // kernels/reverse_step: StepTable

struct Row {
    float v[kColumns];
};

// An index outside the table gives NaN: the host could not check it without waiting for the GPU.
__device__ __forceinline__ Row row_of(const fastddpm_reverse_step_args &a, int64_t index) {
    Row row;
    const bool inside = index >= 0 && index < a.steps;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) row.v[i] = inside ? a.table[index * kColumns + i] : NAN;
    return row;
}

// One element; x is replaced, and x0, the clipped prediction, is returned. previous: that of the step before.
__device__ __forceinline__ float step_element(const fastddpm_reverse_step_args &a, const Row &row, float prediction,
                                              float variance, float previous, float z, float *x) {
    float x0 = row.v[0] * *x + row.v[1] * prediction;
    // NaN stays NaN.
    if (a.clip > 0.0f) x0 = x0 < -a.clip ? -a.clip : x0 > a.clip ? a.clip : x0;
    float mean = row.v[2] * x0 + row.v[3] * *x + row.v[4] * prediction;
    if (row.v[8] != 0.0f) mean += row.v[8] * previous;
    float sigma = row.v[5];
    if (a.variance != kFixed) {
        if (a.variance != kLearned) variance = row.v[6] + (row.v[7] - row.v[6]) * (variance + 1.0f) / 2.0f;
        sigma *= expf(0.5f * variance);
    }
    *x = row.v[5] > 0.0f ? mean + sigma * z : mean;
    return x0;
}

__global__ void __launch_bounds__(kElementwiseThreads)
    reverse(const __grid_constant__ fastddpm_reverse_step_args a, const bool whole) {
    const int64_t num = a.c * a.height * a.width, index = *a.index;
    const Four at = four_of_thread(num);
    if (at.count == 0) return;
    const Row row = row_of(a, index);
    float z[4] = {}, x0[4] = {NAN, NAN, NAN, NAN};
    if (a.x0 && row.v[8] != 0.0f) load_four(a.x0, at, num, whole, x0);
    // The last step has no noise.
    if (row.v[5] > 0.0f) {
        if (a.noise) load_four(a.noise, at, num, whole, z);
        else normals_of(noise_key(a.key, at.n, a.timesteps[index], kStreamReverse), at.block, z);
    }
    Place place(4 * at.block, a.height, a.width);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (i >= at.count) break;
        float *x = a.x + at.n * a.x_stride[0] + place.c * a.x_stride[1] + place.y * a.x_stride[2] +
                   place.x * a.x_stride[3];
        const int64_t out = at.n * a.out_stride[0] + place.c * a.out_stride[1] + place.y * a.out_stride[2] +
                            place.x * a.out_stride[3];
        const float variance = a.variance == kFixed ? 0.0f : element(a.out, out + a.c * a.out_stride[1], a.dtype);
        x0[i] = step_element(a, row, element(a.out, out, a.dtype), variance, x0[i], z[i], x);
        place.next(a.height, a.width);
    }
    if (a.x0) store_four(a.x0, at, num, whole, x0);
}

}  // namespace
}  // namespace fastddpm

FASTDDPM_API int32_t fastddpm_cuda_reverse_step(const fastddpm_reverse_step_args *args, void *stream) {
    using namespace fastddpm;
    if (args->dtype < FASTDDPM_FLOAT32 || args->dtype > FASTDDPM_FLOAT16) return FASTDDPM_UNSUPPORTED;
    const int64_t num = args->c * args->height * args->width;
    return launch(reverse, elementwise_shape(args->n, num), stream, *args,
                  rows_of_16_bytes(num, args->noise, args->x0));
}
