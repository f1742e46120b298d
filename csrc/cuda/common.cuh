// Shared by the kernels of this folder: launches, storage types, 16-byte accesses, warps and clusters.
//
// The same sources compile for the CPU with FASTDDPM_EMULATE defined (emulate/cuda_emulation.h), for tests.
#pragma once
#include <cstring>
#include <type_traits>

#include "../fastddpm.h"
#include "../philox.h"

#ifdef FASTDDPM_EMULATE
#include "emulate/cuda_emulation.h"
#else
#include <cuda_runtime.h>
// Shared memory is dynamic only: one name, one type, sizes chosen by the host.
#define FASTDDPM_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace fastddpm {

// The limits by which the host plans a launch. Queried at each call, because they depend on the current device.
struct Chip {
    int multiprocessors;
    int shared;   // bytes of shared memory that a block may have
    int cluster;  // blocks that a cluster may have; 1: there are no clusters
};
int32_t query_chip(Chip *chip);

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct LaunchShape {
    int64_t blocks;
    int threads;
    size_t shared = 0;
    int cluster = 1;  // blocks of a cluster
};

template <typename T>
struct identity {
    using type = T;
};

#ifndef FASTDDPM_EMULATE
constexpr int kSharedOfEveryChip = 48 * 1024;  // more must be asked for

cudaLaunchConfig_t launch_config(const LaunchShape &shape, void *stream, cudaLaunchAttribute *cluster);

// Raises a kernel's limit of shared memory to the most that a block may have on the current device, whatever this
// launch needs: the limit belongs to the kernel, and threads that launch it at the same time must not lower each
// other's.
int32_t allow_shared(const void *kernel);

// Launches nothing if there are no blocks. A failure is returned, and cleared from the runtime's state.
template <typename... Parameters>
int32_t launch(void (*kernel)(Parameters...), const LaunchShape &shape, void *stream,
               typename identity<Parameters>::type... arguments) {
    if (shape.blocks == 0) return FASTDDPM_OK;
    if (shape.blocks > INT32_MAX) return FASTDDPM_UNSUPPORTED;
    if (shape.shared > kSharedOfEveryChip)
        if (const int32_t error = allow_shared(reinterpret_cast<const void *>(kernel))) return error;
    cudaLaunchAttribute cluster{};
    const cudaLaunchConfig_t config = launch_config(shape, stream, &cluster);
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
    if (error != cudaSuccess) cudaGetLastError();
    return error;
}

__device__ __forceinline__ float shuffle_xor(float value, int mask) { return __shfl_xor_sync(~0u, value, mask); }

// A cluster is one row of blocks, so that a block's rank is its index modulo the cluster's size.
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// The address, in the shared memory of the cluster's block `rank`, of what `pointer` is in this block's.
__device__ __forceinline__ const float *of_rank(const float *pointer, int rank) {
#if __CUDA_ARCH__ >= 900
    uint64_t mapped;
    asm("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(pointer), "r"(rank));
    return reinterpret_cast<const float *>(mapped);
#else
    return pointer;
#endif
}
#else
template <typename... Parameters>
int32_t launch(void (*kernel)(Parameters...), const LaunchShape &shape, void *,
               typename identity<Parameters>::type... arguments) {
    if (shape.blocks == 0) return FASTDDPM_OK;
    return emulation::run(shape.blocks, shape.threads, shape.shared, shape.cluster, [&] { kernel(arguments...); });
}
#endif

__device__ __forceinline__ float warp_sum(float value) {
    for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
    return value;
}

// Storage types.

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

#ifndef FASTDDPM_EMULATE
__device__ __forceinline__ uint32_t round_f16x2(float low, float high) {
    uint32_t both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
__device__ __forceinline__ uint32_t round_bf16x2(float low, float high) {
    uint32_t both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
__device__ __forceinline__ float widen_f16(uint16_t bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
#endif

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(bf16 value) { return __uint_as_float(uint32_t{value.bits} << 16); }
__device__ __forceinline__ float widen(f16 value) { return widen_f16(value.bits); }
__device__ __forceinline__ uint32_t round_pair(bf16, float low, float high) { return round_bf16x2(low, high); }
__device__ __forceinline__ uint32_t round_pair(f16, float low, float high) { return round_f16x2(low, high); }

// V adjacent elements of storage type T that are loaded and stored together: 16 bytes, or one element.
template <typename T, int V>
struct Pack {
    static_assert(sizeof(T) == 2 && V == 8);
    uint4 raw;

    __device__ __forceinline__ void unpack(float (&v)[V]) const {
        const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int i = 0; i < V; ++i) v[i] = widen(T{static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2)))});
    }
    __device__ __forceinline__ static Pack pack(const float (&v)[V]) {
        return {{round_pair(T{}, v[0], v[1]), round_pair(T{}, v[2], v[3]), round_pair(T{}, v[4], v[5]),
                 round_pair(T{}, v[6], v[7])}};
    }
};

template <>
struct Pack<float, 4> {
    float4 raw;

    __device__ __forceinline__ void unpack(float (&v)[4]) const {
        v[0] = raw.x, v[1] = raw.y, v[2] = raw.z, v[3] = raw.w;
    }
    __device__ __forceinline__ static Pack pack(const float (&v)[4]) { return {{v[0], v[1], v[2], v[3]}}; }
};

template <typename T>
struct Pack<T, 1> {
    T raw;

    __device__ __forceinline__ void unpack(float (&v)[1]) const { v[0] = widen(raw); }
    __device__ __forceinline__ static Pack pack(const float (&v)[1]) {
        if constexpr (sizeof(T) == 4) return {v[0]};
        else return {T{static_cast<uint16_t>(round_pair(T{}, v[0], 0.0f))}};
    }
};

// A pack moves by one instruction.
template <typename T, int V>
using Word = std::conditional_t<sizeof(Pack<T, V>) == 16, uint4,
                                std::conditional_t<sizeof(Pack<T, V>) == 4, uint32_t, uint16_t>>;

#ifndef FASTDDPM_EMULATE
// Loads through the read-only cache: nothing that the kernels load by packs is written while they run.
template <typename W>
__device__ __forceinline__ W read_word(const void *address) {
    return __ldg(static_cast<const W *>(address));
}
template <typename W>
__device__ __forceinline__ void write_word(void *address, const W &word) {
    *static_cast<W *>(address) = word;
}
// In assembly, because the compiler splits a plain assignment into four stores if the address is a sum of many.
__device__ __forceinline__ void write_word(void *address, const uint4 &word) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(address)), "r"(word.x),
                 "r"(word.y), "r"(word.z), "r"(word.w));
}
#endif

template <int V, typename T>
__device__ __forceinline__ Pack<T, V> load(const T *address) {
    const auto word = read_word<Word<T, V>>(address);
    Pack<T, V> pack;
    memcpy(&pack, &word, sizeof(pack));
    return pack;
}
template <int V, typename T>
__device__ __forceinline__ void store(T *address, const float (&values)[V]) {
    const auto pack = Pack<T, V>::pack(values);
    Word<T, V> word;
    memcpy(&word, &pack, sizeof(pack));
    write_word(address, word);
}

// One element of a tensor whose dtype is known at run time only.
__device__ __forceinline__ float element(const void *tensor, int64_t i, int32_t dtype) {
    switch (dtype) {
        case FASTDDPM_BFLOAT16: return widen(static_cast<const bf16 *>(tensor)[i]);
        case FASTDDPM_FLOAT16: return widen(static_cast<const f16 *>(tensor)[i]);
        default: return static_cast<const float *>(tensor)[i];
    }
}

inline bool aligned(const void *pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace fastddpm
