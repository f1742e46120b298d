#include "kernels.h"
#include "vec.h"
namespace fastddpm {
namespace FASTDDPM_ISA {
int32_t q_sample(const fastddpm_q_sample_args &, int32_t) { return FASTDDPM_UNSUPPORTED; }
}
}
