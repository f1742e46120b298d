// The weights' gradient of a linear layer over pixels: dW = dY^T X, a sum over the pixels of all images.
//
// A task is a group of the pixels, in order, and some output channels; it adds to sums of its own. Chunk by chunk it
// packs X into V (C / 32, chunk, 32) and dY into U (K / 32, chunk, 32), in bfloat16, two adjacent pixels of a channel to
// a word, and multiplies them while they are in its core's cache: U^T V. Then the sums of the groups are added, in order.
// Groups and parts depend on the shape alone, and with them the bits: not on the number of threads.
#include "conv.h"
#include "pack.h"
#include "shares.h"

namespace fastddpm {
namespace FASTDDPM_ISA {
namespace {

using Element = uint16_t;

constexpr int64_t kChunk = 128;  // of each, 32 channels of both factors stay in the first-level cache
constexpr int64_t kSumsBytes = 512 << 10;  // of a task, at most if there are more than 32 output channels
constexpr int64_t kFewestTasks = 8, kMostGroups = 16;
constexpr int64_t kGroupChunks = 16;  // of a group, if there are more groups than the fewest tasks need

struct Plan {
    int64_t channels, pixels, chunks;
    int64_t row;              // floats of a row of sums
    int64_t parts, part_rows;  // output channels of a part
    int64_t groups;
    int64_t sums_size;  // floats of the sums of a group
    int64_t sums_bytes, bias_bytes, thread_bytes;

