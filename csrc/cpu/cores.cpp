// Times how long a cache line takes from one thread's core to another's and back.
#include "cores.h"

#include "../fastddpm.h"
#include "clock.h"
#include "team.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

// Measured: 70 to 140 ns between cores that share a cache, 350 to 450 between others (AMD EPYC, Zen 5).
constexpr int64_t kFar = 220;             // ns
constexpr int64_t kWindow = 500000000;    // ns between two measurements, which take some 50 us for two threads
constexpr int kTrials = 6, kTrips = 16;   // the shortest trial counts: others were disturbed
constexpr int32_t kMostThreads = 64;      // that are asked
constexpr int64_t kEnd = -2;

bool far = false, measuring = false;
int64_t next = 0;
int32_t fixed = -1;  // or 0, near, or 1, far

struct alignas(64) Line {
    int64_t turn;  // odd: the other thread's
};

// Nanoseconds of a round trip, on the thread that begins.
int64_t round_trip(Line &line) {
    int64_t shortest = INT64_MAX, turn = 0;
    for (int trial = 0; trial < kTrials; ++trial) {
        const int64_t start = fastddpm::clock_ns();
        for (int trip = 0; trip < kTrips; ++trip, turn += 2) {
            __atomic_store_n(&line.turn, turn + 1, __ATOMIC_RELEASE);
            while (__atomic_load_n(&line.turn, __ATOMIC_ACQUIRE) != turn + 2) {}
        }
        const int64_t took = (fastddpm::clock_ns() - start) / kTrips;
        if (took < shortest) shortest = took;
    }
    __atomic_store_n(&line.turn, kEnd, __ATOMIC_RELEASE);
    return shortest;
}

void answer(Line &line) {
    for (int64_t turn = 0; turn != kEnd;) {
        turn = __atomic_load_n(&line.turn, __ATOMIC_ACQUIRE);
        if (turn % 2 == 1) __atomic_store_n(&line.turn, turn + 1, __ATOMIC_RELEASE);
    }
}

// Whether any of the first thread's partners is far from it.
bool measure(int32_t threads) {
    bool found = false;
#ifdef _OPENMP
    Line lines[kMostThreads] = {};
#pragma omp parallel num_threads(threads)
    {
        const int32_t team = omp_get_num_threads(), me = omp_get_thread_num();
        if (me > 0) {
            answer(lines[me]);
        } else {
            for (int32_t other = 1; other < team; ++other)
                if (round_trip(lines[other]) > kFar) found = true;
        }
    }
#endif
    return found;
}

}  // namespace

bool fastddpm::cores_are_far(int32_t threads) {
    const int32_t known = __atomic_load_n(&fixed, __ATOMIC_RELAXED);
    if (known >= 0) return known == 1;
    const int64_t now = clock_ns();
    if (threads > 1 && now >= __atomic_load_n(&next, __ATOMIC_RELAXED) && !__atomic_test_and_set(&measuring, __ATOMIC_ACQUIRE)) {
        const int32_t team = team_size(threads < kMostThreads ? threads : kMostThreads);
        // Threads that share a core answer after milliseconds, and it is not their caches that keep them.
        if (team > 1 && !beyond_cores(threads)) __atomic_store_n(&far, measure(team), __ATOMIC_RELAXED);
        __atomic_store_n(&next, now + kWindow, __ATOMIC_RELAXED);
        __atomic_clear(&measuring, __ATOMIC_RELEASE);
    }
    return threads > 1 && __atomic_load_n(&far, __ATOMIC_RELAXED);
}

FASTDDPM_API int32_t fastddpm_cpu_cores_are_far(int32_t wanted) {
    if (wanted >= 0) __atomic_store_n(&fixed, wanted == 2 ? -1 : wanted, __ATOMIC_RELAXED);
    const int32_t known = __atomic_load_n(&fixed, __ATOMIC_RELAXED);
    return known >= 0 ? known : __atomic_load_n(&far, __ATOMIC_RELAXED);
}
