// Elementwise kernels: a thread takes four adjacent elements of an image in (C, H, W) order, those of one Philox block.
//
// Normals are computed in double with the same operations, in the same order, as in csrc/cpu/noise.h, and the sources
// that include this are compiled without contraction: the noise has the same bits on a GPU as on a CPU.
#pragma once
#include "common.cuh"

namespace fastddpm {

constexpr int kElementwiseThreads = 256;

struct NoiseKey {
    uint64_t seed;
    uint32_t image, step, stream;
};
__device__ __forceinline__ NoiseKey noise_key(const fastddpm_key &key, int64_t n, int64_t step, int64_t stream) {
    return {static_cast<uint64_t>(*key.seed), static_cast<uint32_t>(key.images[n]), static_cast<uint32_t>(step),
            static_cast<uint32_t>(stream)};
}

// An integer below 2^52 as a double, by placing it in the mantissa of 2^52.
__device__ __forceinline__ double to_double(uint64_t i) {
    return __longlong_as_double(static_cast<long long>(i | 0x4330000000000000u)) - 4503599627370496.0;
}

// ln u for normal u > 0: u = m 2^e with m in [sqrt 1/2, sqrt 2), ln m = 2 artanh((m - 1) / (m + 1)) by its series.
__device__ __forceinline__ double natural_log(double u) {
    constexpr uint64_t kSqrtHalf = 0x3FE6A09E667F3BCDu, kOne = 0x3FF0000000000000u;
    const uint64_t shifted = static_cast<uint64_t>(__double_as_longlong(u)) - kSqrtHalf + kOne;
    const double m = __longlong_as_double(static_cast<long long>((shifted & 0x000FFFFFFFFFFFFFu) + kSqrtHalf));
    const double s = (m - 1.0) / (m + 1.0), z = s * s;
    double series = 1.0 / 13;
    series = series * z + 1.0 / 11;
    series = series * z + 1.0 / 9;
    series = series * z + 1.0 / 7;
    series = series * z + 1.0 / 5;
    series = series * z + 1.0 / 3;
    series = series * z + 1.0;
    return (to_double(shifted >> 52) - 1023.0) * 0.693147180559945309417232121458 + 2.0 * s * series;
}

// One Box-Muller pair from two words: radius sqrt(-2 ln(w / 2^32 + 2^-33)), angle 2 pi v / 2^32.
__device__ __forceinline__ void normal_pair(uint32_t w, uint32_t v, float *cosine, float *sine) {
    const double radius = sqrt(-2.0 * natural_log(to_double(w) * 0x1p-32 + 0x1p-33));
    // The nearest quarter turn, exactly; the rest lies within an eighth, where Taylor's series are short.
    const uint32_t quarter = (v + 0x20000000u) >> 30;
    const double x = static_cast<double>(static_cast<int32_t>(v - (quarter << 30))) * (6.283185307179586477 * 0x1p-32);
    const double z = x * x;
    double s = -1.0 / 39916800;
    s = s * z + 1.0 / 362880;
    s = s * z - 1.0 / 5040;
    s = s * z + 1.0 / 120;
    s = s * z - 1.0 / 6;
    s = (s * z + 1.0) * x;
    double c = 1.0 / 479001600;
    c = c * z - 1.0 / 3628800;
    c = c * z + 1.0 / 40320;
    c = c * z - 1.0 / 720;
    c = c * z + 1.0 / 24;
    c = c * z - 1.0 / 2;
    c = c * z + 1.0;
    const double a = quarter & 1 ? s : c, b = quarter & 1 ? c : s;
    *cosine = static_cast<float>(radius * ((quarter + 1) & 2 ? -a : a));
    *sine = static_cast<float>(radius * (quarter & 2 ? -b : b));
}

__device__ __forceinline__ philox_block words_of(const NoiseKey &key, int64_t block) {
    return philox(static_cast<uint32_t>(block), key.image, key.step, key.stream, key.seed);
}

__device__ __forceinline__ void normals_of(const NoiseKey &key, int64_t block, float (&z)[4]) {
    const philox_block words = words_of(key, block);
    normal_pair(words.w[0], words.w[1], &z[0], &z[1]);
    normal_pair(words.w[2], words.w[3], &z[2], &z[3]);
}

// Four elements of an image, of which `count` exist; none for threads past the end.
struct Four {
    int64_t n, block;
    int count;
};
__device__ __forceinline__ Four four_of_thread(int64_t num) {
    const int64_t of_image = (num + 4 * kElementwiseThreads - 1) / (4 * kElementwiseThreads);
    const int64_t block = blockIdx.x % of_image * kElementwiseThreads + threadIdx.x, left = num - 4 * block;
    return {static_cast<int64_t>(blockIdx.x / of_image), block, static_cast<int>(left < 0 ? 0 : left < 4 ? left : 4)};
}
inline LaunchShape elementwise_shape(int64_t n, int64_t num) {
    return {n * divide_up(num, 4 * kElementwiseThreads), kElementwiseThreads};
}

// Dense (N, num) float32; one access of 16 bytes where rows are multiples of that.
__device__ __forceinline__ void load_four(const float *rows, const Four &at, int64_t num, bool whole, float (&v)[4]) {
    const float *first = rows + at.n * num + 4 * at.block;
    if (whole) return load<4>(first).unpack(v);
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = i < at.count ? first[i] : 0.0f;
}
__device__ __forceinline__ void store_four(float *rows, const Four &at, int64_t num, bool whole, const float (&v)[4]) {
    float *first = rows + at.n * num + 4 * at.block;
    if (whole) return store<4>(first, v);
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (i < at.count) first[i] = v[i];
}
template <typename... Pointers>
bool rows_of_16_bytes(int64_t num, const Pointers *...pointers) {
    return num % 4 == 0 && (aligned(pointers) && ...);
}

// A place in a (C, H, W) image, moving in that order.
struct Place {
    int64_t c, y, x;

    __device__ __forceinline__ Place(int64_t i, int64_t height, int64_t width)
        : c(i / width / height), y(i / width % height), x(i % width) {}
    __device__ __forceinline__ void next(int64_t height, int64_t width) {
        if (++x < width) return;
        x = 0;
        if (++y < height) return;
        y = 0;
        ++c;
    }
};

}  // namespace fastddpm
