"""Draw images and write them to files: grids, animations, arrays, and shards of many images."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from fastddpm.runtime.progress import Meter
from fastddpm.storage.files import save_arrays
from fastddpm.storage.shards import Shards

from .images import beside, grid, save_animation, save_png, to_uint8
from .sampler import Sampler, State
from .trajectories import evaluations, latents, part_of, trajectories

ANIMATION_FRAMES = 24  # beside that of the finished images
_ANIMATION_PIXELS = 300  # the greatest width of each half of an animation, unless one image is wider
_MOST_SHOWN = 64  # images in it
_NOISE_FRAMES = 6  # as long as so many frames the first one is shown


@dataclass(frozen=True)
class Batch:
    """The finished images of one batch, uint8 (N, C, H, W), and their seeds."""

    seeds: Sequence[int]
    images: np.ndarray


class FrameRecorder:
    """Collects the frames of an animation: x_t on the left, the x_0 prediction made from it on the right.

    `sampler`: takes the chain; 24 of its steps are kept, evenly spread, or all if there are fewer, and then the images.
    `images`: number of images in the batch. A frame shows the first ones: at most 64, in two squares about 300 pixels
    wide, at least one. The t in the caption is the paper's: T of the noise, 0 of the images.
    """

    def __init__(self, sampler: Sampler, images: int) -> None:
        steps, side = sampler.steps, max(sampler.interface.shape[1:])
        self._chosen = set(np.linspace(0, steps - 1, min(steps, ANIMATION_FRAMES)).round().astype(int).tolist())
        self._timesteps = sampler.timesteps.tolist()
        self.watch = self._chosen | {step - 1 for step in self._chosen if step}
        self.images = min(images, _MOST_SHOWN, max(1, _ANIMATION_PIXELS // side) ** 2)
        self._scale = max(1, _ANIMATION_PIXELS // (max(1, math.ceil(math.sqrt(self.images))) * side))
        self._x: np.ndarray | None = None
        self.frames: list[Image.Image] = []

    def begin(self, noise: Tensor) -> None:
        """Take x_T, float32 (N, C, H, W)."""
        self._x = self._shown(noise)

    def add(self, state: State) -> None:
        """Take the state after a step in `watch`; the steps come in order."""
        assert self._x is not None
        if state.step in self._chosen:
            # The first frame is repeated, and equal frames are stored as one that lasts as long.
            frame = self._frame(self._x, self._shown(state.x0), self._timesteps[state.step] + 1)
            self.frames += [frame] * (1 if self.frames else _NOISE_FRAMES)
        self._x = self._shown(state.x)
        if state.step == len(self._timesteps) - 1:
            self.frames.append(self._frame(self._x, self._x, 0))

    def _shown(self, x: Tensor) -> np.ndarray:
        return to_uint8(x[: self.images])

    def _frame(self, x: np.ndarray, x0: np.ndarray, t: int) -> Image.Image:
        return beside([(f"x_t, t = {t}", x), ("predicted x_0", x0)], self._scale)


def sample_batches(
    sampler: Sampler,
    seeds: Sequence[int],
    labels: Sequence[int] | None = None,
    *,
    batch: int = 64,
    recorder: FrameRecorder | None = None,
) -> Iterator[Batch]:
    """Draw the images of `seeds` batch by batch, and show progress in images/s.

    `labels`: as for `Sampler.sample`. `batch`: images evaluated at once. `recorder`: collects the frames of the first
    batch.
    """
    last = sampler.steps - 1
    watch = {last} if recorder is None else {last, *recorder.watch}
    each, evaluated = evaluations(sampler, 1, range(sampler.steps)), 0
    with Meter("sampling", len(seeds) * sampler.steps, "image steps") as meter:

        def progress(more: int) -> None:
            nonlocal evaluated
            evaluated += more  # a step with guidance counts for two of the others
            steps = evaluated * sampler.steps // each
            meter.update(steps, lambda rate: f"{rate / sampler.steps:.2f} images/s")

        if recorder is not None and len(seeds):
            shown = slice(0, min(recorder.images, batch))
            recorder.begin(latents(sampler, seeds[shown], part_of(labels, shown), [0], batch=batch)[0])
        for part, state in trajectories(sampler, seeds, labels, watch, batch=batch, progress=progress):
            if recorder is not None and part.start == 0:
                recorder.add(state)
            if state.step == last:
                yield Batch(seeds[part], to_uint8(state.x))


def fill(shards: Shards, indices: Sequence[int], sampler: Sampler, batch: int, *, png: bool = False) -> float:
    """Draw and write the shards of `indices`, `batch` images at a time; return the speed in images/s.

    `png`: also write one PNG for each image. Only one shard is in memory at a time.
    """
    total = sum(len(shards.part(index)[0]) for index in indices)
    with Meter("sampling", total, "images") as meter:
        for index in indices:
            seeds, labels = shards.part(index)
            images = np.empty((len(seeds), *shards.shape), np.uint8)
            for part, state in trajectories(sampler, seeds, labels, batch=batch):
                images[part] = to_uint8(state.x)
                if png:
                    save_png_of_each(Batch(seeds[part], images[part]), shards.directory)
                meter.update(meter.done + part.stop - part.start, lambda rate: f"{rate:.2f} images/s")
            shards.write(index, images)
        return meter.rate


def save_png_of_shard(shards: Shards, index: int) -> None:
    """Write the missing PNG files of the images of a finished shard."""
    seeds, _ = shards.part(index)
    wanted = [i for i, seed in enumerate(seeds) if not _png(shards.directory, seed).exists()]
    if wanted:
        images = shards.read(index)
        save_png_of_each(Batch([seeds[i] for i in wanted], images[wanted]), shards.directory)


def _png(directory: Path, seed: int) -> Path:
    return directory / f"{seed:010d}.png"


def save_png_of_each(batch: Batch, directory: Path) -> None:
    """Write one PNG for each image, named by its seed."""
    directory.mkdir(parents=True, exist_ok=True)
    for seed, image in zip(batch.seeds, batch.images, strict=True):
        save_png(grid(image[None], padding=0, scale=1), _png(directory, seed))


def save_first_grid(shards: Shards) -> Path:
    """Write samples.png, a grid of the first 64 images of the first shard, or all if it has fewer; return its path."""
    path = shards.directory / "samples.png"
    save_png(grid(shards.read(0)[:64]), path)
    return path


def save_pictures(
    images: np.ndarray,
    seeds: Sequence[int],
    labels: Sequence[int] | None,
    frames: Sequence[Image.Image],
    directory: Path,
    animation: str = ".gif",
) -> list[Path]:
    """Write the grid samples.png, the arrays samples.npz and, given frames, an animation; return their paths.

    `animation`: the suffix of denoising.webp or denoising.gif.
    The arrays: `images` as given, `seeds` int64 (N,), and `labels` int64 (N,) unless None.
    """
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / "samples.png", directory / "samples.npz"]
    save_png(grid(images), paths[0])
    arrays = {"images": images, "seeds": np.asarray(seeds, dtype=np.int64)}
    if labels is not None:
        arrays["labels"] = np.asarray(labels, dtype=np.int64)
    save_arrays(arrays, paths[1])
    if frames:
        paths.append(directory / f"denoising{animation}")
        save_animation(frames, paths[-1])
    return paths