    explicit Plan(const fastddpm_conv_args &p) : channels(p.c1), pixels(p.n * p.height * p.width) {
        constexpr int64_t kFloat = sizeof(float), kElement = sizeof(Element);
        chunks = divide_up(pixels, kChunk);
        row = divide_up(channels, kColumns) * kColumns;
        const int64_t blocks = divide_up(p.k, kColumns);
        const int64_t most_blocks = larger(1, kSumsBytes / (row * kColumns * kFloat));
        parts = larger(1, divide_up(blocks, most_blocks));
        part_rows = larger(1, divide_up(blocks, parts)) * kColumns;
        const int64_t wanted = larger(divide_up(kFewestTasks, parts), smaller(chunks / kGroupChunks, kMostGroups));
        groups = larger(1, smaller(chunks, wanted));
        sums_size = p.k * row;
        sums_bytes = whole_lines(groups * sums_size * kFloat);
        bias_bytes = p.grad_bias ? whole_lines(chunks * p.k * kFloat) : 0;
        thread_bytes = (row + part_rows) * kChunk * kElement;
    }
};

// Packs `rows` rows of `columns` channels in panels, row by row as they lie in memory, `stride` floats apart.
void pack_chunk(const float *from, int64_t stride, int64_t rows, int64_t columns, Element *to) {
    for (int64_t row = 0; row < rows; row += 2, from += 2 * stride)
        for (int64_t i = 0; i < columns; i += kColumns)
            pack_word(from + i, row + 1 < rows ? from + stride + i : nullptr, smaller(kColumns, columns - i),
                      to + i * kChunk + row * kColumns);
}

void sum_rows(const float *from, int64_t stride, int64_t rows, int64_t columns, float *sums) {
    for (int64_t i = 0; i < columns; i += kWidth) {
        const int64_t part = smaller(kWidth, columns - i);
        Vec total{};
        for (int64_t r = 0; r < rows; ++r) {
            const float *at = from + r * stride + i;
            total += part == kWidth ? load(at) : load_part(at, part);
        }
        part == kWidth ? store(sums + i, total) : store_part(sums + i, total, part);
    }
}

// The sums of a group of chunks, for `rows` output channels from k. `bias`: of each chunk, the sums of dY.
void multiply_group(const fastddpm_conv_args &p, const Plan &plan, int64_t first, int64_t end, int64_t k, int64_t rows,
                    float *sums, float *bias, Element *own) {
    Element *v = own, *u = own + plan.row * kChunk;
    if (first == end) memset(sums, 0, static_cast<size_t>(rows * plan.row) * sizeof(float));  // there are no pixels
    for (int64_t chunk = first; chunk < end; ++chunk) {
        const int64_t pixel = chunk * kChunk, pixels = smaller(kChunk, plan.pixels - pixel);
        const float *grad = p.grad + pixel * p.k + k;
        pack_chunk(p.x + pixel * plan.channels, plan.channels, pixels, plan.channels, v);
        pack_chunk(grad, p.k, pixels, rows, u);
        if (p.grad_bias) sum_rows(grad, p.k, pixels, rows, bias + chunk * p.k + k);
        for (int64_t r = 0; r < rows; r += kColumns)
            for (int64_t c = 0; c < plan.channels; c += kPanel)
                product<true>(smaller(kColumns, rows - r), plan.channels - c, u + r * kChunk, kColumns,
                              v + c / kColumns * kColumns * kChunk + c % kColumns * Factors<Element>::kDepth,
                              whole_words<Element>(pixels), sums + r * plan.row + c, plan.row, chunk > first);
    }
}

// Writes the gradient of output channel k: the sums of all groups.
void add_groups(const fastddpm_conv_args &p, const Plan &plan, int64_t k, const float *sums) {
    const int64_t *stride = p.weight_stride;
    for (int64_t c = 0; c < plan.channels; c += kWidth) {
        const float *from = sums + k * plan.row + c;
        Vec total = load(from);
        for (int64_t group = 1; group < plan.groups; ++group) total += load(from + group * plan.sums_size);
        const int64_t part = smaller(kWidth, plan.channels - c);
        float *to = p.grad_weight + k * stride[0] + c * stride[1];
        if (stride[1] != 1)
            for (int64_t i = 0; i < part; ++i) to[i * stride[1]] = total[i];
        else
            part == kWidth ? store(to, total) : store_part(to, total, part);
    }
}

}  // namespace

bool patches_gradient_supported(const fastddpm_conv_args &p) {
    return p.precision == FASTDDPM_BFLOAT16 && p.kernel == 1 && p.stride == 1 && p.c2 == 0 && !p.doubled && !p.gain;
}

int64_t patches_gradient_workspace(const fastddpm_conv_args &p, int32_t threads) {
    const Plan plan(p);
    return plan.sums_bytes + plan.bias_bytes + threads * plan.thread_bytes;
}

int32_t patches_weight_gradient(const fastddpm_conv_args &p, int32_t threads) {
    const Plan plan(p);
    char *workspace = static_cast<char *>(p.workspace);
    float *sums = reinterpret_cast<float *>(workspace);
    float *bias = reinterpret_cast<float *>(workspace + plan.sums_bytes);
    Shares shares(plan.groups * plan.parts, threads);
#pragma omp parallel num_threads(team_size(threads)) if (threads > 1)
    {
        char *own = workspace + plan.sums_bytes + plan.bias_bytes + thread_number() * plan.thread_bytes;
        shares.run([&](int64_t task) {
            const int64_t group = task / plan.parts, k = task % plan.parts * plan.part_rows;
            if (k >= p.k) return;
            multiply_group(p, plan, plan.chunks * group / plan.groups, plan.chunks * (group + 1) / plan.groups, k,
                           smaller(plan.part_rows, p.k - k), sums + group * plan.sums_size + k * plan.row, bias,
                           reinterpret_cast<Element *>(own));
        });
#pragma omp barrier
#pragma omp for
        for (int64_t k = 0; k < p.k; ++k) add_groups(p, plan, k, sums);
    }
    for (int64_t k = 0; p.grad_bias && k < p.k; ++k) {
        double total = 0;
        for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) total += bias[chunk * p.k + k];
        p.grad_bias[k] = static_cast<float>(total);
    }
    return FASTDDPM_OK;
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
