// Divides a call of group_norm_silu among blocks. Host code only.
#include <numeric>

#include "group_norm_silu.cuh"

namespace fastddpm {
namespace group_norm {
namespace {

// Bytes of a memory sector: shorter rows waste bandwidth.
constexpr int64_t kSector = 32;
constexpr int64_t kReserved = 1024;  // bytes of shared memory that each block costs besides its own

int element_size(const Args &a) { return a.dtype == FASTDDPM_FLOAT32 ? 4 : 2; }

// Elements that move together: 16 bytes, if every vector is aligned and of one channel (NCHW) or tensor (NHWC).
int vector_of(const Args &a, bool backward) {
    const int vector = 16 / element_size(a);
    const bool divides = a.layout == FASTDDPM_NHWC ? a.c1 % vector == 0 && a.c2 % vector == 0
                                                   : a.height * a.width % vector == 0;
    const bool all = backward ? aligned(a.grad) && aligned(a.grad_x) && aligned(a.grad_skip) : aligned(a.y);
    return divides && all && aligned(a.x) && aligned(a.skip) ? vector : 1;
}

struct Planner {
    const Args &a;
    Chip chip;
    bool backward;
    int64_t vector;
    int64_t size = element_size(a), all_pixels = a.height * a.width, all_channels = a.c1 + a.c2;
    int64_t per_group = all_channels / a.groups;
    bool nhwc = a.layout == FASTDDPM_NHWC;
    // The fewest channels that are whole groups and, in NHWC, whole vectors.
    int64_t unit = nhwc ? std::lcm(per_group, vector) : per_group;

    // Completes a plan from the channels of a slab and the parts of an image.
    Plan divided(int64_t channels, int64_t pixels, bool on_chip) const {
        Plan plan{};
        plan.channels = static_cast<int>(channels);
        plan.slabs = static_cast<int>(all_channels / channels);
        plan.pixels = static_cast<int>(pixels);
        plan.parts = static_cast<int>(divide_up(all_pixels, pixels));
        plan.vector = static_cast<int>(vector);
        plan.on_chip = on_chip;
        plan.blocks = a.n * plan.slabs * plan.parts;
        // Four vectors a thread: enough loads in flight, and few threads without work in small images.
        const int64_t wanted = divide_up(divide_up(channels * pixels, vector), 4 * 32) * 32;
        plan.threads = static_cast<int>(std::min<int64_t>(wanted, kThreads));
        const int sums = backward ? 3 : 1, copies = backward ? (on_chip ? 2 : 0) : 1;
        const int64_t stash = divide_up(channels * pixels * size, 16) * 16 * copies;
        plan.stash = static_cast<int>(std::min<int64_t>(stash, INT32_MAX));
        const int lanes = lanes_in_rows(static_cast<int>(channels / vector), plan.threads);
        const int64_t scratch = nhwc ? sums * (plan.threads / lanes) * channels : 0;
        plan.scratch = static_cast<int>(std::min<int64_t>(scratch, INT32_MAX));
        // Sums of the block and of the cluster, six numbers a channel and four a group.
        const int64_t floats = scratch + (2 * sums + 6) * channels + 4 * (channels / per_group);
        plan.shared = stash + floats * static_cast<int64_t>(sizeof(float));
        return plan;
    }

    // Finds a plan with the slab of an image in one cluster: the fewest blocks per cluster and the widest slab with
    // which every multiprocessor has a block, else the plan with the most blocks. Tries half of the shared memory
    // first: two blocks then share a multiprocessor, and one loads while the other computes.
    bool on_chip(Plan *best) const {
        best->blocks = 0;
        for (const int64_t budget : {(chip.shared - kReserved) / 2, int64_t{chip.shared}}) {
            for (int cluster = 1; cluster <= chip.cluster; cluster *= 2) {
                const int64_t grain = nhwc ? 1 : vector;
                const int64_t pixels = divide_up(divide_up(all_pixels, cluster), grain) * grain;
                if (divide_up(all_pixels, pixels) != cluster) continue;
                for (int64_t units = all_channels / unit; units > 0; --units) {
                    const int64_t channels = units * unit;
                    if (all_channels % channels != 0) continue;
                    if (channels * size < kSector && nhwc && channels < all_channels) continue;
                    const Plan plan = divided(channels, pixels, true);
                    if (plan.shared > budget || plan.blocks <= best->blocks) continue;
                    *best = plan;
                    if (plan.blocks >= chip.multiprocessors) return true;
                }
            }
            if (best->blocks > 0) return true;
        }
        return false;
    }

    // Finds a plan with parts of an image that need not be on chip together: as much of a row as fits (NHWC), or one
    // group (NCHW).
    bool in_parts(Plan *plan) const {
        const int64_t grain = nhwc ? 1 : vector, stash = std::min(48 * 1024, chip.shared / 2);
        for (int64_t units = nhwc ? all_channels / unit : 1; units > 0; --units) {
            const int64_t channels = units * unit;
            if (all_channels % channels != 0) continue;
            const int64_t pixels = std::max(stash / (channels * size) / grain * grain, grain);
            *plan = divided(channels, std::min(pixels, divide_up(all_pixels, grain) * grain), false);
            if (plan->shared > chip.shared) continue;
            const int64_t sums = backward ? 3 * a.n * plan->parts * all_channels : 2 * a.n * plan->parts * a.groups;
            plan->workspace = (sums + (backward ? 2 * a.n * a.groups : 0)) * static_cast<int64_t>(sizeof(float));
            return true;
        }
        return false;
    }
};

}  // namespace

int32_t make_plan(const Args &a, bool backward, Plan *plan) {
    const int64_t image = (a.c1 + a.c2) * a.height * a.width;
    const auto floating = [](int32_t dtype) { return dtype >= FASTDDPM_FLOAT32 && dtype <= FASTDDPM_FLOAT16; };
    if (!floating(a.dtype) || !floating(a.param_dtype) || image < 1 || image >= INT32_MAX || a.groups < 1 ||
        (a.c1 + a.c2) % a.groups != 0)
        return FASTDDPM_UNSUPPORTED;
    Chip chip{};
    if (const int32_t error = query_chip(&chip)) return error;
    const auto planned = [&](int64_t vector) {
        const Planner planner{a, chip, backward, vector};
        return planner.on_chip(plan) || planner.in_parts(plan);
    };
    // With an odd number of channels per group, only several groups together fill whole vectors, which may be too many.
    if (!planned(vector_of(a, backward)) && !planned(1)) return FASTDDPM_UNSUPPORTED;
    // Backward: the sums of an image's channels, for the weight's and the bias's gradients.
    if (backward) plan->workspace += 2 * a.n * (a.c1 + a.c2) * static_cast<int64_t>(sizeof(float));
    return FASTDDPM_OK;
}

}  // namespace group_norm
}  // namespace fastddpm

FASTDDPM_API int32_t fastddpm_cuda_group_norm_silu_workspace(const fastddpm_group_norm_silu_args *args,
                                                             int32_t backward, int64_t *bytes) {
    fastddpm::group_norm::Plan plan{};
    const int32_t code = fastddpm::group_norm::make_plan(*args, backward != 0, &plan);
    *bytes = plan.workspace;
    return code;
}
