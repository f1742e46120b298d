// Working memory that one call leaves to the next.
#pragma once
#include <stdint.h>

namespace fastddpm {

// At least `bytes` of memory, at the start of a cache line, whose contents are undefined; or null. Any thread may ask.
void *take_scratch(int64_t bytes);
// Ends the use of what take_scratch returned.
void give_scratch(void *memory);

}  // namespace fastddpm
