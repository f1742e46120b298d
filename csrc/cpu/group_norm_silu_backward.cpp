// The backward pass of group_norm_silu: one pass sums over the pixels of every chunk, the sums are combined per group,
// and a second pass writes the gradients of the images. SiLU and dropout are recomputed rather than kept from the
// forward pass. Between the two passes, the memory of the image's gradient holds the gradient behind SiLU and dropout,
// if it is float32.
//
// With u = g gain and x_hat the normalized input: dx = rstd (u - mean(u) - x_hat mean(u x_hat)), means over a group.
#include "group_norm_silu.h"

namespace fastddpm {
namespace FASTDDPM_ISA {
namespace {

struct Coefficients {
    float *mean, *rstd, *gain, *offset;    // (N, C): x_hat = (x - mean) rstd, y = x_hat gain + offset
    float *mean_u, *mean_ux;               // (N, C)
};

// Sums per channel of a chunk: of g, g x_hat and x_hat, where g is the gradient behind the norm and its gain.
constexpr int kSums = 3;

struct Element {
    Vec g, x_hat;
};

// Whether the first pass leaves g for the second.
template <typename T>
constexpr bool kKept = sizeof(T) == sizeof(float);

template <bool kNhwc, typename T>
FASTDDPM_INLINE Vec normalized(const Coefficients &k, const T *x, int64_t c, int64_t i, int64_t part) {
    const Vec v = part < kWidth ? load_part(x + i, part) : load(x + i);
    return (v - per_channel<kNhwc>(k.mean + c, i, part)) * per_channel<kNhwc>(k.rstd + c, i, part);
}

template <bool kNhwc, typename T>
FASTDDPM_INLINE Element differentiate(const NormArgs &p, const Coefficients &k, const T *x, const T *grad, int64_t c,
                                      int64_t i, int64_t part, const DropoutMask &mask, int64_t pixel) {
    Vec g = part < kWidth ? load_part(grad + i, part) : load(grad + i);
    const Vec x_hat = normalized<kNhwc>(k, x, c, i, part);
    if (p.dropout > 0) g *= mask.factors<kNhwc>(pixel, c % (p.c1 + p.c2), i, part);
    if (p.silu) {
        const Vec y = x_hat * per_channel<kNhwc>(k.gain + c, i, part) + per_channel<kNhwc>(k.offset + c, i, part);
        const Vec sigmoid = 1.0f / (1.0f + vexp(-y));
        g *= sigmoid * (1.0f + y * (1.0f - sigmoid));
    }
    return {g, x_hat};
}

template <bool kNhwc, typename T>
void sum_chunk(const NormArgs &p, const Coefficients &k, int64_t n, int64_t first, int64_t count,
               const DropoutMask &mask, float *sums) {
    const int64_t channels = p.c1 + p.c2, begin = n * p.height * p.width + first;
    memset(sums, 0, static_cast<size_t>(kSums * channels) * sizeof(float));
    for_runs<kNhwc>(p, n, first, count, [&](int side, int64_t from, int64_t c, int64_t at, int64_t length) {
        const T *x = static_cast<const T *>(side ? p.skip : p.x) + from, *grad = static_cast<const T *>(p.grad) + at;
        T *kept = static_cast<T *>(side ? p.grad_skip : p.grad_x) + from;
        const int64_t pixel = kNhwc ? at / channels - begin : 0;
        SumOfRun<kNhwc> sum_g(sums + c), sum_gx(sums + channels + c), sum_x(sums + 2 * channels + c);
        for (int64_t i = 0; i < length; i += kWidth) {
            const int64_t part = length - i;
            const Element e = differentiate<kNhwc>(p, k, x, grad, n * channels + c, i, part, mask, pixel);
            sum_g.add(e.g, i, part);
            sum_gx.add(e.g * e.x_hat, i, part);
            sum_x.add(e.x_hat, i, part);
            if (kKept<T>) part < kWidth ? store_part(kept + i, e.g, part) : store(kept + i, e.g);
        }
        sum_g.finish();
        sum_gx.finish();
        sum_x.finish();
    });
}

template <bool kNhwc, typename T>
void write_chunk(const NormArgs &p, const Coefficients &k, int64_t n, int64_t first, int64_t count,
                 const DropoutMask &mask) {
    const int64_t channels = p.c1 + p.c2, begin = n * p.height * p.width + first;
    for_runs<kNhwc>(p, n, first, count, [&](int side, int64_t from, int64_t c_of_image, int64_t at, int64_t length) {
        const T *x = static_cast<const T *>(side ? p.skip : p.x) + from, *grad = static_cast<const T *>(p.grad) + at;
        T *to = static_cast<T *>(side ? p.grad_skip : p.grad_x) + from;
        const int64_t c = n * channels + c_of_image, pixel = kNhwc ? at / channels - begin : 0;
        for (int64_t i = 0; i < length; i += kWidth) {
            const int64_t part = length - i;
            Element e;
            if (kKept<T>)
                e = {part < kWidth ? load_part(to + i, part) : load(to + i), normalized<kNhwc>(k, x, c, i, part)};
            else
                e = differentiate<kNhwc>(p, k, x, grad, c, i, part, mask, pixel);
            // Rounded as its mean was: in a group of equal values they cancel, and rstd is large.
            const Vec u = apart(e.g * per_channel<kNhwc>(k.gain + c, i, part));
            const Vec dx = (u - per_channel<kNhwc>(k.mean_u + c, i, part) -
                            e.x_hat * per_channel<kNhwc>(k.mean_ux + c, i, part)) *
                           per_channel<kNhwc>(k.rstd + c, i, part);
            part < kWidth ? store_part(to + i, dx, part) : store(to + i, dx);
        }
    });
}

// Sums over the chunks of image n, for `width` channels from c, of (N, kSums, C).
void add_chunks(const NormArgs &p, const float *of_chunks, int64_t chunks, int64_t n, int64_t c, int64_t width,
                double *of_channels) {
    const int64_t channels = p.c1 + p.c2;
    for (int s = 0; s < kSums; ++s) {
        double *to = of_channels + (n * kSums + s) * channels + c;
        for (int64_t i = 0; i < width; ++i) to[i] = 0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            const float *from = of_chunks + ((n * chunks + chunk) * kSums + s) * channels + c;
            for (int64_t i = 0; i < width; ++i) to[i] += from[i];
        }
    }
}

// What the sums of one group's channels give: the means of u and u x_hat, and the gradients that belong to image n.
void finish_group(const NormArgs &p, const Coefficients &k, const double *of_channels, int64_t n, int64_t group) {
    const int64_t channels = p.c1 + p.c2, width = channels / p.groups, first = group * width;
    const int64_t pixels = p.height * p.width;
    const double *sums = of_channels + n * kSums * channels;
    double u = 0, ux = 0;
    for (int64_t c = first; c < first + width; ++c) {
        const double gain = norm_affine_of(p, n, c).gain;
        u += gain * sums[c];
        ux += gain * sums[channels + c];
    }
    const double mean_u = u / static_cast<double>(width * pixels), mean_ux = ux / static_cast<double>(width * pixels);
    for (int64_t c = first; c < first + width; ++c) {
        const int64_t at = n * channels + c;
        k.mean_u[at] = static_cast<float>(mean_u);
        k.mean_ux[at] = static_cast<float>(mean_ux);
        if (p.grad_temb != nullptr) {
            const double dx = norm_affine_of(p, n, c).gain * sums[c] - mean_u * static_cast<double>(pixels) -
                              mean_ux * sums[2 * channels + c];
            p.grad_temb[at] = static_cast<float>(p.rstd[n * p.groups + group] * dx);
        }
        if (p.scale != nullptr) {
            const double weight = static_cast<const float *>(p.weight)[c], bias = static_cast<const float *>(p.bias)[c];
            p.grad_scale[at] = static_cast<float>(sums[channels + c] * weight + sums[c] * bias);
            p.grad_shift[at] = static_cast<float>(sums[c]);
        }
    }
}

// grad_weight and grad_bias of channel c: sums over the images, in their order.
void finish_channel(const NormArgs &p, const double *of_channels, int64_t c) {
    const int64_t channels = p.c1 + p.c2;
    double weight = 0, bias = 0;
    for (int64_t n = 0; n < p.n; ++n) {
        const double *sums = of_channels + n * kSums * channels + c;
        const double factor = p.scale == nullptr ? 1 : 1.0 + static_cast<const float *>(p.scale)[n * channels + c];
        weight += sums[channels] * factor;
        bias += sums[0] * factor;
    }
    p.grad_weight[c] = static_cast<float>(weight);
    p.grad_bias[c] = static_cast<float>(bias);
}

template <bool kNhwc, typename T>
int32_t backward(const NormArgs &p, int32_t threads) {
    const int64_t pixels = p.height * p.width, channels = p.c1 + p.c2, width = channels / p.groups;
    const int64_t chunks = divide_up(pixels, kChunk), images = p.n * channels;
    const int64_t image_bytes = Memory::lines(images * static_cast<int64_t>(sizeof(float)));
    const int64_t chunk_bytes = Memory::lines(images * chunks * kSums * static_cast<int64_t>(sizeof(float)));
    const int64_t sum_bytes = Memory::lines(images * kSums * static_cast<int64_t>(sizeof(double)));
    Memory memory(6 * image_bytes + chunk_bytes + sum_bytes + threads * DropoutMask::bytes(p));
    if (memory.failed()) return FASTDDPM_NO_MEMORY;
    const Coefficients k{memory.take<float>(images), memory.take<float>(images), memory.take<float>(images),
                         memory.take<float>(images), memory.take<float>(images), memory.take<float>(images)};
    float *of_chunks = memory.take<float>(images * chunks * kSums);
    double *of_channels = memory.take<double>(images * kSums);
    uint8_t *masks = memory.take<uint8_t>(threads * DropoutMask::bytes(p));
#pragma omp parallel num_threads(team_size(threads)) if (threads > 1 && norm_is_large(p))
    {
#pragma omp for
        for (int64_t task = 0; task < p.n * p.groups; ++task) {
            const int64_t n = task / p.groups, first = task % p.groups * width;
            for (int64_t c = first; c < first + width; ++c) {
                const int64_t at = n * channels + c;
                const Affine affine = norm_affine_of(p, n, c);
                k.mean[at] = static_cast<float>(p.mean[task] - norm_temb_of(p, n, c));
                k.rstd[at] = p.rstd[task];
                k.gain[at] = static_cast<float>(affine.gain);
                k.offset[at] = static_cast<float>(affine.offset);
            }
        }
        DropoutMask mask(p, masks + thread_number() * DropoutMask::bytes(p));
#pragma omp for
        for (int64_t task = 0; task < p.n * chunks; ++task) {
            const int64_t n = task / chunks, first = task % chunks * kChunk, count = smaller(kChunk, pixels - first);
            mask.draw(n, first, count);
            sum_chunk<kNhwc, T>(p, k, n, first, count, mask, of_chunks + task * kSums * channels);
        }
#pragma omp for
        for (int64_t task = 0; task < p.n * p.groups; ++task) {
            const int64_t n = task / p.groups, group = task % p.groups;
            add_chunks(p, of_chunks, chunks, n, group * width, width, of_channels);
            finish_group(p, k, of_channels, n, group);
        }
#pragma omp for nowait
        for (int64_t c = 0; c < channels; ++c) finish_channel(p, of_channels, c);
#pragma omp for
        for (int64_t task = 0; task < p.n * chunks; ++task) {
            const int64_t n = task / chunks, first = task % chunks * kChunk, count = smaller(kChunk, pixels - first);
            if (!kKept<T>) mask.draw(n, first, count);
            write_chunk<kNhwc, T>(p, k, n, first, count, mask);
        }
    }
    return FASTDDPM_OK;
}

}  // namespace

int32_t group_norm_silu_backward(const fastddpm_group_norm_silu_args &p, int32_t threads) {
    if (!norm_supported(p)) return FASTDDPM_UNSUPPORTED;
    const bool nhwc = p.layout == FASTDDPM_NHWC;
    if (p.dtype == FASTDDPM_FLOAT32)
        return nhwc ? backward<true, float>(p, threads) : backward<false, float>(p, threads);
    return nhwc ? backward<true, uint16_t>(p, threads) : backward<false, uint16_t>(p, threads);
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
