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
    if (p.groups < 1 || channels % p.groups) return FASTDDPM_UNSUPPORTED;
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
                const double gain = p.weight[c] * group.rstd;
                p.gain[n * channels + c] = static_cast<float>(gain);
                p.offset[n * channels + c] = static_cast<float>(p.bias[c] - group.mean * gain);
            }
        }
    }
    return FASTDDPM_OK;
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
