// x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, and eps.
#include <cmath>

#include "noise.cuh"

namespace fastddpm {
namespace {

constexpr int64_t kStreamForward = 2;  // kernels/philox

// uint8 v becomes v / 127.5 - 1.
__device__ __forceinline__ float pixel(const fastddpm_q_sample_args &a, int64_t i) {
    if (a.dtype == FASTDDPM_UINT8) return static_cast<float>(static_cast<const uint8_t *>(a.x0)[i]) / 127.5f - 1.0f;
    return static_cast<const float *>(a.x0)[i];
}

// A timestep outside the table gives NaN: the host could not check it without waiting for the GPU.
__global__ void __launch_bounds__(kElementwiseThreads)
    noise_images(const __grid_constant__ fastddpm_q_sample_args a, const bool whole) {
    const int64_t num = a.c * a.height * a.width;
    const Four at = four_of_thread(num);
    if (at.count == 0) return;
    float eps[4], x_t[4];
    if (a.noise) load_four(a.noise, at, num, whole, eps);
    else normals_of(noise_key(a.key, at.n, *a.key.step, kStreamForward), at.block, eps);
    const int64_t t = a.t[at.n];
    const bool inside = t >= 0 && t < a.timesteps;
    const float signal = inside ? a.table[2 * t] : NAN, sigma = inside ? a.table[2 * t + 1] : NAN;
    const bool flip = a.flip && a.flip[at.n];
    Place place(4 * at.block, a.height, a.width);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (i >= at.count) break;
        const int64_t column = flip ? a.width - 1 - place.x : place.x;
        const float x0 = pixel(a, at.n * a.x0_stride[0] + place.c * a.x0_stride[1] + place.y * a.x0_stride[2] +
                                      column * a.x0_stride[3]);
        x_t[i] = signal * x0 + sigma * eps[i];
        place.next(a.height, a.width);
    }
    store_four(a.x_t, at, num, whole, x_t);
    store_four(a.eps, at, num, whole, eps);
}

}  // namespace
}  // namespace fastddpm

FASTDDPM_API int32_t fastddpm_cuda_q_sample(const fastddpm_q_sample_args *args, void *stream) {
    using namespace fastddpm;
    if (args->dtype != FASTDDPM_UINT8 && args->dtype != FASTDDPM_FLOAT32) return FASTDDPM_UNSUPPORTED;
    const int64_t num = args->c * args->height * args->width;
    return launch(noise_images, elementwise_shape(args->n, num), stream, *args,
                  rows_of_16_bytes(num, args->noise, args->x_t, args->eps));
}
