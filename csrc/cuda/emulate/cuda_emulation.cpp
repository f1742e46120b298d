// The scheduler of cuda_emulation.h.
#include "cuda_emulation.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "../common.cuh"

namespace fastddpm {
namespace emulation {

Index thread_index, block_index, block_size;

namespace {

constexpr size_t kStack = 64 * 1024, kGuard = 64;
constexpr int kWarp = 32, kSharedOfEveryChip = 48 * 1024;
// cudaErrorInvalidConfiguration, IllegalAddress, MisalignedAddress, LaunchFailure
constexpr int32_t kInvalidConfiguration = 9, kIllegalAddress = 700, kMisalignedAddress = 716, kLaunchFailure = 719;
constexpr unsigned char kPoison = 0xFF, kGuardByte = 0xA5;      // as floats: NaN

struct Barrier {
    int expected = 0, arrived = 0;
    uint64_t generation = 0;
};

struct Warp {
    Barrier barrier;
    float values[kWarp];
};

struct Block {
    unsigned index;
    std::unique_ptr<unsigned char[]> memory;
    unsigned char *shared;
    size_t size;  // of shared
    int running;  // threads that have not ended
    Barrier barrier;
    std::vector<Warp> warps;
};

struct Fiber {
    Block *block;
    unsigned thread;
    bool started = false, done = false;
    const Barrier *waiting = nullptr;
    uint64_t generation = 0;
    ucontext_t start;
    jmp_buf at;
};

Chip chip{132, 227 * 1024, 8};
unsigned fiber_order = 0;
bool misaligned = false;
int32_t launches = 0, largest_cluster = 0;

Barrier cluster;
std::vector<Block> blocks;
const std::function<void()> *thread_body;
Fiber *current;
jmp_buf scheduler;

// ucontext starts a fiber; after that jumps switch, which unlike swapcontext make no system call.
void stop_running() {
    if (_setjmp(current->at) == 0) _longjmp(scheduler, 1);
}

void wait(Barrier &barrier) {
    if (++barrier.arrived == barrier.expected) {
        barrier.arrived = 0;
        ++barrier.generation;
        return;
    }
    current->waiting = &barrier;
    current->generation = barrier.generation;
    stop_running();
    current->waiting = nullptr;
}

Warp &warp_of(const Fiber &fiber) { return fiber.block->warps[fiber.thread / kWarp]; }

void fiber_main() {
    (*thread_body)();
    current->done = true;
    Block &block = *current->block;
    if (--block.running == 0) memset(block.shared, kPoison, block.size);
    _longjmp(scheduler, 1);
}

void resume(Fiber &fiber) {
    current = &fiber;
    thread_index.x = fiber.thread;
    block_index.x = fiber.block->index;
    if (_setjmp(scheduler) != 0) return;
    if (fiber.started) _longjmp(fiber.at, 1);
    fiber.started = true;
    setcontext(&fiber.start);
}

class Stacks {
  public:
    explicit Stacks(size_t count) : size_(count * kStack) {
        base_ = static_cast<char *>(
            mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    }
    ~Stacks() { munmap(base_, size_); }
    char *of(size_t fiber) const { return base_ + fiber * kStack; }

  private:
    size_t size_;
    char *base_;
};

struct Range {
    Fiber **first, **last;
};

// Runs each of the fibers that can run to its next barrier; whether there was one.
bool run_fibers(Range range) {
    bool progress = false;
    for (Fiber **at = range.first; at != range.last; ++at) {
        Fiber &fiber = **at;
        if (fiber.done || (fiber.waiting && fiber.waiting->generation == fiber.generation)) continue;
        resume(fiber);
        progress = true;
    }
    return progress;
}

// Runs each of the groups of adjacent fibers; a `greedy` one again and again, while that brings it on.
template <typename Same, typename Run>
bool run_groups(Range range, Same same, bool greedy, Run run) {
    bool progress = false;
    for (Fiber **first = range.first; first != range.last;) {
        Fiber **last = std::find_if(first, range.last, [&](const Fiber *fiber) { return !same(*first, fiber); });
        bool advanced = run(Range{first, last});
        progress |= advanced;
        while (greedy && advanced) advanced = run(Range{first, last});
        first = last;
    }
    return progress;
}

int32_t run_cluster(std::vector<Fiber> &fibers, const Stacks &stacks) {
    std::vector<Fiber *> order;
    for (size_t i = 0; i < fibers.size(); ++i) {
        Fiber &fiber = fibers[i];
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = stacks.of(i);
        fiber.start.uc_stack.ss_size = kStack;
        fiber.start.uc_link = nullptr;
        makecontext(&fiber.start, fiber_main, 0);
        order.push_back(&fiber);
    }
    // Shuffled as a whole and then sorted by block and by warp, each in an order of its own.
    if (fiber_order == 1) std::reverse(order.begin(), order.end());
    if (fiber_order > 1) {
        std::mt19937 random(fiber_order);
        std::shuffle(order.begin(), order.end(), random);
        const uint32_t turn = random();
        const auto place = [&](const Fiber *fiber) {
            return std::pair{(fiber->block->index ^ turn) * 0x9E3779B9u, (fiber->thread / kWarp ^ turn) * 0x85EBCA6Bu};
        };
        std::stable_sort(order.begin(), order.end(), [&](auto *a, auto *b) { return place(a) < place(b); });
    }
    const auto same_block = [](const Fiber *a, const Fiber *b) { return a->block == b->block; };
    const auto same_warp = [&](const Fiber *a, const Fiber *b) {
        return same_block(a, b) && a->thread / kWarp == b->thread / kWarp;
    };
    const auto all = [](const auto &, const auto &) { return true; };
    // In turns: every fiber to its next barrier. Otherwise a warp, and a block, runs as far as it can without the rest.
    const bool in_turns = fiber_order == 0;
    const auto run_warp = [&](Range range) { return run_fibers(range); };
    const auto run_block = [&](Range range) { return run_groups(range, same_warp, !in_turns, run_warp); };
    const auto run_all = [&](Range range) { return run_groups(range, same_block, !in_turns, run_block); };
    const Range everything{order.data(), order.data() + order.size()};
    run_groups(everything, all, true, run_all);
    return std::all_of(order.begin(), order.end(), [](const Fiber *fiber) { return fiber->done; }) ? 0 : kLaunchFailure;
}

}  // namespace

unsigned char *shared_memory() { return current->block->shared; }
void block_barrier() { wait(current->block->barrier); }
void cluster_barrier() { wait(cluster); }

float exchange_xor(float value, int mask) {
    Warp &warp = warp_of(*current);
    const unsigned lane = current->thread % kWarp;
    warp.values[lane] = value;
    wait(warp.barrier);
    const float other = warp.values[lane ^ static_cast<unsigned>(mask)];
    wait(warp.barrier);
    return other;
}

const float *mapped(const float *pointer, int rank) {
    const auto offset = reinterpret_cast<const unsigned char *>(pointer) - current->block->shared;
    return reinterpret_cast<const float *>(blocks[static_cast<size_t>(rank)].shared + offset);
}

void check_alignment(const void *address, size_t bytes) {
    misaligned |= reinterpret_cast<uintptr_t>(address) % bytes != 0;
}

int32_t run(int64_t grid, int threads, size_t shared, int cluster_size, const std::function<void()> &thread) {
    if (grid % cluster_size != 0 || grid > INT32_MAX || threads % kWarp != 0 || threads > 1024 ||
        cluster_size > chip.cluster || shared > static_cast<size_t>(std::max(chip.shared, kSharedOfEveryChip)))
        return kInvalidConfiguration;
    misaligned = false;
    ++launches;
    largest_cluster = std::max(largest_cluster, cluster_size);
    thread_body = &thread;
    block_size.x = static_cast<unsigned>(threads);
    const Stacks stacks(static_cast<size_t>(threads) * cluster_size);
    for (int64_t first = 0; first < grid; first += cluster_size) {
        blocks.clear();
        cluster = Barrier{threads * cluster_size};
        for (int rank = 0; rank < cluster_size; ++rank) {
            Block block{static_cast<unsigned>(first + rank), nullptr, nullptr, shared, threads, Barrier{threads}, {}};
            block.memory = std::make_unique<unsigned char[]>(shared + kGuard + 16);
            const auto address = reinterpret_cast<uintptr_t>(block.memory.get());
            block.shared = block.memory.get() + (16 - address % 16) % 16;
            memset(block.shared, kPoison, shared);
            memset(block.shared + shared, kGuardByte, kGuard);
            block.warps.resize(static_cast<size_t>(threads / kWarp), Warp{Barrier{kWarp}, {}});
            blocks.push_back(std::move(block));
        }
        std::vector<Fiber> fibers(static_cast<size_t>(threads) * cluster_size);
        for (size_t i = 0; i < fibers.size(); ++i) {
            fibers[i].block = &blocks[i / threads];
            fibers[i].thread = static_cast<unsigned>(i % threads);
        }
        if (const int32_t code = run_cluster(fibers, stacks)) return code;
        for (const Block &block : blocks)
            for (size_t i = 0; i < kGuard; ++i)
                if (block.shared[shared + i] != kGuardByte) return kIllegalAddress;
        if (misaligned) return kMisalignedAddress;
    }
    return 0;
}

}  // namespace emulation

int32_t query_chip(Chip *out) {
    *out = emulation::chip;
    return FASTDDPM_OK;
}

}  // namespace fastddpm

// For tests: the chip that the host code sees, and the order in which threads run (0 ascending and in turns; 1
// descending, else a seed: a block, and in it a warp, as far as it can). Both change what comes after.
FASTDDPM_API void fastddpm_emulation_chip(int32_t multiprocessors, int32_t shared, int32_t cluster) {
    fastddpm::emulation::chip = {multiprocessors, shared, cluster};
}
FASTDDPM_API void fastddpm_emulation_order(uint32_t order) { fastddpm::emulation::fiber_order = order; }

// Kernels launched, and the largest cluster among them, since this was last asked.
FASTDDPM_API void fastddpm_emulation_launches(int32_t *launches, int32_t *largest_cluster) {
    *launches = std::exchange(fastddpm::emulation::launches, 0);
    *largest_cluster = std::exchange(fastddpm::emulation::largest_cluster, 0);
}

FASTDDPM_API const char *fastddpm_cuda_error_text(int32_t code) {
    switch (code) {
        case 9: return "a launch that no chip takes";
        case 700: return "a write past the end of shared memory";
        case 716: return "an access at an address that its size does not divide";
        case 719: return "a barrier that not all threads reached";
        case FASTDDPM_UNSUPPORTED: return "a dtype or size that this operation does not take";
        case FASTDDPM_NO_MEMORY: return "no memory for the operation's working space";
        default: return "unknown error";
    }
}
