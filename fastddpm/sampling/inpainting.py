"""Inpainting: the unknown part of an image drawn so that it fits the known part.

Lugmayr, Danelljan, Romero, Yu, Timofte, Van Gool, "RePaint: Inpainting using Denoising Diffusion Probabilistic Models"
(CVPR 2022). The network is used as it is: after each step the known pixels of x_{t-1} are replaced by q(x_{t-1} | x_0)
of the image given (equation 8). Stretches of the chain are taken several times, with noise added in between (section
4.2): so what is drawn and what is known come to agree.
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
from .sampler import Sampler, image_seeds
from .trajectories import Progress, evaluations, image_shape, parts


@dataclass(frozen=True, eq=False)
class Inpainted:
    """`images`: uint8 (N, C, H, W), equal to the given ones where those are known.

    `x0`: uint8 (N, F, C, H, W), what the chain took for x_0 at F places on its way, the known pixels put in.
    """

    images: np.ndarray
    x0: np.ndarray


def walk(steps: int, jump_length: int, resamplings: int) -> list[int]:
    """The steps of a chain, 0..steps-1, in the order in which they are taken.

    Counted back from the last step, which is taken once, each stretch of `jump_length` steps is taken `resamplings`
    times before the next; a shorter rest at the beginning once. Raises `UsageError` for values below 1.
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
    """Draw what is not known of `images`, uint8 (N, C, H, W), with the sampler's steps, method and guidance.

    `known`: bool, True where a pixel is given, one mask (H, W) for all images or one for each, (N, H, W). `seeds`:
    (N,), naming each image's noise; the same image with several seeds is completed several times. `labels`: as for
    `Sampler.sample`. `jump_length`, `resamplings`: see `walk`; (10, 10) is the publication's. `frames`: places of the
    walk at which x_0 predictions are kept.

    An image depends on its pixels, mask, seed and label, not on the rest of the batch. Known pixels stay as they are.
    Where nothing is known there is nothing to agree with: such an image takes each step once, and is what
    `Sampler.sample` draws. Where everything is known the network is not asked. Raises `UsageError` for other shapes.
    """
    mask = _mask(sampler, images, known, seeds)
    labels = sampler.labels_for(seeds, labels)
    drawn = Inpainted(images.copy(), np.repeat(images[:, None], frames, axis=1))
    for rows, times in _groups(mask, resamplings):
        order = walk(sampler.steps, jump_length, times)
        shown = np.linspace(0, len(order) - 1, frames).round().astype(int)
        for part in parts(len(rows), batch):
            chosen = rows[part]
            own = None if labels is None else [labels[row] for row in chosen]
            work = _Part(sampler, images[chosen], mask[chosen], [seeds[row] for row in chosen], own)
            drawn.images[chosen], drawn.x0[chosen] = work.run(order, shown, progress)
    return Inpainted(np.where(mask, images, drawn.images), np.where(mask[:, None], images[:, None], drawn.x0))


def cost(sampler: Sampler, known: np.ndarray, num_images: int, jump_length: int, resamplings: int) -> int:
    """How often `inpaint` evaluates the network for one image, for all `num_images` together."""
    mask = np.broadcast_to(known[..., None, :, :], (num_images, 1, *known.shape[-2:]))
    return sum(
        evaluations(sampler, len(rows), len(walk(sampler.steps, jump_length, times)))
        for rows, times in _groups(mask, resamplings)
    )


