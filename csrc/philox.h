// Philox4x32-10 (Salmon et al. 2011): kernels/philox/reference.py is the specification.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define FASTDDPM_PHILOX __host__ __device__ __forceinline__
#else
#define FASTDDPM_PHILOX inline __attribute__((always_inline))
#endif

namespace fastddpm {

struct philox_block {
    uint32_t w[4];
};

FASTDDPM_PHILOX philox_block philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t seed) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = uint64_t{0xD2511F53} * c0, p1 = uint64_t{0xCD9E8D57} * c2;
        const uint32_t x0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
        const uint32_t x2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
        c1 = static_cast<uint32_t>(p1);
        c3 = static_cast<uint32_t>(p0);
        c0 = x0;
        c2 = x2;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

}  // namespace fastddpm
