"""Reverse chains of many seeds, run in batches from any step and observed at any step. Batches change no image."""

from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fastddpm.errors import UsageError

from .chain import StartState
from .images import to_uint8
from .sampler import Sampler, State

Progress = Callable[[int], object]
"""A callable that gets the number of network evaluations, each of one image, since its last call."""

_REPORTS = 100  # of progress, in a chain
_GOLDEN = 0x9E3779B9  # 2^32 / golden ratio: its multiples are far from each other and from small numbers


def step_at(sampler: Sampler, depth: int) -> int:
    """Return the step of the chain whose input is x_t after `depth` steps of the forward process, 1..T.

    This is the step at timestep depth - 1 or, in a chain that skips it, at the nearest timestep. Raises `UsageError`
    for a depth out of range.
    """
    total = sampler.diffusion.timesteps
    if not 1 <= depth <= total:
        raise UsageError(f"a depth counts steps of the forward process, 1..{total}; got {depth}")
    return int(np.abs(sampler.timesteps - (depth - 1)).argmin())


def depth_of(sampler: Sampler, step: int) -> int:
    """Return the number of forward-process steps in the input of `step`; 0 for `sampler.steps`, the finished image."""
    return 0 if step == sampler.steps else int(sampler.timesteps[step]) + 1


def evenly(count: int, end: int) -> list[int]:
    """Return up to `count` integers evenly spread over 0..end, both ends included, without repetition.

    A count of 1 gives 0. Raises `UsageError` for a count below 1.
    """
    if count < 1:
        raise UsageError(f"at least one step must be shown; got {count}")
    return np.unique(np.linspace(0, end, count).round().astype(int)).tolist()


def relative(seed: int, k: int) -> int:
    """Return the k-th further image number that belongs to `seed`, for another draw of noise; k = 0 gives `seed`."""
    return (seed + k * _GOLDEN) % 2**32


def evaluations(sampler: Sampler, images: int, steps: Sequence[int]) -> int:
    """Return the number of network evaluations, each of one image, for `images` and `steps`, 0..S-1.

    A step with classifier-free guidance takes two.
    """
    return images * (len(steps) + int(sampler.guided_steps[list(steps)].sum()))


def parts(num: int, batch: int) -> Iterator[slice]:
    """Yield slices of `batch` that cover 0..num-1; the last one may be shorter. Raises `UsageError` for batch < 1."""
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
    """Run the reverse chains of `seeds`, `batch` at a time; yield (part, state) after each step in `watch`.

    `part`: the batch, as a slice of `seeds`. `state`: as from `Sampler.trajectory`, valid until the next one is
    requested. `labels`: as for `Sampler.sample`. `watch`: steps 0..S-1. Default: the last step, whose x are the images.
    `start`: the states of all N chains, float32 (N, C, H, W) on any device, and the step that takes them. Default:
    noise, at step 0. `progress` is called about a hundred times a chain. All code that draws a list of seeds uses this
    loop.
    """
    first, last = (0 if start is None else start.step), sampler.steps - 1
    shown = {last} if watch is None else set(watch)
    # A watched step makes the device wait for the host, so not every step is reported.
    reports = {*range(first, last, max(1, sampler.steps // _REPORTS)), last} if progress is not None else set()
    for part in parts(len(seeds), batch):
        part_start = None if start is None else start.part(part)
        reported = first
        for state in sampler.trajectory(seeds[part], part_of(labels, part), reports | shown, part_start):
            if progress is not None and state.step in reports:
                progress(evaluations(sampler, part.stop - part.start, range(reported, state.step + 1)))
                reported = state.step + 1
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
    images = np.empty((len(seeds), *sampler.interface.shape), np.uint8)
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
    """Return the inputs of `steps`, 0..S: x_T for step 0, the finished images for S, which is the end of the chain.

    float32 (len(steps), N, C, H, W) on the CPU, not clipped. Chains stop at the last of `steps`. Other arguments as for
    `trajectories`; `progress` is called after each step.
    """
    kept = torch.empty(len(steps), len(seeds), *sampler.interface.shape)
    for part in parts(len(seeds), batch):
        size = part.stop - part.start
        with sampler.chain(seeds[part], part_of(labels, part)) as chain:
            for step in range(max(steps) + 1):
                for row in (row for row, wanted in enumerate(steps) if wanted == step):
                    kept[row, part] = chain.x[:size].cpu()
                if step < max(steps):
                    chain.advance(keep_x0=False)
                    if progress is not None:
                        progress(evaluations(sampler, size, [step]))
    return kept


def part_of(labels: Sequence[int] | None, part: slice) -> Sequence[int] | None:
    """Return the labels of a part of the seeds, or None without labels."""
    return None if labels is None else labels[part]


def repeated(labels: Sequence[int] | None, times: int) -> list[int] | None:
    """Return each label `times` times in a row, or None without labels."""
    return None if labels is None else [label for label in labels for _ in range(times)]
