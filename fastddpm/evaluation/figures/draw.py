"""Draw the paper's pictures into files.

A picture is a PNG, with its arrays as .npz, and for a process in time a GIF. Labels t=.. count steps of the forward
process, the paper's t: 0 is an image, T is noise.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from fastddpm.evaluation.context import EvaluationContext
from fastddpm.evaluation.options import PictureOptions
from fastddpm.runtime.image_size import image_size
from fastddpm.runtime.progress import Meter, announced, log
from fastddpm.sampling.sampler import Sampler
from fastddpm.sampling.trajectories import Progress, draw, evaluations, evenly, step_at
from fastddpm.storage.files import save_arrays

from .chains import (
    Interpolation,
    Trajectory,
    class_grid,
    classes_of,
    forward_trajectory,
    interpolate,
    pairs,
    picked,
    progressive,
    reverse_trajectory,
    shared_latents,
)
from .layout import Panel, levels, save_frames, save_panels
from .neighbours import Features, check_search, nearest_features, nearest_pixels

# Depths at which chains are stopped or images are mixed, as fractions of T, from the paper's figures.
_DEPTHS = {
    "shared-latent": (1, 0.75, 0.5, 0.25),
    "interpolation": (0.5,),
    "interpolation-depths": (1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0),
}


def draw_progressive(context: EvaluationContext, options: PictureOptions) -> list[Path]:
    """Draw figure 6: one row per image, with its x_0 predictions from the first step to the last."""
    shown, frames = (evenly(count, context.sampler.steps - 1) for count in (options.columns, options.frames))
    steps = sorted({*shown, *frames})
    with _progress("progressive", context, options) as progress:
        found = progressive(context.sampler, options.seeds, steps=steps, batch=context.batch, progress=progress)
    columns = [steps.index(step) for step in shown]
    texts = [f"t={depth}" for depth in found.depths[columns]]
    return [
        save_panels([Panel(found.x0[:, columns], texts)], context.out / "progressive.png"),
        save_frames([found.x0[:, steps.index(step)] for step in frames], context.out / "progressive.gif"),
        _save(context, "progressive", x0=found.x0, depths=found.depths, seeds=np.array(options.seeds)),
    ]


def draw_shared_latents(context: EvaluationContext, options: PictureOptions) -> list[Path]:
    """Draw figure 7: one row per chain, one panel per depth with x_t and the images drawn from it."""
    depths = _depths("shared-latent", context.sampler, options)
    with _progress("shared-latent", context, options) as progress:
        found = shared_latents(
            context.sampler, options.seeds, depths, options.continuations, batch=context.batch, progress=progress
        )
    cells = np.concatenate([levels(found.latents)[:, :, None], found.images], axis=2)
    texts = [""] * options.continuations
    panels = [Panel(cells[:, i], [f"t={depth}", *texts]) for i, depth in enumerate(found.depths)]
    arrays = {"latents": found.latents, "images": found.images, "depths": found.depths}
    return [
        save_panels(panels, context.out / "shared-latent.png"),
        _save(context, "shared-latent", **arrays, seeds=np.array(options.seeds)),
    ]


def draw_interpolation(context: EvaluationContext, options: PictureOptions) -> list[Path]:
    """Draw figure 8: one row per pair of images, with the pair at the borders, mixed at one depth."""
    images, found, arrays = _interpolated("interpolation", context, options, options.rows)
    panels = _interpolation_panels(images[:, :1], found.images[:, 0], images[:, 1:], found.lambdas)
    return [save_panels(panels, context.out / "interpolation.png"), _save(context, "interpolation", **arrays)]


def draw_interpolation_depths(context: EvaluationContext, options: PictureOptions) -> list[Path]:
    """Draw figure 9: one pair of images, one row per depth, from coarse to fine."""
    images, found, arrays = _interpolated("interpolation-depths", context, options, 1)
    first, second = (np.repeat(images[:, i : i + 1], len(found.depths), axis=0) for i in (0, 1))
    panels = _interpolation_panels(first, found.images[0], second, found.lambdas)
    rows = [f"t={depth}" for depth in found.depths]
    return [
        save_panels(panels, context.out / "interpolation-depths.png", rows),
        _save(context, "interpolation-depths", **arrays),
    ]


def draw_neighbours(context: EvaluationContext, options: PictureOptions) -> list[Path]:
    """Draw the nearest neighbours of the appendix: one row per sample, with the sample at the left.

    One picture is by pixels; if `options.features` is set, another one is by features.
    """
    features = None if options.features is None else _features(options.features, context)
    with _progress("neighbours", context, options) as progress:
        samples = draw(context.sampler, options.seeds, batch=context.batch, progress=progress)
    images, k = context.dataset.images, options.neighbours
    with announced(f"comparing the pixels of {len(images):,} images"):
        found = {"neighbours": nearest_pixels(samples, images, k, crop=options.crop)}
    if features is not None:
        with announced(f"comparing the features of {len(images):,} images"):
            found["neighbours-features"] = nearest_features(samples, images, k, features, batch=context.batch)
    paths = []
    for name, nearest in found.items():
        shown = images[nearest.indices.reshape(-1)].reshape(len(samples), k, *samples.shape[1:])
        panels = [Panel(samples[:, None], ["drawn"]), Panel(shown, [f"{i + 1}." for i in range(k)])]
        paths.append(save_panels(panels, context.out / f"{name}.png"))
        paths.append(_save(context, name, samples=samples, **vars(nearest), seeds=np.array(options.seeds)))
    return paths


def draw_strips(context: EvaluationContext, options: PictureOptions) -> list[Path]:
    """Draw trajectories: of data set images by q from x_0 to x_T, and of samples by p from x_T to x_0.

    The animation shows the two in turn.
    """
    sampler = context.sampler
    shown, frames = (evenly(count, sampler.steps) for count in (options.columns, options.frames))
    steps = sorted({*shown, *frames})
    indices = picked(context.dataset, options.rows)
    forward = forward_trajectory(sampler, context.dataset.images[indices], steps, options.seeds)
    with _progress("strips", context, options) as progress:
        reverse = reverse_trajectory(sampler, options.seeds, steps, batch=context.batch, progress=progress)
    columns, moments = ([steps.index(step) for step in chosen] for chosen in (shown, frames))
    animated = [levels(forward.x[:, i]) for i in reversed(moments)] + [levels(reverse.x[:, i]) for i in moments]
    arrays = {"forward": forward.x, "reverse": reverse.x, "depths": reverse.depths, "sources": indices}
    return [
        _save_trajectory(forward, columns[::-1], context.out / "strips-forward.png"),
        _save_trajectory(reverse, columns, context.out / "strips-reverse.png"),
        save_frames(animated, context.out / "strips.gif"),
        _save(context, "strips", **arrays, seeds=np.array(options.seeds)),
    ]


def draw_classes(context: EvaluationContext, options: PictureOptions) -> list[Path]:
    """Draw the classes: one row per class, one column per seed, one panel per guidance scale."""
    scales, seeds = _scales(context.sampler, options), options.column_seeds
    with _progress("classes", context, options) as progress:
        found = class_grid(context.sampler, seeds, scales, batch=context.batch, progress=progress)
    texts = [""] * (len(seeds) - 1)
    panels = [Panel(cells, [f"guidance {scale:g}", *texts]) for scale, cells in zip(scales, found, strict=True)]
    rows = [str(label) for label in range(found.shape[1])]
    return [
        save_panels(panels, context.out / "classes.png", rows),
        _save(context, "classes", images=found, scales=np.array(scales), seeds=np.array(seeds)),
    ]


PICTURES: dict[str, Callable[[EvaluationContext, PictureOptions], list[Path]]] = {
    "progressive": draw_progressive,
    "shared-latent": draw_shared_latents,
    "interpolation": draw_interpolation,
    "interpolation-depths": draw_interpolation_depths,
    "neighbours": draw_neighbours,
    "strips": draw_strips,
    "classes": draw_classes,
}
"""The function that draws each picture: it writes files to `context.out` and returns their paths.

