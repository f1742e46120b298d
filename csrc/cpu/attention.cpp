// softmax(scale q k^T) v on the CPU: rows of scores are computed, turned into weights and multiplied by v in cache.
//
// A task is a few query tokens of one sequence. Keys and values are packed once per sequence. Every sum has one order,
// which depends neither on the number of threads nor on the batch.
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
        write(p, out + r * out_row, p.c, 1 / sums[r].total, p.out, start_of(p, p.out_stride, n) + (first + r) * p.out_stride[1]);
        if (p.lse != nullptr)
            p.lse[n * p.l + first + r] = static_cast<float>(sums[r].highest + __builtin_log(sums[r].total));
    }
}

}  // namespace

int32_t attention(const fastddpm_attention_args &p, int32_t threads) {
    if (!attention_supported(p)) return FASTDDPM_UNSUPPORTED;
    const int64_t thread_floats = kTaskRows * (whole_columns(p.l) + whole_columns(p.c));
    const int64_t key_tasks = divide_up(p.l, kColumns);
    const Phases phases{3, {1, key_tasks + divide_up(p.c, kColumns), divide_up(p.l, kTaskRows)}};
    return for_sequences(
        p, threads, Sequence::floats(p), thread_floats, phases,
        [&](int64_t n, float *memory, int phase, int64_t task, float *scores) {
            const Sequence own(p, memory);
            if (phase == 0)
                widen_operands(p, own, n);
            else if (phase == 2)
                attend(p, own, n, task * kTaskRows, smaller(kTaskRows, p.l - task * kTaskRows), scores);
            else if (task < key_tasks)
                pack_transposed(own.k(p, n), p.l, p.c, task * kColumns, own.keys);
            else
                pack_rows(own.v(p, n), p.c, p.l, (task - key_tasks) * kColumns, own.values);
        });
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
