// Kernels with the faults that the emulation must find.
#include "../common.cuh"

namespace fastddpm {
namespace {

// Reads what the other warp wrote; without the barrier, perhaps what was there before.
__global__ void neighbour(float *out, bool barrier) {
    FASTDDPM_SHARED(memory);
    auto *values = reinterpret_cast<float *>(memory);
    values[threadIdx.x] = static_cast<float>(threadIdx.x);
    if (barrier) __syncthreads();
    out[threadIdx.x] = values[threadIdx.x ^ 32];
}

__global__ void half_at_a_barrier() {
    if (threadIdx.x < 32) __syncthreads();
}

__global__ void past_the_end(int floats) {
    FASTDDPM_SHARED(memory);
    if (threadIdx.x == 0) reinterpret_cast<float *>(memory)[floats] = 0.0f;
}

__global__ void one_off(const float *in, float *out) {
    float values[4];
    load<4>(in + threadIdx.x * 4 + 1).unpack(values);
    store<4>(out + threadIdx.x * 4, values);
}

// Reads the shared memory of the neighbouring block, which ends with that block.
__global__ void neighbour_block(float *out, bool wait) {
    FASTDDPM_SHARED(memory);
    auto *values = reinterpret_cast<float *>(memory);
    values[threadIdx.x] = static_cast<float>(blockIdx.x);
    cluster_sync();
    out[blockIdx.x * 32 + threadIdx.x] = of_rank(values, 1 - static_cast<int>(blockIdx.x))[threadIdx.x];
    if (wait) cluster_sync();
}

}  // namespace
}  // namespace fastddpm

FASTDDPM_API int32_t fastddpm_emulation_neighbour(float *out, int32_t barrier) {
    return fastddpm::launch(fastddpm::neighbour, {1, 64, 64 * sizeof(float)}, nullptr, out, barrier != 0);
}
FASTDDPM_API int32_t fastddpm_emulation_half_at_a_barrier() {
    return fastddpm::launch(fastddpm::half_at_a_barrier, {1, 64}, nullptr);
}
FASTDDPM_API int32_t fastddpm_emulation_past_the_end() {
    return fastddpm::launch(fastddpm::past_the_end, {1, 32, 64}, nullptr, 16);
}
FASTDDPM_API int32_t fastddpm_emulation_one_off(const float *in, float *out) {
    return fastddpm::launch(fastddpm::one_off, {1, 32}, nullptr, in, out);
}
FASTDDPM_API int32_t fastddpm_emulation_neighbour_block(float *out, int32_t wait) {
    return fastddpm::launch(fastddpm::neighbour_block, {2, 32, 32 * sizeof(float), 2}, nullptr, out, wait != 0);
}
