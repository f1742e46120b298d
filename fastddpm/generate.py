"""Sampling with pictures: batches, progress, grids, animations. What the two commands share."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from fastddpm.figures import grid, save_animation, save_png, to_uint8
from fastddpm.files import save_arrays
from fastddpm.runlog import Meter
from fastddpm.sampler import Sampler
from fastddpm.shards import Shards

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
