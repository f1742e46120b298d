// Convolution of any stride, and linear layers, as a matrix product of patches. A row is an output pixel: the input
// under the kernel, (tap, channel), gathered and activated block by block into cache.
#include "conv.h"
#include "gemm.h"
#include "shares.h"
#include "turn.h"

namespace fastddpm {
namespace FASTDDPM_ISA {
namespace {

template <typename T>
constexpr int64_t kDepth = 1536 / sizeof(T);  // columns of a patch that are multiplied at once
constexpr int64_t kMostRows = 48;   // output pixels of a task
constexpr int64_t kMostTurns = 4;   // of a weight: for more tasks that read it, it is packed

// For factors of type T, of which two bfloat16 are a word: their depth is even.
template <typename T>
struct Plan {
    ConvSize size;
    int64_t depth, pixels, blocks;
    bool turned;  // weights are packed block by block in cache, where they are used, and not before
    int64_t rows, row_tasks, columns, column_tasks;  // a task: `rows` output pixels, `columns` output channels
    int64_t a_row, c_row;
    int64_t a_bytes, c_bytes, shared_bytes, thread_bytes;

    Plan(const fastddpm_conv_args &p, int32_t threads) : size(p) {
        depth = p.kernel * p.kernel * size.channels;
        pixels = p.n * size.out_height * size.out_width;
        blocks = divide_up(p.k, kColumns);
        row_tasks = divide_up(pixels, kMostRows);
        // With few pixels the threads share the channels, so that only one of them reads each weight.
        column_tasks = row_tasks < threads ? smaller(blocks, divide_up(threads, row_tasks)) : 1;
        if (column_tasks == 1) row_tasks = smaller(pixels, divide_up(row_tasks, threads) * threads);
        rows = divide_up(pixels, larger(1, row_tasks));
        row_tasks = divide_up(pixels, larger(1, rows));
        columns = divide_up(blocks, column_tasks) * kColumns;
        column_tasks = divide_up(p.k, columns);
        const int64_t *stride = p.weight_stride;
        const bool dense = stride[1] == p.kernel * p.kernel && (p.kernel == 1 || (stride[2] == p.kernel && stride[3] == 1));
        // Whatever the threads are.
        turned = sizeof(T) == sizeof(float) && !p.packed && dense && divide_up(pixels, kMostRows) <= kMostTurns;
        a_row = divide_up(smaller(kDepth<T>, depth), kLineOf<T>) * kLineOf<T> + kLineOf<T>;
        c_row = columns + kLine;
        a_bytes = whole_lines(rows * a_row * static_cast<int64_t>(sizeof(T)));
        c_bytes = whole_lines(rows * c_row * static_cast<int64_t>(sizeof(float)));
        shared_bytes = p.packed || turned ? 0 : blocks * depth * kColumns * static_cast<int64_t>(sizeof(T));
        thread_bytes = a_bytes + c_bytes + (turned ? kDepth<T> * kColumns * static_cast<int64_t>(sizeof(T)) : 0);
    }
};

// Columns d .. d + count - 1 of the patches of pixels first .. first + rows - 1.
template <typename T>
void gather(const fastddpm_conv_args &p, const Plan<T> &plan, int64_t first, int64_t rows, int64_t d, int64_t count,
            T *a) {
    const ConvSize &size = plan.size;
    const int64_t first_tap = d / size.channels, first_channel = d % size.channels;
    for (int64_t r = 0; r < rows; ++r, a += plan.a_row) {
        const int64_t pixel = first + r, x = pixel % size.out_width * p.stride - p.pad;
        const int64_t line = pixel / size.out_width, y = line % size.out_height * p.stride - p.pad;
        const int64_t n = line / size.out_height;
        int64_t down = first_tap / p.kernel, across = first_tap % p.kernel, c = first_channel;
        for (int64_t at = 0; at < count;) {
            const int64_t run = smaller(count - at, (c < p.c1 ? p.c1 : size.channels) - c);
            const int64_t row = y + down, column = x + across;
            if (row < 0 || row >= size.height || column < 0 || column >= size.width)
                for (int64_t i = 0; i < run; ++i) a[at + i] = 0;
            else
                read_pixel<T>(p, size, n, row, column, c, run, a + at);
            at += run;
            c += run;
            if (c < size.channels) continue;
            c = 0;
            across = across + 1 == p.kernel ? 0 : across + 1;
            down += across == 0;
        }
    }
}

// The same for channels c .. c + count - 1 of all taps, (channel, tap): as weights lie that are dense.
void gather_by_channel(const fastddpm_conv_args &p, const Plan<float> &plan, int64_t first, int64_t rows, int64_t c,
                       int64_t count, float *a) {
    const ConvSize &size = plan.size;
    const int64_t taps = p.kernel * p.kernel, in_x = larger(0, smaller(count, p.c1 - c));
    float pixel_values[kDepth<float>];
    for (int64_t r = 0; r < rows; ++r, a += plan.a_row) {
        const int64_t pixel = first + r, x = pixel % size.out_width * p.stride - p.pad;
        const int64_t line = pixel / size.out_width, y = line % size.out_height * p.stride - p.pad;
        const int64_t n = line / size.out_height;
        for (int64_t tap = 0; tap < taps; ++tap) {
            const int64_t row = y + tap / p.kernel, column = x + tap % p.kernel;
            if (row < 0 || row >= size.height || column < 0 || column >= size.width) {
                for (int64_t i = 0; i < count; ++i) a[i * taps + tap] = 0;
                continue;
            }
            if (in_x > 0) read_pixel<float>(p, size, n, row, column, c, in_x, pixel_values);
            if (in_x < count) read_pixel<float>(p, size, n, row, column, c + in_x, count - in_x, pixel_values + in_x);
            for (int64_t i = 0; i < count; ++i) a[i * taps + tap] = pixel_values[i];
        }
    }
}

// Weights of kColumns output channels from k, (words of the depth, kColumns).
template <typename T>
void pack_columns(const fastddpm_conv_args &p, int64_t channels, int64_t k, T *to) {
    const int64_t *stride = p.weight_stride, columns = smaller(kColumns, p.k - k);
    for (int64_t tap = 0; tap < p.kernel * p.kernel; ++tap, to += channels * kColumns) {
        const float *from = p.weight + k * stride[0] + tap / p.kernel * stride[2] + tap % p.kernel * stride[3];
        if constexpr (sizeof(T) == sizeof(float)) {
            turn(from, stride[0], stride[1], columns, channels, to, kColumns);
        } else {
            constexpr int64_t kTurned = 16;
            float turned[kTurned * kColumns];
            for (int64_t c = 0; c < channels; c += kTurned) {
                const int64_t count = smaller(kTurned, channels - c);
                turn(from + c * stride[1], stride[0], stride[1], columns, count, turned, kColumns);
                for (int64_t d = 0; d < count; d += 2)
                    for (int64_t i = 0; i < columns; i += kWidth) {
                        const float *low = turned + d * kColumns + i;
                        store(to + (c + d) * kColumns + 2 * i, paired(load(low), load(low + kColumns)));
                    }
            }
        }
    }
}

// Output channels k .. k + columns - 1 of the pixels first .. first + rows - 1. `own`: the thread's memory.
template <typename T>
void block_of_output(const fastddpm_conv_args &p, const Plan<T> &plan, int64_t first, int64_t rows, int64_t k,
                     int64_t columns, const T *packed, char *own) {
    T *a = reinterpret_cast<T *>(own);
    float *c = reinterpret_cast<float *>(own + plan.a_bytes);
    const int64_t taps = p.kernel * p.kernel, step = plan.turned ? kDepth<T> / taps * taps : kDepth<T>;
    for (int64_t d = 0; d < plan.depth; d += step) {
        const int64_t depth = smaller(step, plan.depth - d);
        if constexpr (sizeof(T) == sizeof(float)) {
            if (plan.turned && taps > 1)
                gather_by_channel(p, plan, first, rows, d / taps, depth / taps, a);
            else
                gather(p, plan, first, rows, d, depth, a);
        } else {
            gather(p, plan, first, rows, d, depth, a);
        }
        for (int64_t i = 0; i < columns; i += kPanel) {
            const T *block = packed + ((k + i) / kColumns * plan.depth + d) * kColumns;
            if constexpr (sizeof(T) == sizeof(float)) {
                float *b = reinterpret_cast<float *>(own + plan.a_bytes + plan.c_bytes);
                if (plan.turned && i % kColumns == 0)
                    turn(p.weight + (k + i) * p.weight_stride[0] + d, p.weight_stride[0], 1,
                         smaller(kColumns, columns - i), depth, b, kColumns);
                if (plan.turned) block = b;
            }
            product(rows, columns - i, a, plan.a_row, block + i % kColumns * Factors<T>::kDepth, depth, c + i, plan.c_row,
                    d > 0);
        }
    }
    const Finish finish(p, k, columns);
    const int64_t image_pixels = plan.size.out_height * plan.size.out_width, c_row = plan.c_row;
    int64_t n = first / image_pixels, left = image_pixels - first % image_pixels;  // pixels of image n
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t i = 0; i < columns; i += kWidth) finish(n, first + r, i, load(c + r * c_row + i));
        if (--left > 0) continue;
        left = image_pixels;
        ++n;
    }
}

template <typename T>
void pack(const fastddpm_conv_args &p, T *packed) {
    const int64_t channels = p.c1 + p.c2, size = p.kernel * p.kernel * channels * kColumns;
    for (int64_t k = 0; k < p.k; k += kColumns, packed += size) pack_columns(p, channels, k, packed);
}

template <typename T>
void convolve(const fastddpm_conv_args &p, int32_t threads) {
    const Plan<T> plan(p, threads);
    char *workspace = static_cast<char *>(p.workspace);
    T *made = reinterpret_cast<T *>(workspace);
    const T *packed = p.packed ? static_cast<const T *>(p.packed) : made;
    Shares shares(plan.row_tasks * plan.column_tasks, threads);
#pragma omp parallel num_threads(team_size(threads)) if (threads > 1)
    {
        char *own = workspace + plan.shared_bytes + thread_number() * plan.thread_bytes;
        if (plan.shared_bytes > 0) {
#pragma omp for schedule(dynamic)
            for (int64_t block = 0; block < plan.blocks; ++block)
                pack_columns(p, plan.size.channels, block * kColumns, made + block * plan.depth * kColumns);
        }
        shares.run([&](int64_t task) {
            const int64_t first = task / plan.column_tasks * plan.rows, k = task % plan.column_tasks * plan.columns;
            block_of_output(p, plan, first, smaller(plan.rows, plan.pixels - first), k, smaller(plan.columns, p.k - k),
                            packed, own);
        });
    }
}

bool in_float32(const fastddpm_conv_args &p) { return p.precision == FASTDDPM_FLOAT32; }

}  // namespace

bool patches_supported(const fastddpm_conv_args &p) { return in_float32(p) || (p.c1 + p.c2) % 2 == 0; }

int64_t patches_packed_bytes(const fastddpm_conv_args &p) {
    const int64_t size = in_float32(p) ? sizeof(float) : sizeof(uint16_t);
    return divide_up(p.k, kColumns) * kColumns * (p.c1 + p.c2) * p.kernel * p.kernel * size;
}

void pack_patches(const fastddpm_conv_args &p, void *packed) {
    in_float32(p) ? pack(p, static_cast<float *>(packed)) : pack(p, static_cast<uint16_t *>(packed));
}

int64_t patches_workspace(const fastddpm_conv_args &p, int32_t threads) {
    const auto bytes = [&](const auto &plan) { return plan.shared_bytes + threads * plan.thread_bytes; };
    return in_float32(p) ? bytes(Plan<float>(p, threads)) : bytes(Plan<uint16_t>(p, threads));
}

int32_t conv_patches(const fastddpm_conv_args &p, int32_t threads) {
    in_float32(p) ? convolve<float>(p, threads) : convolve<uint16_t>(p, threads);
    return FASTDDPM_OK;
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
