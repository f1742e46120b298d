// The functions of one build of this folder's sources. Each source is compiled once per instruction set, FASTDDPM_ISA
// (baseline, avx2, avx512), into a namespace of that name; dispatch.cpp chooses one when the library is loaded. There
// is no include guard, because dispatch.cpp includes this file once per set.
//
// Nothing in this folder uses the C++ standard library: the linker keeps one copy of an inline function for all sets,
// and that could be the one compiled for AVX-512.
#include "../fastddpm.h"
#include "team.h"

namespace fastddpm {
namespace FASTDDPM_ISA {

int32_t random_normal(const fastddpm_random_normal_args &args, int32_t threads);
int32_t philox_words(const fastddpm_random_normal_args &args, uint32_t *words, int32_t threads);
int32_t group_norm_silu(const fastddpm_group_norm_silu_args &args, int32_t threads);
int32_t group_norm_silu_backward(const fastddpm_group_norm_silu_args &args, int32_t threads);
int32_t attention(const fastddpm_attention_args &args, int32_t threads);
int32_t attention_backward(const fastddpm_attention_args &args, int32_t threads);
int32_t q_sample(const fastddpm_q_sample_args &args, int32_t threads);
int32_t reverse_step(const fastddpm_reverse_step_args &args, int32_t threads);
int32_t conv(const fastddpm_conv_args &args, int32_t threads);
int64_t conv_workspace(const fastddpm_conv_args &args, int32_t threads);
int32_t conv_weight_gradient(const fastddpm_conv_args &args, int32_t threads);
int64_t conv_weight_gradient_workspace(const fastddpm_conv_args &args, int32_t threads);
int32_t conv_pack(const fastddpm_conv_args &args, void *packed);
int64_t conv_packed_bytes(const fastddpm_conv_args &args);
int32_t norm_affine(const fastddpm_norm_affine_args &args, int32_t threads);
int64_t norm_affine_workspace(const fastddpm_norm_affine_args &args);
int32_t resample(const fastddpm_resample_args &args, int32_t threads);
int32_t digest(const fastddpm_digest_args &args, int32_t threads);
int32_t crc32c(const fastddpm_crc32c_args &args);

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
