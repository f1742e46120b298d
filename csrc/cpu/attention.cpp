// softmax(scale q k^T) v on the CPU: rows of scores are computed, turned into weights and multiplied by v in cache.
//
// A task is some query tokens of one sequence. Keys and values are packed once for each sequence. Every number is summed
// in one order, whatever the threads and the batch are.
#include "attention.h"

namespace fastddpm {
namespace FASTDDPM_ISA {
namespace {

// Pieces of the working memory of one sequence.
struct Sequence {
    float *keys, *values, *copies;  // packed; bfloat16 operands widened: q, k, v

    static int64_t floats(const AttentionArgs &p) {
        const int64_t copies = p.dtype == FASTDDPM_FLOAT32 ? 0 : 3 * p.l * p.c;
        return divide_up(whole_columns(p.l) * p.c + whole_columns(p.c) * p.l + copies, kLine) * kLine;
    }
    Sequence(const AttentionArgs &p, float *memory)
        : keys(memory), values(keys + whole_columns(p.l) * p.c), copies(values + whole_columns(p.c) * p.l) {}

    Rows q(const AttentionArgs &p, int64_t n) const { return rows_of(p, p.q, p.q_stride, n, copies); }
    Rows k(const AttentionArgs &p, int64_t n) const { return rows_of(p, p.k, p.k_stride, n, copies + p.l * p.c); }
    Rows v(const AttentionArgs &p, int64_t n) const { return rows_of(p, p.v, p.v_stride, n, copies + 2 * p.l * p.c); }
};

void widen_operands(const AttentionArgs &p, const Sequence &memory, int64_t n) {
    widen_rows(p, p.q, p.q_stride, n, memory.copies);
    widen_rows(p, p.k, p.k_stride, n, memory.copies + p.l * p.c);
    widen_rows(p, p.v, p.v_stride, n, memory.copies + 2 * p.l * p.c);
}

// A row of scores becomes e^(scale score - max), in place.
struct RowSum {
    float highest, total;
};

RowSum exponentiate(float *row, int64_t length, float scale) {
    const int64_t whole = length / kWidth * kWidth;
    Vec highest = splat(-__builtin_inff());
    for (int64_t i = 0; i < whole; i += kWidth) {
        const Vec s = load(row + i) * scale;
        store(row + i, s);
        highest = vmax(s, highest);
    }
    float top = -__builtin_inff();
    for (int j = 0; j < kWidth; ++j) top = highest[j] > top ? highest[j] : top;
    for (int64_t i = whole; i < length; ++i) {
        row[i] *= scale;
        top = row[i] > top ? row[i] : top;
    }
    Vec sums{};
    for (int64_t i = 0; i < whole; i += kWidth) {
        const Vec e = vexp(load(row + i) - top);
        store(row + i, e);
        sums += e;
    }
    float total = sum(sums);
    if (whole < length) {
        const Vec e = vexp(load_part(row + whole, length - whole) - top);
        store_part(row + whole, e, length - whole);
        for (int64_t j = 0; j < length - whole; ++j) total += e[j];
    }
    return {top, total};
}

void attend(const AttentionArgs &p, const Sequence &memory, int64_t n, int64_t first, int64_t rows, float *scores) {
    const int64_t score_row = whole_columns(p.l), out_row = whole_columns(p.c);
    float *out = scores + kTaskRows * score_row;
    const Rows q = memory.q(p, n);
    multiply(rows, q.row(first), q.stride, memory.keys, p.l, p.c, scores, score_row, kColumns);
    RowSum sums[kTaskRows];
    for (int64_t r = 0; r < rows; ++r) sums[r] = exponentiate(scores + r * score_row, p.l, p.scale);
    multiply(rows, scores, score_row, memory.values, p.c, p.l, out, out_row, kColumns);
    for (int64_t r = 0; r < rows; ++r) {
        write_row(p, out + r * out_row, 1 / sums[r].total, p.out, n * p.out_stride[0] + (first + r) * p.out_stride[1]);
        if (p.lse != nullptr)
            p.lse[n * p.l + first + r] = static_cast<float>(sums[r].highest + __builtin_log(sums[r].total));
    }
}

}  // namespace

int32_t attention(const fastddpm_attention_args &p, int32_t threads) {
    if (!attention_supported(p)) return FASTDDPM_UNSUPPORTED;
    const int64_t each = Sequence::floats(p), at_once = sequences_at_once(p, each, threads);
    const int64_t thread_floats = kTaskRows * (whole_columns(p.l) + whole_columns(p.c));
    Memory memory((at_once * each + threads * thread_floats) * static_cast<int64_t>(sizeof(float)));
    if (memory.failed()) return FASTDDPM_NO_MEMORY;
    float *sequences = memory.take<float>(at_once * each), *scores = memory.take<float>(threads * thread_floats);
    const int64_t key_tasks = divide_up(p.l, kColumns), pack_tasks = key_tasks + divide_up(p.c, kColumns);
    const int64_t row_tasks = divide_up(p.l, kTaskRows);
#pragma omp parallel num_threads(threads) if (threads > 1 && p.n * p.l * p.l * p.c > 65536)
    for (int64_t start = 0; start < p.n; start += at_once) {
        const int64_t count = smaller(at_once, p.n - start);
        if (p.dtype != FASTDDPM_FLOAT32) {
#pragma omp for
            for (int64_t i = 0; i < count; ++i) widen_operands(p, Sequence(p, sequences + i * each), start + i);
        }
#pragma omp for
        for (int64_t task = 0; task < count * pack_tasks; ++task) {
            const int64_t i = task / pack_tasks, block = task % pack_tasks;
            const Sequence own(p, sequences + i * each);
            if (block < key_tasks)
                pack_transposed(own.k(p, start + i), p.l, p.c, block * kColumns, own.keys);
            else
                pack_rows(own.v(p, start + i), p.c, p.l, (block - key_tasks) * kColumns, own.values);
        }
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < count * row_tasks; ++task) {
            const int64_t i = task / row_tasks, first = task % row_tasks * kTaskRows;
            attend(p, Sequence(p, sequences + i * each), start + i, first, smaller(kTaskRows, p.l - first),
                   scores + thread_number() * thread_floats);
        }
    }
    return FASTDDPM_OK;
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
