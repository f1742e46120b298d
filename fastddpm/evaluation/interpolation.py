"""Interpolation between images in the latents of the forward process: Figures 8 and 9 of the paper, section 4.4."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastddpm.chain import Start
from fastddpm.errors import UsageError
from fastddpm.figures import to_uint8
from fastddpm.kernels.q_sample.reference import scale_images
from fastddpm.noise import NoiseKey
from fastddpm.sampler import Sampler

from .drawing import Progress, depth_of, draw, image_shape, relative, repeated, step_at


@dataclass(frozen=True, eq=False)
class Interpolation:
    """P pairs of images, between them at D depths and L places: `images`, uint8 (P, D, L, C, H, W).

    `depths`: int64 (D,), steps of the forward process before mixing. `lambdas`: float64 (L,), 0 the first image of a
    pair, 1 the second.
    """

    images: np.ndarray
    depths: np.ndarray
    lambdas: np.ndarray


def interpolate(
    sampler: Sampler,
    pairs: np.ndarray,
    depths: Sequence[int],
    lambdas: Sequence[float],
    seeds: Sequence[int],
    labels: Sequence[int] | None = None,
    *,
    one_noise: bool = False,
    batch: int = 64,
    progress: Progress | None = None,
) -> Interpolation:
    """Both images of each pair are diffused to x_t and x'_t, mixed to (1 - lambda) x_t + lambda x'_t, and denoised.

    `pairs`: uint8 (P, 2, C, H, W). `depths`: 1..T as `drawing.step_at` takes them, or 0 for a mixture of pixels.
    `seeds`: one for each pair, naming its noise; `labels` likewise where the network wants them. x_t, x'_t and the
    noise of the chain are the same for every lambda, and the noise of x_t and x'_t for every depth. With `one_noise`
    both images get the same noise; otherwise each its own, as in the released code. Raises `UsageError` for values
    outside these ranges.
    """
    if pairs.dtype != np.uint8 or pairs.shape[1:] != (2, *image_shape(sampler)) or len(pairs) != len(seeds):
        raise UsageError(
            f"pairs must be uint8 ({len(seeds)}, 2, {', '.join(map(str, image_shape(sampler)))}), one for each seed; "
            f"got {pairs.dtype} {pairs.shape}"
        )
    if not all(0 <= value <= 1 for value in lambdas):
        raise UsageError(f"lambdas must be in [0, 1]; got {', '.join(f'{value:g}' for value in lambdas)}")
    steps = [step_at(sampler, depth) if depth else sampler.steps for depth in depths]
    every_seed = [seed for seed in seeds for _ in lambdas]
    every_label = repeated(sampler.labels_for(seeds, labels), len(lambdas))
    images = np.empty((len(pairs), len(depths), len(lambdas), *image_shape(sampler)), np.uint8)
    for i, step in enumerate(steps):
        mixed = _mixed(*_ends(sampler, pairs, step, seeds, one_noise), lambdas)
        if step == sampler.steps:
            drawn = to_uint8(mixed)
        else:
            start = Start(mixed, step)
            drawn = draw(sampler, every_seed, every_label, start=start, batch=batch, progress=progress)
        images[:, i] = drawn.reshape(images.shape[0], *images.shape[2:])
    return Interpolation(
        images, np.array([depth_of(sampler, step) for step in steps]), np.array(lambdas, dtype=np.float64)
    )


def _ends(
    sampler: Sampler, pairs: np.ndarray, step: int, seeds: Sequence[int], one_noise: bool
) -> tuple[Tensor, Tensor]:
    """x_t and x'_t as `step` takes them, float32 (P, C, H, W) on the CPU; x_0 and x'_0 behind the last step."""
    images = torch.from_numpy(np.ascontiguousarray(pairs.swapaxes(0, 1)))
    if step == sampler.steps:
        first, second = (scale_images(half, None) for half in images)
        return first, second
    t = torch.full((len(seeds),), int(sampler.timesteps[step]))
    others = seeds if one_noise else [relative(seed, 1) for seed in seeds]
    first, second = (
        sampler.diffusion.q_sample(half, t, NoiseKey.of(sampler.seed, 0, list(numbers)))[0]
        for half, numbers in zip(images, (seeds, others), strict=True)
    )
    return first, second


def _mixed(first: Tensor, second: Tensor, lambdas: Sequence[float]) -> Tensor:
    """(1 - lambda) first + lambda second, (P L, C, H, W), the lambdas of a pair side by side."""
    weight = torch.tensor(lambdas, dtype=torch.float32).reshape(1, -1, 1, 1, 1)
    return ((1 - weight) * first[:, None] + weight * second[:, None]).flatten(0, 1)
