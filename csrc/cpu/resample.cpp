// Feature maps of half or double the size, for residual blocks that resample: a task is one row of output pixels.
#include "kernels.h"
#include "vec.h"

namespace fastddpm {
namespace FASTDDPM_ISA {
namespace {

// Where the gain and the offset of an image begin; null for x as it is.
struct Affine {
    const float *gain, *offset;

    Vec apply(Vec x, int64_t c) const { return gain ? vsilu(x * load(gain + c) + load(offset + c)) : x; }
    Vec apply_part(Vec x, int64_t c, int64_t count) const {
        return gain ? vsilu(x * load_part(gain + c, count) + load_part(offset + c, count)) : x;
    }
};

// The mean of the pixels at `x` and to the right of it, and of those `row` elements after them.
void average(const float *x, int64_t row, int64_t channels, const Affine &affine, float *out) {
    const float *corners[4] = {x, x + channels, x + row, x + row + channels};
    const int64_t whole = channels / kWidth * kWidth, rest = channels - whole;
    for (int64_t c = 0; c < whole; c += kWidth) {
        Vec total{};
        for (const float *corner : corners) total += affine.apply(load(corner + c), c);
        store(out + c, total * 0.25f);
    }
    if (rest == 0) return;
    Vec total{};
    for (const float *corner : corners) total += affine.apply_part(load_part(corner + whole, rest), whole, rest);
    store_part(out + whole, total * 0.25f, rest);
}

// Two pixels of out equal to the one at x.
void repeat(const float *x, int64_t channels, const Affine &affine, float *out) {
    const int64_t whole = channels / kWidth * kWidth, rest = channels - whole;
    for (int64_t c = 0; c < whole; c += kWidth) {
        const Vec v = affine.apply(load(x + c), c);
        store(out + c, v);
        store(out + channels + c, v);
    }
    if (rest == 0) return;
    const Vec v = affine.apply_part(load_part(x + whole, rest), whole, rest);
    store_part(out + whole, v, rest);
    store_part(out + channels + whole, v, rest);
}

}  // namespace

int32_t resample(const fastddpm_resample_args &p, int32_t threads) {
    if ((p.gain == nullptr) != (p.offset == nullptr)) return FASTDDPM_UNSUPPORTED;
    if (!p.doubled && (p.height % 2 || p.width % 2)) return FASTDDPM_UNSUPPORTED;
    const int64_t rows = p.doubled ? 2 * p.height : p.height / 2, row = p.width * p.c;
    const int64_t out_row = p.doubled ? 2 * row : row / 2;
#pragma omp parallel for num_threads(team_size(threads)) if (threads > 1 && p.n * p.height * row > 32768)
    for (int64_t task = 0; task < p.n * rows; ++task) {
        const int64_t n = task / rows, y = task % rows;
        const Affine affine = {p.gain ? p.gain + n * p.c : nullptr, p.offset ? p.offset + n * p.c : nullptr};
        float *out = p.out + task * out_row;
        if (p.doubled) {
            const float *x = p.x + (n * p.height + y / 2) * row;
            for (int64_t i = 0; i < p.width; ++i) repeat(x + i * p.c, p.c, affine, out + 2 * i * p.c);
        } else {
            const float *x = p.x + (n * p.height + 2 * y) * row;
            for (int64_t i = 0; i < p.width / 2; ++i) average(x + 2 * i * p.c, row, p.c, affine, out + i * p.c);
        }
    }
    return FASTDDPM_OK;
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
