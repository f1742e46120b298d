// What the kernels of this folder share: launching, storage types, 16-byte accesses, warps and clusters.
//
// The same sources compile for the CPU with FASTDDPM_EMULATE defined (emulate/cuda_emulation.h), for tests.
#pragma once
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

// What the host decides by. Queried at each call: the answer depends on the current device, and costs well below 1 us.
struct Chip {
    int multiprocessors;
    int shared;  // bytes of shared memory that a block may have
    bool clusters;
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
// Nothing is launched for no blocks. A failure is returned, and cleared from the runtime's state.
template <typename... Parameters>
int32_t launch(void (*kernel)(Parameters...), const LaunchShape &shape, void *stream,
               typename identity<Parameters>::type... arguments) {
    if (shape.blocks == 0) return FASTDDPM_OK;
    if (shape.blocks > INT32_MAX) return FASTDDPM_UNSUPPORTED;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
    config.blockDim = dim3(static_cast<unsigned>(shape.threads));
    config.dynamicSmemBytes = shape.shared;
    config.stream = static_cast<cudaStream_t>(stream);
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
    config.attrs = &cluster;
    config.numAttrs = shape.cluster > 1;
    cudaError_t error = cudaSuccess;
    if (shape.shared > 48 * 1024)
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     static_cast<int>(shape.shared));
    if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, arguments...);
    const cudaError_t last = cudaGetLastError();
    return error != cudaSuccess ? error : last;
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

// V adjacent elements of storage type T as they move: 16 bytes, or one element where that cannot be.
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

template <int V, typename T>
__device__ __forceinline__ Pack<T, V> load(const T *address) {
    return *reinterpret_cast<const Pack<T, V> *>(address);
}
template <int V, typename T>
__device__ __forceinline__ void store(T *address, const float (&values)[V]) {
    *reinterpret_cast<Pack<T, V> *>(address) = Pack<T, V>::pack(values);
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
