/* The C interface of the native libraries: plain pointers, sizes, strides and codes; no torch and no Python.
 *
 * Each operation takes one structure. The CPU library exports fastddpm_cpu_<operation>(args, threads), the CUDA
 * library fastddpm_cuda_<operation>(args, stream) on the calling thread's current device. Both return 0, or a code
 * below or (positive) the CUDA runtime's, that fastddpm_error_text turns into words. kernels/interface.py mirrors the
 * structures; what an operation computes is specified by kernels/<operation>/reference.py.
 *
 * All pointers are to the device that runs the operation. "Image" tensors are dense (N, C, H, W) in one of two layouts.
 */
#ifndef FASTDDPM_H
#define FASTDDPM_H
#include <stdint.h>

#ifdef __cplusplus
#define FASTDDPM_API extern "C" __attribute__((visibility("default")))
#else
#define FASTDDPM_API __attribute__((visibility("default")))
#endif

enum { FASTDDPM_FLOAT32 = 0, FASTDDPM_BFLOAT16 = 1, FASTDDPM_FLOAT16 = 2, FASTDDPM_UINT8 = 3 }; /* dtype codes */
enum { FASTDDPM_PATCHES = 0, FASTDDPM_WINOGRAD_4X4 = 1, FASTDDPM_WINOGRAD_2X2 = 2, FASTDDPM_WINOGRAD_2X4 = 3 };
enum { FASTDDPM_NCHW = 0, FASTDDPM_NHWC = 1 };                                               /* layout codes */
enum { FASTDDPM_OK = 0, FASTDDPM_UNSUPPORTED = -1, FASTDDPM_NO_MEMORY = -2 };                /* return codes */

/* The key of an operation's random numbers (kernels/philox): image n draws from (images[n], *seed, *step). */
typedef struct {
    const int64_t *images; /* (N,) */
    const int64_t *seed, *step;
} fastddpm_key;

typedef struct {
    float *out;  /* (N, num) */
    int64_t n, num;
    int64_t stream_id; /* Philox stream */
    fastddpm_key key;
} fastddpm_random_normal_args;

/* y = dropout(silu(scale_shift(group_norm(concat(x, skip) + temb)))); null pointers for what is absent. */
typedef struct {
    const void *x, *skip;              /* (N, C1, H, W), (N, C2, H, W): dtype, layout */
    const void *weight, *bias;         /* (C,): param_dtype; C = C1 + C2 */
    const void *temb, *scale, *shift;  /* (N, C): param_dtype; rows of temb are temb_stride apart, 0 for one row */
    void *y;                           /* (N, C, H, W): dtype, layout */
    float *mean, *rstd;                /* (N, G): written forward, read backward */
    fastddpm_key key;                  /* of the dropout mask; read only when dropout > 0 */
    int64_t n, c1, c2, height, width, groups;
    int64_t dropout_stream;            /* Philox stream of the mask */
    int64_t temb_stride;
    float eps, dropout;
    int32_t silu, layout, dtype, param_dtype;
    /* Backward only. Sums over the batch are left to a fixed order: grad_weight and grad_bias are deterministic. */
    const void *grad;                             /* (N, C, H, W): dtype, layout */
    void *grad_x, *grad_skip;                     /* dtype, layout */
    float *grad_weight, *grad_bias;               /* (C,) */
    float *grad_temb, *grad_scale, *grad_shift;   /* (N, C), null when absent */
} fastddpm_group_norm_silu_args;

/* out = softmax(scale q k^T) v for N sequences of L tokens and C channels; channels are adjacent. With several heads,
 * which the backward pass does not take, sequence n is head n % heads of image n / heads, and its channels follow those
 * of the head before. */
typedef struct {
    const void *q, *k, *v;
    void *out;
    float *lse;                          /* (N, L): written forward, read backward; may be null forward */
    int64_t n, l, c, heads;
    int64_t q_stride[2], k_stride[2], v_stride[2], out_stride[2]; /* elements between images, between tokens */
    float scale;
    int32_t dtype;
    int32_t precision;                   /* with bfloat16, the factors of the products are rounded to it */
    /* Backward only; dense (N, L, C). */
    const void *grad;
    void *grad_q, *grad_k, *grad_v;
} fastddpm_attention_args;

typedef struct {
    const void *x0;        /* (N, C, H, W): uint8 or dtype float32; strides in elements */
    const int64_t *t;      /* (N,) */
    const float *table;    /* (T, 2): sqrt(alpha_bar_t), sqrt(1 - alpha_bar_t) */
    const uint8_t *flip;   /* (N,) or null */
    const float *noise;    /* dense NCHW, or null: drawn from key */
    float *x_t, *eps;      /* dense NCHW */
    fastddpm_key key;
    int64_t n, c, height, width, timesteps;
    int64_t x0_stride[4];
    int32_t dtype;
} fastddpm_q_sample_args;

