// Shared by both algorithms of a convolution: sizes, reading an input pixel, finishing an output.
#pragma once
#include "gemm.h"
#include "kernels.h"
#include "memory.h"
#include "vec.h"

namespace fastddpm {
namespace FASTDDPM_ISA {

constexpr int64_t up_to_lines(int64_t floats) { return divide_up(floats, kLine) * kLine; }
constexpr int64_t whole_lines(int64_t bytes) { return divide_up(bytes, 64) * 64; }

struct ConvSize {
    int64_t channels;            // C1 + C2
    int64_t height, width;       // of the input after doubling
    int64_t out_height, out_width;

    explicit ConvSize(const fastddpm_conv_args &p)
        : channels(p.c1 + p.c2),
          height(p.doubled ? 2 * p.height : p.height),
          width(p.doubled ? 2 * p.width : p.width),
          out_height(divide_up(height, p.stride)),
          out_width(divide_up(width, p.stride)) {}
};

// Reads channels c .. c + count - 1 of the input at (n, y, x), after gain, offset and SiLU, into `to`, float or
// bfloat16. All of them are in x or all in skip.
template <typename T>
FASTDDPM_INLINE void read_pixel(const fastddpm_conv_args &p, const ConvSize &size, int64_t n, int64_t y, int64_t x,
                                int64_t c, int64_t count, T *to) {
    const int64_t row = p.doubled ? y >> 1 : y, column = p.doubled ? x >> 1 : x;
    const bool first = c < p.c1;
    const float *from = first ? p.x + n * p.x_stride[0] + row * p.x_stride[1] + column * p.x_stride[2] + c * p.x_stride[3]
                              : p.skip + ((n * p.height + row) * p.width + column) * p.c2 + (c - p.c1);
    const float *gain = p.gain ? p.gain + n * size.channels + c : nullptr;
    const float *offset = p.gain ? p.offset + n * size.channels + c : nullptr;
    const int64_t step = first ? p.x_stride[3] : 1;
    int64_t i = 0;
    for (; step == 1 && i + kWidth <= count; i += kWidth) {
        Vec v = load(from + i);
        if (gain) v = v * load(gain + i) + load(offset + i);
        store(to + i, gain && p.silu ? vsilu(v) : v);
    }
    for (; i < count; i += kWidth) {
        const int64_t part = smaller(kWidth, count - i);
        Vec v{};
        for (int64_t j = 0; j < part; ++j) v[j] = from[(i + j) * step];
        if (gain) v = v * load_part(gain + i, part) + load_part(offset + i, part);
        store_part(to + i, gain && p.silu ? vsilu(v) : v, part);
    }
}

// out[k .. k + count) of one pixel = v + bias + temb + residual.
FASTDDPM_INLINE void finish(const fastddpm_conv_args &p, int64_t n, int64_t pixel, int64_t k, Vec v, int64_t count) {
    const int64_t at = pixel * p.k + k;
    const float *temb = p.temb ? p.temb + n * p.temb_stride + k : nullptr;
    if (count >= kWidth) {
        if (p.bias) v += load(p.bias + k);
        if (temb) v += load(temb);
        if (p.residual) v += load(p.residual + at);
        store(p.out + at, v);
    } else {
        if (p.bias) v += load_part(p.bias + k, count);
        if (temb) v += load_part(temb, count);
        if (p.residual) v += load_part(p.residual + at, count);
        store_part(p.out + at, v, count);
    }
}

// The weights of output channels k .. k + kColumns - 1 in the result of conv_pack, where they are adjacent.
inline const float *packed_columns(const fastddpm_conv_args &p, int64_t k) {
    return static_cast<const float *>(p.packed) + k * (p.c1 + p.c2) * p.kernel * p.kernel;
}

bool winograd_supported(const fastddpm_conv_args &p);
int64_t winograd_packed_bytes(const fastddpm_conv_args &p);
void pack_winograd(const fastddpm_conv_args &p, void *packed);
int64_t winograd_workspace(const fastddpm_conv_args &p, int32_t threads);
int32_t conv_winograd(const fastddpm_conv_args &p, int32_t threads);
bool patches_supported(const fastddpm_conv_args &p);
int64_t patches_packed_bytes(const fastddpm_conv_args &p);
void pack_patches(const fastddpm_conv_args &p, void *packed);
int64_t patches_workspace(const fastddpm_conv_args &p, int32_t threads);
int32_t conv_patches(const fastddpm_conv_args &p, int32_t threads);
int32_t winograd_weight_gradient(const fastddpm_conv_args &p, int32_t threads);
int64_t weight_gradient_workspace(const fastddpm_conv_args &p, int32_t threads);

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
