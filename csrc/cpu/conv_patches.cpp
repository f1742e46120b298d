// Convolution of any stride, and linear layers, as a matrix product of patches: rows are output pixels, and a row is
// the input under the kernel, (tap, channel), gathered and activated block by block into cache.
#include "conv.h"
#include "gemm.h"
#include "turn.h"

namespace fastddpm {
namespace FASTDDPM_ISA {
namespace {

constexpr int64_t kDepth = 384;     // columns of a patch that are multiplied at once
constexpr int64_t kMostRows = 48;   // output pixels of a task

struct Plan {
    ConvSize size;
    int64_t depth, pixels, rows, panels, a_row, c_row;
    int64_t shared_floats, thread_floats;

    Plan(const fastddpm_conv_args &p, int32_t threads) : size(p) {
        depth = p.kernel * p.kernel * size.channels;
        pixels = p.n * size.out_height * size.out_width;
        rows = larger(1, smaller(kMostRows, divide_up(pixels, threads)));
        panels = divide_up(p.k, kPanel);
        a_row = smaller(kDepth, up_to_lines(depth)) + kLine;
        c_row = panels * kPanel + kLine;
        shared_floats = up_to_lines(panels * depth * kPanel);
        thread_floats = up_to_lines(rows * a_row) + up_to_lines(rows * c_row);
    }
};

// Columns d .. d + count - 1 of the patches of pixels first .. first + rows - 1.
void gather(const fastddpm_conv_args &p, const Plan &plan, int64_t first, int64_t rows, int64_t d, int64_t count,
            float *a) {
    const ConvSize &size = plan.size;
    for (int64_t r = 0; r < rows; ++r, a += plan.a_row) {
        const int64_t pixel = first + r, x = pixel % size.out_width;
        const int64_t y = pixel / size.out_width % size.out_height, n = pixel / size.out_width / size.out_height;
        for (int64_t at = 0; at < count;) {
            const int64_t tap = (d + at) / size.channels, c = (d + at) % size.channels;
            const int64_t seam = c < p.c1 ? p.c1 : size.channels;
            const int64_t run = smaller(count - at, seam - c);
            const int64_t row = y * p.stride - p.pad + tap / p.kernel, column = x * p.stride - p.pad + tap % p.kernel;
            if (row < 0 || row >= size.height || column < 0 || column >= size.width)
                memset(a + at, 0, static_cast<size_t>(run) * sizeof(float));
            else
                read_pixel(p, size, n, row, column, c, run, a + at);
            at += run;
        }
    }
}

// Weights of one panel of output channels, (depth, kPanel).
void pack(const fastddpm_conv_args &p, const Plan &plan, int64_t panel, float *to) {
    const int64_t *stride = p.weight_stride, columns = smaller(kPanel, p.k - panel * kPanel);
    for (int64_t tap = 0; tap < p.kernel * p.kernel; ++tap) {
        const float *from =
            p.weight + panel * kPanel * stride[0] + tap / p.kernel * stride[2] + tap % p.kernel * stride[3];
        turn(from, stride[0], stride[1], columns, plan.size.channels, to, kPanel);
        to += plan.size.channels * kPanel;
    }
}

void rows_of_output(const fastddpm_conv_args &p, const Plan &plan, int64_t first, int64_t rows, const float *packed,
                    float *a) {
    float *c = a + up_to_lines(plan.rows * plan.a_row);
    for (int64_t d = 0; d < plan.depth; d += kDepth) {
        const int64_t depth = smaller(kDepth, plan.depth - d);
        gather(p, plan, first, rows, d, depth, a);
        for (int64_t panel = 0; panel < plan.panels; ++panel)
            product(rows, a, plan.a_row, packed + (panel * plan.depth + d) * kPanel, depth, c + panel * kPanel,
                    plan.c_row, d > 0);
    }
    const int64_t image_pixels = plan.size.out_height * plan.size.out_width;
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t k = 0; k < p.k; k += kWidth)
            finish(p, (first + r) / image_pixels, first + r, k, load(c + r * plan.c_row + k), p.k - k);
}

}  // namespace

int64_t patches_workspace(const fastddpm_conv_args &p, int32_t threads) {
    const Plan plan(p, threads);
    return (plan.shared_floats + threads * plan.thread_floats) * static_cast<int64_t>(sizeof(float));
}

int32_t conv_patches(const fastddpm_conv_args &p, int32_t threads) {
    const Plan plan(p, threads);
    float *packed = static_cast<float *>(p.workspace);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *own = packed + plan.shared_floats + thread_number() * plan.thread_floats;
#pragma omp for schedule(dynamic)
        for (int64_t panel = 0; panel < plan.panels; ++panel) pack(p, plan, panel, packed + panel * plan.depth * kPanel);
#pragma omp for schedule(dynamic)
        for (int64_t first = 0; first < plan.pixels; first += plan.rows)
            rows_of_output(p, plan, first, smaller(plan.rows, plan.pixels - first), packed, own);
    }
    return FASTDDPM_OK;
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
