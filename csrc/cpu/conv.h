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

// SiLU of what is multiplied as a T.
template <typename T>
FASTDDPM_INLINE Vec activated(Vec x) {
    return sizeof(T) == sizeof(float) ? vsilu(x) : vsilu_to_bf16(x);
}

// Reads channels c .. c + count - 1 of the input at (n, y, x), after gain, offset and SiLU, into `to`, float or
// bfloat16; factors are of type T. All channels are in x or all in skip.
template <typename T, typename To>
FASTDDPM_INLINE void read_pixel(const fastddpm_conv_args &p, const ConvSize &size, int64_t n, int64_t y, int64_t x,
                                int64_t c, int64_t count, To *to) {
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
        store(to + i, gain && p.silu ? activated<T>(v) : v);
    }
    for (; i < count; i += kWidth) {
        const int64_t part = smaller(kWidth, count - i);
        Vec v{};
        for (int64_t j = 0; j < part; ++j) v[j] = from[(i + j) * step];
        if (gain) v = v * load_part(gain + i, part) + load_part(offset + i, part);
        store_part(to + i, gain && p.silu ? activated<T>(v) : v, part);
    }
}

// What is added to the output channels k .. k + count - 1 of a convolution as they are written. A copy of the arguments:
// a store may change those themselves, as far as the compiler knows, which would load them anew for every vector.
class Finish {
public:
    FASTDDPM_INLINE Finish(const fastddpm_conv_args &p, int64_t k, int64_t count)
        : bias_(p.bias ? p.bias + k : nullptr),
          temb_(p.temb ? p.temb + k : nullptr),
          residual_(p.residual ? p.residual + k : nullptr),
          out_(p.out + k),
          row_(p.k),
          temb_stride_(p.temb_stride),
          count_(count) {}

    // out = v + bias + temb + residual for a pixel of image n; v is the vector that begins at channel k + i.
    FASTDDPM_INLINE void operator()(int64_t n, int64_t pixel, int64_t i, Vec v) const {
        const int64_t at = pixel * row_ + i, left = count_ - i;
        if (left >= kWidth) {
            if (bias_) v += load(bias_ + i);
            if (temb_) v += load(temb_ + n * temb_stride_ + i);
            if (residual_) v += load(residual_ + at);
            store(out_ + at, v);
        } else {
            if (bias_) v += load_part(bias_ + i, left);
            if (temb_) v += load_part(temb_ + n * temb_stride_ + i, left);
            if (residual_) v += load_part(residual_ + at, left);
            store_part(out_ + at, v, left);
        }
    }

private:
    const float *bias_, *temb_, *residual_;
    float *out_;
    int64_t row_, temb_stride_, count_;
};

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
bool patches_gradient_supported(const fastddpm_conv_args &p);
int64_t patches_gradient_workspace(const fastddpm_conv_args &p, int32_t threads);
int32_t patches_weight_gradient(const fastddpm_conv_args &p, int32_t threads);
int32_t winograd_weight_gradient(const fastddpm_conv_args &p, int32_t threads);
int64_t winograd_gradient_workspace(const fastddpm_conv_args &p, int32_t threads);

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
