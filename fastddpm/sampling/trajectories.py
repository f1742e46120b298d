"""Reverse chains of many seeds, in batches that change no image: started anywhere, looked at anywhere."""

from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fastddpm.errors import UsageError

from .chain import StartState
from .images import to_uint8
from .sampler import Sampler, State

Progress = Callable[[int], object]
"""Is told how many more evaluations of one image are done."""

_REPORTS = 100  # of progress in a chain
_GOLDEN = 0x9E3779B9  # 2^32 over the golden ratio: its multiples are far from each other and from small numbers


def step_at(sampler: Sampler, depth: int) -> int:
    """The step that begins after `depth` steps of the forward process, 1..T: that of timestep depth - 1.

    A chain that leaves timesteps out gives the nearest that it takes. Raises `UsageError` for another depth.
    """
    total = sampler.diffusion.timesteps
    if not 1 <= depth <= total:
        raise UsageError(f"a depth counts steps of the forward process, 1..{total}; got {depth}")
    return int(np.abs(sampler.timesteps - (depth - 1)).argmin())


def depth_of(sampler: Sampler, step: int) -> int:
    """How many steps of the forward process the state before `step` has behind it; 0 for `sampler.steps`, the end."""
    return 0 if step == sampler.steps else int(sampler.timesteps[step]) + 1


def evenly(count: int, end: int) -> list[int]:
    """`count` numbers from 0 to `end`, both included, evenly spread and rounded; fewer where they would repeat."""
    if count < 1:
        raise UsageError(f"at least one step must be shown; got {count}")
    return np.unique(np.linspace(0, end, count).round().astype(int)).tolist()


def relative(seed: int, k: int) -> int:
    """The k-th other image number of an image: noise of its own that goes with that of `seed`."""
    return (seed + k * _GOLDEN) % 2**32


def evaluations(sampler: Sampler, images: int, steps: int) -> int:
    """How often the network is evaluated for one image; with guidance it is twice a step."""
    return images * steps * (1 if sampler.guidance == 1 else 2)


def parts(num: int, batch: int) -> Iterator[slice]:
    """0..num-1 in slices of `batch`."""
    if batch < 1:
        raise UsageError(f"batch must be positive; got {batch}")
    for start in range(0, num, batch):
        yield slice(start, min(start + batch, num))


def trajectories(
    sampler: Sampler,
    seeds: Sequence[int],
    labels: Sequence[int] | None = None,
    watch: Collection[int] | None = None,
    *,
    start: StartState | None = None,
    batch: int = 64,
    progress: Progress | None = None,
) -> Iterator[tuple[slice, State]]:
    """Run the reverse chains of `seeds`, `batch` of them at a time; yield (part, state) after each step of `watch`.

    `part`: the batch, as a slice of `seeds`. `state`: as `Sampler.trajectory` gives it, valid until the next one is
    asked for. `watch`: steps 0..S-1; default: the last step, whose x are the images. `start`: one state of all N
    chains, float32 (N, C, H, W) on any device, and the step that they go on with. `progress` is told about a hundred
    times a chain. Every program that draws a list of seeds does it by this loop.
    """
    first, last = (0 if start is None else start.step), sampler.steps - 1
    shown = {last} if watch is None else set(watch)
    # A step that is looked at makes the device wait for the host, so not every step is reported.
    reports = {*range(first, last, max(1, sampler.steps // _REPORTS)), last} if progress is not None else set()
    for part in parts(len(seeds), batch):
        own = None if start is None else StartState(start.x[part], start.step)
        told = first
        for state in sampler.trajectory(seeds[part], part_of(labels, part), reports | shown, own):
            if progress is not None and state.step in reports:
                progress(evaluations(sampler, part.stop - part.start, state.step + 1 - told))
                told = state.step + 1
            if state.step in shown:
                yield part, state


def draw(
    sampler: Sampler,
    seeds: Sequence[int],
    labels: Sequence[int] | None = None,
    *,
    start: StartState | None = None,
    batch: int = 64,
    progress: Progress | None = None,
) -> np.ndarray:
    """Draw the images of `seeds`, uint8 (N, C, H, W); arguments as for `trajectories`."""
    images = np.empty((len(seeds), *image_shape(sampler)), np.uint8)
    for part, state in trajectories(sampler, seeds, labels, start=start, batch=batch, progress=progress):
        images[part] = to_uint8(state.x)
    return images


@torch.no_grad()
def latents(
    sampler: Sampler,
    seeds: Sequence[int],
    labels: Sequence[int] | None,
    steps: Sequence[int],
    *,
    batch: int = 64,
    progress: Progress | None = None,
) -> Tensor:
    """What a chain holds before each of `steps`, 0..S: x_T before step 0, the images before S, which is the end.

    float32 (len(steps), N, C, H, W) on the CPU, not clipped. No chain goes on behind the last of `steps`.
    """
    kept = torch.empty(len(steps), len(seeds), *image_shape(sampler))
    for part in parts(len(seeds), batch):
        size = part.stop - part.start
        with sampler.chain(seeds[part], part_of(labels, part)) as chain:
            for step in range(max(steps) + 1):
                for row in (row for row, wanted in enumerate(steps) if wanted == step):
                    kept[row, part] = chain.x[:size].cpu()
                if step < max(steps):
                    chain.advance(keep_x0=False)
                    if progress is not None:
                        progress(evaluations(sampler, size, 1))
    return kept


def part_of(labels: Sequence[int] | None, part: slice) -> Sequence[int] | None:
    """The labels of a part of the seeds, where there are labels."""
    return None if labels is None else labels[part]


def repeated(labels: Sequence[int] | None, times: int) -> list[int] | None:
    """Each label `times` times in a row, where there are labels."""
    return None if labels is None else [label for label in labels for _ in range(times)]


def image_shape(sampler: Sampler) -> tuple[int, int, int]:
    """(C, H, W) of what the network draws."""
    config = sampler.unet.config
    return config.image_channels, config.image_size, config.image_size
