// The backward pass of attention on the CPU. With P the weights and S the scores before scaling:
//   dV = P^T dO    dP = dO V^T    dS = P * (dP - rowsum(P * dP)) scale    dQ = dS K    dK = dS^T Q
//
// P and dS of a sequence are kept in the packed form that the products of the second half read. Those compute dV and dK
// with channels as rows, so no two tasks add to the same number. Factors are of type T, float or bfloat16.
#include "attention.h"

namespace fastddpm {
namespace FASTDDPM_ISA {
namespace {

enum Operand { kQ, kK, kV, kGrad, kOperands };

constexpr int64_t kFloat = sizeof(float);

// Pieces of the working memory of one sequence.
template <typename T>
struct Sequence {
    int64_t keys_size, rows_size, turned_row, scores_size;
    T *keys, *values;            // packed, tokens as columns
    T *key_rows;                 // packed, channels as columns
    T *q_turned, *grad_turned;   // (C, L)
    T *weights, *grad_scores;    // packed (L, L)
    float *copies;               // bfloat16 operands widened

    static int64_t row_of(const AttentionArgs &p) { return divide_up(p.l, kLineOf<T>) * kLineOf<T>; }
    static int64_t floats(const AttentionArgs &p) {
        const int64_t copies = p.dtype == FASTDDPM_FLOAT32 ? 0 : kOperands * p.l * p.c;
        const int64_t factors = 2 * whole_columns(p.l) * whole_words<T>(p.c) + whole_columns(p.c) * whole_words<T>(p.l) +
                                2 * p.c * row_of(p) + 2 * whole_columns(p.l) * whole_words<T>(p.l);
        return divide_up(divide_up(factors * static_cast<int64_t>(sizeof(T)), kFloat) + copies, kLine) * kLine;
    }
    Sequence(const AttentionArgs &p, float *memory)
        : keys_size(whole_columns(p.l) * whole_words<T>(p.c)),
          rows_size(whole_columns(p.c) * whole_words<T>(p.l)),
          turned_row(row_of(p)),
          scores_size(whole_columns(p.l) * whole_words<T>(p.l)),
          keys(reinterpret_cast<T *>(memory)),
          values(keys + keys_size),
          key_rows(values + keys_size),
          q_turned(key_rows + rows_size),
          grad_turned(q_turned + p.c * turned_row),
          weights(grad_turned + p.c * turned_row),
          grad_scores(weights + scores_size),
          copies(reinterpret_cast<float *>(grad_scores + scores_size + scores_size % 2)) {}
};

// Working memory of a thread: of a task's rows the scores, which become the weights, dP, which becomes dS, and results;
// and in bfloat16, what of them is a factor.
template <typename T>
struct Task {
    int64_t score_row, out_row;
    float *scores, *grads, *out;
    T *factors;  // q or dO
    T *grad_factors;

    Task(const AttentionArgs &p, float *memory)
        : score_row(whole_columns(p.l)),
          out_row(whole_columns(p.c)),
          scores(memory),
          grads(scores + kTaskRows * score_row),
          out(grads + kTaskRows * score_row),
          factors(reinterpret_cast<T *>(out + kTaskRows * out_row)),
          grad_factors(factors + kTaskRows * out_row) {}

