"""Compute the arrays of the paper's figures 6 to 9, of trajectories and of class grids.

A depth counts steps of the forward process, the paper's t: 0 is an image, T is noise. A step counts the sampler's
steps, 0..S - 1; the state at step S is the finished image. See `fastddpm.sampling.trajectories`.
"""

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
    latents,
    relative,
    repeated,
    step_at,
    trajectories,
)

_SEED = 0  # of the order in which images of the data set are chosen

# Progressive generation: figure 6


@dataclass(frozen=True, eq=False)
class Progressive:
    """The x_0 predictions of N chains from x_t at K steps: `x0`, uint8 (N, K, C, H, W); `depths`, int64 (K,), t + 1."""

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
    """Return the x_0 predictions of the chains of `seeds` on their way (figure 6).

    `steps`: 0..S - 1. Default: ten evenly spread steps; the last one shows the images themselves. Raises `UsageError`
    for other steps.
    """
    chosen = evenly(10, sampler.steps - 1) if steps is None else list(steps)
    x0 = np.empty((len(seeds), len(chosen), *sampler.interface.shape), np.uint8)
    for part, state in trajectories(sampler, seeds, labels, chosen, batch=batch, progress=progress):
        x0[part, [i for i, step in enumerate(chosen) if step == state.step]] = to_uint8(state.x0)[:, None]
    return Progressive(x0, sampler.timesteps[chosen] + 1)


# Shared latents: figure 7


@dataclass(frozen=True, eq=False)
class SharedLatents:
    """The states of N chains at D depths, and K images drawn from each state.

    `latents`: float32 (N, D, C, H, W), the shared x_t, not clipped. `images`: uint8 (N, D, K, C, H, W), samples from
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
    """Run each chain once to each depth, and from there `continuations` times with independent noise (figure 7).

    `depths`: 1..T, see `step_at`. Raises `UsageError` for other depths.
    """
    if continuations < 1 or not len(depths):
        raise UsageError(
            f"shared latents need a depth and a continuation or more; got {len(depths)} and {continuations}"
        )
    steps = [step_at(sampler, depth) for depth in depths]
    kept = latents(sampler, seeds, labels, steps, batch=batch, progress=progress)
    others = [relative(seed, k) for seed in seeds for k in range(1, continuations + 1)]
    classes = repeated(sampler.labels_for(seeds, labels), continuations)
    images = np.empty((len(seeds), len(depths), continuations, *sampler.interface.shape), np.uint8)
    for i, step in enumerate(steps):
        start = StartState(kept[i].repeat_interleave(continuations, dim=0), step)
        drawn = draw(sampler, others, classes, start=start, batch=batch, progress=progress)
        images[:, i] = drawn.reshape(len(seeds), continuations, *drawn.shape[1:])
    return SharedLatents(
        kept.transpose(0, 1).contiguous().numpy(), images, np.array([depth_of(sampler, step) for step in steps])
    )


# Interpolation: figures 8 and 9, section 4.4


@dataclass(frozen=True, eq=False)
class Interpolation:
    """Interpolations of P pairs of images at D depths for L lambdas: `images`, uint8 (P, D, L, C, H, W).

    `depths`: int64 (D,), steps of the forward process before mixing. `lambdas`: float64 (L,), 0 for the first image of
    a pair, 1 for the second.
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
    """Diffuse both images of each pair to x_t and x'_t, mix (1 - lambda) x_t + lambda x'_t, and denoise the mixture.

    `pairs`: uint8 (P, 2, C, H, W). `depths`: 1..T, see `step_at`, or 0 to mix the pixels. `lambdas`: 0..1. `seeds`: one
    per pair, which determines its noise. `labels`: one per pair, for a network with classes. x_t, x'_t and the chain's
    noise are the same for every lambda, and the noise of x_t and x'_t is the same for every depth. `one_noise`: both
    images get the same noise. Default: independent noise, as in the released code. Raises `UsageError` for values
    outside these ranges.
    """
    if pairs.dtype != np.uint8 or pairs.shape[1:] != (2, *sampler.interface.shape) or len(pairs) != len(seeds):
        raise UsageError(
            f"pairs must be uint8 ({len(seeds)}, 2, {', '.join(map(str, sampler.interface.shape))}), one per seed; "
            f"got {pairs.dtype} {pairs.shape}"
        )
    if not all(0 <= value <= 1 for value in lambdas):
        raise UsageError(f"lambdas must be in [0, 1]; got {', '.join(f'{value:g}' for value in lambdas)}")
    steps = [step_at(sampler, depth) if depth else sampler.steps for depth in depths]
    every_seed = [seed for seed in seeds for _ in lambdas]
    every_label = repeated(sampler.labels_for(seeds, labels), len(lambdas))
    images = np.empty((len(pairs), len(depths), len(lambdas), *sampler.interface.shape), np.uint8)
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
    """Return x_t and x'_t before `step`, float32 (P, C, H, W) on the CPU; x_0 and x'_0 for step S."""
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
    """Return (1 - lambda) first + lambda second, (P * L, C, H, W), all lambdas of a pair in a row."""
    weight = torch.tensor(lambdas, dtype=torch.float32).reshape(1, -1, 1, 1, 1)
    return ((1 - weight) * first[:, None] + weight * second[:, None]).flatten(0, 1)


