"""Sampling with pictures: batches, progress, grids, animations. What the two commands share."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastddpm.errors import UsageError
from fastddpm.runtime.progress import Meter
from fastddpm.storage.files import save_arrays
from fastddpm.storage.shards import Shards

from .chain import StartState
from .images import grid, save_animation, save_png, to_uint8
from .sampler import Sampler, State

# Chains as figures need them: started anywhere, looked at anywhere

Progress = Callable[[int], object]
"""Told how many more evaluations of one image are done."""

_REPORTS = 100  # of progress, in a chain
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


def states(
    sampler: Sampler,
    seeds: Sequence[int],
    labels: Sequence[int] | None,
    watch: Collection[int],
    *,
    start: StartState | None = None,
    progress: Progress | None = None,
) -> Iterator[State]:
    """`Sampler.trajectory` that tells `progress`, some hundred times a chain."""
    first = 0 if start is None else start.step
    reports = {*range(first, sampler.steps, max(1, sampler.steps // _REPORTS)), sampler.steps - 1}
    told = first
    for state in sampler.trajectory(seeds, labels, reports | set(watch), start):
        if progress is not None:
            progress(evaluations(sampler, len(seeds), state.step + 1 - told))
        told = state.step + 1
        if state.step in watch:
            yield state


def draw(
    sampler: Sampler,
    seeds: Sequence[int],
    labels: Sequence[int] | None = None,
    *,
    start: StartState | None = None,
    batch: int = 64,
    progress: Progress | None = None,
) -> np.ndarray:
    """The images of `seeds`, uint8 (N, C, H, W): `Sampler.sample`, `batch` of them at a time.

    `start`: one state of all N images, float32 (N, C, H, W) on any device, and the step that they go on with.
    """
    images = np.empty((len(seeds), *image_shape(sampler)), np.uint8)
    for part in parts(len(seeds), batch):
        own = None if start is None else StartState(start.x[part], start.step)
        last = sampler.steps - 1
        for state in states(sampler, seeds[part], part_of(labels, part), {last}, start=own, progress=progress):
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


ANIMATION_FRAMES = 40
_REPORTS = 100  # of progress, in a chain: each step that is looked at makes the device wait for the host


@dataclass(frozen=True)
class Batch:
    """Finished images of one batch: their seeds, and uint8 (N, C, H, W)."""

    seeds: Sequence[int]
    images: np.ndarray


class FrameRecorder:
    """Keeps some of a chain's x_0 predictions as grids: the frames of an animation."""

    def __init__(self, steps: int, images: int) -> None:
        self.chosen = set(np.linspace(0, steps - 1, min(steps, ANIMATION_FRAMES)).round().astype(int).tolist())
        self._images = images
        self.frames: list[Image.Image] = []

    def __call__(self, i: int, t: int, x_t: Tensor, x0: Tensor) -> None:
        if i in self.chosen:
            self.frames.append(grid(to_uint8(x0[: self._images])))


def sample_batches(
    sampler: Sampler,
    seeds: Sequence[int],
    labels: Sequence[int] | None = None,
    *,
    batch: int = 64,
    recorder: FrameRecorder | None = None,
) -> Iterator[Batch]:
    """The images of `seeds`, batch by batch, with progress in images/s; `recorder` watches the first batch."""
    last = sampler.steps - 1
    watch = {*range(0, last, max(1, sampler.steps // _REPORTS)), last}
    if recorder is not None:
        watch |= recorder.chosen
    with Meter("sampling", len(seeds) * sampler.steps, "image steps") as meter:
        for start in range(0, len(seeds), batch):
            part = seeds[start : start + batch]

            def callback(i: int, t: int, x_t: Tensor, x0: Tensor, start: int = start, size: int = len(part)) -> None:
                if recorder is not None and start == 0:
                    recorder(i, t, x_t, x0)
                meter.update(
                    start * sampler.steps + size * (i + 1), lambda rate: f"{rate / sampler.steps:.2f} images/s"
                )

            part_labels = None if labels is None else labels[start : start + batch]
            yield Batch(part, to_uint8(sampler.sample(part, part_labels, callback, watch)))


def fill(shards: Shards, indices: Sequence[int], sampler: Sampler, batch: int, *, png: bool = False) -> float:
    """Draw the shards of `indices`, one after another, `batch` images at a time; with `png` a file for each image, too.

    Images per second. No more than a shard is held in memory.
    """
    total = sum(len(shards.part(index)[0]) for index in indices)
    done = 0
    with Meter("sampling", total, "images") as meter:
        for index in indices:
            seeds, labels = shards.part(index)
            parts = []
            for start in range(0, len(seeds), batch):
                chosen = slice(start, start + batch)
                part_labels = None if labels is None else labels[chosen]
                drawn = Batch(seeds[chosen], to_uint8(sampler.sample(seeds[chosen], part_labels)))
                if png:
                    save_png_of_each(drawn, shards.directory)
                parts.append(drawn.images)
                done += len(drawn.images)
                meter.update(done, lambda rate: f"{rate:.2f} images/s")
            shards.write(index, np.concatenate(parts))
        return meter.rate


def save_png_of_shard(shards: Shards, index: int) -> None:
    """One PNG for each image of a shard that is there, as far as they are not."""
    seeds, _ = shards.part(index)
    wanted = [i for i, seed in enumerate(seeds) if not _png(shards.directory, seed).exists()]
    if wanted:
        images = shards.read(index)
        save_png_of_each(Batch([seeds[i] for i in wanted], images[wanted]), shards.directory)


def _png(directory: Path, seed: int) -> Path:
    return directory / f"{seed:010d}.png"


def save_png_of_each(batch: Batch, directory: Path) -> None:
    """One PNG for each image, named by its seed."""
    directory.mkdir(parents=True, exist_ok=True)
    for seed, image in zip(batch.seeds, batch.images, strict=True):
        save_png(grid(image[None], padding=0, scale=1), _png(directory, seed))


def save_first_grid(shards: Shards) -> Path:
    """samples.png of the first 64 images, as far as they are in the first shard."""
    path = shards.directory / "samples.png"
    save_png(grid(shards.read(0)[:64]), path)
    return path


def save_pictures(
    images: np.ndarray,
    seeds: Sequence[int],
    labels: Sequence[int] | None,
    frames: Sequence[Image.Image],
    directory: Path,
) -> list[Path]:
    """Write the grid, the arrays (images, seeds, and labels if any) and, given frames, the animation; their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / "samples.png", directory / "samples.npz"]
    save_png(grid(images), paths[0])
    arrays = {"images": images, "seeds": np.asarray(seeds, dtype=np.int64)}
    if labels is not None:
        arrays["labels"] = np.asarray(labels, dtype=np.int64)
    save_arrays(arrays, paths[1])
    if frames:
        paths.append(directory / "denoising.gif")
        save_animation(frames, paths[-1])
    return paths
