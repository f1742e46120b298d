// GroupNorm's statistics as a gain and an offset per image and channel, for a convolution to apply to its input.
#include "kernels.h"
#include "moments.h"

namespace fastddpm {
namespace FASTDDPM_ISA {
namespace {

TwoInputs<float> inputs_of(const fastddpm_norm_affine_args &p) { return {p.x, p.skip, p.c1, p.c2, p.pixels, true}; }

}  // namespace

int64_t norm_affine_workspace(const fastddpm_norm_affine_args &p) {
    return p.n * inputs_of(p).floats() * static_cast<int64_t>(sizeof(float));
}

int32_t norm_affine(const fastddpm_norm_affine_args &p, int32_t threads) {
    const TwoInputs<float> in = inputs_of(p);
    const int64_t channels = in.channels(), tasks = in.tasks();
    if (p.groups < 1 || channels % p.groups || (p.scale == nullptr) != (p.shift == nullptr)) return FASTDDPM_UNSUPPORTED;
    if (p.workspace_bytes < norm_affine_workspace(p)) return FASTDDPM_NO_MEMORY;
    float *moments = static_cast<float *>(p.workspace);
    const int64_t width = channels / p.groups;
#pragma omp parallel num_threads(team_size(threads)) if (threads > 1 && p.n * p.pixels * channels > 32768)
    {
#pragma omp for
        for (int64_t task = 0; task < p.n * tasks; ++task)
            moments_task(in, task / tasks, task % tasks, moments + task / tasks * in.floats());
#pragma omp for
        for (int64_t task = 0; task < p.n * p.groups; ++task) {
            const int64_t n = task / p.groups, first = task % p.groups * width;
            const Statistics group = statistics_of_group(in, moments + n * in.floats(), nullptr, first, width, p.eps);
            for (int64_t c = first; c < first + width; ++c) {
                double gain = p.weight[c] * group.rstd, offset = p.bias[c] - group.mean * gain;
                if (p.scale != nullptr) {
                    const double factor = 1 + static_cast<double>(p.scale[n * p.scale_stride + c]);
                    gain *= factor;
                    offset = offset * factor + p.shift[n * p.scale_stride + c];
                }
                p.gain[n * channels + c] = static_cast<float>(gain);
                p.offset[n * channels + c] = static_cast<float>(offset);
            }
        }
    }
    return FASTDDPM_OK;
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