# Trajectories of the forward and reverse process


@dataclass(frozen=True, eq=False)
class Trajectory:
    """The states of N images at K depths: `x`, float32 (N, K, C, H, W), not clipped; `depths`, int64 (K,), 0 is x_0."""

    x: np.ndarray
    depths: np.ndarray


def forward_trajectory(sampler: Sampler, images: np.ndarray, steps: Sequence[int], seeds: Sequence[int]) -> Trajectory:
    """Draw x_t from q(x_t | x_0) before each of `steps`, for `images`, uint8 (N, C, H, W).

    `steps`: 0..S, see `latents`; step S gives x_0. An image has the same noise, determined by its seed, at every step.
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
    """Return x_t of the chains of `seeds` before each of `steps`, 0..S, see `latents`; step S gives the images."""
    kept = latents(sampler, seeds, labels, steps, batch=batch, progress=progress)
    return Trajectory(kept.transpose(0, 1).contiguous().numpy(), _depths(sampler, steps))


def _depths(sampler: Sampler, steps: Sequence[int]) -> np.ndarray:
    return np.array([depth_of(sampler, step) for step in steps])


# Class grids


def class_grid(
    sampler: Sampler,
    seeds: Sequence[int],
    scales: Sequence[float] | None = None,
    *,
    batch: int = 64,
    progress: Progress | None = None,
) -> np.ndarray:
    """Draw every class from every seed at every guidance scale: uint8 (scales, classes, seeds, C, H, W).

    All images of a seed have the same noise. `scales`. Default: the sampler's own. Raises `UsageError` if the network
    has no classes, and for a scale other than 1 if it was not trained for guidance.
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
    """Return the number of classes of the network. Raises `UsageError` if it has none."""
    if not sampler.interface.num_classes:
        raise UsageError("this network was trained without classes: there is no grid of classes to draw")
    return sampler.interface.num_classes


# The images of the data set that a figure shows


def picked(dataset: Dataset, count: int) -> np.ndarray:
    """Choose `count` images and return their indices, int64 (count,). Raises `UsageError` if there are fewer."""
    num = len(dataset.images)
    if num < count:
        raise UsageError(f"the picture needs {count} images, the data set has {num}; take fewer --picture.rows")
    return epoch_order(num, _SEED, 0)[:count]


def pairs(dataset: Dataset, count: int, sampler: Sampler) -> tuple[np.ndarray, list[int] | None]:
    """Choose pairs of images to interpolate between: their indices, int64 (count, 2), and a label per pair or None.

    For a network with classes both images of a pair are of one class, because the mixture is denoised with that class.
    If the data set has no labels, pairs get the network's null label. Raises `UsageError` if there are too few images,
    or neither labels nor a null label.
    """
    num_classes, null_label = sampler.interface.num_classes, sampler.interface.null_label
    if num_classes and dataset.labels is not None:
        return _of_one_class(dataset.labels, count)
    if num_classes and null_label is None:
        raise UsageError(
            "this network needs the class of each image, and the data set has no labels to choose pairs by"
        )
    found = picked(dataset, 2 * count).reshape(count, 2)
    return found, [null_label] * count if num_classes and null_label is not None else None


def _of_one_class(labels: np.ndarray, count: int) -> tuple[np.ndarray, list[int]]:
    """Return the first `count` pairs of one class in a random order of the images."""
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
    raise UsageError(
        f"the picture needs {count} pairs of images of one class, the data set has {len(found)}; "
        "take fewer --picture.rows"
    )
