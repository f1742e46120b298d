// The library's exported functions: they choose the instruction set, and do no arithmetic.
#define FASTDDPM_ISA baseline
#include "kernels.h"
#undef FASTDDPM_ISA
#ifdef FASTDDPM_X86
#define FASTDDPM_ISA avx2
#include "kernels.h"
#undef FASTDDPM_ISA
#define FASTDDPM_ISA avx512
#include "kernels.h"
#undef FASTDDPM_ISA
#define FASTDDPM_ISA avx512bf16
#include "kernels.h"
#undef FASTDDPM_ISA
#endif

namespace {

enum Isa { kBaseline = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

Isa best_isa() {
#ifdef FASTDDPM_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return __builtin_cpu_supports("avx512bf16") ? kAvx512Bf16 : kAvx512;
    if (avx2) return kAvx2;
#endif
    return kBaseline;
}

const Isa best = best_isa();
Isa chosen = best;

int32_t usable(int32_t threads) { return threads < 1 ? 1 : threads; }

}  // namespace

// An operation with products of factors has a build for AVX512-BF16; the others would gain nothing.
#ifdef FASTDDPM_X86
#define FASTDDPM_RUN(name, ...)                                      \
    switch (chosen) {                                                \
        case kAvx512Bf16:                                            \
        case kAvx512: return fastddpm::avx512::name(__VA_ARGS__);    \
        case kAvx2: return fastddpm::avx2::name(__VA_ARGS__);        \
        default: return fastddpm::baseline::name(__VA_ARGS__);       \
    }
#define FASTDDPM_RUN_PRODUCTS(name, ...)                                           \
    if (chosen == kAvx512Bf16) return fastddpm::avx512bf16::name(__VA_ARGS__);     \
    FASTDDPM_RUN(name, __VA_ARGS__)
#else
#define FASTDDPM_RUN(name, ...) return fastddpm::baseline::name(__VA_ARGS__);
#define FASTDDPM_RUN_PRODUCTS(name, ...) FASTDDPM_RUN(name, __VA_ARGS__)
#endif

FASTDDPM_API int32_t fastddpm_cpu_isa(int32_t wanted) {
    if (wanted >= 0) chosen = wanted < best ? static_cast<Isa>(wanted) : best;
    return chosen;
}

FASTDDPM_API const char *fastddpm_error_text(int32_t code) {
    switch (code) {
        case FASTDDPM_OK: return "no error";
        case FASTDDPM_UNSUPPORTED: return "a dtype or size that this operation does not take";
        case FASTDDPM_NO_MEMORY: return "no memory for the operation's working space";
        default: return "unknown error";
    }
}

FASTDDPM_API int32_t fastddpm_cpu_random_normal(const fastddpm_random_normal_args *args, int32_t threads) {
    FASTDDPM_RUN(random_normal, *args, usable(threads))
}
FASTDDPM_API int32_t fastddpm_cpu_philox(const fastddpm_random_normal_args *args, uint32_t *words, int32_t threads) {
    FASTDDPM_RUN(philox_words, *args, words, usable(threads))
}
FASTDDPM_API int32_t fastddpm_cpu_group_norm_silu(const fastddpm_group_norm_silu_args *args, int32_t threads) {
    FASTDDPM_RUN(group_norm_silu, *args, usable(threads))
}
FASTDDPM_API int32_t fastddpm_cpu_group_norm_silu_backward(const fastddpm_group_norm_silu_args *args,
                                                           int32_t threads) {
    FASTDDPM_RUN(group_norm_silu_backward, *args, usable(threads))
}
FASTDDPM_API int32_t fastddpm_cpu_attention(const fastddpm_attention_args *args, int32_t threads) {
    FASTDDPM_RUN_PRODUCTS(attention, *args, usable(threads))
}
FASTDDPM_API int32_t fastddpm_cpu_attention_backward(const fastddpm_attention_args *args, int32_t threads) {
    FASTDDPM_RUN_PRODUCTS(attention_backward, *args, usable(threads))
}
FASTDDPM_API int32_t fastddpm_cpu_q_sample(const fastddpm_q_sample_args *args, int32_t threads) {
    FASTDDPM_RUN(q_sample, *args, usable(threads))
}
FASTDDPM_API int32_t fastddpm_cpu_reverse_step(const fastddpm_reverse_step_args *args, int32_t threads) {
    FASTDDPM_RUN(reverse_step, *args, usable(threads))
}
FASTDDPM_API int32_t fastddpm_cpu_conv(const fastddpm_conv_args *args, int32_t threads) {
    FASTDDPM_RUN_PRODUCTS(conv, *args, usable(threads))
}
FASTDDPM_API int64_t fastddpm_cpu_conv_workspace(const fastddpm_conv_args *args, int32_t threads) {
    FASTDDPM_RUN_PRODUCTS(conv_workspace, *args, usable(threads))
}
FASTDDPM_API int32_t fastddpm_cpu_conv_weight_gradient(const fastddpm_conv_args *args, int32_t threads) {
    FASTDDPM_RUN_PRODUCTS(conv_weight_gradient, *args, usable(threads))
}
FASTDDPM_API int64_t fastddpm_cpu_conv_weight_gradient_workspace(const fastddpm_conv_args *args, int32_t threads) {
    FASTDDPM_RUN_PRODUCTS(conv_weight_gradient_workspace, *args, usable(threads))
}
FASTDDPM_API int32_t fastddpm_cpu_conv_pack(const fastddpm_conv_args *args, void *packed) {
    FASTDDPM_RUN_PRODUCTS(conv_pack, *args, packed)
}
FASTDDPM_API int64_t fastddpm_cpu_conv_packed_bytes(const fastddpm_conv_args *args) {
    FASTDDPM_RUN_PRODUCTS(conv_packed_bytes, *args)
}
FASTDDPM_API int32_t fastddpm_cpu_norm_affine(const fastddpm_norm_affine_args *args, int32_t threads) {
    FASTDDPM_RUN(norm_affine, *args, usable(threads))
}
FASTDDPM_API int64_t fastddpm_cpu_norm_affine_workspace(const fastddpm_norm_affine_args *args) {
    FASTDDPM_RUN(norm_affine_workspace, *args)
}
FASTDDPM_API int32_t fastddpm_cpu_resample(const fastddpm_resample_args *args, int32_t threads) {
    FASTDDPM_RUN(resample, *args, usable(threads))
}
FASTDDPM_API int32_t fastddpm_cpu_digest(const fastddpm_digest_args *args, int32_t threads) {
    FASTDDPM_RUN(digest, *args, usable(threads))
}
FASTDDPM_API int32_t fastddpm_cpu_crc32c(const fastddpm_crc32c_args *args) {
    FASTDDPM_RUN(crc32c, *args)
}
