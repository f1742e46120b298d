// A digest of memory, to tell whether any byte of it has changed: not cryptographic, as fast as memory is read.
//
// Memory is taken in blocks of a fixed size, each by sixteen-fold lanes of 32 bits, and the blocks' digests are summed
// with their number mixed in. So neither the instruction set nor the number of threads changes the result.
#include <string.h>

#include "kernels.h"

namespace fastddpm {
namespace FASTDDPM_ISA {
namespace {

constexpr int64_t kBlock = 1 << 16;  // bytes
constexpr int kLanes = 64;           // of 32 bits: four registers of AVX-512, whose multiplications overlap
constexpr int64_t kRow = kLanes * static_cast<int64_t>(sizeof(uint32_t));

uint64_t mix(uint64_t x) {  // the finaliser of MurmurHash3: every bit of x reaches every bit
    x = (x ^ (x >> 33)) * 0xff51afd7ed558ccdULL;
    x = (x ^ (x >> 33)) * 0xc4ceb9fe1a85ec53ULL;
    return x ^ (x >> 33);
}

void add_row(uint32_t *lanes, const uint8_t *data) {
    uint32_t row[kLanes];
    memcpy(row, data, sizeof row);
    for (int i = 0; i < kLanes; ++i) {
        const uint32_t mixed = (lanes[i] ^ row[i]) * 0x9e3779b1u;
        lanes[i] = mixed ^ (mixed >> 15);
    }
}

uint64_t block_digest(const uint8_t *data, int64_t bytes, uint64_t number) {
    uint32_t lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes[i] = 0x85ebca6bu * static_cast<uint32_t>(i + 1);
    int64_t at = 0;
    for (; at + kRow <= bytes; at += kRow) add_row(lanes, data + at);
    if (at < bytes) {
        uint8_t rest[kRow] = {};
        memcpy(rest, data + at, static_cast<size_t>(bytes - at));
        add_row(lanes, rest);
    }
    uint64_t sum = mix(number ^ static_cast<uint64_t>(bytes) << 40);
    for (int i = 0; i < kLanes; i += 2) sum = mix(sum + (static_cast<uint64_t>(lanes[i]) << 32 | lanes[i + 1]));
    return sum;
}

}  // namespace

int32_t digest(const fastddpm_digest_args &args, int32_t threads) {
    uint64_t total = 0;
    const int32_t team = team_size(threads);
    int64_t before = 0;  // blocks of the parts already taken
    for (int64_t part = 0; part < args.num; ++part) {
        const uint8_t *data = static_cast<const uint8_t *>(args.parts[part]);
        const int64_t bytes = args.bytes[part], blocks = (bytes + kBlock - 1) / kBlock;
        uint64_t sum = 0;
#pragma omp parallel for num_threads(team) reduction(+ : sum) schedule(static) if (blocks > 8 && team > 1)
        for (int64_t i = 0; i < blocks; ++i) {
            const int64_t first = i * kBlock, left = bytes - first;
            sum += block_digest(data + first, left < kBlock ? left : kBlock, static_cast<uint64_t>(before + i));
        }
        total = mix(total + sum + static_cast<uint64_t>(bytes));
        before += blocks;
    }
    *args.out = total;
    return FASTDDPM_OK;
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
