// Shared by both passes of attention: operands in single precision, packed for the matrix product, whose factors are of
// type T, float or bfloat16.
#pragma once
#include "kernels.h"
#include "pack.h"
#include "shares.h"

namespace fastddpm {
namespace FASTDDPM_ISA {

using AttentionArgs = fastddpm_attention_args;

constexpr int64_t kTaskRows = 48;       // rows of a task's results
constexpr int64_t kProductDepth = 256;  // of a product, so that the part of b that it reads stays in the cache

inline bool attention_supported(const AttentionArgs &p) {
    const auto known = [](int32_t dtype) { return dtype == FASTDDPM_FLOAT32 || dtype == FASTDDPM_BFLOAT16; };
    return known(p.dtype) && known(p.precision) && p.n > 0 && p.l > 0 && p.c > 0 && p.heads > 0 && p.n % p.heads == 0;
}

// Where sequence n of a tensor begins.
inline int64_t start_of(const AttentionArgs &p, const int64_t *stride, int64_t n) {
    return n / p.heads * stride[0] + n % p.heads * p.c;
}

inline void widen(const uint16_t *from, int64_t count, float *to) {
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) store(to + i, load(from + i));
    if (i < count) store_part(to + i, load_part(from + i, count - i), count - i);
}

// Sequence n of an operand: the operand itself, or if it is bfloat16 the widened `copy`.
inline Rows rows_of(const AttentionArgs &p, const void *tensor, const int64_t *stride, int64_t n, float *copy) {
    if (p.dtype == FASTDDPM_FLOAT32) return {static_cast<const float *>(tensor) + start_of(p, stride, n), stride[1]};
    return {copy, p.c};
}

inline void widen_rows(const AttentionArgs &p, const void *tensor, const int64_t *stride, int64_t n, float *copy) {
    if (p.dtype == FASTDDPM_FLOAT32) return;
    const uint16_t *from = static_cast<const uint16_t *>(tensor) + start_of(p, stride, n);
    for (int64_t i = 0; i < p.l; ++i) widen(from + i * stride[1], p.c, copy + i * p.c);
}

// Rows as factors, whole words of `count` elements.
inline void round_rows(const Rows &from, int64_t rows, int64_t count, uint16_t *to, int64_t to_row) {
    for (int64_t r = 0; r < rows; ++r, to += to_row) {
        const float *row = from.row(r);
        int64_t i = 0;
        for (; i + kWidth <= count; i += kWidth) store(to + i, load(row + i));
        if (i < count) store_part(to + i, load_part(row + i, count - i), count - i);
        if (count % 2 != 0) to[count] = 0;
    }
}

// c = a b for some rows of a and all of a packed b (depth, columns), of whole words. Panel i of c begins at
// c + i c_panel; its rows are c_row apart.
template <typename T>
inline void multiply(int64_t rows, const T *a, int64_t a_row, const T *packed, int64_t columns, int64_t depth, float *c,
                     int64_t c_row, int64_t c_panel) {
    for (int64_t d = 0; d < depth; d += kProductDepth)
        for (int64_t i = 0; i < columns; i += kPanel)
            product(rows, columns - i, a + d, a_row,
                    packed + (i / kColumns * depth + d) * kColumns + i % kColumns * Factors<T>::kDepth,
                    smaller(kProductDepth, depth - d), c + i / kColumns * c_panel + i % kColumns, c_row, d > 0);
}

// The work on one sequence: phases, one after another, of independent tasks.
struct Phases {
    int count;
    int64_t tasks[4];
};

// Calls run(sequence n, its memory, phase, task, the thread's memory) for every task. With enough sequences a thread
// takes whole ones, which stay in its cache; otherwise the threads share the tasks of each phase.
template <typename Run>
int32_t for_sequences(const AttentionArgs &p, int32_t threads, int64_t sequence_floats, int64_t thread_floats,
                      const Phases &phases, Run run) {
    const bool whole = p.n >= 4 * threads;
    const int64_t memories = whole ? threads : p.n;
    Memory memory((memories * sequence_floats + threads * thread_floats) * static_cast<int64_t>(sizeof(float)));
    if (memory.failed()) return FASTDDPM_NO_MEMORY;
    float *sequences = memory.take<float>(memories * sequence_floats);
    float *own = memory.take<float>(threads * thread_floats);
    Shares shares(p.n, threads);
#pragma omp parallel num_threads(team_size(threads)) if (threads > 1 && p.n * p.l * p.l * p.c > 65536)
    {
        float *of_thread = own + thread_number() * thread_floats;
        if (whole) {
            float *of_sequence = sequences + thread_number() * sequence_floats;
            shares.run([&](int64_t n) {
                for (int phase = 0; phase < phases.count; ++phase)
                    for (int64_t task = 0; task < phases.tasks[phase]; ++task)
                        run(n, of_sequence, phase, task, of_thread);
            });
        } else {
            for (int phase = 0; phase < phases.count; ++phase) {
                const int64_t tasks = phases.tasks[phase];
#pragma omp for schedule(dynamic)
                for (int64_t i = 0; i < p.n * tasks; ++i)
                    run(i / tasks, sequences + i / tasks * sequence_floats, phase, i % tasks, of_thread);
            }
        }
    }
    return FASTDDPM_OK;
}

// Writes `count` results times a factor, in the tensor's dtype, from its element `at`.
inline void write(const AttentionArgs &p, const float *from, int64_t count, float factor, void *tensor, int64_t at) {
    float *wide = static_cast<float *>(tensor) + at;
    uint16_t *narrow = static_cast<uint16_t *>(tensor) + at;
    const bool is_wide = p.dtype == FASTDDPM_FLOAT32;
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) {
        const Vec v = load(from + i) * factor;
        is_wide ? store(wide + i, v) : store(narrow + i, v);
    }
    if (i == count) return;
    const Vec v = load_part(from + i, count - i) * factor;
    is_wide ? store_part(wide + i, v, count - i) : store_part(narrow + i, v, count - i);
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
