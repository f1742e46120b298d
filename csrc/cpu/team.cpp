// Asks the system how long the threads of this process wait for cores, now and then, and sizes teams by the answer.
#include "team.h"

#include <dirent.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <unistd.h>

#include "../fastddpm.h"
#include "clock.h"
#include "contention.h"

namespace {

// A child of fork() has none of its parent's OpenMP threads and would wait for them forever.
bool forked = false;
const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// Whether the user has OpenMP's threads sleep while they wait. They then leave the core to those that they wait for,
// and all are worth having: two threads get twice the share of one.
bool asked_to_sleep() {
    const char *policy = getenv("OMP_WAIT_POLICY");
    return policy != nullptr && strcasecmp(policy, "passive") == 0;
}
const bool sleeping = asked_to_sleep();

fastddpm::Contention contention;  // of the process: its threads wait for the same cores
bool looking = false;             // whether a thread is in `look`, which one does at a time
int64_t next_look = 0;
int32_t most = fastddpm::Contention::kAll;
int32_t fixed = 0;

// Nanoseconds for which a thread has been ready to run and had no core; 0 where the system does not count them.
int64_t waited_by(int folder, const char *thread) {
    char path[64], text[96];
    if (strlen(thread) + sizeof "/schedstat" > sizeof path) return 0;
    strcat(strcpy(path, thread), "/schedstat");
    const int file = openat(folder, path, O_RDONLY | O_CLOEXEC);
    if (file < 0) return 0;
    const ssize_t length = read(file, text, sizeof text - 1);
    close(file);
    if (length <= 0) return 0;
    text[length] = 0;
    const char *second = strchr(text, ' ');  // after the time that it ran
    return second == nullptr ? 0 : strtoll(second, nullptr, 10);
}

struct Waits {
    int64_t ns, threads;
};

// Of all threads of the process together.
Waits waits() {
    Waits sum{0, 0};
    DIR *folder = opendir("/proc/self/task");
    if (folder == nullptr) return sum;
    while (const dirent *entry = readdir(folder)) {
        if (entry->d_name[0] == '.') continue;
        sum.ns += waited_by(dirfd(folder), entry->d_name);
        ++sum.threads;
    }
    closedir(folder);
    return sum;
}

void look(int64_t now, int32_t threads) {
    constexpr int64_t kPerThread = 2000000;  // reading takes a few us a thread, and should not be felt
    const Waits sum = waits();
    contention.look(now, sum.ns, threads);
    const int64_t soonest = now + sum.threads * kPerThread;
    const int64_t next = contention.next_look() > soonest ? contention.next_look() : soonest;
    const int32_t limit = fastddpm::beyond_cores(threads) ? fastddpm::Contention::kAll : contention.most();
    __atomic_store_n(&most, limit, __ATOMIC_RELAXED);
    __atomic_store_n(&next_look, next, __ATOMIC_RELAXED);
}

}  // namespace

bool fastddpm::beyond_cores(int32_t threads) {
#ifdef __linux__
    cpu_set_t cores;
    return sched_getaffinity(0, sizeof cores, &cores) == 0 && threads > CPU_COUNT(&cores);
#else
    return false;
#endif
}

int32_t fastddpm::team_size(int32_t threads) {
    if (threads <= 1 || forked) return 1;
    int32_t limit = __atomic_load_n(&fixed, __ATOMIC_RELAXED);
    if (limit == 0 && !sleeping) {
        const int64_t now = clock_ns();
        if (now >= __atomic_load_n(&next_look, __ATOMIC_RELAXED) &&
            !__atomic_test_and_set(&looking, __ATOMIC_ACQUIRE)) {
            look(now, threads);
            __atomic_clear(&looking, __ATOMIC_RELEASE);
        }
        limit = __atomic_load_n(&most, __ATOMIC_RELAXED);
    }
    return limit == 0 || threads < limit ? threads : limit;
}

FASTDDPM_API int32_t fastddpm_cpu_most_threads(int32_t wanted) {
    if (wanted >= 0) __atomic_store_n(&fixed, wanted, __ATOMIC_RELAXED);
    const int32_t limit = __atomic_load_n(&fixed, __ATOMIC_RELAXED);
    return limit > 0 ? limit : __atomic_load_n(&most, __ATOMIC_RELAXED);
}
