// The backward pass of attention on the CPU. With P the weights and S the scores before scaling:
//   dV = P^T dO    dP = dO V^T    dS = P * (dP - rowsum(P * dP)) scale    dQ = dS K    dK = dS^T Q
//
// P and dS of a sequence are kept in the packed form that the products of the second half read. Those compute dV and dK
// with channels as rows, so no two tasks add to the same number.
#include "attention.h"

namespace fastddpm {
namespace FASTDDPM_ISA {
namespace {

enum Operand { kQ, kK, kV, kGrad, kOperands };

// Pieces of the working memory of one sequence.
struct Sequence {
    float *keys, *values;        // packed, tokens as columns
    float *key_rows;             // packed, channels as columns
    float *q_turned, *grad_turned;  // (C, L)
    float *weights, *grad_scores;   // packed (L, L)
    float *copies;               // bfloat16 operands widened

    static int64_t turned_row(const AttentionArgs &p) { return divide_up(p.l, kLine) * kLine; }
    static int64_t floats(const AttentionArgs &p) {
        const int64_t copies = p.dtype == FASTDDPM_FLOAT32 ? 0 : kOperands * p.l * p.c;
        return divide_up(2 * whole_columns(p.l) * p.c + whole_columns(p.c) * p.l + 2 * p.c * turned_row(p) +
                             2 * whole_columns(p.l) * p.l + copies, kLine) * kLine;
    }
    Sequence(const AttentionArgs &p, float *memory)
        : keys(memory),
          values(keys + whole_columns(p.l) * p.c),
          key_rows(values + whole_columns(p.l) * p.c),
          q_turned(key_rows + whole_columns(p.c) * p.l),
          grad_turned(q_turned + p.c * turned_row(p)),
          weights(grad_turned + p.c * turned_row(p)),
          grad_scores(weights + whole_columns(p.l) * p.l),
          copies(grad_scores + whole_columns(p.l) * p.l) {}
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

Rows operand_rows(const AttentionArgs &p, const Sequence &memory, int operand, int64_t n) {
    const Source source = source_of(p, operand);
    return rows_of(p, source.tensor, source.stride, n, memory.copies + operand * p.l * p.c);
}

void widen_operands(const AttentionArgs &p, const Sequence &memory, int64_t n) {
    for (int operand = 0; operand < kOperands; ++operand) {
        const Source source = source_of(p, operand);
        widen_rows(p, source.tensor, source.stride, n, memory.copies + operand * p.l * p.c);
    }
}

constexpr int64_t kPackKinds = 5;

void pack(const AttentionArgs &p, const Sequence &memory, int64_t n, int64_t kind) {
    const Rows q = operand_rows(p, memory, kQ, n), k = operand_rows(p, memory, kK, n);
    const Rows v = operand_rows(p, memory, kV, n), grad = operand_rows(p, memory, kGrad, n);
    const int64_t row = Sequence::turned_row(p);
    switch (kind) {
        case 0:
            for (int64_t i = 0; i < p.l; i += kColumns) pack_transposed(k, p.l, p.c, i, memory.keys);
            break;
        case 1:
            for (int64_t i = 0; i < p.l; i += kColumns) pack_transposed(v, p.l, p.c, i, memory.values);
            break;
        case 2:
            for (int64_t i = 0; i < p.c; i += kColumns) pack_rows(k, p.c, p.l, i, memory.key_rows);
            break;
        case 3: turn(q.at, q.stride, 1, p.l, p.c, memory.q_turned, row); break;
        default: turn(grad.at, grad.stride, 1, p.l, p.c, memory.grad_turned, row); break;
    }
}

// Row i of the scores, in packed form, becomes the weights; row i of dP becomes that of dS.
void differentiate_row(const AttentionArgs &p, float *weights, float *grad_scores, float lse) {
    const int64_t panel = p.l * kColumns;
    // Columns beyond the last token hold nothing that is read, but must not spoil the sum.
    Vec sums{};
    for (int64_t j = 0; j < p.l; j += kWidth) {
        const int64_t at = j / kColumns * panel + j % kColumns;
        Vec weight = vexp(load(weights + at) * p.scale - lse), grad = load(grad_scores + at);
        for (int64_t lane = p.l - j; lane < kWidth; ++lane) weight[lane] = grad[lane] = 0;
        store(weights + at, weight);
        store(grad_scores + at, grad);
        sums += weight * grad;
    }
    const float row = sum(sums);
    for (int64_t j = 0; j < p.l; j += kWidth) {
        const int64_t at = j / kColumns * panel + j % kColumns;
        store(grad_scores + at, load(weights + at) * (load(grad_scores + at) - row) * p.scale);
    }
}

// Weights, dS and dQ of the query tokens first .. first + rows - 1.
void differentiate_rows(const AttentionArgs &p, const Sequence &memory, int64_t n, int64_t first, int64_t rows, float *c) {
    const Rows q = operand_rows(p, memory, kQ, n), grad = operand_rows(p, memory, kGrad, n);
    const int64_t panel = p.l * kColumns, c_row = whole_columns(p.c);
    float *weights = memory.weights + first * kColumns, *grad_scores = memory.grad_scores + first * kColumns;
    multiply(rows, q.row(first), q.stride, memory.keys, p.l, p.c, weights, kColumns, panel);
    multiply(rows, grad.row(first), grad.stride, memory.values, p.l, p.c, grad_scores, kColumns, panel);
    for (int64_t r = 0; r < rows; ++r)
        differentiate_row(p, weights + r * kColumns, grad_scores + r * kColumns, p.lse[n * p.l + first + r]);
    for (int64_t i = 0; i < p.c; i += kPanel)
        for (int64_t j = 0; j < p.l; j += kColumns)
            product(rows, p.c - i, grad_scores + j / kColumns * panel, kColumns,
                    memory.key_rows + (i / kColumns * p.l + j) * kColumns + i % kColumns, smaller(kColumns, p.l - j),
                    c + i, c_row, j > 0);
    for (int64_t r = 0; r < rows; ++r) write(p, c + r * c_row, p.c, 1, p.grad_q, (n * p.l + first + r) * p.c);
}

// Channels first .. first + rows - 1 of dV = P^T dO, or of dK = dS^T Q.
void differentiate_channels(const AttentionArgs &p, const Sequence &memory, int64_t n, bool of_keys, int64_t first,
                            int64_t rows, float *c) {
    const int64_t a_row = Sequence::turned_row(p), c_row = whole_columns(p.l);
    multiply(rows, (of_keys ? memory.q_turned : memory.grad_turned) + first * a_row, a_row,
             of_keys ? memory.grad_scores : memory.weights, p.l, p.l, c, c_row, kColumns);
    float *turned = c + kTaskRows * c_row;
    turn(c, c_row, 1, rows, p.l, turned, kTaskRows);
    void *tensor = of_keys ? p.grad_k : p.grad_v;
    for (int64_t j = 0; j < p.l; ++j) write(p, turned + j * kTaskRows, rows, 1, tensor, (n * p.l + j) * p.c + first);
}

}  // namespace

int32_t attention_backward(const fastddpm_attention_args &p, int32_t threads) {
    if (!attention_supported(p) || p.heads != 1 || p.precision != FASTDDPM_FLOAT32) return FASTDDPM_UNSUPPORTED;
    const int64_t thread_floats = kTaskRows * larger(2 * whole_columns(p.l), whole_columns(p.c));
    const int64_t channel_tasks = divide_up(p.c, kTaskRows);
    const Phases phases{4, {1, kPackKinds, divide_up(p.l, kTaskRows), 2 * channel_tasks}};
    return for_sequences(
        p, threads, Sequence::floats(p), thread_floats, phases,
        [&](int64_t n, float *memory, int phase, int64_t task, float *product) {
            const Sequence own(p, memory);
            const int64_t row = task * kTaskRows, channel = task % channel_tasks * kTaskRows;
            if (phase == 0)
                widen_operands(p, own, n);
            else if (phase == 1)
                pack(p, own, n, task);
            else if (phase == 2)
                differentiate_rows(p, own, n, row, smaller(kTaskRows, p.l - row), product);
            else
                differentiate_channels(p, own, n, task >= channel_tasks, channel, smaller(kTaskRows, p.c - channel), product);
        });
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
