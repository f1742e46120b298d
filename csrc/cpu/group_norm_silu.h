// Shared by the forward and the backward pass of group_norm_silu: sizes, coefficients, loops over the tensors, the
// dropout mask.
#pragma once
#include "kernels.h"
#include "memory.h"
#include "moments.h"
#include "noise.h"

namespace fastddpm {
namespace FASTDDPM_ISA {

using NormArgs = fastddpm_group_norm_silu_args;

inline bool norm_supported(const NormArgs &p) {
    const bool dtypes = p.dtype == FASTDDPM_FLOAT32 || p.dtype == FASTDDPM_BFLOAT16;
    const bool sizes = p.n > 0 && p.c1 > 0 && p.c2 >= 0 && p.height > 0 && p.width > 0;
    return dtypes && sizes && p.param_dtype == FASTDDPM_FLOAT32 && p.groups > 0 && (p.c1 + p.c2) % p.groups == 0 &&
           (p.c2 > 0) == (p.skip != nullptr) && (p.scale == nullptr) == (p.shift == nullptr);
}

template <typename T>
TwoInputs<T> norm_inputs(const NormArgs &p) {
    return {static_cast<const T *>(p.x), static_cast<const T *>(p.skip), p.c1, p.c2, p.height * p.width,
            p.layout == FASTDDPM_NHWC};
}

// Whether there are enough elements to be worth waking threads.
inline bool norm_is_large(const NormArgs &p) { return p.n * (p.c1 + p.c2) * p.height * p.width > 32768; }

// Gain and offset of channel c of image n after the norm, in double.
struct Affine {
    double gain, offset;
};

inline Affine norm_affine_of(const NormArgs &p, int64_t n, int64_t c) {
    const double weight = static_cast<const float *>(p.weight)[c], bias = static_cast<const float *>(p.bias)[c];
    if (p.scale == nullptr) return {weight, bias};
    const int64_t at = n * (p.c1 + p.c2) + c;
    const double factor = 1.0 + static_cast<const float *>(p.scale)[at];
    return {weight * factor, bias * factor + static_cast<const float *>(p.shift)[at]};
}

inline double norm_temb_of(const NormArgs &p, int64_t n, int64_t c) {
    return p.temb == nullptr ? 0.0 : static_cast<const float *>(p.temb)[n * p.temb_stride + c];
}

// One number per channel for a vector of a run, which is adjacent channels of a pixel or adjacent pixels of a channel.
template <bool kNhwc>
FASTDDPM_INLINE Vec per_channel(const float *of_run, int64_t i, int64_t count) {
    if (!kNhwc) return splat(*of_run);
    return count < kWidth ? load_part(of_run + i, count) : load(of_run + i);
}

// Adds a run to the sums of its channels.
template <bool kNhwc>
class SumOfRun {
public:
    FASTDDPM_INLINE explicit SumOfRun(float *to) : to_(to) {}
    FASTDDPM_INLINE void add(Vec v, int64_t i, int64_t count) {
        if (kNhwc) {
            if (count < kWidth)
                store_part(to_ + i, load_part(to_ + i, count) + v, count);
            else
                store(to_ + i, load(to_ + i) + v);
        } else if (count < kWidth) {
            for (int64_t j = 0; j < count; ++j) total_[j] += v[j];
        } else {
            total_ += v;
        }
    }
    FASTDDPM_INLINE void finish() {
        if (!kNhwc) *to_ += sum(total_);
    }

private:
    float *to_;
    Vec total_{};
};

// Calls body(side, offset in that side, channel, offset in (N, C, H, W), length) for every run of adjacent elements of
// the pixels first .. first + count - 1 of image n that lie in one input: side 0 is x, side 1 skip.
template <bool kNhwc, typename Body>
FASTDDPM_INLINE void for_runs(const NormArgs &p, int64_t n, int64_t first, int64_t count, Body body) {
    const int64_t pixels = p.height * p.width, channels = p.c1 + p.c2;
    if (kNhwc) {
        for (int64_t pixel = n * pixels + first; pixel < n * pixels + first + count; ++pixel) {
            body(0, pixel * p.c1, 0, pixel * channels, p.c1);
            if (p.c2 > 0) body(1, pixel * p.c2, p.c1, pixel * channels + p.c1, p.c2);
        }
    } else {
        for (int64_t c = 0; c < channels; ++c) {
            const bool second = c >= p.c1;
            const int64_t row = second ? n * p.c2 + c - p.c1 : n * p.c1 + c;
            body(second, row * pixels + first, c, (n * channels + c) * pixels + first, count);
        }
    }
}

// The elements of some pixels that dropout keeps, as the reference draws them: a Philox block serves eight elements in
// (H, W, C) order; word w gives its low half to element 2 w and its high half to 2 w + 1.
class DropoutMask {
public:
    DropoutMask(const NormArgs &p, uint8_t *keep)
        : p_(p), keep_(keep), threshold_(static_cast<uint32_t>(__builtin_rint(static_cast<double>(p.dropout) * 65536))) {}

    static int64_t bytes(const NormArgs &p) { return p.dropout > 0 ? Memory::lines(kChunk * (p.c1 + p.c2)) : 0; }

    void draw(int64_t n, int64_t first, int64_t count) {
        if (p_.dropout <= 0) return;
        constexpr int64_t kElements = 8 * kLanes;
        const int64_t channels = p_.c1 + p_.c2, begin = first * channels, end = begin + count * channels;
        const Counter counter{static_cast<uint32_t>(p_.key.images[n]), static_cast<uint32_t>(*p_.key.step),
                              static_cast<uint32_t>(p_.dropout_stream), static_cast<uint64_t>(*p_.key.seed)};
        for (int64_t at = begin / kElements * kElements; at < end; at += kElements) {
            Words words;
            words_of_lanes(words, static_cast<uint32_t>(at / 8), counter);
            uint8_t kept[kElements];
            for (int64_t lane = 0; lane < kLanes; ++lane)
                for (int w = 0; w < 4; ++w) {
                    kept[8 * lane + 2 * w] = (words[w][lane] & 0xFFFF) >= threshold_;
                    kept[8 * lane + 2 * w + 1] = (words[w][lane] >> 16) >= threshold_;
                }
            const int64_t from = larger(at, begin), to = smaller(at + kElements, end);
            memcpy(keep_ + (from - begin), kept + (from - at), static_cast<size_t>(to - from));
        }
    }

    // The factors, 0 or 1 / (1 - p), from element i of a run that begins at `channel` of the drawn pixel number
    // `pixel`.
    template <bool kNhwc>
    FASTDDPM_INLINE Vec factors(int64_t pixel, int64_t channel, int64_t i, int64_t count) const {
        const int64_t channels = p_.c1 + p_.c2;
        const uint8_t *keep = keep_ + pixel * channels + channel + (kNhwc ? i : i * channels);
        ByteVec kept{};
        if (kNhwc && count >= kWidth)
            memcpy(&kept, keep, sizeof kept);
        else
            for (int64_t j = 0; j < smaller(count, kWidth); ++j) kept[j] = keep[kNhwc ? j : j * channels];
        // By way of integers: GCC converts bytes to floats one by one.
        return __builtin_convertvector(__builtin_convertvector(kept, IntVec), Vec) * (65536.0f / static_cast<float>(65536 - threshold_));
    }

private:
    const NormArgs &p_;
    uint8_t *keep_;
    uint32_t threshold_;
};

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
