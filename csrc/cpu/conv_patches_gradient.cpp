// The weights' gradient of a linear layer over pixels: dW = dY^T X, a sum over the pixels of all images.
//
// The pixels are taken in blocks of kBlockPixels, of chunks of kChunk. For each block
//   1. packing:  of each chunk, X into V (C / 32, chunk, 32) and dY into U (K / 32, chunk, 32), in bfloat16, two adjacent
//                pixels of a channel to a word, which all threads share; and the chunk's sums of dY for the bias;
//   2. products: for 32 input and kRowPanels times 32 output channels at a time U^T V, added to the gradient.
// An element is summed over the pixels of a block in their order, then over the blocks in theirs, whatever the number of
// threads is.
#include "conv.h"
#include "pack.h"

namespace fastddpm {
namespace FASTDDPM_ISA {
namespace {

using Element = uint16_t;

constexpr int64_t kChunk = 128;  // of each, 32 channels of both factors stay in the first-level cache
constexpr int64_t kBlockPixels = 16 * kChunk;
constexpr int64_t kRowPanels = 2;

struct Plan {
    int64_t channels, pixels, chunks, panels, row_panels;  // panels of 32 input channels, of 32 output channels
    int64_t chunk;                                         // elements of V and U of a chunk
    int64_t packed_bytes, sums_bytes, thread_bytes;

    explicit Plan(const fastddpm_conv_args &p) : channels(p.c1), pixels(p.n * p.height * p.width) {
        chunks = divide_up(pixels, kChunk);
        panels = divide_up(channels, kColumns);
        row_panels = divide_up(p.k, kColumns);
        chunk = (panels + row_panels) * kColumns * kChunk;
        packed_bytes = smaller(chunks, kBlockPixels / kChunk) * chunk * static_cast<int64_t>(sizeof(Element));
        sums_bytes = p.grad_bias ? whole_lines(chunks * p.k * static_cast<int64_t>(sizeof(float))) : 0;
        thread_bytes = kRowPanels * kColumns * kColumns * static_cast<int64_t>(sizeof(float));
    }
    int64_t tasks() const { return panels * divide_up(row_panels, kRowPanels); }
};

// Packs `rows` rows of `columns` channels in panels, row by row as they lie in memory.
void pack_chunk(const float *from, int64_t rows, int64_t columns, Element *to) {
    for (int64_t row = 0; row < rows; row += 2, from += 2 * columns)
        for (int64_t i = 0; i < columns; i += kColumns)
            pack_word(from + i, row + 1 < rows ? from + columns + i : nullptr, smaller(kColumns, columns - i),
                      to + i * kChunk + row * kColumns);
}

void sum_rows(const float *from, int64_t rows, int64_t columns, float *sums) {
    for (int64_t i = 0; i < columns; i += kWidth) {
        const int64_t part = smaller(kWidth, columns - i);
        Vec total{};
        for (int64_t r = 0; r < rows; ++r) {
            const float *at = from + r * columns + i;
            total += part == kWidth ? load(at) : load_part(at, part);
        }
        part == kWidth ? store(sums + i, total) : store_part(sums + i, total, part);
    }
}

// Writes rows k .. k + rows - 1 of the columns c .. c + columns - 1 of the gradient, or adds to them.
void add_to_gradient(const fastddpm_conv_args &p, int64_t k, int64_t rows, int64_t c, int64_t columns, const float *sums,
                     bool add) {
    const int64_t *stride = p.weight_stride;
    for (int64_t r = 0; r < rows; ++r) {
        float *to = p.grad_weight + (k + r) * stride[0] + c * stride[1];
        const float *from = sums + r * kColumns;
        int64_t i = 0;
        for (; stride[1] == 1 && i + kWidth <= columns; i += kWidth)
            store(to + i, add ? load(to + i) + load(from + i) : load(from + i));
        for (; i < columns; ++i) to[i * stride[1]] = add ? to[i * stride[1]] + from[i] : from[i];
    }
}

}  // namespace

bool patches_gradient_supported(const fastddpm_conv_args &p) {
    return p.precision == FASTDDPM_BFLOAT16 && p.kernel == 1 && p.stride == 1 && p.c2 == 0 && !p.doubled && !p.gain;
}

int64_t patches_gradient_workspace(const fastddpm_conv_args &p, int32_t threads) {
    const Plan plan(p);
    return plan.packed_bytes + plan.sums_bytes + threads * plan.thread_bytes;
}

int32_t patches_weight_gradient(const fastddpm_conv_args &p, int32_t threads) {
    const Plan plan(p);
    char *workspace = static_cast<char *>(p.workspace);
    Element *packed = reinterpret_cast<Element *>(workspace);
    const int64_t of_gradient = plan.panels * kColumns * kChunk;  // where U of a chunk begins
    float *sums = reinterpret_cast<float *>(workspace + plan.packed_bytes);
    const auto pixels_of = [&](int64_t chunk) { return smaller(kChunk, plan.pixels - chunk * kChunk); };
#pragma omp parallel num_threads(team_size(threads)) if (threads > 1)
    {
        float *own = reinterpret_cast<float *>(workspace + plan.packed_bytes + plan.sums_bytes +
                                               thread_number() * plan.thread_bytes);
        for (int64_t first = 0; first == 0 || first < plan.chunks; first += kBlockPixels / kChunk) {
            const int64_t end = smaller(plan.chunks, first + kBlockPixels / kChunk);
#pragma omp for schedule(dynamic)
            for (int64_t chunk = first; chunk < end; ++chunk) {
                const int64_t pixel = chunk * kChunk, pixels = pixels_of(chunk);
                Element *to = packed + (chunk - first) * plan.chunk;
                pack_chunk(p.x + pixel * plan.channels, pixels, plan.channels, to);
                pack_chunk(p.grad + pixel * p.k, pixels, p.k, to + of_gradient);
                if (p.grad_bias) sum_rows(p.grad + pixel * p.k, pixels, p.k, sums + chunk * p.k);
            }
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < plan.tasks(); ++task) {
                const int64_t c = task % plan.panels * kColumns, k = task / plan.panels * kRowPanels * kColumns;
                const int64_t columns = smaller(kColumns, plan.channels - c);
                const int64_t rows = smaller(kRowPanels * kColumns, p.k - k);
                if (first == end) memset(own, 0, static_cast<size_t>(plan.thread_bytes));  // there are no pixels
                for (int64_t chunk = first; chunk < end; ++chunk) {
                    const Element *v = packed + (chunk - first) * plan.chunk, *u = v + of_gradient;
                    for (int64_t row = 0; row < rows; row += kColumns)
                        for (int64_t i = 0; i < columns; i += kPanel)
                            product<true>(smaller(kColumns, rows - row), columns - i, u + (k + row) * kChunk, kColumns,
                                          v + c * kChunk + i * Factors<Element>::kDepth, whole_words<Element>(pixels_of(chunk)),
                                          own + row * kColumns + i, kColumns, chunk > first);
                }
                add_to_gradient(p, k, rows, c, columns, own, first > 0);
            }
        }
    }
    for (int64_t k = 0; p.grad_bias && k < p.k; ++k) {
        double total = 0;
        for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) total += sums[chunk * p.k + k];
        p.grad_bias[k] = static_cast<float>(total);
    }
    return FASTDDPM_OK;
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
