// Whether the cores that the threads run on share a cache.
#pragma once
#include <stdint.h>

namespace fastddpm {

// Whether what one of so many threads writes reaches another slowly. Measured now and then, as threads may be moved from
// core to core, and a virtual machine's cores from one place to another: the answer may be another one at the next call.
// Plans may follow it, the order of sums may not.
bool cores_are_far(int32_t threads);

}  // namespace fastddpm
