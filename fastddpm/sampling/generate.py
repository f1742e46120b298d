"""The files of a sampling: grids, animations, arrays, and shards of many images."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fastddpm.runtime.progress import Meter
from fastddpm.storage.files import save_arrays
from fastddpm.storage.shards import Shards

from .images import grid, save_animation, save_png, to_uint8
from .sampler import Sampler, State
from .trajectories import evaluations, trajectories

ANIMATION_FRAMES = 40


@dataclass(frozen=True)
class Batch:
    """Finished images of one batch: their seeds, and uint8 (N, C, H, W)."""

    seeds: Sequence[int]
    images: np.ndarray


class FrameRecorder:
    """Keeps the x_0 predictions of some steps as grids: the frames of an animation.

    `steps`: of the chain; 40 of them are kept, evenly spread. `images`: how many images of a batch are shown.
    """

    def __init__(self, steps: int, images: int) -> None:
        self.chosen = set(np.linspace(0, steps - 1, min(steps, ANIMATION_FRAMES)).round().astype(int).tolist())
        self._images = images
        self.frames: list[Image.Image] = []

    def add(self, state: State) -> None:
        """Keep a state's x_0 prediction if its step was chosen."""
        if state.step in self.chosen:
            self.frames.append(grid(to_uint8(state.x0[: self._images])))


def sample_batches(
    sampler: Sampler,
    seeds: Sequence[int],
    labels: Sequence[int] | None = None,
    *,
    batch: int = 64,
    recorder: FrameRecorder | None = None,
) -> Iterator[Batch]:
    """Draw the images of `seeds`, batch by batch, with progress in images/s; `recorder` watches the first batch."""
    last = sampler.steps - 1
    watch = {last} if recorder is None else {last, *recorder.chosen}
    with Meter("sampling", len(seeds) * sampler.steps, "image steps") as meter:

        def progress(evaluated: int) -> None:
            steps = evaluated // evaluations(sampler, 1, 1)
            meter.update(meter.done + steps, lambda rate: f"{rate / sampler.steps:.2f} images/s")

        for part, state in trajectories(sampler, seeds, labels, watch, batch=batch, progress=progress):
            if recorder is not None and part.start == 0:
                recorder.add(state)
            if state.step == last:
                yield Batch(seeds[part], to_uint8(state.x))


def fill(shards: Shards, indices: Sequence[int], sampler: Sampler, batch: int, *, png: bool = False) -> float:
    """Draw the shards of `indices` one by one, `batch` images at a time; with `png` also one file for each image.

    Returns images per second. No more than one shard is held in memory.
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
