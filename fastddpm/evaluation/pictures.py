"""The paper's pictures as files: each draws the arrays by its library call and lays them out.

A picture is a PNG, with a GIF where it is a process in time, and the arrays beside it as .npz. Numbers above columns
and beside rows are steps of the forward process, the paper's t: 0 is an image, T noise.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from fastddpm.files import save_arrays
from fastddpm.runlog import Meter
from fastddpm.sampler import Sampler

from .classes import class_grid, classes_of
from .drawing import Progress, draw, evaluations, evenly, step_at
from .interpolation import Interpolation, interpolate
from .layout import Block, levels, save_blocks, save_frames
from .neighbours import Features, nearest_features, nearest_pixels
from .picture_options import PictureOptions
from .progressive import progressive
from .shared_latents import shared_latents
from .sources import pairs, picked
from .strips import Strip, forward_strip, reverse_strip
from .subject import Subject

# Where chains are stopped, or images mixed: parts of T, those of the paper's figures.
_DEPTHS = {
    "shared-latent": (1, 0.75, 0.5, 0.25),
    "interpolation": (0.5,),
    "interpolation-depths": (1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0),
}


def draw_progressive(subject: Subject, options: PictureOptions) -> list[Path]:
    """Figure 6: a row an image, its x_0 predictions from the first step to the last."""
    shown, frames = (evenly(count, subject.sampler.steps - 1) for count in (options.columns, options.frames))
    steps = sorted({*shown, *frames})
    with _progress("progressive", subject, options) as progress:
        found = progressive(subject.sampler, options.seeds, steps=steps, batch=subject.batch, progress=progress)
    columns = [steps.index(step) for step in shown]
    texts = [f"t={depth}" for depth in found.depths[columns]]
    return [
        save_blocks([Block(found.x0[:, columns], texts)], subject.out / "progressive.png"),
        save_frames([found.x0[:, steps.index(step)] for step in frames], subject.out / "progressive.gif"),
        _save(subject, "progressive", x0=found.x0, depths=found.depths, seeds=np.array(options.seeds)),
    ]


def draw_shared_latents(subject: Subject, options: PictureOptions) -> list[Path]:
    """Figure 7: a row a chain; for each depth x_t and, right of it, images drawn from it."""
    depths = _depths("shared-latent", subject.sampler, options)
    with _progress("shared-latent", subject, options) as progress:
        found = shared_latents(
            subject.sampler, options.seeds, depths, options.continuations, batch=subject.batch, progress=progress
        )
    cells = np.concatenate([levels(found.latents)[:, :, None], found.images], axis=2)
    texts = [""] * options.continuations
    blocks = [Block(cells[:, i], [f"t={depth}", *texts]) for i, depth in enumerate(found.depths)]
    arrays = {"latents": found.latents, "images": found.images, "depths": found.depths}
    return [
        save_blocks(blocks, subject.out / "shared-latent.png"),
        _save(subject, "shared-latent", **arrays, seeds=np.array(options.seeds)),
    ]


def draw_interpolation(subject: Subject, options: PictureOptions) -> list[Path]:
    """Figure 8: a row a pair of images, which stand at the borders, mixed at one depth."""
    images, found, arrays = _interpolated("interpolation", subject, options, options.rows)
    blocks = _between(images[:, :1], found.images[:, 0], images[:, 1:], found.lambdas)
    return [save_blocks(blocks, subject.out / "interpolation.png"), _save(subject, "interpolation", **arrays)]


def draw_interpolation_depths(subject: Subject, options: PictureOptions) -> list[Path]:
    """Figure 9: one pair of images, a row a depth, from coarse to fine."""
    images, found, arrays = _interpolated("interpolation-depths", subject, options, 1)
    first, second = (np.repeat(images[:, i : i + 1], len(found.depths), axis=0) for i in (0, 1))
    blocks = _between(first, found.images[0], second, found.lambdas)
    rows = [f"t={depth}" for depth in found.depths]
    return [
        save_blocks(blocks, subject.out / "interpolation-depths.png", rows),
        _save(subject, "interpolation-depths", **arrays),
    ]


def draw_neighbours(subject: Subject, options: PictureOptions) -> list[Path]:
    """The appendix: a row a sample, at the left, and the images nearest to it by pixels; another by features."""
    features = None if options.features is None else _features(options.features, subject)
    with _progress("neighbours", subject, options) as progress:
        samples = draw(subject.sampler, options.seeds, batch=subject.batch, progress=progress)
    images, k = subject.dataset.images, options.neighbours
    found = {"neighbours": nearest_pixels(samples, images, k, crop=options.crop)}
    if features is not None:
        found["neighbours-features"] = nearest_features(samples, images, k, features, batch=subject.batch)
    paths = []
    for name, nearest in found.items():
        shown = images[nearest.indices.reshape(-1)].reshape(len(samples), k, *samples.shape[1:])
        blocks = [Block(samples[:, None], ["drawn"]), Block(shown, [f"{i + 1}." for i in range(k)])]
        paths.append(save_blocks(blocks, subject.out / f"{name}.png"))
        paths.append(_save(subject, name, samples=samples, **vars(nearest), seeds=np.array(options.seeds)))
    return paths


def draw_strips(subject: Subject, options: PictureOptions) -> list[Path]:
    """Images of the data set by q from x_0 to x_T, samples by p from x_T to x_0; the animation shows both in turn."""
    sampler = subject.sampler
    shown, frames = (evenly(count, sampler.steps) for count in (options.columns, options.frames))
    steps = sorted({*shown, *frames})
    indices = picked(subject.dataset, options.rows)
    forward = forward_strip(sampler, subject.dataset.images[indices], steps, options.seeds)
    with _progress("strips", subject, options) as progress:
        reverse = reverse_strip(sampler, options.seeds, steps, batch=subject.batch, progress=progress)
    columns, moments = ([steps.index(step) for step in chosen] for chosen in (shown, frames))
    animated = [levels(strip.x[:, i]) for strip, order in ((forward, moments[::-1]), (reverse, moments)) for i in order]
    arrays = {"forward": forward.x, "reverse": reverse.x, "depths": reverse.depths, "sources": indices}
    return [
        _save_strip(forward, columns[::-1], subject.out / "strips-forward.png"),
        _save_strip(reverse, columns, subject.out / "strips-reverse.png"),
        save_frames(animated, subject.out / "strips.gif"),
        _save(subject, "strips", **arrays, seeds=np.array(options.seeds)),
    ]


def draw_classes(subject: Subject, options: PictureOptions) -> list[Path]:
    """A row a class, a column a seed, a block a scale of guidance."""
    scales, seeds = _scales(subject.sampler, options), options.column_seeds
    with _progress("classes", subject, options) as progress:
        found = class_grid(subject.sampler, seeds, scales, batch=subject.batch, progress=progress)
    texts = [""] * (len(seeds) - 1)
    blocks = [Block(cells, [f"guidance {scale:g}", *texts]) for scale, cells in zip(scales, found, strict=True)]
    rows = [str(label) for label in range(found.shape[1])]
    return [
        save_blocks(blocks, subject.out / "classes.png", rows),
        _save(subject, "classes", images=found, scales=np.array(scales), seeds=np.array(seeds)),
    ]


PICTURES: dict[str, Callable[[Subject, PictureOptions], list[Path]]] = {
    "progressive": draw_progressive,
    "shared-latent": draw_shared_latents,
    "interpolation": draw_interpolation,
    "interpolation-depths": draw_interpolation_depths,
    "neighbours": draw_neighbours,
    "strips": draw_strips,
    "classes": draw_classes,
}
"""Each writes its files into `subject.out` and returns their paths; of several processes one calls it."""


def picture_cost(name: str, subject: Subject, options: PictureOptions) -> int:
    """How often picture `name` evaluates the network for one image; `UsageError` where it cannot be drawn."""
    sampler, rows = subject.sampler, options.rows
    if name == "classes":
        images = classes_of(sampler) * len(options.column_seeds)
        return sum(images * sampler.steps * (1 if scale == 1 else 2) for scale in _scales(sampler, options))
    if name not in _DEPTHS:
        return evaluations(sampler, rows, sampler.steps)
    starts = [step_at(sampler, depth) for depth in _depths(name, sampler, options) if depth]
    behind = sum(sampler.steps - start for start in starts)
    if name == "shared-latent":
        return evaluations(sampler, rows, max(starts, default=0) + options.continuations * behind)
    return evaluations(sampler, (rows if name == "interpolation" else 1) * options.lambdas, behind)


def _depths(name: str, sampler: Sampler, options: PictureOptions) -> list[int]:
    depths = options.depths or [round(part * sampler.diffusion.timesteps) for part in _DEPTHS[name]]
    return list(depths[:1] if name == "interpolation" else depths)


def _scales(sampler: Sampler, options: PictureOptions) -> list[float]:
    """Those asked for, as far as the network knows guidance."""
    return [1.0] if sampler.unet.null_label is None else list(options.scales)


def _interpolated(
    name: str, subject: Subject, options: PictureOptions, count: int
) -> tuple[np.ndarray, Interpolation, dict[str, np.ndarray]]:
    """The pairs, uint8 (count, 2, C, H, W), what lies between them, and the arrays of it."""
    indices, labels = pairs(subject.dataset, count, subject.sampler)
    images = subject.dataset.images[indices.reshape(-1)].reshape(count, 2, *subject.dataset.images.shape[1:])
    lambdas = np.linspace(0, 1, options.lambdas).tolist()
    with _progress(name, subject, options) as progress:
        found = interpolate(
            subject.sampler, images, _depths(name, subject.sampler, options), lambdas, options.seeds[:count], labels,
            one_noise=options.one_noise, batch=subject.batch, progress=progress,
        )  # fmt: skip
    return images, found, {**vars(found), "sources": indices}


def _between(first: np.ndarray, found: np.ndarray, second: np.ndarray, lambdas: np.ndarray) -> list[Block]:
    texts = [f"{value:.2g}" for value in lambdas]
    return [Block(first, ["first"]), Block(found, texts), Block(second, ["second"])]


def _features(name: str, subject: Subject) -> Features:
    """The features of a network, as arrays."""
    from fastddpm.metrics.networks import open_network

    network = open_network(name, image_size=subject.dataset.images.shape[-1], device=subject.device)

    def features(images: np.ndarray) -> np.ndarray:
        return network(torch.from_numpy(np.ascontiguousarray(images)).to(subject.device)).features.cpu().numpy()

    return features


def _save_strip(strip: Strip, columns: Sequence[int], path: Path) -> Path:
    return save_blocks([Block(levels(strip.x[:, columns]), [f"t={strip.depths[i]}" for i in columns])], path)


def _save(subject: Subject, name: str, **arrays: np.ndarray) -> Path:
    path = subject.out / f"{name}.npz"
    save_arrays(arrays, path)
    return path


@contextmanager
def _progress(name: str, subject: Subject, options: PictureOptions) -> Iterator[Progress]:
    with Meter(name, picture_cost(name, subject, options), "evaluations") as meter:

        def more(evaluations: int) -> None:
            meter.update(meter.done + evaluations)

        yield more