class _Part:
    """One batch on its way: a chain whose state is held to what is known."""

    def __init__(
        self,
        sampler: Sampler,
        images: np.ndarray,
        known: np.ndarray,
        seeds: Sequence[int],
        labels: Sequence[int] | None,
    ) -> None:
        self._sampler, self._seeds, self._labels = sampler, seeds, labels
        device = next(sampler.unet.parameters()).device
        self._images = torch.from_numpy(images).to(device)
        self._known = torch.from_numpy(known).to(device)
        self._seed = torch.tensor(sampler.seed, dtype=torch.int64, device=device)
        self._numbers = torch.tensor(image_seeds(seeds), dtype=torch.int64, device=device)

    @torch.no_grad()
    def run(self, order: Sequence[int], shown: np.ndarray, progress: Progress | None) -> tuple[np.ndarray, np.ndarray]:
        """The images (n, C, H, W) and the x_0 predictions (n, F, C, H, W) after the places `shown` of `order`."""
        num, steps, times = len(self._seeds), self._sampler.steps, 0
        x0 = np.empty((num, len(shown), *image_shape(self._sampler)), np.uint8)
        with self._sampler.chain(self._seeds, self._labels) as chain:
            for place, (step, following) in enumerate(zip(order, [*order[1:], steps], strict=True)):
                watched = place in shown
                chain.advance(watched)
                if watched:
                    x0[:, shown == place] = to_uint8(chain.x0[:num])[:, None]
                self._hold(chain, step + 1, times)
                if following != step + 1:
                    times += 1
                    self._take_back(chain, step + 1, following, times)
                if progress is not None:
                    progress(evaluations(self._sampler, num, 1))
            return to_uint8(chain.x[:num]), x0

    def _hold(self, chain: ReverseChain, step: int, times: int) -> None:
        """Put q(x_t | x_0) of the known pixels into the state that `step` takes, x_0 itself behind the last step."""
        if step == self._sampler.steps:
            known = scale_images(self._images, None)
        else:
            known, _ = self._sampler.diffusion.q_sample(self._images, self._timestep(step), self._key(step, times))
        state = chain.x[: len(self._seeds)]
        state.copy_(torch.where(self._known, known, state))

    def _take_back(self, chain: ReverseChain, step: int, earlier: int, times: int) -> None:
        """From the state that `step` takes to one that `earlier` takes: q(x_t | x_s) of the process, for t > s."""
        s, t = (int(self._sampler.timesteps[i]) for i in (step, earlier))
        alpha = float(self._sampler.diffusion.alpha_bar[t] / self._sampler.diffusion.alpha_bar[s])
        state = chain.x[: len(self._seeds)]
        eps = random_normal(state.shape[1:], self._numbers, self._seed, self._counter(times), STREAM_RENOISE)
        state.mul_(alpha**0.5).add_(eps, alpha=(1 - alpha) ** 0.5)
        chain.rewind(earlier)

    def _timestep(self, step: int) -> torch.Tensor:
        return torch.full((len(self._seeds),), int(self._sampler.timesteps[step]), device=self._seed.device)

    def _key(self, step: int, times: int) -> NoiseKey:
        """Another draw for every timestep, and for every time that it is reached."""
        t, total = int(self._sampler.timesteps[step]), self._sampler.diffusion.timesteps
        return NoiseKey(self._seed, self._counter(t + total * times), self._numbers)

    def _counter(self, value: int) -> torch.Tensor:
        return torch.full((), value, dtype=torch.int64, device=self._seed.device)


def _groups(mask: np.ndarray, resamplings: int) -> list[tuple[np.ndarray, int]]:
    """Rows of `mask`, (N, 1, H, W), and how often they take each stretch; rows that are known whole are in none."""
    some, every = mask.any(axis=(1, 2, 3)), mask.all(axis=(1, 2, 3))
    return [(np.flatnonzero(~some), 1), (np.flatnonzero(some & ~every), resamplings)]


def _mask(sampler: Sampler, images: np.ndarray, known: np.ndarray, seeds: Sequence[int]) -> np.ndarray:
    """`known` as bool (N, 1, H, W), after a look at everything."""
    shape = (len(seeds), *image_shape(sampler))
    if images.dtype != np.uint8 or images.shape != shape:
        raise UsageError(f"images must be uint8 {shape}, one for each seed; got {images.dtype} {images.shape}")
    if known.dtype != np.bool_ or known.shape not in (shape[2:], (shape[0], *shape[2:])):
        raise UsageError(
            f"known must be bool {shape[2:]} or {(shape[0], *shape[2:])}, True where a pixel is given; "
            f"got {known.dtype} {known.shape}"
        )
    return np.broadcast_to(known[..., None, :, :], (shape[0], 1, *shape[2:]))
