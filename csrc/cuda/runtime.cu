// The chip, launches, and error codes in words.
#ifndef FASTDDPM_EMULATE
#include <atomic>

#include "common.cuh"

namespace fastddpm {
namespace {

constexpr int kLargestCluster = 8;  // what every chip with clusters promises
constexpr int kThreads = 256;       // of the blocks that come in clusters
constexpr int kDevices = 64;        // the most devices whose answer is kept

__global__ void __launch_bounds__(kThreads, 2) nothing() {}

// The largest cluster of blocks with `shared` bytes each that the current device has room for. A cluster runs in one
// part of a chip, which may have too few multiprocessors.
int32_t ask_largest_cluster(int shared, int *largest) {
    if (const int32_t error = allow_shared(reinterpret_cast<const void *>(nothing))) return error;
    for (*largest = kLargestCluster; *largest > 1; *largest /= 2) {
        cudaLaunchAttribute attribute{};
        const LaunchShape shape{*largest, kThreads, static_cast<size_t>(shared), *largest};
        const cudaLaunchConfig_t config = launch_config(shape, nullptr, &attribute);
        int active = 0;
        if (cudaOccupancyMaxActiveClusters(&active, nothing, &config) == cudaSuccess && active > 0) break;
        cudaGetLastError();
    }
    return FASTDDPM_OK;
}

}  // namespace

cudaLaunchConfig_t launch_config(const LaunchShape &shape, void *stream, cudaLaunchAttribute *cluster) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
    config.blockDim = dim3(static_cast<unsigned>(shape.threads));
    config.dynamicSmemBytes = shape.shared;
    config.stream = static_cast<cudaStream_t>(stream);
    cluster->id = cudaLaunchAttributeClusterDimension;
    cluster->val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
    config.attrs = cluster;
    config.numAttrs = shape.cluster > 1;
    return config;
}

int32_t allow_shared(const void *kernel) {
    int device = 0, shared = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error == cudaSuccess)
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error != cudaSuccess) cudaGetLastError();
    return error;
}

int32_t query_chip(Chip *chip) {
    static std::atomic<int> known[kDevices];  // the largest cluster of each device, 0: not asked yet
    int device = 0, clusters = 0;
    cudaError_t error = cudaGetDevice(&device);
    const auto ask = [&](int *answer, cudaDeviceAttr attribute) {
        if (error == cudaSuccess) error = cudaDeviceGetAttribute(answer, attribute, device);
    };
    ask(&chip->multiprocessors, cudaDevAttrMultiProcessorCount);
    ask(&chip->shared, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    ask(&clusters, cudaDevAttrClusterLaunch);
    if (error != cudaSuccess) {
        cudaGetLastError();
        return error;
    }
    chip->cluster = clusters == 0 ? 1 : device < kDevices ? known[device].load() : 0;
    if (chip->cluster > 0) return FASTDDPM_OK;
    const int32_t failed = ask_largest_cluster(chip->shared, &chip->cluster);
    if (failed == FASTDDPM_OK && device < kDevices) known[device] = chip->cluster;
    return failed;
}

}  // namespace fastddpm

FASTDDPM_API const char *fastddpm_cuda_error_text(int32_t code) {
    switch (code) {
        case FASTDDPM_UNSUPPORTED: return "a dtype or size that this operation does not take";
        case FASTDDPM_NO_MEMORY: return "the workspace is too small";
        default: return cudaGetErrorString(static_cast<cudaError_t>(code));
    }
}
#endif
