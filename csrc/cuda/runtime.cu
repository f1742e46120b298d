// The chip, and error codes in words.
#ifndef FASTDDPM_EMULATE
#include "common.cuh"

namespace fastddpm {

int32_t query_chip(Chip *chip) {
    int device = 0, clusters = 0;
    cudaError_t error = cudaGetDevice(&device);
    const auto ask = [&](int *answer, cudaDeviceAttr attribute) {
        if (error == cudaSuccess) error = cudaDeviceGetAttribute(answer, attribute, device);
    };
    ask(&chip->multiprocessors, cudaDevAttrMultiProcessorCount);
    ask(&chip->shared, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    ask(&clusters, cudaDevAttrClusterLaunch);
    chip->clusters = clusters != 0;
    if (error != cudaSuccess) cudaGetLastError();
    return error;
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
