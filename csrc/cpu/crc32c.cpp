// CRC32C (Castagnoli: reflected polynomial 0x82F63B78), the checksum of TensorFlow's checkpoints.
//
// By the processor's instruction where this build may use it, otherwise by eight tables of 256 entries, eight bytes at
// a time (slicing-by-8). Both give the same numbers.
#include <string.h>

#include "kernels.h"

#if defined(__SSE4_2__) && defined(__x86_64__)
#include <nmmintrin.h>
#elif defined(__ARM_FEATURE_CRC32)
#include <arm_acle.h>
#endif

namespace fastddpm {
namespace FASTDDPM_ISA {
namespace {

#if defined(__SSE4_2__) && defined(__x86_64__)
struct Step {
    uint32_t word(uint32_t crc, uint64_t data) const { return static_cast<uint32_t>(_mm_crc32_u64(crc, data)); }
    uint32_t byte(uint32_t crc, uint8_t data) const { return _mm_crc32_u8(crc, data); }
};
#elif defined(__ARM_FEATURE_CRC32)
struct Step {
    uint32_t word(uint32_t crc, uint64_t data) const { return __crc32cd(crc, data); }
    uint32_t byte(uint32_t crc, uint8_t data) const { return __crc32cb(crc, data); }
};
#else
// table[k][b]: what byte b followed by k zero bytes adds.
struct Step {
    uint32_t table[8][256];

    Step() {
        for (uint32_t b = 0; b < 256; ++b) {
            uint32_t crc = b;
            for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc & 1 ? 0x82F63B78u : 0u);
            table[0][b] = crc;
        }
        for (int k = 1; k < 8; ++k)
            for (int b = 0; b < 256; ++b) table[k][b] = (table[k - 1][b] >> 8) ^ table[0][table[k - 1][b] & 255];
    }

    uint32_t word(uint32_t crc, uint64_t data) const {
        uint8_t bytes[8];  // in the order of memory, whatever the byte order of the machine
        memcpy(bytes, &data, sizeof bytes);
        uint32_t out = 0;
        for (int i = 0; i < 8; ++i) out ^= table[7 - i][i < 4 ? bytes[i] ^ (crc >> 8 * i & 255) : bytes[i]];
        return out;
    }
    uint32_t byte(uint32_t crc, uint8_t data) const { return (crc >> 8) ^ table[0][(crc ^ data) & 255]; }
};
#endif

}  // namespace

int32_t crc32c(const fastddpm_crc32c_args &args) {
    const uint8_t *data = static_cast<const uint8_t *>(args.data);
    const Step step{};
    uint32_t crc = ~0u;
    int64_t at = 0;
    for (; at + 8 <= args.bytes; at += 8) {
        uint64_t eight;
        memcpy(&eight, data + at, sizeof eight);
        crc = step.word(crc, eight);
    }
    for (; at < args.bytes; ++at) crc = step.byte(crc, data[at]);
    *args.out = ~crc;
    return FASTDDPM_OK;
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
