// How many threads a parallel region gets.
#pragma once
#include <stdint.h>

namespace fastddpm {

// `threads`, or fewer while other programs take the cores; one in a child of fork(). A plan is made for `threads`, so
// that neither its memory nor its sums depend on the answer, which may be another one at the next call.
int32_t team_size(int32_t threads);

// Whether there are more threads than cores: they wait for each other, and their number was chosen so.
bool beyond_cores(int32_t threads);

}  // namespace fastddpm
