// Keeps the working memory of the last call: the next finds it in the caches. New memory from malloc is often in none,
// or in those of another core.
#include "scratch.h"

#include <stdlib.h>

namespace {

constexpr int64_t kLine = 64;
#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__ 1  // as GCC says it
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
constexpr int64_t kMostKept = 0;  // the sanitizer sees the bounds of new memory only
#else
constexpr int64_t kMostKept = int64_t{64} << 20;  // bytes
#endif

// The line before the memory.
struct Block {
    int64_t bytes;
};

Block *kept = nullptr;  // or none, while a call uses it

Block *swap_kept(Block *block) { return __atomic_exchange_n(&kept, block, __ATOMIC_ACQ_REL); }

Block *block_of(void *memory) { return reinterpret_cast<Block *>(static_cast<char *>(memory) - kLine); }

}  // namespace

void *fastddpm::take_scratch(int64_t bytes) {
    Block *block = swap_kept(nullptr);
    if (block == nullptr || block->bytes < bytes) {
        free(block);
        const int64_t whole = (bytes + kLine - 1) / kLine * kLine;
        block = static_cast<Block *>(aligned_alloc(kLine, static_cast<size_t>(kLine + whole)));
        if (block == nullptr) return nullptr;
        block->bytes = whole;
    }
    return reinterpret_cast<char *>(block) + kLine;
}

void fastddpm::give_scratch(void *memory) {
    if (memory == nullptr) return;
    Block *block = block_of(memory);
    if (block->bytes <= kMostKept) {
        Block *other = swap_kept(block);  // of another thread's call
        block = other != nullptr && other->bytes > block->bytes ? swap_kept(other) : other;
    }
    free(block);
}
