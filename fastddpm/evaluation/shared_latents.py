"""What images share that share a latent: Figure 7 of the paper."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastddpm.chain import Start
from fastddpm.errors import UsageError
from fastddpm.sampler import Sampler

from .drawing import Progress, depth_of, draw, image_shape, latents, relative, repeated, step_at


@dataclass(frozen=True, eq=False)
class SharedLatents:
    """N chains stopped at D depths, and K images from each of these states.

    `latents`: float32 (N, D, C, H, W), the shared x_t, not clipped. `images`: uint8 (N, D, K, C, H, W), draws from
    p(x_0 | x_t). `depths`: int64 (D,), t + 1.
    """

    latents: np.ndarray
    images: np.ndarray
    depths: np.ndarray


def shared_latents(
    sampler: Sampler,
    seeds: Sequence[int],
    depths: Sequence[int],
    continuations: int = 3,
    labels: Sequence[int] | None = None,
    *,
    batch: int = 64,
    progress: Progress | None = None,
) -> SharedLatents:
    """Figure 7: each chain is run once to each depth and from there on several times, each with noise of its own.

    `depths`: steps of the forward process, 1..T, as `drawing.step_at` takes them. Raises `UsageError` for others.
    """
    if continuations < 1 or not len(depths):
        raise UsageError(f"shared latents need a depth and a continuation; got {len(depths)} and {continuations}")
    steps = [step_at(sampler, depth) for depth in depths]
    kept = latents(sampler, seeds, labels, steps, batch=batch, progress=progress)
    others = [relative(seed, k) for seed in seeds for k in range(1, continuations + 1)]
    classes = repeated(sampler.labels_for(seeds, labels), continuations)
    images = np.empty((len(seeds), len(depths), continuations, *image_shape(sampler)), np.uint8)
    for i, step in enumerate(steps):
        start = Start(kept[i].repeat_interleave(continuations, dim=0), step)
        drawn = draw(sampler, others, classes, start=start, batch=batch, progress=progress)
        images[:, i] = drawn.reshape(len(seeds), continuations, *drawn.shape[1:])
    return SharedLatents(
        kept.transpose(0, 1).contiguous().numpy(), images, np.array([depth_of(sampler, step) for step in steps])
    )
