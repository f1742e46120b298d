"""Inpainting: draw the unknown part of an image so that it fits the known part.

Lugmayr, Danelljan, Romero, Yu, Timofte, Van Gool, "RePaint: Inpainting using Denoising Diffusion Probabilistic Models"
(CVPR 2022). The network is not trained further: after each step the known pixels of x_{t-1} are replaced by a draw from
q(x_{t-1} | x_0) of the given image (equation 8). Stretches of the chain are repeated, with noise added in between
(section 4.2), which makes the drawn part agree with the known part.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fastddpm.errors import UsageError
from fastddpm.kernels.philox import STREAM_RENOISE
from fastddpm.kernels.q_sample.reference import scale_images
from fastddpm.ops import random_normal
from fastddpm.ops.noise import NoiseKey

from .chain import ReverseChain
from .images import to_uint8
from .sampler import Sampler
from .seeds import image_seeds
from .trajectories import Progress, evaluations, parts


@dataclass(frozen=True, eq=False)
class Inpainted:
    """Completed images and how they came about.

    `images`: uint8 (N, C, H, W), equal to the given images at known pixels. `x0`: uint8 (N, F, C, H, W), the x_0
    predictions at F places of the walk, with the known pixels filled in.
    """

    images: np.ndarray
    x0: np.ndarray


def walk(steps: int, jump_length: int, resamplings: int) -> list[int]:
    """Return the steps of a chain, 0..steps-1, in the order in which they are taken, with repetitions.

    The last step is taken once. The steps before it are divided, from the end, into stretches of `jump_length` steps,
    each taken `resamplings` times before the next. Steps left over at the beginning are taken once. Raises `UsageError`
    for values below 1.
    """
    if jump_length < 1 or resamplings < 1:
        raise UsageError(f"jump length and resamplings must be positive; got {jump_length} and {resamplings}")
    rest = (steps - 1) % jump_length
    order = list(range(rest))
    for first in range(rest, steps - 1, jump_length):
        order += list(range(first, first + jump_length)) * resamplings
    return [*order, steps - 1]


def inpaint(
    sampler: Sampler,
    images: np.ndarray,
    known: np.ndarray,
    seeds: Sequence[int],
    labels: Sequence[int] | None = None,
    *,
    jump_length: int = 10,
    resamplings: int = 10,
    frames: int = 0,
    batch: int = 64,
    progress: Progress | None = None,
) -> Inpainted:
    """Draw the unknown pixels of `images`, uint8 (N, C, H, W), with the sampler's steps, method and guidance.

    The method is ancestral or ddim (`check_method`). Guidance moves all pixels; known ones are set after it.

    `known`: bool, True at known pixels; one mask (H, W) for all images, or (N, H, W). `seeds`: (N,), one for each
    image's noise. To complete an image several times, repeat it with other seeds. `labels`: as for `Sampler.sample`.
    `jump_length`, `resamplings`: see `walk`; the defaults are the publication's. `frames`: number of places, evenly
    spread over the walk, at which x_0 predictions are kept. `batch`: images evaluated at once.

    A completed image depends on its known pixels, mask, seed and label, not on the rest of the batch. Known pixels stay
    exactly as they are. An image without known pixels takes each step once and is the image that `Sampler.sample`
    draws. An image without unknown pixels is returned without evaluating the network. Raises `UsageError` for other
    shapes and dtypes, and for another method.
    """
    check_method(sampler)
    mask = _mask(sampler, images, known, seeds)
    labels = sampler.labels_for(seeds, labels)
    drawn = Inpainted(images.copy(), np.repeat(images[:, None], frames, axis=1))
    for rows, times in _groups(mask, resamplings):
        order = walk(sampler.steps, jump_length, times)
        shown = np.linspace(0, len(order) - 1, frames).round().astype(int)
        for part in parts(len(rows), batch):
            chosen = rows[part]
            classes = None if labels is None else [labels[row] for row in chosen]
            chain = _KnownPixelsChain(sampler, images[chosen], mask[chosen], [seeds[row] for row in chosen], classes)
            drawn.images[chosen], drawn.x0[chosen] = chain.run(order, shown, progress)
    return Inpainted(np.where(mask, images, drawn.images), np.where(mask[:, None], images[:, None], drawn.x0))


def check_method(sampler: Sampler) -> None:
    """Raise `UsageError` for dpm2m and dpm2m-sde.

    They continue the x_0 prediction of the step before, but RePaint changes the state between the steps.
    """
    if sampler.multistep:
        raise UsageError(
            f"inpainting changes the known pixels after each step, which method {sampler.method} cannot follow; take "
            "method ancestral or ddim"
        )


def cost(sampler: Sampler, known: np.ndarray, num_images: int, jump_length: int, resamplings: int) -> int:
    """Return the number of network evaluations, each of one image, that `inpaint` takes for all `num_images`.

    `known`: bool (H, W) or (num_images, H, W).
    """
    mask = np.broadcast_to(known[..., None, :, :], (num_images, 1, *known.shape[-2:]))
    return sum(
        evaluations(sampler, len(rows), walk(sampler.steps, jump_length, times))
        for rows, times in _groups(mask, resamplings)
    )


class _KnownPixelsChain:
    """The reverse chain of one batch, in which known pixels follow the forward process of the given images."""

    def __init__(
        self,
        sampler: Sampler,
        images: np.ndarray,
        known: np.ndarray,
        seeds: Sequence[int],
        labels: Sequence[int] | None,
    ) -> None:
        self._sampler, self._seeds, self._labels = sampler, seeds, labels
        device = sampler.device
        self._images = torch.from_numpy(images).to(device)
        self._known = torch.from_numpy(known).to(device)
        self._seed = torch.tensor(sampler.seed, dtype=torch.int64, device=device)
        self._numbers = torch.tensor(image_seeds(seeds), dtype=torch.int64, device=device)

    @torch.no_grad()
    def run(self, order: Sequence[int], shown: np.ndarray, progress: Progress | None) -> tuple[np.ndarray, np.ndarray]:
        """Take the steps of `order`; return the images, uint8 (n, C, H, W), and x_0 predictions, (n, F, C, H, W).

        `shown`: the F places of `order` whose predictions are kept.
        """
        num, steps, jumps = len(self._seeds), self._sampler.steps, 0
        x0 = np.empty((num, len(shown), *self._sampler.interface.shape), np.uint8)
        with self._sampler.chain(self._seeds, self._labels) as chain:
            for place, (step, following) in enumerate(zip(order, [*order[1:], steps], strict=True)):
                watched = place in shown
                chain.advance(watched)
                if watched:
                    x0[:, shown == place] = to_uint8(chain.x0[:num])[:, None]
                self._set_known(chain, step + 1, jumps)
                if following != step + 1:
                    jumps += 1
                    self._renoise(chain, step + 1, following, jumps)
                if progress is not None:
                    progress(evaluations(self._sampler, num, [step]))
            return to_uint8(chain.x[:num]), x0

    def _set_known(self, chain: ReverseChain, step: int, jumps: int) -> None:
        """Set the known pixels of the input of `step` to a draw from q(x_t | x_0), or to x_0 after the last step.

        `jumps`: how often the chain has jumped back so far, which selects fresh noise.
        """
        if step == self._sampler.steps:
            known = scale_images(self._images, None)
        else:
            known, _ = self._sampler.diffusion.q_sample(self._images, self._timestep(step), self._key(step, jumps))
        state = chain.x[: len(self._seeds)]
        state.copy_(torch.where(self._known, known, state))

    def _renoise(self, chain: ReverseChain, step: int, earlier: int, jumps: int) -> None:
        """Turn the input of `step` into one of `earlier` by the forward process, q(x_t | x_s) with t > s."""
        s, t = (int(self._sampler.timesteps[i]) for i in (step, earlier))
        alpha = float(self._sampler.diffusion.alpha_bar[t] / self._sampler.diffusion.alpha_bar[s])
        state = chain.x[: len(self._seeds)]
        eps = random_normal(state.shape[1:], self._numbers, self._seed, self._counter(jumps), STREAM_RENOISE)
        state.mul_(alpha**0.5).add_(eps, alpha=(1 - alpha) ** 0.5)
        chain.rewind(earlier)

    def _timestep(self, step: int) -> torch.Tensor:
        return torch.full((len(self._seeds),), int(self._sampler.timesteps[step]), device=self._seed.device)

    def _key(self, step: int, jumps: int) -> NoiseKey:
        """Return the key of the known pixels' noise: another one for each timestep and each jump back."""
        t, total = int(self._sampler.timesteps[step]), self._sampler.diffusion.timesteps
        return NoiseKey(self._seed, self._counter(t + total * jumps), self._numbers)

    def _counter(self, value: int) -> torch.Tensor:
        return torch.full((), value, dtype=torch.int64, device=self._seed.device)


