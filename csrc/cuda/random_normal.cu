// Standard normals from Philox blocks.
#include "noise.cuh"

namespace fastddpm {
namespace {

__global__ void __launch_bounds__(kElementwiseThreads)
    normals(const __grid_constant__ fastddpm_random_normal_args a, const bool whole) {
    const Four at = four_of_thread(a.num);
    if (at.count == 0) return;
    float z[4];
    normals_of(noise_key(a.key, at.n, *a.key.step, a.stream_id), at.block, z);
    store_four(a.out, at, a.num, whole, z);
}

// Word w of block b of image n to words[(n * num + b) * 4 + w].
__global__ void __launch_bounds__(kElementwiseThreads)
    raw_words(const __grid_constant__ fastddpm_random_normal_args a, uint32_t *words) {
    const Four at = four_of_thread(4 * a.num);
    if (at.count == 0) return;
    const philox_block drawn = words_of(noise_key(a.key, at.n, *a.key.step, a.stream_id), at.block);
#pragma unroll
    for (int i = 0; i < 4; ++i) words[(at.n * a.num + at.block) * 4 + i] = drawn.w[i];
}

}  // namespace
}  // namespace fastddpm

FASTDDPM_API int32_t fastddpm_cuda_random_normal(const fastddpm_random_normal_args *args, void *stream) {
    using namespace fastddpm;
    return launch(normals, elementwise_shape(args->n, args->num), stream, *args,
                  rows_of_16_bytes(args->num, args->out));
}

FASTDDPM_API int32_t fastddpm_cuda_philox(const fastddpm_random_normal_args *args, uint32_t *words, void *stream) {
    using namespace fastddpm;
    return launch(raw_words, elementwise_shape(args->n, 4 * args->num), stream, *args, words);
}
