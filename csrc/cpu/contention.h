// Decides how many threads are worth having, from how long the threads of the process wait for a core.
//
// A region ends when its last thread does. A thread that is ready to run and has no core keeps the others waiting, and
// OpenMP waits spinning, so that they use up their own turns: a region then takes milliseconds, whatever its work. A
// thread that shares its core with a program as busy as itself waits half of the time. Twice the average number of
// waiting threads is therefore how many cores are taken, and as many threads fewer still have cores of their own.
#pragma once
#include <stdint.h>

namespace fastddpm {

class Contention {
public:
    static constexpr int32_t kAll = 0;                 // no limit
    static constexpr int64_t kWindow = 20000000;       // ns between two looks while nothing is taken
    static constexpr int64_t kLongest = 64 * kWindow;  // between two trials with all threads while cores are taken
    static constexpr int64_t kShare = 4;               // below 1 / kShare waiting threads, all are worth having

    // The most threads to use until next_look().
    int32_t most() const { return most_; }
    int64_t next_look() const { return next_; }

    // `now`: of a clock; `waited`: how long all threads of the process have waited for a core so far, both in ns.
    // `threads`: how many there would be without a limit.
    void look(int64_t now, int64_t waited, int32_t threads) {
        // What a thread that has ended waited is no longer counted.
        const int64_t window = now - last_, lost = waited > waited_ ? waited - waited_ : 0;
        last_ = now;
        waited_ = waited;
        next_ = now + kWindow;
        if (kShare * lost < window) {
            if (most_ == kAll) hold_ = kWindow / 2;
            most_ = kAll;
            doubted_ = false;
        } else if (hold_ < kWindow && !doubted_) {
            doubted_ = true;  // the first time may be a moment's disturbance
        } else {
            const int64_t taken = (2 * lost + window - 1) / window, team = limited(threads);
            most_ = static_cast<int32_t>(team > taken ? team - taken : 1);
            // A trial with all threads costs what was to be avoided. The longer it goes on, the rarer they are.
            hold_ = hold_ < kLongest / 2 ? 2 * hold_ : kLongest;
            next_ = now + hold_;
        }
    }

    int32_t limited(int32_t threads) const { return most_ == kAll || threads < most_ ? threads : most_; }

private:
    int32_t most_ = kAll;
    bool doubted_ = false;
    int64_t last_ = 0, waited_ = 0, next_ = 0, hold_ = kWindow / 2;
};

}  // namespace fastddpm