typedef struct {
    float *x;                  /* (N, C, H, W), strides in elements: x_t, replaced by x_{t-1} */
    const void *out;           /* (N, C or 2C, H, W): dtype, strides in elements */
    const float *table;        /* (S, 9), columns in kernels/reverse_step */
    const int64_t *timesteps;  /* (S,) */
    const int64_t *index;      /* the row to apply, read when the kernel runs */
    const float *noise;        /* dense NCHW, or null: drawn from key, its step being timesteps[*index] */
    float *x0;                 /* dense NCHW, or null: x_0 prediction of the step before, replaced by this step's; read
                                * if column 8 is not 0, and if it is null then, the result is NaN */
    fastddpm_key key;          /* step is not read */
    int64_t n, c, height, width, steps;
    int64_t x_stride[4], out_stride[4];
    float clip;                /* <= 0: none */
    int32_t variance;          /* 0 fixed, 1 learned, 2 learned_range */
    int32_t dtype;
} fastddpm_reverse_step_args;

/* A convolution or, with kernel 1, a linear layer over pixels, with the operations before and after it:
 * out = conv(silu(gain * concat(x, skip) + offset)) + bias + temb + residual. NHWC throughout; null for what is absent.
 * Tensors are float32. With precision bfloat16, the factors of the products are rounded to it; all sums are float32. */
typedef struct {
    const float *x, *skip;      /* (N, H, W, C1), (N, H, W, C2); C = C1 + C2 */
    const float *gain, *offset; /* (N, C), given together */
    const float *weight;        /* element (k, c, i, j) at the sum of index times stride; strides may be negative */
    const void *packed;         /* null, or what fastddpm_cpu_conv_pack made of weight, which is then not read */
    const float *bias;          /* (K,) */
    const float *temb;          /* (K,) for all images, or with temb_stride K one row for each */
    const float *residual;      /* (N, Hout, Wout, K); may be out */
    float *out;                 /* (N, Hout, Wout, K) */
    void *workspace;            /* workspace_bytes, 64-byte aligned; or null, for memory of the library's own */
    int64_t workspace_bytes;
    int64_t n, height, width, c1, c2, k; /* height and width of x, before any doubling */
    int64_t x_stride[4];        /* of x: image, row, column, channel; skip is dense */
    int64_t weight_stride[4];
    int64_t temb_stride;
    int32_t kernel, stride;     /* 1 or 3; 1 or 2 */
    int32_t pad;                /* zeros above and to the left; to the right and below as many as Hout, Wout need */
    int32_t doubled;            /* nearest-neighbour doubling of the input first */
    int32_t silu;               /* SiLU after gain and offset */
    int32_t algorithm;          /* matrix product of patches; or with kernel 3, stride 1, pad 1 Winograd's F(4x4, 3x3)
                                 * in float32, F(2x2, 3x3) or F(2x4, 3x3) in bfloat16 */
    int32_t precision;          /* dtype of the products' factors: float32, or bfloat16, for patches with an even C */
    /* The weights' gradient only, by Winograd's, or of a linear layer in bfloat16: kernel 1, stride 1, x dense, without
     * skip and gain. Sums are in a fixed order: both are deterministic. */
    const float *grad;          /* (N, Hout, Wout, K) */
    float *grad_weight;         /* at weight_stride */
    float *grad_bias;           /* (K,) or null */
} fastddpm_conv_args;

/* GroupNorm as a gain and an offset per image and channel: gain x + offset = (1 + scale) group_norm(x) + shift.
 * float32, NHWC. */
typedef struct {
    const float *x, *skip;      /* (N, H W, C1), (N, H W, C2) or null */
    const float *weight, *bias; /* (C,) */
    const float *scale, *shift; /* (N, C), rows scale_stride elements apart; given together, or null */
    float *gain, *offset;       /* (N, C) */
    void *workspace;
    int64_t workspace_bytes;
    int64_t n, pixels, c1, c2, groups, scale_stride;
    float eps;
} fastddpm_norm_affine_args;

/* Feature maps of half the size, by the mean of 2x2 pixels, or of double the size, by the nearest pixel. With gain and
 * offset, of silu(gain x + offset). float32, NHWC, dense. */
typedef struct {
    const float *x;             /* (N, H, W, C); H and W even unless doubled */
    const float *gain, *offset; /* (N, C), given together, or null */
    float *out;                 /* (N, H / 2, W / 2, C), or (N, 2 H, 2 W, C) */
    int64_t n, height, width, c;
    int32_t doubled;
} fastddpm_resample_args;

/* A 64-bit digest of the bytes of `num` parts of memory, in order; not cryptographic. */
typedef struct {
    const void *const *parts;
    const int64_t *bytes; /* of each part */
    uint64_t *out;
    int64_t num;
} fastddpm_digest_args;

/* The CRC32C of `bytes` bytes of memory. */
typedef struct {
    const void *data;
    uint32_t *out;
    int64_t bytes;
} fastddpm_crc32c_args;

FASTDDPM_API const char *fastddpm_error_text(int32_t code);

/* The instruction set in use: 0 baseline, 1 AVX2, 2 AVX-512, 3 AVX-512 with AVX512-BF16, in which bfloat16 products have
 * an instruction. If the machine lacks `wanted`, the best that it has. */
