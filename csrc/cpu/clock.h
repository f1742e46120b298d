// A clock, for sources that are compiled once.
#pragma once
#include <stdint.h>
#include <time.h>

namespace fastddpm {

inline int64_t clock_ns() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000 + time.tv_nsec;
}

}  // namespace fastddpm
