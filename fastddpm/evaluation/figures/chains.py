"""Interpolation between images in the latents of the forward process: Figures 8 and 9 of the paper, section 4.4."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastddpm.data import Dataset
from fastddpm.data.order import epoch_order
from fastddpm.errors import UsageError
from fastddpm.kernels.q_sample.reference import scale_images
from fastddpm.ops.noise import NoiseKey
from fastddpm.sampling.chain import StartState
from fastddpm.sampling.images import to_uint8
from fastddpm.sampling.sampler import Sampler
from fastddpm.sampling.trajectories import (
    Progress,
    depth_of,
    draw,
    evenly,
    image_shape,
    latents,
    relative,
    repeated,
    step_at,
    trajectories,
)


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
            start = StartState(mixed, step)
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


# Strips: the two processes step by step


@dataclass(frozen=True, eq=False)
class Trajectory:
    """States of N images at K depths: `x`, float32 (N, K, C, H, W), not clipped; `depths`, int64 (K,), 0 is x_0."""

    x: np.ndarray
    depths: np.ndarray


def forward_trajectory(sampler: Sampler, images: np.ndarray, steps: Sequence[int], seeds: Sequence[int]) -> Trajectory:
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
    return Trajectory(torch.stack(x, dim=1).numpy(), _depths(sampler, steps))


def reverse_trajectory(
    sampler: Sampler,
    seeds: Sequence[int],
    steps: Sequence[int],
    labels: Sequence[int] | None = None,
    *,
    batch: int = 64,
    progress: Progress | None = None,
) -> Trajectory:
    """x_t of a chain before each of `steps`, 0..S, as `drawing.latents` counts them; S are the images."""
    kept = latents(sampler, seeds, labels, steps, batch=batch, progress=progress)
    return Trajectory(kept.transpose(0, 1).contiguous().numpy(), _depths(sampler, steps))


def _depths(sampler: Sampler, steps: Sequence[int]) -> np.ndarray:
    return np.array([depth_of(sampler, step) for step in steps])


# Shared latents: figure 7


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
        start = StartState(kept[i].repeat_interleave(continuations, dim=0), step)
        drawn = draw(sampler, others, classes, start=start, batch=batch, progress=progress)
        images[:, i] = drawn.reshape(len(seeds), continuations, *drawn.shape[1:])
    return SharedLatents(
        kept.transpose(0, 1).contiguous().numpy(), images, np.array([depth_of(sampler, step) for step in steps])
    )


# Progressive generation: figure 6


@dataclass(frozen=True, eq=False)
class Progressive:
    """x_0 predictions of N chains at K of their steps, from x_t: `x0`, uint8 (N, K, C, H, W).

    `depths`: int64 (K,), steps of the forward process that x_t has behind it, t + 1.
    """

    x0: np.ndarray
    depths: np.ndarray


def progressive(
    sampler: Sampler,
    seeds: Sequence[int],
    labels: Sequence[int] | None = None,
    *,
    steps: Sequence[int] | None = None,
    batch: int = 64,
    progress: Progress | None = None,
) -> Progressive:
    """Figure 6: what a chain takes for x_0 on its way.

    `steps`: of the chain, 0..steps-1; ten evenly spread, unless given, of which the last shows the images themselves.
    Raises `UsageError` for others.
    """
    chosen = evenly(10, sampler.steps - 1) if steps is None else list(steps)
    x0 = np.empty((len(seeds), len(chosen), *image_shape(sampler)), np.uint8)
    for part, state in trajectories(sampler, seeds, labels, chosen, batch=batch, progress=progress):
        x0[part, [i for i, step in enumerate(chosen) if step == state.step]] = to_uint8(state.x0)[:, None]
    return Progressive(x0, sampler.timesteps[chosen] + 1)


# Classes


def class_grid(
    sampler: Sampler,
    seeds: Sequence[int],
    scales: Sequence[float] | None = None,
    *,
    batch: int = 64,
    progress: Progress | None = None,
) -> np.ndarray:
    """Every class from every seed at every scale of guidance: uint8 (scales, classes, seeds, C, H, W).

    A column shares its noise over all classes and scales. `scales`: the sampler's own unless given. Raises `UsageError`
    for a network without classes, and for a scale other than 1 where it was never trained without a class.
    """
    num_classes = classes_of(sampler)
    labels = [label for label in range(num_classes) for _ in seeds]
    grids = []
    for scale in [sampler.guidance] if scales is None else scales:
        guided = sampler if scale == sampler.guidance else sampler.guided(scale)
        drawn = draw(guided, list(seeds) * num_classes, labels, batch=batch, progress=progress)
        grids.append(drawn.reshape(num_classes, len(seeds), *drawn.shape[1:]))
    return np.stack(grids)


def classes_of(sampler: Sampler) -> int:
    """How many classes the network knows; `UsageError` for none."""
    if not sampler.unet.config.num_classes:
        raise UsageError("this network was trained without classes: there is no grid of classes to draw")
    return sampler.unet.config.num_classes


# Which images of the data set a figure shows

_SEED = 0


def picked(dataset: Dataset, count: int) -> np.ndarray:
    """Indices of `count` images, int64 (count,); `UsageError` where there are fewer."""
    num = len(dataset.images)
    if num < count:
        raise UsageError(f"the picture takes {count} images, the data set has {num}; show fewer rows")
    return epoch_order(num, _SEED, 0)[:count]


def pairs(dataset: Dataset, count: int, sampler: Sampler) -> tuple[np.ndarray, list[int] | None]:
    """Indices of images to interpolate between, int64 (count, 2), and the label of each pair where labels are wanted.

    For a network with classes both images of a pair are of one class, for it draws what lies between them; where the
    data set has no labels the network's null label stands for any class. Raises `UsageError` where that cannot be.
    """
    num_classes, null_label = sampler.unet.config.num_classes, sampler.unet.null_label
    if num_classes and dataset.labels is not None:
        return _of_one_class(dataset.labels, count)
    if num_classes and null_label is None:
        raise UsageError("this network wants a class for every image, and the data set has none to interpolate within")
    found = picked(dataset, 2 * count).reshape(count, 2)
    return found, [null_label] * count if num_classes and null_label is not None else None


def _of_one_class(labels: np.ndarray, count: int) -> tuple[np.ndarray, list[int]]:
    waiting: dict[int, int] = {}
    found: list[tuple[int, int]] = []
    for index in epoch_order(len(labels), _SEED, 0).tolist():
        label = int(labels[index])
        if label not in waiting:
            waiting[label] = index
            continue
        found.append((waiting.pop(label), index))
        if len(found) == count:
            return np.array(found), [int(labels[first]) for first, _ in found]
    raise UsageError(f"{count} pairs of images of one class are wanted, the data set has {len(found)}; show fewer rows")