def _groups(mask: np.ndarray, resamplings: int) -> list[tuple[np.ndarray, int]]:
    """Group the images of `mask`, (N, 1, H, W), by how often they take each stretch; return (image indices, times).

    Images without known pixels take it once. Images without unknown pixels are in no group.
    """
    any_known, all_known = mask.any(axis=(1, 2, 3)), mask.all(axis=(1, 2, 3))
    return [(np.flatnonzero(~any_known), 1), (np.flatnonzero(any_known & ~all_known), resamplings)]


def _mask(sampler: Sampler, images: np.ndarray, known: np.ndarray, seeds: Sequence[int]) -> np.ndarray:
    """Check `images` and `known`; return `known` as bool (N, 1, H, W)."""
    shape = (len(seeds), *sampler.interface.shape)
    if images.dtype != np.uint8 or images.shape != shape:
        raise UsageError(f"images must be uint8 {shape}, one for each seed; got {images.dtype} {images.shape}")
    if known.dtype != np.bool_ or known.shape not in (shape[2:], (shape[0], *shape[2:])):
        raise UsageError(
            f"known must be bool {shape[2:]} or {(shape[0], *shape[2:])}, True at known pixels; "
            f"got {known.dtype} {known.shape}"
        )
    return np.broadcast_to(known[..., None, :, :], (shape[0], 1, *shape[2:]))
