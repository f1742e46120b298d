// Winograd's F(m x n, 3x3) (Lavin and Gray 2016): y = A^T [(G g G^T) * (B^T d B)] A for tiles of m x n outputs. Down and
// across an image the transforms are those of F(4, 3) or F(2, 3), in one dimension, below.
//
// In float32, F(4x4, 3x3): 36 products instead of 144. In bfloat16, where the definition's error is 2.5e-3, that of
// F(2x2, 3x3), 16 products instead of 36, is 3.5e-3, that of F(2x4, 3x3), 24 instead of 72, 5.2e-3, and that of
// F(4x4, 3x3) 1.1e-2, which is too much.
#pragma once
#include "vec.h"

namespace fastddpm {
namespace FASTDDPM_ISA {

constexpr int kTaps = 9;

template <int kTile>
struct Winograd;

// The interpolation points are 0, 3/2, -3/2, 5/8, -5/8 and infinity instead of the usual 0, 1, -1, 2, -2 and infinity:
// with as many operations, the error of a result is 2.3 times smaller in the mean and 4 times in the worst case. They
// are the most exact points 0, a, -a, b, -b with multiples a and b of 1/16; the constants of B and A are exact in
// float.
template <>
struct Winograd<4> {
    static constexpr int kPoints = 6;  // inputs, and products, for 4 outputs

    static constexpr float kA = 1.5f, kB = 0.625f;
    static constexpr float kA2 = kA * kA, kB2 = kB * kB;
    // Factors of G's rows for the points 0, +-kA and +-kB: one over the product of a point's distances from the others.
    static constexpr float kWeightZero = 1 / (kA2 * kB2);
    static constexpr float kWeightA = 1 / (2 * kA2 * (kA2 - kB2)), kWeightB = 1 / (2 * kB2 * (kB2 - kA2));

    // B^T d of six vectors.
    static FASTDDPM_INLINE void input(const Vec d[kPoints], Vec r[kPoints]) {
        const Vec even_a = d[4] - kB2 * d[2], odd_a = kA * (d[3] - kB2 * d[1]);
        const Vec even_b = d[4] - kA2 * d[2], odd_b = kB * (d[3] - kA2 * d[1]);
        r[0] = (kA2 * kB2) * d[0] - (kA2 + kB2) * d[2] + d[4];
        r[1] = even_a + odd_a;
        r[2] = even_a - odd_a;
        r[3] = even_b + odd_b;
        r[4] = even_b - odd_b;
        r[5] = (kA2 * kB2) * d[1] - (kA2 + kB2) * d[3] + d[5];
    }

    // G g of three vectors: row p is (1, p, p^2) over the product of p's distances from the other points.
    static FASTDDPM_INLINE void weight(const Vec g[3], Vec r[kPoints]) {
        constexpr float a = kWeightA, b = kWeightB;
        const Vec even_a = a * g[0] + (a * kA2) * g[2], even_b = b * g[0] + (b * kB2) * g[2];
        r[0] = kWeightZero * g[0];
        r[1] = even_a + (a * kA) * g[1];
        r[2] = even_a - (a * kA) * g[1];
        r[3] = even_b + (b * kB) * g[1];
        r[4] = even_b - (b * kB) * g[1];
        r[5] = g[2];
    }

    // A^T m of six vectors.
    static FASTDDPM_INLINE void output(const Vec m[kPoints], Vec r[4]) {
        const Vec sum_a = m[1] + m[2], difference_a = m[1] - m[2], sum_b = m[3] + m[4], difference_b = m[3] - m[4];
        r[0] = m[0] + sum_a + sum_b;
        r[1] = kA * difference_a + kB * difference_b;
        r[2] = kA2 * sum_a + kB2 * sum_b;
        r[3] = (kA2 * kA) * difference_a + (kB2 * kB) * difference_b + m[5];
    }

    // Transposed, for the gradient of the weights: A g of four vectors.
    static FASTDDPM_INLINE void gradient(const Vec g[4], Vec r[kPoints]) {
        const Vec even_a = g[0] + kA2 * g[2], odd_a = kA * g[1] + (kA2 * kA) * g[3];
        const Vec even_b = g[0] + kB2 * g[2], odd_b = kB * g[1] + (kB2 * kB) * g[3];
        r[0] = g[0];
        r[1] = even_a + odd_a;
        r[2] = even_a - odd_a;
        r[3] = even_b + odd_b;
        r[4] = even_b - odd_b;
        r[5] = g[3];
    }

    // G^T m of six vectors.
    static FASTDDPM_INLINE void weight_gradient(const Vec m[kPoints], Vec r[3]) {
        const Vec sum_a = kWeightA * (m[1] + m[2]), difference_a = kWeightA * (m[1] - m[2]);
        const Vec sum_b = kWeightB * (m[3] + m[4]), difference_b = kWeightB * (m[3] - m[4]);
        r[0] = kWeightZero * m[0] + sum_a + sum_b;
        r[1] = kA * difference_a + kB * difference_b;
        r[2] = kA2 * sum_a + kB2 * sum_b + m[5];
    }
};

// The interpolation points are 0, 1, -1 and infinity.
template <>
struct Winograd<2> {
    static constexpr int kPoints = 4;

    static FASTDDPM_INLINE void input(const Vec d[kPoints], Vec r[kPoints]) {
        r[0] = d[0] - d[2];
        r[1] = d[1] + d[2];
        r[2] = d[2] - d[1];
        r[3] = d[1] - d[3];
    }
    static FASTDDPM_INLINE void weight(const Vec g[3], Vec r[kPoints]) {
        const Vec even = 0.5f * (g[0] + g[2]), odd = 0.5f * g[1];
        r[0] = g[0];
        r[1] = even + odd;
        r[2] = even - odd;
        r[3] = g[2];
    }
    static FASTDDPM_INLINE void output(const Vec m[kPoints], Vec r[2]) {
        r[0] = m[0] + m[1] + m[2];
        r[1] = m[1] - m[2] - m[3];
    }
    static FASTDDPM_INLINE void gradient(const Vec g[2], Vec r[kPoints]) {
        r[0] = g[0];
        r[1] = g[0] + g[1];
        r[2] = g[0] - g[1];
        r[3] = -g[1];
    }
    static FASTDDPM_INLINE void weight_gradient(const Vec m[kPoints], Vec r[3]) {
        const Vec even = 0.5f * (m[1] + m[2]);
        r[0] = m[0] + even;
        r[1] = 0.5f * (m[1] - m[2]);
        r[2] = even + m[3];
    }
};

// An algorithm: tiles of kDown x kAcross outputs, and factors of type T, float or bfloat16.
template <typename T, int kDown_, int kAcross_>
struct Tile {
    using Element = T;
    static constexpr int kDown = kDown_, kAcross = kAcross_;
    using Down = Winograd<kDown>;
    using Across = Winograd<kAcross>;
    static constexpr int kPointsDown = Down::kPoints, kPointsAcross = Across::kPoints;
    static constexpr int kProducts = kPointsDown * kPointsAcross;
};

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
