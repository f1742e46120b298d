// A parallel loop whose threads keep to their own part of the batch.
//
// What one core wrote another reads at a third of the speed at which it reads its own, or less, where they share no
// cache. If every operation divides the images among the threads in order, a core reads what it wrote itself: by Shares
// where tasks take long, as in convolutions, and by OpenMP's static schedule where they are short, as in norms.
#pragma once
#include "memory.h"

namespace fastddpm {
namespace FASTDDPM_ISA {

// The tasks of a loop, divided among the threads in order. A thread that is done with its own takes those of the others:
// none waits long for one that was disturbed. Made before the parallel region, for one loop.
class Shares {
public:
    Shares(int64_t tasks, int32_t threads) : count_(smaller(larger(threads, 1), kMost)) {
        for (int64_t i = 0; i < count_; ++i) shares_[i] = {tasks * i / count_, tasks * (i + 1) / count_};
    }

    // Calls run(task) until no task is left. Each thread of the team calls it, and waits for the others after it.
    template <typename Run>
    void run(Run run) {
        for (int64_t i = 0; i < count_; ++i) {
            Share &share = shares_[(thread_number() + i) % count_];
            for (int64_t task; (task = __atomic_fetch_add(&share.next, 1, __ATOMIC_RELAXED)) < share.end;) run(task);
        }
    }

private:
    static constexpr int64_t kMost = 64;
    struct alignas(64) Share {  // a cache line
        int64_t next, end;
    };
    Share shares_[kMost];
    int64_t count_;
};

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
