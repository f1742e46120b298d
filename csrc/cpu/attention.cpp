#include "kernels.h"
#include "vec.h"
namespace fastddpm {
namespace FASTDDPM_ISA {
int32_t attention(const fastddpm_attention_args &, int32_t) { return FASTDDPM_UNSUPPORTED; }
int32_t attention_backward(const fastddpm_attention_args &, int32_t) { return FASTDDPM_UNSUPPORTED; }
}
}