FASTDDPM_API int32_t fastddpm_cpu_isa(int32_t wanted /* or -1: only ask */);

/* The most threads that an operation runs on at present, 0 without a limit. `wanted` fixes it; with 0, as at first, it
 * is what the cores left by other programs are enough for (cpu/contention.h). The results do not depend on it. */
FASTDDPM_API int32_t fastddpm_cpu_most_threads(int32_t wanted /* or -1: only ask */);

/* Whether the threads' cores share no cache, so that each rather computes anew what another has. `wanted` fixes it, 0 or
 * 1; with 2, as at first, it is measured now and then (cpu/cores.h). The results do not depend on it. */
FASTDDPM_API int32_t fastddpm_cpu_cores_are_far(int32_t wanted /* or -1: only ask */);

FASTDDPM_API int32_t fastddpm_cpu_random_normal(const fastddpm_random_normal_args *args, int32_t threads);
/* The raw output words of blocks 0 .. num - 1 of each image: out[(n * num + block) * 4 + word]. */
FASTDDPM_API int32_t fastddpm_cpu_philox(const fastddpm_random_normal_args *args, uint32_t *words, int32_t threads);
FASTDDPM_API int32_t fastddpm_cpu_group_norm_silu(const fastddpm_group_norm_silu_args *args, int32_t threads);
FASTDDPM_API int32_t fastddpm_cpu_group_norm_silu_backward(const fastddpm_group_norm_silu_args *args, int32_t threads);
FASTDDPM_API int32_t fastddpm_cpu_attention(const fastddpm_attention_args *args, int32_t threads);
FASTDDPM_API int32_t fastddpm_cpu_attention_backward(const fastddpm_attention_args *args, int32_t threads);
FASTDDPM_API int32_t fastddpm_cpu_q_sample(const fastddpm_q_sample_args *args, int32_t threads);
FASTDDPM_API int32_t fastddpm_cpu_reverse_step(const fastddpm_reverse_step_args *args, int32_t threads);
FASTDDPM_API int32_t fastddpm_cpu_conv(const fastddpm_conv_args *args, int32_t threads);
FASTDDPM_API int64_t fastddpm_cpu_conv_workspace(const fastddpm_conv_args *args, int32_t threads);
/* The gradients of weight and bias. weight, bias, out, temb and residual are not read. Needs its own workspace. */
FASTDDPM_API int32_t fastddpm_cpu_conv_weight_gradient(const fastddpm_conv_args *args, int32_t threads);
FASTDDPM_API int64_t fastddpm_cpu_conv_weight_gradient_workspace(const fastddpm_conv_args *args, int32_t threads);
/* Writes the weights as args->algorithm reads them, to be reused: 64-byte aligned, of so many bytes. */
FASTDDPM_API int32_t fastddpm_cpu_conv_pack(const fastddpm_conv_args *args, void *packed);
FASTDDPM_API int64_t fastddpm_cpu_conv_packed_bytes(const fastddpm_conv_args *args);
FASTDDPM_API int32_t fastddpm_cpu_norm_affine(const fastddpm_norm_affine_args *args, int32_t threads);
FASTDDPM_API int64_t fastddpm_cpu_norm_affine_workspace(const fastddpm_norm_affine_args *args);
FASTDDPM_API int32_t fastddpm_cpu_resample(const fastddpm_resample_args *args, int32_t threads);
FASTDDPM_API int32_t fastddpm_cpu_digest(const fastddpm_digest_args *args, int32_t threads);
FASTDDPM_API int32_t fastddpm_cpu_crc32c(const fastddpm_crc32c_args *args);

/* The CUDA library. `stream` is a cudaStream_t; nothing waits for it, allocates, or reads device memory on the host, so
 * all of it can be captured in a graph. The workspace, of the size that the query gives for the same arguments, is
 * device memory, 16-byte aligned; it may be reused once the operation's kernels have run. */
FASTDDPM_API const char *fastddpm_cuda_error_text(int32_t code);
FASTDDPM_API int32_t fastddpm_cuda_random_normal(const fastddpm_random_normal_args *args, void *stream);
FASTDDPM_API int32_t fastddpm_cuda_philox(const fastddpm_random_normal_args *args, uint32_t *words, void *stream);
FASTDDPM_API int32_t fastddpm_cuda_q_sample(const fastddpm_q_sample_args *args, void *stream);
FASTDDPM_API int32_t fastddpm_cuda_reverse_step(const fastddpm_reverse_step_args *args, void *stream);
FASTDDPM_API int32_t fastddpm_cuda_group_norm_silu_workspace(const fastddpm_group_norm_silu_args *args,
                                                             int32_t backward, int64_t *bytes);
FASTDDPM_API int32_t fastddpm_cuda_group_norm_silu(const fastddpm_group_norm_silu_args *args, void *workspace,
                                                   int64_t workspace_bytes, void *stream);
FASTDDPM_API int32_t fastddpm_cuda_group_norm_silu_backward(const fastddpm_group_norm_silu_args *args, void *workspace,
                                                            int64_t workspace_bytes, void *stream);

#endif
