// Runs the algorithm of a convolution, or refuses arguments that it does not support.
#include "conv.h"

namespace fastddpm {
namespace FASTDDPM_ISA {

namespace {

bool supported(const fastddpm_conv_args &p) {
    const bool kernels = p.kernel == 1 || p.kernel == 3, strides = p.stride == 1 || p.stride == 2;
    if (!kernels || !strides || p.c1 < 1 || p.c2 < 0 || (p.c2 > 0) != (p.skip != nullptr)) return false;
    if ((p.gain == nullptr) != (p.offset == nullptr)) return false;
    if (p.precision != FASTDDPM_FLOAT32 && p.precision != FASTDDPM_BFLOAT16) return false;
    return p.algorithm == FASTDDPM_PATCHES ? patches_supported(p) : winograd_supported(p);
}

bool gradient_supported(const fastddpm_conv_args &p) {
    return supported(p) && (p.algorithm != FASTDDPM_PATCHES || patches_gradient_supported(p));
}

// Whether there is no output. Checked first, because plans divide by the numbers of pixels and tiles.
bool nothing(const fastddpm_conv_args &p) { return p.n < 1 || p.height < 1 || p.width < 1 || p.k < 1; }

// Calls run with a workspace of so many bytes: the caller's, or of a call without one, the library's.
template <typename Run>
int32_t with_workspace(fastddpm_conv_args p, int64_t bytes, Run run) {
    if (p.workspace != nullptr) return p.workspace_bytes < bytes ? FASTDDPM_NO_MEMORY : run(p);
    Memory memory(bytes);
    if (memory.failed()) return FASTDDPM_NO_MEMORY;
    p.workspace = memory.take<char>(bytes);
    return run(p);
}

}  // namespace

int64_t conv_workspace(const fastddpm_conv_args &p, int32_t threads) {
    if (!supported(p) || nothing(p)) return 0;
    return p.algorithm == FASTDDPM_PATCHES ? patches_workspace(p, threads) : winograd_workspace(p, threads);
}

int32_t conv(const fastddpm_conv_args &args, int32_t threads) {
    if (!supported(args)) return FASTDDPM_UNSUPPORTED;
    if (nothing(args)) return FASTDDPM_OK;
    return with_workspace(args, conv_workspace(args, threads), [&](const fastddpm_conv_args &p) {
        return p.algorithm == FASTDDPM_PATCHES ? conv_patches(p, threads) : conv_winograd(p, threads);
    });
}

int64_t conv_weight_gradient_workspace(const fastddpm_conv_args &p, int32_t threads) {
    if (!gradient_supported(p)) return 0;
    return p.algorithm == FASTDDPM_PATCHES ? patches_gradient_workspace(p, threads) : winograd_gradient_workspace(p, threads);
}

int32_t conv_weight_gradient(const fastddpm_conv_args &args, int32_t threads) {
    if (!gradient_supported(args)) return FASTDDPM_UNSUPPORTED;
    return with_workspace(args, conv_weight_gradient_workspace(args, threads), [&](const fastddpm_conv_args &p) {
        return p.algorithm == FASTDDPM_PATCHES ? patches_weight_gradient(p, threads) : winograd_weight_gradient(p, threads);
    });
}

int64_t conv_packed_bytes(const fastddpm_conv_args &p) {
    if (!supported(p)) return 0;
    return p.algorithm == FASTDDPM_PATCHES ? patches_packed_bytes(p) : winograd_packed_bytes(p);
}

int32_t conv_pack(const fastddpm_conv_args &p, void *packed) {
    if (!supported(p)) return FASTDDPM_UNSUPPORTED;
    p.algorithm == FASTDDPM_PATCHES ? pack_patches(p, packed) : pack_winograd(p, packed);
    return FASTDDPM_OK;
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
