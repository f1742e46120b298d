// random_normal on the CPU: Philox4x32-10 and Box-Muller in double, rounded once to float.
#include <cmath>

#include "fastddpm.h"
#include "philox.h"

namespace {

constexpr double kTwoToMinus32 = 1.0 / 4294967296.0;
constexpr double kTwoToMinus33 = kTwoToMinus32 / 2;
constexpr double kTau = 6.283185307179586476925286766559;

// Calls body(n, block, words) for every block of every image. Each call writes its own part of the output, so the
// result does not depend on the number of threads.
template <typename Body>
void for_each_block(int64_t num_blocks, const int64_t *images, int64_t num_images, int64_t seed, int64_t step,
                    int64_t stream, int32_t threads, Body body) {
    const int64_t total = num_blocks * num_images;
    // Below a few thousand blocks waking threads costs more than they save.
#pragma omp parallel for schedule(static) num_threads(threads) if (total > 2048)
    for (int64_t i = 0; i < total; ++i) {
        const int64_t n = i / num_blocks, block = i % num_blocks;
        body(n, block,
             fastddpm::philox(static_cast<uint32_t>(block), static_cast<uint32_t>(images[n]),
                              static_cast<uint32_t>(step), static_cast<uint32_t>(stream),
                              static_cast<uint64_t>(seed)));
    }
}

}  // namespace

FASTDDPM_API void fastddpm_philox(uint32_t *out, int64_t num_blocks, const int64_t *images, int64_t num_images,
                                  int64_t seed, int64_t step, int64_t stream, int32_t threads) {
    for_each_block(num_blocks, images, num_images, seed, step, stream, threads,
                   [=](int64_t n, int64_t block, const fastddpm::Words &words) {
                       for (int i = 0; i < 4; ++i) out[(n * num_blocks + block) * 4 + i] = words.w[i];
                   });
}

FASTDDPM_API void fastddpm_random_normal(float *out, int64_t num, const int64_t *images, int64_t num_images,
                                         int64_t seed, int64_t step, int64_t stream, int32_t threads) {
    const int64_t num_blocks = (num + 3) / 4;
    for_each_block(num_blocks, images, num_images, seed, step, stream, threads,
                   [=](int64_t n, int64_t block, const fastddpm::Words &words) {
                       float values[4];
                       for (int pair = 0; pair < 2; ++pair) {
                           const double radius =
                               std::sqrt(-2.0 * std::log(words.w[2 * pair] * kTwoToMinus32 + kTwoToMinus33));
                           const double angle = words.w[2 * pair + 1] * (kTau * kTwoToMinus32);
                           values[2 * pair] = static_cast<float>(radius * std::cos(angle));
                           values[2 * pair + 1] = static_cast<float>(radius * std::sin(angle));
                       }
                       const int64_t first = block * 4, count = num - first < 4 ? num - first : 4;
                       for (int64_t i = 0; i < count; ++i) out[n * num + first + i] = values[i];
                   });
}
