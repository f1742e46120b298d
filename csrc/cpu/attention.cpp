// softmax(scale q k^T) v on the CPU: rows of scores are computed, turned into weights and multiplied by v in cache.
//
// A task is a few query tokens of one sequence. Keys and values are packed once per sequence. Every sum has one order,
// which depends neither on the number of threads nor on the batch.
#include "attention.h"

namespace fastddpm {
namespace FASTDDPM_ISA {
namespace {

constexpr int64_t kFloat = sizeof(float);

// Pieces of the working memory of one sequence; factors are of type T.
template <typename T>
struct Sequence {
    T *keys, *values;  // packed
    float *copies;     // bfloat16 operands widened: q, k, v

    static int64_t keys_size(const AttentionArgs &p) { return whole_columns(p.l) * whole_words<T>(p.c); }
    static int64_t values_size(const AttentionArgs &p) { return whole_columns(p.c) * whole_words<T>(p.l); }
    static int64_t floats(const AttentionArgs &p) {
        const int64_t packed = (keys_size(p) + values_size(p)) * static_cast<int64_t>(sizeof(T)) / kFloat;
        const int64_t copies = p.dtype == FASTDDPM_FLOAT32 ? 0 : 3 * p.l * p.c;
        return divide_up(packed + copies, kLine) * kLine;
    }
    Sequence(const AttentionArgs &p, float *memory)
        : keys(reinterpret_cast<T *>(memory)),
          values(keys + keys_size(p)),
          copies(reinterpret_cast<float *>(values + values_size(p))) {}

    Rows q(const AttentionArgs &p, int64_t n) const { return rows_of(p, p.q, p.q_stride, n, copies); }
    Rows k(const AttentionArgs &p, int64_t n) const { return rows_of(p, p.k, p.k_stride, n, copies + p.l * p.c); }
    Rows v(const AttentionArgs &p, int64_t n) const { return rows_of(p, p.v, p.v_stride, n, copies + 2 * p.l * p.c); }
};

// Working memory of a thread: a task's scores and results, and where they are not the operands themselves, its query
// tokens and weights as factors.
template <typename T>
struct Task {
    int64_t score_row, out_row, query_row;
    float *scores, *out;
    T *queries, *weights;

    Task(const AttentionArgs &p, float *memory)
        : score_row(whole_columns(p.l)),
          out_row(whole_columns(p.c)),
          query_row(whole_words<T>(p.c)),
          scores(memory),
          out(scores + kTaskRows * score_row),
          queries(reinterpret_cast<T *>(out + kTaskRows * out_row)),
          weights(queries + kTaskRows * out_row) {}

    static int64_t floats(const AttentionArgs &p) {
        const int64_t row = whole_columns(p.l) + whole_columns(p.c);
        return kTaskRows * (sizeof(T) == sizeof(float) ? row : row + row / 2);
    }
};

template <typename T>
void widen_operands(const AttentionArgs &p, const Sequence<T> &memory, int64_t n) {
    widen_rows(p, p.q, p.q_stride, n, memory.copies);
    widen_rows(p, p.k, p.k_stride, n, memory.copies + p.l * p.c);
    widen_rows(p, p.v, p.v_stride, n, memory.copies + 2 * p.l * p.c);
}

struct RowSum {
    float highest, total;
};

// Writes e^(scale score - max) of a row of scores, which may be `to`.
template <typename T>
RowSum exponentiate(float *row, int64_t length, float scale, T *to) {
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
        store(to + i, e);
        sums += e;
    }
    float total = sum(sums);
    if (whole < length) {
        const Vec e = vexp(load_part(row + whole, length - whole) - top);
        store_part(to + whole, e, length - whole);
        for (int64_t j = 0; j < length - whole; ++j) total += e[j];
    }
    return {top, total};
}

template <typename T>
void attend(const AttentionArgs &p, const Sequence<T> &memory, int64_t n, int64_t first, int64_t rows, const Task<T> &own) {
    constexpr bool kRounded = sizeof(T) != sizeof(float);
    const Rows q = memory.q(p, n);
    RowSum sums[kTaskRows];
    if constexpr (kRounded) {
        round_rows(Rows{q.row(first), q.stride}, rows, p.c, own.queries, own.query_row);
        multiply(rows, own.queries, own.query_row, memory.keys, p.l, own.query_row, own.scores, own.score_row, kColumns);
        for (int64_t r = 0; r < rows; ++r) {
            T *weights = own.weights + r * own.score_row;
            sums[r] = exponentiate(own.scores + r * own.score_row, p.l, p.scale, weights);
            if (p.l % 2 != 0) weights[p.l] = 0;
        }
        multiply(rows, own.weights, own.score_row, memory.values, p.c, whole_words<T>(p.l), own.out, own.out_row, kColumns);
    } else {
        multiply(rows, q.row(first), q.stride, memory.keys, p.l, p.c, own.scores, own.score_row, kColumns);
        for (int64_t r = 0; r < rows; ++r) {
            float *scores = own.scores + r * own.score_row;
            sums[r] = exponentiate(scores, p.l, p.scale, scores);
        }
        multiply(rows, own.scores, own.score_row, memory.values, p.c, p.l, own.out, own.out_row, kColumns);
    }
    for (int64_t r = 0; r < rows; ++r) {
        write(p, own.out + r * own.out_row, p.c, 1 / sums[r].total, p.out,
              start_of(p, p.out_stride, n) + (first + r) * p.out_stride[1]);
        if (p.lse != nullptr)
            p.lse[n * p.l + first + r] = static_cast<float>(sums[r].highest + __builtin_log(sums[r].total));
    }
}

template <typename T>
int32_t attend_all(const AttentionArgs &p, int32_t threads) {
    const int64_t key_tasks = divide_up(p.l, kColumns);
    const Phases phases{3, {1, key_tasks + divide_up(p.c, kColumns), divide_up(p.l, kTaskRows)}};
    return for_sequences(
        p, threads, Sequence<T>::floats(p), Task<T>::floats(p), phases,
        [&](int64_t n, float *memory, int phase, int64_t task, float *of_thread) {
            const Sequence<T> own(p, memory);
            if (phase == 0)
                widen_operands(p, own, n);
            else if (phase == 2)
                attend(p, own, n, task * kTaskRows, smaller(kTaskRows, p.l - task * kTaskRows), Task<T>(p, of_thread));
            else if (task < key_tasks)
                pack_transposed(own.k(p, n), p.l, p.c, task * kColumns, own.keys);
            else
                pack_rows(own.v(p, n), p.c, p.l, (task - key_tasks) * kColumns, own.values);
        });
}

}  // namespace

int32_t attention(const fastddpm_attention_args &p, int32_t threads) {
    if (!attention_supported(p)) return FASTDDPM_UNSUPPORTED;
    return p.precision == FASTDDPM_BFLOAT16 ? attend_all<uint16_t>(p, threads) : attend_all<float>(p, threads);
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
