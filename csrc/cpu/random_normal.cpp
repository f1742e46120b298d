// random_normal on the CPU: Philox4x32-10 and Box-Muller in double, rounded once to float.
#include "kernels.h"
#include "noise.h"

namespace fastddpm {
namespace FASTDDPM_ISA {
namespace {

Counter counter_of(const fastddpm_random_normal_args &args, int64_t n) {
    return {static_cast<uint32_t>(args.key.images[n]), static_cast<uint32_t>(*args.key.step),
            static_cast<uint32_t>(args.stream_id), static_cast<uint64_t>(*args.key.seed)};
}

}  // namespace

int32_t philox_words(const fastddpm_random_normal_args &args, uint32_t *out, int32_t threads) {
    for_normals(args.n, 4 * args.num, threads, [&](int64_t n, int64_t first) {
        Words words;
        words_of_lanes(words, static_cast<uint32_t>(first / 4), counter_of(args, n));
        uint32_t *target = out + n * args.num * 4 + first;
        const int64_t count = smaller(kLanes, args.num - first / 4);
        for (int64_t lane = 0; lane < count; ++lane)
            for (int i = 0; i < 4; ++i) target[4 * lane + i] = words[i][lane];
    });
    return FASTDDPM_OK;
}

int32_t random_normal(const fastddpm_random_normal_args &args, int32_t threads) {
    for_normals(args.n, args.num, threads, [&](int64_t n, int64_t first) {
        float *target = args.out + n * args.num + first;
        const int64_t count = args.num - first;
        if (count >= kNormals) return normal_lanes(target, static_cast<uint32_t>(first / 4), counter_of(args, n));
        float values[kNormals];
        normal_lanes(values, static_cast<uint32_t>(first / 4), counter_of(args, n));
        memcpy(target, values, static_cast<size_t>(count) * sizeof(float));
    });
    return FASTDDPM_OK;
}

}  // namespace FASTDDPM_ISA
}  // namespace fastddpm
