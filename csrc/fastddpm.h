// The native library's C interface: plain pointers and sizes, no torch and no Python.
#pragma once
#include <cstdint>

#define FASTDDPM_API extern "C" __attribute__((visibility("default")))

// Standard normals as the specification in kernels/philox defines them: out[n * num + i] is normal i of image n.
FASTDDPM_API void fastddpm_random_normal(float *out, int64_t num, const int64_t *images, int64_t num_images,
                                         int64_t seed, int64_t step, int64_t stream, int32_t threads);

// The four output words of blocks 0 .. num_blocks - 1 of each image: out[(n * num_blocks + block) * 4 + word].
FASTDDPM_API void fastddpm_philox(uint32_t *out, int64_t num_blocks, const int64_t *images, int64_t num_images,
                                  int64_t seed, int64_t step, int64_t stream, int32_t threads);
