"""The two processes step by step: an image that turns into noise, and noise that turns into an image."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fastddpm.kernels.q_sample.reference import scale_images
from fastddpm.noise import NoiseKey
from fastddpm.sampler import Sampler

from .drawing import Progress, depth_of, latents


@dataclass(frozen=True, eq=False)
class Strip:
    """States of N images at K depths: `x`, float32 (N, K, C, H, W), not clipped; `depths`, int64 (K,), 0 is x_0."""

    x: np.ndarray
    depths: np.ndarray


def forward_strip(sampler: Sampler, images: np.ndarray, steps: Sequence[int], seeds: Sequence[int]) -> Strip:
    """q(x_t | x_0) of `images`, uint8 (N, C, H, W), with one noise for each image, named by its seed, at every t.

    `steps`: of the sampler's chain, as `drawing.latents` counts them: S is x_0 itself, 0 what a chain begins with.
    """
    x0 = torch.from_numpy(np.ascontiguousarray(images))
    key = NoiseKey.of(sampler.seed, 0, list(seeds))
    x = []
    for step in steps:
        if step == sampler.steps:
            x.append(scale_images(x0, None))
        else:
            t = torch.full((len(x0),), int(sampler.timesteps[step]))
            x.append(sampler.diffusion.q_sample(x0, t, key)[0])
    return Strip(torch.stack(x, dim=1).numpy(), _depths(sampler, steps))


def reverse_strip(
    sampler: Sampler,
    seeds: Sequence[int],
    steps: Sequence[int],
    labels: Sequence[int] | None = None,
    *,
    batch: int = 64,
    progress: Progress | None = None,
) -> Strip:
    """x_t of a chain before each of `steps`, 0..S, as `drawing.latents` counts them; S are the images."""
    kept = latents(sampler, seeds, labels, steps, batch=batch, progress=progress)
    return Strip(kept.transpose(0, 1).contiguous().numpy(), _depths(sampler, steps))


def _depths(sampler: Sampler, steps: Sequence[int]) -> np.ndarray:
    return np.array([depth_of(sampler, step) for step in steps])
