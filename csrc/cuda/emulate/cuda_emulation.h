// Runs CUDA kernels on a CPU, for tests on machines without a GPU.
//
// Every CUDA thread is a fiber with a stack of its own. One OS thread runs the blocks of a cluster together and the
// clusters one after another; a fiber runs until a barrier or a shuffle stops it. The order in which fibers run can be
// chosen: in turns, or one block far ahead of the others. If a barrier is missing, two orders give two results. The
// shared memory of every block starts as NaN and ends at guard bytes; once a block has ended, the rest of its cluster
// reads NaN there. A barrier that not all threads reach, and an access by packs at an unaligned address, end the launch
// with an error.
// docs/cuda.md tells what the emulation cannot show.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define FASTDDPM_SHARED(name) unsigned char *name = ::fastddpm::emulation::shared_memory()

struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

namespace fastddpm {
namespace emulation {

struct Index {
    unsigned x;
};

// Runs `thread` for every thread of a grid; 0, or a code of the CUDA runtime.
int32_t run(int64_t blocks, int threads, size_t shared, int cluster, const std::function<void()> &thread);

unsigned char *shared_memory();
void block_barrier();
void cluster_barrier();
float exchange_xor(float value, int mask);
const float *mapped(const float *pointer, int rank);
void check_alignment(const void *address, size_t bytes);

// The running thread's.
extern Index thread_index, block_index, block_size;

}  // namespace emulation

inline float shuffle_xor(float value, int mask) { return emulation::exchange_xor(value, mask); }
inline void cluster_sync() { emulation::cluster_barrier(); }
inline const float *of_rank(const float *pointer, int rank) { return emulation::mapped(pointer, rank); }

template <typename W>
W read_word(const void *address) {
    emulation::check_alignment(address, sizeof(W));
    W word;
    memcpy(&word, address, sizeof(W));
    return word;
}
template <typename W>
void write_word(void *address, const W &word) {
    emulation::check_alignment(address, sizeof(W));
    memcpy(address, &word, sizeof(W));
}

// The CUDA functions that the kernels call.

using std::min;

inline float __uint_as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}
inline uint32_t __float_as_uint(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    return bits;
}
inline double __longlong_as_double(long long bits) {
    double value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}
inline long long __double_as_longlong(double value) {
    long long bits;
    memcpy(&bits, &value, sizeof(bits));
    return bits;
}
inline float __expf(float x) { return expf(x); }
inline float __fdividef(float a, float b) { return a / b; }

inline uint32_t round_bf16x2(float low, float high) {
    const auto round = [](float value) {
        const uint32_t bits = __float_as_uint(value);
        if (value != value) return 0x7FFFu;
        return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    };
    return round(low) | round(high) << 16;
}

inline uint32_t round_f16x2(float low, float high) {
    const auto round = [](float value) -> uint32_t {
        const uint32_t sign = __float_as_uint(value) >> 31 << 15;
        const float magnitude = std::fabs(value);
        if (magnitude != magnitude) return 0x7FFF;
        if (magnitude >= 65520.0f) return sign | 0x7C00;
        if (magnitude == 0.0f) return sign;
        int exponent = 0;
        std::frexp(magnitude, &exponent);
        // Units of the last place: 2^-24 for subnormals. The sum carries into the exponent by itself.
        const int last = exponent - 11 < -24 ? -24 : exponent - 11;
        const auto units = static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, -last)));
        return sign | (units + (static_cast<uint32_t>(last + 24) << 10));
    };
    return round(low) | round(high) << 16;
}

inline float widen_f16(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const auto units = static_cast<float>(exponent ? 1024 + fraction : fraction);
    float magnitude = std::ldexp(units, (exponent ? exponent : 1) - 25);
    if (exponent == 31) magnitude = fraction ? NAN : INFINITY;
    return bits >> 15 ? -magnitude : magnitude;
}

}  // namespace fastddpm

#define threadIdx ::fastddpm::emulation::thread_index
#define blockIdx ::fastddpm::emulation::block_index
#define blockDim ::fastddpm::emulation::block_size
#define __syncthreads ::fastddpm::emulation::block_barrier