    static int64_t floats(const AttentionArgs &p) {
        const int64_t score_row = whole_columns(p.l), out_row = whole_columns(p.c);
        const int64_t factors = sizeof(T) == sizeof(float) ? 0 : (score_row + out_row) / 2;
        return kTaskRows * (2 * score_row + out_row + factors);
    }
};

struct Source {
    const void *tensor;
    int64_t stride[2];
};

Source source_of(const AttentionArgs &p, int operand) {
    switch (operand) {
        case kQ: return {p.q, {p.q_stride[0], p.q_stride[1]}};
        case kK: return {p.k, {p.k_stride[0], p.k_stride[1]}};
        case kV: return {p.v, {p.v_stride[0], p.v_stride[1]}};
        default: return {p.grad, {p.l * p.c, p.c}};
    }
}

Rows operand_rows(const AttentionArgs &p, float *copies, int operand, int64_t n) {
    const Source source = source_of(p, operand);
    return rows_of(p, source.tensor, source.stride, n, copies + operand * p.l * p.c);
}

void widen_operands(const AttentionArgs &p, float *copies, int64_t n) {
    for (int operand = 0; operand < kOperands; ++operand) {
        const Source source = source_of(p, operand);
        widen_rows(p, source.tensor, source.stride, n, copies + operand * p.l * p.c);
    }
}

// Writes the tokens of one sequence as (C, L).
void turn_rows(const AttentionArgs &p, const Rows &from, float *to, int64_t row) {
    turn(from.at, from.stride, 1, p.l, p.c, to, row);
}
void turn_rows(const AttentionArgs &p, const Rows &from, uint16_t *to, int64_t row) {
    constexpr int64_t kTokens = 64;
    float block[kWidth * kTokens];
    for (int64_t c = 0; c < p.c; c += kWidth)
        for (int64_t i = 0; i < p.l; i += kTokens) {
            const int64_t channels = smaller(kWidth, p.c - c), tokens = smaller(kTokens, p.l - i);
            turn(from.row(i) + c, from.stride, 1, tokens, channels, block, kTokens);
            round_rows(Rows{block, kTokens}, channels, tokens, to + c * row + i, row);
        }
}

constexpr int64_t kPackKinds = 5;

template <typename T>
void pack(const AttentionArgs &p, const Sequence<T> &memory, int64_t n, int64_t kind) {
    const auto rows = [&](int operand) { return operand_rows(p, memory.copies, operand, n); };
    switch (kind) {
        case 0:
            for (int64_t i = 0; i < p.l; i += kColumns) pack_transposed(rows(kK), p.l, p.c, i, memory.keys);
            break;
        case 1:
            for (int64_t i = 0; i < p.l; i += kColumns) pack_transposed(rows(kV), p.l, p.c, i, memory.values);
            break;
        case 2:
            for (int64_t i = 0; i < p.c; i += kColumns) pack_rows(rows(kK), p.c, p.l, i, memory.key_rows);
            break;
        case 3: turn_rows(p, rows(kQ), memory.q_turned, memory.turned_row); break;
        default: turn_rows(p, rows(kGrad), memory.grad_turned, memory.turned_row); break;
    }
}

// A row of the scores becomes the weights; a row of dP becomes that of dS.
void differentiate_row(const AttentionArgs &p, float *weights, float *grad_scores, float lse) {
    // Columns beyond the last token hold nothing that is read, but must not spoil the sum.
    Vec sums{};
    for (int64_t j = 0; j < p.l; j += kWidth) {
        Vec weight = vexp(load(weights + j) * p.scale - lse), grad = load(grad_scores + j);
        for (int64_t lane = p.l - j; lane < kWidth; ++lane) weight[lane] = grad[lane] = 0;
        store(weights + j, weight);
        store(grad_scores + j, grad);
        sums += weight * grad;
    }
    const float row = sum(sums);
    for (int64_t j = 0; j < p.l; j += kWidth)
        store(grad_scores + j, load(weights + j) * (load(grad_scores + j) - row) * p.scale);
}

// Rows first .. first + rows - 1 of a packed (L, L).
void pack_scores(const AttentionArgs &p, const Rows &from, int64_t first, int64_t rows, float *packed) {
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t j = 0; j < p.l; j += kColumns)
            memcpy(packed + j * p.l + (first + r) * kColumns, from.row(r) + j,
                   static_cast<size_t>(smaller(kColumns, p.l - j)) * sizeof(float));
}
void pack_scores(const AttentionArgs &p, const Rows &from, int64_t first, int64_t rows, uint16_t *packed) {
    for (int64_t r = 0; r < rows; r += 2)
        for (int64_t j = 0; j < p.l; j += kColumns)
            pack_word(from.row(r) + j, r + 1 < rows ? from.row(r + 1) + j : nullptr, smaller(kColumns, p.l - j),
                      packed + j * whole_words<uint16_t>(p.l) + (first + r) * kColumns);
}

// Rows of a task as factors: themselves, or rounded to `to`.
template <typename T>
struct FactorRows {
    const T *at;
    int64_t stride;
};
FactorRows<float> factors_of(const Rows &from, int64_t, int64_t, float *, int64_t) { return {from.at, from.stride}; }
FactorRows<uint16_t> factors_of(const Rows &from, int64_t rows, int64_t count, uint16_t *to, int64_t row) {
    round_rows(from, rows, count, to, row);
    return {to, row};
}

// Weights, dS and dQ of the query tokens first .. first + rows - 1.
template <typename T>
void differentiate_rows(const AttentionArgs &p, const Sequence<T> &memory, int64_t n, int64_t first, int64_t rows,
                        const Task<T> &own) {
    const Rows q = operand_rows(p, memory.copies, kQ, n), grad = operand_rows(p, memory.copies, kGrad, n);
    const auto multiply_rows = [&](const Rows &from, const T *packed, float *to) {
        const FactorRows<T> a = factors_of(Rows{from.row(first), from.stride}, rows, p.c, own.factors, own.out_row);
        multiply(rows, a.at, a.stride, packed, p.l, whole_words<T>(p.c), to, own.score_row, kColumns);
    };
    multiply_rows(q, memory.keys, own.scores);
    multiply_rows(grad, memory.values, own.grads);
    for (int64_t r = 0; r < rows; ++r)
        differentiate_row(p, own.scores + r * own.score_row, own.grads + r * own.score_row, p.lse[n * p.l + first + r]);
    const Rows grad_scores{own.grads, own.score_row};
    pack_scores(p, Rows{own.scores, own.score_row}, first, rows, memory.weights);
    pack_scores(p, grad_scores, first, rows, memory.grad_scores);
    const FactorRows<T> a = factors_of(grad_scores, rows, p.l, own.grad_factors, own.score_row);
    multiply(rows, a.at, a.stride, memory.key_rows, p.c, whole_words<T>(p.l), own.out, own.out_row, kColumns);
    for (int64_t r = 0; r < rows; ++r) write(p, own.out + r * own.out_row, p.c, 1, p.grad_q, (n * p.l + first + r) * p.c);
}

// Channels first .. first + rows - 1 of dV = P^T dO, or of dK = dS^T Q.
template <typename T>
void differentiate_channels(const AttentionArgs &p, const Sequence<T> &memory, int64_t n, bool of_keys, int64_t first,
                            int64_t rows, const Task<T> &own) {
    multiply(rows, (of_keys ? memory.q_turned : memory.grad_turned) + first * memory.turned_row, memory.turned_row,
             of_keys ? memory.grad_scores : memory.weights, p.l, whole_words<T>(p.l), own.scores, own.score_row, kColumns);
    turn(own.scores, own.score_row, 1, rows, p.l, own.grads, kTaskRows);
    void *tensor = of_keys ? p.grad_k : p.grad_v;
    for (int64_t j = 0; j < p.l; ++j) write(p, own.grads + j * kTaskRows, rows, 1, tensor, (n * p.l + j) * p.c + first);
}

template <typename T>
int32_t differentiate(const AttentionArgs &p, int32_t threads) {
    const int64_t channel_tasks = divide_up(p.c, kTaskRows);
    const Phases phases{4, {1, kPackKinds, divide_up(p.l, kTaskRows), 2 * channel_tasks}};
    return for_sequences(
        p, threads, Sequence<T>::floats(p), Task<T>::floats(p), phases,
        [&](int64_t n, float *memory, int phase, int64_t task, float *of_thread) {
            const Sequence<T> own(p, memory);
            const Task<T> of_task(p, of_thread);
            const int64_t row = task * kTaskRows, channel = task % channel_tasks * kTaskRows;
            if (phase == 0)
                widen_operands(p, own.copies, n);
            else if (phase == 1)
                pack(p, own, n, task);
            else if (phase == 2)
                differentiate_rows(p, own, n, row, smaller(kTaskRows, p.l - row), of_task);
            else
                differentiate_channels(p, own, n, task >= channel_tasks, channel, smaller(kTaskRows, p.c - channel), of_task);
        });
}

}  // namespace

int32_t attention_backward(const fastddpm_attention_args &p, int32_t threads) {
    if (!attention_supported(p) || p.heads != 1) return FASTDDPM_UNSUPPORTED;
    return p.precision == FASTDDPM_BFLOAT16 ? differentiate<uint16_t>(p, threads) : differentiate<float>(p, threads);
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
