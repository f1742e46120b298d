#include "kernels.h"
#include "vec.h"
namespace fastddpm {
namespace FASTDDPM_ISA {
int32_t reverse_step(const fastddpm_reverse_step_args &, int32_t) { return FASTDDPM_UNSUPPORTED; }
}
}
