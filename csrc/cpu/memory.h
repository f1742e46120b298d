// Working memory, and the number of the calling thread in a parallel region.
#pragma once
#include "scratch.h"
#include "vec.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace fastddpm {
namespace FASTDDPM_ISA {

inline int64_t thread_number() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// Working memory of one call, cut into pieces of whole cache lines.
class Memory {
public:
    explicit Memory(int64_t bytes) : first_(static_cast<char *>(take_scratch(bytes))), next_(first_) {}
    ~Memory() { give_scratch(first_); }
    Memory(const Memory &) = delete;
    Memory &operator=(const Memory &) = delete;

    bool failed() const { return first_ == nullptr; }
    static constexpr int64_t lines(int64_t bytes) { return divide_up(bytes, 64) * 64; }
    template <typename T>
    T *take(int64_t count) {
        char *piece = next_;
        next_ += lines(count * static_cast<int64_t>(sizeof(T)));
        return reinterpret_cast<T *>(piece);
    }

private:
    char *first_, *next_;
};

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
