#include "kernels.h"
namespace fastddpm { namespace FASTDDPM_ISA {
int32_t conv(const fastddpm_conv_args &, int32_t) { return FASTDDPM_UNSUPPORTED; }
int64_t conv_workspace(const fastddpm_conv_args &, int32_t) { return 0; }
int32_t norm_affine(const fastddpm_norm_affine_args &, int32_t) { return FASTDDPM_UNSUPPORTED; }
int64_t norm_affine_workspace(const fastddpm_norm_affine_args &) { return 0; }
}}