Of several processes only one may call it.
"""


def check_picture(name: str, context: EvaluationContext, options: PictureOptions) -> None:
    """Raise `UsageError` if picture `name` cannot be drawn for this network, data set or options. Draws nothing."""
    picture_cost(name, context, options)
    if name != "neighbours":
        return
    check_search(context.dataset.images, options.neighbours, options.crop)
    if options.features is not None:
        from fastddpm.metrics.networks import check_network

        channels, *size = context.sampler.interface.shape
        check_network(options.features, image_size=image_size(size), channels=channels)


def picture_cost(name: str, context: EvaluationContext, options: PictureOptions) -> int:
    """Return the number of network evaluations, each of one image, that picture `name` takes.

    Raises `UsageError` if the picture cannot be drawn for this network.
    """
    sampler, rows = context.sampler, options.rows
    if name == "classes":
        images, inside = classes_of(sampler) * len(options.column_seeds), sampler.guide.inside(sampler.timesteps)
        return sum(
            images * (sampler.steps + (int(inside.sum()) if scale != 1 else 0)) for scale in _scales(sampler, options)
        )
    if name not in _DEPTHS:
        return evaluations(sampler, rows, range(sampler.steps))
    starts = [step_at(sampler, depth) for depth in _depths(name, sampler, options) if depth]
    remaining = [step for start in starts for step in range(start, sampler.steps)]
    if name == "shared-latent":
        return evaluations(sampler, rows, [*range(max(starts, default=0)), *remaining * options.continuations])
    return evaluations(sampler, (rows if name == "interpolation" else 1) * options.lambdas, remaining)


def _depths(name: str, sampler: Sampler, options: PictureOptions) -> list[int]:
    """Return the depths of a picture; `interpolation` uses only the first one."""
    depths = options.depths or [round(part * sampler.diffusion.timesteps) for part in _DEPTHS[name]]
    return list(depths[:1] if name == "interpolation" else depths)


def _scales(sampler: Sampler, options: PictureOptions) -> list[float]:
    """Return the guidance scales, only 1 for a network that was not trained for guidance."""
    return [1.0] if sampler.interface.null_label is None else list(options.scales)


def _interpolated(
    name: str, context: EvaluationContext, options: PictureOptions, count: int
) -> tuple[np.ndarray, Interpolation, dict[str, np.ndarray]]:
    """Return `count` pairs of images, uint8 (count, 2, C, H, W), their interpolation, and the arrays to save."""
    indices, labels = pairs(context.dataset, count, context.sampler)
    images = context.dataset.images[indices.reshape(-1)].reshape(count, 2, *context.dataset.images.shape[1:])
    lambdas = np.linspace(0, 1, options.lambdas).tolist()
    with _progress(name, context, options) as progress:
        found = interpolate(
            context.sampler, images, _depths(name, context.sampler, options), lambdas, options.seeds[:count], labels,
            one_noise=options.one_noise, batch=context.batch, progress=progress,
        )  # fmt: skip
    return images, found, {**vars(found), "sources": indices}


def _interpolation_panels(first: np.ndarray, found: np.ndarray, second: np.ndarray, lambdas: np.ndarray) -> list[Panel]:
    texts = [f"{value:.2g}" for value in lambdas]
    return [Panel(first, ["first"]), Panel(found, texts), Panel(second, ["second"])]


def _features(name: str, context: EvaluationContext) -> Features:
    """Return a function that computes the features of feature network `name`."""
    from fastddpm.metrics.networks import open_network

    with announced(f"opening the feature network {name}"):
        size = image_size(context.dataset.images.shape[2:])
        network = open_network(name, image_size=size, device=context.device, report=log)

    def features(images: np.ndarray) -> np.ndarray:
        return network(torch.from_numpy(np.ascontiguousarray(images)).to(context.device)).features.cpu().numpy()

    return features


def _save_trajectory(trajectory: Trajectory, columns: Sequence[int], path: Path) -> Path:
    texts = [f"t={trajectory.depths[i]}" for i in columns]
    return save_panels([Panel(levels(trajectory.x[:, columns]), texts)], path)


def _save(context: EvaluationContext, name: str, **arrays: np.ndarray) -> Path:
    path = context.out / f"{name}.npz"
    save_arrays(arrays, path)
    return path


@contextmanager
def _progress(name: str, context: EvaluationContext, options: PictureOptions) -> Iterator[Progress]:
    """Provide a progress callback that counts the evaluations of picture `name` in a meter."""
    with Meter(name, picture_cost(name, context, options), "evaluations") as meter:

        def more(evaluations: int) -> None:
            meter.update(meter.done + evaluations)

        yield more
